//! Makes objects of a file's documents: recognises their kind, decodes and checks them.

use std::path::PathBuf;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use super::fields;
use super::locations::{Lines, Place};
use super::node::{Node, excerpt};
use super::refused::Entry;
use crate::{refused, yaml};
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{
    EndpointSlice, GATEWAY_GROUP, Kind, Metadata, Namespace, Object, ObjectRef, Refused, check,
};
use forwarder_gateway::problem::{Location, Problem, Reason, Severity};

/// After so many fields of a wrong type the rest of an object is not looked at.
const MOST_TYPE_ERRORS: usize = 32;

/// What a file holds.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// The objects that could be told by name, valid or not, in their order.
    pub(super) objects: Vec<Entry>,
    /// What is wrong with the rest.
    pub(super) problems: Vec<Problem>,
    /// Those whose kind is misspelt: what they are likely meant to be, and where they stand.
    pub(super) misspelt: Vec<(ObjectRef, Refused)>,
    /// Whether some document has no name, because it is broken: then an object that is missing may be that one.
    pub(super) is_broken: bool,
}

/// Reads a file's text.
pub(super) fn read(text: &str, file: &Arc<PathBuf>) -> Contents {
    let mut reader = Reader { file, contents: Contents::default() };
    for document in yaml::documents(text) {
        match yaml::parse(document) {
            Ok(Node::Null) => {}
            Ok(node) => {
                let line = node.entries().first().map_or(document.lines_before + 1, |entry| entry.line);
                reader.document(node, line, None);
            }
            Err(error) => {
                let line = if error.line == 0 { document.lines_before + 1 } else { error.line };
                reader.malformed(line, "", format!("the document is not YAML: {}", error.message));
            }
        }
    }
    reader.contents
}

struct Reader<'f> {
    file: &'f Arc<PathBuf>,
    contents: Contents,
}

/// What the items of a typed list, such as a `TCPRouteList`, are where they do not say so.
#[derive(Clone)]
struct ItemType {
    api_version: String,
    kind: String,
}

