//! Reads the state of a live connection: what it takes to join it with another.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use forwarder_common::translate::NANOSECONDS_PER_TICK;
use socket2::{SockAddr, SockRef};

use crate::clock::monotonic;
use crate::tcp::tcp_info::{self, ESTABLISHED, Info, get, set, unacknowledged};
use crate::tcp::timestamp_clock::tick;

/// How often a consistent snapshot is tried for: bytes may arrive between two system calls.
const ATTEMPTS: usize = 64;

/// The queues that `TCP_REPAIR_QUEUE` chooses from (`linux/tcp.h`).
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;
/// The values of `TCP_REPAIR`; the last one ends it without probing the peer's window.
const REPAIR_ON: libc::c_int = 1;
const REPAIR_OFF_WITHOUT_PROBE: libc::c_int = -1;

/// What `TCP_REPAIR_WINDOW` tells: five words, of which the second is the peer's window (`struct tcp_repair_window`).
const REPAIR_WINDOW_LENGTH: usize = 20;

/// Bits of `tcpi_options`.
const OPTION_TIMESTAMPS: u8 = 1;
const OPTION_SACK: u8 = 2;
const OPTION_ECN: u8 = 8;

/// One of the two connections of a pair, seen from the agent, at one moment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Leg {
    /// The agent's end.
    pub local: SocketAddr,
    /// The other end.
    pub peer: SocketAddr,
    /// The sequence number of the first byte that the agent's socket has sent of the other leg's stream: after what the agent
    /// itself has written first.
    pub first_sent: u32,
    /// The sequence number of the first byte that it has received for the other leg: after what the agent has kept.
    pub first_received: u32,
    /// The sequence number after the last byte that was written to it.
    pub next_sent: u32,
    /// The sequence number of the next byte that it expects.
    pub next_received: u32,
    /// How many bytes it has received for the other leg.
    pub received: u64,
    /// How many bytes it had received before those: [`Relayed::kept`].
    pub kept: u64,
    /// How many bytes of what was written to it have not been acknowledged.
    pub unacknowledged: u32,
    /// How many bytes its peer takes beyond what it has acknowledged.
    pub send_window: u32,
    /// The window scale that the peer has announced.
    pub peer_scale: u8,
    /// The window scale that the agent's socket has announced.
    pub own_scale: u8,
    /// What both have agreed on.
    pub options: LegOptions,
    /// The most payload that the agent's socket puts into one packet, in bytes.
    pub segment: u32,
    /// The most payload that it has asked its peer to put into one packet.
    pub advertised_segment: u32,
    /// The timestamp clock of the agent's socket, in milliseconds, since `clock_time`.
    pub clock: u32,
    /// When `clock` began: `CLOCK_MONOTONIC` in nanoseconds.
    pub clock_time: u64,
}

/// What the agent has done with a leg since it was opened: which of its bytes have a counterpart on the other leg.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Relayed {
    /// Bytes of the other leg that were written to it. What the agent itself wrote before them (such as a PROXY header) does not
    /// count.
    pub written: u64,
    /// Bytes that the agent read first, and kept (such as a PROXY header that was for itself).
    pub kept: u64,
    /// The sequence number of the first byte of `written`, if it was read before.
    pub first_sent: Option<u32>,
}

/// Where the stream begins that arrives on a leg for the other one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Inbound {
    /// The sequence number of its first byte.
    first: u32,
    /// Bytes that the socket had received before.
    kept: u64,
}

/// The options that the two ends of a leg use.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LegOptions {
    /// Timestamps (RFC 7323).
    pub timestamps: bool,
    /// Selective acknowledgements (RFC 2018).
    pub selective: bool,
    /// Explicit congestion notification (RFC 3168).
    pub congestion_marks: bool,
}

