//! The statuses of the Gateway API as data: what a Kubernetes API server would be told, and what files are told too.

pub mod nodes;

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use serde::Serialize;

use crate::manifests::NamespacedName;
use crate::model::{BindAddress, ListenerKey, ListenerName};
use crate::problem::Reason;

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
pub struct GatewayStatus {
    /// The addresses that its listeners are bound to, at most 16. Empty where they are bound to every address of the
    /// node: which these are is for the writer to fill in.
    pub addresses: Vec<GatewayAddressStatus>,
    /// Its conditions.
    pub conditions: Vec<Condition>,
    /// One entry for each listener of the spec, in its order.
    pub listeners: Vec<ListenerStatus>,
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

/// The status of a Gateway's listener.
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

/// The status of a TCPRoute: one entry for each of its parents that is a Gateway of ours.
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
    /// The Gateway.
    #[serde(serialize_with = "display")]
    pub gateway: NamespacedName,
    /// The parentRef's sectionName.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// The parentRef's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<i64>,
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
    /// Of every TCPRoute with a parent among these Gateways.
    pub tcp_routes: BTreeMap<NamespacedName, RouteStatus>,
}

/// Conditions and their reasons that are no [`Reason`] of a problem. The names are those of the Gateway API.
pub(crate) mod names {
    pub(crate) const ACCEPTED: &str = "Accepted";
    pub(crate) const CONFLICTED: &str = "Conflicted";
    pub(crate) const INVALID: &str = "Invalid";
    pub(crate) const LISTENERS_NOT_VALID: &str = "ListenersNotValid";
    pub(crate) const PARTIALLY_INVALID: &str = "PartiallyInvalid";
    pub(crate) const PENDING: &str = "Pending";
    pub(crate) const PROGRAMMED: &str = "Programmed";
    pub(crate) const RESOLVED_REFS: &str = "ResolvedRefs";
    pub(crate) const SUPPORTED_VERSION: &str = "SupportedVersion";
    pub(crate) const UNSUPPORTED_VERSION: &str = "UnsupportedVersion";
}

