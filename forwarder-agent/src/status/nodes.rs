//! What the nodes say of their listeners, and what that makes of the statuses.
//!
//! Each agent reports the Gateways that it has in force, and the listeners among them that it could not bind. Who writes
//! the statuses puts these reports together: a listener is programmed when its port is open, and not before.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{
    BindFailure, Condition, ConditionStatus, GatewayAddressStatus, GatewayStatus, ListenerStatus, Statuses,
    gateway_conditions, list, names, verdict_of,
};
use crate::manifests::NamespacedName;
use crate::model::BindAddress;
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
    pub gateways: BTreeMap<String, GatewayReport>,
}

/// One Gateway on one node.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayReport {
    /// The generation of the Gateway that is in force.
    pub generation: i64,
    /// The listeners that could not be bound.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub failures: Vec<ListenerFailure>,
}

/// A listener that could not be bound at one of its addresses.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListenerFailure {
    /// The listener's name in its Gateway.
    pub listener: String,
    /// The address; absent for every address of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// What the kernel said.
    pub message: String,
    /// Whether the node does not have the address.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub address_missing: bool,
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
    /// What it says of a Gateway, if that generation or a later one is in force.
    fn in_force<'a>(&'a self, gateway: &str, generation: i64) -> Option<(&'a Self, &'a GatewayReport)> {
        let report = self.report.as_ref()?.gateways.get(gateway)?;
        (report.generation >= generation).then_some((self, report))
    }
}

impl NodeReport {
    /// What a node reports: the Gateways of `statuses`, and what could not be bound of them.
    pub fn new(node: &str, statuses: &Statuses, failures: &[BindFailure]) -> Self {
        let mut gateways: BTreeMap<String, GatewayReport> = statuses
            .gateways
            .iter()
            .map(|(name, status)| {
                (name.to_string(), GatewayReport { generation: generation(status), failures: Vec::new() })
            })
            .collect();
        for failure in failures {
            let Some(gateway) = gateways.get_mut(&failure.listener.gateway.to_string()) else { continue };
            gateway.failures.push(ListenerFailure {
                listener: failure.listener.section.clone(),
                address: match failure.key.address {
                    BindAddress::Any => None,
                    BindAddress::Ip(address) => Some(address),
                },
                message: failure.message.clone(),
                address_missing: failure.address_missing,
            });
        }
        Self { node: node.to_owned(), gateways }
    }
}

/// Corrects the statuses, which assume that every listener can be bound, by what the nodes say.
///
/// A port that no node could bind makes the listener not accepted (`PortUnavailable`); one that some could not bind makes
/// it not programmed, and names them. An address that only some nodes have is as it should be; one that none has cannot
/// be used (`AddressNotUsable`).
pub fn apply_nodes(statuses: &mut Statuses, nodes: &[Node]) {
    for (name, status) in &mut statuses.gateways {
        apply_to_gateway(name, status, nodes);
    }
}

fn generation(status: &GatewayStatus) -> i64 {
    status.conditions.first().map_or(0, |condition| condition.observed_generation)
}

/// What the nodes say of one Gateway.
struct Reports<'a> {
    /// Those that have the Gateway's generation in force.
    current: Vec<(&'a Node, &'a GatewayReport)>,
    /// How many nodes there are.
    all: usize,
}

impl Reports<'_> {
    /// The nodes that could not bind a listener though they have its address, and why.
    fn failing(&self, listener: &str) -> Vec<(&str, &str)> {
        self.current
            .iter()
            .filter_map(|(node, report)| {
                let mut failures = report.failures.iter();
                let failure = failures.find(|it| it.listener == listener && !it.address_missing)?;
                Some((node.name.as_str(), failure.message.as_str()))
            })
            .collect()
    }

    /// Whether none of the nodes has the address.
    fn is_missing(&self, address: IpAddr) -> bool {
        let lacks = |report: &GatewayReport| {
            report.failures.iter().any(|it| it.address_missing && it.address == Some(address))
        };
        !self.current.is_empty() && self.current.iter().all(|(_, report)| lacks(report))
    }

    fn count(&self) -> String {
        format!("{}/{} nodes", self.current.len(), self.all)
    }
}

