//! What real kernels make of the packets: they need root.
#![expect(unsafe_code, reason = "what a socket tells of itself")]

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use super::*;
use crate::net::namespaces::Namespace;
use crate::tcp::leg::{Leg, LegOptions, Relayed, remainder, silence};

const TIMEOUT: Duration = Duration::from_secs(20);

/// The addresses that connections are tried with.
#[derive(Clone, Copy, Debug)]
enum Family {
    V4,
    V6,
    LinkLocal,
    /// IPv4, of which the node's sockets show the addresses mapped into IPv6.
    Mapped,
}

const FAMILIES: [Family; 4] = [Family::V4, Family::V6, Family::LinkLocal, Family::Mapped];

impl Family {
    /// Of the node and of the peer, with the length of the prefix.
    fn addresses(self) -> ([&'static str; 2], u8) {
        match self {
            Self::V4 | Self::Mapped => (["10.9.1.1", "10.9.1.2"], 24),
            Self::V6 => (["fd00:a::1", "fd00:a::2"], 64),
            Self::LinkLocal => (["fe80::1", "fe80::2"], 64),
        }
    }
}

/// A connection between a node and its peer, in namespaces of their own. Both have sent a few bytes, nothing is on its way.
struct Connection {
    node: Namespace,
    peer: Namespace,
    /// The node's socket.
    accepted: TcpStream,
    /// The peer's socket.
    connected: TcpStream,
    /// What the node knows.
    leg: Leg,
    segments: SegmentSocket,
}

/// What each end says before anything else.
const WORDS: [&[u8]; 2] = [b"from the node", b"from the peer, at more length"];

impl Connection {
    fn open(family: Family) -> Option<Self> {
        let (node, peer) = (Namespace::new()?, Namespace::new()?);
        node.join(&peer);
        let (addresses, length) = family.addresses();
        for (namespace, address) in [(&node, addresses[0]), (&peer, addresses[1])] {
            namespace.hold(&format!("{address}/{length}"), "eth0");
        }
        let bound = match family {
            Family::V4 | Family::V6 => SocketAddr::new(addresses[0].parse().unwrap(), 0),
            Family::LinkLocal => {
                SocketAddrV6::new(addresses[0].parse().unwrap(), 0, 0, node.index("eth0")).into()
            }
            Family::Mapped => "[::]:0".parse().unwrap(),
        };
        let listener = node.run(|| TcpListener::bind(bound).unwrap());
        let port = listener.local_addr().unwrap().port();
        let listening = match family {
            Family::LinkLocal => {
                SocketAddrV6::new(addresses[0].parse().unwrap(), port, 0, peer.index("eth0")).into()
            }
            _ => SocketAddr::new(addresses[0].parse().unwrap(), port),
        };
        let mut connected = peer.run(|| TcpStream::connect_timeout(&listening, TIMEOUT).unwrap());
        let mut accepted = listener.accept().unwrap().0;
        for stream in [&accepted, &connected] {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        }
        accepted.write_all(WORDS[0]).unwrap();
        connected.write_all(WORDS[1]).unwrap();
        for (stream, word) in [(&mut accepted, WORDS[1]), (&mut connected, WORDS[0])] {
            let mut read = vec![0; word.len()];
            stream.read_exact(&mut read).unwrap();
            assert_eq!(read, word);
        }
        wait_until("all is acknowledged", || {
            remainder(&accepted).unwrap().is_empty && remainder(&connected).unwrap().is_empty
        });
        let clock = crate::tcp::timestamp_clock::wait(&accepted);
        let relayed = Relayed { written: WORDS[0].len() as u64, ..Relayed::default() };
        let leg = Leg::read(&accepted, relayed, clock).unwrap();
        let segments = node.run(|| SegmentSocket::open().unwrap());
        Some(Self { node, peer, accepted, connected, leg, segments })
    }

    /// What the node's socket would send next, without payload.
    fn bare(&self, kind: BareKind) -> Bare {
        let LegOptions { timestamps, .. } = self.leg.options;
        Bare {
            from: self.accepted.local_addr().unwrap(),
            to: self.accepted.peer_addr().unwrap(),
            sequence: self.leg.first_sent.wrapping_add(u32::try_from(WORDS[0].len()).unwrap()),
            acknowledgement: self.leg.first_received.wrapping_add(u32::try_from(WORDS[1].len()).unwrap()),
            window: 500,
            kind,
            timestamps: timestamps.then_some(Timestamps { value: self.leg.clock, echo: 0 }),
        }
    }

    /// Destroys the node's socket; the peer hears nothing.
    fn forget(self) -> Orphan {
        let Self { node, peer, accepted, connected, segments, .. } = self;
        silence(&accepted).unwrap();
        // To close it would not do: the processes that other tests start hold copies of it until they execute. Under
        // repair, this sends nothing either (`tcp_disconnect`).
        rustix::net::connect_unspec(&accepted).unwrap();
        Orphan { connected, segments, node, _peer: peer }
    }
}

/// A connection of which the node has no socket any more.
struct Orphan {
    connected: TcpStream,
    segments: SegmentSocket,
    node: Namespace,
    _peer: Namespace,
}

impl Orphan {
    /// Waits until the peer's socket reads what ends it.
    fn end(&mut self) -> io::Result<usize> {
        self.connected.read(&mut [0])
    }
}

#[track_caller]
fn wait_until(what: impl fmt::Display, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !holds() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::yield_now();
    }
}

#[track_caller]
fn assert_reset(end: io::Result<usize>, family: Family) {
    let error = end.expect_err("it ends");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{family:?}: {error}");
}

/// A field of `struct tcp_info` (`linux/tcp.h`), by its offset.
const SEGMENTS_SENT: usize = 136;

