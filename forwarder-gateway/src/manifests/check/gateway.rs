//! Gateway API kinds, after the CRDs of Gateway API 1.6, experimental channel, which is the more permissive one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::super::gateway::{
    AllowedRoutes, BackendRef, Gateway, GatewayAddress, GatewayClass, LabelSelector, Listener, ParametersRef,
    ParentRef, ReferenceGrant, TcpRoute,
};
use super::{Check, NameRule, PORTS, syntax};
use crate::object::Kind;
use crate::problem::Problem;

/// The longest name of an object.
pub(super) const LONGEST_NAME: usize = 253;

/// What is wrong with a GatewayClass.
pub fn gateway_class(object: &GatewayClass) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::GatewayClass, &object.metadata, NameRule::Subdomain);
    let controller = &object.spec.controller_name;
    if !syntax::is_domain_path(controller) {
        check.invalid("spec.controllerName", syntax::refuse(controller, syntax::DOMAIN_PATH));
    }
    if let Some(reference) = &object.spec.parameters_ref {
        parameters_ref(&mut check, "spec.parametersRef", reference);
    }
    check.problems
}

/// What is wrong with a Gateway.
pub fn gateway(object: &Gateway) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::Gateway, &object.metadata, NameRule::Subdomain);
    let spec = &object.spec;
    check.text("spec.gatewayClassName", &spec.gateway_class_name, LONGEST_NAME);
    check.count("spec.addresses", "addresses", spec.addresses.len(), 0..=16);
    let mut seen = BTreeSet::new();
    for (index, address) in spec.addresses.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        gateway_address(&mut check, &field, address);
        let value = address.value.as_deref().unwrap_or_default();
        if !value.is_empty() && !seen.insert((address.type_(), value)) {
            check.invalid(
                format!("{field}.value"),
                format!("the address {} stands twice", syntax::quote(value)),
            );
        }
    }
    listeners(&mut check, &spec.listeners);
    if let Some(allowed) = spec.allowed_listeners.as_ref().and_then(|it| it.namespaces.as_ref()) {
        namespaces(&mut check, "spec.allowedListeners.namespaces", allowed.from(), allowed.selector.as_ref());
    }
    if let Some(reference) = spec.infrastructure.as_ref().and_then(|it| it.parameters_ref.as_ref()) {
        parameters_ref(&mut check, "spec.infrastructure.parametersRef", reference);
    }
    check.problems
}

/// What is wrong with a TCPRoute of an API version: `v1` allows one rule only, and wants it to have backends.
pub fn tcp_route(object: &TcpRoute, version: &str) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::TcpRoute, &object.metadata, NameRule::Subdomain);
    let spec = &object.spec;
    check.count("spec.parentRefs", "parentRefs", spec.parent_refs.len(), 0..=32);
    for (index, reference) in spec.parent_refs.iter().enumerate() {
        let field = format!("spec.parentRefs[{index}]");
        parent_ref(&mut check, &field, reference);
        let earlier = spec.parent_refs.iter().take(index).position(|other| !are_distinct(other, reference));
        if let Some(other) = earlier {
            check.invalid(
                field,
                format!(
                    "refers to the same parent as spec.parentRefs[{other}]: give both a sectionName, or both a port, \
                     that differ"
                ),
            );
        }
    }
    let is_v1 = version == "v1";
    check.count("spec.rules", "rules", spec.rules.len(), if is_v1 { 1..=1 } else { 1..=16 });
    let mut names = BTreeSet::new();
    for (index, rule) in spec.rules.iter().enumerate() {
        let field = format!("spec.rules[{index}]");
        if let Some(name) = rule.name.as_deref() {
            check.subdomain(format!("{field}.name"), name);
            if !names.insert(name) {
                check.invalid(
                    format!("{field}.name"),
                    format!("another rule has the name {} as well", syntax::quote(name)),
                );
            }
        }
        let field = format!("{field}.backendRefs");
        check.count(field.as_str(), "backendRefs", rule.backend_refs.len(), usize::from(is_v1)..=16);
        for (index, reference) in rule.backend_refs.iter().enumerate() {
            backend_ref(&mut check, &format!("{field}[{index}]"), reference);
        }
    }
    check.problems
}

