//! What a router says of packets that are too large for the way behind it: ICMP "fragmentation needed" (RFC 1191) and
//! "packet too big" over IPv6 (RFC 8201), which quote the beginning of such a packet. Pure, as `packet` is.

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::packet::{IpVersion, LinkLayer, PROTOCOL_TCP, Packet, ip_header};
use crate::tuple::FourTuple;
use crate::tuple::mapped_v4;

/// The number of ICMP in IPv4 headers.
pub const PROTOCOL_ICMP: u8 = 1;
/// The number of ICMP for IPv6 in IPv6 headers.
pub const PROTOCOL_ICMPV6: u8 = 58;
/// The type and code of "destination unreachable", "fragmentation needed and DF set" (RFC 792).
pub const ICMP_TOO_BIG: [u8; 2] = [3, 4];
/// The same of "packet too big" (RFC 4443, 3.2).
pub const ICMPV6_TOO_BIG: [u8; 2] = [2, 0];
/// Bytes of the ICMP header: type, code, checksum, and four that hold the MTU.
pub const ICMP_HEADER: usize = 8;
/// Where the checksum stands in it.
pub const ICMP_CHECKSUM: usize = 2;

/// IPv4's "more fragments" with the fragment's offset, and the latter alone.
const IPV4_FRAGMENTED: u16 = 0x3fff;
const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;

/// The word of a router that a TCP packet is too large. Offsets are in bytes from the frame's first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct TooBig {
    /// The addresses and ports of the packet that is quoted; the word of it goes to its source.
    pub quoted: FourTuple,
    /// Its sequence number, in host byte order.
    pub sequence: u32,
    /// The IP version of both.
    pub version: IpVersion,
    /// Where the IP header begins.
    pub ip_offset: u32,
    /// Where the ICMP header begins.
    pub icmp_offset: u32,
    /// Where the quoted IP header begins.
    pub quoted_offset: u32,
    /// Where the quoted TCP header begins, of which there may be no more than eight bytes.
    pub tcp_offset: u32,
}

/// Finds such a word in `packet`; `None` for every other packet, one that quotes too little, and one whose quote has
/// another source than it goes to. Extension headers of IPv6, which TCP packets do not have in practice, are not looked
/// behind.
#[inline(always)]
pub fn parse_too_big<P: Packet + ?Sized>(packet: &P, link: LinkLayer) -> Option<TooBig> {
    let (version, ip_offset) = ip_header(packet, link).ok()?;
    match version {
        IpVersion::V4 => parse_v4(packet, ip_offset),
        IpVersion::V6 => parse_v6(packet, ip_offset),
    }
}

#[inline(always)]
fn parse_v4<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Option<TooBig> {
    let ip: Ipv4Hdr = packet.read(ip_offset)?;
    let icmp_offset = ip_offset + header_length(&ip)?;
    if ip.proto != PROTOCOL_ICMP || u16::from_be_bytes(ip.frags) & IPV4_FRAGMENTED != 0 {
        return None;
    }
    let icmp: [u8; ICMP_HEADER] = packet.read(icmp_offset)?;
    if icmp[..2] != ICMP_TOO_BIG {
        return None;
    }
    let quoted_offset = icmp_offset + ICMP_HEADER;
    let quoted: Ipv4Hdr = packet.read(quoted_offset)?;
    let tcp_offset = quoted_offset + header_length(&quoted)?;
    // Of fragments, only the first has ports.
    let is_later_fragment = u16::from_be_bytes(quoted.frags) & IPV4_FRAGMENT_OFFSET != 0;
    if quoted.proto != PROTOCOL_TCP || is_later_fragment || quoted.src_addr != ip.dst_addr {
        return None;
    }
    let (ports, sequence) = ports_and_sequence(packet, tcp_offset)?;
    #[expect(clippy::cast_possible_truncation, reason = "some hundred bytes at most")]
    Some(TooBig {
        quoted: FourTuple {
            source: mapped_v4(quoted.src_addr),
            destination: mapped_v4(quoted.dst_addr),
            source_port: ports[0],
            destination_port: ports[1],
        },
        sequence,
        version: IpVersion::V4,
        ip_offset: ip_offset as u32,
        icmp_offset: icmp_offset as u32,
        quoted_offset: quoted_offset as u32,
        tcp_offset: tcp_offset as u32,
    })
}

#[inline(always)]
fn parse_v6<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Option<TooBig> {
    let ip: Ipv6Hdr = packet.read(ip_offset)?;
    if ip.next_hdr != PROTOCOL_ICMPV6 {
        return None;
    }
    let icmp_offset = ip_offset + Ipv6Hdr::LEN;
    let icmp: [u8; ICMP_HEADER] = packet.read(icmp_offset)?;
    if icmp[..2] != ICMPV6_TOO_BIG {
        return None;
    }
    let quoted_offset = icmp_offset + ICMP_HEADER;
    let quoted: Ipv6Hdr = packet.read(quoted_offset)?;
    if quoted.next_hdr != PROTOCOL_TCP || quoted.src_addr != ip.dst_addr {
        return None;
    }
    let tcp_offset = quoted_offset + Ipv6Hdr::LEN;
    let (ports, sequence) = ports_and_sequence(packet, tcp_offset)?;
    #[expect(clippy::cast_possible_truncation, reason = "some hundred bytes at most")]
    Some(TooBig {
        quoted: FourTuple {
            source: quoted.src_addr,
            destination: quoted.dst_addr,
            source_port: ports[0],
            destination_port: ports[1],
        },
        sequence,
        version: IpVersion::V6,
        ip_offset: ip_offset as u32,
        icmp_offset: icmp_offset as u32,
        quoted_offset: quoted_offset as u32,
        tcp_offset: tcp_offset as u32,
    })
}

