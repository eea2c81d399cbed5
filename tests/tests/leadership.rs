//! Three agents on three nodes, of which one at a time tells what became of the cluster's objects.

use std::thread;
use std::time::Duration;

use forwarder_tests::apiserver::{Channel, Write, require_kubernetes};
use forwarder_tests::chart::NAMESPACE;
use forwarder_tests::cluster::{DEADLINE, Node, condition, has_condition};
use forwarder_tests::gateways::{
    class, gateway, gateway_spec, is_current, is_programmed, listener, listener_set, listeners, parent,
    route, route_spec,
};
use forwarder_tests::{Agent, Cluster, require_root, wait_until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long after the end of the one that writes another has taken over: the Lease lasts 15 seconds.
const TAKEOVER: Duration = Duration::from_secs(25);
/// How long nothing may be written where nothing happens.
const QUIET: Duration = Duration::from_mins(1);
/// The Lease of the one that writes.
const LEASE: &str = "forwarder-forwarder-dev-tcp";

/// A cluster with an agent on each of its nodes `a`, `b` and `c`.
struct Trio {
    agents: Vec<Agent>,
    nodes: [Node; 3],
    cluster: Cluster,
}

impl Trio {
    fn start() -> Self {
        let cluster = Cluster::start("v1.6.1", Channel::Standard).expect("a cluster");
        cluster.create_basics("apps").expect("a class and a namespace");
        let nodes = cluster.nodes();
        let agents = nodes.iter().map(|node| cluster.start_agent(node, &[]).expect("an agent")).collect();
        Self { agents, nodes, cluster }
    }

    fn create(&self, path: &str, spec: &Value) {
        self.cluster.create_object(path, spec).expect("an object");
    }

    fn wait(&self, path: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        self.cluster.wait_object(path, condition).expect("an object as expected")
    }

    /// Waits until of these agents exactly one leads, and the Lease is its own; says which.
    fn wait_leader(&self, among: &[usize], deadline: Duration) -> usize {
        let mut leader = None;
        wait_until(&format!("one of {among:?} leads"), deadline, || {
            let leads = |index: &&usize| {
                let metrics = self.agents[**index].metrics();
                metrics.is_ok_and(|metrics| metrics.sum("forwarder_kube_leader", &[]) == 1)
            };
            let leaders: Vec<usize> = among.iter().filter(leads).copied().collect();
            let holder = self.lease().ok().map(|lease| lease["spec"]["holderIdentity"].clone());
            leader = match leaders.as_slice() {
                [one] if holder == Some(self.nodes[*one].pod().into()) => Some(*one),
                _ => None,
            };
            leader.is_some()
        });
        leader.expect("a leader")
    }

    fn lease(&self) -> anyhow::Result<Value> {
        self.cluster.api.get(&format!("/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases/{LEASE}"))
    }

    fn signal(&self, index: usize, signal: Signal) {
        let id = i32::try_from(self.agents[index].id()).expect("a process id");
        kill_process(Pid::from_raw(id).expect("a process id"), signal).expect("a process of ours");
    }

    /// What agents have told of objects so far.
    fn published(&self) -> Vec<Write> {
        self.cluster.published().expect("an audit log")
    }
}

/// The values of a Gateway's addresses.
fn addresses(gateway: &Value) -> Vec<&str> {
    let addresses = gateway["status"]["addresses"].as_array().map_or(&[][..], Vec::as_slice);
    addresses.iter().filter_map(|address| address["value"].as_str()).collect()
}

fn others(than: usize) -> Vec<usize> {
    (0..3).filter(|index| *index != than).collect()
}

#[test]
fn another_agent_takes_over_from_one_that_hangs_or_dies_and_nothing_is_told_twice() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let mut trio = Trio::start();
    let [one, two, three] = ["one", "two", "three"].map(|name| gateway("apps", name));
    trio.create(&one, &gateway_spec(&[("a", 5000)]));
    let told = trio.wait(&one, |it| is_programmed(it, "True/Programmed 3/3 nodes") && is_current(it));
    assert_eq!(addresses(&told), ["10.0.1.1", "10.0.2.2", "10.0.3.2"]);
    trio.cluster.wait_settled().unwrap();
    let first = trio.wait_leader(&[0, 1, 2], DEADLINE);
    let before = trio.published().len();

    // It hangs, and with it what it would have to tell of the second Gateway.
    trio.signal(first, Signal::STOP);
    trio.create(&two, &gateway_spec(&[("a", 5001)]));
    let second = trio.wait_leader(&others(first), TAKEOVER);
    trio.wait(&two, |it| is_programmed(it, "True/Programmed 2/3 nodes"));
    trio.signal(first, Signal::CONT);
    trio.wait(&two, |it| is_programmed(it, "True/Programmed 3/3 nodes") && is_current(it));
    assert_eq!(trio.wait_leader(&[0, 1, 2], DEADLINE), second);

    trio.agents[second].kill().unwrap();
    trio.create(&three, &gateway_spec(&[("a", 5002)]));
    trio.wait_leader(&others(second), TAKEOVER);
    trio.wait(&three, |it| is_programmed(it, "True/Programmed 2/3 nodes"));
    trio.cluster.wait_settled().unwrap();

    // Two agents have begun to lead, and neither has repeated what was told already.
    let since = trio.published().split_off(before);
    let of = |name: &str| since.iter().filter(|it| it.name == name && it.code == 200).count();
    assert_eq!(of("one"), 0, "{since:#?}");
    // At first no port is open; then each node may report for itself.
    assert!((1..=4).contains(&of("two")), "{since:#?}");
    assert!((1..=3).contains(&of("three")), "{since:#?}");
    assert!(since.iter().all(|it| it.resource == "gateways/status"), "{since:#?}");

    // The node goes with its Pod.
    let pod = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}", trio.nodes[second].pod());
    trio.cluster.api.delete(&format!("{pod}?gracePeriodSeconds=0")).unwrap();
    for path in [&one, &two, &three] {
        let told = trio.wait(path, |it| is_programmed(it, "True/Programmed 2/2 nodes"));
        let left: Vec<String> =
            others(second).iter().map(|index| trio.nodes[*index].address.to_string()).collect();
        assert_eq!(addresses(&told), left);
    }
}

