//! Direct connections whose endpoint refuses, or does not answer: another one serves the client. One that still has an earlier connection is asked again.

use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::direct::{DIRECT, listed, wait_direct, wait_empty};
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER, LISTENER_PORT};
use forwarder_tests::kernel::is_ready;
use forwarder_tests::netns::FAR;
use forwarder_tests::peer::{self, Server};
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{Agent, AgentCommand, BackendRef, Manifests, NetNs, Topology, wait_until};

const WAIT: Duration = Duration::from_secs(10);
/// The Ethernet address of nobody.
const NOBODY: &str = "02:00:00:00:00:99";
/// Where nobody listens.
const CLOSED_PORT: u16 = 9;
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A direct listener with several endpoints. There is a server at the last of them only.
struct World {
    agent: Agent,
    listener: SocketAddr,
    endpoints: Vec<SocketAddr>,
    topology: Topology,
    server: Option<Server>,
    manifests: Manifests,
}

/// Starts an agent with so many endpoints that refuse.
fn start(family: Family, refusing: u16) -> World {
    start_with(family, refusing, &[])
}

/// The same, with more arguments.
fn start_with(family: Family, refusing: u16, arguments: &[&str]) -> World {
    let topology = Topology::new().expect("a network");
    let (listener, [first, last]) = match family {
        Family::V4 => (
            topology.node_address(LISTENER_PORT),
            [topology.backend1_address(ENDPOINT_PORT), topology.backend2_address(ENDPOINT_PORT)],
        ),
        Family::V6 => (
            topology.node_address_v6(LISTENER_PORT),
            [topology.backend1_address_v6(ENDPOINT_PORT), topology.backend2_address_v6(ENDPOINT_PORT)],
        ),
    };
    let refusing = (0..refusing).map(|number| SocketAddr::new(first.ip(), ENDPOINT_PORT + number));
    let endpoints: Vec<_> = refusing.chain([last]).collect();
    for host in [&topology.client, &topology.backend1, &topology.backend2] {
        for option in ["tcp_timestamps", "tcp_sack", "tcp_window_scaling"] {
            host.sysctl(&format!("ipv4/{option}"), "1").expect("a setting");
        }
    }
    // A new link takes its time before a neighbour is found there (RFC 4862, 5.4): the first SYN would wait for it.
    let closed = |address: SocketAddr| SocketAddr::new(address.ip(), CLOSED_PORT);
    for (host, address) in [(&topology.node, first), (&topology.node, last), (&topology.client, listener)] {
        wait_until("the neighbour is there", WAIT, || is_refused(host, closed(address)));
    }
    let server = Server::start(&topology.backend2, last, peer::echo).expect("a server");
    let manifests = Manifests::forward(LISTENER_PORT, &endpoints).expect("manifests");
    let arguments = [&DIRECT[..], arguments].concat();
    let agent = AgentCommand::new(&arguments).start(&topology.node, &manifests.path()).expect("an agent");
    wait_direct(&agent);
    World { agent, listener, endpoints, topology, server: Some(server), manifests }
}

