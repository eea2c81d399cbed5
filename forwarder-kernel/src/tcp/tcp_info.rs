//! What the kernel tells of a TCP socket.
#![expect(unsafe_code, reason = "options of sockets that no crate offers")]

use std::io;
use std::time::{Duration, Instant};

/// The state of an established connection (`net/tcp_states.h`).
pub const ESTABLISHED: u8 = 1;
const TIME_WAIT: u8 = 6;
/// The state of a closed socket.
pub const CLOSE: u8 = 7;
const CLOSE_WAIT: u8 = 8;
const LAST_ACK: u8 = 9;
const CLOSING: u8 = 11;

/// Whether the peer of a socket in `state` has ended its direction.
pub const fn has_ended(state: u8) -> bool {
    matches!(state, CLOSE_WAIT | LAST_ACK | CLOSING | TIME_WAIT | CLOSE)
}

/// The fields of `struct tcp_info` (`linux/tcp.h`) that are of interest.
pub struct Info {
    /// The state of the connection (`net/tcp_states.h`).
    pub state: u8,
    /// How often something was sent again, and the peer's closed window asked for, in vain and in a row.
    retransmits: u8,
    probes: u8,
    pub(crate) options: u8,
    /// The peer's scale in the low four bits, the own one in the others.
    pub scales: u8,
    pub(crate) segment: u32,
    /// The largest segment that the socket told its peer to send, in bytes.
    pub advertised_segment: u32,
    /// How long ago the peer has last acknowledged something, or again, in milliseconds.
    last_acknowledgement: u32,
    /// The smoothed round trip, in microseconds.
    pub round_trip: u32,
    /// Bytes that were acknowledged by the peer, with SYN where the socket has connected, and with FIN.
    pub acknowledged: u64,
    /// Bytes that were received in order, with FIN.
    pub received: u64,
}

impl Info {
    const RETRANSMITS: usize = 2;
    const PROBES: usize = 3;
    const OPTIONS: usize = 5;
    const SCALES: usize = 6;
    const SEGMENT: usize = 16;
    const LAST_ACKNOWLEDGEMENT: usize = 56;
    const ROUND_TRIP: usize = 68;
    const ADVERTISED_SEGMENT: usize = 84;
    const ACKNOWLEDGED: usize = 120;
    const RECEIVED: usize = 128;
    const LENGTH: usize = 136;

    /// Asks the kernel for them (`TCP_INFO`).
    ///
    /// # Errors
    /// The descriptor is no TCP socket, or the kernel is older than any that is supported.
    pub fn read(fd: libc::c_int) -> io::Result<Self> {
        let bytes: [u8; Self::LENGTH] = get(fd, libc::TCP_INFO)?;
        let long = |at: usize| {
            let mut long = [0; 8];
            long.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(long)
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        Ok(Self {
            state: bytes[0],
            retransmits: bytes[Self::RETRANSMITS],
            probes: bytes[Self::PROBES],
            options: bytes[Self::OPTIONS],
            scales: bytes[Self::SCALES],
            segment: word(Self::SEGMENT),
            advertised_segment: word(Self::ADVERTISED_SEGMENT),
            last_acknowledgement: word(Self::LAST_ACKNOWLEDGEMENT),
            round_trip: word(Self::ROUND_TRIP),
            acknowledged: long(Self::ACKNOWLEDGED),
            received: long(Self::RECEIVED),
        })
    }
}

/// How often a peer is asked in vain before it may be taken for dead, however long it has said nothing.
const LEAST_ATTEMPTS: u8 = 3;

/// Since when the peer of a socket does not answer although something waits for its answer, as seen by who looks now and then.
///
/// The kernel's keepalive does not ask meanwhile (`tcp_keepalive_timer`), and retransmits for a quarter of an hour.
/// `TCP_USER_TIMEOUT` would end connections whose peers are alive and do not read (`tcp_probe_timer`).
#[derive(Clone, Copy, Debug, Default)]
pub struct Silence {
    since: Option<Instant>,
}

impl Silence {
    /// Looks; whether the peer has not answered for `limit`. How long ago it has last acknowledged something says too little: an
    /// idle peer had no reason to.
    pub fn lasts(&mut self, fd: libc::c_int, limit: Duration) -> bool {
        // A socket that cannot be asked is asked again.
        let Ok(info) = Info::read(fd) else { return false };
        let attempts = info.retransmits.max(info.probes);
        if attempts == 0 {
            self.since = None;
            return false;
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        since.elapsed() >= limit
            && attempts >= LEAST_ATTEMPTS
            && Duration::from_millis(info.last_acknowledgement.into()) >= limit
    }
}

/// Bytes that were written to a socket and not acknowledged; an end counts as one.
pub fn unacknowledged(fd: libc::c_int) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the pointer is to an integer, which is what the request writes (`tcp_ioctl`).
    let result = unsafe { libc::ioctl(fd, libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 { Ok(bytes.unsigned_abs()) } else { Err(io::Error::last_os_error()) }
}

/// A plain value that every pattern of bits makes.
pub(crate) trait Plain: Copy {
    const ZERO: Self;
}

impl Plain for u32 {
    const ZERO: Self = 0;
}

impl<const N: usize> Plain for [u8; N] {
    const ZERO: Self = [0; N];
}

pub(crate) fn get<T: Plain>(fd: libc::c_int, option: libc::c_int) -> io::Result<T> {
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

/// Sets an option of level `IPPROTO_TCP`.
///
/// # Errors
/// The kernel refuses.
pub fn set(fd: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to an integer of the length given; the descriptor is open as long as the caller borrows it.
    let result =
        unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, option, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
