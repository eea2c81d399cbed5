//! The two legs of a pair may differ in their MTU, in the options of TCP, and in their sequence numbers.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use forwarder_tests::client::TIMEOUT;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::peer::Server;
use forwarder_tests::sequence::Positions;
use forwarder_tests::shape::Shape;
use forwarder_tests::shape::stage::{Family, Offload, Stage};
use forwarder_tests::{
    Datapath, Forwarding, Manifests, NetNs, Topology, client, peer, require_root, sequence, wire,
};
use socket2::{Domain, Socket, Type};

const CONVERSATIONS: u64 = 140;
const AT_ONCE: usize = 24;

/// Where a variable of the kernel is set.
#[derive(Clone, Copy)]
enum Host {
    Client,
    Node,
    Backend,
}

impl Host {
    fn netns(self, topology: &Topology) -> &NetNs {
        match self {
            Self::Client => &topology.client,
            Self::Node => &topology.node,
            Self::Backend => &topology.backend1,
        }
    }
}

/// Conversations between hosts of which some have other settings than usual, in both families.
fn check_settings(settings: &[(Host, &str, &str)], offload: Offload) {
    for datapath in Datapath::chosen() {
        for family in [Family::V4, Family::V6] {
            let topology = Topology::new().expect("a network");
            for (host, name, value) in settings {
                host.netns(&topology).sysctl(name, value).expect("a variable of the kernel");
            }
            let stage = Stage::start(topology, datapath, family).expect("a stage");
            stage.check_shapes((0..CONVERSATIONS).map(Shape::of).collect(), AT_ONCE, offload);
        }
    }
}

/// Conversations over legs of different MTU; also between devices that send no packet larger than it.
fn check_mtu(client: u16, backend: u16) {
    for datapath in Datapath::chosen() {
        let (on_wires, _wires) = wire::wired(5).expect("a network");
        for topology in [Topology::new().expect("a network"), on_wires] {
            topology.set_mtu(1, &topology.client, client).expect("an MTU of the client's leg");
            topology.set_mtu(2, &topology.backend1, backend).expect("an MTU of the backend's leg");
            let stage = Stage::start(topology, datapath, Family::V4).expect("a stage");
            stage.check_shapes((0..CONVERSATIONS).map(Shape::of).collect(), AT_ONCE, Offload::Expected);
        }
    }
}

#[test]
fn the_backends_leg_may_have_a_smaller_mtu() {
    if require_root() {
        check_mtu(1500, 1400);
    }
}

#[test]
fn the_clients_leg_may_have_a_smaller_mtu() {
    if require_root() {
        check_mtu(1400, 1500);
    }
}

#[test]
fn the_clients_leg_may_carry_jumbo_frames() {
    if require_root() {
        check_mtu(9000, 1500);
    }
}

#[test]
fn the_backends_leg_may_carry_jumbo_frames() {
    if require_root() {
        check_mtu(1500, 9000);
    }
}

#[test]
fn either_leg_may_do_without_timestamps() {
    const NAME: &str = "ipv4/tcp_timestamps";
    if require_root() {
        check_settings(&[(Host::Client, NAME, "0")], Offload::Optional);
        check_settings(&[(Host::Backend, NAME, "0")], Offload::Optional);
        check_settings(&[(Host::Node, NAME, "0")], Offload::Expected);
    }
}

#[test]
fn either_leg_may_do_without_selective_acknowledgements() {
    const NAME: &str = "ipv4/tcp_sack";
    if require_root() {
        check_settings(&[(Host::Client, NAME, "0")], Offload::Optional);
        check_settings(&[(Host::Backend, NAME, "0")], Offload::Optional);
        check_settings(&[(Host::Node, NAME, "0")], Offload::Expected);
    }
}

#[test]
fn either_leg_may_do_without_window_scaling() {
    const NAME: &str = "ipv4/tcp_window_scaling";
    if require_root() {
        check_settings(&[(Host::Client, NAME, "0")], Offload::Expected);
        check_settings(&[(Host::Backend, NAME, "0")], Offload::Expected);
        check_settings(&[(Host::Node, NAME, "0")], Offload::Expected);
    }
}

#[test]
fn hosts_may_announce_other_window_scales() {
    const NAME: &str = "ipv4/tcp_rmem";
    if require_root() {
        let (small, large) = ("4096 32768 65536", "4096 131072 536870912");
        check_settings(&[(Host::Client, NAME, small), (Host::Backend, NAME, large)], Offload::Expected);
        check_settings(&[(Host::Client, NAME, large), (Host::Node, NAME, small)], Offload::Expected);
    }
}

#[test]
fn one_leg_may_use_congestion_notification() {
    const NAME: &str = "ipv4/tcp_ecn";
    if require_root() {
        // Who has 1 asks for it; everybody agrees to it.
        check_settings(&[(Host::Client, NAME, "1")], Offload::Expected);
        check_settings(&[(Host::Node, NAME, "1")], Offload::Expected);
        check_settings(&[(Host::Client, NAME, "1"), (Host::Node, NAME, "1")], Offload::Expected);
    }
}

