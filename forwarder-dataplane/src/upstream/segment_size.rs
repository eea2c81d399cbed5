//! The segment size that sockets announce, so that the packets of either end of a pair fit the other leg.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::Socket;

/// Bytes of the longer IP header and of the TCP header: what a packet holds beside a segment.
const HEADERS: u32 = 40 + 20;
/// Less no socket accepts (`TCP_MIN_MSS`).
const LEAST: u32 = 88;

/// The largest packet that every leg takes, where legs differ: kept current by who follows the interfaces, read for each
/// new socket.
#[derive(Debug, Default)]
pub struct SegmentSize(AtomicU32);

impl SegmentSize {
    /// Sets the MTU that every leg takes; `None` where they do not differ.
    pub fn set_mtu(&self, mtu: Option<u32>) {
        let size = mtu.map_or(0, |mtu| mtu.saturating_sub(HEADERS).max(LEAST));
        self.0.store(size, Ordering::Relaxed);
    }

    /// Has a socket announce it, and send no larger segments, from its handshake on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn apply(&self, socket: &Socket) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            size => socket.set_tcp_mss(size),
        }
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Type};

    use super::*;

    #[test]
    fn a_socket_announces_what_fits_the_smallest_leg() {
        let socket = || Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let size = SegmentSize::default();
        let untouched = socket();
        let before = untouched.tcp_mss().unwrap();
        size.apply(&untouched).unwrap();
        assert_eq!(untouched.tcp_mss().unwrap(), before);
        size.set_mtu(Some(1_400));
        let socket = socket();
        size.apply(&socket).unwrap();
        assert_eq!(size.0.load(Ordering::Relaxed), 1_340);
    }
}
