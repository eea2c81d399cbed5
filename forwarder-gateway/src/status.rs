//! The statuses of the Gateway API as data: what a Kubernetes API server would be told, and what files are told too.

mod bind;
mod listener_set;
pub mod nodes;
mod tiers;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;

use crate::manifests::NamespacedName;
use crate::model::ListenerParent;
use crate::problem::Reason;

use self::bind::verdict_of;
pub use self::bind::{BindFailure, apply_bind_failures};
pub use self::listener_set::ListenerSetStatus;
pub(crate) use self::listener_set::{SetVerdict, listener_set_conditions, unprogrammed_reason};
pub use self::tiers::MissingTiers;

/// The status of a condition.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq, Serialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not yet known.
    Unknown,
}

impl ConditionStatus {
    /// The status as it is written.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// A `metav1.Condition`, less its transition time, which belongs to the writer.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// The type, such as `Accepted`.
    #[serde(rename = "type")]
    pub type_: &'static str,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, as one word.
    pub reason: &'static str,
    /// Why, as a sentence; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The generation of the object that was looked at.
    pub observed_generation: i64,
}

impl Condition {
    /// A condition that holds.
    pub fn holds(
        type_: &'static str,
        reason: &'static str,
        message: impl Into<String>,
        observed_generation: i64,
    ) -> Self {
        Self { type_, status: ConditionStatus::True, reason, message: message.into(), observed_generation }
    }

    /// A condition that does not hold.
    pub fn fails(
        type_: &'static str,
        reason: &'static str,
        message: impl Into<String>,
        observed_generation: i64,
    ) -> Self {
        Self { status: ConditionStatus::False, ..Self::holds(type_, reason, message, observed_generation) }
    }
}

/// The status of a GatewayClass.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize)]
pub struct GatewayClassStatus {
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// The status of a Gateway.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct GatewayStatus {
    /// The addresses that its listeners are bound to, at most 16. Empty where they are bound to every address of the
    /// node: which these are is for the writer to fill in.
    pub addresses: Vec<GatewayAddressStatus>,
    /// Its conditions.
    pub conditions: Vec<Condition>,
    /// One entry for each listener of the spec, in its order.
    pub listeners: Vec<ListenerStatus>,
    /// How many ListenerSets it has accepted; `None` where the cluster's release of the Gateway API has no place for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attached_listener_sets: Option<u32>,
}

/// An address that a Gateway is bound to.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize)]
pub struct GatewayAddressStatus {
    /// The type, always written: `IPAddress`.
    #[serde(rename = "type")]
    pub type_: &'static str,
    /// The address.
    #[serde(serialize_with = "display")]
    pub value: IpAddr,
}

/// The status of a listener of a Gateway or ListenerSet.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    /// The listener.
    pub name: String,
    /// The kinds of routes that it can serve.
    pub supported_kinds: Vec<SupportedKind>,
    /// How many routes are attached, superseded ones included.
    pub attached_routes: u32,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// A kind of routes that a listener can serve.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize)]
pub struct SupportedKind {
    /// The group.
    pub group: &'static str,
    /// The kind.
    pub kind: &'static str,
}

/// The status of a TCPRoute: one entry for each of its parents that is a Gateway of ours, or a ListenerSet of one.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize)]
pub struct RouteStatus {
    /// The parents.
    pub parents: Vec<RouteParentStatus>,
}

/// The status of a TCPRoute at one parent.
#[derive(Clone, Debug, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteParentStatus {
    /// The index of the parentRef in the route's spec.
    #[serde(skip)]
    pub parent_ref: usize,
    /// The Gateway or ListenerSet.
    #[serde(flatten)]
    pub parent: ListenerParent,
    /// The parentRef's sectionName.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// The parentRef's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<i64>,
    /// Whether another route serves one of the listeners: there is no condition for it, and people should know.
    #[serde(skip)]
    pub is_superseded: bool,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

fn display<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Every status.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Statuses {
    /// Of every GatewayClass of our controller.
    pub gateway_classes: BTreeMap<String, GatewayClassStatus>,
    /// Of every Gateway of these classes.
    pub gateways: BTreeMap<NamespacedName, GatewayStatus>,
    /// Of every ListenerSet that names one of these Gateways.
    pub listener_sets: BTreeMap<NamespacedName, ListenerSetStatus>,
    /// Of every TCPRoute with a parent among these Gateways and ListenerSets.
    pub tcp_routes: BTreeMap<NamespacedName, RouteStatus>,
}

/// Conditions and their reasons that are no [`Reason`] of a problem. The names are those of the Gateway API.
pub mod names {
    /// The condition of a GatewayClass, Gateway, listener or route that is accepted.
    pub const ACCEPTED: &str = "Accepted";
    /// The condition of a listener that another one has the port of.
    pub const CONFLICTED: &str = "Conflicted";
    pub(crate) const INVALID: &str = "Invalid";
    pub(crate) const LISTENERS_NOT_VALID: &str = "ListenersNotValid";
    pub(crate) const PARENT_NOT_ACCEPTED: &str = "ParentNotAccepted";
    pub(crate) const PARENT_NOT_PROGRAMMED: &str = "ParentNotProgrammed";
    /// The condition of a route some of whose rules are used although others cannot be.
    pub const PARTIALLY_INVALID: &str = "PartiallyInvalid";
    /// The reason where something has still to be done.
    pub const PENDING: &str = "Pending";
    /// The condition of a Gateway or listener that is served.
    pub const PROGRAMMED: &str = "Programmed";
    /// The condition of a listener or route whose references lead somewhere.
    pub const RESOLVED_REFS: &str = "ResolvedRefs";
    /// The condition of a GatewayClass whose CRDs' release is known.
    pub const SUPPORTED_VERSION: &str = "SupportedVersion";
    pub(crate) const UNSUPPORTED_VERSION: &str = "UnsupportedVersion";
}

