//! The sockets that packets with their headers are written to.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};

use forwarder_common::flow::AGENT_PRIORITY;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrLike, sendmsg};
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use super::link::LinkSocket;
use super::{Bare, Ends, SegmentError, encoding};
use crate::net::egress_path::{EgressPath, Via};

/// Sends packets in the name of connections, in the network namespace in which it was opened.
///
/// They take the way that the connections' own would take: by the routes, the rules for their source among them, and
/// through the netfilter hooks and classifiers of what the node sends.
#[derive(Debug)]
pub struct SegmentSocket {
    ipv4: Socket,
    /// None where the kernel has no IPv6.
    ipv6: Option<Socket>,
    /// None where the kernel has no packet sockets.
    link: Option<LinkSocket>,
}

impl SegmentSocket {
    /// Opens raw sockets of both families.
    ///
    /// # Errors
    /// The capability `CAP_NET_RAW` is missing, or the kernel refuses.
    pub fn open() -> Result<Self, SegmentError> {
        let ipv4 = open(Domain::IPV4).map_err(|source| refused("IPv4", source))?;
        let ipv6 = match open(Domain::IPV6) {
            Ok(socket) => Some(socket),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::AFNOSUPPORT) => None,
            Err(source) => return Err(refused("IPv6", source)),
        };
        let link = match LinkSocket::open() {
            Ok(link) => Some(link),
            Err(error) => {
                tracing::debug!(%error, "cannot open a packet socket: segments that the agent sends for offloaded connections pass through netfilter");
                None
            }
        };
        Ok(Self { ipv4, ipv6, link })
    }

    /// Sends a segment; does not wait.
    ///
    /// # Errors
    /// The ends are of different families, or the kernel does not send it.
    pub fn send(&self, bare: &Bare) -> Result<(), SegmentError> {
        let ends = Ends::of(bare.from, bare.to)?;
        self.transmit(bare.what(), bare.from, bare.to, &ends, &encoding::bare(&ends, bare))
    }

    /// Sends a segment of a pair, by the way that the pair's packets take; does not wait.
    ///
    /// What the programs redirect passes by netfilter, whose connection tracking then takes what is said in the name of the
    /// pair for invalid, and rules may drop that. So this passes by it too, unless the interface is gone.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_by(&self, bare: &Bare, path: EgressPath) -> Result<(), SegmentError> {
        let ends = Ends::of(bare.from, bare.to)?;
        let packet = encoding::bare(&ends, bare);
        if path.via == Via::Redirect
            && let Some(link) = &self.link
        {
            match link.send(&ends, path.interface, &packet) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(%error, interface = path.interface, "cannot send a segment by the interface: it is sent by the stack");
                }
            }
        }
        self.transmit(bare.what(), bare.from, bare.to, &ends, &packet)
    }

    /// Sends a segment with payload, of an even number of bytes; does not wait.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn send_with(&self, bare: &Bare, payload: &[u8]) -> Result<(), SegmentError> {
        let ends = Ends::of(bare.from, bare.to)?;
        self.transmit("segment", bare.from, bare.to, &ends, &encoding::segment(&ends, bare, payload))
    }

    fn transmit(
        &self,
        what: &'static str,
        from: SocketAddr,
        to: SocketAddr,
        ends: &Ends,
        packet: &[u8],
    ) -> Result<(), SegmentError> {
        // The kernel looks at what the message says of its source when it chooses the route, not at the packet's header.
        let sent = match ends {
            Ends::V4 { from, to } => {
                let info = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(from.ip().octets()) },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                let to = SockaddrIn::from(*to);
                transmit(self.ipv4.as_raw_fd(), packet, ControlMessage::Ipv4PacketInfo(&info), &to)
            }
            Ends::V6 { from, to: end } => {
                let socket = self.ipv6.as_ref().ok_or(SegmentError::NoIpv6 { to })?;
                let info = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: from.ip().octets() },
                    ipi6_ifindex: from.scope_id(),
                };
                // In place of the port stands the protocol, if anything (`rawv6_sendmsg`).
                let mut end = *end;
                end.set_port(0);
                let end = SockaddrIn6::from(end);
                transmit(socket.as_raw_fd(), packet, ControlMessage::Ipv6PacketInfo(&info), &end)
            }
        };
        sent.map_err(|source| SegmentError::Send { what, from, to, source })
    }
}

fn transmit(
    socket: RawFd,
    packet: &[u8],
    source: ControlMessage<'_>,
    to: &impl SockaddrLike,
) -> io::Result<()> {
    // It is sent whole or not at all.
    sendmsg(socket, &[IoSlice::new(packet)], &[source], MsgFlags::MSG_DONTWAIT, Some(to))?;
    Ok(())
}

fn open(domain: Domain) -> io::Result<Socket> {
    // Of this protocol, the header is included in either family (`inet_create`, `inet6_create`).
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
    // It receives what is sent to the node with the number of that protocol, which nobody needs: keep little of it.
    // So that the egress programs know who says this in the name of offloaded pairs.
    nix::sys::socket::setsockopt(
        &socket,
        nix::sys::socket::sockopt::Priority,
        &AGENT_PRIORITY.cast_signed(),
    )?;
    socket.set_recv_buffer_size(0)?;
    if domain == Domain::IPV6 {
        // A connection may outlive the node's address. IPv4 asks for nothing (`inet_sk_flowi_flags`).
        socket.set_freebind_v6(true)?;
    }
    Ok(socket)
}

fn refused(family: &'static str, source: io::Error) -> SegmentError {
    if source.kind() == io::ErrorKind::PermissionDenied {
        SegmentError::Privilege { family }
    } else {
        SegmentError::Open { family, source }
    }
}
