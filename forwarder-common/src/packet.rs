//! From the bytes of a packet to the TCP segment in it: pure, so that the same code runs in the kernel and in tests.

use network_types::eth::EthHdr;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::vlan::VlanHdr;

use crate::tuple::FourTuple;
use crate::tuple::{AddressBytes, mapped_v4};
use crate::verdict::Verdict;

/// How many IPv6 extension headers are walked. Linux sends at most a few; the bound is for the verifier.
const MAX_EXTENSION_HEADERS: usize = 8;

const ETHER_TYPE_IPV4: u16 = 0x0800;
const ETHER_TYPE_IPV6: u16 = 0x86dd;
const ETHER_TYPE_VLAN: u16 = 0x8100;
const ETHER_TYPE_VLAN_SERVICE: u16 = 0x88a8;

const PROTOCOL_HOP_BY_HOP: u8 = 0;
/// The number of TCP in IP headers and in the pseudo-header.
pub const PROTOCOL_TCP: u8 = 6;
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
/// The bits there that say that other fragments follow.
pub const IPV4_MORE_FRAGMENTS: u16 = 0x2000;
/// The same of IPv6.
pub const IPV6_MORE_FRAGMENTS: u16 = 1;

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
    use super::{EthHdr, ExtensionHeader, Header, Ipv4Hdr, Ipv6Hdr, TcpHeader, VlanHdr};

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
    // SAFETY: an array of integers.
    unsafe impl Header for TcpHeader {}
}

/// Bytes of IPv6's fragment header.
const FRAGMENT_HEADER: usize = 8;

/// The first eight bytes of an IPv6 extension header: no kind is shorter.
type ExtensionHeader = [u8; 8];

/// The TCP header without its options, as 32-bit words as they lie there.
type TcpHeader = [u32; 5];

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

/// The flag bits of a TCP segment (RFC 9293, 3.1).
pub const FLAG_FIN: u8 = 0x01;
/// Opens a connection.
pub const FLAG_SYN: u8 = 0x02;
/// Ends a connection at once.
pub const FLAG_RST: u8 = 0x04;
/// Asks to deliver without waiting for more.
pub const FLAG_PSH: u8 = 0x08;
/// The acknowledgement number is valid.
pub const FLAG_ACK: u8 = 0x10;

/// Where fields stand in the TCP header, in bytes from its first.
pub mod tcp_field {
    /// The source port, followed by the destination port.
    pub const PORTS: usize = 0;
    /// The sequence number.
    pub const SEQUENCE: usize = 4;
    /// The acknowledgement number.
    pub const ACKNOWLEDGEMENT: usize = 8;
    /// The flags without the header's length.
    pub const FLAGS: usize = 13;
    /// The window.
    pub const WINDOW: usize = 14;
    /// The checksum.
    pub const CHECKSUM: usize = 16;
}

/// A TCP segment, as far as the programs care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Segment {
    /// Its addresses and ports.
    pub tuple: FourTuple,
    /// How many bytes precede the IP header.
    pub ip_offset: u32,
    /// How many bytes precede the TCP header.
    pub tcp_offset: u32,
    /// Bytes of the TCP header, as it says: 20 to 60, or less where it lies.
    pub header_length: u32,
    /// Bytes of the packet from the IP header on, as that says; 0 for one that is too long to say so (`ipv6_jumbo`).
    pub ip_length: u32,
    /// The IP version.
    pub version: IpVersion,
    /// The sequence number, in host byte order.
    pub sequence: u32,
    /// The acknowledgement number, in host byte order.
    pub acknowledgement: u32,
    /// The window, unscaled, in host byte order.
    pub window: u16,
    /// The flags: [`FLAG_SYN`] and the others.
    pub flags: u8,
    /// Whether it is only the beginning of a segment, whose rest comes in other fragments.
    pub is_first_fragment: bool,
}

