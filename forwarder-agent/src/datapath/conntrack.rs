//! Whether the node translates the addresses of a connection, as its connection tracking says.
//!
//! The programs see packets before, and outside of, connection tracking: of a connection that it translates, packets have
//! other addresses there than its socket has.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use forwarder_common::packet::PROTOCOL_TCP;
use rustix::io::Errno;
use rustix::net::netlink::NETFILTER;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use super::netlink::{
    MESSAGE_HEADER, MESSAGE_KIND, MESSAGE_LENGTH, MESSAGE_SEQUENCE, NLM_F_REQUEST, NLMSG_ERROR, attributes,
    half_word, word, write_attribute,
};

/// How long to wait for the kernel's answer, which is there when the question has been sent.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes of the longest answer.
const ANSWER: usize = 4096;

/// Bytes of `struct nfgenmsg`.
const FAMILY_HEADER: usize = 4;
/// From `linux/netfilter/nfnetlink_conntrack.h`: a question for an entry, and the entry.
const GET: u16 = 1 << 8 | 1;
const ENTRY: u16 = 1 << 8;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_STATUS: u16 = 3;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const NLA_F_NESTED: u16 = 1 << 15;
/// `IPS_SRC_NAT` and `IPS_DST_NAT` (`nf_conntrack_common.h`).
const TRANSLATED: u32 = 1 << 4 | 1 << 5;
/// From `sys/socket.h`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Asks the kernel's connection tracking, in the network namespace in which it was opened.
#[derive(Debug)]
pub(super) struct Conntrack {
    exchange: Mutex<Exchange>,
}

/// One question at a time: a question and its answer must follow each other on the socket.
#[derive(Debug)]
struct Exchange {
    socket: OwnedFd,
    sequence: u32,
    answer: Vec<u8>,
}

impl Conntrack {
    /// Opens a socket to the kernel.
    ///
    /// # Errors
    /// The kernel refuses, or has no netfilter.
    pub(super) fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(NETFILTER),
        )?;
        set_socket_timeout(&socket, Timeout::Recv, Some(PATIENCE))?;
        let exchange = Exchange { socket, sequence: 0, answer: vec![0; ANSWER] };
        Ok(Self { exchange: Mutex::new(exchange) })
    }

    /// Whether the node translates the packets of the connection between `local`, its own address, and `peer`. Not where it
    /// does not track the connection.
    ///
    /// # Errors
    /// The kernel cannot be asked: it has no connection tracking that answers, or `CAP_NET_ADMIN` is missing.
    pub(super) fn is_translated(&self, local: SocketAddr, peer: SocketAddr) -> io::Result<bool> {
        // Whatever a panic left behind: each question has a number of its own.
        self.exchange.lock().unwrap_or_else(PoisonError::into_inner).ask(local, peer)
    }
}

impl Exchange {
    fn ask(&mut self, local: SocketAddr, peer: SocketAddr) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let question = question(self.sequence, local, peer);
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &question, SendFlags::empty()))?;
        loop {
            let (length, _) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, self.answer.as_mut_slice(), RecvFlags::empty())
            })?;
            // What was waited for in vain may come later: then it is passed over.
            if let Some(answer) = read_answer(self.answer.get(..length).unwrap_or_default(), self.sequence) {
                return answer;
            }
        }
    }
}

/// The question for the entry of which one direction goes from `local` to `peer`: as the node answers the client, and as it
/// speaks to the endpoint. It is what the socket sees, whatever becomes of it on its way.
fn question(sequence: u32, local: SocketAddr, peer: SocketAddr) -> Vec<u8> {
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

    let mut question = vec![0; MESSAGE_HEADER];
    question.extend([family, 0, 0, 0]);
    write_attribute(&mut question, CTA_TUPLE_ORIG | NLA_F_NESTED, &tuple);
    let length = u32::try_from(question.len()).unwrap_or_default();
    let header = [
        &length.to_ne_bytes()[..],
        &GET.to_ne_bytes(),
        &NLM_F_REQUEST.to_ne_bytes(),
        &sequence.to_ne_bytes(),
    ];
    for (place, byte) in question.iter_mut().zip(header.concat()) {
        *place = byte;
    }
    question
}

/// What the answer to the question `sequence` says; `None` if it answers another question.
fn read_answer(answer: &[u8], sequence: u32) -> Option<io::Result<bool>> {
    let malformed =
        || io::Error::new(io::ErrorKind::InvalidData, "malformed answer from connection tracking");
    let length = word(answer, MESSAGE_LENGTH).and_then(|length| usize::try_from(length).ok());
    let parts = length.and_then(|length| answer.get(..length)).and_then(|message| {
        let kind = half_word(message, MESSAGE_KIND)?;
        Some((kind, word(message, MESSAGE_SEQUENCE)?, message.get(MESSAGE_HEADER..)?))
    });
    let Some((kind, answered, body)) = parts else { return Some(Err(malformed())) };
    if answered != sequence {
        return None;
    }
    Some(match kind {
        NLMSG_ERROR => {
            let errno = word(body, 0).map_or(0, |number| number.cast_signed().wrapping_neg());
            // It is not tracked.
            if errno == Errno::NOENT.raw_os_error() {
                Ok(false)
            } else {
                Err(io::Error::from_raw_os_error(errno))
            }
        }
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
            let _ = read_answer(&bytes, 5);
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
        let Ok(conntrack) = Conntrack::open() else { return };
        let address = |text: &str| text.parse::<SocketAddr>().unwrap();
        for (local, peer) in [("127.0.0.1:1", "127.0.0.1:2"), ("[::1]:1", "[::1]:2")] {
            match conntrack.is_translated(address(local), address(peer)) {
                Ok(is_translated) => assert!(!is_translated),
                Err(error) => println!("skipped: no connection tracking here: {error}"),
            }
        }
    }
}
