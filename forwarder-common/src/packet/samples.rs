// Builders of packets for tests; the agent's tests of the loaded program include this file too.

use std::net::{Ipv4Addr, Ipv6Addr};

pub(crate) const SYN: u8 = 0x02;
pub(crate) const SYN_ACK: u8 = 0x12;
pub(crate) const ACK: u8 = 0x10;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// An Ethernet frame to the all-zero address (that of `lo`), behind the given VLAN tags' types.
pub(crate) fn ethernet(ether_type: u16, tags: &[u16], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; 12];
    for tag in tags {
        frame.extend(tag.to_be_bytes());
        frame.extend([0, 100]);
    }
    frame.extend(ether_type.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A frame of the packet, whose version tells its type.
pub(crate) fn framed(packet: &[u8]) -> Vec<u8> {
    ethernet(ether_type(packet), &[], packet)
}

pub(crate) fn ether_type(packet: &[u8]) -> u16 {
    if packet[0] >> 4 == 6 { 0x86dd } else { 0x0800 }
}

pub(crate) fn tcp(port: u16, flags: u8) -> Vec<u8> {
    let mut header = Vec::new();
    header.extend(40_000_u16.to_be_bytes());
    header.extend(port.to_be_bytes());
    header.extend([0; 8]);
    header.extend([5 << 4, flags]);
    header.extend([0; 6]);
    header
}

/// An IPv4 packet; `options` is a multiple of 4 bytes, `fragment` the offset in units of 8 bytes.
pub(crate) fn ipv4(to: Ipv4Addr, protocol: u8, options: &[u8], fragment: u16, payload: &[u8]) -> Vec<u8> {
    let header_length = 20 + options.len();
    let mut packet = vec![0x40 | u8::try_from(header_length / 4).unwrap(), 0];
    packet.extend(u16::try_from(header_length + payload.len()).unwrap().to_be_bytes());
    packet.extend([0, 1]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(Ipv4Addr::new(192, 0, 2, 1).octets());
    packet.extend(to.octets());
    packet.extend(options);
    packet.extend(payload);
    packet
}

/// An IPv6 packet; `payload` begins with the header that `next` names.
pub(crate) fn ipv6(to: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(u16::try_from(payload.len()).unwrap().to_be_bytes());
    packet.extend([next, 64]);
    packet.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// An IPv6 extension header of 8 bytes and `more` times as many, before `payload`.
pub(crate) fn extension(next: u8, more: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, more];
    bytes.resize(8 + usize::from(more) * 8, 0);
    bytes.extend(payload);
    bytes
}

/// An IPv6 fragment header, `offset` in units of 8 bytes, before `payload`.
pub(crate) fn fragment_header(next: u8, offset: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![next, 0];
    bytes.extend((offset << 3 | 1).to_be_bytes());
    bytes.extend([0, 0, 0, 9]);
    bytes.extend(payload);
    bytes
}