impl Segment {
    /// Whether it asks for a connection: SYN without ACK.
    #[inline(always)]
    pub const fn is_attempt(&self) -> bool {
        self.flags & (FLAG_SYN | FLAG_ACK) == FLAG_SYN
    }
}

/// The headers of a frame such as most are, as 32-bit words as they lie there from [`USUAL_OFFSET`] on: the last two bytes of
/// the Ethernet addresses and the type, an IPv4 header without options or an IPv6 header without others behind it, and a TCP header without options or with
/// timestamps alone. What stands behind the shorter ones means nothing.
pub type UsualHeaders = [u32; USUAL_WORDS_V6 + USUAL_WORDS_OF_OPTIONS];

/// Where [`UsualHeaders`] begin, in bytes from the frame's first.
pub const USUAL_OFFSET: usize = 10;

/// So many of the words hold headers of IPv4, without TCP options.
pub const USUAL_WORDS_V4: usize = 11;
/// So many those of IPv6.
pub const USUAL_WORDS_V6: usize = 16;
/// So many more the timestamps.
pub const USUAL_WORDS_OF_OPTIONS: usize = 3;

/// Version and header length of IPv4 without options.
const USUAL_IPV4: u32 = 0x45;
/// Length of the TCP header without options, in bytes.
const BARE_TCP_HEADER: u32 = 20;
/// Length of the TCP header with timestamps alone, in bytes.
pub const USUAL_TCP_HEADER: u32 = 32;
/// How Linux writes timestamps: two NOPs, then kind and length of the option. In host byte order.
pub const USUAL_OPTIONS: u32 = 0x0101_080a;

/// Whether a frame is one of IPv6 without tag, by the first of its [`UsualHeaders`].
#[inline(always)]
#[must_use]
pub const fn is_usual_v6(first: u32) -> bool {
    u32::from_be(first) & 0xffff == ETHER_TYPE_IPV6 as u32
}

/// Finds the TCP segment in a frame whose headers are such as most are, of which so many words are at hand; `None` says nothing but that they are not such, or not
/// all at hand. A short cut for [`parse`], which finds the same.
#[inline(always)]
pub const fn parse_usual(headers: &UsualHeaders, at_hand: usize) -> Option<Segment> {
    if is_usual_v6(headers[0]) { parse_usual_v6(headers, at_hand) } else { parse_usual_v4(headers, at_hand) }
}

#[inline(always)]
const fn parse_usual_v4(headers: &UsualHeaders, at_hand: usize) -> Option<Segment> {
    let [ether_type, ip, fragment, protocol, source, destination, tcp @ .., _, _, _, _, _] = *headers;
    let ip = u32::from_be(ip);
    if u32::from_be(ether_type) & 0xffff != ETHER_TYPE_IPV4 as u32
        || ip >> 24 != USUAL_IPV4
        || u32::from_be(fragment) & (IPV4_FRAGMENT_OFFSET | IPV4_MORE_FRAGMENTS) as u32 != 0
        || u32::from_be(protocol) >> 16 & 0xff != PROTOCOL_TCP as u32
    {
        return None;
    }
    let mapped = 0xffff_u32.to_be();
    let ip = UsualIp {
        version: IpVersion::V4,
        addresses: [0, 0, mapped, source, 0, 0, mapped, destination],
        header_length: Ipv4Hdr::LEN,
        length: ip & 0xffff,
    };
    parse_usual_tcp(&tcp, at_hand, USUAL_WORDS_V4, ip)
}

#[inline(always)]
const fn parse_usual_v6(headers: &UsualHeaders, at_hand: usize) -> Option<Segment> {
    let [_, first, length, addresses @ .., _, _, _, _, _, _, _, _] = *headers;
    let [_, _, _, _, _, _, _, _, _, _, _, tcp @ ..] = *headers;
    let length = u32::from_be(length);
    if u32::from_be(first) >> 28 != 6 || length >> 8 & 0xff != PROTOCOL_TCP as u32 || length >> 16 == 0 {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "40")]
    let ip = UsualIp {
        version: IpVersion::V6,
        addresses,
        header_length: Ipv6Hdr::LEN,
        length: (length >> 16) + Ipv6Hdr::LEN as u32,
    };
    parse_usual_tcp(&tcp, at_hand, USUAL_WORDS_V6, ip)
}

