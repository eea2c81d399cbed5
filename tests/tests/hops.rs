//! How far the packets of offloaded connections may go: as far as the node's own, whatever their senders have given them.

use std::process::Command;

use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::peer::Server;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Forwarding, Manifests, NetNs, Topology, client, peer};

/// What the node gives its packets.
const NODE: &str = "77";

/// Has a host send with a hop limit of one, and take nothing but what comes with that of the node.
fn limit(host: &NetNs, family: Family) {
    let (variable, table, field) = match family {
        Family::V4 => ("ipv4/ip_default_ttl", "ip", "ip ttl"),
        Family::V6 => ("ipv6/conf/eth0/hop_limit", "ip6", "ip6 hoplimit"),
    };
    host.sysctl(variable, "1").expect("a variable");
    // What neighbours say to each other comes with 255.
    let rules = format!(
        "add table {table} hops\n\
         add chain {table} hops arriving {{ type filter hook prerouting priority -300; }}\n\
         add rule {table} hops arriving meta l4proto tcp {field} != {NODE} drop\n"
    );
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rules");
    std::fs::write(&path, rules).expect("rules");
    host.stdout(Command::new("nft").arg("-f").arg(&path)).expect("nft");
}

#[test]
fn packets_leave_with_the_nodes_own_hop_limit() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for egress in ["redirect", "stack"] {
            let topology = Topology::new().expect("a network");
            let Topology { node, client, backend1, .. } = &topology;
            node.sysctl("ipv4/conf/all/accept_local", "1").expect("a variable");
            node.sysctl("ipv4/conf/all/rp_filter", "0").expect("a variable");
            node.sysctl("ipv4/ip_default_ttl", NODE).expect("a variable");
            for device in ["veth1", "veth2"] {
                node.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0").expect("a variable");
                node.sysctl(&format!("ipv6/conf/{device}/hop_limit"), NODE).expect("a variable");
            }
            limit(client, family);
            limit(backend1, family);
            let (endpoint, address) = match family {
                Family::V4 => {
                    (topology.backend1_address(ENDPOINT_PORT), topology.node_address(LISTENER_PORT))
                }
                Family::V6 => {
                    (topology.backend1_address_v6(ENDPOINT_PORT), topology.node_address_v6(LISTENER_PORT))
                }
            };
            let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
            let server = Server::start(&topology.backend1, endpoint, peer::echo).expect("a server");
            let command = AgentCommand::new(&at_once(&["--egress", egress]));
            let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
            let forwarding = Forwarding { agent, server, manifests, topology };
            let streams: Vec<_> = (0..4)
                .map(|_| client::connect(&forwarding.topology.client, address).expect("connect"))
                .collect();
            forwarding.offload(&streams);
            for stream in &streams {
                client::ping(stream, &[7; 5000]).expect("an echo");
            }
            let agent = &forwarding.agent;
            assert_eq!(agent.metric("forwarder_offloads_taken_back_total"), 0, "{family:?}, {egress}");
            assert_eq!(
                agent.ended("upstream_reset") + agent.ended("downstream_reset"),
                0,
                "{family:?}, {egress}"
            );
        }
    }
}
