//! Which interface the packets to a peer leave by, as the kernel routes them.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

mod changes;
mod message;

pub use self::changes::watch;

/// How long to wait for the kernel's answer, which is there when the question has been sent.
const PATIENCE: Duration = Duration::from_secs(1);

/// Bytes of the longest answer that is understood. That on a plain route has some 100, each encapsulation adds some.
const ANSWER: usize = 4096;

/// How the packets to a peer leave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Egress {
    /// The index of the interface that they leave by: that of `lo` for an address of the node.
    pub interface: u32,
    /// The neighbour that they are handed to there: the peer itself, or the gateway towards it.
    pub next_hop: IpAddr,
    /// Whether the peer's address is one of the node's own.
    pub is_local: bool,
    /// The path MTU in bytes, where the route has one of its own, set or learnt; otherwise the interface's holds.
    pub mtu: Option<u32>,
}

/// Why a route is not known.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The socket to the kernel cannot be opened.
    #[error("cannot open a netlink socket: {source}")]
    Socket {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// There is no route between two addresses, or none is known.
    #[error("cannot find the route from {local} to {peer}: {source}")]
    Lookup {
        /// The node's address.
        local: IpAddr,
        /// The peer's address.
        peer: IpAddr,
        /// The reason.
        #[source]
        source: LookupError,
    },
    /// Changes are no longer seen.
    #[error("cannot watch the routes: {source}")]
    Watch {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// Why the route between two addresses is not known.
#[derive(Debug, thiserror::Error)]
pub enum LookupError {
    /// One address is of IPv4, the other of IPv6.
    #[error("the addresses are of different families")]
    Families,
    /// The peer's address means another host on each link.
    #[error("the interface of a link-local address is its scope; no route tells it")]
    LinkLocal,
    /// The kernel cannot be asked.
    #[error("the netlink socket failed: {source}")]
    Exchange {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel has not answered.
    #[error("no answer from the kernel within {} ms", .within.as_millis())]
    TimedOut {
        /// How long it was waited for.
        within: Duration,
    },
    /// The kernel has no such route, or refuses to use it: `ENETUNREACH`, `EHOSTUNREACH`, `EACCES`, and `EINVAL` for a
    /// black hole. An IPv4 source that the node does not hold is refused as well (`ip_route_output_key_hash_rcu`).
    #[error("{source}")]
    Refused {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The route leads to no single host.
    #[error("a route of type {kind} leads to no single host")]
    Kind {
        /// The type: `RTN_BROADCAST`, `RTN_MULTICAST` and others.
        kind: u8,
    },
    /// The answer cannot be understood.
    #[error("malformed answer from the kernel: {what}")]
    Malformed {
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Asks the kernel for routes, in the network namespace in which it was opened.
#[derive(Debug)]
pub struct Routes {
    exchange: Mutex<Exchange>,
}

/// One question at a time: a question and its answer must follow each other on the socket.
#[derive(Debug)]
struct Exchange {
    socket: OwnedFd,
    /// The number of the last question.
    sequence: u32,
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl Routes {
    /// Opens a socket to the kernel; needs no privilege.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> Result<Self, RouteError> {
        let socket = open_socket().map_err(|errno| RouteError::Socket { source: errno.into() })?;
        let exchange = Exchange { socket, sequence: 0, question: Vec::new(), answer: vec![0; ANSWER] };
        Ok(Self { exchange: Mutex::new(exchange) })
    }

    /// How the TCP packets from `local`, an address of the node or an unspecified one, to `peer` leave. IPv4 addresses may be
    /// mapped into IPv6.
    ///
    /// Blocks for some microseconds: the kernel answers without waiting for changes of its configuration
    /// (`RTNL_FLAG_DOIT_UNLOCKED`).
    ///
    /// # Errors
    /// There is no route, or the kernel does not tell it.
    pub fn egress(&self, local: IpAddr, peer: IpAddr) -> Result<Egress, RouteError> {
        let (local, peer) = (local.to_canonical(), peer.to_canonical());
        let lookup = || {
            if local.is_ipv4() != peer.is_ipv4() {
                return Err(LookupError::Families);
            }
            if matches!(peer, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
                return Err(LookupError::LinkLocal);
            }
            // Whatever a panic left behind: each question has a number of its own.
            self.exchange.lock().unwrap_or_else(PoisonError::into_inner).ask(local, peer)
        };
        lookup().map_err(|source| RouteError::Lookup { local, peer, source })
    }
}

impl Exchange {
    fn ask(&mut self, local: IpAddr, peer: IpAddr) -> Result<Egress, LookupError> {
        let failed = |errno: Errno| LookupError::Exchange { source: errno.into() };
        self.sequence = self.sequence.wrapping_add(1);
        message::write_question(&mut self.question, self.sequence, local, peer);
        // A netlink socket that is not connected sends to the kernel.
        let sent =
            rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &self.question, SendFlags::empty()));
        sent.map_err(failed)?;
        loop {
            let received = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, self.answer.as_mut_slice(), RecvFlags::empty())
            });
            let length = match received {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Err(LookupError::TimedOut { within: PATIENCE }),
                Err(errno) => return Err(failed(errno)),
            };
            let answer = self.answer.get(..length).unwrap_or_default();
            // What was waited for in vain may come later: then it is passed over.
            if let Some(egress) = message::read_answer(answer, self.sequence, peer)? {
                return Ok(egress);
            }
        }
    }
}

fn open_socket() -> rustix::io::Result<OwnedFd> {
    // Without a protocol: `NETLINK_ROUTE` is 0.
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
    set_socket_timeout(&socket, Timeout::Send, Some(PATIENCE))?;
    Ok(socket)
}

#[cfg(test)]
mod tests;
