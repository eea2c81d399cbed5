//! What the close of a connection's socket says to its peer.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::SockRef;

/// Has every close of a socket reset its peer (`SO_LINGER` with no time), also the close that the kernel does for a process that was
/// killed: a plain close would send a FIN, by which a cut stream looks whole. What a listening socket has been told, those that it
/// accepts know. [`deliver_on_close`] takes it back.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn reset_on_close(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))
}

/// Lets a socket, which is closed next, deliver what it still has: both directions of its connection have ended.
pub(crate) fn deliver_on_close(socket: impl AsFd) {
    // Fails only on a socket that is gone already.
    let _ = SockRef::from(&socket).set_linger(None);
}
