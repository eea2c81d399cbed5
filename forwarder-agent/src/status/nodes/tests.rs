use std::num::NonZeroU16;

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
    };
    Statuses { gateways: [(name(), status)].into(), ..Statuses::default() }
}

fn failure(listener: &str, address: Option<&str>, message: &str) -> ListenerFailure {
    ListenerFailure {
        listener: listener.to_owned(),
        address: address.map(|text| text.parse().unwrap()),
        message: message.to_owned(),
        address_missing: message == "no such address",
    }
}

/// A node that has a generation of the Gateway in force, but for these failures.
fn node(name: &str, address: &str, generation: i64, failures: Vec<ListenerFailure>) -> Node {
    let gateways = [("db/gateway".to_owned(), GatewayReport { generation, failures })].into();
    let report = Some(NodeReport { node: name.to_owned(), gateways });
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
    let nodes = [node("b", "10.0.0.2", 4, vec![]), node("a", "10.0.0.1", 4, vec![]), silent("c")];
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
        &[node("a", "10.0.0.1", 3, vec![]), silent("b")],
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
fn a_port_taken_on_every_node_makes_the_listener_unavailable() {
    let taken = || vec![failure("mysql", None, IN_USE)];
    check(
        statuses(&["mysql", "other"], &[]),
        &[node("a", "10.0.0.1", 4, taken()), node("b", "10.0.0.2", 4, taken())],
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
    let taken = vec![failure("mysql", None, IN_USE)];
    check(
        statuses(&["mysql"], &[]),
        &[node("a", "10.0.0.1", 4, vec![]), node("b", "10.0.0.2", 4, taken)],
        &[
            "gateway Accepted=True/Accepted",
            "gateway Programmed=False/Pending no listener is bound",
            "mysql Accepted=True/Accepted",
            "mysql Programmed=False/Pending not bound on b: address already in use; bound on 1/2 nodes",
            "addresses 10.0.0.1 10.0.0.2",
        ],
    );
}

#[test]
fn a_gateway_of_which_one_listener_is_missing_somewhere_is_not_programmed_and_says_where() {
    let taken = vec![failure("mysql", None, IN_USE)];
    let mut statuses = statuses(&["mysql", "other"], &[]);
    apply_nodes(&mut statuses, &[node("a", "10.0.0.1", 4, vec![]), node("b", "10.0.0.2", 4, taken)]);
    let programmed = &statuses.gateways[&name()].conditions[1];
    assert_eq!((programmed.status, programmed.reason), (ConditionStatus::False, "Pending"));
    assert!(programmed.message.contains("listener mysql: not bound on b"), "{}", programmed.message);
}

#[test]
fn an_address_that_one_node_has_is_as_it_should_be() {
    let missing = vec![failure("mysql", Some("10.9.9.9"), "no such address")];
    check(
        statuses(&["mysql"], &["10.9.9.9"]),
        &[node("a", "10.0.0.1", 4, vec![]), node("b", "10.0.0.2", 4, missing)],
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
    let missing = || vec![failure("mysql", Some("10.9.9.9"), "no such address")];
    check(
        statuses(&["mysql"], &["10.9.9.9"]),
        &[node("a", "10.0.0.1", 4, missing()), node("b", "10.0.0.2", 4, missing())],
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
        (1..=40).rev().map(|n| node(&format!("n{n:02}"), &format!("10.0.0.{n}"), 4, vec![])).collect();
    let mut statuses = statuses(&["mysql"], &[]);
    apply_nodes(&mut statuses, &nodes);
    let addresses: Vec<String> =
        statuses.gateways[&name()].addresses.iter().map(|it| it.value.to_string()).collect();
    assert_eq!(addresses.len(), 16);
    assert_eq!((addresses[0].as_str(), addresses[15].as_str()), ("10.0.0.1", "10.0.0.16"));
}

#[test]
fn a_report_survives_the_way_to_the_leader() {
    let failures = [BindFailure {
        listener: ListenerName { gateway: name(), section: "mysql".to_owned() },
        key: ListenerKey { address: BindAddress::Any, port: NonZeroU16::new(3306).unwrap() },
        message: IN_USE.to_owned(),
        address_missing: false,
    }];
    let report = NodeReport::new("a", &statuses(&["mysql"], &[]), &failures);
    assert_eq!(report.gateways["db/gateway"].failures, [failure("mysql", None, IN_USE)]);
    let text = serde_json::to_string(&report).unwrap();
    assert_eq!(serde_json::from_str::<NodeReport>(&text).unwrap(), report);
    // What a later version may say besides is no reason not to hear the rest.
    let more = text.replacen('{', r#"{"more":1,"#, 1);
    assert_eq!(serde_json::from_str::<NodeReport>(&more).unwrap(), report);
}
