//! What the nodes say of their listeners, and what that makes of the statuses.
//!
//! Each agent reports the Gateways that it has in force, and the listeners among them that it could not bind. Who writes
//! the statuses puts these reports together: a listener is programmed when its port is open, and not before.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{
    BindFailure, Condition, ConditionStatus, GatewayAddressStatus, GatewayStatus, ListenerSetStatus,
    ListenerStatus, SetVerdict, Statuses, gateway_conditions, list, listener_set_conditions, names,
    unprogrammed_reason, verdict_of,
};
use crate::manifests::NamespacedName;
use crate::model::{BindAddress, ListenerParent};
use crate::problem::Reason;

/// How many addresses `Gateway.status.addresses` may have.
const MAX_ADDRESSES: usize = 16;

/// What one agent has in force.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeReport {
    /// The node.
    pub node: String,
    /// The Gateways in force, by namespace and name.
    pub gateways: BTreeMap<String, ParentReport>,
    /// The ListenerSets in force, by namespace and name.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub listener_sets: BTreeMap<String, ParentReport>,
}

/// One Gateway or ListenerSet on one node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParentReport {
    /// The generation that is in force.
    pub generation: i64,
    /// The listeners that could not be bound though the node has their address, and why.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, String>,
    /// The addresses of the Gateway that the node does not have.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub missing: BTreeSet<IpAddr>,
}

/// A node on which an agent should run.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// What its agent says; `None` if nothing yet.
    pub report: Option<NodeReport>,
}

impl Node {
    /// What it says of a Gateway or ListenerSet, if that generation or a later one is in force.
    fn in_force<'a>(
        &'a self,
        parent: &ListenerParent,
        generation: i64,
    ) -> Option<(&'a Self, &'a ParentReport)> {
        let report = self.report.as_ref()?;
        let of_kind = match parent {
            ListenerParent::Gateway(_) => &report.gateways,
            ListenerParent::ListenerSet(_) => &report.listener_sets,
        };
        let report = of_kind.get(&parent.name().to_string())?;
        (report.generation >= generation).then_some((self, report))
    }
}

impl NodeReport {
    /// What a node reports: what is in force of `statuses`, and what could not be bound of it.
    pub fn new(node: &str, statuses: &Statuses, failures: &[BindFailure]) -> Self {
        let in_force = |name: &NamespacedName, conditions: &[Condition]| {
            let report = ParentReport { generation: generation(conditions), ..ParentReport::default() };
            (name.to_string(), report)
        };
        let mut report = Self {
            node: node.to_owned(),
            gateways: statuses.gateways.iter().map(|(name, it)| in_force(name, &it.conditions)).collect(),
            listener_sets: statuses
                .listener_sets
                .iter()
                .map(|(name, it)| in_force(name, &it.conditions))
                .collect(),
        };
        for failure in failures {
            report.add(failure, statuses);
        }
        report
    }

    fn add(&mut self, failure: &BindFailure, statuses: &Statuses) {
        let parent = &failure.listener.parent;
        match failure.key.address {
            BindAddress::Ip(address) if failure.address_missing => {
                // The addresses are the Gateway's, whosever listener it is.
                let gateway = statuses.gateway_of(parent).map(ToString::to_string).unwrap_or_default();
                if let Some(report) = self.gateways.get_mut(&gateway) {
                    report.missing.insert(address);
                }
            }
            BindAddress::Ip(_) | BindAddress::Any => {
                let of_kind = match parent {
                    ListenerParent::Gateway(_) => &mut self.gateways,
                    ListenerParent::ListenerSet(_) => &mut self.listener_sets,
                };
                if let Some(report) = of_kind.get_mut(&parent.name().to_string()) {
                    report.failures.insert(failure.listener.section.clone(), failure.message.clone());
                }
            }
        }
    }
}