/// Whether who connects from a host is told that nobody listens.
fn is_refused(host: &NetNs, address: SocketAddr) -> bool {
    host.connect(address).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl World {
    fn connect(&self) -> io::Result<TcpStream> {
        client::connect(&self.topology.client, self.listener)
    }

    /// Connects that many clients at once, each of which talks.
    fn connect_all(&self, count: u32) -> Vec<TcpStream> {
        let begin = Instant::now();
        thread::scope(|scope| {
            let one = |_| {
                scope.spawn(|| {
                    let stream = self.connect().expect("a connection");
                    let connected = begin.elapsed();
                    client::ping(&stream, &[7; 10_000]).expect("an echo");
                    (connected, stream)
                })
            };
            let clients: Vec<_> = (0..count).map(one).collect();
            let streams = clients.into_iter().map(|one| one.join().expect("a client"));
            let (times, streams): (Vec<_>, Vec<_>) = streams.unzip();
            println!("the last of {count} clients was connected after {:?}", times.iter().max());
            streams
        })
    }

    /// Waits until every attempt is counted, and only what is served is listed.
    fn check(&self, served: u32, reason: &str, failures: i64) {
        wait_until("each attempt is counted", WAIT, || self.agent.connect_failures(reason) == failures);
        wait_until("what is served is listed", WAIT, || {
            listed(&self.agent, "direct").len() == served as usize
        });
        let served = i64::from(served);
        for (name, value) in [
            ("forwarder_connections_total", served),
            ("forwarder_connections_active", served),
            ("forwarder_backend_connections_active", served),
            ("forwarder_backend_connections_total", served),
            ("forwarder_backend_connect_failures_total", failures),
        ] {
            wait_until(&format!("{name} is {value}"), WAIT, || {
                self.agent.metrics().expect("metrics").sum(name, &[]) == value
            });
        }
    }
}

#[test]
fn who_is_refused_is_served_by_another_endpoint_at_once() {
    const CLIENTS: u32 = 40;
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let world = start(family, 1);
        let streams = world.connect_all(CLIENTS);
        // Every second one has asked the first endpoint first, but that two CPUs may count a turn as one.
        let retried = world.agent.verdicts("direct_retried");
        assert!((i64::from(CLIENTS / 4)..=i64::from(CLIENTS * 3 / 4)).contains(&retried), "{retried}");
        world.check(CLIENTS, "refused", retried);
        // What the client's SYN said is what both ends go by.
        for host in [&world.topology.client, &world.topology.backend2] {
            let sockets = host.stdout(Command::new("ss").args(["-tinH", "state", "established"])).unwrap();
            let with = |option: &str| u32::try_from(sockets.matches(option).count()).unwrap();
            // 12 bytes less than without timestamps.
            let size = if family == Family::V4 { " mss:1448 " } else { " mss:1428 " };
            assert_eq!([with(size), with(" wscale:")], [CLIENTS; 2], "{sockets}");
        }
        for stream in &streams {
            client::ping(stream, &vec![8; 100_000]).unwrap();
        }
        drop(streams);
        wait_empty(&world.agent);
        assert_eq!(world.agent.active().unwrap(), 0);
    }
}

#[test]
fn who_is_not_answered_is_served_by_another_endpoint_at_the_next_syn() {
    const CLIENTS: u32 = 6;
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let world = start(family, 1);
        let silent = &world.topology.backend1;
        let _server = Server::start(silent, world.endpoints[0], peer::echo).unwrap();
        // It hears the SYN, and what it answers goes astray for now.
        let node = match family {
            Family::V4 => "10.0.2.1",
            Family::V6 => "fd00:2::1",
        };
        silent.ip(&["neigh", "replace", node, "lladdr", NOBODY, "dev", FAR, "nud", "permanent"]).unwrap();
        let streams = world.connect_all(CLIENTS);
        let asked = silent.stdout(Command::new("ss").args(["-tnH", "state", "syn-recv"])).unwrap();
        let silence = i64::try_from(asked.lines().count()).unwrap();
        assert!((1..i64::from(CLIENTS)).contains(&silence), "{silence}");
        world.check(CLIENTS, "timed_out", silence);
        // It answers late, and is told that nobody wants that any more.
        silent.ip(&["neigh", "del", node, "dev", FAR]).unwrap();
        wait_until("the silent endpoint is told", Duration::from_secs(40), || {
            silent.counter("EmbryonicRsts").unwrap() == u64::try_from(silence).unwrap()
        });
        for stream in &streams {
            client::ping(stream, &vec![8; 100_000]).unwrap();
        }
        drop(streams);
        wait_empty(&world.agent);
    }
}

