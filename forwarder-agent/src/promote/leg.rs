//! Reads the state of a live connection: what it takes to join it with another.
#![expect(unsafe_code, reason = "options of sockets that no crate offers")]

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use rustix::time::{ClockId, clock_gettime};
use socket2::{SockAddr, SockRef};

/// How often a consistent snapshot is tried for: bytes may arrive between two system calls.
const ATTEMPTS: usize = 64;

/// The queues that `TCP_REPAIR_QUEUE` chooses from (`linux/tcp.h`).
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;
/// The values of `TCP_REPAIR`; the last one ends it without probing the peer's window.
const REPAIR_ON: libc::c_int = 1;
const REPAIR_OFF_WITHOUT_PROBE: libc::c_int = -1;

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
    /// The sequence number of the first byte that the agent's socket has sent.
    pub first_sent: u32,
    /// The sequence number of the first byte that it has received.
    pub first_received: u32,
    /// The window scale that the peer has announced.
    pub peer_scale: u8,
    /// The window scale that the agent's socket has announced.
    pub own_scale: u8,
    /// What both have agreed on.
    pub options: LegOptions,
    /// The timestamp clock of the agent's socket, in milliseconds, at `clock_time`.
    pub clock: u32,
    /// When `clock` was read: `CLOCK_MONOTONIC` in nanoseconds.
    pub clock_time: u64,
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
    /// Reads a connected socket, to which `written` bytes have been written since it was opened. It sends nothing, and
    /// nothing about the connection changes.
    ///
    /// # Errors
    /// The socket is not an established TCP connection, the capability `CAP_NET_ADMIN` is missing, or bytes arrive too
    /// fast for a consistent snapshot.
    pub fn read(socket: impl AsFd, written: u64) -> io::Result<Self> {
        let socket = socket.as_fd();
        let fd = socket.as_raw_fd();
        let address = |address: io::Result<SockAddr>| {
            address?.as_socket().map(unmapped).ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))
        };
        let (local, peer) = {
            let socket = SockRef::from(&socket);
            (address(socket.local_addr())?, address(socket.peer_addr())?)
        };
        for _ in 0..ATTEMPTS {
            let before = Info::read(fd)?;
            let numbers = Numbers::read(fd)?;
            let after = Info::read(fd)?;
            if before.received != after.received {
                continue;
            }
            let has = |bit| after.options & bit != 0;
            return Ok(Self {
                local,
                peer,
                first_sent: numbers.next_sent.wrapping_sub(low_half(written)),
                first_received: numbers.next_received.wrapping_sub(low_half(after.received)),
                peer_scale: after.scales & 15,
                own_scale: after.scales >> 4,
                options: LegOptions {
                    timestamps: has(OPTION_TIMESTAMPS),
                    selective: has(OPTION_SACK),
                    congestion_marks: has(OPTION_ECN),
                },
                clock: numbers.clock,
                clock_time: numbers.clock_time,
            });
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "bytes arrive too fast for a consistent snapshot"))
    }
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

/// The fields of `struct tcp_info` (`linux/tcp.h`) that are of interest.
struct Info {
    options: u8,
    /// The peer's scale in the low four bits, the own one in the others.
    scales: u8,
    received: u64,
}

impl Info {
    const OPTIONS: usize = 5;
    const SCALES: usize = 6;
    const RECEIVED: usize = 128;
    const LENGTH: usize = 136;

    fn read(fd: libc::c_int) -> io::Result<Self> {
        let bytes: [u8; Self::LENGTH] = get(fd, libc::TCP_INFO)?;
        let mut received = [0; 8];
        received.copy_from_slice(&bytes[Self::RECEIVED..Self::LENGTH]);
        Ok(Self {
            options: bytes[Self::OPTIONS],
            scales: bytes[Self::SCALES],
            received: u64::from_ne_bytes(received),
        })
    }
}

/// What only a socket under repair tells.
struct Numbers {
    next_sent: u32,
    next_received: u32,
    clock: u32,
    clock_time: u64,
}

impl Numbers {
    fn read(fd: libc::c_int) -> io::Result<Self> {
        set(fd, libc::TCP_REPAIR, REPAIR_ON)?;
        let numbers = Self::read_under_repair(fd);
        // Whatever happened: a socket under repair sends nothing.
        set(fd, libc::TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)?;
        numbers
    }

    fn read_under_repair(fd: libc::c_int) -> io::Result<Self> {
        set(fd, libc::TCP_REPAIR_QUEUE, RECEIVE_QUEUE)?;
        let next_received = get(fd, libc::TCP_QUEUE_SEQ)?;
        set(fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE)?;
        let next_sent = get(fd, libc::TCP_QUEUE_SEQ)?;
        let clock = get(fd, libc::TCP_TIMESTAMP)?;
        let now = clock_gettime(ClockId::Monotonic);
        let clock_time = u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000
            + u64::try_from(now.tv_nsec).unwrap_or_default();
        Ok(Self { next_sent, next_received, clock, clock_time })
    }
}

/// A plain value that every pattern of bits makes.
trait Plain: Copy {
    const ZERO: Self;
}

impl Plain for u32 {
    const ZERO: Self = 0;
}

impl<const N: usize> Plain for [u8; N] {
    const ZERO: Self = [0; N];
}

fn get<T: Plain>(fd: libc::c_int, option: libc::c_int) -> io::Result<T> {
    let mut value = T::ZERO;
    let mut length = libc::socklen_t::try_from(size_of::<T>()).map_err(io::Error::other)?;
    // SAFETY: the pointers are to a value of the length given, of which any bits are valid, and to that length; the
    // descriptor is open as long as the caller borrows it.
    let result =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, option, (&raw mut value).cast(), &raw mut length) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if usize::try_from(length).is_ok_and(|length| length < size_of::<T>()) {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            "the kernel tells less of a socket than needed",
        ));
    }
    Ok(value)
}

fn set(fd: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to an integer of the length given; the descriptor is open as long as the caller borrows it.
    let result =
        unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, option, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
