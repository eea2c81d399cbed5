//! What the ingress program makes of the fragments of a flow's packets, run by the kernel over crafted ones: what they are put
//! together to must be the translated packet.

use std::collections::BTreeMap;

use forwarder_common::flow::{FLOW_CLEAR_ECN, Flow, STATE_HANDOVER, STATE_OVER};
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_SYN};
use forwarder_common::tuple::FourTuple;
use forwarder_common::{PROGRAM_ETHERNET, Verdict};

use super::cut::cut;
use super::frames::{
    Field, Frame, TC_ACT_REDIRECT, TC_ACT_SHOT, at, checksum, flow_v4, flow_v6, known_clocks, with_flow,
};
use super::{TC_ACT_UNSPEC, pair, run, verdicts, write_flows};

/// The longest fragment, in bytes from the IP header on.
const LONGEST: usize = 576;
const IDENTIFICATION: u32 = 0x1234;

/// A frame that is cut into four.
fn frame(key: FourTuple) -> Frame {
    let payload = (0..2_000_u32).map(|byte| byte.to_le_bytes()[0]).collect();
    Frame { flags: FLAG_ACK | FLAG_FIN, payload, ..Frame::new(key) }
}

fn pieces(frame: &Frame) -> Vec<Vec<u8>> {
    let pieces = cut(&frame.encode(), LONGEST, IDENTIFICATION);
    assert_eq!(pieces.len(), 4);
    pieces
}

/// Checks what becomes of the fragments of a frame, which come in an order of their own.
#[track_caller]
fn check((key, flow): (FourTuple, Flow), order: [usize; 4], change: impl Fn(&mut Frame)) {
    let mut frame = frame(key);
    change(&mut frame);
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    let (sent, expected) = (pieces(&frame), pieces(&frame.translated(&flow)));
    for index in order {
        let (action, out) = run(&bpf, PROGRAM_ETHERNET, &sent[index]);
        assert_eq!(action, TC_ACT_REDIRECT, "fragment {index}");
        assert!(out == expected[index], "fragment {index}:\n{out:02x?}\n{:02x?}", expected[index]);
    }
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Redirected, 4)]));
    let direction = pair(&bpf).request;
    let end = frame.sequence.wrapping_add(u32::try_from(frame.payload.len()).unwrap() + 1);
    assert_eq!((direction.packets, direction.bytes, direction.repeated), (4, 2_000, 0));
    assert_eq!((direction.sequence_end, direction.fin_end(), direction.flags), (end, Some(end), 0));
    // Sent again, it counts as such.
    for fragment in &sent {
        run(&bpf, PROGRAM_ETHERNET, fragment);
    }
    let direction = pair(&bpf).request;
    assert_eq!((direction.packets, direction.bytes, direction.repeated), (8, 2_000, 2_000));
    assert_eq!((direction.sequence_end, direction.fin_end(), direction.flags), (end, Some(end), 0));
}

#[test]
fn each_fragment_is_translated() {
    for flow in [flow_v4(), flow_v6()] {
        check(flow, [0, 1, 2, 3], |_| {});
        check(flow, [0, 3, 2, 1], |_| {});
        check(flow, [0, 2, 1, 3], |frame| frame.options.clear());
        check(flow, [0, 1, 2, 3], |frame| {
            frame.options =
                vec![Field::Sack(vec![[0xfff0_0000, 7]]), Field::Nop, Field::Timestamps(7, 8), Field::Nop];
        });
    }
    check(flow_v4(), [0, 1, 2, 3], |frame| frame.ip_options = vec![1; 8]);
}

/// A flow, and the fragments of one of its packets.
#[track_caller]
fn with_pieces((key, flow): (FourTuple, Flow), check: impl Fn(&mut super::Bpf, &Frame, Vec<Vec<u8>>)) {
    let frame = frame(key);
    let Some((_bpffs, mut bpf)) = with_flow(key, flow, at(&frame)) else { return };
    check(&mut bpf, &frame, pieces(&frame));
}

/// Checks that a fragment is left to the stack, as it is.
#[track_caller]
fn check_left(bpf: &super::Bpf, fragment: &[u8]) {
    let before = verdicts(bpf).get(&Verdict::Fragment).copied().unwrap_or(0);
    assert_eq!(run(bpf, PROGRAM_ETHERNET, fragment), (TC_ACT_UNSPEC, fragment.to_vec()));
    assert_eq!(verdicts(bpf)[&Verdict::Fragment], before + 1);
}

#[test]
fn one_before_the_first_is_left_to_the_stack() {
    for flow in [flow_v4(), flow_v6()] {
        with_pieces(flow, |bpf, _, pieces| {
            check_left(bpf, &pieces[1]);
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[1]).0, TC_ACT_REDIRECT);
        });
    }
}

#[test]
fn those_of_another_packet_are_left_to_the_stack() {
    for flow in [flow_v4(), flow_v6()] {
        with_pieces(flow, |bpf, frame, pieces| {
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
            check_left(bpf, &cut(&frame.encode(), LONGEST, IDENTIFICATION + 1)[1]);
            // A connection that is none of the flows uses the same identification.
            let mut other = frame.clone();
            other.tuple.source_port += 1;
            for fragment in self::pieces(&other) {
                assert_eq!(run(bpf, PROGRAM_ETHERNET, &fragment), (TC_ACT_UNSPEC, fragment));
            }
        });
    }
}

