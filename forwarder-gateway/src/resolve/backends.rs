//! From a Service's port to the endpoints that take its connections, by way of EndpointSlices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::manifests::{
    Endpoint, EndpointSlice, Kind, Manifests, NamespacedName, ObjectRef, Refused, Service, ServicePort,
};
use crate::model::{BackendKey, Endpoints};
use crate::problem::{Problem, Reason};
use crate::status::list;

use super::endpoint_rules::EndpointRules;

/// The label of an EndpointSlice that names its Service.
const SERVICE_LABEL: &str = "kubernetes.io/service-name";

/// The TCP port of a Service with this number, and its index. A UDP port may have the same number.
pub(super) fn tcp_port(service: &Service, port: NonZeroU16) -> Option<(usize, &ServicePort)> {
    let is_it = |p: &ServicePort| p.port == i64::from(port.get()) && is_tcp(p.protocol.as_deref());
    service.spec.ports.iter().enumerate().find(|(_, port)| is_it(port))
}

fn is_tcp(protocol: Option<&str>) -> bool {
    matches!(protocol, None | Some("" | "TCP"))
}

/// The endpoints of one backend that take new connections, and what is wrong with it; independent of anything else, so
/// that a change of an EndpointSlice needs nothing more.
///
/// Ready endpoints of all slices count. Where there is none, those do that are being deleted and still serve, so that a
/// rolling update with one replica is not an outage.
pub fn endpoints(
    manifests: &Manifests,
    rules: &EndpointRules<'_>,
    backend: &BackendKey,
) -> (Endpoints, Vec<Problem>) {
    let service = manifests.services.get(&backend.service);
    let Some((index, port)) = service.and_then(|service| tcp_port(service, backend.port)) else {
        // The reference to it has been told as BackendNotFound.
        return (Arc::default(), Vec::new());
    };
    let port_name = port.name.as_deref().unwrap_or_default();
    let mut found = Found::default();
    for (name, slice) in manifests.endpoint_slices.get(&backend.service).into_iter().flatten() {
        let object =
            ObjectRef::new(Kind::EndpointSlice, &NamespacedName::new(&backend.service.namespace, name));
        found.add_slice(object, slice, port_name, rules);
    }
    let mut endpoints = std::mem::take(&mut found.ready);
    if endpoints.is_empty() {
        endpoints = std::mem::take(&mut found.terminating);
    }
    endpoints.sort_unstable();
    endpoints.dedup();
    if endpoints.is_empty() {
        let object = ObjectRef::new(Kind::Service, &backend.service);
        let refused = manifests.refused_that_refer_to(Kind::EndpointSlice, &object);
        let refused: Vec<String> =
            refused.map(|(slice, Refused { location, .. })| format!("{} ({location})", slice.name)).collect();
        let (reason, why) = match (refused.as_slice(), manifests.unread.first()) {
            ([], Some(location)) if found.slices == 0 => {
                let why = found.why_empty(backend, port_name);
                (Reason::Refused, format!("{why}, unless it stands in what cannot be read ({location})"))
            }
            ([], _) => (Reason::NoEndpoints, found.why_empty(backend, port_name)),
            ([one], _) => (Reason::Refused, format!("its EndpointSlice {one} is refused")),
            (more, _) => (Reason::Refused, format!("its EndpointSlices {} are refused", list(more))),
        };
        let until = if reason == Reason::Refused { " until that is corrected" } else { "" };
        let message = format!(
            "port {} has nowhere to connect to: {why}; connections to it are reset{until}",
            backend.port
        );
        let field = format!("spec.ports[{index}]");
        found.problems.push(Problem::warning(reason, object, field, message));
    }
    (endpoints.into(), found.problems)
}

/// What the slices of a backend hold.
#[derive(Default)]
struct Found<'a> {
    ready: Vec<SocketAddr>,
    terminating: Vec<SocketAddr>,
    /// How many slices there are.
    slices: usize,
    /// How many of them have the port.
    with_port: usize,
    /// How many endpoints these have.
    endpoints: usize,
    /// The names of all ports.
    port_names: BTreeSet<&'a str>,
    problems: Vec<Problem>,
}