/// What is wrong with a ReferenceGrant.
pub fn reference_grant(object: &ReferenceGrant) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::ReferenceGrant, &object.metadata, NameRule::Subdomain);
    check.count("spec.from", "entries", object.spec.from.len(), 1..=16);
    for (index, from) in object.spec.from.iter().enumerate() {
        let field = format!("spec.from[{index}]");
        check.group(format!("{field}.group"), &from.group);
        check.kind(format!("{field}.kind"), &from.kind);
        check.label(format!("{field}.namespace"), &from.namespace);
    }
    check.count("spec.to", "entries", object.spec.to.len(), 1..=16);
    for (index, to) in object.spec.to.iter().enumerate() {
        let field = format!("spec.to[{index}]");
        check.group(format!("{field}.group"), &to.group);
        check.kind(format!("{field}.kind"), &to.kind);
        if let Some(name) = to.name.as_deref() {
            check.text(format!("{field}.name"), name, LONGEST_NAME);
        }
    }
    check.problems
}

fn parameters_ref(check: &mut Check, field: &str, reference: &ParametersRef) {
    check.group(format!("{field}.group"), &reference.group);
    check.kind(format!("{field}.kind"), &reference.kind);
    check.text(format!("{field}.name"), &reference.name, LONGEST_NAME);
}

fn gateway_address(check: &mut Check, field: &str, address: &GatewayAddress) {
    let value = address.value.as_deref().unwrap_or_default();
    match address.type_() {
        // From Gateway API 1.3 on an address without a value asks for any.
        _ if value.is_empty() => {}
        "IPAddress" => {
            if value.parse::<IpAddr>().is_err() {
                check.invalid(
                    format!("{field}.value"),
                    format!("{} is not an IP address", syntax::quote(value)),
                );
            }
        }
        "Hostname" => {
            if !syntax::is_hostname(value) {
                check.invalid(format!("{field}.value"), syntax::refuse(value, syntax::HOSTNAME));
            }
        }
        "NamedAddress" => check.text(format!("{field}.value"), value, LONGEST_NAME),
        other => {
            if !syntax::is_domain_path(other) {
                check.invalid(
                    format!("{field}.type"),
                    format!("{} is not IPAddress, Hostname or {}", syntax::quote(other), syntax::DOMAIN_PATH),
                );
            }
            check.text(format!("{field}.value"), value, LONGEST_NAME);
        }
    }
}

/// The listeners of a Gateway or ListenerSet.
pub(super) fn listeners(check: &mut Check, listeners: &[Listener]) {
    check.count("spec.listeners", "listeners", listeners.len(), 1..=64);
    let mut names = BTreeSet::new();
    for (index, item) in listeners.iter().enumerate() {
        let field = format!("spec.listeners[{index}]");
        listener(check, &field, item);
        if !item.name.is_empty() && !names.insert(&item.name) {
            check.invalid(
                format!("{field}.name"),
                format!("another listener has the name {} as well", syntax::quote(&item.name)),
            );
        }
    }
}

fn listener(check: &mut Check, field: &str, listener: &Listener) {
    let protocol = listener.protocol.as_str();
    check.subdomain(format!("{field}.name"), &listener.name);
    check.range(format!("{field}.port"), "port", listener.port, PORTS);
    if !syntax::is_protocol(protocol) {
        check.invalid(format!("{field}.protocol"), syntax::refuse(protocol, syntax::PROTOCOL));
    }
    if let Some(hostname) = listener.hostname.as_deref().filter(|hostname| !hostname.is_empty()) {
        if matches!(protocol, "TCP" | "UDP") {
            let what =
                format!("is not allowed for the protocol {protocol}, which carries no hostname: remove it");
            check.invalid(format!("{field}.hostname"), what);
        } else if !syntax::is_hostname(hostname) {
            check.invalid(format!("{field}.hostname"), syntax::refuse(hostname, syntax::HOSTNAME));
        }
    }
    if listener.tls.is_some() && matches!(protocol, "TCP" | "UDP" | "HTTP") {
        check.invalid(
            format!("{field}.tls"),
            format!("is not allowed for the protocol {protocol}: remove it"),
        );
    }
    if let Some(allowed) = &listener.allowed_routes {
        allowed_routes(check, &format!("{field}.allowedRoutes"), allowed);
    }
}