impl Reader<'_> {
    fn document(&mut self, mut node: Node<'_>, line: u32, item_type: Option<&ItemType>) {
        if !matches!(node, Node::Map(_)) {
            return self.malformed(
                line,
                "",
                "the document is not a map: a Kubernetes object has apiVersion and kind".into(),
            );
        }
        let head = |key: &str, default: Option<&String>| match (node.get(key), default) {
            (Some(value), _) => value.text().map(str::to_owned).filter(|text| !text.is_empty()),
            (None, default) => default.cloned(),
        };
        let api_version = head("apiVersion", item_type.map(|it| &it.api_version));
        let kind = head("kind", item_type.map(|it| &it.kind));
        let (Some(api_version), Some(kind)) = (&api_version, &kind) else {
            let key = if api_version.is_none() { "apiVersion" } else { "kind" };
            return self.malformed(
                line,
                key,
                format!("is required, as a text: the document is no Kubernetes object without {key}"),
            );
        };
        if let Some(item_kind) = kind.strip_suffix("List")
            && let Some(items) = node.take("items")
        {
            let item_type = (!item_kind.is_empty())
                .then(|| ItemType { api_version: api_version.clone(), kind: item_kind.to_owned() });
            return self.list(items, line, item_type.as_ref());
        }
        self.object(node, line, api_version, kind);
    }

    fn list(&mut self, items: Node<'_>, line: u32, item_type: Option<&ItemType>) {
        match items {
            Node::List(items) => {
                for item in items {
                    self.document(item.value, item.line, item_type);
                }
            }
            _ => self.malformed(line, "items", "is not a list".to_owned()),
        }
    }

    fn object(&mut self, node: Node<'_>, line: u32, api_version: &str, kind: &str) {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let metadata = node.get("metadata");
        let text = |key: &str| {
            metadata.and_then(|it| it.get(key)).and_then(Node::text).unwrap_or_default().to_owned()
        };
        let mut id =
            ObjectRef { kind: excerpt(kind).into_owned(), namespace: text("namespace"), name: text("name") };
        let Some((kind, versions)) = known(group, kind) else {
            return self.unknown_kind(&node, line, group, kind, id);
        };
        if id.name.is_empty() {
            let lines = Lines::of(&node, line, usize::MAX);
            let message = match text("generateName").as_str() {
                "" => format!("a {kind} needs a name, as a text"),
                _ => format!(
                    "a {kind} needs a name: generateName is only for objects that an API server creates"
                ),
            };
            return self.malformed(lines.find("metadata.name"), "metadata.name", message);
        }
        match (kind.is_cluster_scoped(), id.namespace.as_str()) {
            (false, "") => refused::DEFAULT_NAMESPACE.clone_into(&mut id.namespace),
            // An API server forgives this one as well.
            (true, refused::DEFAULT_NAMESPACE) => id.namespace.clear(),
            (true | false, _) => {}
        }
        if !versions.contains(&version) {
            let message = format!(
                "version {:?} of {kind} is not read: use {}",
                excerpt(version),
                versions.iter().map(|version| join(group, version)).collect::<Vec<_>>().join(" or ")
            );
            let lines = Lines::of(&node, line, usize::MAX);
            let problem = Problem::error(Reason::UnsupportedKind, id.clone(), "apiVersion", message);
            let refers_to = refused::refers_to(&node, kind, &id.namespace);
            return self.entry(id, lines, None, refers_to, vec![problem]);
        }
        self.known_object(node, line, version, kind, id);
    }

    /// Tells of a document of a kind that is not read. `kind` is as it is written there.
    fn unknown_kind(&mut self, node: &Node<'_>, line: u32, group: &str, kind: &str, id: ObjectRef) {
        let of_group = excerpt(if group.is_empty() { "core" } else { group });
        let written = excerpt(kind);
        let kinds = Kind::ALL.iter().map(|one| one.as_str()).filter(|one| known(group, one).is_some());
        let location = self.at(line);
        let is_gateway_api = group == GATEWAY_GROUP;
        let (severity, message) = if is_gateway_api && fields::is_gateway_kind(kind) {
            (Severity::Warning, format!("{written} is not supported and is ignored: routes are TCPRoutes"))
        } else if let Some(meant) = fields::meant(kind, kinds) {
            if let Some((kind, _)) = known(group, meant) {
                let meant = refused::named(kind, &id.namespace, &id.name);
                let refers_to = refused::refers_to(node, kind, &meant.namespace);
                self.contents.misspelt.push((meant, Refused { location: location.clone(), refers_to }));
            }
            (Severity::Error, format!("unknown kind {written} of {of_group} (did you mean {meant}?)"))
        } else if is_gateway_api {
            (Severity::Error, format!("unknown kind {written}: no release of {of_group} has it"))
        } else {
            (Severity::Warning, format!("{written} of {of_group} is not read and is ignored"))
        };
        // An object that was there under its right kind is not gone.
        self.contents.is_broken |= severity == Severity::Error;
        self.contents.problems.push(Problem {
            severity,
            reason: Reason::UnsupportedKind,
            location: Some(location),
            object: Some(id).filter(|id| !id.name.is_empty()),
            field: "kind".to_owned(),
            message,
        });
    }

    fn known_object(&mut self, node: Node<'_>, line: u32, version: &str, kind: Kind, id: ObjectRef) {
        let namespace = &id.namespace;
        let (mut manifest, mut problems) = match kind {
            Kind::GatewayClass => build(&node, &id, namespace, check::gateway_class, Manifest::GatewayClass),
            Kind::Gateway => build(&node, &id, namespace, check::gateway, Manifest::Gateway),
            Kind::ListenerSet => build(&node, &id, namespace, check::listener_set, Manifest::ListenerSet),
            Kind::TcpRoute => {
                build(&node, &id, namespace, |it| check::tcp_route(it, version), Manifest::TcpRoute)
            }
            Kind::ReferenceGrant => {
                build(&node, &id, namespace, check::reference_grant, Manifest::ReferenceGrant)
            }
            Kind::Namespace => build(&node, &id, namespace, check::namespace, Manifest::Namespace),
            Kind::Service => build(&node, &id, namespace, check::service, Manifest::Service),
            Kind::EndpointSlice => {
                build(&node, &id, namespace, check::endpoint_slice, Manifest::EndpointSlice)
            }
        };
        let unknown = fields::unknown(&node, kind, &id);
        if !unknown.is_empty() {
            // Those that are not told may be anywhere.
            manifest = manifest.filter(|_| unknown.len() < fields::MOST);
            // That it is missing only follows.
            problems.retain(|problem| !unknown.iter().any(|it| it.meant.as_ref() == Some(&problem.field)));
            problems.extend(unknown.into_iter().map(|it| it.problem));
        }
        problems.extend(fields::idle(&node, kind, &id));
        let in_listeners = refused::listeners(&problems);
        let mut manifest = manifest.filter(|manifest| refused::leaves(in_listeners.as_ref(), manifest));
        let refers_to = match &manifest {
            None => refused::refers_to(&node, kind, &id.namespace),
            Some(_) => Vec::new(),
        };
        // The lines of each endpoint's fields would take more memory than the endpoints.
        let depth = if kind == Kind::EndpointSlice && problems.is_empty() { 3 } else { usize::MAX };
        let lines = Lines::of(&node, line, depth);
        for (index, field) in in_listeners.unwrap_or_default() {
            let location = self.at(lines.find(&field));
            let listeners = manifest.as_mut().and_then(Manifest::listeners_mut);
            if let Some(listener) = listeners.and_then(|listeners| listeners.get_mut(index)) {
                listener.refused = Some(location);
            }
        }
        self.entry(id, lines, manifest, refers_to, problems);
    }

    fn entry(
        &mut self,
        id: ObjectRef,
        lines: Lines,
        manifest: Option<Manifest>,
        refers_to: Vec<ObjectRef>,
        mut problems: Vec<Problem>,
    ) {
        for problem in &mut problems {
            problem.location = Some(self.at(lines.find(&problem.field)));
        }
        let place = Arc::new(Place { file: Arc::clone(self.file), lines });
        self.contents.objects.push(Entry { id, place, manifest, refers_to, problems });
    }

    fn malformed(&mut self, line: u32, field: &str, message: String) {
        self.contents.is_broken = true;
        self.contents.problems.push(Problem {
            severity: Severity::Error,
            reason: Reason::Malformed,
            location: Some(self.at(line)),
            object: None,
            field: field.to_owned(),
            message,
        });
    }

    fn at(&self, line: u32) -> Location {
        Location { file: Arc::clone(self.file), line }
    }
}