impl Leg {
    /// Reads a connected socket. Its timestamp clock is ahead of `CLOCK_MONOTONIC` by `clock_offset` ticks. It sends nothing, and
    /// nothing about the connection changes.
    ///
    /// The number of its first byte should not be read twice: where an acknowledgement arrives at this very moment, the socket takes what it
    /// has not sent yet for sent (`tcp_write_xmit`), and has to find out that it is missing.
    ///
    /// # Errors
    /// One direction of the connection has ended (`NotConnected`), the capability `CAP_NET_ADMIN` is missing, or bytes
    /// arrive too fast for a consistent snapshot (`WouldBlock`).
    pub fn read(socket: impl AsFd, relayed: Relayed, clock_offset: u32) -> io::Result<Self> {
        let Relayed { written, kept, first_sent } = relayed;
        let socket = socket.as_fd();
        let fd = socket.as_raw_fd();
        let address = |address: io::Result<SockAddr>| {
            address?.as_socket().map(unmapped).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
        };
        let (local, peer) = {
            let socket = SockRef::from(&socket);
            (address(socket.local_addr())?, address(socket.peer_addr())?)
        };
        let mut next_sent = first_sent.map(|first| first.wrapping_add(low_half(written)));
        for _ in 0..ATTEMPTS {
            let (before, outstanding) = (Info::read(fd)?, unacknowledged(fd)?);
            let numbers = Numbers::read(socket, &mut next_sent)?;
            let after = Info::read(fd)?;
            // What arrives or is acknowledged meanwhile is of another moment: with the window of before and the acknowledgement of
            // after, the peer would seem to take more than it does, and would for ever be sent what it drops.
            if before.received != after.received || outstanding != unacknowledged(fd)? {
                continue;
            }
            // An end counts among the numbers.
            if after.state != ESTABLISHED {
                return Err(io::ErrorKind::NotConnected.into());
            }
            let has = |bit| after.options & bit != 0;
            let now = monotonic();
            return Ok(Self {
                local,
                peer,
                first_sent: numbers.next_sent.wrapping_sub(low_half(written)),
                first_received: numbers
                    .next_received
                    .wrapping_sub(low_half(after.received.saturating_sub(kept))),
                next_sent: numbers.next_sent,
                next_received: numbers.next_received,
                received: after.received.saturating_sub(kept),
                kept,
                unacknowledged: outstanding,
                send_window: numbers.send_window,
                peer_scale: after.scales & 15,
                own_scale: after.scales >> 4,
                options: LegOptions {
                    timestamps: has(OPTION_TIMESTAMPS),
                    selective: has(OPTION_SACK),
                    congestion_marks: has(OPTION_ECN),
                },
                segment: after.segment,
                advertised_segment: after.advertised_segment,
                clock: tick(now).wrapping_add(clock_offset),
                clock_time: now - now % NANOSECONDS_PER_TICK,
            });
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "bytes arrive too fast for a consistent snapshot"))
    }

    /// Where what arrives on it for the other leg begins.
    pub const fn inbound(&self) -> Inbound {
        Inbound { first: self.first_received, kept: self.kept }
    }
}

impl Inbound {
    /// How many bytes of it `socket` has received.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn received(self, socket: impl AsFd) -> io::Result<u64> {
        let info = Info::read(socket.as_fd().as_raw_fd())?;
        // An end has a number of its own, which is counted too (`tcp_fin`).
        Ok(info.received.saturating_sub(tcp_info::has_ended(info.state).into()).saturating_sub(self.kept))
    }

    /// The number that `socket` expects next.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn next(self, socket: impl AsFd) -> io::Result<u32> {
        let received = Info::read(socket.as_fd().as_raw_fd())?.received;
        Ok(self.first.wrapping_add(low_half(received.saturating_sub(self.kept))))
    }
}

/// What a socket still has to do before it can be taken away.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Remainder {
    /// Bytes and ends that were written to it, and not acknowledged, or received and not read.
    pub is_empty: bool,
    /// Whether its peer has ended its direction: the end may not have been read.
    pub has_ended: bool,
}

/// What `socket` still has to do.
///
/// # Errors
/// The kernel refuses.
pub fn remainder(socket: impl AsFd) -> io::Result<Remainder> {
    let socket = socket.as_fd();
    let fd = socket.as_raw_fd();
    let state = Info::read(fd)?.state;
    Ok(Remainder {
        is_empty: unacknowledged(fd)? == 0 && rustix::io::ioctl_fionread(socket)? == 0,
        has_ended: tcp_info::has_ended(state),
    })
}

