//! Packets of connections that are sent on at XDP.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use forwarder_tests::client::{self, End};
use forwarder_tests::direct::is_direct;
use forwarder_tests::fixture::{ENDPOINT_PORT, Forwarding, LISTENER_PORT};
use forwarder_tests::kernel::is_ready;
use forwarder_tests::netns::{FAR, near};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::release;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{Agent, AgentCommand, Manifests, Topology, skip, wait_until};

const WAIT: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(1);

/// Whether the kernel tells which interfaces take frames from XDP.
fn is_known() -> bool {
    let is_known = release::is_at_least(6, 3);
    if !is_known {
        skip("a kernel of 6.3 or later");
    }
    is_known
}

/// An agent at a tier that sends on at XDP.
fn start(topology: Topology, family: Family, datapath: &str) -> Forwarding {
    let command = AgentCommand::new(&["--xdp", "native", "--offload-after", "0B", "--datapath", datapath]);
    let forwarding = Forwarding::serve(topology, family, &command, peer::echo).expect("an agent");
    wait_until("packets are sent on at XDP", WAIT, || {
        forwarding.agent.at_xdp("native") >= 3 && (datapath != "direct" || is_direct(&forwarding.agent))
    });
    forwarding
}

/// A network whose devices take and give what they do on wires.
fn network() -> Topology {
    let topology = Topology::new().expect("a network");
    topology.finish_checksums().expect("features");
    topology
}

/// Pings until more packets have met with a verdict.
#[track_caller]
fn wait_verdict(agent: &Agent, verdict: &str, mut ping: impl FnMut()) {
    let before = agent.verdicts(verdict);
    wait_until(verdict, WAIT, || {
        ping();
        agent.verdicts(verdict) > before + 10
    });
}

#[test]
fn packets_of_both_directions_are_sent_on_and_ends_arrive() {
    if !is_ready() || !is_known() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for datapath in ["tc", "direct"] {
            let forwarding = start(network(), family, datapath);
            let Forwarding { agent, topology, .. } = &forwarding;
            let address = forwarding.address_of(family);
            let stream = client::connect(&topology.client, address).expect("a connection");
            wait_verdict(agent, "xdp_redirected", || client::ping(&stream, &[7; 10_000]).expect("an echo"));
            // TC sees little of it: what opens the connection, and what keeps the neighbours known.
            let (at_tc, at_xdp) = (agent.verdicts("redirected"), agent.verdicts("xdp_redirected"));
            for _ in 0..200 {
                client::ping(&stream, &[8; 3_000]).expect("an echo");
            }
            let (at_tc, at_xdp) =
                (agent.verdicts("redirected") - at_tc, agent.verdicts("xdp_redirected") - at_xdp);
            println!("{family:?} {datapath}: {at_tc} packets at TC, {at_xdp} at XDP");
            assert!(at_xdp > at_tc, "{family:?} {datapath}: {at_tc} at TC, {at_xdp} at XDP");
            stream.shutdown(std::net::Shutdown::Write).expect("an end");
            assert_eq!(client::end(&stream, WAIT).expect("an end"), End::Fin);
            agent.wait_ended("finished", 1);

            let stream = client::connect(&topology.client, address).expect("a connection");
            wait_verdict(agent, "xdp_redirected", || client::ping(&stream, &[7; 3_000]).expect("an echo"));
            socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("an option");
            drop(stream);
            agent.wait_ended("downstream_reset", 1);
        }
    }
}

/// As between namespaces of one host, unless told otherwise: the rest of the checksum would be lost at XDP.
#[test]
fn what_has_no_finished_checksum_goes_by_tc() {
    if !is_ready() || !is_known() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for datapath in ["tc", "direct"] {
            let topology = Topology::of_veth().expect("a network");
            for host in [&topology.client, &topology.backend1] {
                host.set_features(FAR, &["gro", "on", "tx", "on"]).expect("features");
            }
            let forwarding = start(topology, family, datapath);
            let address = forwarding.address_of(family);
            let stream = client::connect(&forwarding.topology.client, address).expect("a connection");
            wait_verdict(&forwarding.agent, "xdp_unfinished", || {
                client::ping(&stream, &[7; 10_000]).expect("an echo");
            });
            assert_eq!(forwarding.agent.verdicts("xdp_redirected"), 0, "{family:?} {datapath}");
        }
    }
}

