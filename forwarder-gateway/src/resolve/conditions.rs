//! The statuses: what was evaluated, in the words of the Gateway API.

use std::collections::BTreeMap;

use crate::manifests::{GATEWAY_GROUP, Kind, Manifests};
use crate::model::BindAddress;
use crate::problem::Reason;
use crate::status::{
    Condition, GatewayAddressStatus, GatewayStatus, GatewayVerdict, ListenerSetStatus, ListenerStatus,
    RouteParentStatus, RouteStatus, SetVerdict, Statuses, SupportedKind, gateway_conditions,
    listener_set_conditions, names, unprogrammed_reason,
};

use super::attach::{EvaluatedRoute, Parent};
use super::classes::{self, Class};
use super::destinations::Destinations;
use super::evaluated::{EvaluatedGateway, EvaluatedListener, EvaluatedSet};
use super::listener_sets;

/// How many addresses `Gateway.status.addresses` may have.
const MAX_ADDRESSES: usize = 16;

/// Writes every status. `destinations` belong to `routes` one by one.
pub(super) fn statuses(
    classes: &BTreeMap<&str, Class<'_>>,
    gateways: &[EvaluatedGateway<'_>],
    routes: &[EvaluatedRoute<'_>],
    destinations: &[Destinations],
    manifests: &Manifests,
) -> Statuses {
    let route_status = |(route, destinations): (&EvaluatedRoute<'_>, &Destinations)| {
        let parent = |parent| parent_status(route, parent, gateways, destinations);
        let parents = route.parents.iter().filter_map(parent).collect();
        (route.name.clone(), RouteStatus { parents })
    };
    let sets = gateways.iter().flat_map(|gateway| gateway.sets.iter().map(move |set| (gateway, set)));
    let set_status = |(gateway, set): (&EvaluatedGateway<'_>, &EvaluatedSet<'_>)| {
        (set.listeners.parent.name().clone(), listener_set_status(gateway, set))
    };
    let mut statuses = Statuses {
        gateway_classes: classes::statuses(classes, &manifests.api_release),
        gateways: gateways.iter().map(|g| (g.name.clone(), gateway_status(g))).collect(),
        listener_sets: sets.map(set_status).collect(),
        tcp_routes: routes.iter().zip(destinations).map(route_status).collect(),
    };
    if listener_sets::are_counted(&manifests.api_release) {
        statuses.gateways.values_mut().for_each(|status| status.attached_listener_sets = Some(0));
        statuses.count_listener_sets();
    }
    statuses
}

fn gateway_status(gateway: &EvaluatedGateway<'_>) -> GatewayStatus {
    let generation = gateway.gateway.metadata.generation;
    let verdict = GatewayVerdict {
        rejection: gateway.rejection.as_ref().map(|r| (r.condition_reason(), r.message.clone())),
        unusable_addresses: gateway.addresses.unusable.clone(),
    };
    let listeners: Vec<ListenerStatus> =
        gateway.own.all.iter().map(|listener| listener_status(gateway, None, listener, generation)).collect();
    let address = |address: &BindAddress| match *address {
        BindAddress::Any => None,
        BindAddress::Ip(value) => Some(GatewayAddressStatus { type_: "IPAddress", value }),
    };
    let addresses = match gateway.rejection {
        Some(_) => Vec::new(),
        None => gateway.addresses.bind.iter().filter_map(address).take(MAX_ADDRESSES).collect(),
    };
    let conditions = gateway_conditions(verdict, &listeners, generation);
    GatewayStatus { addresses, conditions, listeners, attached_listener_sets: None }
}

fn listener_set_status(gateway: &EvaluatedGateway<'_>, set: &EvaluatedSet<'_>) -> ListenerSetStatus {
    let generation = set.set.metadata.generation;
    let listener = |listener| listener_status(gateway, Some(set), listener, generation);
    let listeners: Vec<ListenerStatus> = set.listeners.all.iter().map(listener).collect();
    let verdict = if let Some(message) = &set.rejection {
        SetVerdict::NotAllowed(message.clone())
    } else if gateway.rejection.is_some() {
        SetVerdict::ParentNotAccepted(format!("Gateway {} is not accepted", gateway.name))
    } else if let Some(message) = &gateway.addresses.unusable {
        SetVerdict::ParentNotProgrammed(message.clone())
    } else {
        SetVerdict::Taken
    };
    let conditions = listener_set_conditions(&verdict, &listeners, generation);
    ListenerSetStatus { gateway: gateway.name.clone(), conditions, listeners }
}

fn listener_status(
    gateway: &EvaluatedGateway<'_>,
    set: Option<&EvaluatedSet<'_>>,
    listener: &EvaluatedListener<'_>,
    generation: i64,
) -> ListenerStatus {
    let supported = SupportedKind { group: GATEWAY_GROUP, kind: Kind::TcpRoute.as_str() };
    let mut conditions = vec![
        listener_accepted(listener, generation),
        listener_programmed(gateway, set, listener, generation),
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
fn listener_accepted(listener: &EvaluatedListener<'_>, generation: i64) -> Condition {
    match (&listener.rejection, &listener.conflict) {
        (Some(rejection), _) => {
            let reason = rejection.condition_reason();
            Condition::fails(names::ACCEPTED, reason, rejection.message.as_str(), generation)
        }
        (None, Some(message)) => {
            let reason = Reason::ProtocolConflict.as_str();
            Condition::fails(names::ACCEPTED, reason, message.as_str(), generation)
        }
        (None, None) => Condition::holds(names::ACCEPTED, names::ACCEPTED, "", generation),
    }
}

fn listener_programmed(
    gateway: &EvaluatedGateway<'_>,
    set: Option<&EvaluatedSet<'_>>,
    listener: &EvaluatedListener<'_>,
    generation: i64,
) -> Condition {
    let fails = |reason, message: &str| Condition::fails(names::PROGRAMMED, reason, message, generation);
    if gateway.rejection.is_some() {
        fails(names::INVALID, "the Gateway is not accepted")
    } else if set.is_some_and(|set| set.rejection.is_some()) {
        fails(names::INVALID, "the ListenerSet is not accepted")
    } else if let Some(message) = &listener.conflict {
        fails(Reason::ProtocolConflict.as_str(), message)
    } else if let Some(rejection) = &listener.rejection {
        fails(unprogrammed_reason(&listener.name.parent, rejection.reason), "the listener is not accepted")
    } else if !listener.kinds.tcp_route {
        fails(names::INVALID, "no kind of route can attach to the listener")
    } else if gateway.addresses.bind.is_empty() {
        fails(names::PENDING, "none of the Gateway's addresses can be used")
    } else {
        Condition::holds(names::PROGRAMMED, names::PROGRAMMED, "", generation)
    }
}

fn parent_status(
    route: &EvaluatedRoute<'_>,
    parent: &Parent,
    gateways: &[EvaluatedGateway<'_>],
    destinations: &Destinations,
) -> Option<RouteParentStatus> {
    let parent_ref = route.route.spec.parent_refs.get(parent.index)?;
    let generation = route.route.metadata.generation;
    let mut conditions = vec![
        match &parent.accepted {
            Ok(accepted) => {
                Condition::holds(names::ACCEPTED, names::ACCEPTED, accepted.message.as_str(), generation)
            }
            Err(rejection) => {
                let reason = rejection.condition_reason();
                Condition::fails(names::ACCEPTED, reason, rejection.message.as_str(), generation)
            }
        },
        match &destinations.rejection {
            None => Condition::holds(names::RESOLVED_REFS, names::RESOLVED_REFS, "", generation),
            Some(rejection) => {
                let reason = rejection.condition_reason();
                Condition::fails(names::RESOLVED_REFS, reason, rejection.message.as_str(), generation)
            }
        },
    ];
    if let (Ok(_), Some(message)) = (&parent.accepted, &destinations.dropped_rules) {
        let reason = Reason::UnsupportedValue.as_str();
        conditions.push(Condition::holds(names::PARTIALLY_INVALID, reason, message.as_str(), generation));
    }
    Some(RouteParentStatus {
        parent_ref: parent.index,
        parent: gateways.get(parent.place.gateway)?.listeners(parent.place.set)?.parent.clone(),
        section_name: parent_ref.section_name.clone(),
        port: parent_ref.port,
        is_superseded: parent.accepted.as_ref().is_ok_and(|accepted| accepted.is_superseded),
        conditions,
    })
}