impl<'a> Found<'a> {
    fn add_slice(
        &mut self,
        object: ObjectRef,
        slice: &'a EndpointSlice,
        port_name: &str,
        rules: &EndpointRules<'_>,
    ) {
        self.slices += 1;
        self.port_names.extend(slice.ports.iter().map(|port| port.name.as_deref().unwrap_or_default()));
        if !matches!(slice.address_type.as_str(), "IPv4" | "IPv6") {
            let message = format!(
                "address type {:?} is not supported: the slice is ignored; only IPv4 and IPv6 are",
                slice.address_type
            );
            self.problems.push(Problem::warning(Reason::UnsupportedValue, object, "addressType", message));
            return;
        }
        let ports = self.target_ports(&object, slice, port_name);
        if ports.is_empty() {
            return;
        }
        self.with_port += 1;
        let mut ignored: BTreeMap<Reason, Ignored> = BTreeMap::new();
        for (index, endpoint) in slice.endpoints.iter().enumerate() {
            self.endpoints += 1;
            let Some(takes) = takes_connections(endpoint) else {
                continue;
            };
            match address(endpoint, &slice.address_type) {
                Ok(ip) => {
                    let list = match takes {
                        Takes::Ready => &mut self.ready,
                        Takes::WhileTerminating => &mut self.terminating,
                    };
                    for port in &ports {
                        let endpoint = SocketAddr::new(ip, port.get());
                        let Some((reason, message)) = rules.rejection(endpoint) else {
                            list.push(endpoint);
                            continue;
                        };
                        ignored.entry(reason).or_insert(Ignored { index, message, count: 0 }).count += 1;
                    }
                }
                Err(message) => {
                    let field = format!("endpoints[{index}].addresses");
                    self.problems.push(Problem::warning(Reason::Invalid, object.clone(), field, message));
                }
            }
        }
        let told = |(reason, ignored): (Reason, Ignored)| ignored.problem(reason, object.clone());
        self.problems.extend(ignored.into_iter().map(told));
    }

    /// The target ports in the slice of the Service's port of a name: one, where the slice is well-formed.
    fn target_ports(
        &mut self,
        object: &ObjectRef,
        slice: &EndpointSlice,
        port_name: &str,
    ) -> Vec<NonZeroU16> {
        let mut ports = Vec::new();
        for (index, port) in slice.ports.iter().enumerate() {
            if port.name.as_deref().unwrap_or_default() != port_name || !is_tcp(port.protocol.as_deref()) {
                continue;
            }
            let (reason, message) = match port.port.map(|number| u16::try_from(number).map(NonZeroU16::new)) {
                Some(Ok(Some(number))) => {
                    ports.push(number);
                    continue;
                }
                Some(_) => (Reason::Invalid, "the port is not one of 1 to 65535: it is ignored"),
                None => (
                    Reason::UnsupportedValue,
                    "the port has no number, which means every port: it is ignored",
                ),
            };
            let field = format!("ports[{index}].port");
            self.problems.push(Problem::warning(reason, object.clone(), field, message));
        }
        ports
    }

    /// Why there is no endpoint.
    fn why_empty(&self, backend: &BackendKey, port_name: &str) -> String {
        let NamespacedName { namespace, name } = &backend.service;
        if self.slices == 0 {
            return format!("no EndpointSlice in namespace {namespace} has the label {SERVICE_LABEL}={name}");
        }
        match self.endpoints {
            0 => {}
            1 => return "its only endpoint takes no connections".to_owned(),
            count => return format!("none of its {count} endpoints takes connections"),
        }
        if self.with_port > 0 {
            return "its EndpointSlices have no endpoint".to_owned();
        }
        let names: Vec<String> = self.port_names.iter().map(|name| format!("{name:?}")).collect();
        let names = if names.is_empty() { "none".to_owned() } else { list(&names) };
        format!("its EndpointSlices have no usable TCP port of the name {port_name:?}; names there: {names}")
    }
}

/// The endpoints of a slice that are not connected for one reason. A slice has up to 1,000: the first is told of.
struct Ignored {
    index: usize,
    message: String,
    count: usize,
}

impl Ignored {
    fn problem(self, reason: Reason, object: ObjectRef) -> Problem {
        let Self { index, message, count } = self;
        let ignored = match count {
            1 => "the endpoint is ignored".to_owned(),
            count => format!("it and {} more of this slice are ignored", count - 1),
        };
        let remedy = match reason {
            Reason::Loop => {
                "name the addresses and ports at which the server itself (the database, say) listens"
            }
            _ => "name addresses that are allowed, or have the agent's --endpoint-cidrs allow these",
        };
        let message = format!("{message}: {ignored}; {remedy}");
        Problem::error(reason, object, format!("endpoints[{index}].addresses"), message)
    }
}

/// How an endpoint takes new connections.
enum Takes {
    Ready,
    /// Only if no endpoint is ready.
    WhileTerminating,
}

fn takes_connections(endpoint: &Endpoint) -> Option<Takes> {
    let conditions = &endpoint.conditions;
    let ready = conditions.ready.unwrap_or(true);
    let serving = conditions.serving.unwrap_or(ready);
    match (ready, serving && conditions.terminating.unwrap_or(false)) {
        (true, _) => Some(Takes::Ready),
        (false, true) => Some(Takes::WhileTerminating),
        (false, false) => None,
    }
}

/// The first address of an endpoint: the others reach the same one.
fn address(endpoint: &Endpoint, address_type: &str) -> Result<IpAddr, String> {
    let Some(text) = endpoint.addresses.first() else {
        return Err("the endpoint has no address: it is ignored".to_owned());
    };
    match text.parse::<IpAddr>() {
        Ok(ip) if ip.is_ipv4() == (address_type == "IPv4") && !ip.is_unspecified() => Ok(ip),
        Ok(_) | Err(_) => Err(format!("{text:?} is no {address_type} address of an endpoint: it is ignored")),
    }
}