/// Corrects the statuses, which assume that every listener can be bound, by what the nodes say.
///
/// A port that no node could bind makes the listener not accepted (`PortUnavailable`); one that some could not bind makes
/// it not programmed, and names them. An address that only some nodes have is as it should be; one that none has cannot
/// be used (`AddressNotUsable`).
pub fn apply_nodes(statuses: &mut Statuses, nodes: &[Node]) {
    let mut without_address = BTreeSet::new();
    for (name, status) in &mut statuses.gateways {
        if apply_to_gateway(name, status, nodes) {
            without_address.insert(name.clone());
        }
    }
    let Statuses { gateways, listener_sets, .. } = statuses;
    for (name, status) in listener_sets {
        if let Some(gateway) = gateways.get(&status.gateway) {
            apply_to_listener_set(name, status, gateway, without_address.contains(&status.gateway), nodes);
        }
    }
    statuses.count_listener_sets();
}

fn generation(conditions: &[Condition]) -> i64 {
    conditions.first().map_or(0, |condition| condition.observed_generation)
}

/// What the nodes say of one Gateway or ListenerSet.
struct Reports<'a> {
    parent: ListenerParent,
    generation: i64,
    /// Those that have the generation in force.
    current: Vec<(&'a Node, &'a ParentReport)>,
    /// How many nodes there are.
    all: usize,
    /// The nodes that have none of the Gateway's addresses: they are not to open its ports.
    elsewhere: BTreeSet<&'a str>,
}

/// The nodes that have none of a Gateway's addresses, by what they say of the Gateway.
fn elsewhere<'a>(
    nodes: &'a [Node],
    gateway: &NamespacedName,
    addresses: &[GatewayAddressStatus],
) -> BTreeSet<&'a str> {
    let gateway = gateway.to_string();
    let lacks_all = |node: &&Node| {
        let report = node.report.as_ref().and_then(|report| report.gateways.get(&gateway));
        let lacks =
            |address: &GatewayAddressStatus| report.is_some_and(|it| it.missing.contains(&address.value));
        !addresses.is_empty() && addresses.iter().all(lacks)
    };
    nodes.iter().filter(lacks_all).map(|node| node.name.as_str()).collect()
}

impl<'a> Reports<'a> {
    fn new(
        nodes: &'a [Node],
        parent: ListenerParent,
        conditions: &[Condition],
        elsewhere: BTreeSet<&'a str>,
    ) -> Self {
        let generation = generation(conditions);
        let current = nodes.iter().filter_map(|node| node.in_force(&parent, generation)).collect();
        Self { parent, generation, current, all: nodes.len(), elsewhere }
    }

    /// The nodes that could not bind a listener, and why.
    fn failing(&self, listener: &str) -> Vec<(&str, &str)> {
        let failure = |(node, report): &(&'a Node, &'a ParentReport)| {
            Some((node.name.as_str(), report.failures.get(listener)?.as_str()))
        };
        self.current.iter().filter_map(failure).collect()
    }

    /// Whether none of the nodes has the address.
    fn is_missing(&self, address: IpAddr) -> bool {
        !self.current.is_empty() && self.current.iter().all(|(_, report)| report.missing.contains(&address))
    }

    /// Corrects the listeners that are to be programmed. Yields which of them are on some nodes only.
    fn evaluate(&self, listeners: &mut [ListenerStatus], without_address: bool) -> Vec<String> {
        let mut partly_bound = Vec::new();
        for listener in listeners.iter_mut().filter(|listener| listener.condition_holds(names::PROGRAMMED)) {
            if without_address {
                listener.replace(self.pending("no node has any of the Gateway's addresses"));
            } else if let Some(message) = self.evaluate_one(listener) {
                partly_bound.push(format!("listener {}: {message}", listener.name));
            }
        }
        partly_bound
    }

    fn evaluate_one(&self, listener: &mut ListenerStatus) -> Option<String> {
        let failing = self.failing(&listener.name);
        if self.current.is_empty() {
            let message = format!("no node has opened the port yet (0/{} nodes)", self.all);
            listener.replace(self.pending(&message));
            return None;
        }
        let (_, why) = failing.first()?;
        let nodes: Vec<&str> = failing.iter().map(|(node, _)| *node).collect();
        let meant = self.current.iter().filter(|(node, _)| !self.elsewhere.contains(node.name.as_str()));
        let (bound, all) = (meant.count().saturating_sub(failing.len()), self.all - self.elsewhere.len());
        let message = format!("not bound on {}: {why}; bound on {bound}/{all} nodes", list(&nodes));
        if failing.len() < all {
            listener.replace(self.pending(&message));
            return Some(message);
        }
        let reason = Reason::PortUnavailable;
        let accepted = Condition::fails(names::ACCEPTED, reason.as_str(), message.as_str(), self.generation);
        listener.replace(accepted);
        let reason = unprogrammed_reason(&self.parent, reason);
        listener.replace(Condition::fails(names::PROGRAMMED, reason, message, self.generation));
        None
    }

