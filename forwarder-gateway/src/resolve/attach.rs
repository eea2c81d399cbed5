//! Routes to listeners: parentRefs, allowedRoutes, and which of several routes serves a listener.

use std::collections::HashMap;

use crate::manifests::{GATEWAY_GROUP, Kind, Manifests, NamespacedName, ObjectRef, ParentRef, TcpRoute};
use crate::model::ListenerParent;
use crate::problem::{Location, Problem, Reason};
use crate::status::list;

use super::ResolveSettings;
use super::evaluated::{EvaluatedGateway, EvaluatedListener, Listeners, Place, Rejection};

/// A route with a parent among our Gateways and their ListenerSets.
pub(super) struct EvaluatedRoute<'a> {
    pub(super) name: &'a NamespacedName,
    pub(super) route: &'a TcpRoute,
    /// One for each parentRef to one of these.
    pub(super) parents: Vec<Parent>,
}

/// What became of one parentRef.
pub(super) struct Parent {
    /// Its index in the spec.
    pub(super) index: usize,
    /// Where the listeners of the Gateway or ListenerSet are found.
    pub(super) place: Place,
    /// Whether a listener takes the route: then what the listeners do with it.
    pub(super) accepted: Result<Accepted, Rejection>,
}

/// What the listeners that take a route do with it.
#[derive(Default)]
pub(super) struct Accepted {
    /// As a sentence.
    pub(super) message: String,
    /// Whether another route serves one of them.
    pub(super) is_superseded: bool,
}

/// Attaches the routes to listeners, and returns those that have a parent among `gateways` and their ListenerSets, oldest first.
///
/// The first route that is attached to a listener serves it: it is the oldest. The others are accepted all the same.
pub(super) fn attach<'a>(
    manifests: &'a Manifests,
    settings: &ResolveSettings,
    gateways: &mut [EvaluatedGateway<'a>],
    problems: &mut Vec<Problem>,
) -> Vec<EvaluatedRoute<'a>> {
    let mut place_of = HashMap::new();
    for (index, gateway) in gateways.iter().enumerate() {
        let place = |set| Some((gateway.listeners(set)?.parent.clone(), Place { gateway: index, set }));
        place_of.extend(gateway.parts().filter_map(place));
    }
    let mut oldest_first: Vec<(&NamespacedName, &TcpRoute)> =
        manifests.tcp_routes.iter().map(|(name, route)| (name, &**route)).collect();
    oldest_first.sort_by_cached_key(|(_, route)| route.metadata.age_key());

    let mut attacher = Attacher { manifests, settings, gateways, place_of, routes: Vec::new(), problems };
    for (name, route) in oldest_first {
        attacher.attach_route(name, route);
    }
    attacher.routes
}

/// The state of [`attach`].
struct Attacher<'a, 's> {
    manifests: &'a Manifests,
    settings: &'s ResolveSettings,
    gateways: &'s mut [EvaluatedGateway<'a>],
    place_of: HashMap<ListenerParent, Place>,
    routes: Vec<EvaluatedRoute<'a>>,
    problems: &'s mut Vec<Problem>,
}

/// What the listeners that take a route do with it: names of listeners.
#[derive(Default)]
struct Attached {
    serve: Vec<String>,
    /// With the route that serves the listener.
    superseded: Vec<(String, NamespacedName)>,
    /// As superseded, but not attached by an earlier parentRef of the route already.
    newly_superseded: Vec<(String, NamespacedName)>,
    not_served: Vec<String>,
}