/// The kind of that group and name, with the versions that are read.
fn known(group: &str, kind: &str) -> Option<(Kind, &'static [&'static str])> {
    match (group, kind) {
        (GATEWAY_GROUP, "GatewayClass") => Some((Kind::GatewayClass, &["v1", "v1beta1", "v1alpha2"])),
        (GATEWAY_GROUP, "Gateway") => Some((Kind::Gateway, &["v1", "v1beta1", "v1alpha2"])),
        (GATEWAY_GROUP, "ListenerSet") => Some((Kind::ListenerSet, &["v1"])),
        (GATEWAY_GROUP, "TCPRoute") => Some((Kind::TcpRoute, &["v1", "v1alpha2"])),
        (GATEWAY_GROUP, "ReferenceGrant") => Some((Kind::ReferenceGrant, &["v1", "v1beta1", "v1alpha2"])),
        ("", "Namespace") => Some((Kind::Namespace, &["v1"])),
        ("", "Service") => Some((Kind::Service, &["v1"])),
        ("discovery.k8s.io", "EndpointSlice") => Some((Kind::EndpointSlice, &["v1", "v1beta1"])),
        _ => None,
    }
}

fn join(group: &str, version: &str) -> String {
    if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") }
}

/// Decodes and checks an object. One field of a wrong type does not hide the problems of the others: the object comes without it.
fn build<T: DeserializeOwned + HasMetadata>(
    node: &Node<'_>,
    id: &ObjectRef,
    namespace: &str,
    check: impl Fn(&T) -> Vec<Problem>,
    wrap: impl Fn(Arc<T>) -> Manifest,
) -> (Option<Manifest>, Vec<Problem>) {
    let mut problems = Vec::new();
    // Forgetting a field changes the tree, whose lines are still needed.
    let mut pruned = None;
    for _ in 0..MOST_TYPE_ERRORS {
        match pruned.as_ref().unwrap_or(node).decode::<T>() {
            Ok(mut object) => {
                namespace.clone_into(&mut object.metadata_mut().namespace);
                let found =
                    check(&object).into_iter().filter(|it| !concerns_any(it, &problems)).collect::<Vec<_>>();
                problems.extend(found);
                return (Some(wrap(Arc::new(object))), problems);
            }
            Err(error) => {
                let field = error.field();
                // The same again is about what the field was replaced by.
                if !problems.iter().any(|problem| problem.field == field) {
                    problems.push(Problem::error(Reason::Invalid, id.clone(), field, error.message()));
                }
                pruned.get_or_insert_with(|| node.clone()).forget(&error);
            }
        }
    }
    (None, problems)
}

/// Whether a problem only follows from a field that could not be decoded.
fn concerns_any(problem: &Problem, undecoded: &[Problem]) -> bool {
    let is_within = |inner: &str, outer: &str| {
        inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    undecoded.iter().any(|it| is_within(&problem.field, &it.field) || is_within(&it.field, &problem.field))
}

trait HasMetadata {
    fn metadata_mut(&mut self) -> &mut Metadata;
}

impl<S> HasMetadata for Object<S> {
    fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

impl HasMetadata for Namespace {
    fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}

impl HasMetadata for EndpointSlice {
    fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }
}
