//! A read that also tells how much is left, which a short one does not: it stops at urgent data (`tcp_recvmsg_locked`).
#![expect(unsafe_code, reason = "a control message that no crate offers")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::null_mut;

/// `TCP_INQ`, and the kind of its control message, `TCP_CM_INQ` (`linux/tcp.h`, since Linux 4.18).
const TCP_INQ: libc::c_int = 36;
/// Room for one control message with an integer: its header, and the integer, aligned (`CMSG_SPACE`).
const CONTROL_WORDS: usize = 4;

/// Has urgent data stay where it stands in the stream, as an ordinary byte, and each [`receive`] tell what is left. What a
/// listening socket has been told, those that it accepts know.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn prepare(socket: &socket2::Socket) -> io::Result<()> {
    // Else the byte is taken out of the stream, where who reads would not see it, but the sequence numbers count it.
    socket.set_out_of_band_inline(true)?;
    forwarder_kernel::tcp::tcp_info::set(socket.as_raw_fd(), TCP_INQ, 1)
}

/// What a read has brought.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Received {
    /// How many bytes.
    pub(super) bytes: usize,
    /// Whether the socket has no more, and no end to tell; not known means that it may have.
    pub(super) is_empty: bool,
}

/// Reads what is there, up to the length of `buffer`.
pub(super) fn receive(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut control = [0_u64; CONTROL_WORDS];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: a plain structure, for which zeros are valid; the kernel is told of no name.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_name = null_mut();
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = size_of_val(&control) as _;
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the message refers to the buffer and the control words, with their lengths, which outlive the call.
    let read = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_DONTWAIT) };
    let bytes = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has filled the message in; a header lies within the control words, or there is none.
    let left = unsafe {
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        if header.is_null() || (*header).cmsg_level != libc::IPPROTO_TCP || (*header).cmsg_type != TCP_INQ {
            None
        } else {
            Some(libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned())
        }
    };
    Ok(Received { bytes, is_empty: left == Some(0) })
}
