use std::num::NonZeroU16;
use std::time::Instant;

use super::*;
use crate::model::{ListenerKey, ListenerName};
use crate::status::GatewayVerdict;

const IN_USE: &str = "address already in use";

fn name() -> NamespacedName {
    NamespacedName::new("db", "gateway")
}

/// A Gateway of generation 4 with these listeners, all to be programmed, on these addresses.
fn statuses(listeners: &[&str], addresses: &[&str]) -> Statuses {
    let listener = |name: &&str| ListenerStatus {
        name: (*name).to_owned(),
        conditions: vec![
            Condition::holds(names::ACCEPTED, names::ACCEPTED, "", 4),
            Condition::holds(names::PROGRAMMED, names::PROGRAMMED, "", 4),
        ],
        ..ListenerStatus::default()
    };
    let listeners: Vec<ListenerStatus> = listeners.iter().map(listener).collect();
    let address = |text: &&str| GatewayAddressStatus { type_: "IPAddress", value: text.parse().unwrap() };
    let status = GatewayStatus {
        addresses: addresses.iter().map(address).collect(),
        conditions: gateway_conditions(GatewayVerdict::default(), &listeners, 4),
        listeners,
        attached_listener_sets: None,
    };
    Statuses { gateways: [(name(), status)].into(), ..Statuses::default() }
}

fn taken(listener: &str) -> ParentReport {
    ParentReport { failures: [(listener.to_owned(), IN_USE.to_owned())].into(), ..open() }
}

fn missing(address: &str) -> ParentReport {
    ParentReport { missing: [address.parse().unwrap()].into(), ..open() }
}

fn open() -> ParentReport {
    ParentReport { generation: 4, ..ParentReport::default() }
}

/// A node that says so of the Gateway.
fn node(name: &str, address: &str, of_gateway: ParentReport) -> Node {
    let gateways = [("db/gateway".to_owned(), of_gateway)].into();
    let report = Some(NodeReport { node: name.to_owned(), gateways, ..NodeReport::default() });
    Node { name: name.to_owned(), addresses: vec![address.parse().unwrap()], report }
}

fn silent(name: &str) -> Node {
    Node { name: name.to_owned(), ..Node::default() }
}

/// Applies the nodes and renders what becomes of the Gateway.
fn check(mut statuses: Statuses, nodes: &[Node], expected: &[&str]) {
    apply_nodes(&mut statuses, nodes);
    let status = &statuses.gateways[&name()];
    let line = |of: &str, condition: &Condition| {
        format!("{of} {}={:?}/{} {}", condition.type_, condition.status, condition.reason, condition.message)
            .trim_end()
            .to_owned()
    };
    let mut lines: Vec<String> = status.conditions.iter().map(|it| line("gateway", it)).collect();
    for listener in &status.listeners {
        lines.extend(listener.conditions.iter().map(|it| line(&listener.name, it)));
    }
    let addresses: Vec<String> = status.addresses.iter().map(|it| it.value.to_string()).collect();
    lines.push(format!("addresses {}", addresses.join(" ")).trim_end().to_owned());
    assert_eq!(lines, expected);
}

#[test]
fn a_gateway_is_programmed_where_its_ports_are_open() {
    let nodes = [node("b", "10.0.0.2", open()), node("a", "10.0.0.1", open()), silent("c")];
    check(
        statuses(&["mysql"], &[]),
        &nodes,
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=True/Programmed 2/3 nodes",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=True/Programmed",
            "addresses 10.0.0.1 10.0.0.2",
        ],
    );
}

#[test]
fn an_older_generation_does_not_count() {
    check(
        statuses(&["mysql"], &[]),
        &[node("a", "10.0.0.1", ParentReport { generation: 3, ..ParentReport::default() }), silent("b")],
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=False/Pending no listener is bound",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=False/Pending no node has opened the port yet (0/2 nodes)",
            "addresses",
        ],
    );
}

