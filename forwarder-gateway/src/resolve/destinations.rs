//! Where a route's connections go: its rules and their backendRefs.

use std::num::NonZeroU16;

use crate::manifests::{BackendRef, Kind, Manifests, NamespacedName, ObjectRef, Service, TcpRouteRule};
use crate::model::{Backend, BackendKey, Target};
use crate::problem::{Problem, Reason, Severity};
use crate::status::list;

use super::attach::EvaluatedRoute;
use super::backends;
use super::evaluated::Rejection;
use super::grants::Grants;

/// The greatest weight that the Gateway API allows.
const MAX_WEIGHT: u32 = 1_000_000;

/// Where a route's connections go.
pub(super) struct Destinations {
    /// The backends of the first rule, which carries all traffic.
    pub(super) backends: Vec<Backend>,
    /// The first backendRef that is invalid, in any rule.
    pub(super) rejection: Option<Rejection>,
    /// Rules that carry no traffic, as a sentence.
    pub(super) dropped_rules: Option<String>,
}

/// Resolves the backendRefs of every route: one result per route, in their order.
pub(super) fn resolve(
    manifests: &Manifests,
    grants: &Grants<'_>,
    routes: &[EvaluatedRoute<'_>],
    problems: &mut Vec<Problem>,
) -> Vec<Destinations> {
    routes.iter().map(|route| Resolver { manifests, grants, route, problems }.resolve()).collect()
}

struct Resolver<'a> {
    manifests: &'a Manifests,
    grants: &'a Grants<'a>,
    route: &'a EvaluatedRoute<'a>,
    problems: &'a mut Vec<Problem>,
}

/// What is wrong with a backendRef, and in which of its fields.
struct Fault {
    field: &'static str,
    reason: Reason,
    message: String,
}

impl Resolver<'_> {
    fn resolve(mut self) -> Destinations {
        let mut backends = Vec::new();
        let mut rejection = None;
        let mut dropped = Vec::new();
        for (index, rule) in self.route.route.spec.rules.iter().enumerate() {
            let resolved = self.rule(index, rule, &mut rejection);
            if index == 0 {
                backends = resolved;
            } else {
                self.report_dropped(index);
                dropped.push(index.to_string());
            }
        }
        self.report_no_destination(&backends);
        let dropped_rules = (!dropped.is_empty()).then(|| {
            let rules = list(&dropped);
            format!("Dropped Rule {rules}: TCP has nothing to tell rules apart, so that rule 0 takes every connection")
        });
        Destinations { backends, rejection, dropped_rules }
    }

    fn object(&self) -> ObjectRef {
        ObjectRef::new(Kind::TcpRoute, self.route.name)
    }

    fn rule(&mut self, index: usize, rule: &TcpRouteRule, rejection: &mut Option<Rejection>) -> Vec<Backend> {
        let mut backends = Vec::new();
        let total = rule.backend_refs.iter().map(|backend_ref| u64::from(used_weight(backend_ref))).sum();
        for (ref_index, backend_ref) in rule.backend_refs.iter().enumerate() {
            let field = format!("spec.rules[{index}].backendRefs[{ref_index}]");
            let weight = self.weight(&field, backend_ref);
            let consequence = consequence(index, weight, total);
            let target = match self.target(backend_ref, &consequence) {
                Ok(key) => Target::Service(key),
                Err(Fault { field: below, reason, message }) => {
                    // A dropped rule takes no connections, so that nothing is lost by its faults.
                    let severity = if index == 0 { Severity::Error } else { Severity::Warning };
                    let object = self.object();
                    let problem = Problem::error(reason, object, format!("{field}{below}"), message.as_str());
                    self.problems.push(Problem { severity, ..problem });
                    // Gateway API has no reason for what follows from an error elsewhere.
                    let reason = if reason == Reason::Refused { Reason::BackendNotFound } else { reason };
                    rejection.get_or_insert_with(|| Rejection { reason, message: message.clone() });
                    Target::Invalid { reference: self.reference(backend_ref), reason, message }
                }
            };
            backends.push(Backend { weight, target });
        }
        backends
    }

    fn weight(&mut self, field: &str, backend_ref: &BackendRef) -> u32 {
        let (weight, used) = (backend_ref.weight(), used_weight(backend_ref));
        if i64::from(used) != weight {
            let message = format!("weight {weight} is not one of 0 to {MAX_WEIGHT}: {used} is used");
            let field = format!("{field}.weight");
            self.problems.push(Problem::warning(Reason::Invalid, self.object(), field, message));
        }
        used
    }

    /// The backend as it was written, with the namespace filled in.
    fn reference(&self, backend_ref: &BackendRef) -> String {
        let mut reference = self.service_name(backend_ref).to_string();
        if let Some(port) = backend_ref.port {
            reference = format!("{reference}:{port}");
        }
        match backend_ref.kind.as_deref() {
            None | Some("Service") => reference,
            Some(kind) => format!("{kind} {reference}"),
        }
    }

    fn service_name(&self, backend_ref: &BackendRef) -> NamespacedName {
        let namespace = backend_ref.namespace.as_deref().unwrap_or(&self.route.name.namespace);
        NamespacedName::new(namespace, &backend_ref.name)
    }

    /// Evaluates a backendRef. What a grant forbids is not looked at, so that nothing is told of a foreign namespace.
    fn target(&self, backend_ref: &BackendRef, consequence: &str) -> Result<BackendKey, Fault> {
        let group = backend_ref.group.as_deref().unwrap_or_default();
        let kind = backend_ref.kind.as_deref().unwrap_or(Kind::Service.as_str());
        if !group.is_empty() || kind != Kind::Service.as_str() {
            let field = if group.is_empty() { ".kind" } else { ".group" };
            let shown = if group.is_empty() { kind.to_owned() } else { format!("{kind} ({group})") };
            let message = format!(
                "kind {shown} cannot be a backend: {consequence}; refer to a Service of the core group"
            );
            return Err(Fault { field, reason: Reason::InvalidKind, message });
        }
        let service = self.service_name(backend_ref);
        let own_namespace = &self.route.name.namespace;
        if !self.grants.permit(own_namespace, &service) {
            let message = format!(
                "Service {service} is in another namespace, and no ReferenceGrant there permits TCPRoutes of \
                 namespace {own_namespace} to refer to it: {consequence}; create one in namespace {}",
                service.namespace
            );
            return Err(Fault { field: ".namespace", reason: Reason::RefNotPermitted, message });
        }
        let Some(object) = self.manifests.services.get(&service) else {
            if let Some(why) = self.manifests.why_missing(&ObjectRef::new(Kind::Service, &service)) {
                let message = format!("{why}: {consequence} until that is corrected");
                return Err(Fault { field: ".name", reason: Reason::Refused, message });
            }
            let message =
                format!("there is no Service {service}: {consequence}; create it, or correct the reference");
            return Err(Fault { field: ".name", reason: Reason::BackendNotFound, message });
        };
        if object.spec.type_.as_deref() == Some("ExternalName") {
            let message = format!(
                "Service {service} is of type ExternalName, which the Gateway API advises against and the forwarder does not resolve: \
                 {consequence}; refer to a Service without selector, and write an EndpointSlice with the addresses"
            );
            return Err(Fault { field: ".name", reason: Reason::InvalidKind, message });
        }
        let port = service_port(&service, object, backend_ref.port, consequence)?;
        Ok(BackendKey { service, port })
    }

    fn report_dropped(&mut self, index: usize) {
        let message = "every connection goes by rule 0 and none by this rule, because TCP has nothing to choose a rule by; give this \
                       rule a route and a listener of its own, or move its backendRefs to rule 0 to share the connections";
        let field = format!("spec.rules[{index}]");
        self.problems.push(Problem::warning(Reason::DroppedRule, self.object(), field, message));
    }

    fn report_no_destination(&mut self, backends: &[Backend]) {
        let field = "spec.rules[0].backendRefs";
        if backends.is_empty() {
            let no_rule = self.route.route.spec.rules.is_empty();
            let (field, found) = if no_rule { ("spec.rules", "rule") } else { (field, "backend") };
            let message = format!("the route has no {found}: connections are reset; add a backendRef");
            self.problems.push(Problem::error(Reason::NoDestination, self.object(), field, message));
        } else if backends.iter().all(|backend| backend.weight == 0) {
            let message = "every weight is 0: connections are reset; give one backend a weight above 0";
            self.problems.push(Problem::warning(Reason::NoDestination, self.object(), field, message));
        }
    }
}