fn apply_to_gateway(name: &NamespacedName, status: &mut GatewayStatus, nodes: &[Node]) {
    let generation = generation(status);
    let key = name.to_string();
    let current = nodes.iter().filter_map(|node| node.in_force(&key, generation)).collect();
    let reports = Reports { current, all: nodes.len() };
    let is_accepted = status
        .conditions
        .iter()
        .any(|condition| condition.type_ == names::ACCEPTED && condition.status == ConditionStatus::True);
    let mut verdict = verdict_of(&status.conditions);
    let wanted_addresses = !status.addresses.is_empty();

    let missing: Vec<IpAddr> =
        status.addresses.iter().map(|it| it.value).filter(|it| reports.is_missing(*it)).collect();
    status.addresses.retain(|it| !missing.contains(&it.value));
    let mut unusable: Vec<String> = verdict.unusable_addresses.take().into_iter().collect();
    unusable.extend(missing.iter().map(|address| format!("address {address}: no node has it")));
    verdict.unusable_addresses = (!unusable.is_empty()).then(|| unusable.join("; "));

    let mut partly_bound = Vec::new();
    for listener in status.listeners.iter_mut().filter(|listener| listener.condition_holds(names::PROGRAMMED))
    {
        if wanted_addresses && status.addresses.is_empty() {
            let message = "no node has any of the Gateway's addresses";
            listener.replace(Condition::fails(names::PROGRAMMED, names::PENDING, message, generation));
        } else if let Some(message) = judge(listener, &reports, generation) {
            partly_bound.push(message);
        }
    }
    let mut conditions = gateway_conditions(verdict, &status.listeners, generation);
    if let Some(programmed) = conditions.iter_mut().find(|condition| condition.type_ == names::PROGRAMMED)
        && programmed.status == ConditionStatus::True
    {
        if partly_bound.is_empty() {
            programmed.message = reports.count();
        } else {
            *programmed =
                Condition::fails(names::PROGRAMMED, names::PENDING, partly_bound.join("; "), generation);
        }
    }
    status.conditions = conditions;
    if is_accepted && !wanted_addresses {
        status.addresses = addresses(&reports);
    }
}

/// Corrects a listener that is to be programmed. Yields why it is so on some nodes only, where it is.
fn judge(listener: &mut ListenerStatus, reports: &Reports<'_>, generation: i64) -> Option<String> {
    let failing = reports.failing(&listener.name);
    let bound = reports.current.len() - failing.len();
    if reports.current.is_empty() {
        let message = format!("no node has opened the port yet (0/{} nodes)", reports.all);
        listener.replace(Condition::fails(names::PROGRAMMED, names::PENDING, message, generation));
        return None;
    }
    let (_, why) = failing.first()?;
    let nodes: Vec<&str> = failing.iter().map(|(node, _)| *node).collect();
    let message = format!("not bound on {}: {why}; bound on {bound}/{} nodes", list(&nodes), reports.all);
    if failing.len() == reports.all {
        let reason = Reason::PortUnavailable.as_str();
        listener.replace(Condition::fails(names::ACCEPTED, reason, message.as_str(), generation));
        listener.replace(Condition::fails(names::PROGRAMMED, names::INVALID, message, generation));
        return None;
    }
    listener.replace(Condition::fails(names::PROGRAMMED, names::PENDING, message.as_str(), generation));
    Some(format!("listener {}: {message}", listener.name))
}

/// The addresses of the nodes that serve a Gateway which asks for none: as many as fit, always the same ones.
fn addresses(reports: &Reports<'_>) -> Vec<GatewayAddressStatus> {
    let mut addresses: Vec<IpAddr> =
        reports.current.iter().flat_map(|(node, _)| node.addresses.iter().copied()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let address = |value| GatewayAddressStatus { type_: "IPAddress", value };
    addresses.into_iter().take(MAX_ADDRESSES).map(address).collect()
}

#[cfg(test)]
mod tests;
