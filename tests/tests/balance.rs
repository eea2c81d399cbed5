//! Which endpoint a new connection gets, and when it gets none.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use forwarder_tests::client::{self, End};
use forwarder_tests::fixture::LISTENER_PORT;
use forwarder_tests::peer::Server;
use forwarder_tests::{Agent, BackendRef, Manifests, Topology, peer, require_root};

const WAIT: Duration = Duration::from_secs(10);
/// So many that five points are nearly five standard deviations.
const CONNECTIONS: usize = 2000;
const THREADS: usize = 4;

/// Opens connections and counts the names of those who answer. A connection that is reset counts as `reset`.
fn tally(topology: &Topology, address: SocketAddr, connections: usize) -> BTreeMap<String, usize> {
    let connect = || {
        let attempt = |_| client::identity(&topology.client, address).unwrap_or_else(|_| "reset".to_owned());
        (0..connections / THREADS).map(attempt).collect::<Vec<String>>()
    };
    let names: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(connect)).collect();
        threads.into_iter().flat_map(|thread| thread.join().expect("a client does not panic")).collect()
    });
    let mut tally = BTreeMap::new();
    for name in names {
        *tally.entry(name).or_default() += 1;
    }
    println!("{tally:?}");
    tally
}

/// Asserts that `name` has `percent` of all, within five points.
fn assert_share(tally: &BTreeMap<String, usize>, name: &str, percent: usize) {
    let total: usize = tally.values().sum();
    let count = tally.get(name).copied().unwrap_or_default();
    let (least, most) = (percent.saturating_sub(5) * total / 100, (percent + 5) * total / 100);
    assert!(
        (least..=most).contains(&count),
        "{name} has {count} of {total} instead of {percent} %: {tally:?}"
    );
}

#[test]
fn weights_decide_the_shares_and_weight_zero_gets_none() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let address = topology.node_address(LISTENER_PORT);
    let servers = [
        Server::start(&topology.backend1, topology.backend1_address(5000), peer::identify("seventy"))
            .unwrap(),
        Server::start(&topology.backend2, topology.backend2_address(5000), peer::identify("thirty")).unwrap(),
        Server::start(&topology.backend2, topology.backend2_address(5001), peer::identify("zero")).unwrap(),
    ];
    let manifests = Manifests::forward(LISTENER_PORT, &[]).unwrap();
    for (name, server) in ["seventy", "thirty", "zero"].into_iter().zip(&servers) {
        manifests.service(name, &[server.address()]).unwrap();
    }
    manifests
        .route(
            "a",
            &[
                BackendRef { service: "seventy", weight: 70 },
                BackendRef { service: "thirty", weight: 30 },
                BackendRef { service: "zero", weight: 0 },
            ],
        )
        .unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let tally = tally(&topology, address, CONNECTIONS);
    assert_share(&tally, "seventy", 70);
    assert_share(&tally, "thirty", 30);
    assert_eq!(servers[2].accepted(), 0);
    assert_eq!(tally.values().sum::<usize>(), tally["seventy"] + tally["thirty"], "none is reset");
    drop(agent);
}

#[test]
fn the_share_of_an_invalid_backend_is_reset() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(5000);
    let server = Server::start(&topology.backend1, endpoint, peer::identify("valid")).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let backends = [BackendRef { service: "missing", weight: 80 }, BackendRef { service: "a", weight: 20 }];
    manifests.route("a", &backends).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let tally = tally(&topology, topology.node_address(LISTENER_PORT), CONNECTIONS);
    assert_share(&tally, "reset", 80);
    assert_share(&tally, "valid", 20);
    drop((agent, server));
}

#[test]
fn the_share_of_a_service_without_endpoints_is_reset() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(5000);
    let server = Server::start(&topology.backend1, endpoint, peer::identify("full")).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    manifests.service("empty", &[]).unwrap();
    let backends = [BackendRef { service: "empty", weight: 1 }, BackendRef { service: "a", weight: 1 }];
    manifests.route("a", &backends).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let tally = tally(&topology, topology.node_address(LISTENER_PORT), CONNECTIONS);
    assert_share(&tally, "reset", 50);
    assert_share(&tally, "full", 50);
    drop((agent, server));
}

#[test]
fn endpoints_of_a_service_take_turns() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let servers = [
        Server::start(&topology.backend1, topology.backend1_address(5000), peer::identify("a")).unwrap(),
        Server::start(&topology.backend1, topology.backend1_address(5001), peer::identify("b")).unwrap(),
        Server::start(&topology.backend2, topology.backend2_address(5000), peer::identify("c")).unwrap(),
        Server::start(&topology.backend2, topology.backend2_address(5001), peer::identify("d")).unwrap(),
    ];
    let endpoints: Vec<SocketAddr> = servers.iter().map(Server::address).collect();
    let manifests = Manifests::forward(LISTENER_PORT, &endpoints).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    tally(&topology, topology.node_address(LISTENER_PORT), 400);
    let accepted = peer::accepted(&servers);
    assert!(accepted.iter().all(|count| (90..=110).contains(count)), "{accepted:?}");
    drop(agent);
}

#[test]
fn a_dead_endpoint_is_passed_over_before_the_client_notices() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let (dead, live) = (topology.backend1_address(5000), topology.backend2_address(5000));
    let server = Server::start(&topology.backend2, live, peer::identify("live")).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[dead, live]).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let tally = tally(&topology, topology.node_address(LISTENER_PORT), 200);
    assert_eq!(tally.get("live"), Some(&200), "{tally:?}");
    drop((agent, server));
}

#[test]
fn connections_that_lead_nowhere_are_reset() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let manifests = Manifests::new().unwrap();
    manifests.gateway(&[("without-route", 9001), ("all-zero", 9002), ("no-endpoints", 9003)]).unwrap();
    manifests.service("full", &[topology.backend1_address(5000)]).unwrap();
    manifests.service("empty", &[]).unwrap();
    manifests.route("all-zero", &[BackendRef { service: "full", weight: 0 }]).unwrap();
    manifests.route("no-endpoints", &[BackendRef { service: "empty", weight: 1 }]).unwrap();
    let server =
        Server::start(&topology.backend1, topology.backend1_address(5000), peer::identify("full")).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    for port in [9001, 9002, 9003] {
        // Reset by a listener: a refusal would mean that nothing listens.
        assert!(!topology.node.listening_inodes(port).is_empty(), "port {port}");
        let end = client::end_of_new(&topology.client, topology.node_address(port), WAIT).unwrap();
        assert_eq!(end, End::Reset, "port {port}");
    }
    assert_eq!(server.accepted(), 0);
    drop(agent);
}
