//! Gateways: which are ours, and what each asks for, judged by itself.

use std::collections::BTreeMap;

use crate::manifests::{Gateway, Kind, Manifests, NamespacedName, ObjectRef, Refused};
use crate::model::ListenerParent;
use crate::problem::{Problem, Reason};
use crate::status::list;

use super::ResolveSettings;
use super::addresses::{self, Addresses};
use super::classes::Class;
use super::conflicts;
use super::listener_sets::JudgedSet;
use super::listeners::{self, JudgedListener, Listeners};
use super::namespaces::AllowedNamespaces;

/// A Gateway of ours.
pub(super) struct JudgedGateway<'a> {
    pub(super) name: &'a NamespacedName,
    pub(super) gateway: &'a Gateway,
    /// Why it is not accepted as a whole; then none of its listeners is served.
    pub(super) refusal: Option<Refusal>,
    pub(super) addresses: Addresses,
    /// From which namespaces it takes ListenerSets.
    pub(super) allowed_listeners: AllowedNamespaces<'a>,
    /// The listeners of its own spec.
    pub(super) own: Listeners<'a>,
    /// The ListenerSets that name it, taken or not, oldest first.
    pub(super) sets: Vec<JudgedSet<'a>>,
}

/// Where some listeners are found: at a Gateway, or at a ListenerSet of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    /// The index of the Gateway.
    pub(super) gateway: usize,
    /// The index of the ListenerSet among those of the Gateway; `None` for the Gateway's own listeners.
    pub(super) set: Option<usize>,
}

/// Why something is not accepted.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    pub(super) reason: Reason,
    /// The sentence of the problem.
    pub(super) message: String,
}

impl Refusal {
    /// The reason as it stands in conditions: the Gateway API knows fewer than there are problems.
    pub(super) fn condition_reason(&self) -> &'static str {
        match self.reason {
            Reason::Invalid => Reason::UnsupportedValue.as_str(),
            reason => reason.as_str(),
        }
    }
}

impl<'a> JudgedGateway<'a> {
    /// Its own listeners, then each of its ListenerSets, as [`Place::set`] tells them.
    pub(super) fn parts(&self) -> impl Iterator<Item = Option<usize>> + use<> {
        std::iter::once(None).chain((0..self.sets.len()).map(Some))
    }

    /// Its own listeners, or those of one of its ListenerSets.
    pub(super) fn listeners(&self, set: Option<usize>) -> Option<&Listeners<'a>> {
        match set {
            None => Some(&self.own),
            Some(set) => self.sets.get(set).map(|set| &set.listeners),
        }
    }

    /// As [`Self::listeners`].
    pub(super) fn listeners_mut(&mut self, set: Option<usize>) -> Option<&mut Listeners<'a>> {
        match set {
            None => Some(&mut self.own),
            Some(set) => self.sets.get_mut(set).map(|set| &mut set.listeners),
        }
    }

    /// Whether its own listeners, or those of a ListenerSet, can be bound, as far as it depends on the Gateway.
    ///
    /// Whether a ListenerSet is served does not depend on the Gateway's own listeners, valid or not.
    pub(super) fn is_servable(&self, set: Option<usize>) -> bool {
        let is_refused = set.is_some_and(|set| self.sets.get(set).is_none_or(|set| set.refusal.is_some()));
        self.refusal.is_none() && !self.addresses.bind.is_empty() && !is_refused
    }

    /// The listeners that are to be bound, with their indices.
    pub(super) fn served_listeners(
        &self,
        set: Option<usize>,
    ) -> impl Iterator<Item = (usize, &JudgedListener<'a>)> {
        let listeners = self.listeners(set).filter(|_| self.is_servable(set));
        let listeners = listeners.map_or(&[][..], |listeners| &listeners.all);
        listeners.iter().enumerate().filter(|(_, listener)| listener.is_servable())
    }

    /// The listeners that are to be bound and that no route has attached to.
    pub(super) fn without_route(&self, manifests: &Manifests) -> impl Iterator<Item = Problem> {
        let all = self.parts().flat_map(|set| self.served_listeners(set));
        all.filter(|(_, listener)| listener.routes.is_empty()).map(|(index, listener)| {
            let (name, object) = (&listener.name.section, listener.name.parent.object());
            let refused = manifests.refused_that_refer_to(Kind::TcpRoute, &object);
            let refused: Vec<String> =
                refused.map(|(route, Refused { location, .. })| format!("{route} ({location})")).collect();
            let what = format!("listener {name} has no route");
            let reset = "its connections are reset";
            let (reason, message) = match (refused.as_slice(), manifests.unread.first()) {
                ([], None) => {
                    (Reason::NoRoute, format!("{what}: {reset}; name it in the parentRefs of a TCPRoute"))
                }
                ([], Some(location)) => (
                    Reason::Refused,
                    format!("{what}, unless it stands in what cannot be read ({location}): {reset} until that is corrected"),
                ),
                ([one], _) => {
                    (Reason::Refused, format!("{what}, and {one} is refused: {reset} until that is corrected"))
                }
                (more, _) => (
                    Reason::Refused,
                    format!("{what}, and {} are refused: {reset} until that is corrected", list(more)),
                ),
            };
            Problem::warning(reason, object, format!("spec.listeners[{index}]"), message)
        })
    }
}