/// Makes the close of `socket`, which follows, a silent one: its connection is the kernel's.
///
/// # Errors
/// The kernel refuses.
pub fn silence(socket: impl AsFd) -> io::Result<()> {
    set(socket.as_fd().as_raw_fd(), libc::TCP_REPAIR, REPAIR_ON)?;
    // Gone at once: a child process between fork and exec may hold the descriptor longer than its owner does.
    Ok(rustix::net::connect_unspec(socket)?)
}

/// Sequence numbers are positions modulo 2^32.
#[expect(clippy::cast_possible_truncation, reason = "modulo 2^32")]
fn low_half(position: u64) -> u32 {
    position as u32
}

/// An IPv4 address that a socket of both families shows as one of IPv6.
fn unmapped(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What only a socket under repair tells.
struct Numbers {
    send_window: u32,
    next_sent: u32,
    next_received: u32,
}

impl Numbers {
    /// Reads them, and `next_sent` unless it is known: only this thread writes to the socket, so that it stays what it is.
    fn read(socket: BorrowedFd<'_>, next_sent: &mut Option<u32>) -> io::Result<Self> {
        let fd = socket.as_raw_fd();
        // Repair takes it away (`do_tcp_setsockopt`); without it, the connection would keep a successor from its port.
        let reuses = SockRef::from(&socket).reuse_address()?;
        set(fd, libc::TCP_REPAIR, REPAIR_ON)?;
        let numbers = Self::read_under_repair(fd, next_sent);
        // Whatever happened: a socket under repair sends nothing.
        set(fd, libc::TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)?;
        SockRef::from(&socket).set_reuse_address(reuses)?;
        numbers
    }

    fn read_under_repair(fd: libc::c_int, next_sent: &mut Option<u32>) -> io::Result<Self> {
        set(fd, libc::TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
        let next_received = get(fd, libc::TCP_QUEUE_SEQ)?;
        let window: [u8; REPAIR_WINDOW_LENGTH] = get(fd, libc::TCP_REPAIR_WINDOW)?;
        let send_window = u32::from_ne_bytes([window[4], window[5], window[6], window[7]]);
        let next_sent = if let Some(known) = *next_sent {
            known
        } else {
            // Last, and for no longer than it takes.
            set(fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE)?;
            *next_sent.insert(get(fd, libc::TCP_QUEUE_SEQ)?)
        };
        Ok(Self { send_window, next_sent, next_received })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{Ipv4Addr, TcpListener, TcpStream};

    use forwarder_common::translate::is_before;

    use super::*;

    /// The number up to which the peer takes bytes.
    fn edge(leg: &Leg) -> u32 {
        leg.next_sent.wrapping_sub(leg.unacknowledged).wrapping_add(leg.send_window)
    }

    #[test]
    fn no_snapshot_shows_a_window_beyond_that_of_the_peer() {
        const SENT: [u8; 1000] = [0; 1000];
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var("REQUIRE_NETNS").as_deref() != Ok("1"), "needs root");
            return println!("skipped: needs root");
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // So small that its window does not grow.
        SockRef::from(&listener).set_recv_buffer_size(4096).unwrap();
        for _ in 0..60 {
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (peer, _) = listener.accept().unwrap();
            // It does not read, and acknowledges when its timer fires (`tcp_delack_timer`): at any moment of a snapshot.
            set(peer.as_raw_fd(), libc::TCP_QUICKACK, 0).unwrap();
            stream.write_all(&SENT).unwrap();
            let read = |first_sent| {
                let relayed = Relayed { written: SENT.len() as u64, first_sent, ..Relayed::default() };
                Leg::read(&stream, relayed, 0).unwrap()
            };
            let (mut seen, mut first_sent) = (Vec::new(), None);
            let last = loop {
                let leg = read(first_sent);
                first_sent = Some(leg.first_sent);
                seen.push(leg);
                if leg.unacknowledged == 0 {
                    break read(first_sent);
                }
            };
            for leg in seen {
                assert!(!is_before(edge(&last), edge(&leg)), "{leg:?}, and at last {last:?}");
            }
        }
    }
}
