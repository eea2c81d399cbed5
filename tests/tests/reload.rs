//! A change of the manifests touches what changed and nothing else.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use forwarder_tests::agent::DEADLINE;
use forwarder_tests::client::{self, End};
use forwarder_tests::peer::Server;
use forwarder_tests::{Agent, AgentCommand, BackendRef, Manifests, Topology, peer, require_root, wait_until};

const ONE: &str = "default/gw/a";
const TWO: &str = "default/gw/b";

/// Pair listeners, 9001 to a server called `one` and 9002 to one called `two`.
struct Pair {
    agent: Agent,
    one: Server,
    two: Server,
    manifests: Manifests,
    topology: Topology,
}

impl Pair {
    fn start() -> Self {
        let topology = Topology::new().expect("a network");
        let (first, second) = (topology.backend1_address(5000), topology.backend2_address(5000));
        let one = Server::start(&topology.backend1, first, peer::identify("one")).expect("a server");
        let two = Server::start(&topology.backend2, second, peer::identify("two")).expect("a server");
        let manifests = Manifests::new().expect("a folder");
        manifests.gateway(&[("a", 9001), ("b", 9002)]).expect("a gateway");
        for (name, server) in [("a", &one), ("b", &two)] {
            manifests.service(name, &[server.address()]).expect("a service");
            manifests.route(name, &[BackendRef { service: name, weight: 1 }]).expect("a route");
        }
        let agent = Agent::start(&topology.node, &manifests.path(), &[]).expect("an agent");
        Self { agent, one, two, manifests, topology }
    }

    fn address(&self, port: u16) -> SocketAddr {
        self.topology.node_address(port)
    }

    /// Opens a connection and checks who answers.
    fn session(&self, port: u16, name: &str) -> TcpStream {
        let stream = client::connect(&self.topology.client, self.address(port)).expect("connect");
        assert_eq!(client::read_line(&stream).expect("a name"), name, "port {port}");
        stream
    }

    /// Waits until new connections to `port` are answered by `name`.
    #[track_caller]
    fn wait_identity(&self, port: u16, name: &str) {
        wait_until(&format!("{name} answers on {port}"), DEADLINE, || {
            client::identity(&self.topology.client, self.address(port)).is_ok_and(|found| found == name)
        });
    }

    /// The identity of the sockets that listen on the two ports.
    fn inodes(&self) -> [Vec<u64>; 2] {
        [9001, 9002].map(|port| self.topology.node.listening_inodes(port))
    }
}