fn allowed_routes(check: &mut Check, field: &str, allowed: &AllowedRoutes) {
    if let Some(allowed) = &allowed.namespaces {
        namespaces(check, &format!("{field}.namespaces"), allowed.from(), allowed.selector.as_ref());
    }
    check.count(format!("{field}.kinds"), "kinds", allowed.kinds.len(), 0..=8);
    for (index, kind) in allowed.kinds.iter().enumerate() {
        let field = format!("{field}.kinds[{index}]");
        check.group(format!("{field}.group"), kind.group());
        check.kind(format!("{field}.kind"), &kind.kind);
    }
}

/// From which namespaces routes may attach to a listener, or ListenerSets to a Gateway.
fn namespaces(check: &mut Check, field: &str, from: &str, selector: Option<&LabelSelector>) {
    check.one_of(format!("{field}.from"), from, &["All", "Same", "Selector", "None"]);
    match selector {
        Some(selector) => label_selector(check, &format!("{field}.selector"), selector),
        None if from == "Selector" => {
            check.invalid(format!("{field}.selector"), "is required where from is Selector");
        }
        None => {}
    }
}

fn label_selector(check: &mut Check, field: &str, selector: &LabelSelector) {
    check.labels(&format!("{field}.matchLabels"), &selector.match_labels);
    for (index, requirement) in selector.match_expressions.iter().enumerate() {
        let field = format!("{field}.matchExpressions[{index}]");
        check.label_key(format!("{field}.key"), &requirement.key);
        let operator = requirement.operator.as_str();
        check.one_of(format!("{field}.operator"), operator, &["In", "NotIn", "Exists", "DoesNotExist"]);
        match operator {
            "In" | "NotIn" if requirement.values.is_empty() => {
                check.invalid(
                    format!("{field}.values"),
                    format!("the operator {operator} needs at least one value"),
                );
            }
            "Exists" | "DoesNotExist" if !requirement.values.is_empty() => {
                check.invalid(format!("{field}.values"), format!("the operator {operator} takes no values"));
            }
            _ => {}
        }
        for (number, value) in requirement.values.iter().enumerate() {
            check.label_value(format!("{field}.values[{number}]"), value);
        }
    }
}

fn parent_ref(check: &mut Check, field: &str, reference: &ParentRef) {
    check.group(format!("{field}.group"), reference.group());
    check.kind(format!("{field}.kind"), reference.kind());
    if let Some(namespace) = reference.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        check.label(format!("{field}.namespace"), namespace);
    }
    check.text(format!("{field}.name"), &reference.name, LONGEST_NAME);
    if let Some(section) = reference.section_name.as_deref().filter(|section| !section.is_empty()) {
        check.subdomain(format!("{field}.sectionName"), section);
    }
    if let Some(port) = reference.port {
        check.range(format!("{field}.port"), "port", port, PORTS);
    }
}

/// Whether two parentRefs may stand in one route: references to one parent must all have a sectionName or none, all a
/// port or none, and differ in the pair.
fn are_distinct(a: &ParentRef, b: &ParentRef) -> bool {
    fn parent(reference: &ParentRef) -> (&str, &str, &str, &str) {
        let namespace = reference.namespace.as_deref().unwrap_or_default();
        (reference.group(), reference.kind(), namespace, &reference.name)
    }
    fn part(reference: &ParentRef) -> (&str, Option<i64>) {
        (reference.section_name.as_deref().unwrap_or_default(), reference.port)
    }
    let (a_part, b_part) = (part(a), part(b));
    let have_the_same =
        a_part.0.is_empty() == b_part.0.is_empty() && a_part.1.is_none() == b_part.1.is_none();
    parent(a) != parent(b) || have_the_same && a_part != b_part
}

fn backend_ref(check: &mut Check, field: &str, reference: &BackendRef) {
    check.group(format!("{field}.group"), reference.group());
    check.kind(format!("{field}.kind"), reference.kind());
    if let Some(namespace) = reference.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        check.label(format!("{field}.namespace"), namespace);
    }
    check.text(format!("{field}.name"), &reference.name, LONGEST_NAME);
    match reference.port {
        Some(port) => check.range(format!("{field}.port"), "port", port, PORTS),
        None if reference.is_service() => check.invalid(format!("{field}.port"), "is required for a Service"),
        None => {}
    }
    check.range(format!("{field}.weight"), "weight", reference.weight(), 0..=1_000_000);
}
