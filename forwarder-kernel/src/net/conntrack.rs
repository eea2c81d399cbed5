//! What the node's connection tracking makes of a connection: whether it translates the addresses, and what it takes for
//! invalid.
//!
//! The programs see packets before, and outside of, connection tracking: of a connection that it translates, packets have
//! other addresses there than its socket has.

use std::fs;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Mutex;

use forwarder_common::packet::PROTOCOL_TCP;
use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;

use crate::net::netlink::{self, Message, NLMSG_ERROR, NetlinkSocket, attributes, word, write_attribute};
use forwarder_runtime::lock::lock;

/// Is there where connections are tracked in this network namespace (`nf_conntrack_standalone_init_sysctl`).
const TRACKED: &str = "/proc/sys/net/netfilter/nf_conntrack_count";
/// Bytes of `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// From `linux/netfilter/nfnetlink_conntrack.h`: a question for an entry, and the entry.
const GET: u16 = 1 << 8 | 1;
const ENTRY: u16 = 1 << 8;
/// An entry, or what changes of one that is there: `IPCTNL_MSG_CT_NEW` as well.
const CHANGE: u16 = ENTRY;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_FLAGS_ORIGINAL: u16 = 4;
const CTA_PROTOINFO_TCP_FLAGS_REPLY: u16 = 5;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
/// `IP_CT_TCP_FLAG_BE_LIBERAL` (`nf_conntrack_tcp.h`).
const BE_LIBERAL: u8 = 0x08;
/// `IPS_SRC_NAT` and `IPS_DST_NAT` (`nf_conntrack_common.h`).
const TRANSLATED: u32 = 1 << 4 | 1 << 5;
/// From `sys/socket.h`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Asks the kernel's connection tracking, in the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Conntrack {
    /// `None` where the kernel has no netfilter, or refuses.
    channel: Option<Mutex<NetlinkSocket>>,
}

impl Conntrack {
    /// Opens a socket to the kernel.
    pub(crate) fn open() -> Self {
        let channel = NetlinkSocket::open(Some(NETFILTER));
        if let Err(error) = &channel {
            tracing::debug!(%error, "cannot ask connection tracking");
        }
        Self { channel: channel.ok().map(Mutex::new) }
    }

    /// Whether the node translates the packets of the connection between `local`, its own address, and `peer`. Not where it
    /// does not track the connection.
    ///
    /// # Errors
    /// The kernel tracks connections and does not tell: nobody answers (`nf_conntrack_netlink` is missing), or `CAP_NET_ADMIN`
    /// is.
    pub(crate) fn is_translated(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<bool> {
        // Who does not track connections does not translate them. To ask would have the kernel look for modules each time.
        if !fs::exists(TRACKED).unwrap_or(true) {
            return Ok(false);
        }
        let channel = self.channel.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        // Whatever a panic left behind: each question has a number of its own.
        let mut channel = lock(channel);
        channel.ask(|question, sequence| write_question(question, sequence, local, peer), read_answer)?
    }

    /// Has connection tracking take no packet of the connection between `local` and `peer` for invalid because of its numbers,
    /// as `nf_conntrack_tcp_be_liberal` does for all. Nothing is to be done where it does not track the connection.
    ///
    /// # Errors
    /// As [`Self::is_translated`].
    pub(crate) fn be_liberal(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<()> {
        if !fs::exists(TRACKED).unwrap_or(true) {
            return Ok(());
        }
        let channel = self.channel.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let mut channel = lock(channel);
        channel.ask(|order, sequence| write_order(order, sequence, local, peer), read_acknowledgement)?
    }
}

/// Writes the question for the entry of which one direction goes from `local` to `peer`: as the node answers the client, and as it
/// speaks to the endpoint. It is what the socket sees, whatever becomes of it on its way.
fn write_question(question: &mut Vec<u8>, sequence: u32, local: SocketAddr, peer: SocketAddr) {
    netlink::begin(question, GET, sequence);
    write_tuple(question, local, peer);
    netlink::end(question);
}

/// Writes the order to be liberal with that entry, in both directions.
fn write_order(order: &mut Vec<u8>, sequence: u32, local: SocketAddr, peer: SocketAddr) {
    let (mut flags, mut tcp) = (Vec::new(), Vec::new());
    for kind in [CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, CTA_PROTOINFO_TCP_FLAGS_REPLY] {
        // The flags, and which of them change.
        write_attribute(&mut flags, kind, &[BE_LIBERAL; 2]);
    }
    write_attribute(&mut tcp, CTA_PROTOINFO_TCP | NLA_F_NESTED, &flags);
    netlink::begin_order(order, CHANGE, sequence);
    write_tuple(order, local, peer);
    write_attribute(order, CTA_PROTOINFO | NLA_F_NESTED, &tcp);
    netlink::end(order);
}

/// Writes which entry is meant.
fn write_tuple(question: &mut Vec<u8>, local: SocketAddr, peer: SocketAddr) {
    let (mut addresses, mut ports, mut tuple) = (Vec::new(), Vec::new(), Vec::new());
    let (local_ip, peer_ip) = (local.ip().to_canonical(), peer.ip().to_canonical());
    let family = if local_ip.is_ipv4() { AF_INET } else { AF_INET6 };
    for (v4, address) in [(1, local_ip), (2, peer_ip)] {
        match address {
            IpAddr::V4(address) => write_attribute(&mut addresses, v4, &address.octets()),
            IpAddr::V6(address) => write_attribute(&mut addresses, v4 + 2, &address.octets()),
        }
    }
    write_attribute(&mut ports, CTA_PROTO_NUM, &[PROTOCOL_TCP]);
    write_attribute(&mut ports, CTA_PROTO_SRC_PORT, &local.port().to_be_bytes());
    write_attribute(&mut ports, CTA_PROTO_DST_PORT, &peer.port().to_be_bytes());
    write_attribute(&mut tuple, CTA_TUPLE_IP | NLA_F_NESTED, &addresses);
    write_attribute(&mut tuple, CTA_TUPLE_PROTO | NLA_F_NESTED, &ports);

    question.extend([family, 0, 0, 0]);
    write_attribute(question, CTA_TUPLE_ORIG | NLA_F_NESTED, &tuple);
}

fn malformed() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "malformed answer from connection tracking")
}