/// What a Gateway's conditions follow from, besides its listeners.
#[derive(Clone, Debug, Default)]
pub(crate) struct GatewayVerdict {
    /// Why the Gateway as a whole is not accepted: reason and message.
    pub(crate) refusal: Option<(&'static str, String)>,
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
    let accepted = if let Some((reason, message)) = verdict.refusal {
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
pub(crate) fn list<S: AsRef<str>>(items: &[S]) -> String {
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
}

/// Corrects the statuses, which assume that every listener can be bound, by what could not.
///
/// A port that cannot be bound makes the listener not accepted (`PortUnavailable`). An address that the node does not
/// have is a matter of the Gateway (`AddressNotUsable`): its listeners stay accepted, and programmed as long as another
/// address is left. Failures of listeners that the statuses do not know are ignored.
pub fn apply_bind_failures(statuses: &mut Statuses, failures: &[BindFailure]) {
    let mut by_gateway: BTreeMap<&NamespacedName, Vec<&BindFailure>> = BTreeMap::new();
    for failure in failures {
        by_gateway.entry(&failure.listener.gateway).or_default().push(failure);
    }
    for (name, failures) in by_gateway {
        if let Some(status) = statuses.gateways.get_mut(name) {
            apply_to_gateway(status, &failures);
        }
    }
}

fn apply_to_gateway(status: &mut GatewayStatus, failures: &[&BindFailure]) {
    let mut verdict = verdict_of(&status.conditions);
    let generation = status.conditions.first().map_or(0, |c| c.observed_generation);
    let (missing, unavailable): (Vec<&BindFailure>, Vec<&BindFailure>) =
        failures.iter().partition(|f| f.address_missing);

    let mut messages: Vec<String> = verdict.unusable_addresses.take().into_iter().collect();
    for failure in &missing {
        if let BindAddress::Ip(address) = failure.key.address {
            status.addresses.retain(|a| a.value != address);
        }
        let message = format!("address {}: {}", failure.key.address, failure.message);
        if !messages.contains(&message) {
            messages.push(message);
        }
    }
    verdict.unusable_addresses = (!messages.is_empty()).then(|| messages.join("; "));

    let mut listeners: HashMap<String, &mut ListenerStatus> = HashMap::new();
    for listener in &mut status.listeners {
        // Names are unique, save in a file with a mistake: there, only the first of the name can have been bound.
        listeners.entry(listener.name.clone()).or_insert(listener);
    }
    if status.addresses.is_empty() {
        for failure in missing {
            if let Some(listener) = listeners.get_mut(&failure.listener.section) {
                let message = "none of the Gateway's addresses is on this node";
                listener.replace(Condition::fails(names::PROGRAMMED, names::PENDING, message, generation));
            }
        }
    }
    for failure in unavailable {
        if let Some(listener) = listeners.get_mut(&failure.listener.section) {
            let message = format!("{}: {}", failure.key, failure.message);
            let reason = Reason::PortUnavailable.as_str();
            listener.replace(Condition::fails(names::ACCEPTED, reason, message.as_str(), generation));
            listener.replace(Condition::fails(names::PROGRAMMED, names::INVALID, message, generation));
        }
    }
    status.conditions = gateway_conditions(verdict, &status.listeners, generation);
}

/// Reads back what [`gateway_conditions`] was given.
fn verdict_of(conditions: &[Condition]) -> GatewayVerdict {
    let failed =
        |type_: &str| conditions.iter().find(move |c| c.type_ == type_ && c.status == ConditionStatus::False);
    GatewayVerdict {
        refusal: failed(names::ACCEPTED)
            .filter(|c| c.reason != names::LISTENERS_NOT_VALID)
            .map(|c| (c.reason, c.message.clone())),
        unusable_addresses: failed(names::PROGRAMMED)
            .filter(|c| c.reason == Reason::AddressNotUsable.as_str())
            .map(|c| c.message.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;

    const IN_USE: &str = "address already in use";
    const MISSING: &str = "cannot assign requested address";

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn listener(name: &str) -> ListenerStatus {
        ListenerStatus {
            name: name.to_owned(),
            conditions: vec![
                Condition::holds(names::ACCEPTED, names::ACCEPTED, "", 4),
                Condition::holds(names::PROGRAMMED, names::PROGRAMMED, "", 4),
            ],
            ..ListenerStatus::default()
        }
    }

    fn gateway_name() -> NamespacedName {
        NamespacedName::new("db", "gateway")
    }

    /// A Gateway with these listeners, all programmed, on these addresses.
    fn statuses(listeners: &[&str], addresses: &[&str]) -> Statuses {
        let listeners: Vec<ListenerStatus> = listeners.iter().map(|name| listener(name)).collect();
        let address = |text: &&str| GatewayAddressStatus { type_: "IPAddress", value: ip(text) };
        let status = GatewayStatus {
            addresses: addresses.iter().map(address).collect(),
            conditions: gateway_conditions(GatewayVerdict::default(), &listeners, 4),
            listeners,
        };
        Statuses { gateways: [(gateway_name(), status)].into(), ..Statuses::default() }
    }

    fn failure(section: &str, address: BindAddress, message: &str) -> BindFailure {
        BindFailure {
            listener: ListenerName { gateway: gateway_name(), section: section.to_owned() },
            key: ListenerKey { address, port: NonZeroU16::new(3306).unwrap() },
            message: message.to_owned(),
            address_missing: message == MISSING,
        }
    }

    /// Applies the failures and renders the conditions of the Gateway, then of its listeners.
    fn check(mut statuses: Statuses, failures: &[BindFailure], expected: &[&str]) {
        apply_bind_failures(&mut statuses, failures);
        let status = &statuses.gateways[&gateway_name()];
        let mut lines = vec![render("gateway", &status.conditions)];
        lines.extend(status.listeners.iter().map(|l| render(&l.name, &l.conditions)));
        assert_eq!(lines, expected);
        let all = status.listeners.iter().flat_map(|l| &l.conditions).chain(&status.conditions);
        assert!(all.into_iter().all(|c| c.observed_generation == 4));
    }

    fn render(name: &str, conditions: &[Condition]) -> String {
        let conditions = conditions.iter().map(|c| format!(" {}={:?}/{}", c.type_, c.status, c.reason));
        format!("{name}:{}", conditions.collect::<String>())
    }

    #[test]
    fn a_port_in_use_makes_its_listener_not_accepted() {
        check(
            statuses(&["mysql", "redis"], &[]),
            &[failure("mysql", BindAddress::Any, IN_USE)],
            &[
                "gateway: Accepted=True/ListenersNotValid Programmed=True/Programmed",
                "mysql: Accepted=False/PortUnavailable Programmed=False/Invalid",
                "redis: Accepted=True/Accepted Programmed=True/Programmed",
            ],
        );
    }

    #[test]
    fn a_gateway_without_a_bound_listener_is_not_accepted() {
        check(
            statuses(&["mysql"], &[]),
            &[failure("mysql", BindAddress::Any, IN_USE)],
            &[
                "gateway: Accepted=False/ListenersNotValid Programmed=False/Invalid",
                "mysql: Accepted=False/PortUnavailable Programmed=False/Invalid",
            ],
        );
    }

    #[test]
    fn an_address_that_the_node_lacks_is_the_gateways_matter() {
        let failures = [failure("mysql", BindAddress::Ip(ip("10.0.0.1")), MISSING)];
        check(
            statuses(&["mysql"], &["10.0.0.1"]),
            &failures,
            &[
                "gateway: Accepted=True/Accepted Programmed=False/AddressNotUsable",
                "mysql: Accepted=True/Accepted Programmed=False/Pending",
            ],
        );
    }

    #[test]
    fn a_listener_stays_programmed_on_the_addresses_that_are_left() {
        let failures = [failure("mysql", BindAddress::Ip(ip("10.0.0.1")), MISSING)];
        let mut statuses = statuses(&["mysql"], &["10.0.0.1", "10.0.0.2"]);
        check(
            statuses.clone(),
            &failures,
            &[
                "gateway: Accepted=True/Accepted Programmed=False/AddressNotUsable",
                "mysql: Accepted=True/Accepted Programmed=True/Programmed",
            ],
        );
        apply_bind_failures(&mut statuses, &failures);
        let left: Vec<IpAddr> =
            statuses.gateways[&gateway_name()].addresses.iter().map(|a| a.value).collect();
        assert_eq!(left, [ip("10.0.0.2")]);
    }

    #[test]
    fn a_failure_keeps_what_was_wrong_before() {
        let mut statuses = statuses(&["mysql", "redis"], &["10.0.0.2"]);
        let status = statuses.gateways.get_mut(&gateway_name()).unwrap();
        let verdict = GatewayVerdict { unusable_addresses: Some("bad".to_owned()), refusal: None };
        status.conditions = gateway_conditions(verdict, &status.listeners, 4);
        check(
            statuses,
            &[failure("mysql", BindAddress::Ip(ip("10.0.0.2")), IN_USE)],
            &[
                "gateway: Accepted=True/ListenersNotValid Programmed=False/AddressNotUsable",
                "mysql: Accepted=False/PortUnavailable Programmed=False/Invalid",
                "redis: Accepted=True/Accepted Programmed=True/Programmed",
            ],
        );
    }

    #[test]
    fn failures_of_unknown_listeners_are_ignored() {
        check(
            statuses(&["mysql"], &[]),
            &[failure("gone", BindAddress::Any, IN_USE)],
            &[
                "gateway: Accepted=True/Accepted Programmed=True/Programmed",
                "mysql: Accepted=True/Accepted Programmed=True/Programmed",
            ],
        );
    }

    #[test]
    fn long_lists_are_counted() {
        let names: Vec<String> = (0..10).map(|i| i.to_string()).collect();
        assert_eq!(list(&names), "0, 1, 2, 3, 4, 5, 6, 7 and 2 more");
        assert_eq!(list(&["a", "b"]), "a, b");
    }
}
