//! Gateways: which are ours, and what each asks for, judged by itself.

use std::collections::{BTreeMap, HashMap};

use crate::manifests::{Gateway, Kind, Manifests, NamespacedName, ObjectRef};
use crate::problem::{Problem, Reason};

use super::ResolveSettings;
use super::addresses::{self, Addresses};
use super::classes::Class;
use super::listeners::{self, JudgedListener};

/// A Gateway of ours.
pub(super) struct JudgedGateway<'a> {
    pub(super) name: &'a NamespacedName,
    pub(super) gateway: &'a Gateway,
    /// Why it is not accepted as a whole; then none of its listeners is served.
    pub(super) refusal: Option<Refusal>,
    pub(super) addresses: Addresses,
    /// One for each listener of the spec, in its order.
    pub(super) listeners: Vec<JudgedListener<'a>>,
    /// Indices of listeners by name.
    pub(super) by_section: HashMap<&'a str, Vec<usize>>,
    /// Indices of listeners by port.
    pub(super) by_port: HashMap<i64, Vec<usize>>,
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

impl JudgedGateway<'_> {
    pub(super) fn object(&self) -> ObjectRef {
        ObjectRef::new(Kind::Gateway, self.name)
    }

    /// Whether its listeners can be bound, as far as it depends on the Gateway.
    pub(super) fn is_servable(&self) -> bool {
        self.refusal.is_none() && !self.addresses.bind.is_empty()
    }

    /// The listeners that are to be bound, with their indices.
    pub(super) fn served_listeners(&self) -> impl Iterator<Item = (usize, &JudgedListener<'_>)> {
        let listeners = if self.is_servable() { &self.listeners[..] } else { &[] };
        listeners.iter().enumerate().filter(|(_, listener)| listener.is_servable())
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
            // Those of a refused class are told by the class's own problem.
            Some(Class::Refused { .. } | Class::Foreign) => {}
            None => problems.push(class_not_found(name, gateway, settings)),
        }
    }
    gateways.sort_by_cached_key(|g| g.gateway.metadata.age_key());
    gateways
}

fn class_not_found(name: &NamespacedName, gateway: &Gateway, settings: &ResolveSettings) -> Problem {
    let message = format!(
        "there is no GatewayClass {:?}: the Gateway is not served; create it with controllerName {}, or name another",
        gateway.spec.gateway_class_name, settings.controller_name
    );
    let object = ObjectRef::new(Kind::Gateway, name);
    Problem::error(Reason::GatewayClassNotFound, object, "spec.gatewayClassName", message)
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
    let mut by_section: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut by_port: HashMap<i64, Vec<usize>> = HashMap::new();
    for (index, listener) in gateway.spec.listeners.iter().enumerate() {
        by_section.entry(&listener.name).or_default().push(index);
        by_port.entry(listener.port).or_default().push(index);
    }
    let defaults = &settings.listener_defaults;
    let listener_settings = super::settings::read(&object, gateway, &by_section, defaults, problems);
    let listeners =
        listeners::judge(name, &gateway.spec.listeners, listener_settings, &by_section, &by_port, problems);
    JudgedGateway { name, gateway, refusal, addresses, listeners, by_section, by_port }
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
            "the Gateway refers to {} {}, but the forwarder has no such configuration: the Gateway is not served; \
             remove parametersRef and use annotations",
            parameters.kind, parameters.name
        );
        let field = "spec.infrastructure.parametersRef";
        problems.push(Problem::error(Reason::InvalidParameters, object.clone(), field, message.as_str()));
        return Some(Refusal { reason: Reason::InvalidParameters, message });
    }
    let message = addresses.unsupported.clone()?;
    Some(Refusal { reason: Reason::UnsupportedAddress, message })
}