/// Bytes of an IPv4 header, if it is one.
#[inline(always)]
fn header_length(ip: &Ipv4Hdr) -> Option<usize> {
    let length = usize::from(ip.vihl & 0x0f) * 4;
    (ip.vihl >> 4 == 4 && length >= Ipv4Hdr::LEN).then_some(length)
}

/// The first eight bytes of a TCP header: all that is sure to be quoted (RFC 792).
#[inline(always)]
fn ports_and_sequence<P: Packet + ?Sized>(packet: &P, tcp_offset: usize) -> Option<([u16; 2], u32)> {
    let [s0, s1, d0, d1, q0, q1, q2, q3]: [u8; 8] = packet.read(tcp_offset)?;
    let ports = [u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1])];
    Some((ports, u32::from_be_bytes([q0, q1, q2, q3])))
}

#[cfg(test)]
mod tests {
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// A router's word to 192.0.2.1, whose packet with `options` it quotes.
    fn v4(options: &[u8], flags: [u8; 2]) -> Vec<u8> {
        let ip = |protocol, source, destination, options: &[u8]| {
            let words = u8::try_from(5 + options.len() / 4).unwrap();
            let mut header = [0x40 | words, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0].to_vec();
            header.extend([192, 0, 2, source, 192, 0, 2, destination]);
            header.extend(options);
            header
        };
        let mut packet = ip(PROTOCOL_ICMP, 9, 1, options);
        packet.extend([3, 4, 0, 0, 0, 0, 5, 0x78]);
        let mut quoted = ip(PROTOCOL_TCP, 1, 2, options);
        quoted[6..8].copy_from_slice(&flags);
        packet.extend(quoted);
        packet.extend([0, 80, 1, 0, 1, 2, 3, 4]);
        packet
    }

    fn v6() -> Vec<u8> {
        let ip = |next, source, destination| {
            let mut header = [0x60, 0, 0, 0, 0, 0, next, 64].to_vec();
            for last in [source, destination] {
                header.extend([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
            }
            header
        };
        let mut packet = ip(PROTOCOL_ICMPV6, 9, 1);
        packet.extend([2, 0, 0, 0, 0, 0, 5, 0x78]);
        packet.extend(ip(PROTOCOL_TCP, 1, 2));
        packet.extend([0, 80, 1, 0, 1, 2, 3, 4]);
        packet
    }

    fn parse(packet: &[u8]) -> Option<TooBig> {
        parse_too_big(packet, LinkLayer::Ip)
    }

    #[test]
    fn what_is_quoted_is_found() {
        for (packet, offsets) in [(v4(&[], [0x40, 0]), [20, 28, 48]), (v4(&[1; 8], [0, 0]), [28, 36, 64])] {
            let found = parse(&packet).unwrap();
            assert_eq!([found.icmp_offset, found.quoted_offset, found.tcp_offset], offsets);
            assert_eq!(found.quoted.source, mapped_v4([192, 0, 2, 1]));
            assert_eq!(found.quoted.destination, mapped_v4([192, 0, 2, 2]));
            assert_eq!((found.quoted.source_port, found.quoted.destination_port), (80, 256));
            assert_eq!((found.sequence, found.version), (0x0102_0304, IpVersion::V4));
        }
        let found = parse(&v6()).unwrap();
        assert_eq!([found.icmp_offset, found.quoted_offset, found.tcp_offset], [40, 48, 88]);
        assert_eq!((found.quoted.source[15], found.quoted.destination[15]), (1, 2));
        assert_eq!((found.quoted.source_port, found.sequence), (80, 0x0102_0304));
    }

    #[test]
    fn what_quotes_too_little_is_none() {
        for packet in [v4(&[], [0, 0]), v4(&[1; 4], [0, 0]), v6()] {
            for length in 0..packet.len() {
                assert_eq!(parse(&packet[..length]), None);
            }
        }
    }

    #[test]
    fn every_other_packet_is_none() {
        let check = |mut packet: Vec<u8>, at: usize, value: u8| {
            packet[at] = value;
            assert_eq!(parse(&packet), None, "{at}");
        };
        // The protocol, a fragment, the type, the code, the quoted version and protocol, and the destination.
        for (at, value) in [(9, 17), (6, 0x20), (20, 11), (21, 3), (28, 0x55), (37, 17), (19, 3)] {
            check(v4(&[], [0x40, 0]), at, value);
        }
        for (at, value) in [(6, 17), (40, 1), (54, 17), (39, 3)] {
            check(v6(), at, value);
        }
        assert_eq!(parse(&v4(&[], [0, 1])), None, "a later fragment");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..120), at in 0_usize..80) {
            for mut packet in [v4(&[], [0, 0]), v6()] {
                let _ = parse(&bytes);
                packet.splice(at.min(packet.len()).., bytes.iter().copied());
                let _ = parse(&packet);
                let _ = parse_too_big(packet.as_slice(), LinkLayer::Ethernet);
            }
        }
    }
}