/// Tells the client where its sequence numbers stand, and then serves a transfer.
fn tell_and_transfer(mut stream: &TcpStream) -> io::Result<()> {
    let Positions { send, receive } = sequence::read(stream)?;
    stream.write_all([send.to_le_bytes(), receive.to_le_bytes()].as_flattened())?;
    peer::transfer(stream)
}

/// Where the sequence numbers stand at the client and at the server, once the latter has told.
fn positions(mut stream: &TcpStream) -> io::Result<[Positions; 2]> {
    let mut told = [[0; 4]; 2];
    stream.read_exact(told.as_flattened_mut())?;
    let [send, receive] = told.map(u32::from_le_bytes);
    Ok([sequence::read(stream)?, Positions { send, receive }])
}

#[test]
fn sequence_numbers_may_wrap_on_either_leg_in_either_direction() {
    const NAMES: [&str; 4] = ["client to agent", "agent to client", "server to agent", "agent to server"];
    const MOST: u32 = 16 << 20;
    const LEAST: u32 = 512 << 10;
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen() {
        let forwarding = Forwarding::start_with(&datapath.agent(), tell_and_transfer).unwrap();
        datapath.wait_ready(&forwarding.agent);
        let mut to_find: Vec<&str> = NAMES.to_vec();
        let (start, mut opened) = (Instant::now(), 0);
        // One of 256 connections is close enough; those that are not are closed again.
        forwarding.topology.client.run(|| {
            while !to_find.is_empty() {
                assert!(start.elapsed() < Duration::from_mins(1), "{datapath}: {opened} without {to_find:?}");
                let stream = TcpStream::connect_timeout(&forwarding.address(), TIMEOUT).unwrap();
                stream.set_read_timeout(Some(TIMEOUT)).unwrap();
                stream.set_write_timeout(Some(TIMEOUT)).unwrap();
                opened += 1;
                let [here, there] = positions(&stream).unwrap();
                let numbers = [here.send, here.receive, there.send, there.receive];
                let wraps_soon = |number: u32| (LEAST..MOST).contains(&number.wrapping_neg());
                let wraps: Vec<&str> = NAMES
                    .into_iter()
                    .zip(numbers)
                    .filter(|(_, n)| wraps_soon(*n))
                    .map(|(name, _)| name)
                    .collect();
                if wraps.iter().any(|name| to_find.contains(name)) {
                    to_find.retain(|name| !wraps.contains(name));
                    println!("{datapath}: the {opened}th connection wraps from {wraps:?}: {numbers:?}");
                    let size = u64::from(MOST) + 1_000_000;
                    if let Err(error) = client::transfer(&stream, opened, size, size) {
                        panic!("{datapath}: {wraps:?}, {numbers:?}: {error:#}");
                    }
                }
            }
        });
        let by_kernel = datapath.forwarded(&forwarding.agent).unwrap();
        assert!(by_kernel > 0 || !datapath.is_by_kernel(), "the kernel forwarded nothing");
    }
}

#[test]
fn sequence_numbers_may_wrap_with_any_byte_of_the_client() {
    /// So much that a fast machine comes to a handover too.
    const MUCH: u32 = 8_000_000;
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen() {
        let topology = Topology::new().unwrap();
        let endpoint = topology.backend1_address(ENDPOINT_PORT);
        let server = Server::start(&topology.backend1, endpoint, peer::transfer).unwrap();
        let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
        let agent = datapath.agent().start(&topology.node, &manifests.path()).unwrap();
        datapath.wait_ready(&agent);
        let address = topology.node_address(LISTENER_PORT);
        // The number of the SYN, of the request, of the data before and about a handover, and of the end.
        for before in [
            1,
            2,
            17,
            18,
            1000,
            60_000,
            65_536,
            65_553,
            66_000,
            100_000,
            1_000_000,
            MUCH + 16,
            MUCH + 17,
            MUCH + 18,
        ] {
            let stream = topology.client.run(|| connect_with(address, 0_u32.wrapping_sub(before))).unwrap();
            if let Err(error) = client::transfer(&stream, before.into(), MUCH.into(), 100_000) {
                panic!("{datapath}: wraps after {before} bytes: {error:#}");
            }
        }
        let by_kernel = datapath.forwarded(&agent).unwrap();
        assert!(by_kernel > 0 || !datapath.is_by_kernel(), "the kernel forwarded nothing");
        drop(server);
    }
}

/// Connects with a chosen initial sequence number.
fn connect_with(address: SocketAddr, first: u32) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    sequence::choose(&socket, first)?;
    socket.connect_timeout(&address.into(), TIMEOUT)?;
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // The SYN has taken one number.
    let next = sequence::read(&stream)?.send;
    assert_eq!(next, first.wrapping_add(1), "the kernel chose another number");
    Ok(stream)
}