    fn pending(&self, message: &str) -> Condition {
        Condition::fails(names::PROGRAMMED, names::PENDING, message, self.generation)
    }

    /// Says on how many nodes, or on which not, where nothing else is in the way of `conditions` being programmed.
    fn count(&self, conditions: &mut [Condition], partly_bound: &[String]) {
        let Some(programmed) = conditions.iter_mut().find(|it| it.type_ == names::PROGRAMMED) else { return };
        let is_programmed = programmed.status == ConditionStatus::True;
        if !partly_bound.is_empty() && (is_programmed || programmed.reason == names::PENDING) {
            *programmed = self.pending(&list(partly_bound));
        } else if is_programmed {
            programmed.message = format!("{}/{} nodes", self.current.len(), self.all);
        }
    }

    /// The addresses of these nodes: as many as fit, always the same ones.
    fn addresses(&self) -> Vec<GatewayAddressStatus> {
        let mut addresses: Vec<IpAddr> =
            self.current.iter().flat_map(|(node, _)| node.addresses.iter().copied()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let address = |value| GatewayAddressStatus { type_: "IPAddress", value };
        addresses.into_iter().take(MAX_ADDRESSES).map(address).collect()
    }
}

/// Yields whether it asks for addresses of which no node has any.
fn apply_to_gateway(name: &NamespacedName, status: &mut GatewayStatus, nodes: &[Node]) -> bool {
    let elsewhere = elsewhere(nodes, name, &status.addresses);
    let reports = Reports::new(nodes, ListenerParent::Gateway(name.clone()), &status.conditions, elsewhere);
    let is_accepted = status
        .conditions
        .iter()
        .any(|condition| condition.type_ == names::ACCEPTED && condition.status == ConditionStatus::True);
    let mut verdict = verdict_of(&status.conditions);
    let wants_addresses = !status.addresses.is_empty() || verdict.unusable_addresses.is_some();
    let missing: Vec<IpAddr> =
        status.addresses.iter().map(|it| it.value).filter(|it| reports.is_missing(*it)).collect();
    status.addresses.retain(|it| !missing.contains(&it.value));
    let mut unusable: Vec<String> = verdict.unusable_addresses.take().into_iter().collect();
    unusable.extend(missing.iter().map(|address| format!("address {address}: no node has it")));
    verdict.unusable_addresses = (!unusable.is_empty()).then(|| unusable.join("; "));

    let without_address = wants_addresses && status.addresses.is_empty();
    let partly_bound = reports.evaluate(&mut status.listeners, without_address);
    status.conditions = gateway_conditions(verdict, &status.listeners, reports.generation);
    reports.count(&mut status.conditions, &partly_bound);
    if is_accepted && !wants_addresses {
        status.addresses = reports.addresses();
    }
    without_address
}

/// `gateway` is the status of its Gateway, which the nodes have been applied to.
fn apply_to_listener_set(
    name: &NamespacedName,
    status: &mut ListenerSetStatus,
    gateway: &GatewayStatus,
    without_address: bool,
    nodes: &[Node],
) {
    let elsewhere = elsewhere(nodes, &status.gateway, &gateway.addresses);
    let parent = ListenerParent::ListenerSet(name.clone());
    let reports = Reports::new(nodes, parent, &status.conditions, elsewhere);
    let verdict = SetVerdict::below(&status.conditions, gateway);
    let partly_bound = reports.evaluate(&mut status.listeners, without_address);
    status.conditions = listener_set_conditions(&verdict, &status.listeners, reports.generation);
    reports.count(&mut status.conditions, &partly_bound);
}

#[cfg(test)]
mod tests;
