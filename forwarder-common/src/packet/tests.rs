use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::samples::*;
use super::*;
use crate::tuple::address_of;

const V4: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 7);
const PORT: u16 = 9001;

fn check(link: LinkLayer, packet: &[u8], expected: Result<(IpAddr, u16, bool, u32), Verdict>) {
    let parsed = parse(packet, link)
        .map(|s| (address_of(s.tuple.destination), s.tuple.destination_port, s.is_attempt(), s.ip_offset));
    assert_eq!(parsed, expected, "{link:?} {packet:02x?}");
}

fn check_framed(packet: &[u8], expected: Result<bool, Verdict>) {
    let to = if packet[0] >> 4 == 6 { V6.into() } else { V4.into() };
    check(LinkLayer::Ethernet, &framed(packet), expected.map(|attempt| (to, PORT, attempt, 14)));
    check(LinkLayer::Ip, packet, expected.map(|attempt| (to, PORT, attempt, 0)));
}

#[test]
fn source_is_found() {
    let segment = parse(ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN)).as_slice(), LinkLayer::Ip).unwrap();
    assert_eq!(address_of(segment.tuple.source), IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)));
    assert_eq!(segment.tuple.source_port, 40_000);
}

#[test]
fn ipv4_is_found_with_and_without_options() {
    check_framed(&ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN)), Ok(true));
    check_framed(&ipv4(V4, TCP, &[], 0, &tcp(PORT, ACK)), Ok(false));
    check_framed(&ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN_ACK)), Ok(false));
    check_framed(&ipv4(V4, TCP, &[1; 4], 0, &tcp(PORT, SYN)), Ok(true));
    check_framed(&ipv4(V4, TCP, &[1; 40], 0, &tcp(PORT, SYN)), Ok(true));
}

#[test]
fn ipv6_is_found_behind_extension_headers() {
    let segment = tcp(PORT, SYN);
    check_framed(&ipv6(V6, TCP, &segment), Ok(true));
    check_framed(&ipv6(V6, 0, &extension(TCP, 0, &segment)), Ok(true));
    check_framed(&ipv6(V6, 0, &extension(43, 0, &extension(60, 3, &extension(TCP, 1, &segment)))), Ok(true));
    // An authentication header of 24 bytes: its length is counted in units of 4, less 2.
    let mut authentication = vec![TCP, 4];
    authentication.resize(24, 0);
    authentication.extend(&segment);
    check_framed(&ipv6(V6, 51, &authentication), Ok(true));
}

#[test]
fn the_walk_of_extension_headers_is_bounded() {
    let chain = |count: usize| {
        let payload =
            (0..count).fold((TCP, tcp(PORT, SYN)), |(next, payload), _| (60, extension(next, 0, &payload)));
        ipv6(V6, payload.0, &payload.1)
    };
    check_framed(&chain(MAX_EXTENSION_HEADERS), Ok(true));
    check_framed(&chain(MAX_EXTENSION_HEADERS + 1), Err(Verdict::TooManyHeaders));
}

/// The short cut finds what the walk does, or leaves it to the walk: whatever stands behind what is at hand.
fn check_usual(frame: &[u8]) -> bool {
    let mut usual = [0xffff_ffff; 19];
    let (words, _) = frame.get(USUAL_OFFSET..).unwrap_or_default().as_chunks::<4>();
    usual.iter_mut().zip(words).for_each(|(word, bytes)| *word = u32::from_ne_bytes(*bytes));
    let found = parse_usual(&usual, words.len().min(usual.len()));
    if let Some(segment) = found {
        assert_eq!(Ok(segment), parse(frame, LinkLayer::Ethernet), "{frame:02x?}");
    }
    found.is_some()
}

/// Frames as most are: of IPv4 and IPv6, with timestamps as Linux writes them and without, and with how many bytes their headers have.
fn usual_frames() -> [(Vec<u8>, usize); 4] {
    let segment = |options: &[u8]| {
        let mut segment = tcp(PORT, ACK);
        segment[12] = u8::try_from(segment.len() + options.len()).unwrap() * 4;
        segment.extend(options);
        segment.extend(b"payload");
        segment
    };
    let (bare, timestamps) = (segment(&[]), segment(&[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8]));
    [
        (framed(&ipv4(V4, TCP, &[], 0x4000, &timestamps)), 66),
        (framed(&ipv4(V4, TCP, &[], 0x4000, &bare)), 54),
        (framed(&ipv6(V6, TCP, &timestamps)), 86),
        (framed(&ipv6(V6, TCP, &bare)), 74),
    ]
}

