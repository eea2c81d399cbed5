//! Fragments: the pieces that a packet was cut into on its way (RFC 791, 3.2; RFC 8200, 4.5).

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::{
    ExtensionHeader, FRAGMENT_HEADER, IPV4_FRAGMENT_OFFSET, IPV4_MORE_FRAGMENTS, IPV6_FRAGMENT_OFFSET,
    IPV6_MORE_FRAGMENTS, IpVersion, MAX_EXTENSION_HEADERS, PROTOCOL_FRAGMENT, PROTOCOL_TCP, Packet,
    parse_extension,
};
use crate::tuple::{AddressBytes, mapped_v4};

/// Where the flags and the offset stand in the IPv4 header and in IPv6's fragment header, in bytes from its first.
const IPV4_FLAGS: usize = 6;
const IPV6_FLAGS: usize = 2;

/// A fragment.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fragment {
    /// Where the packet comes from.
    pub source: AddressBytes,
    /// Where it is sent to.
    pub destination: AddressBytes,
    /// What its sender, for these addresses, calls it by: 16 bits of IPv4, 32 of IPv6.
    pub identification: u32,
    /// How many bytes precede the half-word with the flags and the offset.
    pub flags_offset: u32,
    /// How many bytes precede the piece.
    pub piece_offset: u32,
    /// Where the piece stands in what was cut up, in bytes.
    pub position: u32,
    /// The piece's length, in bytes.
    pub length: u32,
    /// Whether no other piece stands behind it.
    pub is_last: bool,
}

/// Finds the fragment in a packet whose IP header begins `ip_offset` bytes after the first. `None` for what is no fragment,
/// whole packets with a fragment header (RFC 6946) included, and for an IPv4 fragment that is not of TCP. Of IPv6 only the
/// first one tells the protocol for sure.
#[inline(always)]
pub fn parse_fragment<P: Packet + ?Sized>(
    packet: &P,
    version: IpVersion,
    ip_offset: usize,
) -> Option<Fragment> {
    match version {
        IpVersion::V4 => parse_ipv4(packet, ip_offset),
        IpVersion::V6 => parse_ipv6(packet, ip_offset),
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "headers are some hundred bytes at most")]
fn parse_ipv4<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Option<Fragment> {
    let ip: Ipv4Hdr = packet.read(ip_offset)?;
    let header_length = usize::from(ip.vihl & 0x0f) * 4;
    let flags = u16::from_be_bytes(ip.frags);
    let is_fragment = flags & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS) != 0;
    if !is_fragment || ip.proto != PROTOCOL_TCP || header_length < Ipv4Hdr::LEN {
        return None;
    }
    Some(Fragment {
        source: mapped_v4(ip.src_addr),
        destination: mapped_v4(ip.dst_addr),
        identification: u32::from(u16::from_be_bytes(ip.id)),
        flags_offset: (ip_offset + IPV4_FLAGS) as u32,
        piece_offset: (ip_offset + header_length) as u32,
        position: u32::from(flags & IPV4_FRAGMENT_OFFSET) * 8,
        length: u32::from(u16::from_be_bytes(ip.tot_len)).checked_sub(header_length as u32)?,
        is_last: flags & IPV4_MORE_FRAGMENTS == 0,
    })
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "headers are some hundred bytes at most")]
fn parse_ipv6<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Option<Fragment> {
    let ip: Ipv6Hdr = packet.read(ip_offset)?;
    let mut protocol = ip.next_hdr;
    let mut offset = ip_offset + Ipv6Hdr::LEN;
    for _ in 0..MAX_EXTENSION_HEADERS {
        if protocol == PROTOCOL_FRAGMENT {
            let [_, _, high, low, identification @ ..]: ExtensionHeader = packet.read(offset)?;
            let flags = u16::from_be_bytes([high, low]);
            if flags & (IPV6_FRAGMENT_OFFSET | IPV6_MORE_FRAGMENTS) == 0 {
                return None;
            }
            let piece_offset = offset + FRAGMENT_HEADER;
            let end = ip_offset + Ipv6Hdr::LEN + usize::from(u16::from_be_bytes(ip.payload_len));
            return Some(Fragment {
                source: ip.src_addr,
                destination: ip.dst_addr,
                identification: u32::from_be_bytes(identification),
                flags_offset: (offset + IPV6_FLAGS) as u32,
                piece_offset: piece_offset as u32,
                position: u32::from(flags & IPV6_FRAGMENT_OFFSET),
                length: end.checked_sub(piece_offset)? as u32,
                is_last: flags & IPV6_MORE_FRAGMENTS == 0,
            });
        }
        let extension = parse_extension(packet, protocol, offset).ok()??;
        protocol = extension.next;
        offset += extension.length;
    }
    None
}

