//! The sequence numbers of live connections, by the kernel's repair mode.
#![expect(unsafe_code, reason = "options of sockets that no crate offers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, RawFd};
use std::time::Duration;

use nix::libc;

/// The queues that `TCP_REPAIR_QUEUE` chooses from (`linux/tcp.h`).
const RECEIVE_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;
/// The values of `TCP_REPAIR`; the last one ends it without probing the peer's window.
const REPAIR_ON: libc::c_int = 1;
const REPAIR_OFF: libc::c_int = 0;
const REPAIR_OFF_WITHOUT_PROBE: libc::c_int = -1;

/// Where both directions of a connection stand.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Positions {
    /// The number of the next byte to send.
    pub send: u32,
    /// The number of the next byte to receive.
    pub receive: u32,
}

/// Reads a connected socket; sends nothing.
///
/// # Errors
/// The kernel refuses.
pub fn read(socket: impl AsFd) -> io::Result<Positions> {
    let fd = socket.as_fd().as_raw_fd();
    let position = |queue| {
        set(fd, libc::TCP_REPAIR_QUEUE, queue)?;
        Ok(get(fd, libc::TCP_QUEUE_SEQ)?.cast_unsigned())
    };
    set(fd, libc::TCP_REPAIR, REPAIR_ON)?;
    let positions: io::Result<[u32; 2]> =
        position(SEND_QUEUE).and_then(|send| Ok([send, position(RECEIVE_QUEUE)?]));
    set(fd, libc::TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)?;
    positions.map(|[send, receive]| Positions { send, receive })
}

/// Makes `first` the initial sequence number of a socket that is not yet connected. 0 leaves the choice to the kernel.
///
/// # Errors
/// The kernel refuses.
pub fn choose(socket: impl AsFd, first: u32) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    set(fd, libc::TCP_REPAIR, REPAIR_ON)?;
    set(fd, libc::TCP_REPAIR_QUEUE, SEND_QUEUE)?;
    // What is chosen stays when repair mode ends (`tcp_v4_connect` makes a number where there is none).
    set(fd, libc::TCP_QUEUE_SEQ, first.cast_signed())?;
    set(fd, libc::TCP_REPAIR, REPAIR_OFF_WITHOUT_PROBE)
}

/// Sends a probe, by which the peer is asked where it stands (`tcp_send_window_probe`): that of keepalive is the same.
///
/// # Errors
/// The kernel refuses.
pub fn probe(socket: impl AsFd) -> io::Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    set(fd, libc::TCP_REPAIR, REPAIR_ON)?;
    set(fd, libc::TCP_REPAIR, REPAIR_OFF)
}

/// How many segments a connected socket has received (`tcpi_segs_in`).
///
/// # Errors
/// The kernel refuses.
pub fn received_segments(socket: impl AsFd) -> io::Result<u32> {
    info_word::<140>(socket)
}

/// How long ago a connected socket has heeded an acknowledgement (`tcpi_last_ack_recv`): not one that is older than another.
///
/// # Errors
/// The kernel refuses.
pub fn since_acknowledgement(socket: impl AsFd) -> io::Result<Duration> {
    info_word::<56>(socket).map(|milliseconds| Duration::from_millis(milliseconds.into()))
}

/// Whether both ends of a connected socket have agreed on timestamps.
///
/// # Errors
/// The kernel refuses.
pub fn has_timestamps(socket: impl AsFd) -> io::Result<bool> {
    /// `tcpi_options` behind `tcpi_backoff`, and its bit `TCPI_OPT_TIMESTAMPS` (`linux/tcp.h`).
    const TIMESTAMPS: u8 = 1;
    let [_, options, ..] = info_word::<4>(socket)?.to_ne_bytes();
    Ok(options & TIMESTAMPS != 0)
}

/// A word of `struct tcp_info`.
fn info_word<const OFFSET: usize>(socket: impl AsFd) -> io::Result<u32> {
    let mut info = [0_u8; 144];
    let mut length = libc::socklen_t::try_from(info.len()).expect("a structure is small");
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer is to as many bytes as the length says, which the kernel does not exceed.
    let result = unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let bytes = info[OFFSET..].first_chunk().expect("the array is that long");
    Ok(u32::from_ne_bytes(*bytes))
}

/// How many bytes of a connected socket have not been acknowledged (`SIOCOUTQ`).
///
/// # Errors
/// The kernel refuses.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<i32> {
    /// `SIOCOUTQ` (`linux/sockios.h`).
    const UNACKNOWLEDGED: rustix::ioctl::Opcode = 0x5411;
    // SAFETY: the request writes one integer (`tcp_ioctl`).
    let left = unsafe { rustix::ioctl::ioctl(socket, rustix::ioctl::Getter::<UNACKNOWLEDGED, i32>::new()) };
    Ok(left?)
}

fn set(fd: RawFd, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&value)).expect("an integer is small");
    // SAFETY: the pointer is to an integer of the length that is given, and the kernel only reads it.
    let result =
        unsafe { libc::setsockopt(fd, libc::IPPROTO_TCP, option, (&raw const value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn get(fd: RawFd, option: libc::c_int) -> io::Result<libc::c_int> {
    let mut value: libc::c_int = 0;
    let mut length = libc::socklen_t::try_from(size_of_val(&value)).expect("an integer is small");
    // SAFETY: the pointer is to an integer of the length that is given, which the kernel does not exceed.
    let result =
        unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, option, (&raw mut value).cast(), &raw mut length) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}
