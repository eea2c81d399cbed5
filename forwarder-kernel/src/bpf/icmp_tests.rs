//! What the ingress program says, and passes on, of packets that are too large: run by the kernel over crafted packets.

use std::collections::BTreeMap;

use aya::programs::SchedClassifier;
use aya::{TestRun as _, TestRunOptions};
use forwarder_common::flow::{DIRECTION_RESPONSE, Flow, STATE_OFFLOADED};
use forwarder_common::tuple::FourTuple;
use forwarder_common::tuple::address_of;
use forwarder_common::{PROGRAM_ETHERNET, Verdict};

use super::frames::{
    Frame, REVERSE_SHIFT, SEQUENCE_SHIFT, TC_ACT_REDIRECT, TC_ACT_SHOT, at, bytes_of, checksum, flow_v4,
    flow_v6, known_clocks, with_flow,
};
use super::{Bpf, TC_ACT_UNSPEC, run, verdicts, write_flows};

/// The path MTU that messages tell.
const MTU: u16 = 1400;

/// What a router says, in an Ethernet frame.
#[derive(Clone, Debug)]
struct Word {
    from: Vec<u8>,
    to: Vec<u8>,
    /// The tuple of the packet that it quotes.
    quoted: FourTuple,
    sequence: u32,
    /// Of both headers; IPv4 only.
    ip_options: Vec<u8>,
    /// What is quoted behind the sequence number.
    rest: Vec<u8>,
    type_and_code: [u8; 2],
}

impl Word {
    fn of(quoted: FourTuple, sequence: u32) -> Self {
        let to = address_of(quoted.source);
        Self {
            from: if to.is_ipv4() { vec![203, 0, 113, 254] } else { vec![0xfe; 16] },
            to: bytes_of(to),
            quoted,
            sequence,
            ip_options: Vec::new(),
            rest: vec![7; 12],
            type_and_code: if to.is_ipv4() { [3, 4] } else { [2, 0] },
        }
    }

    fn is_v4(&self) -> bool {
        self.to.len() == 4
    }

