//! From the bytes of a packet to the TCP segment in it: pure, so that the same code runs in the kernel and in tests.

use network_types::eth::EthHdr;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;
use network_types::vlan::VlanHdr;

use crate::layout::{AddressBytes, mapped_v4};
use crate::verdict::Verdict;

/// How many IPv6 extension headers are walked. Linux sends at most a few; the bound is for the verifier.
const MAX_EXTENSION_HEADERS: usize = 8;

const ETHER_TYPE_IPV4: u16 = 0x0800;
const ETHER_TYPE_IPV6: u16 = 0x86dd;
const ETHER_TYPE_VLAN: u16 = 0x8100;
const ETHER_TYPE_VLAN_SERVICE: u16 = 0x88a8;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_ROUTING: u8 = 43;
const PROTOCOL_FRAGMENT: u8 = 44;
const PROTOCOL_AUTHENTICATION: u8 = 51;
const PROTOCOL_DESTINATION_OPTIONS: u8 = 60;
const PROTOCOL_MOBILITY: u8 = 135;
const PROTOCOL_HOST_IDENTITY: u8 = 139;
const PROTOCOL_SHIM6: u8 = 140;

/// The bits of IPv4's flags and offset, and of IPv6's offset and flags, that hold the fragment's offset.
const IPV4_FRAGMENT_OFFSET: u16 = 0x1fff;
const IPV6_FRAGMENT_OFFSET: u16 = 0xfff8;

/// What the packets of an interface begin with.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum LinkLayer {
    /// An Ethernet header.
    Ethernet,
    /// The IP header.
    Ip,
}

/// A header that can be read from any bytes.
///
/// # Safety
/// The type has no padding, an alignment of 1 or is read unaligned, and is valid for every pattern of bits.
#[expect(unsafe_code, reason = "implementations vouch for their layout")]
pub unsafe trait Header: Copy {}

#[expect(unsafe_code, reason = "implementations vouch for their layout")]
mod headers {
    use super::{EthHdr, ExtensionHeader, Header, Ipv4Hdr, Ipv6Hdr, TcpHdr, VlanHdr};

    // SAFETY: `repr(C)`, integers and arrays of them only; 6 + 6 + 2 bytes leave no padding.
    unsafe impl Header for EthHdr {}
    // SAFETY: `repr(C)`, integers and arrays of them only; 2 + 2 bytes leave no padding.
    unsafe impl Header for VlanHdr {}
    // SAFETY: `repr(C)`, bytes and arrays of bytes only.
    unsafe impl Header for Ipv4Hdr {}
    // SAFETY: `repr(C)`, bytes and arrays of bytes only.
    unsafe impl Header for Ipv6Hdr {}
    // SAFETY: an array of bytes.
    unsafe impl Header for ExtensionHeader {}
    // SAFETY: `repr(C)`, arrays of bytes only, the bit field too.
    unsafe impl Header for TcpHdr {}
}

/// The first eight bytes of an IPv6 extension header: no kind is shorter.
type ExtensionHeader = [u8; 8];

/// A packet that headers are read from.
pub trait Packet {
    /// The header that begins `offset` bytes after the first; `None` where the packet ends before the header does.
    fn read<T: Header>(&self, offset: usize) -> Option<T>;
}

impl Packet for [u8] {
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let bytes = self.get(offset..)?.get(..size_of::<T>())?;
        #[expect(unsafe_code, reason = "headers are read from bytes")]
        // SAFETY: `bytes` has the size of `T`, the read is unaligned, and `Header` promises that any bits are valid.
        Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
    }
}

/// A TCP segment, as far as the classifier cares.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Where it comes from, in network byte order.
    pub source: AddressBytes,
    /// The port that it comes from, in host byte order.
    pub source_port: u16,
    /// Where it is sent to, in network byte order.
    pub destination: AddressBytes,
    /// The port that it is sent to, in host byte order.
    pub destination_port: u16,
    /// Whether it asks for a connection: SYN without ACK.
    pub is_attempt: bool,
    /// How many bytes precede the IP header.
    pub ip_offset: u32,
}

/// Finds the TCP segment in `packet`.
///
/// # Errors
/// The verdict on a packet in which there is none.
#[inline(always)]
pub fn parse<P: Packet + ?Sized>(packet: &P, link: LinkLayer) -> Result<Segment, Verdict> {
    let (version, ip_offset) = match link {
        LinkLayer::Ethernet => parse_ethernet(packet)?,
        LinkLayer::Ip => (parse_version(packet)?, 0),
    };
    match version {
        IpVersion::V4 => parse_ipv4(packet, ip_offset),
        IpVersion::V6 => parse_ipv6(packet, ip_offset),
    }
}

#[derive(Clone, Copy)]
enum IpVersion {
    V4,
    V6,
}

/// The IP version and where its header begins, behind at most one VLAN tag. (The kernel moves the outermost tag from the
/// frame into the metadata before the classifier runs: `skb_vlan_untag` in `__netif_receive_skb_core`.)
#[inline(always)]
fn parse_ethernet<P: Packet + ?Sized>(packet: &P) -> Result<(IpVersion, usize), Verdict> {
    let ethernet: EthHdr = packet.read(0).ok_or(Verdict::Truncated)?;
    let ether_type = u16::from_be(ethernet.ether_type);
    if ether_type != ETHER_TYPE_VLAN && ether_type != ETHER_TYPE_VLAN_SERVICE {
        return Ok((version_of(ether_type)?, EthHdr::LEN));
    }
    let tag: VlanHdr = packet.read(EthHdr::LEN).ok_or(Verdict::Truncated)?;
    Ok((version_of(u16::from_be(tag.ether_type))?, EthHdr::LEN + VlanHdr::LEN))
}

