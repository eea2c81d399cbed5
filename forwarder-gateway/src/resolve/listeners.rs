//! Listeners, evaluated by themselves: protocol, port, allowed routes, settings.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU16;

use crate::allowed::AllowedPorts;
use crate::manifests::{GATEWAY_GROUP, Kind, Listener, ObjectRef, RouteGroupKind};
use crate::model::{ListenerName, ListenerParent, ListenerSettings};
use crate::problem::{Location, Problem, Reason};

use super::evaluated::{EvaluatedListener, Listeners, Rejection, RouteKinds};
use super::namespaces::AllowedNamespaces;

/// Evaluates the listeners of one Gateway or ListenerSet. Their settings are `defaults`, changed by its annotations; `ports` are those that
/// they may take.
pub(super) fn evaluate<'a>(
    parent: ListenerParent,
    specs: &'a [Listener],
    annotations: &BTreeMap<String, String>,
    defaults: &ListenerSettings,
    ports: &AllowedPorts,
    problems: &mut Vec<Problem>,
) -> Listeners<'a> {
    let mut by_section: HashMap<&str, Vec<usize>> = HashMap::new();
    let mut by_port: HashMap<i64, Vec<usize>> = HashMap::new();
    for (index, listener) in specs.iter().enumerate() {
        by_section.entry(&listener.name).or_default().push(index);
        by_port.entry(listener.port).or_default().push(index);
    }
    let object = parent.object();
    let mut settings = vec![defaults.clone(); specs.len()];
    super::settings::apply(&object, annotations, &by_section, &mut settings, problems);
    let evaluate_one = |(index, (spec, settings)): (usize, (&'a Listener, ListenerSettings))| {
        let place = Place { object: &object, field: format!("spec.listeners[{index}]") };
        let first = by_section.get(spec.name.as_str()).and_then(|all| all.first().copied());
        evaluate_listener(&parent, spec, settings, place, first == Some(index), ports, problems)
    };
    let all = specs.iter().zip(settings).enumerate().map(evaluate_one).collect();
    Listeners { parent, all, by_section, by_port }
}

/// Where a listener stands.
struct Place<'a> {
    object: &'a ObjectRef,
    field: String,
}

impl Place<'_> {
    fn error(&self, reason: Reason, field: &str, message: &str) -> Problem {
        Problem::error(reason, self.object.clone(), format!("{}.{field}", self.field), message)
    }
}

fn evaluate_listener<'a>(
    parent: &ListenerParent,
    spec: &'a Listener,
    settings: ListenerSettings,
    place: Place<'_>,
    first_of_name: bool,
    ports: &AllowedPorts,
    problems: &mut Vec<Problem>,
) -> EvaluatedListener<'a> {
    if let Some(location) = &spec.refused {
        return refused(parent, spec, settings, location);
    }
    let mut rejections = Vec::new();
    if spec.protocol != "TCP" {
        rejections.push((Reason::UnsupportedProtocol, "protocol".to_owned(), unsupported_protocol(spec)));
    }
    let port = u16::try_from(spec.port).ok().and_then(NonZeroU16::new);
    if port.is_none() {
        let message = format!("port {} is not one of 1 to 65535: the listener is not served", spec.port);
        rejections.push((Reason::Invalid, "port".to_owned(), message));
    }
    if let Some((port, refused)) = port.and_then(|port| Some((port, ports.refusing(port.get())?))) {
        let message = format!(
            "port {port} is refused by --listener-ports (!{refused}): the listener is not served; choose another port, \
             or have the agent's --listener-ports allow this one"
        );
        rejections.push((Reason::PortUnavailable, "port".to_owned(), message));
    }
    if !first_of_name {
        let message = format!(
            "another listener has the name {:?}: only the first is served; rename this one",
            spec.name
        );
        rejections.push((Reason::Invalid, "name".to_owned(), message));
    }
    if spec.protocol == "TCP" && spec.tls.is_some() {
        let message = "a TCP listener does not end TLS: it is not served, because clients would expect that it does; remove tls, and \
                       bytes are forwarded as they are, encrypted where client and endpoint encrypt them";
        rejections.push((Reason::UnsupportedValue, "tls".to_owned(), message.to_owned()));
    }
    let namespaces = allowed_namespaces(spec).unwrap_or_else(|(field, message)| {
        rejections.push((Reason::UnsupportedValue, format!("allowedRoutes.namespaces.{field}"), message));
        AllowedNamespaces::None
    });
    for (reason, field, message) in &rejections {
        problems.push(place.error(*reason, field, message));
    }
    if spec.protocol == "TCP" && spec.hostname.is_some() {
        let field = format!("{}.hostname", place.field);
        let message = "a TCP listener has no hostname to match: it is ignored; remove it";
        problems.push(Problem::warning(Reason::UnsupportedValue, place.object.clone(), field, message));
    }
    EvaluatedListener {
        spec,
        name: ListenerName { parent: parent.clone(), section: spec.name.clone() },
        port,
        rejection: rejections.into_iter().next().map(|(reason, _, message)| Rejection { reason, message }),
        conflict: None,
        kinds: route_kinds(spec, &place, problems),
        namespaces,
        settings,
        routes: Vec::new(),
    }
}