#[test]
fn what_most_packets_are_is_found_at_once() {
    for (frame, headers) in usual_frames() {
        assert!(check_usual(&frame));
        assert!(check_usual(&frame[..headers]));
        assert!(!check_usual(&frame[..headers - 1]));
    }
}

proptest! {
    #[test]
    fn the_short_cut_finds_what_the_walk_does(
        which in 0_usize..4,
        changes in proptest::collection::vec((10_usize..60, any::<u8>()), 0..4),
    ) {
        let (mut frame, _) = usual_frames()[which].clone();
        for (place, byte) in changes {
            frame[place] = byte;
        }
        check_usual(&frame);
    }
}

#[test]
fn only_first_fragments_have_a_header() {
    const MORE_FRAGMENTS: u16 = 0x2000;
    let segment = tcp(PORT, SYN);
    check_framed(&ipv4(V4, TCP, &[], MORE_FRAGMENTS, &segment), Ok(true));
    check_framed(&ipv4(V4, TCP, &[], 0x4000, &segment), Ok(true));
    check_framed(&ipv4(V4, TCP, &[], MORE_FRAGMENTS | 2, &segment), Err(Verdict::Fragment));
    check_framed(&ipv4(V4, TCP, &[], 2, &segment), Err(Verdict::Fragment));
    check_framed(&ipv6(V6, 44, &fragment_header(TCP, 0, &segment)), Ok(true));
    check_framed(&ipv6(V6, 44, &fragment_header(TCP, 2, &segment)), Err(Verdict::Fragment));
}

#[test]
fn one_inline_vlan_tag_is_skipped() {
    let packet = ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN));
    for tag in [0x8100, 0x88a8] {
        check(LinkLayer::Ethernet, &ethernet(0x0800, &[tag], &packet), Ok((V4.into(), PORT, true, 18)));
    }
    check(LinkLayer::Ethernet, &ethernet(0x0800, &[0x88a8, 0x8100], &packet), Err(Verdict::NotIp));
}

#[test]
fn other_protocols_are_told_apart() {
    check_framed(&ipv4(V4, UDP, &[], 0, &[0; 8]), Err(Verdict::NotTcp));
    check_framed(&ipv6(V6, UDP, &[0; 8]), Err(Verdict::NotTcp));
    check_framed(&ipv6(V6, 0, &extension(UDP, 0, &[0; 8])), Err(Verdict::NotTcp));
    check_framed(&ipv6(V6, 50, &[0; 32]), Err(Verdict::NotTcp));
    check(LinkLayer::Ethernet, &ethernet(0x0806, &[], &[0; 28]), Err(Verdict::NotIp));
    check(LinkLayer::Ip, &[0; 40], Err(Verdict::NotIp));
}

#[test]
fn malformed_headers_are_no_ip() {
    let mut short_header = ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN));
    short_header[0] = 0x44;
    check_framed(&short_header, Err(Verdict::NotIp));
    // The Ethernet header says IPv6, the packet IPv4, and the reverse.
    let v4 = ipv4(V4, TCP, &[], 0, &tcp(PORT, SYN));
    check(LinkLayer::Ethernet, &ethernet(0x86dd, &[], &v4), Err(Verdict::NotIp));
    let v6 = ipv6(V6, TCP, &tcp(PORT, SYN));
    check(LinkLayer::Ethernet, &ethernet(0x0800, &[], &v6), Err(Verdict::NotIp));
}

#[test]
fn every_truncation_is_told() {
    for packet in [
        ipv4(V4, TCP, &[1; 8], 0, &tcp(PORT, SYN)),
        ipv6(V6, 0, &extension(44, 1, &fragment_header(TCP, 0, &tcp(PORT, SYN)))),
    ] {
        for length in 0..packet.len() {
            check(LinkLayer::Ip, &packet[..length], Err(Verdict::Truncated));
        }
        let frame = framed(&packet);
        for length in 0..frame.len() {
            check(LinkLayer::Ethernet, &frame[..length], Err(Verdict::Truncated));
        }
    }
}