#[inline(always)]
fn version_of(ether_type: u16) -> Result<IpVersion, Verdict> {
    match ether_type {
        ETHER_TYPE_IPV4 => Ok(IpVersion::V4),
        ETHER_TYPE_IPV6 => Ok(IpVersion::V6),
        _ => Err(Verdict::NotIp),
    }
}

/// The IP version by the first four bits, for links that have no header of their own.
#[inline(always)]
fn parse_version<P: Packet + ?Sized>(packet: &P) -> Result<IpVersion, Verdict> {
    let ip: Ipv4Hdr = packet.read(0).ok_or(Verdict::Truncated)?;
    match ip.vihl >> 4 {
        4 => Ok(IpVersion::V4),
        6 => Ok(IpVersion::V6),
        _ => Err(Verdict::NotIp),
    }
}

#[inline(always)]
fn parse_ipv4<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Result<Segment, Verdict> {
    let ip: Ipv4Hdr = packet.read(ip_offset).ok_or(Verdict::Truncated)?;
    let header_length = usize::from(ip.vihl & 0x0f) * 4;
    if ip.vihl >> 4 != 4 || header_length < Ipv4Hdr::LEN {
        return Err(Verdict::NotIp);
    }
    if ip.proto != PROTOCOL_TCP {
        return Err(Verdict::NotTcp);
    }
    if u16::from_be_bytes(ip.frags) & IPV4_FRAGMENT_OFFSET != 0 {
        return Err(Verdict::Fragment);
    }
    let addresses = Addresses { source: mapped_v4(ip.src_addr), destination: mapped_v4(ip.dst_addr) };
    parse_tcp(packet, ip_offset, ip_offset + header_length, addresses)
}

#[inline(always)]
fn parse_ipv6<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Result<Segment, Verdict> {
    let ip: Ipv6Hdr = packet.read(ip_offset).ok_or(Verdict::Truncated)?;
    if ip.vcf[0] >> 4 != 6 {
        return Err(Verdict::NotIp);
    }
    let addresses = Addresses { source: ip.src_addr, destination: ip.dst_addr };
    let mut protocol = ip.next_hdr;
    let mut offset = ip_offset + Ipv6Hdr::LEN;
    // One turn more than there are headers: the last one only looks at the protocol.
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if protocol == PROTOCOL_TCP {
            return parse_tcp(packet, ip_offset, offset, addresses);
        }
        let Some((next, length)) = parse_extension(packet, protocol, offset)? else {
            return Err(Verdict::NotTcp);
        };
        protocol = next;
        offset += length;
    }
    Err(Verdict::TooManyHeaders)
}

/// The protocol after the extension header at `offset`, and the header's length; `None` if `protocol` is no extension
/// header. An encrypted packet has none either.
#[inline(always)]
fn parse_extension<P: Packet + ?Sized>(
    packet: &P,
    protocol: u8,
    offset: usize,
) -> Result<Option<(u8, usize)>, Verdict> {
    // What is announced in units of 8 bytes without the first 8; the authentication header differs (RFC 4302, 2.2).
    let is_authentication = protocol == PROTOCOL_AUTHENTICATION;
    match protocol {
        PROTOCOL_HOP_BY_HOP
        | PROTOCOL_ROUTING
        | PROTOCOL_FRAGMENT
        | PROTOCOL_AUTHENTICATION
        | PROTOCOL_DESTINATION_OPTIONS
        | PROTOCOL_MOBILITY
        | PROTOCOL_HOST_IDENTITY
        | PROTOCOL_SHIM6 => {}
        _ => return Ok(None),
    }
    let [next, announced, high, low, ..]: ExtensionHeader = packet.read(offset).ok_or(Verdict::Truncated)?;
    if protocol == PROTOCOL_FRAGMENT {
        if u16::from_be_bytes([high, low]) & IPV6_FRAGMENT_OFFSET != 0 {
            return Err(Verdict::Fragment);
        }
        return Ok(Some((next, 8)));
    }
    let announced = usize::from(announced);
    let length = if is_authentication { (announced + 2) * 4 } else { (announced + 1) * 8 };
    Ok(Some((next, length)))
}

struct Addresses {
    source: AddressBytes,
    destination: AddressBytes,
}

#[inline(always)]
fn parse_tcp<P: Packet + ?Sized>(
    packet: &P,
    ip_offset: usize,
    tcp_offset: usize,
    addresses: Addresses,
) -> Result<Segment, Verdict> {
    let tcp: TcpHdr = packet.read(tcp_offset).ok_or(Verdict::Truncated)?;
    Ok(Segment {
        source: addresses.source,
        source_port: u16::from_be_bytes(tcp.source),
        destination: addresses.destination,
        destination_port: u16::from_be_bytes(tcp.dest),
        is_attempt: tcp.syn() == 1 && tcp.ack() == 0,
        #[expect(clippy::cast_possible_truncation, reason = "18 at most")]
        ip_offset: ip_offset as u32,
    })
}

#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;
