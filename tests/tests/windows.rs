//! Receivers with small windows, behind a node whose own window scale is large: what they announce must not vanish in the units
//! of the other leg.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use forwarder_tests::client;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::peer::Server;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Forwarding, Manifests, Topology, require_root, wait_until};
use socket2::{Domain, Socket, Type};

const WAIT: Duration = Duration::from_secs(10);
const TIERS: [&str; 3] = ["splice", "tc", "sockmap"];
const ANSWER: usize = 30_000;
/// `tcp_rmem` of a node that is tuned for long fat networks: scale 14.
const LARGE: &str = "4096 131072 1073741824";
const USUAL: &str = "4096 131072 6291456";

/// An endpoint that answers each byte with many.
fn start(family: Family, tier: &str, memory: &str) -> Forwarding {
    let topology = Topology::new().expect("a network");
    topology.node.sysctl("ipv4/tcp_rmem", memory).expect("a variable");
    let endpoint = match family {
        Family::V4 => topology.backend1_address(ENDPOINT_PORT),
        Family::V6 => topology.backend1_address_v6(ENDPOINT_PORT),
    };
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
    let server = Server::start(&topology.backend1, endpoint, |mut stream| {
        while client::read(stream, &mut [0])? == 1 {
            stream.write_all(&vec![7; ANSWER])?;
        }
        Ok(())
    })
    .expect("a server");
    let command = AgentCommand::new(&["--datapath", tier, "--offload-after", "0B"]);
    let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
    Forwarding { agent, server, manifests, topology }
}

/// A client that has room for few bytes.
fn connect(forwarding: &Forwarding, family: Family, room: usize) -> TcpStream {
    let (domain, address): (_, SocketAddr) = match family {
        Family::V4 => (Domain::IPV4, forwarding.topology.node_address(LISTENER_PORT)),
        Family::V6 => (Domain::IPV6, forwarding.topology.node_address_v6(LISTENER_PORT)),
    };
    let socket =
        forwarding.topology.client.run(|| Socket::new(domain, Type::STREAM, None)).expect("a socket");
    // Before the handshake, which tells the window and its scale.
    socket.set_recv_buffer_size(room).expect("an option");
    socket.connect_timeout(&address.into(), WAIT).expect("connect");
    socket.set_read_timeout(Some(WAIT)).expect("an option");
    socket.into()
}

fn ask(mut stream: &TcpStream, context: &str) {
    stream.write_all(b"?").expect("sent");
    let mut answer = vec![0; ANSWER];
    let read = stream.read_exact(&mut answer);
    assert!(read.is_ok(), "{context}: {read:?}");
}

#[test]
fn a_small_window_lets_data_through_whatever_the_nodes_own_scale() {
    if !require_root() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for tier in TIERS {
            let forwarding = start(family, tier, LARGE);
            for (count, room) in (1..).zip([1500, 4096, 16_384]) {
                let context = format!("{tier}, {family:?}, {room} bytes of room");
                let stream = connect(&forwarding, family, room);
                for _ in 0..3 {
                    ask(&stream, &context);
                }
                if tier == "tc" {
                    // The least of them has the node send segments of half of it, which is told first.
                    let refused = |reason| forwarding.agent.fallbacks(reason);
                    wait_until("it is refused", WAIT, || {
                        refused("window_scale") + refused("segment_sizes_differ") >= count
                    });
                }
                ask(&stream, &context);
            }
        }
    }
}

#[test]
fn a_small_window_that_the_nodes_scale_can_tell_is_offloaded() {
    if !require_root() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let forwarding = start(family, "tc", USUAL);
        let stream = connect(&forwarding, family, 16_384);
        wait_until("it is offloaded", WAIT, || {
            ask(&stream, "before");
            forwarding.agent.offloaded().len() == 1
        });
        ask(&stream, "offloaded");
        assert_eq!(forwarding.agent.fallbacks("window_scale"), 0, "{family:?}");
    }
}
