//! How the ends of a pair that the agent has ended are told, run by the kernel over crafted packets.

use std::collections::BTreeMap;

use forwarder_common::flow::{AGENT_LINK_PRIORITY, DIRECTION_RESPONSE, Flow, STATE_RESET};
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_PSH, FLAG_RST, FLAG_SYN};
use forwarder_common::tuple::FourTuple;
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, PROGRAM_ETHERNET, Verdict};

use super::frames::{
    Field, Frame, TC_ACT_REDIRECT, TC_ACT_SHOT, checksum, flow_v4, flow_v6, known_clocks, with_flow,
};
use super::{Bpf, Bpffs, TC_ACT_UNSPEC, pair, run, run_in, verdicts, write_flows};

/// Where `struct __sk_buff` has the priority.
const PRIORITY: usize = 32;
/// Bytes of an Ethernet header, of which the addresses, and of an IPv4 header without options.
const ETHERNET: usize = 14;
const ADDRESSES: usize = 12;
const IPV4: usize = 20;

/// A program with both directions of a pair that was ended; `None` where none can run.
fn ended((key, flow): (FourTuple, Flow)) -> Option<(Bpffs, Bpf)> {
    let flow = Flow { state: STATE_RESET, ..flow };
    let (bpffs, mut bpf) = with_flow(key, flow, known_clocks())?;
    let reverse = Flow { out: key.reversed(), direction: DIRECTION_RESPONSE, hop_limit: 63, ..flow };
    write_flows(&mut bpf, &[(flow.out.reversed(), reverse)]);
    Some((bpffs, bpf))
}

/// The frame with Ethernet addresses.
fn addressed(frame: &Frame, addresses: [u8; ADDRESSES]) -> Vec<u8> {
    let mut bytes = frame.encode();
    bytes[..ADDRESSES].copy_from_slice(&addresses);
    bytes
}

/// To the address of `lo`, which test runs use: what is for others is left alone (`eth_type_trans`).
const TOWARDS: [u8; ADDRESSES] = [0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 2];
const BACK: [u8; ADDRESSES] = [2, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0];

/// The reset that answers `frame`, as it leaves.
fn answer(frame: &Frame) -> Vec<u8> {
    let reset = Frame {
        tuple: frame.tuple.reversed(),
        sequence: frame.acknowledgement,
        acknowledgement: 0,
        flags: FLAG_RST,
        window: 0,
        options: Vec::new(),
        payload: Vec::new(),
        ..frame.clone()
    };
    let mut bytes = addressed(&reset, BACK);
    if bytes[ETHERNET] >> 4 == 4 {
        let header = &mut bytes[ETHERNET..][..IPV4 + frame.ip_options.len()];
        // No identification, the time to live of the way back, and the checksum anew.
        (header[4], header[5], header[8], header[10], header[11]) = (0, 0, 63, 0, 0);
        let sum = checksum(&[header]).to_be_bytes();
        header[10..12].copy_from_slice(&sum);
    } else {
        bytes[ETHERNET + 7] = 63;
    }
    bytes
}

fn frames(key: FourTuple) -> Vec<Frame> {
    let usual = Frame::new(key);
    vec![
        Frame { flags: FLAG_ACK | FLAG_PSH, ..usual.clone() },
        Frame { flags: FLAG_ACK | FLAG_FIN, payload: Vec::new(), ..usual.clone() },
        // The answer to a challenge of what this node has forgotten.
        Frame { flags: FLAG_ACK | FLAG_SYN, payload: Vec::new(), ..usual.clone() },
        Frame { options: vec![Field::Sack(vec![[1, 2], [3, 4]])], payload: vec![1; 999], ..usual.clone() },
        Frame { acknowledgement: 0, options: Vec::new(), ..usual },
    ]
}

#[test]
fn who_sends_something_of_a_pair_that_was_ended_is_reset() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        for frame in frames(key) {
            let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
            let (action, out) = run(&bpf, PROGRAM_ETHERNET, &addressed(&frame, TOWARDS));
            assert_eq!(action, TC_ACT_REDIRECT);
            assert_eq!(out, answer(&frame), "{frame:?}");
            assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::ResetAnswered, 1)]));
            assert!(pair(&bpf).request.last_seen > 0, "the agent is told that it is not quiet");
        }
    }
}

#[test]
fn options_of_ipv4_stay_in_a_reset() {
    let (key, flow) = flow_v4();
    let frame = Frame { ip_options: vec![1; 8], ..Frame::new(key) };
    let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
    let (_, out) = run(&bpf, PROGRAM_ETHERNET, &addressed(&frame, TOWARDS));
    assert_eq!(out, answer(&frame));
}

#[test]
fn a_reset_of_a_pair_that_was_ended_is_not_answered() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        for flags in [FLAG_RST, FLAG_RST | FLAG_ACK, FLAG_FIN] {
            let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
            let frame = Frame { flags, ..Frame::new(key) }.encode();
            assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
            assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::PairMissing, 1)]));
        }
    }
}

#[test]
fn a_new_connection_takes_the_addresses_of_a_pair_that_was_ended() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
    let frame = Frame { flags: FLAG_SYN, ..Frame::new(key) }.encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    // Nor is anything of the pair answered from now on.
    let late = Frame::new(key).encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &late), (TC_ACT_UNSPEC, late));
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::NoListener, 2)]));
}

#[test]
fn the_egress_program_drops_what_sockets_of_a_pair_that_was_ended_say() {
    let (key, flow) = flow_v4();
    for flags in [FLAG_ACK, FLAG_ACK | FLAG_FIN, FLAG_RST] {
        let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
        let frame = Frame { flags, ..Frame::new(key.reversed()) }.encode();
        assert_eq!(run(&bpf, PROGRAM_EGRESS_ETHERNET, &frame).0, TC_ACT_SHOT);
        assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Suppressed, 1)]));
    }
}

#[test]
fn the_egress_program_hands_what_the_agent_says_to_the_neighbour() {
    let mut context = [0; 192];
    context[PRIORITY..][..4].copy_from_slice(&AGENT_LINK_PRIORITY.to_ne_bytes());
    for (key, flow) in [flow_v4(), flow_v6()] {
        let Some((_bpffs, bpf)) = ended((key, flow)) else { return };
        let check = |tuple: FourTuple, expected: i32| {
            let frame = Frame::new(tuple).encode();
            let run = run_in(&bpf, PROGRAM_EGRESS_ETHERNET, &frame, Some(&context));
            assert_eq!(run, (expected, frame));
        };
        check(key.reversed(), TC_ACT_REDIRECT);
        check(flow.out, TC_ACT_REDIRECT);
        // Another installation's agent says it: that one's program knows the neighbour.
        check(key, TC_ACT_UNSPEC);
        assert_eq!(verdicts(&bpf), BTreeMap::new());
    }
}
