//! Gateways: which are ours, and what each asks for, evaluated by itself.

use std::collections::BTreeMap;

use crate::manifests::{Gateway, Kind, Manifests, NamespacedName, ObjectRef};
use crate::model::ListenerParent;
use crate::problem::{Problem, Reason};

use super::ResolveSettings;
use super::addresses::{self, Addresses};
use super::classes::Class;
use super::conflicts;
use super::evaluated::{EvaluatedGateway, Rejection};
use super::listeners;
use super::namespaces::AllowedNamespaces;

/// Evaluates the Gateways of our classes, oldest first. None of a refused class is served; it has a status all the same, or one of before
/// would go on to say that it is.
pub(super) fn evaluate<'a>(
    manifests: &'a Manifests,
    settings: &ResolveSettings,
    classes: &BTreeMap<&str, Class<'_>>,
    problems: &mut Vec<Problem>,
) -> Vec<EvaluatedGateway<'a>> {
    let mut gateways = Vec::new();
    for (name, gateway) in &manifests.gateways {
        match classes.get(gateway.spec.gateway_class_name.as_str()) {
            Some(Class::Accepted(_)) => gateways.push(evaluate_gateway(name, gateway, settings, problems)),
            Some(Class::Foreign(controller)) if settings.tells_unserved => {
                problems.push(of_another_controller(name, gateway, controller, settings));
            }
            Some(Class::Refused { message, .. }) => {
                // The class's own problem tells.
                let mut gateway = evaluate_gateway(name, gateway, settings, &mut Vec::new());
                let class = &gateway.gateway.spec.gateway_class_name;
                let message = format!("its GatewayClass {class} is not accepted: {message}");
                gateway.rejection = Some(Rejection { reason: Reason::InvalidParameters, message });
                gateways.push(gateway);
            }
            Some(Class::Foreign(_)) => {}
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

fn evaluate_gateway<'a>(
    name: &'a NamespacedName,
    gateway: &'a Gateway,
    settings: &ResolveSettings,
    problems: &mut Vec<Problem>,
) -> EvaluatedGateway<'a> {
    let object = ObjectRef::new(Kind::Gateway, name);
    let addresses = addresses::read(&object, &gateway.spec.addresses, problems);
    let rejection = rejection(&object, gateway, &addresses, problems);
    let allowed_listeners = allowed_listeners(&object, gateway, problems);
    let parent = ListenerParent::Gateway(name.clone());
    let annotations = &gateway.metadata.annotations;
    let (defaults, ports) = (&settings.listener_defaults, &settings.listener_ports);
    let mut own =
        listeners::evaluate(parent, &gateway.spec.listeners, annotations, defaults, ports, problems);
    conflicts::within_gateway(&mut own, problems);
    EvaluatedGateway { name, gateway, rejection, addresses, allowed_listeners, own, sets: Vec::new() }
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

fn rejection(
    object: &ObjectRef,
    gateway: &Gateway,
    addresses: &Addresses,
    problems: &mut Vec<Problem>,
) -> Option<Rejection> {
    let parameters = gateway.spec.infrastructure.as_ref().and_then(|i| i.parameters_ref.as_ref());
    if let Some(parameters) = parameters {
        let message = format!(
            "the forwarder takes no parameters, and the Gateway refers to {} {}: the Gateway is not served; remove parametersRef, and \
             set what there is to set by annotations forwarder.dev/... of the Gateway",
            parameters.kind, parameters.name
        );
        let field = "spec.infrastructure.parametersRef";
        problems.push(Problem::error(Reason::InvalidParameters, object.clone(), field, message.as_str()));
        return Some(Rejection { reason: Reason::InvalidParameters, message });
    }
    let message = addresses.unsupported.clone()?;
    Some(Rejection { reason: Reason::UnsupportedAddress, message })
}
