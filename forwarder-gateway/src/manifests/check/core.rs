//! Core and discovery kinds.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use super::super::core::{EndpointSlice, Namespace, SERVICE_NAME_LABEL, Service};
use super::{Check, NameRule, PORTS, syntax};
use crate::object::Kind;
use crate::problem::Problem;

const PROTOCOLS: &[&str] = &["TCP", "UDP", "SCTP"];

/// What is wrong with a Namespace.
pub fn namespace(object: &Namespace) -> Vec<Problem> {
    Check::metadata(Kind::Namespace, &object.metadata, NameRule::Label).problems
}

/// What is wrong with a Service.
pub fn service(object: &Service) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::Service, &object.metadata, NameRule::Label);
    let spec = &object.spec;
    check.one_of("spec.type", spec.type_(), &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]);
    let may_have_no_port = spec.type_() == "ExternalName" || spec.is_headless();
    if spec.ports.is_empty() && !may_have_no_port {
        check.invalid("spec.ports", "a Service needs at least one port, unless its clusterIP is None");
    }
    let mut names = BTreeSet::new();
    let mut ports = BTreeSet::new();
    for (index, port) in spec.ports.iter().enumerate() {
        let field = format!("spec.ports[{index}]");
        match port.name() {
            "" if spec.ports.len() > 1 => {
                check.invalid(format!("{field}.name"), "is required where a Service has several ports");
            }
            "" => {}
            name => {
                check.label(format!("{field}.name"), name);
                if !names.insert(name) {
                    check.invalid(
                        format!("{field}.name"),
                        format!("another port has the name {name:?} as well"),
                    );
                }
            }
        }
        check.range(format!("{field}.port"), "port", port.port, PORTS);
        check.one_of(format!("{field}.protocol"), port.protocol(), PROTOCOLS);
        if PORTS.contains(&port.port) && !ports.insert((port.port, port.protocol())) {
            let what = format!("the port {}/{} stands twice", port.port, port.protocol());
            check.invalid(field, what);
        }
    }
    check.problems
}

/// What is wrong with an EndpointSlice. More endpoints than an API server takes are only warned of.
pub fn endpoint_slice(object: &EndpointSlice) -> Vec<Problem> {
    const MOST_ENDPOINTS: usize = 1000;
    // An API server of 1.20 or later takes as many; the documentation still says 100.
    const MOST_PORTS: usize = 20_000;
    let mut check = Check::metadata(Kind::EndpointSlice, &object.metadata, NameRule::Subdomain);
    if object.service_name().is_none() {
        check.warning(
            "metadata.labels",
            format!("the label {SERVICE_NAME_LABEL} is missing: the EndpointSlice belongs to no Service and is ignored"),
        );
    }
    check.one_of("addressType", &object.address_type, &["IPv4", "IPv6", "FQDN"]);
    let count = object.endpoints.len();
    if count > MOST_ENDPOINTS {
        check.warning(
            "endpoints",
            format!("{count} endpoints are used, but an API server takes at most {MOST_ENDPOINTS} in an EndpointSlice"),
        );
    }
    for (index, endpoint) in object.endpoints.iter().enumerate() {
        if !(1..=100).contains(&endpoint.addresses.len()) {
            check.count(
                format!("endpoints[{index}].addresses"),
                "addresses",
                endpoint.addresses.len(),
                1..=100,
            );
        }
        for (number, address) in endpoint.addresses.iter().enumerate() {
            if let Err(wanted) = check_address(&object.address_type, address) {
                check.invalid(
                    format!("endpoints[{index}].addresses[{number}]"),
                    format!("{} is not {wanted}", syntax::quote(address)),
                );
            }
        }
    }
    check.count("ports", "ports", object.ports.len(), 0..=MOST_PORTS);
    let mut names = BTreeSet::new();
    for (index, port) in object.ports.iter().enumerate() {
        let field = format!("ports[{index}]");
        if !port.name().is_empty() {
            check.label(format!("{field}.name"), port.name());
        }
        if !names.insert(port.name()) {
            let what = match port.name() {
                "" => "another port has no name either".to_owned(),
                name => format!("another port has the name {name:?} as well"),
            };
            check.invalid(format!("{field}.name"), what);
        }
        if let Some(number) = port.port {
            check.range(format!("{field}.port"), "port", number, PORTS);
        }
        check.one_of(format!("{field}.protocol"), port.protocol(), PROTOCOLS);
    }
    check.problems
}

/// An API server also refuses loopback and link-local addresses. Without one they are of use: a test or a local proxy.
fn check_address(address_type: &str, address: &str) -> Result<(), &'static str> {
    let (is_usable, wanted) = match address_type {
        "IPv4" => (
            address
                .parse::<Ipv4Addr>()
                .is_ok_and(|ip| !ip.is_unspecified() && !ip.is_multicast() && !ip.is_broadcast()),
            "the IPv4 address of an endpoint",
        ),
        "IPv6" => (
            address.parse::<Ipv6Addr>().is_ok_and(|ip| !ip.is_unspecified() && !ip.is_multicast()),
            "the IPv6 address of an endpoint",
        ),
        "FQDN" => (syntax::is_subdomain(address.strip_suffix('.').unwrap_or(address)), syntax::SUBDOMAIN),
        // The address type has its own problem.
        _ => (true, ""),
    };
    if is_usable { Ok(()) } else { Err(wanted) }
}
