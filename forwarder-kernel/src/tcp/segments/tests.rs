//! What the packets say, by the parser of the programs.

use forwarder_common::packet::{FLAG_ACK, FLAG_RST, IpVersion, LinkLayer, Segment, parse, tcp_field};
use forwarder_common::translate::OptionsWalk;
use forwarder_common::tuple::address_bytes;
use proptest::prelude::*;

use super::*;

fn end(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// The sum of 16-bit words in ones' complement: all ones over what holds its own checksum.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for word in bytes.chunks(2) {
        sum += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).unwrap()
}

/// Checks the checksums of a packet, and that its headers tell its length and protocol; what is behind the IP header.
#[track_caller]
fn checked(packet: &[u8], protocol: u8, has_pseudo_header: bool) -> &[u8] {
    let (is_ipv4, length) = (packet[0] >> 4 == 4, u16::try_from(packet.len()).unwrap());
    let (addresses, payload) = if is_ipv4 {
        assert_eq!(sum(&packet[..20]), 0xffff, "the IP header");
        assert_eq!(packet[2..4], length.to_be_bytes());
        assert_eq!(packet[9], protocol);
        (&packet[12..20], &packet[20..])
    } else {
        assert_eq!(packet[4..6], (length - 40).to_be_bytes());
        assert_eq!(packet[6], protocol);
        (&packet[8..40], &packet[40..])
    };
    let mut covered = Vec::new();
    if has_pseudo_header {
        covered.extend(addresses);
        covered.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        covered.extend([0, 0, 0, protocol]);
    }
    covered.extend(payload);
    assert_eq!(sum(&covered), 0xffff, "behind the IP header");
    payload
}

fn parsed(packet: &[u8]) -> Segment {
    parse(packet, LinkLayer::Ip).unwrap()
}

#[track_caller]
fn check_bare(bare: &Bare) {
    let packet = bare.encode().unwrap();
    let tcp = checked(&packet, 6, true);
    let segment = parsed(&packet);
    let (from, to) = (bare.from.ip().to_canonical(), bare.to.ip().to_canonical());
    assert_eq!(segment.tuple.source, address_bytes(from));
    assert_eq!(segment.tuple.destination, address_bytes(to));
    assert_eq!(segment.tuple.source_port, bare.from.port());
    assert_eq!(segment.tuple.destination_port, bare.to.port());
    assert_eq!(segment.version, if from.is_ipv4() { IpVersion::V4 } else { IpVersion::V6 });
    assert_eq!(segment.sequence, bare.sequence);
    assert_eq!(segment.acknowledgement, bare.acknowledgement);
    assert_eq!(segment.window, bare.window);
    let flags = match bare.kind {
        BareKind::Reset => FLAG_RST | FLAG_ACK,
        BareKind::Probe => FLAG_ACK,
    };
    assert_eq!(segment.flags, flags);
    assert_eq!(usize::try_from(segment.header_length).unwrap(), tcp.len(), "no payload");
    let mut walk = OptionsWalk::new();
    let read = |at: u32| tcp.get(usize::try_from(at).unwrap()).copied();
    while !walk.step(segment.header_length, read).unwrap() {}
    let timestamps = (walk.found.timestamps > 0).then(|| {
        let at = usize::try_from(walk.found.timestamps).unwrap();
        let word = |at: usize| u32::from_be_bytes(tcp[at..at + 4].try_into().unwrap());
        Timestamps { value: word(at), echo: word(at + 4) }
    });
    assert_eq!(timestamps, bare.timestamps);
}

fn v6() -> impl Strategy<Value = SocketAddrV6> {
    any::<SocketAddrV6>().prop_filter("stands for IPv4", |end| end.ip().to_ipv4_mapped().is_none())
}

fn ends() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    prop_oneof![
        any::<(SocketAddrV4, SocketAddrV4)>().prop_map(|(from, to)| (from.into(), to.into())),
        (v6(), v6()).prop_map(|(from, to)| (from.into(), to.into())),
        any::<(SocketAddrV4, SocketAddrV4)>().prop_map(|(from, to)| {
            let mapped = SocketAddr::new(from.ip().to_ipv6_mapped().into(), from.port());
            (mapped, to.into())
        }),
    ]
}

proptest! {
    #[test]
    fn a_segment_says_what_it_is_meant_to(
        (from, to) in ends(),
        (sequence, acknowledgement, window) in any::<(u32, u32, u16)>(),
        is_reset in any::<bool>(),
        timestamps in any::<Option<(u32, u32)>>(),
    ) {
        let kind = if is_reset { BareKind::Reset } else { BareKind::Probe };
        let timestamps = timestamps.map(|(value, echo)| Timestamps { value, echo });
        check_bare(&Bare { from, to, sequence, acknowledgement, window, kind, timestamps });
    }
}

#[test]
fn a_packet_has_the_bytes_that_the_standards_say() {
    let bare = Bare {
        from: end("192.0.2.1:80"),
        to: end("198.51.100.2:4321"),
        sequence: 0x0102_0304,
        acknowledgement: 0x0506_0708,
        window: 0x0910,
        kind: BareKind::Probe,
        timestamps: None,
    };
    let packet = bare.encode().unwrap();
    assert_eq!(packet[..10], [0x45, 0, 0, 40, 0, 0, 0x40, 0, 64, 6]);
    assert_eq!(packet[12..20], [192, 0, 2, 1, 198, 51, 100, 2]);
    assert_eq!(packet[20..36], [0, 80, 0x10, 0xe1, 1, 2, 3, 4, 5, 6, 7, 8, 0x50, 0x10, 9, 0x10]);
    assert_eq!(packet[20 + tcp_field::CHECKSUM + 2..], [0, 0], "the urgent pointer");
}

#[test]
fn ends_of_different_families_are_refused() {
    let (from, to) = (end("192.0.2.1:80"), end("[2001:db8::1]:81"));
    let bare = Bare {
        from,
        to,
        sequence: 0,
        acknowledgement: 0,
        window: 0,
        kind: BareKind::Reset,
        timestamps: None,
    };
    let told = bare.encode().unwrap_err().to_string();
    assert_eq!(
        told,
        "no packet leads from 192.0.2.1:80 to [2001:db8::1]:81: the addresses are of different families"
    );
}