/// A veth whose other end does not gather packets (GRO) takes no frames from XDP. What a device takes, may change.
#[test]
fn an_interface_that_takes_nothing_from_xdp_is_served_by_tc() {
    if !is_ready() || !is_known() {
        return;
    }
    let topology = Topology::of_veth().expect("a network");
    topology.finish_checksums().expect("features");
    topology.backend1.set_features(FAR, &["gro", "off"]).expect("a feature");
    let forwarding = start(topology, Family::V4, "tc");
    let (agent, backend) = (&forwarding.agent, &forwarding.topology.backend1);
    let stream = forwarding.connect().expect("a connection");
    let ping = || client::ping(&stream, &[7; 3_000]).expect("an echo");
    wait_verdict(agent, "xdp_no_target", ping);
    // The answers leave by another one.
    wait_verdict(agent, "xdp_redirected", ping);
    backend.set_features(FAR, &["gro", "on"]).expect("a feature");
    wait_until("all of it is sent on at XDP", WAIT, || {
        let before = agent.verdicts("xdp_no_target");
        (0..20).for_each(|_| ping());
        agent.verdicts("xdp_no_target") == before
    });
    backend.set_features(FAR, &["gro", "off"]).expect("a feature");
    // What is on its way until the agent knows is lost, and sent again.
    wait_verdict(agent, "xdp_no_target", ping);
}

/// Between hosts of one network. Nothing is sent again, so nothing has lain anywhere.
#[test]
fn packets_leave_by_the_interface_that_they_have_come_by() {
    const PINGS: usize = 50;
    if !is_ready() || !is_known() {
        return;
    }
    let topology = network();
    let endpoint = SocketAddr::from(([10, 0, 1, 2], ENDPOINT_PORT));
    let _server = Server::start(&topology.client, endpoint, peer::echo).expect("a server");
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
    for datapath in ["tc", "direct"] {
        let command =
            AgentCommand::new(&["--xdp", "native", "--offload-after", "0B", "--datapath", datapath]);
        let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
        wait_until("packets are sent on at XDP", WAIT, || {
            agent.at_xdp("native") >= 3 && (datapath != "direct" || is_direct(&agent))
        });
        let stream =
            client::connect(&topology.client, topology.node_address(LISTENER_PORT)).expect("a connection");
        wait_verdict(&agent, "xdp_redirected", || client::ping(&stream, &[7; 100]).expect("an echo"));
        let repeated = || topology.client.counter("RetransSegs").expect("a counter");
        let before = repeated();
        for _ in 0..PINGS {
            client::ping(&stream, &[7; 100]).expect("an echo");
        }
        assert!(repeated() - before < 5, "{datapath}: {} of {PINGS}", repeated() - before);
    }
}

/// The kernel finds it out as for what its stack sends, because it sees that the neighbour is in use.
#[test]
fn a_neighbour_that_gets_another_ethernet_address_is_found() {
    if !is_ready() || !is_known() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let topology = network();
        let version = if family == Family::V4 { "ipv4" } else { "ipv6" };
        // By default it would doubt a neighbour that has answered after half a minute, while the client tries ever less.
        for (name, value) in
            [("base_reachable_time_ms", "1000"), ("delay_first_probe_time", "1"), ("retrans_time_ms", "100")]
        {
            topology.node.sysctl(&format!("{version}/neigh/{}/{name}", near(2)), value).expect("a variable");
        }
        let forwarding = start(topology, family, "tc");
        let Forwarding { agent, topology, .. } = &forwarding;
        let stream = client::connect(&topology.client, forwarding.address_of(family)).expect("a connection");
        let traffic = Traffic::start(vec![stream]);
        wait_until("packets are sent on at XDP", WAIT, || agent.verdicts("xdp_redirected") > 1_000);
        // It tells nobody.
        topology.backend1.ip(&["link", "set", FAR, "address", "02:00:00:00:00:99"]).expect("an address");
        traffic.wait_progress(LONG);
        traffic.wait_progress(LONG);
        traffic.finish().expect("whole bytes");
    }
}

/// The program at XDP ends with the agent, and TC goes on; the next agent's takes its place.
#[test]
fn connections_outlive_the_program_at_xdp() {
    const COUNT: usize = 20;
    if !is_ready() || !is_known() {
        return;
    }
    let mut forwarding = start(network(), Family::V4, "tc");
    let traffic = Traffic::start(forwarding.connect_offloaded(COUNT));
    wait_until("packets are sent on at XDP", WAIT, || forwarding.agent.verdicts("xdp_redirected") > 1_000);
    forwarding.agent.kill().expect("it ends");
    let node = &forwarding.topology.node;
    let shown = node.stdout(Command::new("ip").args(["-d", "link", "show", &near(1)])).expect("ip");
    assert!(!shown.contains("xdp"), "a program is left: {shown}");
    traffic.wait_progress(LONG);
    forwarding
        .succeed(&["--xdp", "native", "--offload-after", "0B", "--datapath", "tc"])
        .expect("the next agent");
    let agent = &forwarding.agent;
    wait_until("packets are sent on at XDP again", WAIT, || agent.verdicts("xdp_redirected") > 1_000);
    traffic.wait_progress(LONG);
    traffic.finish().expect("whole bytes");
}