fn info(socket: &TcpStream, field: usize) -> u32 {
    let mut info = [0_u8; 144];
    let mut length = libc::socklen_t::try_from(info.len()).unwrap();
    // SAFETY: the pointers are to an array of the length given, of which any bytes are valid, and to that length.
    let result = unsafe {
        let info = info.as_mut_ptr().cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info, &raw mut length)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    u32::from_ne_bytes(info[field..field + 4].try_into().unwrap())
}

#[test]
fn a_reset_with_the_expected_number_ends_the_connection() {
    for family in FAMILIES {
        let Some(connection) = Connection::open(family) else { return };
        let reset = connection.bare(BareKind::Reset);
        let mut orphan = connection.forget();
        let before = info(&orphan.connected, SEGMENTS_SENT);
        orphan.segments.send(&reset).unwrap();
        assert_reset(orphan.end(), family);
        assert_eq!(info(&orphan.connected, SEGMENTS_SENT), before, "{family:?}: no challenge");
    }
}

#[test]
fn a_reset_without_timestamps_ends_the_connection() {
    for family in FAMILIES {
        let Some(connection) = Connection::open(family) else { return };
        let reset = Bare { timestamps: None, ..connection.bare(BareKind::Reset) };
        let mut orphan = connection.forget();
        orphan.segments.send(&reset).unwrap();
        assert_reset(orphan.end(), family);
    }
}

#[test]
fn a_reset_within_the_window_ends_the_connection_by_a_challenge() {
    for family in FAMILIES {
        let Some(connection) = Connection::open(family) else { return };
        let reset = connection.bare(BareKind::Reset);
        let mut orphan = connection.forget();
        let before = info(&orphan.connected, SEGMENTS_SENT);
        orphan.segments.send(&Bare { sequence: reset.sequence.wrapping_add(1000), ..reset }).unwrap();
        // The node's kernel has no socket for the challenge, and resets.
        assert_reset(orphan.end(), family);
        assert_eq!(info(&orphan.connected, SEGMENTS_SENT), before + 1, "{family:?}: the challenge");
    }
}

#[test]
fn a_probe_is_answered_and_does_no_harm() {
    for family in FAMILIES {
        let Some(mut connection) = Connection::open(family) else { return };
        let ack = connection.bare(BareKind::Probe);
        let before = info(&connection.connected, SEGMENTS_SENT);
        connection.segments.send(&Bare { sequence: ack.sequence.wrapping_sub(1), ..ack }).unwrap();
        wait_until(format_args!("{family:?}: an answer"), || {
            info(&connection.connected, SEGMENTS_SENT) > before
        });
        connection.accepted.write_all(b"more").unwrap();
        let mut read = [0; 4];
        connection.connected.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"more");
    }
}

#[test]
fn the_answer_to_a_probe_is_reset_where_no_socket_is_left() {
    for family in FAMILIES {
        let Some(connection) = Connection::open(family) else { return };
        let ack = connection.bare(BareKind::Probe);
        let mut orphan = connection.forget();
        let before = info(&orphan.connected, SEGMENTS_SENT);
        orphan.segments.send(&Bare { sequence: ack.sequence.wrapping_sub(1), ..ack }).unwrap();
        assert_reset(orphan.end(), family);
        assert_eq!(info(&orphan.connected, SEGMENTS_SENT), before + 1, "{family:?}: the answer");
    }
}

#[test]
fn an_address_that_the_node_has_lost_still_speaks() {
    for family in [Family::V4, Family::V6] {
        let Some(connection) = Connection::open(family) else { return };
        let reset = connection.bare(BareKind::Reset);
        let ([own, _], length) = family.addresses();
        let other = own.replace("::1", "::3").replace("1.1", "1.3");
        connection.node.hold(&format!("{other}/{length}"), "eth0");
        connection.node.ip(&format!("address delete {own}/{length} dev eth0"));
        if matches!(family, Family::V4) {
            // With the first address of a network, its others have gone.
            connection.node.hold(&format!("{other}/{length}"), "eth0");
        }
        let mut orphan = connection.forget();
        orphan.segments.send(&reset).unwrap();
        assert_reset(orphan.end(), family);
    }
}

#[test]
fn the_rule_for_the_source_is_obeyed() {
    for family in [Family::V4, Family::V6] {
        let Some(connection) = Connection::open(family) else { return };
        let reset = connection.bare(BareKind::Reset);
        let [own, peer] = family.addresses().0;
        let (version, bits) = if own.contains(':') { ("-6", 128) } else { ("-4", 32) };
        // What has no source yet, or another one, leads nowhere.
        connection.node.ip(&format!("{version} route add unreachable {peer}/{bits} metric 1"));
        connection.node.ip(&format!("{version} route add {peer}/{bits} dev eth0 table 7"));
        let mut orphan = connection.forget();
        let error = orphan.segments.send(&reset).unwrap_err();
        let told = error.to_string();
        assert!(
            told.starts_with(&format!("cannot send a reset from {} to {}: ", reset.from, reset.to)),
            "{told}"
        );
        orphan.node.ip(&format!("{version} rule add from {own} lookup 7"));
        orphan.segments.send(&reset).unwrap();
        assert_reset(orphan.end(), family);
    }
}

#[test]
fn the_missing_capability_is_named() {
    use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
    let Some(node) = Namespace::new() else { return };
    let error = node.run(|| {
        // Of this thread alone.
        let held = capabilities(None).unwrap();
        let effective = held.effective - CapabilitySet::NET_RAW;
        set_capabilities(None, CapabilitySets { effective, ..held }).unwrap();
        SegmentSocket::open().unwrap_err()
    });
    assert_eq!(error.to_string(), "cannot open a raw IPv4 socket: the capability CAP_NET_RAW is missing");
}
