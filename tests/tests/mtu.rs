//! Offloaded connections whose packets become too large for their way: for a router's link, or for the node's own.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::netns::FAR;
use forwarder_tests::peer::Server;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::traffic::Traffic;
use forwarder_tests::wire::{self, Trouble};
use forwarder_tests::{
    AgentCommand, Forwarding, Manifests, NetNs, Topology, cases, client, peer, wait_until,
};

/// A deadline for what lost packets may delay.
const LONG: Duration = Duration::from_secs(25);
const WAIT: Duration = Duration::from_secs(10);
const FLOWS: usize = 8;

/// The legs, by the number of their network.
const CLIENT: usize = 1;
const BACKEND: usize = 2;

/// A host behind `router`, which takes no packet of more than 1400 bytes in either direction.
fn behind(node: &NetNs, router: &NetNs, index: usize) -> NetNs {
    let host = NetNs::new().expect("a namespace");
    router
        .ip(&["link", "add", "far", "type", "veth", "peer", "name", FAR, "netns", host.name()])
        .expect("a link");
    for (netns, device, last) in [(router, "far", 1), (&host, FAR, 2)] {
        let addresses = [format!("10.1.{index}.{last}/24"), format!("fd01:{index}::{last}/64")];
        netns.ip(&["address", "add", &addresses[0], "dev", device]).expect("an address");
        netns.ip(&["address", "add", &addresses[1], "dev", device, "nodad"]).expect("an address");
        netns.ip(&["link", "set", device, "up"]).expect("a link");
    }
    let networks = [
        [format!("10.1.{index}.0/24"), format!("10.1.{index}."), format!("10.0.{index}.")],
        [format!("fd01:{index}::/64"), format!("fd01:{index}::"), format!("fd00:{index}::")],
    ];
    for [network, far, near] in networks {
        let [gateway, far] = [1, 2].map(|last| format!("{far}{last}"));
        let small = ["mtu", "lock", "1400"];
        host.ip(&["route", "add", "default", "via", &gateway]).expect("a route");
        let [to_node, to_router] = [1, 2].map(|last| format!("{near}{last}"));
        for (to, device) in [(&far, "far"), (&to_node, FAR)] {
            router.ip(&[&["route", "add", to, "dev", device], &small[..]].concat()).expect("a route");
        }
        node.ip(&["route", "add", &network, "via", &to_router]).expect("a route");
    }
    router.sysctl("ipv4/ip_forward", "1").expect("a variable");
    router.sysctl("ipv6/conf/all/forwarding", "1").expect("a variable");
    host
}

/// A network in which the host of one leg is behind a router, which is to be kept, and the address of the endpoint's host.
fn routed(index: usize, family: Family) -> (Topology, NetNs, IpAddr) {
    let mut topology = Topology::new().expect("a network");
    let leg = if index == CLIENT { &mut topology.client } else { &mut topology.backend1 };
    let host = behind(&topology.node, leg, index);
    let router = std::mem::replace(leg, host);
    let (v4, v6): (&str, &str) =
        if index == BACKEND { ("10.1.2.2", "fd01:2::2") } else { ("10.0.2.2", "fd00:2::2") };
    let address = if family == Family::V4 { v4 } else { v6 };
    (topology, router, address.parse().expect("an address"))
}

