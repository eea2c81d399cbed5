//! TCP segments without payload that the agent sends to either end of connections whose sockets no longer exist.

use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};

use forwarder_common::translate::Timestamps;

mod encoding;
mod link;
mod socket;

pub use self::socket::SegmentSocket;

/// A TCP segment without payload.
///
/// The numbers are in the terms of the one that it is sent to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Bare {
    /// The end in whose name it is sent.
    pub from: SocketAddr,
    /// The end that it is sent to, of the same family; an IPv4 address may be mapped into IPv6.
    pub to: SocketAddr,
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number.
    pub acknowledgement: u32,
    /// The window, as it stands in the header: unscaled.
    pub window: u16,
    /// What it is sent for.
    pub kind: BareKind,
    /// The timestamps (RFC 7323), if the connection uses them.
    pub timestamps: Option<Timestamps>,
}

/// What a segment without payload is sent for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum BareKind {
    /// RST and ACK: ends the connection. `sequence` is the number that the receiver expects next; it answers another
    /// one within its window with a challenge (RFC 5961, 3), and ignores one outside.
    Reset,
    /// ACK alone: a keepalive. With the number before the one that the receiver expects next as `sequence`, the receiver
    /// answers with an acknowledgement (RFC 9293, 3.8.4), twice a second at most (`tcp_invalid_ratelimit`).
    Probe,
}

/// Why a packet is not sent.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    /// One end has an IPv4 address, the other an IPv6 address.
    #[error("no packet leads from {from} to {to}: the addresses are of different families")]
    Families {
        /// The one end.
        from: SocketAddr,
        /// The other end.
        to: SocketAddr,
    },
    /// The privilege to open raw sockets is missing.
    #[error("cannot open a raw {family} socket: the capability CAP_NET_RAW is missing")]
    Privilege {
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// A raw socket cannot be opened.
    #[error("cannot open a raw {family} socket: {source}")]
    Open {
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The node has no IPv6.
    #[error("cannot send to {to}: the kernel has no IPv6")]
    NoIpv6 {
        /// The end that was to receive it.
        to: SocketAddr,
    },
    /// The kernel does not send a packet: there is no route, or too much waits to be sent (`EAGAIN`, `ENOBUFS`).
    #[error("cannot send a {what} from {from} to {to}: {source}")]
    Send {
        /// What was to be sent.
        what: &'static str,
        /// In whose name.
        from: SocketAddr,
        /// The end that was to receive it.
        to: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

impl Bare {
    /// The packet, from the IP header on.
    ///
    /// # Errors
    /// The ends are of different families.
    pub fn encode(&self) -> Result<Vec<u8>, SegmentError> {
        Ok(encoding::bare(&Ends::of(self.from, self.to)?, self))
    }

    fn what(&self) -> &'static str {
        match self.kind {
            BareKind::Reset => "reset",
            BareKind::Probe => "probe",
        }
    }
}

/// Two ends of the same family.
#[derive(Clone, Copy)]
enum Ends {
    V4 { from: SocketAddrV4, to: SocketAddrV4 },
    V6 { from: SocketAddrV6, to: SocketAddrV6 },
}

impl Ends {
    fn of(from: SocketAddr, to: SocketAddr) -> Result<Self, SegmentError> {
        match (unmapped(from), unmapped(to)) {
            (SocketAddr::V4(from), SocketAddr::V4(to)) => Ok(Self::V4 { from, to }),
            (SocketAddr::V6(from), SocketAddr::V6(to)) => Ok(Self::V6 { from, to }),
            _ => Err(SegmentError::Families { from, to }),
        }
    }
}

/// An IPv4 address that is mapped into IPv6 as one of IPv4; all others keep their scope.
fn unmapped(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
            Some(ip) => SocketAddrV4::new(ip, v6.port()).into(),
            None => address,
        },
        SocketAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod live_tests;
#[cfg(test)]
mod tests;