#[test]
fn a_node_without_the_address_has_not_opened_the_port() {
    let nodes = [node("a", "10.0.0.1", taken("mysql")), node("b", "10.0.0.2", missing("10.9.9.9"))];
    check(
        statuses(&["mysql"], &["10.9.9.9"]),
        &nodes,
        &[
            "gateway Accepted=False/ListenersNotValid none of the listeners is valid",
            "gateway Programmed=False/Invalid the Gateway is not accepted",
            "mysql Accepted=False/PortUnavailable not bound on a: address already in use; bound on 0/1 nodes",
            "mysql Programmed=False/Invalid not bound on a: address already in use; bound on 0/1 nodes",
            "addresses 10.9.9.9",
        ],
    );
}

#[test]
fn a_port_taken_on_every_node_makes_the_listener_unavailable() {
    check(
        statuses(&["mysql", "other"], &[]),
        &[node("a", "10.0.0.1", taken("mysql")), node("b", "10.0.0.2", taken("mysql"))],
        &[
            "gateway Accepted=True/ListenersNotValid not valid: mysql",
            "gateway Programmed=True/Programmed 2/2 nodes",
            "mysql Accepted=False/PortUnavailable not bound on a, b: address already in use; bound on 0/2 nodes",
            "mysql Programmed=False/Invalid not bound on a, b: address already in use; bound on 0/2 nodes",
            "other Accepted=True/Accepted",
            "other Programmed=True/Programmed",
            "addresses 10.0.0.1 10.0.0.2",
        ],
    );
}

#[test]
fn a_port_taken_on_some_nodes_names_them() {
    check(
        statuses(&["mysql"], &[]),
        &[node("a", "10.0.0.1", open()), node("b", "10.0.0.2", taken("mysql"))],
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=False/Pending listener mysql: not bound on b: address already in use; bound on 1/2 nodes",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=False/Pending not bound on b: address already in use; bound on 1/2 nodes",
            "addresses 10.0.0.1 10.0.0.2",
        ],
    );
}

#[test]
fn a_gateway_of_which_one_listener_is_missing_somewhere_is_not_programmed_and_says_where() {
    let mut statuses = statuses(&["mysql", "other"], &[]);
    apply_nodes(&mut statuses, &[node("a", "10.0.0.1", open()), node("b", "10.0.0.2", taken("mysql"))]);
    let programmed = &statuses.gateways[&name()].conditions[1];
    assert_eq!((programmed.status, programmed.reason), (ConditionStatus::False, "Pending"));
    assert!(programmed.message.contains("listener mysql: not bound on b"), "{}", programmed.message);
}

#[test]
fn an_address_that_one_node_has_is_as_it_should_be() {
    check(
        statuses(&["mysql"], &["10.9.9.9"]),
        &[node("a", "10.0.0.1", open()), node("b", "10.0.0.2", missing("10.9.9.9"))],
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=True/Programmed 2/2 nodes",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=True/Programmed",
            "addresses 10.9.9.9",
        ],
    );
}

#[test]
fn an_address_that_no_node_has_cannot_be_used() {
    check(
        statuses(&["mysql"], &["10.9.9.9"]),
        &[node("a", "10.0.0.1", missing("10.9.9.9")), node("b", "10.0.0.2", missing("10.9.9.9"))],
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=False/AddressNotUsable address 10.9.9.9: no node has it",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=False/Pending no node has any of the Gateway's addresses",
            "addresses",
        ],
    );
}

#[test]
fn no_more_than_sixteen_addresses_are_told_and_always_the_same() {
    let nodes: Vec<Node> =
        (1..=40).rev().map(|n| node(&format!("n{n:02}"), &format!("10.0.0.{n}"), open())).collect();
    let mut statuses = statuses(&["mysql"], &[]);
    apply_nodes(&mut statuses, &nodes);
    let addresses: Vec<String> =
        statuses.gateways[&name()].addresses.iter().map(|it| it.value.to_string()).collect();
    assert_eq!(addresses.len(), 16);
    assert_eq!((addresses[0].as_str(), addresses[15].as_str()), ("10.0.0.1", "10.0.0.16"));
}