/// What the answer to the order `sequence` says; `None` if it answers something else.
fn read_acknowledgement(answer: &[u8], sequence: u32) -> Option<io::Result<()>> {
    let Ok(Message { kind, sequence: answered, body }) = netlink::message(answer) else {
        return Some(Err(malformed()));
    };
    if answered != sequence {
        return None;
    }
    Some(match netlink::errno(body).filter(|_| kind == NLMSG_ERROR) {
        Some(0) => Ok(()),
        // It is not tracked.
        Some(number) if number == Errno::NOENT.raw_os_error() => Ok(()),
        Some(number) => Err(io::Error::from_raw_os_error(number)),
        None => Err(malformed()),
    })
}

/// What the answer to the question `sequence` says; `None` if it answers another question.
fn read_answer(answer: &[u8], sequence: u32) -> Option<io::Result<bool>> {
    let Ok(Message { kind, sequence: answered, body }) = netlink::message(answer) else {
        return Some(Err(malformed()));
    };
    if answered != sequence {
        return None;
    }
    Some(match kind {
        // It is not tracked.
        NLMSG_ERROR if netlink::errno(body) == Some(Errno::NOENT.raw_os_error()) => Ok(false),
        NLMSG_ERROR => Err(netlink::errno(body).map_or_else(malformed, io::Error::from_raw_os_error)),
        ENTRY => {
            let entry = body.get(FAMILY_HEADER..).unwrap_or_default();
            let status = attributes(entry).find(|(kind, _)| *kind == CTA_STATUS);
            let status = status.and_then(|(_, value)| word(value, 0)).map(u32::from_be);
            status.map(|status| status & TRANSLATED != 0).ok_or_else(malformed)
        }
        _ => Err(malformed()),
    })
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_survived(mut bytes in vec(any::<u8>(), 0..200)) {
            let _ = (read_answer(&bytes, 5), read_acknowledgement(&bytes, 5));
            if let (Ok(length), Some(header)) = (u32::try_from(bytes.len()), bytes.first_chunk_mut::<12>()) {
                header[..4].copy_from_slice(&length.to_ne_bytes());
                header[4..6].copy_from_slice(&ENTRY.to_ne_bytes());
                header[8..].copy_from_slice(&5_u32.to_ne_bytes());
            }
            let _ = read_answer(&bytes, 5);
        }
    }

    #[test]
    fn what_is_not_tracked_is_not_translated() {
        let conntrack = Conntrack::open();
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (local, peer) in [("127.0.0.1:1", "127.0.0.1:2"), ("[::1]:1", "[::1]:2")] {
            match conntrack.is_translated(address(local), address(peer)) {
                Ok(is_translated) => {
                    assert!(!is_translated);
                    conntrack.be_liberal(address(local), address(peer)).unwrap();
                }
                Err(error) => println!("skipped: no connection tracking here: {error}"),
            }
        }
    }
}