/// What the IP header of a usual frame says.
struct UsualIp {
    version: IpVersion,
    addresses: [u32; 8],
    header_length: usize,
    length: u32,
}

/// The same of the TCP header, whose words without options end after `bare` of those of the frame.
#[inline(always)]
const fn parse_usual_tcp(tcp: &[u32; 8], at_hand: usize, bare: usize, ip: UsualIp) -> Option<Segment> {
    let [ports, sequence, acknowledgement, misc, _, options, _, _] = *tcp;
    let misc = u32::from_be(misc);
    let header_length = misc >> 28 << 2;
    let is_bare = header_length == BARE_TCP_HEADER && at_hand >= bare;
    let has_timestamps = header_length == USUAL_TCP_HEADER
        && at_hand >= bare + USUAL_WORDS_OF_OPTIONS
        && u32::from_be(options) == USUAL_OPTIONS;
    if !is_bare && !has_timestamps {
        return None;
    }
    let ports = u32::from_be(ports);
    #[expect(clippy::cast_possible_truncation, reason = "parts of words, and small constants")]
    Some(Segment {
        tuple: FourTuple::of_words(ip.addresses, (ports >> 16) as u16, ports as u16),
        ip_offset: EthHdr::LEN as u32,
        tcp_offset: (EthHdr::LEN + ip.header_length) as u32,
        header_length,
        ip_length: ip.length,
        version: ip.version,
        sequence: u32::from_be(sequence),
        acknowledgement: u32::from_be(acknowledgement),
        window: misc as u16,
        flags: (misc >> 16) as u8,
        is_first_fragment: false,
    })
}

/// Finds the TCP segment in `packet`.
///
/// # Errors
/// The verdict on a packet in which there is none.
#[inline(always)]
pub fn parse<P: Packet + ?Sized>(packet: &P, link: LinkLayer) -> Result<Segment, Verdict> {
    let (version, ip_offset) = ip_header(packet, link)?;
    match version {
        IpVersion::V4 => parse_ipv4(packet, ip_offset),
        IpVersion::V6 => parse_ipv6(packet, ip_offset),
    }
}

/// The version of IP, and where its header begins.
///
/// # Errors
/// The verdict on a packet of neither version.
#[inline(always)]
pub fn ip_header<P: Packet + ?Sized>(packet: &P, link: LinkLayer) -> Result<(IpVersion, usize), Verdict> {
    match link {
        LinkLayer::Ethernet => parse_ethernet(packet),
        LinkLayer::Ip => Ok((parse_version(packet)?, 0)),
    }
}

/// The version of IP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The IP version and where its header begins, behind at most one VLAN tag. (The kernel moves the outermost tag from the
/// frame into the metadata before the ingress program runs: `skb_vlan_untag` in `__netif_receive_skb_core`.)
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
    let flags = u16::from_be_bytes(ip.frags);
    if flags & IPV4_FRAGMENT_OFFSET != 0 {
        return Err(Verdict::Fragment);
    }
    let is_first_fragment = flags & IPV4_MORE_FRAGMENTS != 0;
    let addresses = Addresses { source: mapped_v4(ip.src_addr), destination: mapped_v4(ip.dst_addr) };
    let length = u32::from(u16::from_be_bytes(ip.tot_len));
    let ip = Ip { version: IpVersion::V4, offset: ip_offset, length, addresses, is_first_fragment };
    parse_tcp(packet, ip_offset + header_length, ip)
}

