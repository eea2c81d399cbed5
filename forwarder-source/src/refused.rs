//! What an error in an object takes away, in files: the object, or one listener of it, and nothing that was in force before.
//!
//! An API server refuses an object as a whole, and says so to who writes it. A file is read when its writer may be gone: the other
//! listeners of a Gateway are not to fall with one.

use std::collections::{BTreeMap, BTreeSet};

use std::sync::Arc;

use super::locations::Place;
use super::node::Node;
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{Kind, Listener, ObjectRef, Refused, SERVICE_NAME_LABEL};
use forwarder_gateway::problem::{Location, Problem, Severity};
use forwarder_gateway::status::list;

/// The namespace of a namespaced object that names none.
pub(super) const DEFAULT_NAMESPACE: &str = "default";

/// The listeners that have an error, by their index, each with the field of its first; `None` where something else has one.
pub(super) fn listeners(problems: &[Problem]) -> Option<BTreeMap<usize, String>> {
    let mut refused = BTreeMap::new();
    for problem in problems.iter().filter(|problem| problem.severity == Severity::Error) {
        refused.entry(listener_of(&problem.field)?).or_insert_with(|| problem.field.clone());
    }
    Some(refused)
}

/// Whether an object can be in force without these listeners.
pub(super) fn leaves(refused: Option<&BTreeMap<usize, String>>, manifest: &Manifest) -> bool {
    let count = manifest.listeners().map_or(0, Vec::len);
    refused.is_some_and(|refused| refused.keys().all(|index| *index < count))
}

/// The index of the listener that a field is of.
fn listener_of(field: &str) -> Option<usize> {
    field.strip_prefix("spec.listeners[")?.split_once(']')?.0.parse().ok()
}

/// An object as it is to be in force.
#[derive(Debug)]
pub(super) struct Merged {
    pub(super) manifest: Manifest,
    /// The listener of each index, as it is in the file, and whether it is in force as it was before.
    listeners: Vec<(String, bool)>,
    /// The listeners that are in force as before, and not in the file.
    absent: Vec<String>,
}

/// As long as a listener of `now` is refused, no listener of the version before is certainly gone: a name may be what is misspelt. So each
/// stays as it was that is not among the good ones of `now`, unless one of these has its port.
pub(super) fn merge(now: &Manifest, before: Option<&Manifest>) -> Merged {
    let mut merged = Merged { manifest: now.clone(), listeners: Vec::new(), absent: Vec::new() };
    let written = now.listeners().map_or(&[][..], Vec::as_slice);
    let (refused, good): (Vec<&Listener>, Vec<&Listener>) =
        written.iter().partition(|listener| listener.refused.is_some());
    if refused.is_empty() {
        return merged;
    }
    // Which of two with one name is meant to have it cannot be told.
    let doubtful: BTreeSet<&str> = refused.iter().map(|listener| listener.name.as_str()).collect();
    let is_replaced = |old: &&Listener| {
        good.iter().any(|new| {
            let has_name = new.name == old.name;
            if has_name { !doubtful.contains(old.name.as_str()) } else { new.port == old.port }
        })
    };
    let before = before.and_then(Manifest::listeners).map_or(&[][..], Vec::as_slice);
    let kept = before.iter().filter(|old| old.refused.is_none() && !is_replaced(old));
    let mut result = written.to_vec();
    merged.listeners = written.iter().map(|listener| (listener.name.clone(), false)).collect();
    for old in kept {
        if let Some(own) = result.iter_mut().find(|listener| listener.name == old.name) {
            own.clone_from(old);
            let is_of_name = |it: &&mut (String, bool)| it.0 == old.name;
            merged.listeners.iter_mut().filter(is_of_name).for_each(|(_, is_kept)| *is_kept = true);
        } else {
            result.push(old.clone());
            merged.absent.push(old.name.clone());
        }
    }
    if let Some(listeners) = merged.manifest.listeners_mut() {
        *listeners = result;
    }
    merged
}

impl Merged {
    /// What follows from an error in a field of a listener.
    pub(super) fn consequence(&self, field: &str) -> String {
        let listener = listener_of(field).and_then(|index| self.listeners.get(index));
        let own = match listener {
            Some((_, true)) => "; the version of the listener before stays in force",
            Some((_, false)) | None => "; the listener is refused",
        };
        match self.absent.as_slice() {
            [] => own.to_owned(),
            absent => format!("{own}, and until this is corrected no other is taken away: {}", list(absent)),
        }
    }
}

/// One object of a file.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: ObjectRef,
    pub(super) place: Arc<Place>,
    /// The object, unless a problem of severity error refuses it. One in a listener refuses that listener only.
    pub(super) manifest: Option<Manifest>,
    /// What the object refers to, if it is refused.
    pub(super) refers_to: Vec<ObjectRef>,
    pub(super) problems: Vec<Problem>,
}

impl Entry {
    /// What is known of an object that is not in force.
    pub(super) fn refused(&self) -> Refused {
        let errors = self.problems.iter().filter(|problem| problem.severity == Severity::Error);
        let first: Option<Location> = errors.filter_map(|problem| problem.location.clone()).min();
        Refused { location: first.unwrap_or_else(|| self.place.start()), refers_to: self.refers_to.clone() }
    }
}

/// An object of a kind, as a text names it.
pub(super) fn named(kind: Kind, namespace: &str, name: &str) -> ObjectRef {
    let namespace = match (kind.is_cluster_scoped(), namespace) {
        (true, _) => "",
        (false, "") => DEFAULT_NAMESPACE,
        (false, namespace) => namespace,
    };
    ObjectRef { kind: kind.as_str().to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
}

/// What an object of a namespace refers to, as far as it can be read: see [`Refused::refers_to`].
pub(super) fn refers_to(node: &Node<'_>, kind: Kind, namespace: &str) -> Vec<ObjectRef> {
    let text = |node: &Node<'_>, key: &str| node.get(key).and_then(Node::text).map(str::to_owned);
    match kind {
        Kind::EndpointSlice => {
            let labels = node.get("metadata").and_then(|metadata| metadata.get("labels"));
            let service = labels.and_then(|labels| text(labels, SERVICE_NAME_LABEL));
            service.map(|name| named(Kind::Service, namespace, &name)).into_iter().collect()
        }
        Kind::TcpRoute => {
            let parents = node.get("spec").and_then(|spec| spec.get("parentRefs"));
            let parents = match parents {
                Some(Node::List(items)) => items.iter().map(|item| &item.value).collect(),
                Some(_) | None => Vec::new(),
            };
            let parent = |parent: &Node<'_>| {
                let kind = match text(parent, "kind").as_deref() {
                    None | Some("Gateway") => Kind::Gateway,
                    Some("ListenerSet") => Kind::ListenerSet,
                    Some(_) => return None,
                };
                let of = text(parent, "namespace").unwrap_or_else(|| namespace.to_owned());
                Some(named(kind, &of, &text(parent, "name")?))
            };
            parents.into_iter().filter_map(parent).collect()
        }
        Kind::GatewayClass
        | Kind::Gateway
        | Kind::ListenerSet
        | Kind::ReferenceGrant
        | Kind::Namespace
        | Kind::Service => Vec::new(),
    }
}