fn bind_failure(parent: ListenerParent, address: BindAddress, address_missing: bool) -> BindFailure {
    BindFailure {
        listener: ListenerName { parent, section: "mysql".to_owned() },
        key: ListenerKey { address, port: NonZeroU16::new(3306).unwrap() },
        message: IN_USE.to_owned(),
        address_missing,
        since: Instant::now(),
    }
}

#[test]
fn a_report_survives_the_way_to_the_leader() {
    let gateway = ListenerParent::Gateway(name());
    let address = BindAddress::Ip("10.9.9.9".parse().unwrap());
    let failures =
        [bind_failure(gateway.clone(), BindAddress::Any, false), bind_failure(gateway, address, true)];
    let report = NodeReport::new("a", &statuses(&["mysql"], &[]), &failures);
    let expected = ParentReport { missing: missing("10.9.9.9").missing, ..taken("mysql") };
    assert_eq!(report.gateways["db/gateway"], expected);
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<NodeReport>(&text).unwrap(), report);
    // What a later version may say besides is no reason not to hear the rest.
    let more = text.replacen('{', r#"{"more":1,"#, 1);
    assert_eq!(serde_json::from_str::<NodeReport>(&more).unwrap(), report);
}

#[test]
fn a_listener_set_is_programmed_where_its_own_ports_are_open() {
    let set = NamespacedName::new("team", "set");
    let mut statuses = statuses(&["mysql"], &[]);
    let gateway = &statuses.gateways[&name()];
    let status = ListenerSetStatus {
        gateway: name(),
        conditions: listener_set_conditions(&SetVerdict::Taken, &gateway.listeners, 4),
        listeners: gateway.listeners.clone(),
    };
    statuses.listener_sets.insert(set.clone(), status);
    let failures = [bind_failure(ListenerParent::ListenerSet(set.clone()), BindAddress::Any, false)];
    let of_node = |name: &str, failures: &[BindFailure]| Node {
        name: name.to_owned(),
        addresses: Vec::new(),
        report: Some(NodeReport::new(name, &statuses, failures)),
    };
    let render = |nodes: &[Node]| {
        let mut statuses = statuses.clone();
        apply_nodes(&mut statuses, nodes);
        let programmed = |conditions: &[Condition]| {
            let programmed = conditions.iter().find(|it| it.type_ == names::PROGRAMMED).unwrap();
            format!("{:?}/{} {}", programmed.status, programmed.reason, programmed.message)
        };
        let of_set = &statuses.listener_sets[&set];
        [&statuses.gateways[&name()].conditions, &of_set.conditions, &of_set.listeners[0].conditions]
            .map(|conditions| programmed(conditions))
    };
    assert_eq!(
        render(&[of_node("a", &[]), of_node("b", &[])]),
        ["True/Programmed 2/2 nodes", "True/Programmed 2/2 nodes", "True/Programmed "]
    );
    let partly = "not bound on b: address already in use; bound on 1/2 nodes";
    assert_eq!(
        render(&[of_node("a", &[]), of_node("b", &failures)]),
        [
            "True/Programmed 2/2 nodes".to_owned(),
            format!("False/Pending listener {}: {partly}", statuses.listener_sets[&set].listeners[0].name),
            format!("False/Pending {partly}")
        ]
    );
    let taken = "not bound on b: address already in use; bound on 0/1 nodes";
    assert_eq!(
        render(&[of_node("b", &failures)]),
        [
            "True/Programmed 1/1 nodes".to_owned(),
            "False/ListenersNotValid none of the listeners is valid".to_owned(),
            format!("False/PortUnavailable {taken}")
        ]
    );
}