    fn header(&self, protocol: u8, from: &[u8], to: &[u8], length: usize) -> Vec<u8> {
        if !self.is_v4() {
            let length = u16::try_from(length).unwrap().to_be_bytes();
            return [&[0x60, 0, 0, 0, length[0], length[1], protocol, 64], from, to].concat();
        }
        let words = u8::try_from(5 + self.ip_options.len() / 4).unwrap();
        let length = u16::try_from(length + usize::from(words) * 4).unwrap().to_be_bytes();
        let start = [0x40 | words, 0, length[0], length[1], 0, 1, 0x40, 0, 64, protocol, 0, 0];
        let mut header = [&start, from, to, &self.ip_options].concat();
        let sum = checksum(&[&header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
        header
    }

    fn encode(&self) -> Vec<u8> {
        let (source, destination) = (address_of(self.quoted.source), address_of(self.quoted.destination));
        let mut message = [&self.type_and_code[..], &[0; 4], &MTU.to_be_bytes()].concat();
        message.extend(self.header(6, &bytes_of(source), &bytes_of(destination), 1480));
        message.extend(self.quoted.source_port.to_be_bytes());
        message.extend(self.quoted.destination_port.to_be_bytes());
        message.extend(self.sequence.to_be_bytes());
        message.extend(&self.rest);
        let protocol = if self.is_v4() { 1 } else { 58 };
        let pseudo = if self.is_v4() {
            Vec::new()
        } else {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            [&self.from, &self.to, &length[..], &[0, 0, 0, 58]].concat()
        };
        let sum = checksum(&[&pseudo, &message]).to_be_bytes();
        message[2..4].copy_from_slice(&sum);
        let ether_type = if self.is_v4() { [8, 0] } else { [0x86, 0xdd] };
        [&[0; 12], &ether_type[..], &self.header(protocol, &self.from, &self.to, message.len()), &message]
            .concat()
    }
}

/// The opposite of a flow: what comes from where its packets go.
fn reverse(key: FourTuple, flow: &Flow) -> (FourTuple, Flow) {
    let reverse = Flow {
        out: key.reversed(),
        interface: 1,
        direction: DIRECTION_RESPONSE,
        state: STATE_OFFLOADED,
        sequence_shift: REVERSE_SHIFT,
        acknowledgement_shift: SEQUENCE_SHIFT.wrapping_neg(),
        ..*flow
    };
    (flow.out.reversed(), reverse)
}

/// A program with both directions of a pair; `None` where none can run.
fn with_both((key, flow): (FourTuple, Flow)) -> Option<(super::Bpffs, Bpf)> {
    let (bpffs, mut bpf) = with_flow(key, flow, known_clocks())?;
    write_flows(&mut bpf, &[reverse(key, &flow)]);
    Some((bpffs, bpf))
}

#[track_caller]
fn check_passed_on((key, flow): (FourTuple, Flow), change: impl Fn(&mut Word)) {
    const SEQUENCE: u32 = 0x0102_0304;
    let Some((_bpffs, bpf)) = with_both((key, flow)) else { return };
    let mut word = Word::of(flow.out, SEQUENCE.wrapping_add(SEQUENCE_SHIFT));
    change(&mut word);
    let (action, out) = run(&bpf, PROGRAM_ETHERNET, &word.encode());
    assert_eq!((action, verdicts(&bpf)), (TC_ACT_REDIRECT, BTreeMap::from([(Verdict::TooBigPassedOn, 1)])));
    // From the address that the sender knows, about the packet that it has sent.
    let expected = Word {
        from: bytes_of(address_of(key.destination)),
        to: bytes_of(address_of(key.source)),
        quoted: key,
        sequence: SEQUENCE,
        ..word
    };
    assert_eq!(out, expected.encode());
}

#[test]
fn what_a_router_says_is_passed_on() {
    for flow in [flow_v4(), flow_v6()] {
        check_passed_on(flow, |_| {});
        check_passed_on(flow, |word| word.rest.clear());
        check_passed_on(flow, |word| word.rest = vec![0x5a; 501]);
    }
    check_passed_on(flow_v4(), |word| word.ip_options = vec![1; 8]);
}

#[test]
fn what_a_router_says_of_others_is_left_to_the_stack() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        let Some((_bpffs, bpf)) = with_both((key, flow)) else { return };
        let word = Word::of(flow.out, 5);
        let mut frames = Vec::new();
        // Another port, what the sender itself sent, another type, another code, and a quote of somebody else's packet.
        let other = FourTuple { destination_port: flow.out.destination_port + 1, ..flow.out };
        frames.push(Word { quoted: other, ..word.clone() });
        frames.push(Word::of(key, 5));
        frames.push(Word { type_and_code: [11, 0], ..word.clone() });
        frames.push(Word { type_and_code: [word.type_and_code[0], 1], ..word.clone() });
        frames.push(Word { to: vec![9; word.to.len()], ..word.clone() });
        let mut frames: Vec<_> = frames.iter().map(Word::encode).collect();
        // The quote ends within the sequence number, the ports, the IP header, and the ICMP header.
        let whole = word.encode();
        let header = if word.is_v4() { 20 } else { 40 };
        frames.extend([13, 17, 21, 35, 42].map(|less| whole[..whole.len() - less].to_vec()));
        frames.push(whole[..14 + header + 4].to_vec());
        let count = u64::try_from(frames.len()).unwrap();
        for frame in frames {
            assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
        }
        assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::NotTcp, count)]));
    }
}

#[test]
fn what_a_router_says_of_a_pair_that_has_ended_is_left_to_the_stack() {
    let (key, flow) = flow_v4();
    let flow = Flow { pair: super::PAIR + 1, ..flow };
    let Some((_bpffs, bpf)) = with_both((key, flow)) else { return };
    let frame = Word::of(flow.out, 5).encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
}

/// A packet of `length` bytes from the IP header on, to leave by an interface that takes 1400.
fn large(
    (key, flow): (FourTuple, Flow),
    ip_options: &[u8],
    length: usize,
) -> Option<(i32, Vec<u8>, Vec<u8>, Bpf)> {
    let mut frame = Frame { ip_options: ip_options.to_vec(), ..Frame::new(key) };
    frame.payload.clear();
    let headers = frame.encode().len() - 14;
    frame.payload = vec![0xa5; length - headers];
    let flow = Flow { mtu: MTU.into(), ..flow };
    let (_bpffs, mut bpf) = with_flow(key, flow, at(&frame))?;
    write_flows(&mut bpf, &[reverse(key, &flow)]);
    let packet = frame.encode();
    let (action, out) = run(&bpf, PROGRAM_ETHERNET, &packet);
    Some((action, packet, out, bpf))
}