/// A client's numbers and clock have nothing to do with those of the client before it on the same local port: about every second SYN is older than the connection
/// that the endpoint remembers, because it ended it.
#[test]
fn an_endpoint_that_ends_first_is_reached_from_the_same_port_at_once() {
    const CLIENTS: u32 = 20;
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let mut world = start_with(family, 0, &["--source-ports", "20000-20063"]);
        let (client, host) = (&world.topology.client, &world.topology.backend2);
        world.server = None;
        let _server =
            Server::start(host, world.endpoints[0], |mut stream| stream.write_all(b"bye\n")).unwrap();
        let repeated = client.counter("TCPSynRetrans").unwrap();
        for timestamps in ["1", "1", "0", "0"] {
            client.sysctl("ipv4/tcp_timestamps", timestamps).unwrap();
            for _ in 0..CLIENTS {
                let stream = world.connect().unwrap();
                assert_eq!(client::read_line(&stream).unwrap(), "bye");
                assert_eq!(client::end(&stream, WAIT).unwrap(), End::Fin);
            }
            wait_empty(&world.agent);
        }
        assert_eq!(world.agent.verdicts("direct_refused"), 0, "a socket took a client");
        assert_eq!(client.counter("TCPSynRetrans").unwrap(), repeated, "a client had to ask again");
        let stale = world.agent.verdicts("direct_stale");
        println!("{family:?}: {stale} of {} asked again", 4 * CLIENTS);
        assert!(stale > 0);
        assert_eq!(world.agent.metric("forwarder_connections_total"), i64::from(4 * CLIENTS));
    }
}

#[test]
fn who_is_refused_by_all_endpoints_is_told() {
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let mut world = start(family, 1);
        world.server = None;
        let last = world.endpoints[1];
        wait_until("the last endpoint refuses", WAIT, || is_refused(&world.topology.node, last));
        let error = world.connect().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        world.agent.wait_ended("connect_failed", 1);
        wait_until("each refusal is counted", WAIT, || world.agent.connect_failures("refused") == 2);
        assert_eq!(world.agent.metric("forwarder_connections_total"), 1);
        wait_empty(&world.agent);
    }
}

#[test]
fn who_is_refused_by_two_of_three_endpoints_is_served_by_the_third() {
    const CLIENTS: u32 = 30;
    if !is_ready() {
        return;
    }
    let world = start(Family::V4, 2);
    let streams = world.connect_all(CLIENTS);
    world.check(CLIENTS, "refused", world.agent.verdicts("direct_retried"));
    drop(streams);
    wait_empty(&world.agent);
}

#[test]
fn another_endpoint_is_found_however_little_its_weight_is() {
    const CLIENTS: u32 = 20;
    if !is_ready() {
        return;
    }
    let world = start(Family::V4, 2);
    let services = ["heavy-1", "heavy-2", "light"];
    for (name, endpoint) in services.iter().zip(&world.endpoints) {
        world.manifests.service(name, std::slice::from_ref(endpoint)).unwrap();
    }
    let weights = services.iter().zip([500, 499, 1]);
    let backends: Vec<_> = weights.map(|(service, weight)| BackendRef { service, weight }).collect();
    world.manifests.route("a", &backends).unwrap();
    wait_until("all backends are there", WAIT, || {
        let listener = world.agent.listener(LISTENER).unwrap().unwrap_or_default();
        listener["backends"].as_array().is_some_and(|backends| backends.len() == 3)
    });
    wait_direct(&world.agent);
    let streams = world.connect_all(CLIENTS);
    assert!(world.agent.verdicts("direct_retried") >= i64::from(CLIENTS));
    drop(streams);
    wait_empty(&world.agent);
}

#[test]
fn another_endpoint_is_asked_and_counted_while_no_agent_runs() {
    const CLIENTS: u32 = 10;
    if !is_ready() {
        return;
    }
    let mut world = start(Family::V4, 1);
    let before = world.connect_all(CLIENTS);
    world.agent.kill().unwrap();
    let between = world.connect_all(CLIENTS);
    let command = AgentCommand::new(&DIRECT).succeeding(&world.agent);
    world.agent = command.start(&world.topology.node, &world.manifests.path()).unwrap();
    wait_direct(&world.agent);
    wait_until("failures of meanwhile are counted", WAIT, || world.agent.connect_failures("refused") > 0);
    let all = i64::from(2 * CLIENTS);
    wait_until("each client is counted once", WAIT, || {
        world.agent.metric("forwarder_connections_total") == all && world.agent.active().unwrap() == all
    });
    for stream in before.iter().chain(&between) {
        client::ping(stream, b"still").unwrap();
    }
    drop((before, between));
    wait_empty(&world.agent);
    for name in ["forwarder_connections_total", "forwarder_connections_ended_total"] {
        assert_eq!(world.agent.metric(name), all, "{name}");
    }
}
