//! What an agent leaves to others of its node, and what it does not do to itself: ports of other processes, and endpoints that lead
//! back to it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::{Duration, Instant};

use forwarder_tests::agent::DEADLINE;
use forwarder_tests::client::{self, End};
use forwarder_tests::peer::Server;
use forwarder_tests::{Agent, AgentCommand, BackendRef, Manifests, Topology, peer, require_root, wait_until};
use serde_json::Value;

const PORT: u16 = 9001;
const LISTENER: &str = "default/gw/a";
/// How many attempts a loop made in a second, when endpoints were not looked at: thousands.
const CONNECTIONS: i64 = 2;
/// How long a port has to be free in these tests.
const PORT_WAIT: Duration = Duration::from_secs(2);

/// The problems of a reason, as sentences.
fn problems(agent: &Agent, reason: &str) -> Vec<String> {
    let state = agent.state().expect("a state");
    let all = state["problems"].as_array().into_iter().flatten();
    let of_reason = all.filter(|problem| problem["reason"] == reason);
    of_reason.map(|problem| problem["message"].as_str().unwrap_or_default().to_owned()).collect()
}

/// How often the agent has accepted a connection.
fn accepted(agent: &Agent) -> i64 {
    agent.metrics().expect("metrics").sum("forwarder_connections_total", &[])
}

/// Waits until the endpoint is told to be a loop, checks that a connection is reset, and that it stays at these.
#[track_caller]
fn check_loop(topology: &Topology, agent: &Agent, address: SocketAddr, words: &str) {
    wait_until("it is told", DEADLINE, || problems(agent, "Loop").iter().any(|it| it.contains(words)));
    let before = accepted(agent);
    let end = client::end_of_new(&topology.client, address, DEADLINE).expect("an end");
    assert_eq!(end, End::Reset, "{address}");
    assert!(accepted(agent) - before <= CONNECTIONS, "{} connections", accepted(agent) - before);
}

#[test]
fn an_endpoint_that_leads_back_to_a_listener_is_not_connected() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    let endpoint = topology.backend1_address(5000);
    let _server = Server::start(&topology.backend1, endpoint, peer::echo).expect("a server");
    for datapath in ["auto", "splice"] {
        let manifests = Manifests::new().expect("a folder");
        manifests.gateway(&[("a", PORT), ("b", PORT + 1)]).expect("a gateway");
        for name in ["a", "b"] {
            manifests.route(name, &[BackendRef { service: name, weight: 1 }]).expect("a route");
        }
        // To itself, by both families, and to the other one.
        let own = [topology.node_address(PORT), topology.node_address_v6(PORT)];
        manifests.service("a", &own).expect("a service");
        manifests.service("b", &[topology.node_address(PORT)]).expect("a service");
        let agent =
            Agent::start(&topology.node, &manifests.path(), &["--datapath", datapath]).expect("an agent");
        for address in own {
            check_loop(&topology, &agent, address, &format!("{address} leads back to listener {LISTENER}"));
        }
        check_loop(&topology, &agent, topology.node_address(PORT + 1), &format!("listener {LISTENER}"));

        manifests.service("b", &[endpoint]).expect("a service");
        agent.wait_endpoints("default/gw/b", &[endpoint]);
        let stream = client::connect(&topology.client, topology.node_address(PORT + 1)).expect("connect");
        client::ping(&stream, b"to the server").expect("an echo");
    }
}

#[test]
fn an_endpoint_becomes_a_loop_when_the_node_gets_its_address() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    let foreign = SocketAddr::from((Ipv4Addr::new(198, 51, 100, 7), PORT));
    let manifests = Manifests::forward(PORT, &[foreign]).expect("manifests");
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).expect("an agent");
    agent.wait_endpoints(LISTENER, &[foreign]);
    assert_eq!(problems(&agent, "Loop"), Vec::<String>::new());

    let address = format!("{}/32", foreign.ip());
    topology.node.ip(&["address", "add", &address, "dev", "lo"]).expect("an address");
    check_loop(&topology, &agent, topology.node_address(PORT), &foreign.to_string());
    agent.wait_endpoints(LISTENER, &[]);

    topology.node.ip(&["address", "delete", &address, "dev", "lo"]).expect("an address");
    agent.wait_endpoints(LISTENER, &[foreign]);
    assert_eq!(problems(&agent, "Loop"), Vec::<String>::new());
}