#[test]
fn added_and_removed_listeners_leave_the_others_and_their_connections_alone() {
    if !require_root() {
        return;
    }
    let pair = Pair::start();
    let before = pair.inodes();
    assert!(before.iter().all(|inodes| !inodes.is_empty()), "{before:?}");
    let stop = AtomicBool::new(false);
    let (pings, failures) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        // Sessions that last through every change, and new connections all the while.
        for (port, name) in [(9001, "one"), (9002, "two")] {
            let (pair, stop, pings, failures) = (&pair, &stop, &pings, &failures);
            let session = pair.session(port, name);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let lasting = client::ping(&session, b"still here");
                    let fresh = client::identity(&pair.topology.client, pair.address(port));
                    let well = lasting.is_ok() && fresh.as_ref().is_ok_and(|found| found == name);
                    if !well {
                        eprintln!("port {port}: session {lasting:?}, new connection {fresh:?}");
                    }
                    (if well { pings } else { failures }).fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for _ in 0..5 {
            pair.manifests.gateway(&[("a", 9001), ("b", 9002), ("c", 9003)]).unwrap();
            pair.manifests.route("c", &[BackendRef { service: "a", weight: 1 }]).unwrap();
            pair.wait_identity(9003, "one");
            pair.manifests.gateway(&[("a", 9001), ("b", 9002)]).unwrap();
            pair.manifests.remove("route-c").unwrap();
            wait_until("port 9003 is closed", DEADLINE, || {
                let result = client::connect(&pair.topology.client, pair.address(9003));
                result.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(pair.inodes(), before, "an unchanged listener was bound again");
    assert_eq!(failures.into_inner(), 0);
    println!("{} rounds of pings during the changes", pings.into_inner());
}

#[test]
fn a_removed_endpoint_keeps_its_connections_and_gets_no_new_ones() {
    if !require_root() {
        return;
    }
    let pair = Pair::start();
    let both = [pair.one.address(), pair.two.address()];
    pair.manifests.service("a", &both).unwrap();
    pair.agent.wait_endpoints(ONE, &both);
    pair.wait_identity(9001, "two");
    pair.wait_identity(9001, "one");
    let sessions: Vec<TcpStream> = (0..10)
        .map(|_| {
            let stream = client::connect(&pair.topology.client, pair.address(9001)).unwrap();
            client::read_line(&stream).unwrap();
            stream
        })
        .collect();
    pair.manifests.service("a", &both[1..]).unwrap();
    pair.agent.wait_endpoints(ONE, &both[1..]);
    let before = pair.one.accepted();
    for _ in 0..50 {
        assert_eq!(client::identity(&pair.topology.client, pair.address(9001)).unwrap(), "two");
    }
    assert_eq!(pair.one.accepted(), before);
    for session in &sessions {
        client::ping(session, b"still here").unwrap();
    }
}

/// 300 listeners and 3,000 EndpointSlices, each in a file of its own.
#[test]
fn one_endpoint_among_many_is_changed_alone() {
    const LISTENERS: u16 = 300;
    const SLICES: u16 = 10;
    const FIRST_PORT: u16 = 10_000;
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let (first, second) = (topology.backend1_address(5000), topology.backend2_address(5000));
    let _one = Server::start(&topology.backend1, first, peer::identify("one")).unwrap();
    let _two = Server::start(&topology.backend2, second, peer::identify("two")).unwrap();
    let manifests = Manifests::new().unwrap();
    let names: Vec<String> = (0..LISTENERS).map(|index| format!("l{index}")).collect();
    let ports = FIRST_PORT..FIRST_PORT + LISTENERS;
    for (gateway, part) in names.iter().zip(ports.clone()).collect::<Vec<_>>().chunks(50).enumerate() {
        let gateway = format!("gw{gateway}");
        let listeners: Vec<_> = part.iter().map(|(name, port)| (name.as_str(), *port)).collect();
        manifests.gateway_on(&gateway, None, &listeners).unwrap();
        for (name, _) in part {
            manifests.route_to(&gateway, name, &[BackendRef { service: name, weight: 1 }]).unwrap();
            manifests.service(name, &[]).unwrap();
            (0..SLICES).for_each(|slice| manifests.slice(name, slice, &[first]).unwrap());
        }
    }
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let (changed, other) = ("default/gw0/l7", "default/gw5/l299");
    let [changed_port, other_port] = [FIRST_PORT + 7, FIRST_PORT + 299];
    let session = |port| {
        let stream = client::connect(&topology.client, topology.node_address(port)).unwrap();
        assert_eq!(client::read_line(&stream).unwrap(), "one");
        stream
    };
    let sessions = [session(changed_port), session(other_port)];
    let inodes = || {
        let mut all = topology.node.all_listening_inodes();
        all.retain(|port, _| ports.contains(port));
        assert_eq!(all.len(), ports.len());
        all
    };
    let updates = |kind| {
        let metrics = agent.metrics().unwrap();
        metrics.sum("forwarder_configuration_updates_total", &[("kind", kind)])
    };
    let (sockets, full, endpoints) = (inodes(), updates("full"), updates("endpoints"));
    assert!(full > 0);

    manifests.slice("l7", 3, &[second]).unwrap();
    agent.wait_endpoints(changed, &[first, second]);
    assert_eq!((updates("full"), updates("endpoints")), (full, endpoints + 1));
    wait_until("the new endpoint is used", DEADLINE, || {
        client::identity(&topology.client, topology.node_address(changed_port)).unwrap() == "two"
    });
    assert_eq!(agent.endpoints(other), [first]);
    assert_eq!(client::identity(&topology.client, topology.node_address(other_port)).unwrap(), "one");
    for session in &sessions {
        client::ping(session, b"still here").unwrap();
    }
    assert_eq!(inodes(), sockets, "a listener was bound again");

    // Another object takes the long way, and the short one is open again after it.
    manifests.service("unused", &[]).unwrap();
    wait_until("everything was resolved", DEADLINE, || updates("full") == full + 1);
    (0..SLICES).for_each(|slice| manifests.slice("l7", slice, &[second]).unwrap());
    agent.wait_endpoints(changed, &[second]);
    assert_eq!(updates("full"), full + 1);
    assert_eq!(agent.endpoints(other), [first]);
    assert_eq!(inodes(), sockets, "a listener was bound again");
}

#[test]
fn a_routes_new_backend_affects_new_connections_of_its_listener_only() {
    if !require_root() {
        return;
    }
    let pair = Pair::start();
    let (first, second) = (pair.session(9001, "one"), pair.session(9002, "two"));
    let before = pair.inodes();
    pair.manifests.route("a", &[BackendRef { service: "b", weight: 1 }]).unwrap();
    pair.wait_identity(9001, "two");
    client::ping(&first, b"still here").unwrap();
    client::ping(&second, b"still here").unwrap();
    assert_eq!(client::identity(&pair.topology.client, pair.address(9002)).unwrap(), "two");
    assert_eq!(pair.inodes(), before);

    // Without its route the listener stays, and rejects.
    pair.manifests.remove("route-a").unwrap();
    wait_until("new connections are reset", DEADLINE, || {
        client::end_of_new(&pair.topology.client, pair.address(9001), peer::QUIET)
            .is_ok_and(|end| end == End::Reset)
    });
    client::ping(&first, b"still here").unwrap();
    assert_eq!(pair.inodes(), before);
}

#[test]
fn an_invalid_document_keeps_the_last_good_state() {
    if !require_root() {
        return;
    }
    let pair = Pair::start();
    let before = pair.inodes();
    let session = pair.session(9001, "one");
    let problems = || pair.agent.state().unwrap()["problems"].as_array().map_or(0, Vec::len);
    assert_eq!(problems(), 0, "{}", pair.agent.state().unwrap());
    for broken in ["kind: TCPRoute\nspec: [unclosed", "\u{0}", "- just\n- a list\n"] {
        pair.manifests.write("route-a", broken).unwrap();
        wait_until("the problem is reported", DEADLINE, || problems() > 0);
        assert_eq!(client::identity(&pair.topology.client, pair.address(9001)).unwrap(), "one");
        assert_eq!(client::identity(&pair.topology.client, pair.address(9002)).unwrap(), "two");
        client::ping(&session, b"still here").unwrap();
        assert_eq!(pair.inodes(), before);
        pair.manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).unwrap();
        wait_until("the problem is gone", DEADLINE, || problems() == 0);
    }
}

#[test]
fn a_removed_listener_closes_its_port_and_its_connections_may_finish() {
    if !require_root() {
        return;
    }
    let pair = Pair::start();
    let (first, second) = (pair.session(9001, "one"), pair.session(9002, "two"));
    pair.manifests.gateway(&[("a", 9001)]).unwrap();
    wait_until("port 9002 is closed", DEADLINE, || pair.topology.node.listening_inodes(9002).is_empty());
    let error = client::connect(&pair.topology.client, pair.address(9002)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    assert!(pair.agent.listener(TWO).unwrap().is_none_or(|listener| listener["bound"] != true));
    client::ping(&first, b"still here").unwrap();
    client::ping(&second, b"still here").unwrap();

    pair.manifests.gateway(&[("a", 9001), ("b", 9002)]).unwrap();
    pair.wait_identity(9002, "two");
}

#[test]
fn a_port_in_use_is_reported_and_taken_once_it_is_free() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(5000);
    let server = Server::start(&topology.backend1, endpoint, peer::identify("one")).unwrap();
    let manifests = Manifests::new().unwrap();
    manifests.gateway(&[("a", 9001), ("b", 9002)]).unwrap();
    manifests.service("a", &[endpoint]).unwrap();
    manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).unwrap();
    manifests.route("b", &[BackendRef { service: "a", weight: 1 }]).unwrap();
    let squatter = topology.node.bind(SocketAddr::from(([0, 0, 0, 0], 9002))).unwrap();

    let command = AgentCommand::new(&["--port-wait", "0"]);
    let agent = command.spawn(&topology.node, &manifests.path()).unwrap();
    agent.wait_bound(ONE);
    wait_until("the state tells of the port in use", DEADLINE, || {
        let listener = agent.listener(TWO).unwrap().unwrap_or_default();
        let error = listener["error"].as_str().unwrap_or_default().to_lowercase();
        listener["bound"] == false && (error.contains("eaddrinuse") || error.contains("in use"))
    });
    let ready = agent.ready().unwrap();
    assert_eq!(ready.status, 503, "{}", ready.body);
    assert!(ready.body.contains("9002"), "the reason names the port: {}", ready.body);
    assert_eq!(client::identity(&topology.client, topology.node_address(9001)).unwrap(), "one");

    drop(squatter);
    wait_until("the listener is bound once the port is free", Duration::from_secs(20), || {
        agent.ready().is_ok_and(|ready| ready.status == 200)
    });
    assert_eq!(client::identity(&topology.client, topology.node_address(9002)).unwrap(), "one");
    assert!(agent.listener(TWO).unwrap().unwrap()["error"].is_null());
    drop(server);
}

#[test]
fn a_crashed_agent_is_followed_by_one_that_serves() {
    if !require_root() {
        return;
    }
    let mut pair = Pair::start();
    let session = pair.session(9001, "one");
    pair.agent.kill().unwrap();
    assert_ne!(client::end(&session, DEADLINE).unwrap(), End::Open);
    // The new one starts at once, while connections of the old one may still be in TIME_WAIT.
    pair.agent = Agent::start(&pair.topology.node, &pair.manifests.path(), &[]).unwrap();
    pair.session(9001, "one");
    pair.session(9002, "two");
}

#[test]
fn a_typo_is_no_outage_at_the_next_restart() {
    if !require_root() {
        return;
    }
    let mut pair = Pair::start();
    let state = pair.manifests.beside("state");
    let kept = state.join("last-good.yaml");
    let command = AgentCommand::new(&["--state-dir", state.to_str().expect("a text")]);
    let holds = |port: &str| std::fs::read_to_string(&kept).is_ok_and(|text| text.contains(port));
    pair.agent.kill().unwrap();
    pair.agent = command.start(&pair.topology.node, &pair.manifests.path()).unwrap();
    wait_until("the state is kept", DEADLINE, || holds("9002"));

    // What is written is what was in force, not what is refused.
    let typo = "apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: b}
spec: {parentRefs: [{name: gw, sectionname: b}]}
";
    pair.manifests.write("route-b", typo).unwrap();
    pair.manifests.write("gateway-gw", "kind: [\n").unwrap();
    wait_until("the typo is told", DEADLINE, || pair.agent.log().contains("the document is not YAML"));
    pair.agent.kill().unwrap();
    pair.agent = command.start(&pair.topology.node, &pair.manifests.path()).unwrap();
    pair.session(9001, "one");
    pair.session(9002, "two");
    let log = pair.agent.log();
    assert!(log.contains("an object with an error is served in its last good version"), "{log}");
    assert!(log.contains("the version before stays in force"), "{log}");

    // The folder is gone, as before its volume is mounted.
    pair.agent.kill().unwrap();
    let elsewhere = pair.manifests.beside("elsewhere");
    std::fs::rename(pair.manifests.path(), &elsewhere).unwrap();
    pair.agent = command.start(&pair.topology.node, &pair.manifests.path()).unwrap();
    pair.session(9001, "one");
    std::fs::create_dir(pair.manifests.path()).unwrap();
    wait_until("the empty folder is told", DEADLINE, || {
        pair.agent.log().contains("to remove everything, leave")
    });
    pair.session(9002, "two");

    // It is not for other manifests.
    pair.agent.kill().unwrap();
    pair.agent = command.spawn(&pair.topology.node, &elsewhere.join("class.yaml")).unwrap();
    wait_until("the state is refused", DEADLINE, || {
        pair.agent.log().contains("is the state of other manifests")
    });
    wait_until("it is replaced", DEADLINE, || kept.exists() && !holds("9002"));
}