/// The weight of a backendRef, as near to it as the Gateway API permits.
fn used_weight(backend_ref: &BackendRef) -> u32 {
    u32::try_from(backend_ref.weight().max(0)).map_or(MAX_WEIGHT, |weight| weight.min(MAX_WEIGHT))
}

/// What follows from an invalid backendRef in a rule of which all backends weigh `total`.
fn consequence(rule: usize, weight: u32, total: u64) -> String {
    match weight {
        _ if rule > 0 => "nothing follows, because its rule takes no connection".to_owned(),
        0 => "nothing follows, because its weight is 0".to_owned(),
        _ if u64::from(weight) == total => "every connection by this route is reset".to_owned(),
        _ => format!("its share of connections ({weight} of {total}) is reset"),
    }
}

/// The Service's TCP port of a number.
fn service_port(
    service: &NamespacedName,
    object: &Service,
    port: Option<i64>,
    consequence: &str,
) -> Result<NonZeroU16, Fault> {
    let not_found = |message| Err(Fault { field: ".port", reason: Reason::BackendNotFound, message });
    let Some(number) = port else {
        return not_found(format!(
            "a backend of kind Service needs a port: {consequence}; name a port of {service}"
        ));
    };
    let ports = &object.spec.ports;
    let Some(of_number) = u16::try_from(number).ok().and_then(NonZeroU16::new) else {
        return not_found(format!("port {number} is not one of 1 to 65535: {consequence}"));
    };
    if backends::tcp_port(object, of_number).is_some() {
        return Ok(of_number);
    }
    if let Some(port) = ports.iter().find(|port| port.port == number) {
        let protocol = port.protocol.as_deref().unwrap_or_default();
        let message = format!(
            "port {number} of Service {service} is a {protocol} port: {consequence}; name a TCP port"
        );
        return Err(Fault { field: ".port", reason: Reason::UnsupportedProtocol, message });
    }
    let there: Vec<String> = ports.iter().map(|port| port.port.to_string()).collect();
    let there = if there.is_empty() { "none".to_owned() } else { list(&there) };
    not_found(format!(
        "Service {service} has no port {number}: {consequence}; its ports are: {there} (not the target ports)"
    ))
}