#[test]
fn the_admin_endpoint_cannot_be_reached_through_a_listener() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    for admin in [[127, 0, 0, 1], [127, 9, 9, 9]].map(|ip| SocketAddr::from((ip, 9902))) {
        let manifests = Manifests::forward(PORT, &[admin]).expect("manifests");
        // The second one is the admin endpoint only where that is open to every address.
        let open = if admin.ip() == Ipv4Addr::LOCALHOST { "127.0.0.1:9902" } else { "0.0.0.0:9902" };
        let agent =
            AgentCommand::new(&[]).admin(open).start(&topology.node, &manifests.path()).expect("an agent");
        check_loop(&topology, &agent, topology.node_address(PORT), "is the admin endpoint");
    }
}

#[test]
fn endpoints_and_listeners_keep_to_what_is_allowed() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    let (one, two) = (topology.backend1_address(5000), topology.backend2_address(5000));
    let manifests = Manifests::forward(PORT, &[one, two]).expect("manifests");
    let refused = format!("!0.0.0.0/0,{}", two.ip());
    let arguments = ["--endpoint-cidrs", &refused, "--listener-ports", "!9000-9100,9001"];
    let agent = Agent::start(&topology.node, &manifests.path(), &arguments).expect("an agent");
    agent.wait_endpoints(LISTENER, &[two]);
    let told = problems(&agent, "AddressNotAllowed");
    assert!(told.len() == 1 && told[0].contains(&one.ip().to_string()), "{told:?}");

    manifests.gateway(&[("a", PORT + 1)]).expect("a gateway");
    wait_until("it is told", DEADLINE, || {
        problems(&agent, "PortUnavailable").iter().any(|told| told.contains("!9000-9100"))
    });
    let bound: Vec<Value> = agent.listener(LISTENER).expect("a state").into_iter().collect();
    assert_eq!(bound, Vec::<Value>::new());
    topology.node.bind(topology.node_address(PORT + 1)).expect("the port is left alone");
}

/// A daemon that is restarted finds its port again, and the listener gets it when the daemon has been gone for a while.
#[test]
fn a_daemon_that_is_restarted_finds_its_port_again() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    let manifests = Manifests::forward(PORT, &[topology.backend1_address(5000)]).expect("manifests");
    let address = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let daemon = || -> TcpListener { topology.node.bind(address).expect("the daemon's port") };
    let first = daemon();
    let wait = humantime(PORT_WAIT);
    let agent = AgentCommand::new(&["--port-wait", &wait])
        .spawn(&topology.node, &manifests.path())
        .expect("an agent");
    let is_bound = || agent.listener(LISTENER).expect("a state").is_some_and(|it| it["bound"] == true);
    let is_told = || agent.log().contains("cannot listen");
    wait_until("it is told who has the port", DEADLINE, is_told);
    let holder = format!("({})", std::process::id());
    assert!(agent.log().contains(&holder), "the process is named:\n{}", agent.log());

    drop(first);
    let ended = Instant::now();
    // Shorter than the wait, longer than the agent takes to look.
    wait_until("a daemon takes its time", DEADLINE, || ended.elapsed() > PORT_WAIT * 3 / 4);
    let second = daemon();
    let restarted = Instant::now();
    wait_until("the daemon goes on", DEADLINE, || restarted.elapsed() > PORT_WAIT * 2);
    assert!(!is_bound(), "{}", agent.log());

    drop(second);
    wait_until("the listener gets the port", DEADLINE, is_bound);
}

/// As the agent reads it.
fn humantime(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}