fn start(topology: Topology, endpoint: IpAddr, handle: fn(&TcpStream) -> io::Result<()>) -> Forwarding {
    let endpoint = SocketAddr::new(endpoint, ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
    let server = Server::start(&topology.backend1, endpoint, handle).expect("a server");
    let agent = AgentCommand::new(&AT_ONCE).start(&topology.node, &manifests.path()).expect("an agent");
    Forwarding { agent, server, manifests, topology }
}

fn connect(forwarding: &Forwarding, family: Family) -> TcpStream {
    let address = match family {
        Family::V4 => forwarding.topology.node_address(LISTENER_PORT),
        Family::V6 => forwarding.topology.node_address_v6(LISTENER_PORT),
    };
    client::connect(&forwarding.topology.client, address).expect("connect")
}

fn offloaded(forwarding: &Forwarding, family: Family, count: usize) -> Vec<TcpStream> {
    let streams: Vec<_> = (0..count).map(|_| connect(forwarding, family)).collect();
    forwarding.offload(&streams);
    streams
}

/// The message after which [`echo_then_transfer`] serves a transfer: as long as those that offload a connection.
const TRANSFER: &[u8; 10] = b"a transfer";

/// Echoes messages, and then serves a transfer.
fn echo_then_transfer(mut stream: &TcpStream) -> io::Result<()> {
    let mut message = [0; TRANSFER.len()];
    while message != *TRANSFER {
        stream.read_exact(&mut message)?;
        stream.write_all(&message)?;
    }
    peer::transfer(stream)
}

/// Each leg, in each family.
fn each_leg(check: impl Fn(usize, Family)) {
    let all = [(CLIENT, Family::V4), (BACKEND, Family::V6), (CLIENT, Family::V6), (BACKEND, Family::V4)];
    for (index, family) in cases(all) {
        println!("network {index}, {family:?}");
        check(index, family);
    }
}

#[test]
fn what_a_router_says_of_large_packets_reaches_their_sender() {
    if !is_ready() {
        return;
    }
    each_leg(|index, family| {
        let (topology, _router, endpoint) = routed(index, family);
        let forwarding = start(topology, endpoint, echo_then_transfer);
        // Only small packets so far: nobody knows of the router's limit.
        let stream = offloaded(&forwarding, family, 1).remove(0);
        assert_eq!(forwarding.agent.verdicts("too_big_passed_on"), 0);
        client::ping(&stream, TRANSFER).expect("an echo");
        let started = Instant::now();
        client::transfer(&stream, 7, 16_000_000, 16_000_000).unwrap_or_else(|error| {
            panic!("network {index}, {family:?}: {error:#}\n{}", forwarding.agent.log())
        });
        let told = forwarding.agent.verdicts("too_big_passed_on");
        println!("{told} words of the router, {:?}", started.elapsed());
        assert!(told > 0, "network {index}, {family:?}");
    });
}

#[test]
fn it_reaches_their_sender_without_an_agent() {
    if !is_ready() {
        return;
    }
    each_leg(|index, family| {
        let (topology, _router, endpoint) = routed(index, family);
        let mut forwarding = start(topology, endpoint, peer::echo);
        let mut streams = offloaded(&forwarding, family, 2 * FLOWS);
        assert_eq!(forwarding.agent.verdicts("too_big_passed_on"), 0);
        let first = Traffic::start(streams.split_off(FLOWS));
        first.wait_progress(LONG);
        assert!(forwarding.agent.verdicts("too_big_passed_on") > 0);
        // The hosts forget what they have heard.
        for netns in [&forwarding.topology.client, &forwarding.topology.backend1] {
            netns.ip(&["-4", "route", "flush", "cache"]).expect("it works");
            netns.ip(&["-6", "route", "flush", "cache"]).expect("it works");
        }
        forwarding.agent.kill().expect("it ends");
        let traffic = Traffic::start(streams);
        for _ in 0..2 {
            traffic.wait_progress(LONG);
            first.wait_progress(LONG);
        }
        first.finish().expect("every byte");
        traffic.finish().expect("every byte");
    });
}

/// Lowers an MTU amid traffic in both directions, and sees that it goes on.
fn check_lowered(topology: Topology, family: Family, lower: impl FnOnce(&Topology)) {
    let endpoint = match family {
        Family::V4 => topology.backend1_address(0),
        Family::V6 => topology.backend1_address_v6(0),
    };
    let forwarding = start(topology, endpoint.ip(), peer::echo);
    let traffic = Traffic::start(offloaded(&forwarding, family, FLOWS));
    traffic.wait_progress(LONG);
    assert_eq!(forwarding.agent.verdicts("too_big"), 0);
    lower(&forwarding.topology);
    for _ in 0..3 {
        traffic.wait_progress(LONG);
    }
    wait_until("senders are told", WAIT, || forwarding.agent.verdicts("too_big") > 0);
    traffic.wait_progress(LONG);
    let told = forwarding.agent.verdicts("too_big");
    traffic.finish().expect("every byte");
    println!("{told} packets were too large, {} in the end", forwarding.agent.verdicts("too_big"));
    forwarding.agent.wait_empty();
}

/// The host of a leg.
fn host(topology: &Topology, index: usize) -> &NetNs {
    if index == CLIENT { &topology.client } else { &topology.backend1 }
}

#[test]
fn the_mtu_of_the_nodes_interface_may_be_lowered_amid_a_transfer() {
    if !is_ready() {
        return;
    }
    each_leg(|index, family| {
        check_lowered(Topology::new().expect("a network"), family, |topology| {
            topology.set_mtu(index, host(topology, index), 1400).expect("an MTU");
        });
    });
}

#[test]
fn so_may_that_of_a_wire_on_which_larger_packets_vanish() {
    if !is_ready() {
        return;
    }
    each_leg(|index, family| {
        let (topology, wires) = wire::wired(11).expect("a network");
        check_lowered(topology, family, |topology| {
            wires[index - 1].set(Trouble { longest: Some(1400), ..Trouble::default() });
            topology.set_mtu(index, host(topology, index), 1400).expect("an MTU");
        });
    });
}

#[test]
fn so_may_that_of_a_route() {
    if !is_ready() {
        return;
    }
    for (family, route) in [(Family::V4, "10.0.2.2"), (Family::V6, "fd00:2::2")] {
        check_lowered(Topology::new().expect("a network"), family, |topology| {
            topology.node.ip(&["route", "add", route, "dev", "veth2", "mtu", "1400"]).expect("a route");
        });
    }
}