#[test]
fn those_of_a_pair_that_is_gone_are_left_to_the_stack() {
    with_pieces(flow_v4(), |bpf, frame, pieces| {
        assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
        let (key, flow) = flow_v4();
        write_flows(bpf, &[(key, Flow { state: STATE_OVER, ..flow })]);
        check_left(bpf, &pieces[1]);
        write_flows(bpf, &[(key, Flow { pair: flow.pair + 1, ..flow })]);
        check_left(bpf, &pieces[1]);
        write_flows(bpf, &[(frame.tuple, flow)]);
        assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[1]).0, TC_ACT_REDIRECT);
    });
}

#[test]
fn in_state_handover_they_are_translated_too() {
    let (key, flow) = flow_v4();
    let flow = Flow { state: STATE_HANDOVER, ..flow };
    with_pieces((key, flow), |bpf, frame, pieces| {
        let expected = self::pieces(&Frame { tuple: flow.out, hop_limit: flow.hop_limit, ..frame.clone() });
        assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
        for (fragment, expected) in pieces.iter().zip(&expected).skip(1) {
            assert_eq!(run(bpf, PROGRAM_ETHERNET, fragment), (TC_ACT_REDIRECT, expected.clone()));
        }
    });
}

#[test]
fn a_first_one_without_the_whole_tcp_header_is_refused() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        let frame = frame(key);
        let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
        // 24 bytes of a header of 32.
        let longest = frame.encode().len() - 14 - frame.payload.len() - 8;
        let longest = if flow == flow_v6().1 { longest + 8 } else { longest };
        let pieces = cut(&frame.encode(), longest, IDENTIFICATION);
        assert_eq!(run(&bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_SHOT);
        assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::FragmentRefused, 1)]));
        check_left(&bpf, &pieces[1]);
        assert_eq!(pair(&bpf).request.packets, 0);
    }
}

#[test]
fn one_that_overlaps_the_first_is_refused() {
    for flow in [flow_v4(), flow_v6()] {
        with_pieces(flow, |bpf, frame, pieces| {
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
            let smaller = cut(&frame.encode(), LONGEST - 8, IDENTIFICATION);
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &smaller[1]).0, TC_ACT_SHOT);
            let expected = BTreeMap::from([(Verdict::Redirected, 1), (Verdict::FragmentRefused, 1)]);
            assert_eq!(verdicts(bpf), expected);
        });
    }
}

#[test]
fn one_that_is_too_large_to_leave_is_dropped() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        with_pieces((key, flow), |bpf, _, pieces| {
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_REDIRECT);
            let length = |fragment: &[u8]| u32::try_from(fragment.len() - 14).unwrap();
            write_flows(bpf, &[(key, Flow { mtu: length(&pieces[1]) - 1, ..flow })]);
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[1]).0, TC_ACT_SHOT);
            assert_eq!(verdicts(bpf)[&Verdict::TooBig], 1);
            write_flows(bpf, &[(key, Flow { mtu: length(&pieces[1]), ..flow })]);
            assert_eq!(run(bpf, PROGRAM_ETHERNET, &pieces[1]).0, TC_ACT_REDIRECT);
        });
    }
}

#[test]
fn congestion_marks_are_taken_off_all_of_them() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        let frame = frame(key);
        let Some((_bpffs, bpf)) = with_flow(key, Flow { flags: FLOW_CLEAR_ECN, ..flow }, known_clocks())
        else {
            return;
        };
        for (mut fragment, expected) in pieces(&frame).into_iter().zip(pieces(&frame.translated(&flow))) {
            // ECT(0) in the type of service, or in the traffic class.
            if fragment[12..14] == [8, 0] {
                fragment[15] |= 2;
                fragment[24..26].fill(0);
                let sum = checksum(&[&fragment[14..34]]);
                fragment[24..26].copy_from_slice(&sum.to_be_bytes());
            } else {
                fragment[15] |= 2 << 4;
            }
            assert_eq!(run(&bpf, PROGRAM_ETHERNET, &fragment), (TC_ACT_REDIRECT, expected));
        }
    }
}

#[test]
fn a_whole_packet_with_a_fragment_header_is_no_fragment() {
    let (key, flow) = flow_v6();
    let mut frame = frame(key);
    frame.flags = FLAG_ACK;
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    // A header before TCP that says: at 0, and nothing follows.
    let atomic = |frame: &Frame| {
        let mut bytes = frame.encode();
        let length = u16::try_from(bytes.len() - 14 - 40 + 8).unwrap();
        bytes[18..20].copy_from_slice(&length.to_be_bytes());
        bytes[20] = 44;
        bytes.splice(54..54, [6, 0, 0, 0, 0, 0, 0, 9]);
        bytes
    };
    let out = run(&bpf, PROGRAM_ETHERNET, &atomic(&frame));
    assert_eq!(out, (TC_ACT_REDIRECT, atomic(&frame.translated(&flow))));
    assert_eq!(pair(&bpf).request.bytes, 2_000);
}

#[test]
fn a_fragment_of_a_new_connection_on_the_tuple_of_a_pair_waits() {
    let (key, flow) = flow_v4();
    let frame = Frame { flags: FLAG_SYN, ..frame(key) };
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    let pieces = pieces(&frame);
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &pieces[0]).0, TC_ACT_SHOT);
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Held, 1)]));
    check_left(&bpf, &pieces[1]);
}