impl<'a> Attacher<'a, '_> {
    fn attach_route(&mut self, name: &'a NamespacedName, route: &'a TcpRoute) {
        let mut parents = Vec::new();
        for (index, parent_ref) in route.spec.parent_refs.iter().enumerate() {
            let Some(place) = self.place(name, index, parent_ref) else {
                continue;
            };
            let accepted = self.attach_to_parent(name, index, parent_ref, place);
            parents.push(Parent { index, place, accepted });
        }
        if !parents.is_empty() {
            self.routes.push(EvaluatedRoute { name, route, parents });
        }
    }

    /// Where the listeners of the Gateway or ListenerSet are that a parentRef names, if it is one of ours.
    fn place(&mut self, route: &NamespacedName, index: usize, parent_ref: &ParentRef) -> Option<Place> {
        let object = || ObjectRef::new(Kind::TcpRoute, route);
        let namespace = parent_ref.namespace.as_deref().unwrap_or(&route.namespace);
        let name = NamespacedName::new(namespace, &parent_ref.name);
        let (exists, parent) = match (parent_ref.group(), parent_ref.kind()) {
            (GATEWAY_GROUP, "Gateway") => {
                (self.manifests.gateways.contains_key(&name), ListenerParent::Gateway(name))
            }
            (GATEWAY_GROUP, "ListenerSet") => {
                (self.manifests.listener_sets.contains_key(&name), ListenerParent::ListenerSet(name))
            }
            (_, kind) => {
                let message =
                    format!("a parent of kind {kind} is not the forwarder's: the reference is ignored");
                let field = format!("spec.parentRefs[{index}].kind");
                self.problems.push(Problem::warning(Reason::UnsupportedKind, object(), field, message));
                return None;
            }
        };
        if !exists {
            let (reason, message) = match self.manifests.why_missing(&parent.object()) {
                Some(why) => {
                    (Reason::Refused, format!("{why}: the route is not served until that is corrected"))
                }
                None => (
                    Reason::NoMatchingParent,
                    format!(
                        "there is no {parent}: the route is not served there; create it, or name another"
                    ),
                ),
            };
            let field = format!("spec.parentRefs[{index}].name");
            self.problems.push(Problem::error(reason, object(), field, message));
        }
        self.place_of.get(&parent).copied()
    }

    fn attach_to_parent(
        &mut self,
        route: &NamespacedName,
        index: usize,
        parent_ref: &ParentRef,
        place: Place,
    ) -> Result<Accepted, Rejection> {
        let refuse = |problems: &mut Vec<Problem>, reason, field: &str, message: String| {
            let object = ObjectRef::new(Kind::TcpRoute, route);
            let field = format!("spec.parentRefs[{index}]{field}");
            problems.push(Problem::error(reason, object, field, message.as_str()));
            // Gateway API has no reason for what follows from an error elsewhere.
            let reason = if reason == Reason::Refused { Reason::NoMatchingParent } else { reason };
            Err(Rejection { reason, message })
        };
        let gateway = self.gateways.get(place.gateway);
        let Some(listeners) = gateway.and_then(|gateway| gateway.listeners(place.set)) else {
            return Ok(Accepted::default());
        };
        let matching = matching_listeners(listeners, parent_ref);
        if matching.is_empty() {
            let (reason, field, message) = no_match(listeners, parent_ref);
            return refuse(self.problems, reason, field, message);
        }
        let mut allowing = Vec::new();
        let mut refusing = Vec::new();
        let mut refused = Vec::new();
        for &listener_index in &matching {
            let Some(listener) = listeners.all.get(listener_index) else {
                continue;
            };
            if let Some(location) = &listener.spec.refused {
                refused.push((listener_index, location));
                continue;
            }
            match self.rejection(listener, route) {
                None => allowing.push(listener_index),
                Some(why) => refusing.push(format!("listener {} ({why})", listener.spec.name)),
            }
        }
        // Of several with one name, one that is served will do.
        refused.retain(|(index, _)| !allowing.iter().any(|other| listeners.have_same_name(*index, *other)));
        if !refused.is_empty() {
            let message = refused_listeners(listeners, &refused);
            if allowing.is_empty() && refusing.is_empty() {
                return refuse(self.problems, Reason::Refused, "", message);
            }
            let _ = refuse(self.problems, Reason::Refused, "", message);
        }
        if allowing.is_empty() {
            let is_tcp = |index: &usize| listeners.all.get(*index).is_some_and(EvaluatedListener::is_tcp);
            let what = if matching.iter().any(is_tcp) { "allowedRoutes" } else { "the protocol" };
            let message = format!(
                "no listener of {} takes the route: {}; change {what} of the listener, or name another one in the route",
                listeners.parent,
                list(&refusing)
            );
            return refuse(self.problems, Reason::NotAllowedByListeners, "", message);
        }
        let kind = listeners.parent.kind();
        let outcome = self.attach_to_listeners(route, place, &allowing);
        self.report_superseded(route, index, &outcome);
        Ok(Accepted { message: outcome.sentence(kind), is_superseded: !outcome.superseded.is_empty() })
    }

    /// Why a listener does not take a route.
    fn rejection(&self, listener: &EvaluatedListener<'_>, route: &NamespacedName) -> Option<String> {
        if !listener.is_tcp() {
            return Some(format!("its protocol is {:?}", listener.spec.protocol));
        }
        if !listener.kinds.tcp_route {
            return Some("its kinds do not include TCPRoute".to_owned());
        }
        let own = &listener.name.parent.name().namespace;
        listener.namespaces.rejection(own, &route.namespace, self.manifests, self.settings)
    }

    fn attach_to_listeners(&mut self, route: &NamespacedName, place: Place, allowing: &[usize]) -> Attached {
        let mut outcome = Attached::default();
        let this = self.routes.len();
        let Some(gateway) = self.gateways.get_mut(place.gateway) else {
            return outcome;
        };
        let servable = gateway.is_servable(place.set);
        let Some(listeners) = gateway.listeners_mut(place.set) else {
            return outcome;
        };

        for &listener_index in allowing {
            let Some(listener) = listeners.all.get_mut(listener_index) else {
                continue;
            };
            let newly = listener.routes.last() != Some(&this);
            if newly {
                listener.routes.push(this);
            }
            let section = listener.spec.name.clone();
            let winner = listener.routes.first().and_then(|first| self.routes.get(*first));
            match winner.map(|winner| winner.name) {
                _ if !servable || !listener.is_servable() => outcome.not_served.push(section),
                Some(winner) if winner != route => {
                    if newly {
                        outcome.newly_superseded.push((section.clone(), winner.clone()));
                    }
                    outcome.superseded.push((section, winner.clone()));
                }
                // The winner is the route itself, which is not in the list yet.
                Some(_) | None => outcome.serve.push(section),
            }
        }
        outcome
    }

    fn report_superseded(&mut self, route: &NamespacedName, index: usize, outcome: &Attached) {
        if outcome.newly_superseded.is_empty() {
            return;
        }
        let message = format!(
            "{}; remove one of the routes, or give this one a listener of its own",
            superseded(&outcome.newly_superseded)
        );
        let object = ObjectRef::new(Kind::TcpRoute, route);
        let field = format!("spec.parentRefs[{index}]");
        self.problems.push(Problem::warning(Reason::Superseded, object, field, message));
    }
}

