//! The statuses: what was judged, in the words of the Gateway API.

use std::collections::BTreeMap;

use crate::manifests::{GATEWAY_GROUP, Kind, Manifests};
use crate::model::BindAddress;
use crate::problem::Reason;
use crate::status::{
    Condition, GatewayAddressStatus, GatewayStatus, GatewayVerdict, ListenerStatus, RouteParentStatus,
    RouteStatus, Statuses, SupportedKind, gateway_conditions, names,
};

use super::attach::{JudgedRoute, Parent};
use super::classes::{self, Class};
use super::destinations::Destinations;
use super::gateways::JudgedGateway;
use super::listeners::JudgedListener;

/// How many addresses `Gateway.status.addresses` may have.
const MAX_ADDRESSES: usize = 16;

/// Writes every status. `destinations` belong to `routes` one by one.
pub(super) fn statuses(
    classes: &BTreeMap<&str, Class<'_>>,
    gateways: &[JudgedGateway<'_>],
    routes: &[JudgedRoute<'_>],
    destinations: &[Destinations],
    manifests: &Manifests,
) -> Statuses {
    let route_status = |(route, destinations): (&JudgedRoute<'_>, &Destinations)| {
        let parent = |parent| parent_status(route, parent, gateways, destinations);
        let parents = route.parents.iter().filter_map(parent).collect();
        (route.name.clone(), RouteStatus { parents })
    };
    Statuses {
        gateway_classes: classes::statuses(classes, &manifests.api_release),
        gateways: gateways.iter().map(|g| (g.name.clone(), gateway_status(g))).collect(),
        tcp_routes: routes.iter().zip(destinations).map(route_status).collect(),
    }
}

fn gateway_status(gateway: &JudgedGateway<'_>) -> GatewayStatus {
    let generation = gateway.gateway.metadata.generation;
    let verdict = GatewayVerdict {
        refusal: gateway.refusal.as_ref().map(|r| (r.condition_reason(), r.message.clone())),
        unusable_addresses: gateway.addresses.unusable.clone(),
    };
    let listeners: Vec<ListenerStatus> =
        gateway.listeners.iter().map(|listener| listener_status(gateway, listener, generation)).collect();
    let address = |address: &BindAddress| match *address {
        BindAddress::Any => None,
        BindAddress::Ip(value) => Some(GatewayAddressStatus { type_: "IPAddress", value }),
    };
    let addresses = match gateway.refusal {
        Some(_) => Vec::new(),
        None => gateway.addresses.bind.iter().filter_map(address).take(MAX_ADDRESSES).collect(),
    };
    GatewayStatus { addresses, conditions: gateway_conditions(verdict, &listeners, generation), listeners }
}

fn listener_status(
    gateway: &JudgedGateway<'_>,
    listener: &JudgedListener<'_>,
    generation: i64,
) -> ListenerStatus {
    let supported = SupportedKind { group: GATEWAY_GROUP, kind: Kind::TcpRoute.as_str() };
    let mut conditions = vec![
        listener_accepted(listener, generation),
        listener_programmed(gateway, listener, generation),
        match &listener.kinds.invalid {
            None => Condition::holds(names::RESOLVED_REFS, names::RESOLVED_REFS, "", generation),
            Some(message) => {
                let reason = Reason::InvalidRouteKinds.as_str();
                Condition::fails(names::RESOLVED_REFS, reason, message.as_str(), generation)
            }
        },
    ];
    if let Some(message) = &listener.conflict {
        let reason = Reason::ProtocolConflict.as_str();
        conditions.push(Condition::holds(names::CONFLICTED, reason, message.as_str(), generation));
    }
    ListenerStatus {
        name: listener.spec.name.clone(),
        supported_kinds: if listener.kinds.tcp_route { vec![supported] } else { Vec::new() },
        attached_routes: u32::try_from(listener.routes.len()).unwrap_or(u32::MAX),
        conditions,
    }
}

/// Types and examples of the Gateway API contradict each other on whether a conflicted listener is accepted; the types
/// ("MUST NOT be accepted") and the conformance tests of `ListenerSet` say that it is not.
fn listener_accepted(listener: &JudgedListener<'_>, generation: i64) -> Condition {
    match (&listener.refusal, &listener.conflict) {
        (Some(refusal), _) => {
            let reason = refusal.condition_reason();
            Condition::fails(names::ACCEPTED, reason, refusal.message.as_str(), generation)
        }
        (None, Some(message)) => {
            let reason = Reason::ProtocolConflict.as_str();
            Condition::fails(names::ACCEPTED, reason, message.as_str(), generation)
        }
        (None, None) => Condition::holds(names::ACCEPTED, names::ACCEPTED, "", generation),
    }
}

fn listener_programmed(
    gateway: &JudgedGateway<'_>,
    listener: &JudgedListener<'_>,
    generation: i64,
) -> Condition {
    let fails = |reason, message: &str| Condition::fails(names::PROGRAMMED, reason, message, generation);
    if gateway.refusal.is_some() {
        fails(names::INVALID, "the Gateway is not accepted")
    } else if let Some(message) = &listener.conflict {
        fails(Reason::ProtocolConflict.as_str(), message)
    } else if listener.refusal.is_some() {
        fails(names::INVALID, "the listener is not accepted")
    } else if !listener.kinds.tcp_route {
        fails(names::INVALID, "no kind of route can attach to the listener")
    } else if gateway.addresses.bind.is_empty() {
        fails(names::PENDING, "none of the Gateway's addresses can be used")
    } else {
        Condition::holds(names::PROGRAMMED, names::PROGRAMMED, "", generation)
    }
}

fn parent_status(
    route: &JudgedRoute<'_>,
    parent: &Parent,
    gateways: &[JudgedGateway<'_>],
    destinations: &Destinations,
) -> Option<RouteParentStatus> {
    let parent_ref = route.route.spec.parent_refs.get(parent.index)?;
    let generation = route.route.metadata.generation;
    let mut conditions = vec![
        match &parent.accepted {
            Ok(message) => Condition::holds(names::ACCEPTED, names::ACCEPTED, message.as_str(), generation),
            Err(refusal) => {
                let reason = refusal.condition_reason();
                Condition::fails(names::ACCEPTED, reason, refusal.message.as_str(), generation)
            }
        },
        match &destinations.refusal {
            None => Condition::holds(names::RESOLVED_REFS, names::RESOLVED_REFS, "", generation),
            Some(refusal) => {
                let reason = refusal.condition_reason();
                Condition::fails(names::RESOLVED_REFS, reason, refusal.message.as_str(), generation)
            }
        },
    ];
    if let (Ok(_), Some(message)) = (&parent.accepted, &destinations.dropped_rules) {
        let reason = Reason::UnsupportedValue.as_str();
        conditions.push(Condition::holds(names::PARTIALLY_INVALID, reason, message.as_str(), generation));
    }
    Some(RouteParentStatus {
        parent_ref: parent.index,
        gateway: gateways.get(parent.gateway)?.name.clone(),
        section_name: parent_ref.section_name.clone(),
        port: parent_ref.port,
        conditions,
    })
}
