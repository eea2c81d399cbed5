//! Which interface the packets to a peer leave by, as the kernel routes them.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::Mutex;

use rustix::io::Errno;

use crate::net::netlink::NetlinkSocket;
use forwarder_runtime::lock::lock;

mod changes;
mod message;

pub use self::changes::watch;

/// How the packets to a peer leave.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ResolvedRoute {
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
    #[error("the kernel has not answered")]
    NoAnswer,
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
    channel: Mutex<NetlinkSocket>,
}

impl Routes {
    /// Opens a socket to the kernel; needs no privilege.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> Result<Self, RouteError> {
        let channel =
            NetlinkSocket::open(None).map_err(|errno| RouteError::Socket { source: errno.into() })?;
        Ok(Self { channel: Mutex::new(channel) })
    }

    /// How the TCP packets from `local`, an address of the node or an unspecified one, to `peer` leave. IPv4 addresses may be
    /// mapped into IPv6.
    ///
    /// Blocks for some microseconds: the kernel answers without waiting for changes of its configuration
    /// (`RTNL_FLAG_DOIT_UNLOCKED`).
    ///
    /// # Errors
    /// There is no route, or the kernel does not tell it.
    pub fn egress(&self, local: IpAddr, peer: IpAddr) -> Result<ResolvedRoute, RouteError> {
        let (local, peer) = (local.to_canonical(), peer.to_canonical());
        let lookup = || {
            if local.is_ipv4() != peer.is_ipv4() {
                return Err(LookupError::Families);
            }
            if matches!(peer, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
                return Err(LookupError::LinkLocal);
            }
            // Whatever a panic left behind: each question has a number of its own.
            let mut channel = lock(&self.channel);
            let answer = channel.ask(
                |question, sequence| message::write_question(question, sequence, local, peer),
                |answer, sequence| message::read_answer(answer, sequence, peer).transpose(),
            );
            answer.unwrap_or_else(|errno| {
                Err(match errno {
                    Errno::AGAIN => LookupError::NoAnswer,
                    errno => LookupError::Exchange { source: errno.into() },
                })
            })
        };
        lookup().map_err(|source| RouteError::Lookup { local, peer, source })
    }
}

/// Routes as they were a moment ago, for whoever needs many at once.
#[derive(Debug, Default)]
pub struct KnownRoutes(HashMap<(IpAddr, IpAddr), Option<ResolvedRoute>>);

impl KnownRoutes {
    /// [`Routes::egress`]; `None` where there is no route.
    pub(crate) fn egress(&mut self, routes: &Routes, local: IpAddr, peer: IpAddr) -> Option<ResolvedRoute> {
        *self.0.entry((local, peer)).or_insert_with(|| routes.egress(local, peer).ok())
    }
}

#[cfg(test)]
mod tests;