/// Objects with about every status that there is.
fn create_a_bit_of_everything(trio: &Trio) {
    trio.cluster.api.create_namespace("other").expect("a namespace");
    let endpoint = trio.cluster.topology.backend1_address(9000);
    trio.cluster.create_backend("apps", "db", &[endpoint]).expect("a backend");
    let parameters = json!({ "group": "example.com", "kind": "Parameters", "name": "none" });
    let refused = json!({ "controllerName": "forwarder.dev/tcp", "parametersRef": parameters });
    trio.create(&class("refused"), &refused);
    let mut spec = gateway_spec(&[("good", 5000), ("taken", 5001), ("web", 80)]);
    spec["listeners"][2]["protocol"] = "HTTP".into();
    spec["allowedListeners"] = json!({ "namespaces": { "from": "Same" } });
    trio.create(&gateway("apps", "main"), &spec);
    for (name, address) in [("here", "10.0.1.1"), ("nowhere", "10.9.9.9")] {
        let mut spec = gateway_spec(&[("a", 5100)]);
        spec["addresses"] = json!([{ "type": "IPAddress", "value": address }]);
        trio.create(&gateway("apps", name), &spec);
    }
    for (namespace, port) in [("apps", 5200), ("other", 5201)] {
        let parent = json!({ "name": "main", "namespace": "apps" });
        let spec = json!({ "parentRef": parent, "listeners": listeners(&[("s", port)]) });
        trio.create(&listener_set(namespace, "set"), &spec);
    }
    for (name, section, service) in [
        ("first", "good", "db"),
        ("second", "good", "db"),
        ("broken", "taken", "none"),
        ("lost", "none", "db"),
    ] {
        let parents = json!([{ "name": "main", "sectionName": section }]);
        trio.create(&route("apps", name), &route_spec(&parents, service));
    }
}