/// One whose file has an error, which is told already.
fn refused<'a>(
    parent: &ListenerParent,
    spec: &'a Listener,
    settings: ListenerSettings,
    location: &Location,
) -> EvaluatedListener<'a> {
    let message = format!("the listener is refused ({location})");
    EvaluatedListener {
        spec,
        name: ListenerName { parent: parent.clone(), section: spec.name.clone() },
        port: None,
        rejection: Some(Rejection { reason: Reason::Invalid, message }),
        conflict: None,
        kinds: RouteKinds { tcp_route: false, invalid: None },
        namespaces: AllowedNamespaces::None,
        settings,
        routes: Vec::new(),
    }
}

fn unsupported_protocol(spec: &Listener) -> String {
    let advice = match spec.protocol.as_str() {
        other if other.eq_ignore_ascii_case("TCP") => "; write TCP",
        "HTTP" | "HTTPS" | "TLS" => "; use TCP to forward its bytes as they are",
        _ => "",
    };
    format!("protocol {:?} is not supported: the listener is not served{advice}", spec.protocol)
}

/// Which kinds of routes the listener takes: those of `allowedRoutes.kinds` that it can serve, or else TCPRoute.
fn route_kinds(spec: &Listener, place: &Place<'_>, problems: &mut Vec<Problem>) -> RouteKinds {
    let named = spec.allowed_routes.as_ref().map_or(&[][..], |allowed| &allowed.kinds);
    let is_tcp = spec.protocol == "TCP";
    let is_served = |kind: &RouteGroupKind| {
        is_tcp && kind.kind == Kind::TcpRoute.as_str() && group_of(kind) == GATEWAY_GROUP
    };
    let mut invalid = Vec::new();
    for (index, kind) in named.iter().enumerate().filter(|(_, kind)| !is_served(kind)) {
        let message = format!("routes of kind {} ({}) cannot attach to it", kind.kind, group_of(kind));
        if is_tcp {
            // On a listener of another protocol, that problem is enough.
            let message = format!("{message}: a TCP listener serves TCPRoutes only; remove the kind");
            let field = format!("allowedRoutes.kinds[{index}].kind");
            problems.push(place.error(Reason::InvalidRouteKinds, &field, &message));
        }
        invalid.push(message);
    }
    RouteKinds {
        tcp_route: is_tcp && (named.is_empty() || named.iter().any(is_served)),
        invalid: (!invalid.is_empty()).then(|| invalid.join("; ")),
    }
}

fn group_of(kind: &RouteGroupKind) -> &str {
    kind.group.as_deref().unwrap_or(GATEWAY_GROUP)
}

/// The namespaces of `allowedRoutes`, or the field below `namespaces` that cannot be honoured and why.
fn allowed_namespaces(spec: &Listener) -> Result<AllowedNamespaces<'_>, (String, String)> {
    match spec.allowed_routes.as_ref().and_then(|allowed| allowed.namespaces.as_ref()) {
        None => Ok(AllowedNamespaces::Same),
        Some(allowed) => {
            let consequence = "the listener is not served";
            AllowedNamespaces::read(allowed.from(), allowed.selector.as_ref(), consequence)
        }
    }
}
