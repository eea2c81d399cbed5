//! TCP segments in the name of others, as somebody sends them who is not on the path of a connection.

use std::io;
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::netns::NetNs;

/// FIN, SYN, RST and ACK in the flags of a segment.
pub const FIN: u8 = 1;
/// See [`FIN`].
pub const SYN: u8 = 2;
/// See [`FIN`].
pub const RST: u8 = 4;
/// See [`FIN`].
pub const ACK: u8 = 16;

/// `IPPROTO_RAW`: packets are written with their IP header, whatever their source (raw(7), `rawv6_send_hdrinc`).
const RAW: i32 = 255;
const TCP: u8 = 6;
/// Bytes of the TCP header, without options.
const HEADER: usize = 20;

/// A segment without payload and options.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Forged {
    /// Its sequence number.
    pub sequence: u32,
    /// Its acknowledgement number.
    pub acknowledgement: u32,
    /// Its flags.
    pub flags: u8,
}

/// Sends segments from a namespace, that say to come from one address, to another of the same family. Yields how many.
///
/// # Errors
/// The kernel does not send them.
pub fn send(
    netns: &NetNs,
    [from, to]: [SocketAddr; 2],
    segments: impl IntoIterator<Item = Forged>,
) -> io::Result<usize> {
    send_from_each(netns, to, segments.into_iter().map(|segment| (from, segment)))
}

/// The same of segments that each say where they come from.
///
/// # Errors
/// As [`send`].
pub fn send_from_each(
    netns: &NetNs,
    to: SocketAddr,
    segments: impl IntoIterator<Item = (SocketAddr, Forged)>,
) -> io::Result<usize> {
    let socket = netns.run(|| {
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        Socket::new(domain, Type::RAW, Some(Protocol::from(RAW)))
    })?;
    let destination = SockAddr::from(SocketAddr::new(to.ip(), 0));
    let mut count = 0;
    for (from, segment) in segments {
        socket.send_to(&packet([from, to], segment), &destination)?;
        count += 1;
    }
    Ok(count)
}

/// The packet, from the IP header on.
fn packet([from, to]: [SocketAddr; 2], segment: Forged) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(HEADER);
    tcp.extend(from.port().to_be_bytes());
    tcp.extend(to.port().to_be_bytes());
    tcp.extend(segment.sequence.to_be_bytes());
    tcp.extend(segment.acknowledgement.to_be_bytes());
    // Five words; a window of 512.
    tcp.extend([5 << 4, segment.flags, 2, 0, 0, 0, 0, 0]);
    let length = u16::try_from(HEADER).expect("a short header").to_be_bytes();
    let ends = [octets(from.ip()), octets(to.ip())].concat();
    let pseudo = [&ends[..], &[0, TCP], &length].concat();
    let sum = checksum(&[&pseudo, &tcp[..]].concat());
    tcp[16..18].copy_from_slice(&sum);
    let mut packet = match to {
        // The kernel fills in what is 0: the length, the identification and the checksum.
        SocketAddr::V4(_) => vec![0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, TCP, 0, 0],
        SocketAddr::V6(_) => [&[0x60, 0, 0, 0][..], &length, &[TCP, 64]].concat(),
    };
    packet.extend(ends);
    packet.extend(tcp);
    packet
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// The checksum of the Internet (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let [.., high, low] = (!sum).to_be_bytes();
    [high, low]
}