/// Checks that each of them has been evaluated as it should.
fn check_a_bit_of_everything(trio: &Trio) {
    let told = trio.wait(&gateway("apps", "main"), |it| {
        has_condition(&listener(it, "taken")["conditions"], "Programmed", "False/Pending not bound on b: ")
            && listener(it, "good")["attachedRoutes"] == 2
            && it["status"]["attachedListenerSets"] == 1
            && is_current(it)
    });
    assert!(has_condition(&told["status"]["conditions"], "Accepted", "True/ListenersNotValid"), "{told:#}");
    trio.wait(&gateway("apps", "here"), |it| is_programmed(it, "True/Programmed"));
    trio.wait(&gateway("apps", "nowhere"), |it| is_programmed(it, "False/AddressNotUsable"));
    trio.wait(&listener_set("apps", "set"), |it| is_programmed(it, "True/Programmed 3/3 nodes"));
    trio.wait(&listener_set("other", "set"), |it| is_programmed(it, "False/NotAllowed"));
    for (name, type_, start) in [
        ("first", "Accepted", "True/Accepted serves good"),
        ("second", "Accepted", "True/Accepted superseded on good by apps/first"),
        ("broken", "ResolvedRefs", "False/BackendNotFound"),
        ("lost", "Accepted", "False/NoMatchingParent"),
    ] {
        trio.wait(&route("apps", name), |it| {
            has_condition(&parent(it, "forwarder.dev/tcp")["conditions"], type_, start)
        });
    }
    let is_refused =
        |it: &Value| has_condition(&it["status"]["conditions"], "Accepted", "False/InvalidParameters");
    trio.wait(&class("refused"), is_refused);
}

#[test]
fn where_nothing_happens_nothing_is_written_but_the_leaders_lease() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let trio = Trio::start();
    let taken = trio.nodes[1].netns.bind("0.0.0.0:5001".parse().unwrap()).unwrap();
    create_a_bit_of_everything(&trio);
    check_a_bit_of_everything(&trio);
    trio.cluster.wait_settled().unwrap();
    let leader = trio.wait_leader(&[0, 1, 2], DEADLINE);
    let before = trio.cluster.agent_writes().unwrap().len();
    thread::sleep(QUIET);
    let since = trio.cluster.agent_writes().unwrap().split_off(before);
    let is_renewal = |it: &Write| it.resource == "leases" && it.name == LEASE && it.code == 200;
    assert!(since.iter().all(is_renewal), "{since:#?}");
    // One for each 10 seconds: it lasts 15 and is renewed 5 before its end.
    assert!((3..=8).contains(&since.len()), "{since:#?}");
    assert_eq!(trio.wait_leader(&[0, 1, 2], DEADLINE), leader);
    drop(taken);
}

/// Waits until a condition of listener `x` begins like this; yields the Gateway.
fn wait_listener(trio: &Trio, gateway: &str, type_: &str, start: &str) -> Value {
    trio.wait(gateway, |it| has_condition(&listener(it, "x")["conditions"], type_, start))
}