#[cfg(test)]
mod tests {
    use core::net::{Ipv4Addr, Ipv6Addr};

    use super::super::samples::{TCP, UDP, extension, fragment_header, ipv4, ipv6, tcp};
    use super::super::{LinkLayer, parse};
    use super::*;
    use crate::tuple::address_bytes;

    const V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
    const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
    const MORE: u16 = 0x2000;

    #[test]
    fn an_ipv4_fragment_is_found() {
        let expected = |position, is_last| {
            Some(Fragment {
                source: address_bytes(Ipv4Addr::new(192, 0, 2, 1).into()),
                destination: address_bytes(V4.into()),
                identification: 1,
                flags_offset: 6,
                piece_offset: 28,
                position,
                length: 24,
                is_last,
            })
        };
        let check = |flags: u16, expected: Option<Fragment>| {
            let packet = ipv4(V4, TCP, &[1; 8], flags, &[0; 24]);
            assert_eq!(parse_fragment(packet.as_slice(), IpVersion::V4, 0), expected, "{flags:x}");
        };
        check(MORE, expected(0, false));
        check(MORE | 3, expected(24, false));
        check(0x1fff, expected(0xfff8, true));
        check(0, None);
        check(0x4000, None);
        let datagram = ipv4(V4, UDP, &[], MORE, &[0; 24]);
        assert_eq!(parse_fragment(datagram.as_slice(), IpVersion::V4, 0), None);
    }

    #[test]
    fn an_ipv6_fragment_is_found_behind_other_headers() {
        let mut header = fragment_header(TCP, 2, &[0; 16]);
        let check = |header: &[u8], position, is_last| {
            let packet = ipv6(V6, 0, &extension(44, 1, header));
            let fragment = parse_fragment(packet.as_slice(), IpVersion::V6, 0).unwrap();
            assert_eq!(fragment.destination, address_bytes(V6.into()));
            assert_eq!((fragment.identification, fragment.flags_offset), (9, 40 + 16 + 2));
            assert_eq!((fragment.piece_offset, fragment.length), (40 + 16 + 8, 16));
            assert_eq!((fragment.position, fragment.is_last), (position, is_last));
        };
        check(&header, 16, false);
        header[3] &= !1;
        check(&header, 16, true);
        // A whole packet.
        header[3] = 0;
        assert_eq!(parse_fragment(ipv6(V6, 44, &header).as_slice(), IpVersion::V6, 0), None);
    }

    #[test]
    fn a_segment_tells_whether_it_is_whole() {
        let is_first = |packet: &[u8]| parse(packet, LinkLayer::Ip).unwrap().is_first_fragment;
        let segment = tcp(9001, 0x10);
        assert!(!is_first(&ipv4(V4, TCP, &[], 0x4000, &segment)));
        assert!(is_first(&ipv4(V4, TCP, &[], MORE, &segment)));
        assert!(is_first(&ipv6(V6, 44, &fragment_header(TCP, 0, &segment))));
        let mut whole = fragment_header(TCP, 0, &segment);
        whole[3] = 0;
        assert!(!is_first(&ipv6(V6, 44, &whole)));
    }

    #[test]
    fn one_that_says_to_be_shorter_than_its_headers_is_none() {
        let mut packet = ipv4(V4, TCP, &[1; 8], MORE, &[0; 24]);
        packet[2..4].copy_from_slice(&27_u16.to_be_bytes());
        assert_eq!(parse_fragment(packet.as_slice(), IpVersion::V4, 0), None);
        let mut packet = ipv6(V6, 44, &fragment_header(TCP, 2, &[0; 16]));
        packet[4..6].copy_from_slice(&7_u16.to_be_bytes());
        assert_eq!(parse_fragment(packet.as_slice(), IpVersion::V6, 0), None);
    }
}
