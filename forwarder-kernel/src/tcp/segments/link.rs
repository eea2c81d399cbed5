//! The socket that packets are written to which pass by the node's netfilter hooks.
#![expect(unsafe_code, reason = "no crate makes the address of a packet socket")]

use std::io;
use std::os::fd::AsRawFd;

use forwarder_common::flow::AGENT_LINK_PRIORITY;
use socket2::{Domain, Socket, Type};

use super::Ends;

/// `ETH_P_IP` and `ETH_P_IPV6` (`linux/if_ether.h`).
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
/// Bytes of an Ethernet address. It may be longer than the interface's own.
const ETHERNET_ADDRESS: u8 = 6;

/// Hands packets to interfaces. Whose they are on the link, the egress program there finds out, or nobody has to, where packets begin
/// with the IP header.
#[derive(Debug)]
pub(super) struct LinkSocket(Socket);

impl LinkSocket {
    /// Opens it. Of no protocol, it receives nothing (`packet_create`).
    pub(super) fn open() -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        // So that the egress program knows who says this.
        let priority = AGENT_LINK_PRIORITY.cast_signed();
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Priority, &priority)?;
        Ok(Self(socket))
    }

    /// Sends a packet by an interface; does not wait.
    pub(super) fn send(&self, ends: &Ends, interface: u32, packet: &[u8]) -> io::Result<()> {
        let Self(socket) = self;
        let protocol = match ends {
            Ends::V4 { .. } => ETHERTYPE_IPV4,
            Ends::V6 { .. } => ETHERTYPE_IPV6,
        };
        let address = libc::sockaddr_ll {
            sll_family: u16::try_from(libc::AF_PACKET).unwrap_or_default(),
            sll_protocol: protocol.to_be(),
            sll_ifindex: interface.cast_signed(),
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: ETHERNET_ADDRESS,
            sll_addr: [0; 8],
        };
        let length = libc::socklen_t::try_from(size_of_val(&address)).map_err(io::Error::other)?;
        // SAFETY: the pointers are to a packet and an address of the lengths given, which the kernel only reads.
        let sent = unsafe {
            libc::sendto(
                socket.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                libc::MSG_DONTWAIT,
                (&raw const address).cast(),
                length,
            )
        };
        // It is sent whole or not at all.
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
