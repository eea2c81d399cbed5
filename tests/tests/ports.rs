//! The local ports of connections to endpoints: none twice, as many as there are, and none that a process of the node is given.

use std::fs;
use std::net::TcpStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::{Agent, Forwarding, Manifests, Topology, peer, serialise, wait_until};

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(10);

#[test]
fn the_upstream_port_of_a_live_pair_is_never_used_again() {
    const PORTS: usize = 40;
    const FIRST: usize = 30;
    if !is_ready() {
        return;
    }
    let topology = Topology::new().expect("it works");
    topology
        .node
        .run(|| fs::write("/proc/sys/net/ipv4/ip_local_port_range", "40000 40039").expect("it works"));
    let endpoint = topology.backend1_address(5000);
    let manifests = Manifests::forward(9001, &[endpoint]).expect("it works");
    let server = peer::Server::start(&topology.backend1, endpoint, peer::echo).expect("it works");
    let arguments = at_once(&["--connect-timeout", "1s", "--source-ports", "off"]);
    let agent = Agent::start(&topology.node, &manifests.path(), &arguments).expect("it works");
    let forwarding = Forwarding { agent, server, manifests, topology };
    let mut streams = forwarding.connect_offloaded(FIRST);
    let ping_all = |streams: &[TcpStream], when: &str| {
        for (number, stream) in streams.iter().enumerate() {
            if let Err(error) = client::ping(stream, format!("{number} {when}").as_bytes()) {
                panic!("connection {number} {when}: {error}");
            }
        }
    };
    for number in FIRST..PORTS {
        streams.extend(forwarding.connect_offloaded(1));
        ping_all(&streams, &format!("after connection {number}"));
    }
    let connections = forwarding.agent.connections("").expect("it works");
    let mut ports: Vec<_> = connections.iter().filter_map(|one| one["upstreamLocal"].as_str()).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), PORTS);

    for _ in 0..3 {
        let end =
            client::end_of_new(&forwarding.topology.client, forwarding.address(), WAIT).expect("it works");
        assert_eq!(end, End::Reset, "there is no port left");
        ping_all(&streams, "after a refusal");
    }
    let failures = [("reason", "no_local_port")];
    let metrics = forwarding.agent.metrics().expect("it works");
    assert!(metrics.sum("forwarder_backend_connect_failures_total", &failures) >= 3);
    assert_eq!(forwarding.agent.pairs(), 40);

    // A port that is free again is used again.
    drop(streams.pop());
    forwarding.agent.wait_pairs(PORTS - 1);
    drop(forwarding.connect_offloaded(1));
    ping_all(&streams, "to the end");
}

/// A listener with one endpoint on a node that has so many local ports.
struct FewPorts {
    agent: Agent,
    topology: Topology,
    _manifests: Manifests,
    _server: Swarm,
}

impl FewPorts {
    fn start(count: u32, more: &[&str]) -> Self {
        raise_descriptor_limit().expect("it works");
        let topology = Topology::new().expect("it works");
        let range = format!("20000 {}", 20_000 + count - 1);
        topology.node.sysctl("ipv4/ip_local_port_range", &range).expect("it works");
        topology.client.sysctl("ipv4/ip_local_port_range", "1024 65535").expect("it works");
        let endpoint = topology.backend1_address(5000);
        let manifests = Manifests::forward(9001, &[endpoint]).expect("it works");
        let server = Swarm::start(&topology.backend1, endpoint).expect("it works");
        let agent = Agent::start(&topology.node, &manifests.path(), &at_once(more)).expect("it works");
        Self { agent, topology, _manifests: manifests, _server: server }
    }

    /// Opens so many connections, one after the other, that answer; tells how long they took at the mean.
    fn connect(&self, count: usize) -> (Vec<TcpStream>, Duration) {
        let address = self.topology.node_address(9001);
        let started = Instant::now();
        let connect = |_| {
            let stream = TcpStream::connect(address).expect("it works");
            stream.set_nodelay(true).expect("it works");
            stream.set_read_timeout(Some(WAIT)).expect("it works");
            client::ping(&stream, b"first").expect("it works");
            stream
        };
        let streams: Vec<_> = self.topology.client.run(|| (0..count).map(connect).collect());
        let took = started.elapsed() / u32::try_from(count).expect("a count").max(1);
        (streams, took)
    }
}

