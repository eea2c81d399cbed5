//! Statuses, corrected by the listeners that could not be bound.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use super::{
    Condition, ConditionStatus, GatewayStatus, GatewayVerdict, ListenerSetStatus, ListenerStatus, SetVerdict,
    Statuses, gateway_conditions, listener_set_conditions, names, unprogrammed_reason,
};
use crate::manifests::{Kind, NamespacedName, ObjectRef};
use crate::model::{BindAddress, ListenerKey, ListenerName, ListenerParent};
use crate::problem::{Problem, Reason};

/// A listener that could not be bound at one of its addresses.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BindFailure {
    /// The listener.
    pub listener: ListenerName,
    /// The address and port.
    pub key: ListenerKey,
    /// What the kernel said, as a sentence without a final period.
    pub message: String,
    /// Whether this node does not have the address (`EADDRNOTAVAIL`). Otherwise the port is held by another process,
    /// or cannot be bound for another reason.
    pub address_missing: bool,
    /// When it could not be bound first.
    pub since: Instant,
}

impl BindFailure {
    /// The failure as a problem of the Gateway or ListenerSet; `statuses` are those that it has been applied to.
    pub fn problem(&self, statuses: &Statuses) -> Problem {
        let parent = &self.listener.parent;
        if self.address_missing {
            // The addresses are the Gateway's, whosever listener it is.
            let gateway = statuses.gateway_of(parent);
            let object = gateway.map_or_else(|| parent.object(), |name| ObjectRef::new(Kind::Gateway, name));
            let message = self.message.as_str();
            return Problem::error(Reason::AddressNotUsable, object, "spec.addresses", message);
        }
        let mut listeners = statuses.listeners(parent).iter();
        let index = listeners.position(|listener| listener.name == self.listener.section);
        let field = index.map(|index| format!("spec.listeners[{index}].port")).unwrap_or_default();
        Problem::error(Reason::PortUnavailable, parent.object(), field, self.message.as_str())
    }
}

/// Corrects the statuses, which assume that every listener can be bound, by what could not.
///
/// A port that cannot be bound makes the listener not accepted (`PortUnavailable`). An address that the node does not
/// have is a matter of the Gateway (`AddressNotUsable`): its listeners and those of its ListenerSets stay accepted, and
/// programmed as long as another address is left. Failures of listeners that the statuses do not know are ignored.
pub fn apply_bind_failures(statuses: &mut Statuses, failures: &[BindFailure]) {
    let mut by_gateway: BTreeMap<NamespacedName, Vec<&BindFailure>> = BTreeMap::new();
    for failure in failures {
        if let Some(gateway) = statuses.gateway_of(&failure.listener.parent) {
            by_gateway.entry(gateway.clone()).or_default().push(failure);
        }
    }
    for (name, failures) in &by_gateway {
        if let Some(status) = statuses.gateways.get_mut(name) {
            apply_to_gateway(status, name, failures);
        }
    }
    let Statuses { gateways, listener_sets, .. } = statuses;
    for (name, status) in listener_sets {
        let failures = by_gateway.get(&status.gateway);
        if let (Some(failures), Some(gateway)) = (failures, gateways.get(&status.gateway)) {
            apply_to_listener_set(status, name, gateway, failures);
        }
    }
    statuses.count_listener_sets();
}

fn apply_to_gateway(status: &mut GatewayStatus, name: &NamespacedName, failures: &[&BindFailure]) {
    let mut verdict = verdict_of(&status.conditions);
    let generation = status.conditions.first().map_or(0, |c| c.observed_generation);
    let mut messages: Vec<String> = verdict.unusable_addresses.take().into_iter().collect();
    for failure in failures.iter().filter(|failure| failure.address_missing) {
        if let BindAddress::Ip(address) = failure.key.address {
            status.addresses.retain(|a| a.value != address);
        }
        let message = format!("address {}: {}", failure.key.address, failure.message);
        if !messages.contains(&message) {
            messages.push(message);
        }
    }
    verdict.unusable_addresses = (!messages.is_empty()).then(|| messages.join("; "));
    let parent = ListenerParent::Gateway(name.clone());
    let without_address = status.addresses.is_empty();
    apply_to_listeners(&mut status.listeners, &parent, failures, without_address, generation);
    status.conditions = gateway_conditions(verdict, &status.listeners, generation);
}

/// `gateway` is the status of its Gateway, which the failures have been applied to.
fn apply_to_listener_set(
    status: &mut ListenerSetStatus,
    name: &NamespacedName,
    gateway: &GatewayStatus,
    failures: &[&BindFailure],
) {
    let verdict = SetVerdict::below(&status.conditions, gateway);
    let generation = status.conditions.first().map_or(0, |c| c.observed_generation);
    let parent = ListenerParent::ListenerSet(name.clone());
    let without_address = gateway.addresses.is_empty();
    apply_to_listeners(&mut status.listeners, &parent, failures, without_address, generation);
    status.conditions = listener_set_conditions(&verdict, &status.listeners, generation);
}

/// Corrects the listeners of one Gateway or ListenerSet, of which the failures concern some, or none.
fn apply_to_listeners(
    listeners: &mut [ListenerStatus],
    parent: &ListenerParent,
    failures: &[&BindFailure],
    without_address: bool,
    generation: i64,
) {
    let (missing, unavailable): (Vec<&BindFailure>, Vec<&BindFailure>) =
        failures.iter().filter(|f| f.listener.parent == *parent).partition(|f| f.address_missing);
    let mut by_name: HashMap<String, &mut ListenerStatus> = HashMap::new();
    for listener in listeners {
        // Names are unique, save in a file with a mistake: there, only the first of the name can have been bound.
        by_name.entry(listener.name.clone()).or_insert(listener);
    }
    for failure in missing.into_iter().filter(|_| without_address) {
        if let Some(listener) = by_name.get_mut(&failure.listener.section) {
            let message = "none of the Gateway's addresses is on this node";
            listener.replace(Condition::fails(names::PROGRAMMED, names::PENDING, message, generation));
        }
    }
    for failure in unavailable {
        if let Some(listener) = by_name.get_mut(&failure.listener.section) {
            let message = format!("{}: {}", failure.key, failure.message);
            let reason = Reason::PortUnavailable;
            let accepted = Condition::fails(names::ACCEPTED, reason.as_str(), message.as_str(), generation);
            listener.replace(accepted);
            let reason = unprogrammed_reason(parent, reason);
            listener.replace(Condition::fails(names::PROGRAMMED, reason, message, generation));
        }
    }
}

/// Reads back what [`gateway_conditions`] was given.
pub(super) fn verdict_of(conditions: &[Condition]) -> GatewayVerdict {
    let failed =
        |type_: &str| conditions.iter().find(move |c| c.type_ == type_ && c.status == ConditionStatus::False);
    GatewayVerdict {
        rejection: failed(names::ACCEPTED)
            .filter(|c| c.reason != names::LISTENERS_NOT_VALID)
            .map(|c| (c.reason, c.message.clone())),
        unusable_addresses: failed(names::PROGRAMMED)
            .filter(|c| c.reason == Reason::AddressNotUsable.as_str())
            .map(|c| c.message.clone()),
    }
}

#[cfg(test)]
mod tests;