/// What a Gateway's conditions follow from, besides its listeners.
#[derive(Clone, Debug, Default)]
pub(crate) struct GatewayVerdict {
    /// Why the Gateway as a whole is not accepted: reason and message.
    pub(crate) rejection: Option<(&'static str, String)>,
    /// Which of its addresses cannot be used, as a sentence.
    pub(crate) unusable_addresses: Option<String>,
}

/// The conditions of a Gateway. Here only, so that they mean the same before and after the listeners are bound.
pub(crate) fn gateway_conditions(
    verdict: GatewayVerdict,
    listeners: &[ListenerStatus],
    generation: i64,
) -> Vec<Condition> {
    use names::{ACCEPTED, INVALID, LISTENERS_NOT_VALID, PENDING, PROGRAMMED};
    let invalid: Vec<&str> = listeners.iter().filter(|l| !l.is_valid()).map(|l| l.name.as_str()).collect();
    let accepted = if let Some((reason, message)) = verdict.rejection {
        Condition::fails(ACCEPTED, reason, message, generation)
    } else if listeners.is_empty() {
        Condition::fails(ACCEPTED, LISTENERS_NOT_VALID, "the Gateway has no listener", generation)
    } else if invalid.len() == listeners.len() {
        Condition::fails(ACCEPTED, LISTENERS_NOT_VALID, "none of the listeners is valid", generation)
    } else if invalid.is_empty() {
        Condition::holds(ACCEPTED, ACCEPTED, "", generation)
    } else {
        let message = format!("not valid: {}", list(&invalid));
        Condition::holds(ACCEPTED, LISTENERS_NOT_VALID, message, generation)
    };
    let programmed = if accepted.status != ConditionStatus::True {
        Condition::fails(PROGRAMMED, INVALID, "the Gateway is not accepted", generation)
    } else if let Some(message) = verdict.unusable_addresses {
        Condition::fails(PROGRAMMED, Reason::AddressNotUsable.as_str(), message, generation)
    } else if listeners.iter().any(|l| l.condition_holds(PROGRAMMED)) {
        Condition::holds(PROGRAMMED, PROGRAMMED, "", generation)
    } else {
        Condition::fails(PROGRAMMED, PENDING, "no listener is bound", generation)
    };
    vec![accepted, programmed]
}

/// How many names a message lists before it counts the rest: conditions have room for 32 KiB, readers for less.
const LISTED: usize = 8;

/// `a, b and 3 more`.
pub fn list<S: AsRef<str>>(items: &[S]) -> String {
    let shown: Vec<&str> = items.iter().take(LISTED).map(AsRef::as_ref).collect();
    match items.len().saturating_sub(LISTED) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

impl ListenerStatus {
    /// Whether the condition of this type is there and true.
    pub fn condition_holds(&self, type_: &str) -> bool {
        self.conditions.iter().any(|c| c.type_ == type_ && c.status == ConditionStatus::True)
    }

    /// Whether it can be served as it stands. One that merely waits for an address is valid.
    fn is_valid(&self) -> bool {
        let invalid = |c: &Condition| {
            c.type_ == names::PROGRAMMED && c.status == ConditionStatus::False && c.reason != names::PENDING
        };
        self.condition_holds(names::ACCEPTED) && !self.conditions.iter().any(invalid)
    }

    fn replace(&mut self, condition: Condition) {
        match self.conditions.iter_mut().find(|c| c.type_ == condition.type_) {
            Some(place) => *place = condition,
            None => self.conditions.push(condition),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_counted() {
        let names: Vec<String> = (0..10).map(|i| i.to_string()).collect();
        assert_eq!(list(&names), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(list(&["a", "b"]), "a, b");
    }

    #[test]
    fn a_parent_is_told_by_its_kind() {
        let parent = |parent| RouteParentStatus {
            parent_ref: 0,
            parent,
            section_name: Some("mysql".to_owned()),
            port: None,
            is_superseded: false,
            conditions: Vec::new(),
        };
        let name = NamespacedName::new("db", "a");
        let gateway = serde_json::to_value(parent(ListenerParent::Gateway(name.clone()))).unwrap();
        let expected = serde_json::json!({"gateway": "db/a", "sectionName": "mysql", "conditions": []});
        assert_eq!(gateway, expected);
        let set = serde_json::to_value(parent(ListenerParent::ListenerSet(name))).unwrap();
        let expected = serde_json::json!({"listenerSet": "db/a", "sectionName": "mysql", "conditions": []});
        assert_eq!(set, expected);
    }
}
