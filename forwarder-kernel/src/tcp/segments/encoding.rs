//! From what is to be said to the bytes of the packet: pure.

use std::net::{Ipv4Addr, Ipv6Addr};

use forwarder_common::packet::{FLAG_ACK, FLAG_RST, PROTOCOL_TCP};

use super::{Bare, BareKind, Ends};

/// How many routers may pass it on.
const HOP_LIMIT: u8 = 64;
/// "Don't fragment": with it, the packet needs no identification (RFC 6864, 4.1).
const DONT_FRAGMENT: u16 = 0x4000;

const IPV4_HEADER: u16 = 20;
/// Where the checksums stand in their headers.
const IPV4_CHECKSUM: usize = 10;
const TCP_CHECKSUM: usize = 16;

/// The packet that `bare` means.
pub(super) fn bare(ends: &Ends, bare: &Bare) -> Vec<u8> {
    segment(ends, bare, &[])
}

/// The same with payload, of an even number of bytes.
pub(super) fn segment(ends: &Ends, bare: &Bare, payload: &[u8]) -> Vec<u8> {
    let flags = match bare.kind {
        BareKind::Reset => FLAG_RST | FLAG_ACK,
        BareKind::Probe => FLAG_ACK,
    };
    let mut options = Vec::new();
    if let Some(timestamps) = bare.timestamps {
        // NOP, NOP, and the timestamps' kind and length.
        options.extend([1, 1, 8, 10]);
        options.extend(timestamps.value.to_be_bytes());
        options.extend(timestamps.echo.to_be_bytes());
    }
    let (from, to) = match ends {
        Ends::V4 { from, to } => (from.port(), to.port()),
        Ends::V6 { from, to } => (from.port(), to.port()),
    };
    let numbers = [bare.sequence, bare.acknowledgement];
    let mut segment = tcp_header([from, to], numbers, flags, bare.window, &options);
    segment.extend(payload);
    let sum = checksum(&[&pseudo_header(ends, PROTOCOL_TCP, segment.len()), &segment]);
    put(&mut segment, TCP_CHECKSUM, sum);
    packet(ends, PROTOCOL_TCP, segment)
}

/// The IP header with what it precedes.
fn packet(ends: &Ends, protocol: u8, payload: Vec<u8>) -> Vec<u8> {
    let length = length_of(&payload);
    let mut packet = match ends {
        Ends::V4 { from, to } => {
            ipv4_header(*from.ip(), *to.ip(), protocol, length.saturating_add(IPV4_HEADER))
        }
        Ends::V6 { from, to } => ipv6_header(*from.ip(), *to.ip(), protocol, length),
    };
    packet.extend(payload);
    packet
}

/// `length` is that of the packet.
fn ipv4_header(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, length: u16) -> Vec<u8> {
    // Version 4, five words; no traffic class.
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0; 2]);
    header.extend(DONT_FRAGMENT.to_be_bytes());
    header.extend([HOP_LIMIT, protocol, 0, 0]);
    header.extend(from.octets());
    header.extend(to.octets());
    let sum = checksum(&[&header]);
    put(&mut header, IPV4_CHECKSUM, sum);
    header
}

/// `length` is that of what follows the header.
fn ipv6_header(from: Ipv6Addr, to: Ipv6Addr, protocol: u8, length: u16) -> Vec<u8> {
    // Version 6; no traffic class, no flow label.
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length.to_be_bytes());
    header.extend([protocol, HOP_LIMIT]);
    header.extend(from.octets());
    header.extend(to.octets());
    header
}

/// The TCP header, its checksum still to be computed. `ports` are those that it comes from and goes to, `numbers` those of
/// the sequence and of the acknowledgement; the length of `options` is a multiple of four.
fn tcp_header(ports: [u16; 2], numbers: [u32; 2], flags: u8, window: u16, options: &[u8]) -> Vec<u8> {
    let mut header: Vec<u8> = ports.into_iter().flat_map(u16::to_be_bytes).collect();
    header.extend(numbers.into_iter().flat_map(u32::to_be_bytes));
    let words = u8::try_from(5 + options.len() / 4).unwrap_or(u8::MAX);
    header.extend([words << 4, flags]);
    header.extend(window.to_be_bytes());
    // The checksum and the urgent pointer.
    header.extend([0; 4]);
    header.extend(options);
    header
}

/// What the checksums of TCP, and of ICMP over IPv6, cover besides the packet (RFC 9293, 3.1; RFC 8200, 8.1).
fn pseudo_header(ends: &Ends, protocol: u8, length: usize) -> Vec<u8> {
    let length = u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes();
    let mut header = Vec::new();
    match ends {
        Ends::V4 { from, to } => {
            header.extend(from.ip().octets());
            header.extend(to.ip().octets());
        }
        Ends::V6 { from, to } => {
            header.extend(from.ip().octets());
            header.extend(to.ip().octets());
        }
    }
    // The form for IPv4. That for IPv6 has wider fields, and the same sum.
    header.extend([0, protocol]);
    header.extend(length);
    header
}

/// The checksum of RFC 1071 over parts of even lengths.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.as_chunks().0).map(|word| u16::from_be_bytes(*word));
    let mut sum: u32 = words.map(u32::from).sum();
    while sum > u32::from(u16::MAX) {
        sum = (sum & u32::from(u16::MAX)) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded, it has 16 bits")]
    {
        !(sum as u16)
    }
}

/// Writes two bytes at `at`.
fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|bytes| bytes.first_chunk_mut()) {
        *field = value.to_be_bytes();
    }
}

fn length_of(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX)
}