#[inline(always)]
fn parse_ipv6<P: Packet + ?Sized>(packet: &P, ip_offset: usize) -> Result<Segment, Verdict> {
    let ip: Ipv6Hdr = packet.read(ip_offset).ok_or(Verdict::Truncated)?;
    if ip.vcf[0] >> 4 != 6 {
        return Err(Verdict::NotIp);
    }
    let addresses = Addresses { source: ip.src_addr, destination: ip.dst_addr };
    let length = match u16::from_be_bytes(ip.payload_len) {
        0 => 0,
        #[expect(clippy::cast_possible_truncation, reason = "40")]
        payload => u32::from(payload) + Ipv6Hdr::LEN as u32,
    };
    let mut protocol = ip.next_hdr;
    let mut offset = ip_offset + Ipv6Hdr::LEN;
    let mut is_first_fragment = false;
    // One turn more than there are headers: the last one only looks at the protocol.
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if protocol == PROTOCOL_TCP {
            let ip = Ip { version: IpVersion::V6, offset: ip_offset, length, addresses, is_first_fragment };
            return parse_tcp(packet, offset, ip);
        }
        let Some(extension) = parse_extension(packet, protocol, offset)? else {
            return Err(Verdict::NotTcp);
        };
        protocol = extension.next;
        offset += extension.length;
        is_first_fragment |= extension.is_first_fragment;
    }
    Err(Verdict::TooManyHeaders)
}

/// An IPv6 extension header.
struct Extension {
    /// The protocol after it.
    next: u8,
    /// Its length in bytes.
    length: usize,
    /// Whether it is the fragment header of a first fragment.
    is_first_fragment: bool,
}

/// The extension header at `offset`; `None` if `protocol` is no extension header. An encrypted packet has none either.
#[inline(always)]
fn parse_extension<P: Packet + ?Sized>(
    packet: &P,
    protocol: u8,
    offset: usize,
) -> Result<Option<Extension>, Verdict> {
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
        let flags = u16::from_be_bytes([high, low]);
        if flags & IPV6_FRAGMENT_OFFSET != 0 {
            return Err(Verdict::Fragment);
        }
        let is_first_fragment = flags & IPV6_MORE_FRAGMENTS != 0;
        return Ok(Some(Extension { next, length: FRAGMENT_HEADER, is_first_fragment }));
    }
    let announced = usize::from(announced);
    let length = if is_authentication { (announced + 2) * 4 } else { (announced + 1) * 8 };
    Ok(Some(Extension { next, length, is_first_fragment: false }))
}

struct Addresses {
    source: AddressBytes,
    destination: AddressBytes,
}

struct Ip {
    version: IpVersion,
    offset: usize,
    length: u32,
    addresses: Addresses,
    is_first_fragment: bool,
}

#[inline(always)]
fn parse_tcp<P: Packet + ?Sized>(packet: &P, tcp_offset: usize, ip: Ip) -> Result<Segment, Verdict> {
    let [ports, sequence, acknowledgement, misc, _]: TcpHeader =
        packet.read(tcp_offset).ok_or(Verdict::Truncated)?;
    let (ports, misc) = (u32::from_be(ports), u32::from_be(misc));
    #[expect(clippy::cast_possible_truncation, reason = "parts of words, and some hundred bytes at most")]
    Ok(Segment {
        tuple: FourTuple {
            source: ip.addresses.source,
            destination: ip.addresses.destination,
            source_port: (ports >> 16) as u16,
            destination_port: ports as u16,
        },
        ip_offset: ip.offset as u32,
        tcp_offset: tcp_offset as u32,
        header_length: misc >> 28 << 2,
        ip_length: ip.length,
        version: ip.version,
        sequence: u32::from_be(sequence),
        acknowledgement: u32::from_be(acknowledgement),
        window: misc as u16,
        flags: (misc >> 16) as u8,
        is_first_fragment: ip.is_first_fragment,
    })
}

mod fragment;
pub use fragment::{Fragment, parse_fragment};

#[cfg(test)]
mod samples;
#[cfg(test)]
mod tests;