#[test]
fn a_port_that_some_or_all_nodes_cannot_open_is_told_with_their_names() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let trio = Trio::start();
    let bind = |node: &Node, port: u16| node.netns.bind(([0, 0, 0, 0], port).into()).unwrap();
    let on_one = [5000, 5001].map(|port| bind(&trio.nodes[1], port));
    let on_all = trio.nodes.each_ref().map(|node| bind(node, 5002));
    let [partly, alone, nowhere] = ["partly", "alone", "nowhere"].map(|name| gateway("apps", name));
    trio.create(&partly, &gateway_spec(&[("x", 5000), ("y", 5003)]));
    trio.create(&alone, &gateway_spec(&[("x", 5001)]));
    trio.create(&nowhere, &gateway_spec(&[("x", 5002)]));

    for path in [&partly, &alone] {
        let told = wait_listener(&trio, path, "Programmed", "False/Pending not bound on b: ");
        let programmed = condition(&listener(&told, "x")["conditions"], "Programmed").unwrap();
        assert!(programmed.ends_with("; bound on 2/3 nodes"), "{programmed}");
        assert!(has_condition(&listener(&told, "x")["conditions"], "Accepted", "True/Accepted"));
        let of_gateway = condition(&told["status"]["conditions"], "Programmed").unwrap();
        assert!(of_gateway.starts_with("False/Pending listener x: not bound on b: "), "{of_gateway}");
    }
    let told = wait_listener(&trio, &nowhere, "Accepted", "False/PortUnavailable not bound on a, b, c: ");
    assert!(has_condition(&told["status"]["conditions"], "Accepted", "False/ListenersNotValid"), "{told:#}");
    assert!(is_programmed(&told, "False/Invalid"), "{told:#}");
    wait_until("an event tells of the port", DEADLINE, || has_event(&trio, "nowhere", "PortUnavailable"));

    drop((on_one, on_all));
    for path in [&partly, &alone, &nowhere] {
        trio.wait(path, |it| is_programmed(it, "True/Programmed 3/3 nodes"));
        wait_listener(&trio, path, "Programmed", "True/Programmed");
    }
    an_address_is_usable_where_one_node_has_it(&trio);
}

/// Whether there is a warning of this reason about a Gateway of `apps`.
fn has_event(trio: &Trio, gateway: &str, reason: &str) -> bool {
    let events = trio.cluster.api.list("/apis/events.k8s.io/v1/namespaces/apps/events").unwrap_or_default();
    events.iter().any(|event| {
        let about = &event["regarding"];
        event["type"] == "Warning"
            && event["reason"] == reason
            && about["kind"] == "Gateway"
            && about["name"] == gateway
    })
}

fn an_address_is_usable_where_one_node_has_it(trio: &Trio) {
    for (name, address) in [("here", "10.0.2.2"), ("unknown", "10.9.9.9")] {
        let mut spec = gateway_spec(&[("x", 5100)]);
        spec["addresses"] = json!([{ "type": "IPAddress", "value": address }]);
        trio.create(&gateway("apps", name), &spec);
    }
    let told = trio.wait(&gateway("apps", "here"), |it| is_programmed(it, "True/Programmed"));
    assert_eq!(addresses(&told), ["10.0.2.2"]);
    let unknown = gateway("apps", "unknown");
    let told = trio.wait(&unknown, |it| is_programmed(it, "False/AddressNotUsable address 10.9.9.9: "));
    assert_eq!(addresses(&told), [""; 0]);
    assert!(has_condition(&told["status"]["conditions"], "Accepted", "True/Accepted"), "{told:#}");

    // A node is given the address.
    trio.nodes[2].netns.ip(&["address", "add", "10.9.9.9/32", "dev", "lo"]).expect("an address");
    let told = trio.wait(&unknown, |it| is_programmed(it, "True/Programmed"));
    assert_eq!(addresses(&told), ["10.9.9.9"]);
}

/// More nodes than a Gateway's status has room for; those that are not `a`, `b` or `c` have a Pod and nothing else.
#[test]
fn an_endpoint_at_the_listener_of_any_node_is_refused_on_all() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let trio = Trio::start();
    for number in 10..40 {
        let name = format!("other-{number}");
        let address = [10, 8, 0, number].into();
        trio.cluster.create_pod_at(&trio.nodes[0], &name, &name, address).expect("a Pod");
    }
    trio.create(&gateway("apps", "gw"), &gateway_spec(&[("a", 5000)]));
    let loops = ["10.0.3.2:5000", "10.8.0.39:5000"].map(|text| text.parse().unwrap());
    trio.cluster.create_backend("apps", "db", &loops).expect("a backend");
    trio.create(&route("apps", "db"), &route_spec(&json!([{ "name": "gw" }]), "db"));
    for agent in &trio.agents {
        wait_until("both endpoints are refused", DEADLINE, || {
            let problems = agent.state().map(|state| state["problems"].to_string()).unwrap_or_default();
            problems.contains("10.0.3.2:5000 leads back to listener apps/gw/a")
                && problems.contains("none of its 2 endpoints takes connections")
        });
    }
}
