//! Offloaded connections whose packets come in fragments.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::kernel::{AT_ONCE, dump, is_ready};
use forwarder_tests::netns::FAR;
use forwarder_tests::peer::Server;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::wire::{self, Trouble, Wire};
use forwarder_tests::{AgentCommand, Forwarding, Manifests, NetNs, Topology, client, peer, wait_until};

/// What a wire carries whole, in bytes from the IP header on.
const WHOLE: usize = 1000;
const WAIT: Duration = Duration::from_secs(10);
/// Bytes that go each way.
const AMOUNT: u64 = 4_000_000;
/// The legs, by the number of their network.
const CLIENT: usize = 1;
const BACKEND: usize = 2;

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

fn start(topology: Topology, endpoint: SocketAddr) -> Forwarding {
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
    let server = Server::start(&topology.backend1, endpoint, echo_then_transfer).expect("a server");
    let agent = AgentCommand::new(&AT_ONCE).start(&topology.node, &manifests.path()).expect("an agent");
    Forwarding { agent, server, manifests, topology }
}

/// Offloads a connection by small packets, then transfers data through it.
#[track_caller]
fn transfer(forwarding: &Forwarding, family: Family, before: impl FnOnce()) {
    let address = match family {
        Family::V4 => forwarding.topology.node_address(LISTENER_PORT),
        Family::V6 => forwarding.topology.node_address_v6(LISTENER_PORT),
    };
    let stream = client::connect(&forwarding.topology.client, address).expect("connect");
    forwarding.offload(std::slice::from_ref(&stream));
    before();
    client::ping(&stream, TRANSFER).expect("an echo");
    client::transfer(&stream, 7, AMOUNT, AMOUNT)
        .map_err(|error| format!("{family:?}: {error:#}\n{}", forwarding.agent.log()))
        .expect("every byte arrives");
    drop(stream);
    // The ends of both directions came in fragments too.
    forwarding.agent.wait_empty();
}

/// A counter of IP in a namespace, such as `FragCreates`.
fn ip_counter(netns: &NetNs, name: &str) -> u64 {
    let table = netns.run(|| fs::read_to_string("/proc/thread-self/net/snmp")).expect("a table");
    let mut lines = table.lines().filter(|line| line.starts_with("Ip: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let index = names.split(' ').position(|field| field == name).expect("a counter");
    values.split(' ').nth(index).and_then(|value| value.parse().ok()).expect("a number")
}

/// Puts a host that lets routers cut its packets up behind `router`, which does so towards the node. IPv4 alone: there is
/// nothing like it in IPv6.
fn behind(node: &NetNs, router: &NetNs, index: usize) -> NetNs {
    let host = NetNs::new().expect("a namespace");
    let ip = |netns: &NetNs, arguments: &[&str]| netns.ip(arguments).expect("it works");
    ip(router, &["link", "add", "far", "type", "veth", "peer", "name", FAR, "netns", host.name()]);
    for (netns, device, last) in [(router, "far", 1), (&host, FAR, 2)] {
        ip(netns, &["address", "add", &format!("10.1.{index}.{last}/24"), "dev", device]);
        ip(netns, &["link", "set", device, "up"]);
    }
    ip(&host, &["route", "add", "default", "via", &format!("10.1.{index}.1")]);
    let to_node = format!("10.0.{index}.1");
    ip(router, &["route", "add", &to_node, "dev", FAR, "mtu", "lock", &WHOLE.to_string()]);
    ip(node, &["route", "add", &format!("10.1.{index}.0/24"), "via", &format!("10.0.{index}.2")]);
    router.sysctl("ipv4/ip_forward", "1").expect("a variable");
    host.sysctl("ipv4/ip_no_pmtu_disc", "1").expect("a variable");
    host
}

#[test]
fn packets_that_a_router_cuts_up_arrive() {
    if !is_ready() {
        return;
    }
    for index in [CLIENT, BACKEND] {
        println!("network {index}");
        let mut topology = Topology::new().expect("a network");
        let leg = if index == CLIENT { &mut topology.client } else { &mut topology.backend1 };
        let host = behind(&topology.node, leg, index);
        let router = std::mem::replace(leg, host);
        let address = if index == BACKEND { [10, 1, 2, 2] } else { [10, 0, 2, 2] };
        let forwarding = start(topology, SocketAddr::from((address, ENDPOINT_PORT)));
        transfer(&forwarding, Family::V4, || assert_eq!(ip_counter(&router, "FragCreates"), 0));
        let created = ip_counter(&router, "FragCreates");
        assert!(created > AMOUNT / 1500, "{created}");
        // They are not put together on the node.
        assert_eq!(ip_counter(&forwarding.topology.node, "ReasmReqds"), 0);
    }
}

/// A transfer through wires, of which one is troubled once the connection is offloaded.
fn through_wires(trouble: Trouble, check: impl Fn(&Forwarding, &Wire)) {
    for index in [CLIENT, BACKEND] {
        for family in [Family::V4, Family::V6] {
            println!("network {index}, {family:?}");
            let (topology, wires) = wire::wired(11).expect("a network");
            let endpoint = match family {
                Family::V4 => topology.backend1_address(ENDPOINT_PORT),
                Family::V6 => topology.backend1_address_v6(ENDPOINT_PORT),
            };
            let forwarding = start(topology, endpoint);
            let wire = &wires[index - 1];
            transfer(&forwarding, family, || wire.set(trouble));
            assert!(wire.done().cut > AMOUNT / 1500, "{:?}", wire.done());
            check(&forwarding, wire);
        }
    }
}

#[test]
fn fragments_of_either_family_arrive() {
    if !is_ready() {
        return;
    }
    through_wires(Trouble { whole: Some(WHOLE), ..Trouble::default() }, |forwarding, _| {
        assert_eq!(forwarding.agent.verdicts("fragment"), 0);
    });
}

#[test]
fn what_fragments_in_disorder_lose_is_sent_again() {
    if !is_ready() {
        return;
    }
    let hold = Duration::from_millis(2);
    let trouble = Trouble { whole: Some(WHOLE), held: 100, repeated: 100, hold, ..Trouble::default() };
    through_wires(trouble, |forwarding, wire| {
        println!("{:?}, {} before their first", wire.done(), forwarding.agent.verdicts("fragment"));
        assert!(wire.done().held > 0);
        assert!(forwarding.agent.verdicts("fragment") > 0);
    });
}

#[test]
fn a_sender_without_df_hears_of_what_is_too_large_for_the_node() {
    if !is_ready() {
        return;
    }
    for index in [CLIENT, BACKEND] {
        println!("network {index}");
        let topology = Topology::new().expect("a network");
        for host in [&topology.client, &topology.backend1] {
            host.sysctl("ipv4/ip_no_pmtu_disc", "1").expect("a variable");
        }
        let endpoint = topology.backend1_address(ENDPOINT_PORT);
        let forwarding = start(topology, endpoint);
        let topology = &forwarding.topology;
        let receiver = if index == CLIENT { &topology.client } else { &topology.backend1 };
        transfer(&forwarding, Family::V4, || {
            topology.set_mtu(index, receiver, 1400).expect("an MTU");
            wait_until("the program knows it", WAIT, || {
                let flows = dump(forwarding.agent.pin_dir(), "flows").expect("a dump");
                flows.iter().any(|flow| flow["formatted"]["value"]["mtu"] == 1400)
            });
        });
        assert!(forwarding.agent.verdicts("too_big") > 0);
    }
}
