//! The status of a ListenerSet, and what it counts for at its Gateway.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Condition, ConditionStatus, GatewayStatus, ListenerStatus, Statuses, list, names, verdict_of};
use crate::manifests::NamespacedName;
use crate::model::ListenerParent;
use crate::problem::Reason;

/// The status of a ListenerSet.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq, Serialize)]
pub struct ListenerSetStatus {
    /// The Gateway that it names, which is one of ours.
    #[serde(skip)]
    pub gateway: NamespacedName,
    /// Its conditions.
    pub conditions: Vec<Condition>,
    /// One entry for each listener of the spec, in its order.
    pub listeners: Vec<ListenerStatus>,
}

impl ListenerSetStatus {
    /// Whether it counts as attached to its Gateway.
    pub fn is_accepted(&self) -> bool {
        let holds = |c: &Condition| c.type_ == names::ACCEPTED && c.status == ConditionStatus::True;
        self.conditions.iter().any(holds)
    }
}

impl Statuses {
    /// The statuses of the listeners of a Gateway or ListenerSet, in the order of its spec; none if it has no status.
    pub fn listeners(&self, parent: &ListenerParent) -> &[ListenerStatus] {
        let listeners = match parent {
            ListenerParent::Gateway(name) => self.gateways.get(name).map(|status| &status.listeners),
            ListenerParent::ListenerSet(name) => self.listener_sets.get(name).map(|status| &status.listeners),
        };
        listeners.map(Vec::as_slice).unwrap_or_default()
    }

    /// The Gateway whose addresses the listeners of a Gateway or ListenerSet are bound to, if it has a status.
    pub fn gateway_of<'a>(&'a self, parent: &'a ListenerParent) -> Option<&'a NamespacedName> {
        match parent {
            ListenerParent::Gateway(name) => Some(name),
            ListenerParent::ListenerSet(name) => self.listener_sets.get(name).map(|status| &status.gateway),
        }
    }

    /// Counts the accepted ListenerSets of each Gateway whose status has a place for the number.
    pub(crate) fn count_listener_sets(&mut self) {
        let mut counts: BTreeMap<&NamespacedName, u32> = BTreeMap::new();
        for set in self.listener_sets.values().filter(|set| set.is_accepted()) {
            *counts.entry(&set.gateway).or_default() += 1;
        }
        for (name, status) in &mut self.gateways {
            if let Some(count) = &mut status.attached_listener_sets {
                *count = counts.get(name).copied().unwrap_or_default();
            }
        }
    }
}

/// What a ListenerSet's conditions follow from, besides its listeners; with a message, where its Gateway is in the way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum SetVerdict {
    /// Nothing is in the way.
    Taken,
    /// The Gateway takes no ListenerSets from its namespace.
    NotAllowed(String),
    /// The Gateway as a whole is not accepted. That none of its own listeners is valid is no reason: those of the
    /// ListenerSet are served all the same.
    ParentNotAccepted(String),
    /// Some of the Gateway's addresses cannot be used.
    ParentNotProgrammed(String),
}

impl SetVerdict {
    /// What a ListenerSet with these conditions is to be told once its Gateway has this status.
    pub(super) fn below(conditions: &[Condition], gateway: &GatewayStatus) -> Self {
        match (Self::of(conditions), verdict_of(&gateway.conditions).unusable_addresses) {
            (Self::Taken | Self::ParentNotProgrammed(_), Some(message)) => Self::ParentNotProgrammed(message),
            (verdict, _) => verdict,
        }
    }

    /// Reads back what [`listener_set_conditions`] was given.
    pub(super) fn of(conditions: &[Condition]) -> Self {
        let failed = |type_: &str, reason: &str| {
            let fails =
                |c: &&Condition| c.type_ == type_ && c.status == ConditionStatus::False && c.reason == reason;
            conditions.iter().find(fails).map(|c| c.message.clone())
        };
        if let Some(message) = failed(names::ACCEPTED, Reason::NotAllowed.as_str()) {
            Self::NotAllowed(message)
        } else if let Some(message) = failed(names::ACCEPTED, names::PARENT_NOT_ACCEPTED) {
            Self::ParentNotAccepted(message)
        } else if let Some(message) = failed(names::PROGRAMMED, names::PARENT_NOT_PROGRAMMED) {
            Self::ParentNotProgrammed(message)
        } else {
            Self::Taken
        }
    }
}

/// The conditions of a ListenerSet. Here only, so that they mean the same before and after the listeners are bound.
pub(crate) fn listener_set_conditions(
    verdict: &SetVerdict,
    listeners: &[ListenerStatus],
    generation: i64,
) -> Vec<Condition> {
    use names::{ACCEPTED, LISTENERS_NOT_VALID, PENDING, PROGRAMMED};
    let both_fail = |accepted, programmed, message: &str| {
        vec![
            Condition::fails(ACCEPTED, accepted, message, generation),
            Condition::fails(PROGRAMMED, programmed, message, generation),
        ]
    };
    match verdict {
        SetVerdict::NotAllowed(message) => {
            let reason = Reason::NotAllowed.as_str();
            return both_fail(reason, reason, message);
        }
        SetVerdict::ParentNotAccepted(message) => {
            return both_fail(names::PARENT_NOT_ACCEPTED, names::PARENT_NOT_PROGRAMMED, message);
        }
        SetVerdict::ParentNotProgrammed(_) | SetVerdict::Taken => {}
    }
    let invalid: Vec<&str> = listeners.iter().filter(|l| !l.is_valid()).map(|l| l.name.as_str()).collect();
    if invalid.len() == listeners.len() {
        let has_none = "the ListenerSet has no listener";
        let message = if listeners.is_empty() { has_none } else { "none of the listeners is valid" };
        return both_fail(LISTENERS_NOT_VALID, LISTENERS_NOT_VALID, message);
    }
    let accepted = if invalid.is_empty() {
        Condition::holds(ACCEPTED, ACCEPTED, "", generation)
    } else {
        let message = format!("not valid: {}", list(&invalid));
        Condition::holds(ACCEPTED, LISTENERS_NOT_VALID, message, generation)
    };
    let programmed = if let SetVerdict::ParentNotProgrammed(message) = verdict {
        Condition::fails(PROGRAMMED, names::PARENT_NOT_PROGRAMMED, message.as_str(), generation)
    } else if listeners.iter().any(|l| l.condition_holds(PROGRAMMED)) {
        Condition::holds(PROGRAMMED, PROGRAMMED, "", generation)
    } else {
        Condition::fails(PROGRAMMED, PENDING, "no listener is bound", generation)
    };
    vec![accepted, programmed]
}

/// Why a listener that is not accepted for `reason` is not programmed: only entries of a ListenerSet know
/// `PortUnavailable` there.
pub(crate) fn unprogrammed_reason(parent: &ListenerParent, reason: Reason) -> &'static str {
    match (parent, reason) {
        (ListenerParent::ListenerSet(_), Reason::PortUnavailable) => reason.as_str(),
        (ListenerParent::Gateway(_) | ListenerParent::ListenerSet(_), _) => names::INVALID,
    }
}