impl Attached {
    /// What became of the route at a parent of this kind.
    fn sentence(&self, kind: Kind) -> String {
        let mut parts = Vec::new();
        if !self.superseded.is_empty() {
            parts.push(superseded(&self.superseded));
        }
        if !self.not_served.is_empty() {
            parts.push(format!("attached to {}, which the {kind} does not serve", list(&self.not_served)));
        }
        if !self.serve.is_empty() {
            parts.insert(0, format!("serves {}", list(&self.serve)));
        }
        parts.join("; ")
    }
}

fn superseded(listeners: &[(String, NamespacedName)]) -> String {
    let shown: Vec<String> =
        listeners.iter().map(|(section, winner)| format!("on {section} by {winner}")).collect();
    format!(
        "superseded {}: the older route, or the first by name, gets every connection and this one none",
        list(&shown)
    )
}

/// The listeners that a parentRef means: all, or those with its sectionName, its port, or both.
fn matching_listeners(listeners: &Listeners<'_>, parent_ref: &ParentRef) -> Vec<usize> {
    let of_section = |section: &str| listeners.by_section.get(section).cloned().unwrap_or_default();
    let of_port = |port: i64| listeners.by_port.get(&port).cloned().unwrap_or_default();
    match (parent_ref.section_name.as_deref(), parent_ref.port) {
        (None, None) => (0..listeners.all.len()).collect(),
        (Some(section), None) => of_section(section),
        (None, Some(port)) => of_port(port),
        (Some(section), Some(port)) => {
            let has_port = |index: &usize| listeners.all.get(*index).is_some_and(|l| l.spec.port == port);
            of_section(section).into_iter().filter(has_port).collect()
        }
    }
}

/// The message where a parentRef means listeners whose file has an error, each with its place.
fn refused_listeners(listeners: &Listeners<'_>, refused: &[(usize, &Location)]) -> String {
    let name = |index: usize| match listeners.all.get(index).map(|listener| listener.spec.name.as_str()) {
        None | Some("") => "without a name",
        Some(name) => name,
    };
    let parent = &listeners.parent;
    let what = match refused {
        [(index, location)] => format!("listener {} of {parent} is refused ({location})", name(*index)),
        more => {
            let shown = more.iter().map(|(index, location)| format!("{} ({location})", name(*index)));
            format!("listeners {} of {parent} are refused", list(&shown.collect::<Vec<_>>()))
        }
    };
    format!("{what}: the route is not served there until that is corrected")
}

/// What is said, and of which field, where a parentRef means no listener.
fn no_match(listeners: &Listeners<'_>, parent_ref: &ParentRef) -> (Reason, &'static str, String) {
    let (field, wanted) = match (parent_ref.section_name.as_deref(), parent_ref.port) {
        (None, None) => ("", "no listener".to_owned()),

        (None, Some(port)) => (".port", format!("no listener on port {port}")),
        (Some(section), Some(port)) if listeners.by_section.contains_key(section) => {
            (".port", format!("no listener {section:?} on port {port}"))
        }
        (Some(section), _) => (".sectionName", format!("no listener {section:?}")),
    };
    let parent = &listeners.parent;
    // Its name may be what is wrong.
    if let Some(location) = listeners.doubtful() {
        let message = format!(
            "{parent} has {wanted}; it has a listener that is refused ({location}), which may be the one: correct that first; until then \
             the route is not served there"
        );
        return (Reason::Refused, field, message);
    }
    let shown = |l: &EvaluatedListener<'_>| match &l.spec.refused {
        None => format!("{} (port {})", l.spec.name, l.spec.port),
        Some(location) => format!("{}, which is refused ({location})", l.spec.name),
    };
    let there: Vec<String> = listeners.all.iter().map(shown).collect();
    let there = if there.is_empty() { "none".to_owned() } else { list(&there) };
    let message = format!("{parent} has {wanted}: the route is not served there; its listeners are: {there}");
    (Reason::NoMatchingParent, field, message)
}