/// Judges the Gateways of accepted classes, oldest first.
pub(super) fn judge<'a>(
    manifests: &'a Manifests,
    settings: &ResolveSettings,
    classes: &BTreeMap<&str, Class<'_>>,
    problems: &mut Vec<Problem>,
) -> Vec<JudgedGateway<'a>> {
    let mut gateways = Vec::new();
    for (name, gateway) in &manifests.gateways {
        match classes.get(gateway.spec.gateway_class_name.as_str()) {
            Some(Class::Accepted(_)) => gateways.push(judge_gateway(name, gateway, settings, problems)),
            Some(Class::Foreign(controller)) if settings.tells_unserved => {
                problems.push(of_another_controller(name, gateway, controller, settings));
            }
            // Those of a refused class are told by the class's own problem.
            Some(Class::Refused { .. } | Class::Foreign(_)) => {}
            None => problems.push(class_not_found(manifests, name, gateway, settings)),
        }
    }
    gateways.sort_by_cached_key(|g| g.gateway.metadata.age_key());
    gateways
}

fn of_another_controller(
    name: &NamespacedName,
    gateway: &Gateway,
    controller: &str,
    settings: &ResolveSettings,
) -> Problem {
    let message = format!(
        "the controllerName of GatewayClass {} is {controller}, and this forwarder serves {} only (--controller-name): the Gateway is \
         not served; correct the controllerName if it is meant for this forwarder",
        gateway.spec.gateway_class_name, settings.controller_name
    );
    let object = ObjectRef::new(Kind::Gateway, name);
    Problem::warning(Reason::GatewayClassNotFound, object, "spec.gatewayClassName", message)
}

fn class_not_found(
    manifests: &Manifests,
    name: &NamespacedName,
    gateway: &Gateway,
    settings: &ResolveSettings,
) -> Problem {
    let class = &gateway.spec.gateway_class_name;
    let (reason, message) = match manifests.why_missing(&ObjectRef::cluster(Kind::GatewayClass, class)) {
        Some(why) => (Reason::Refused, format!("{why}: the Gateway is not served until that is corrected")),
        None => (
            Reason::GatewayClassNotFound,
            format!(
                "there is no GatewayClass {class:?}: the Gateway is not served; create it with controllerName {}, or name another",
                settings.controller_name
            ),
        ),
    };
    let object = ObjectRef::new(Kind::Gateway, name);
    Problem::error(reason, object, "spec.gatewayClassName", message)
}

fn judge_gateway<'a>(
    name: &'a NamespacedName,
    gateway: &'a Gateway,
    settings: &ResolveSettings,
    problems: &mut Vec<Problem>,
) -> JudgedGateway<'a> {
    let object = ObjectRef::new(Kind::Gateway, name);
    let addresses = addresses::read(&object, &gateway.spec.addresses, problems);
    let refusal = refusal(&object, gateway, &addresses, problems);
    let allowed_listeners = allowed_listeners(&object, gateway, problems);
    let parent = ListenerParent::Gateway(name.clone());
    let annotations = &gateway.metadata.annotations;
    let (defaults, ports) = (&settings.listener_defaults, &settings.listener_ports);
    let mut own = listeners::judge(parent, &gateway.spec.listeners, annotations, defaults, ports, problems);
    conflicts::within_gateway(&mut own, problems);
    JudgedGateway { name, gateway, refusal, addresses, allowed_listeners, own, sets: Vec::new() }
}

/// From which namespaces the Gateway takes ListenerSets: from none where it does not say so, or cannot be understood.
fn allowed_listeners<'a>(
    object: &ObjectRef,
    gateway: &'a Gateway,
    problems: &mut Vec<Problem>,
) -> AllowedNamespaces<'a> {
    let allowed = gateway.spec.allowed_listeners.as_ref().and_then(|allowed| allowed.namespaces.as_ref());
    let Some(allowed) = allowed else {
        return AllowedNamespaces::None;
    };
    let consequence = "no ListenerSet is taken";
    AllowedNamespaces::read(allowed.from(), allowed.selector.as_ref(), consequence).unwrap_or_else(
        |(field, message)| {
            let field = format!("spec.allowedListeners.namespaces.{field}");
            problems.push(Problem::error(Reason::UnsupportedValue, object.clone(), field, message));
            AllowedNamespaces::None
        },
    )
}

fn refusal(
    object: &ObjectRef,
    gateway: &Gateway,
    addresses: &Addresses,
    problems: &mut Vec<Problem>,
) -> Option<Refusal> {
    let parameters = gateway.spec.infrastructure.as_ref().and_then(|i| i.parameters_ref.as_ref());
    if let Some(parameters) = parameters {
        let message = format!(
            "the forwarder takes no parameters, and the Gateway refers to {} {}: the Gateway is not served; remove parametersRef, and \
             set what there is to set by annotations forwarder.dev/... of the Gateway",
            parameters.kind, parameters.name
        );
        let field = "spec.infrastructure.parametersRef";
        problems.push(Problem::error(Reason::InvalidParameters, object.clone(), field, message.as_str()));
        return Some(Refusal { reason: Reason::InvalidParameters, message });
    }
    let message = addresses.unsupported.clone()?;
    Some(Refusal { reason: Reason::UnsupportedAddress, message })
}
