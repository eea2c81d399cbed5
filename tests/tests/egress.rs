//! Packets of offloaded connections that the node's stack sends on, by choice or because redirected ones do not arrive.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::Duration;

use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::shape::stage::Family;
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{AgentCommand, Forwarding, NetNs, Topology, client, peer, wait_until};

const WAIT: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(25);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A network whose node lets packets with its own addresses in, as the stack needs for IPv4.
fn open() -> Topology {
    let topology = Topology::new().expect("a network");
    topology.node.sysctl("ipv4/conf/all/accept_local", "1").expect("a variable");
    topology.node.sysctl("ipv4/conf/all/rp_filter", "0").expect("a variable");
    for device in ["veth1", "veth2"] {
        topology.node.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0").expect("a variable");
    }
    topology
}

fn start(topology: Topology, family: Family, arguments: &[&str]) -> Forwarding {
    let command = AgentCommand::new(&at_once(arguments));
    Forwarding::serve(topology, family, &command, peer::echo).expect("an agent between two hosts")
}

fn address(forwarding: &Forwarding, family: Family) -> SocketAddr {
    forwarding.address_of(family)
}

fn connect(forwarding: &Forwarding, family: Family, count: usize) -> Vec<TcpStream> {
    let connect =
        |_| client::connect(&forwarding.topology.client, address(forwarding, family)).expect("connect");
    (0..count).map(connect).collect()
}

fn nft(netns: &NetNs, rules: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rules");
    std::fs::write(&path, rules).expect("rules");
    netns.stdout(Command::new("nft").arg("-f").arg(&path)).expect("nft");
}

/// What the node's firewall makes of the packets that it sees: those that the node says itself, and those that its stack sends
/// on. It does not see what is redirected.
const OWN: &str = "af11";
const BY_STACK: &str = "af12";

/// Has both hosts drop what is redirected, and what the stack sends on too if `all`: everything but what the node says itself.
fn swallow(forwarding: &Forwarding, family: Family, all: bool) {
    let (table, field) = match family {
        Family::V4 => ("ip", "ip dscp"),
        Family::V6 => ("ip6", "ip6 dscp"),
    };
    let chain = |hook: &str, rule: &str| {
        format!(
            "add chain {table} swallow {hook} {{ type filter hook {hook} priority -300; }}\n\
             add rule {table} swallow {hook} meta l4proto tcp {rule}\n"
        )
    };
    let table = format!("add table {table} swallow\nflush table {table} swallow\n");
    let own = chain("output", &format!("{field} set {OWN}"));
    nft(
        &forwarding.topology.node,
        &[&table[..], &own[..], &chain("forward", &format!("{field} set {BY_STACK}"))[..]].concat(),
    );
    let arrives = if all { OWN.to_owned() } else { format!("{{ {OWN}, {BY_STACK} }}") };
    for host in [&forwarding.topology.client, &forwarding.topology.backend1] {
        nft(host, &[&table[..], &chain("prerouting", &format!("{field} != {arrives} drop"))[..]].concat());
    }
}

#[test]
fn the_stack_carries_what_is_left_to_it() {
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let mut forwarding = start(open(), family, &["--egress", "stack"]);
        let streams = connect(&forwarding, family, 8);
        forwarding.offload(&streams);
        let traffic = Traffic::start(streams);
        traffic.wait_progress(LONG);
        assert!(forwarding.agent.verdicts("left_to_stack") > 0, "{family:?}");
        assert_eq!(forwarding.agent.verdicts("redirected"), 0, "{family:?}");
        // And without an agent.
        forwarding.agent.kill().expect("it ends");
        traffic.wait_progress(LONG);
        traffic.finish().expect("every byte");
    }
}

#[test]
fn a_smaller_mtu_is_told_by_the_stack_too() {
    if !is_ready() {
        return;
    }
    for family in FAMILIES {
        let forwarding = start(open(), family, &["--egress", "stack"]);
        let streams = connect(&forwarding, family, 4);
        forwarding.offload(&streams);
        let traffic = Traffic::start(streams);
        traffic.wait_progress(LONG);
        let Topology { client, backend1, .. } = &forwarding.topology;
        forwarding.topology.set_mtu(1, client, 1400).expect("an MTU");
        traffic.wait_progress(LONG);
        forwarding.topology.set_mtu(2, backend1, 1300).expect("an MTU");
        traffic.wait_progress(LONG);
        wait_until("senders are told", WAIT, || forwarding.agent.verdicts("too_big") > 1);
        traffic.wait_progress(LONG);
        traffic.finish().expect("every byte");
    }
}

#[test]
fn a_stack_that_would_not_send_packets_on_is_named() {
    if !is_ready() {
        return;
    }
    for (family, variable, value, told) in [
        (Family::V4, "ipv4/conf/all/accept_local", "0", "net.ipv4.conf.veth1.accept_local has to be 1"),
        (Family::V4, "ipv4/conf/veth1/rp_filter", "1", "net.ipv4.conf.veth1.rp_filter has to be 0 or 2"),
        (Family::V4, "ipv4/ip_forward", "0", "forwarding has to be 1"),
        (Family::V6, "ipv6/conf/all/forwarding", "0", "net.ipv6.conf.all.forwarding has to be 1"),
    ] {
        let topology = open();
        topology.node.sysctl(variable, value).expect("a variable");
        let forwarding = start(topology, family, &["--egress", "stack"]);
        let stream = connect(&forwarding, family, 1).remove(0);
        wait_until("it is refused", WAIT, || {
            client::ping(&stream, b"in userspace").expect("an echo");
            forwarding.agent.fallbacks("stack_closed") > 0
        });
        assert!(forwarding.agent.log().contains(told), "{told}:\n{}", forwarding.agent.log());
        assert_eq!(forwarding.agent.metric("forwarder_offloads_total"), 0);
    }
}

#[test]
fn where_redirected_packets_vanish_the_stack_sends_them() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    for family in FAMILIES {
        let forwarding = start(open(), family, &[]);
        let agent = &forwarding.agent;
        swallow(&forwarding, family, false);
        // The first finds out, and goes on by the stack.
        let first = connect(&forwarding, family, 1);
        forwarding.offload(&first);
        assert!(forwarding.agent.verdicts("left_to_stack") > 0, "{family:?}");
        // Others follow at once.
        let others = connect(&forwarding, family, 4);
        forwarding.offload(&others);
        assert_eq!(agent.metric("forwarder_offloads_taken_back_total"), 0, "{}", agent.log());
        let traffic = Traffic::start(others);
        traffic.wait_progress(LONG);
        traffic.finish().expect("every byte");
    }
}

#[test]
fn where_neither_arrives_connections_stay_in_userspace() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    for family in FAMILIES {
        let forwarding = start(open(), family, &[]);
        let agent = &forwarding.agent;
        swallow(&forwarding, family, true);
        let first = connect(&forwarding, family, 1).remove(0);
        let avoided = || agent.log().matches("packets sent by this interface do not arrive").count();
        wait_until("neither way arrives", LONG, || {
            client::ping(&first, b"where to?").expect("an echo");
            agent.log().contains("via=\"redirect\"")
                && agent.log().contains("via=\"stack\"")
                && avoided() >= 2
        });
        wait_until("another is refused", LONG, || {
            let offloads = agent.metric("forwarder_offloads_total");
            let second = connect(&forwarding, family, 1).remove(0);
            let refused = agent.fallbacks("path_broken");
            client::ping(&second, b"in userspace").expect("an echo");
            agent.fallbacks("path_broken") > refused && agent.metric("forwarder_offloads_total") == offloads
        });
    }
}
