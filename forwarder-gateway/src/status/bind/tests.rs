use std::net::IpAddr;
use std::num::NonZeroU16;
use std::time::Instant;

use super::super::GatewayAddressStatus;
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
        attached_listener_sets: Some(0),
    };
    Statuses { gateways: [(gateway_name(), status)].into(), ..Statuses::default() }
}

fn failure(section: &str, address: BindAddress, message: &str) -> BindFailure {
    BindFailure {
        listener: ListenerName {
            parent: ListenerParent::Gateway(gateway_name()),
            section: section.to_owned(),
        },
        key: ListenerKey { address, port: NonZeroU16::new(3306).unwrap() },
        message: message.to_owned(),
        address_missing: message == MISSING,
        since: Instant::now(),
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
    let left: Vec<IpAddr> = statuses.gateways[&gateway_name()].addresses.iter().map(|a| a.value).collect();
    assert_eq!(left, [ip("10.0.0.2")]);
}

#[test]
fn a_failure_keeps_what_was_wrong_before() {
    let mut statuses = statuses(&["mysql", "redis"], &["10.0.0.2"]);
    let status = statuses.gateways.get_mut(&gateway_name()).unwrap();
    let verdict = GatewayVerdict { unusable_addresses: Some("bad".to_owned()), rejection: None };
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

/// As [`statuses`], with ListenerSets of one listener each.
fn with_sets(mut statuses: Statuses, sets: &[&str]) -> Statuses {
    for name in sets {
        let listeners = vec![listener("mysql")];
        let status = ListenerSetStatus {
            gateway: gateway_name(),
            conditions: listener_set_conditions(&SetVerdict::Taken, &listeners, 4),
            listeners,
        };
        statuses.listener_sets.insert(NamespacedName::new("app", *name), status);
    }
    statuses.count_listener_sets();
    statuses
}

fn failure_of_set(set: &str, address: BindAddress, message: &str) -> BindFailure {
    let parent = ListenerParent::ListenerSet(NamespacedName::new("app", set));
    let listener = ListenerName { parent, section: "mysql".to_owned() };
    BindFailure { listener, ..failure("mysql", address, message) }
}

/// Applies the failures and renders the conditions of the ListenerSets and of their listeners.
fn check_sets(
    mut statuses: Statuses,
    failures: &[BindFailure],
    attached: u32,
    expected: &[&str],
) -> Statuses {
    apply_bind_failures(&mut statuses, failures);
    let lines = statuses.listener_sets.iter().flat_map(|(name, status)| {
        let listeners = status.listeners.iter().map(|l| render(&l.name, &l.conditions));
        std::iter::once(render(&name.name, &status.conditions)).chain(listeners)
    });
    assert_eq!(lines.collect::<Vec<_>>(), expected);
    assert_eq!(statuses.gateways[&gateway_name()].attached_listener_sets, Some(attached));
    statuses
}

#[test]
fn a_port_in_use_concerns_the_listener_set_alone() {
    let before = with_sets(statuses(&["mysql"], &[]), &["a", "b"]);
    let failures = [failure_of_set("a", BindAddress::Any, IN_USE)];
    let after = check_sets(
        before.clone(),
        &failures,
        1,
        &[
            "a: Accepted=False/ListenersNotValid Programmed=False/ListenersNotValid",
            "mysql: Accepted=False/PortUnavailable Programmed=False/PortUnavailable",
            "b: Accepted=True/Accepted Programmed=True/Programmed",
            "mysql: Accepted=True/Accepted Programmed=True/Programmed",
        ],
    );
    let conditions = |statuses: &Statuses| statuses.gateways[&gateway_name()].conditions.clone();
    assert_eq!(conditions(&before), conditions(&after));
    let problem = failures[0].problem(&after);
    assert_eq!(
        problem.to_string(),
        "ListenerSet app/a: spec.listeners[0].port: address already in use (PortUnavailable)"
    );
}

#[test]
fn a_listener_set_is_served_where_the_gateways_own_listeners_are_not() {
    check_sets(
        with_sets(statuses(&["mysql"], &[]), &["a"]),
        &[failure("mysql", BindAddress::Any, IN_USE)],
        1,
        &[
            "a: Accepted=True/Accepted Programmed=True/Programmed",
            "mysql: Accepted=True/Accepted Programmed=True/Programmed",
        ],
    );
}

#[test]
fn an_address_that_the_node_lacks_is_told_by_gateway_and_listener_sets() {
    let before = with_sets(statuses(&["mysql"], &["10.0.0.1"]), &["a"]);
    let failures = [failure_of_set("a", BindAddress::Ip(ip("10.0.0.1")), MISSING)];
    let after = check_sets(
        before,
        &failures,
        1,
        &[
            "a: Accepted=True/Accepted Programmed=False/ParentNotProgrammed",
            "mysql: Accepted=True/Accepted Programmed=False/Pending",
        ],
    );
    let gateway = render("gateway", &after.gateways[&gateway_name()].conditions);
    assert_eq!(gateway, "gateway: Accepted=True/Accepted Programmed=False/AddressNotUsable");
    let problem = failures[0].problem(&after).to_string();
    assert_eq!(
        problem,
        "Gateway db/gateway: spec.addresses: cannot assign requested address (AddressNotUsable)"
    );
}

#[test]
fn a_listener_set_that_is_not_taken_stays_so() {
    let mut statuses = with_sets(statuses(&["mysql"], &["10.0.0.1"]), &["a", "b"]);
    let verdicts =
        [SetVerdict::NotAllowed("why".to_owned()), SetVerdict::ParentNotAccepted("why".to_owned())];
    for (status, verdict) in statuses.listener_sets.values_mut().zip(verdicts) {
        status.conditions = listener_set_conditions(&verdict, &status.listeners, 4);
        assert_eq!(SetVerdict::of(&status.conditions), verdict);
    }
    check_sets(
        statuses,
        &[failure("mysql", BindAddress::Ip(ip("10.0.0.1")), MISSING)],
        0,
        &[
            "a: Accepted=False/NotAllowed Programmed=False/NotAllowed",
            "mysql: Accepted=True/Accepted Programmed=True/Programmed",
            "b: Accepted=False/ParentNotAccepted Programmed=False/ParentNotProgrammed",
            "mysql: Accepted=True/Accepted Programmed=True/Programmed",
        ],
    );
}