#[test]
fn the_sender_of_a_packet_that_is_too_large_is_told() {
    for (flow, options) in [(flow_v4(), &[][..]), (flow_v4(), &[1; 12]), (flow_v6(), &[])] {
        let Some((action, packet, out, bpf)) = large(flow, options, 1401) else { return };
        assert_eq!((action, verdicts(&bpf)), (TC_ACT_REDIRECT, BTreeMap::from([(Verdict::TooBig, 1)])));
        let is_v4 = packet[12..14] == [8, 0];
        let header = if is_v4 { 20 } else { 40 };
        let (ip, message) = out[14..].split_at(header);
        let quoted = header + options.len() + 20;
        assert_eq!(message.len(), 8 + quoted);
        // The packet as it came, but for the checksum of TCP.
        let same = quoted - 20 + 16;
        assert_eq!(message[8..8 + same], packet[14..14 + same]);
        let (source, destination) =
            (bytes_of(address_of(flow.0.source)), bytes_of(address_of(flow.0.destination)));
        let (start, length) = if is_v4 {
            assert_eq!(checksum(&[ip]), 0);
            assert_eq!(checksum(&[message]), 0);
            assert_eq!(message[..2], [3, 4]);
            assert_eq!(message[6..8], MTU.to_be_bytes());
            assert_eq!((ip[0], ip[8], ip[9]), (0x45, 64, 1));
            (12, &ip[2..4])
        } else {
            let length = u32::try_from(message.len()).unwrap().to_be_bytes();
            assert_eq!(checksum(&[&ip[8..], &length, &[0, 0, 0, 58], message]), 0);
            assert_eq!(message[..2], [2, 0]);
            assert_eq!(message[4..8], u32::from(MTU).to_be_bytes());
            assert_eq!((ip[0], ip[6], ip[7]), (0x60, 58, 64));
            (8, &ip[4..6])
        };
        let told = out.len() - 14 - if is_v4 { 0 } else { 40 };
        assert_eq!(usize::from(u16::from_be_bytes(length.try_into().unwrap())), told);
        assert_eq!(ip[start..], [destination, source].concat());
        // The checksum of TCP is what a device makes of it that is to fill it in, so that it may.
        let tcp = &message[message.len() - 20..];
        assert_eq!(u32::from(checksum(&[tcp])), u32::from(u16::from_be_bytes([tcp[16], tcp[17]])) % 0xffff);
    }
}

#[test]
fn the_largest_packet_leaves() {
    for flow in [flow_v4(), flow_v6()] {
        let Some((action, _, _, bpf)) = large(flow, &[], 1400) else { return };
        assert_eq!((action, verdicts(&bpf)), (TC_ACT_REDIRECT, BTreeMap::from([(Verdict::Redirected, 1)])));
    }
}

#[test]
fn a_packet_that_is_too_large_is_not_redirected_where_nobody_can_be_told() {
    let (key, flow) = flow_v4();
    let flow = Flow { mtu: 60, ..flow };
    let Some((_bpffs, bpf)) = with_flow(key, flow, known_clocks()) else { return };
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &Frame::new(key).encode()).0, TC_ACT_SHOT);
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::TooBig, 1)]));
}

/// Whose mark it is, another installation's program knows, which comes later: it would clone a message without one for ever.
#[test]
fn the_clone_of_another_installation_keeps_its_mark() {
    const MARK: usize = 8;
    let (key, flow) = flow_v4();
    let frame = Frame::new(key);
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    let program: &SchedClassifier = bpf.ebpf.program(PROGRAM_ETHERNET).unwrap().try_into().unwrap();
    let mark = 0x666c_6f77_u32.to_ne_bytes();
    let mark_after = |quoted: FourTuple| {
        let (mut before, mut after) = ([0; 192], [0; 192]);
        before[MARK..][..4].copy_from_slice(&mark);
        let options = TestRunOptions {
            data_in: Some(&Word::of(quoted, frame.sequence).encode()),
            ctx_in: Some(&before),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        program.test_run(options).unwrap();
        after[MARK..][..4].to_vec()
    };
    // What comes from where packets of a flow go, and what is about packets of nobody here.
    assert_eq!(mark_after(key.reversed()), [0; 4]);
    assert_eq!(mark_after(flow.out), mark);
}