/// Sends on each connection to an echo server.
fn ping_each(streams: &[TcpStream]) {
    for stream in streams {
        client::ping(stream, b"once more").expect("it works");
    }
}

/// The kernel takes the ports of pairs for free, and what it gave them to could not connect.
#[test]
fn processes_of_the_node_connect_to_the_endpoints_of_pairs() {
    const PORTS: usize = 40;
    if !is_ready() {
        return;
    }
    let few = FewPorts::start(40, &[]);
    let (streams, _) = few.connect(2 * PORTS);
    wait_until("all are offloaded", WAIT, || {
        ping_each(&streams);
        usize::try_from(few.agent.pairs()) == Ok(streams.len())
    });
    let connect = || TcpStream::connect_timeout(&few.topology.backend1_address(5000), Duration::from_secs(1));
    // All that the kernel has to give.
    let own: Vec<_> = few.topology.node.run(|| (0..PORTS).map(|_| connect()).collect());
    for (number, stream) in own.into_iter().enumerate() {
        let stream = stream.unwrap_or_else(|error| panic!("connection {number} of the node: {error}"));
        client::ping(&stream, b"from the node").expect("it works");
    }
    ping_each(&streams);
    assert_eq!(few.agent.metric("forwarder_backend_shared_source_ports_total"), 0);
}

#[test]
fn the_kernel_chooses_where_no_port_of_the_agents_own_is_free() {
    const OWN: usize = 10;
    const SHARED: usize = 20;
    if !is_ready() {
        return;
    }
    let few = FewPorts::start(40, &["--source-ports", "61000-61009"]);
    let mut streams = Vec::new();
    while streams.len() < OWN + SHARED {
        streams.extend(few.connect(1).0);
        wait_until("it is offloaded", WAIT, || {
            ping_each(&streams);
            usize::try_from(few.agent.pairs()) == Ok(streams.len())
        });
    }
    let connections = few.agent.connections("").expect("it works");
    let locals = connections.iter().filter_map(|one| one["upstreamLocal"].as_str());
    let (own, shared): (Vec<_>, Vec<_>) = locals.partition(|local| local.contains(":6100"));
    assert_eq!((own.len(), shared.len()), (OWN, SHARED), "{own:?} {shared:?}");
    let metrics = few.agent.metrics().expect("it works");
    assert_eq!(
        metrics.sum("forwarder_backend_shared_source_ports_total", &[]),
        i64::try_from(SHARED).unwrap()
    );
    assert_eq!(metrics.sum("forwarder_backend_connect_failures_total", &[]), 0);
}

#[test]
fn pairs_to_one_endpoint_may_use_every_local_port() {
    const PORTS: usize = 1000;
    const RESERVED: usize = 10;
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let few = FewPorts::start(1000, &["--source-ports", "off"]);
    few.topology.node.sysctl("ipv4/ip_local_reserved_ports", "20300-20309").expect("it works");
    let mut streams = Vec::new();
    let ping_all = |streams: &[TcpStream], when: &str| {
        for (number, stream) in streams.iter().enumerate() {
            if let Err(error) = client::ping(stream, when.as_bytes()) {
                panic!("connection {number} {when}: {error}");
            }
        }
    };
    for share in [500, 900, 950, PORTS - RESERVED] {
        let (more, took) = few.connect(share - streams.len());
        streams.extend(more);
        println!("up to {share} pairs: {took:?} for each connection");
        wait_until("all are offloaded", Duration::from_secs(30), || {
            ping_all(&streams, "on its way");
            few.agent.pairs() == i64::try_from(share).expect("it works")
        });
    }
    ping_all(&streams, "when all ports are taken");
    assert_eq!(few.agent.offloaded().len(), PORTS - RESERVED);
    let metrics = few.agent.metrics().expect("it works");
    assert_eq!(metrics.sum("forwarder_backend_connect_failures_total", &[]), 0);

    // One that is free again is found among all the others.
    for _ in 0..3 {
        drop(streams.pop());
        few.agent.wait_pairs(PORTS - RESERVED - 1);
        streams.extend(few.connect(1).0);
        ping_all(&streams, "after a change");
        few.agent.wait_pairs(PORTS - RESERVED);
    }
}
