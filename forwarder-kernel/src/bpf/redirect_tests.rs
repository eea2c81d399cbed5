//! The ingress and egress programs, run by the kernel over crafted packets, against a naive model: decode, translate each
//! field by itself, encode with fresh checksums.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use aya::maps::HashMap as BpfHashMap;
use aya::programs::SchedClassifier;
use aya::{TestRun as _, TestRunOptions};
use forwarder_common::flow::{
    DIRECTION_RESPONSE, DirectionState, FLOW_CLEAR_ECN, Flow, Pair, SENDER_RESET, SENDER_SYN, STATE_HANDOVER,
    STATE_OFFLOADED, STATE_OVER, STATE_RESET,
};
use forwarder_common::layout::FLOWS;
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_PSH, FLAG_RST, FLAG_SYN};
use forwarder_common::tuple::FourTuple;
use forwarder_common::{PROGRAM_ETHERNET, Verdict};

use super::frames::{
    Field, Frame, LOOPBACK, REVERSE_SHIFT, TC_ACT_REDIRECT, TC_ACT_SHOT, at, checksum, flow_v4, flow_v6,
    known_clocks, with_flow,
};
use super::{PAIR, TC_ACT_UNSPEC, in_namespace, interfaces, pair, run, run_in, verdicts, write_flows};
use forwarder_gateway::model::BindAddress;

#[track_caller]
fn check((key, flow): (FourTuple, Flow), change: impl Fn(&mut Frame)) {
    let mut frame = Frame::new(key);
    change(&mut frame);
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    let (action, out) = run(&bpf, PROGRAM_ETHERNET, &frame.encode());
    assert_eq!(action, TC_ACT_REDIRECT);
    assert_eq!(out, frame.translated(&flow).encode(), "{frame:?}");
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Redirected, 1)]));
    let direction = pair(&bpf).request;
    let payload = u64::try_from(frame.payload.len()).unwrap();
    assert_eq!((direction.packets, direction.bytes), (1, payload));
    assert_eq!(direction.fin_end().is_some(), frame.flags & FLAG_FIN != 0);
    assert_eq!(direction.flags & SENDER_RESET != 0, frame.flags & FLAG_RST != 0);
    assert!(direction.last_seen > 0);
}

#[test]
fn a_packet_is_translated() {
    check(flow_v4(), |_| {});
    check(flow_v6(), |_| {});
}

#[test]
fn the_hop_limit_is_the_flows_whatever_it_was() {
    for ((key, flow), before, after) in [
        (flow_v4(), 1, 64),
        (flow_v4(), 255, 65),
        (flow_v4(), 64, 64),
        (flow_v4(), 0, 255),
        (flow_v6(), 1, 64),
        (flow_v6(), 255, 32),
    ] {
        let flow = Flow { hop_limit: after, ..flow };
        check((key, flow), |frame| frame.hop_limit = before);
        // Not only on the short cut.
        let elsewhere = || vec![Field::Nop, Field::Timestamps(1_000, 2_000)];
        check((key, flow), |frame| (frame.hop_limit, frame.options) = (before, elsewhere()));
    }
}

/// `__sk_buff` of a super-packet: `gso_segs` and `gso_size`.
fn super_packet(segments: u32, size: u32) -> [u8; 192] {
    let mut context = [0; 192];
    context[164..168].copy_from_slice(&segments.to_ne_bytes());
    context[176..180].copy_from_slice(&size.to_ne_bytes());
    context
}

#[test]
fn a_super_packet_is_translated() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        // Numbers of which some sums are zero in one way of writing it.
        for (sequence, length) in [(0xffff_fff0, 3_000), (0, 2_896), (0x0000_0fff, 1_449)] {
            for is_bare in [false, true] {
                let mut frame = Frame::new(key);
                frame.sequence = sequence;
                frame.payload = (0..length).map(|byte: u32| byte.to_le_bytes()[0]).collect();
                if is_bare {
                    frame.options.clear();
                }
                let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
                let context = super_packet(length.div_ceil(1_448), 1_448);
                let (action, out) = run_in(&bpf, PROGRAM_ETHERNET, &frame.encode_partial(), Some(&context));
                assert_eq!(action, TC_ACT_REDIRECT);
                assert!(out == frame.translated(&flow).encode_partial(), "{sequence:x} {length} {is_bare}");
                assert_eq!(pair(&bpf).request.bytes, u64::from(length));
            }
        }
    }
}

#[test]
fn one_without_options_or_payload_is_translated() {
    check(flow_v4(), |frame| {
        frame.options.clear();
        frame.payload.clear();
    });
    check(flow_v6(), |frame| frame.options.clear());
}

#[test]
fn selective_acknowledgements_are_translated() {
    let blocks = vec![[0xffff_ff00, 0x100], [0x200, 0x300], [0x8000_0000, 0x8000_0001]];
    for flow in [flow_v4(), flow_v6()] {
        check(flow, |frame| {
            frame.options.extend([Field::Nop, Field::Nop, Field::Sack(blocks.clone())]);
        });
        check(flow, |frame| {
            frame.options =
                vec![Field::Nop, Field::Nop, Field::Sack([blocks.clone(), blocks[..1].to_vec()].concat())];
        });
    }
}

#[test]
fn options_are_translated_wherever_they_stand() {
    // An odd place, the opposite order, and others around.
    check(flow_v4(), |frame| frame.options = vec![Field::Nop, Field::Timestamps(u32::MAX, 0x0102_0304)]);
    check(flow_v4(), |frame| frame.options = vec![Field::Sack(vec![[1, 2]]), Field::Timestamps(5, 6)]);
    check(flow_v6(), |frame| {
        frame.options = vec![
            Field::Other(30, vec![1; 5]),
            Field::Sack(vec![[0xfff0_0000, 0x000f_ffff]]),
            Field::Nop,
            Field::Timestamps(7, 8),
        ];
    });
}

#[test]
fn a_header_with_ip_options_is_translated() {
    check(flow_v4(), |frame| frame.ip_options = vec![1; 8]);
}

#[test]
fn windows_are_scaled_and_never_overflow() {
    let (key, flow) = flow_v4();
    check((key, Flow { source_scale: 0, target_scale: 14, ..flow }), |frame| frame.window = 65_535);
    check((key, Flow { source_scale: 14, target_scale: 0, ..flow }), |frame| frame.window = 65_535);
    check((key, Flow { source_scale: 14, target_scale: 0, ..flow }), |frame| frame.window = 0);
}

#[test]
fn ends_and_resets_pass_and_are_noted() {
    check(flow_v4(), |frame| frame.flags = FLAG_FIN | FLAG_ACK | FLAG_PSH);
    check(flow_v4(), |frame| {
        frame.flags = FLAG_RST;
        frame.payload.clear();
        frame.options.clear();
    });
}

#[test]
fn a_long_packet_is_translated() {
    check(flow_v4(), |frame| frame.payload = (0..3_000_u32).map(|byte| byte.to_le_bytes()[0]).collect());
}

#[test]
fn a_clock_is_learnt_from_the_first_packet_and_kept() {
    let (key, flow) = flow_v4();
    let fresh = Pair {
        request: DirectionState { timestamp_known: 0, timestamp_shift: 0, ..at(&Frame::new(key)).request },
        response: DirectionState { timestamp_known: 0, ..at(&Frame::new(key)).response },
        ..Pair::default()
    };
    let Some((_bpffs, bpf)) = with_flow(key, Flow { clock: 77, ..flow }, fresh) else { return };
    // A stranger's clock is not the sender's.
    let mut strange = Frame::new(key);
    strange.sequence = strange.sequence.wrapping_add(1 << 30);
    strange.options[2] = Field::Timestamps(0x7000_0000, 2_000);
    run(&bpf, PROGRAM_ETHERNET, &strange.encode());
    assert_eq!(pair(&bpf).request.timestamp_known, 0);
    let timestamps = |frame: &[u8]| {
        let word = |at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        (word(14 + 20 + 24), word(14 + 20 + 28))
    };
    let (_, first) = run(&bpf, PROGRAM_ETHERNET, &Frame::new(key).encode());
    let shift = pair(&bpf).request.timestamp_shift;
    // The other direction's clock is not known: no echo.
    assert_eq!(timestamps(&first), (1_000_u32.wrapping_add(shift), 0));
    let mut later = Frame::new(key);
    later.options[2] = Field::Timestamps(1_500, 2_000);
    let (_, second) = run(&bpf, PROGRAM_ETHERNET, &later.encode());
    assert_eq!(timestamps(&second), (1_500_u32.wrapping_add(shift), 0));
}

#[test]
fn a_new_connection_on_the_tuple_of_a_pair_that_lives_waits() {
    let (key, flow) = flow_v4();
    let frame = Frame { flags: FLAG_SYN, payload: Vec::new(), ..Frame::new(key) };
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame.encode()).0, TC_ACT_SHOT);
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Held, 1)]));
    assert_eq!(pair(&bpf).request.flags, SENDER_SYN);
}

#[test]
fn the_answer_to_a_new_connection_passes_with_its_window_as_it_is() {
    // What the other end sends again until it hears of the handshake's end. It is unscaled (RFC 7323, 2.2).
    let (key, flow) = flow_v4();
    let frame = Frame { flags: FLAG_SYN | FLAG_ACK, payload: Vec::new(), ..Frame::new(key) };
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
    let (action, out) = run(&bpf, PROGRAM_ETHERNET, &frame.encode());
    assert_eq!(action, TC_ACT_REDIRECT);
    let unscaled = Flow { source_scale: 0, target_scale: 0, ..flow };
    assert_eq!(out, frame.translated(&unscaled).encode());
}

#[test]
fn a_new_connection_on_the_tuple_of_a_pair_that_is_over_is_for_the_local_stack() {
    let (key, flow) = flow_v4();
    let frame = Frame { flags: FLAG_SYN, payload: Vec::new(), ..Frame::new(key) };
    let mut over = at(&frame);
    over.response.flags = SENDER_RESET;
    let Some((_bpffs, mut bpf)) = with_flow(key, flow, over) else { return };
    let reverse = Flow { out: key.reversed(), direction: DIRECTION_RESPONSE, ..flow };
    write_flows(&mut bpf, &[(flow.out.reversed(), reverse)]);
    let frame = frame.encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    // Neither direction is taken for a flow, so that the egress program does not stand in the way either; the agent removes them.
    let flows: BpfHashMap<_, FourTuple, Flow> = bpf.ebpf.map(FLOWS).unwrap().try_into().unwrap();
    let states: Vec<u32> = flows.iter().map(|entry| entry.unwrap().1.state).collect();
    assert_eq!(states, [STATE_OVER; 2]);
}

#[test]
fn congestion_marks_that_nobody_would_answer_are_taken_off() {
    for (key, flow) in [flow_v4(), flow_v6()] {
        let Some((_bpffs, bpf)) = with_flow(key, Flow { flags: FLOW_CLEAR_ECN, ..flow }, known_clocks())
        else {
            return;
        };
        let plain = Frame::new(key);
        let mut marked = plain.encode();
        // ECT(0) in the type of service, or in the traffic class.
        if is_ipv4(&marked) {
            marked[15] |= 2;
            let sum = checksum(&[&[marked[14..24].to_vec(), vec![0; 2], marked[26..34].to_vec()].concat()]);
            marked[24..26].copy_from_slice(&sum.to_be_bytes());
        } else {
            marked[15] |= 2 << 4;
        }
        let (action, out) = run(&bpf, PROGRAM_ETHERNET, &marked);
        assert_eq!(action, TC_ACT_REDIRECT);
        assert_eq!(out, plain.translated(&flow).encode());
    }
}

/// Whether the packet of an Ethernet frame is IPv4.
fn is_ipv4(frame: &[u8]) -> bool {
    frame[12..14] == [8, 0]
}

#[test]
fn in_state_handover_nothing_that_was_promised_is_taken_back() {
    // The receiver was told by the local socket that 100 bytes more have arrived: they are still on their way to the
    // sender, whose window is smaller by them.
    let (key, flow) = flow_v4();
    let mut frame = Frame::new(key);
    frame.window = 1_000;
    let plain = Flow { source_scale: 0, target_scale: 0, ..flow };
    let promised = frame.acknowledgement.wrapping_sub(REVERSE_SHIFT).wrapping_add(100);
    for (state, is_raised) in [(STATE_HANDOVER, true), (STATE_OFFLOADED, false)] {
        let flow = Flow { state, acknowledged: promised, ..plain };
        let Some((_bpffs, bpf)) = with_flow(key, flow, at(&frame)) else { return };
        let (_, out) = run(&bpf, PROGRAM_ETHERNET, &frame.encode());
        let tcp = &out[34..];
        let numbers = (u32::from_be_bytes(tcp[8..12].try_into().unwrap()), [tcp[14], tcp[15]]);
        let expected = if is_raised {
            (promised, 900_u16.to_be_bytes())
        } else {
            (promised.wrapping_sub(100), 1_000_u16.to_be_bytes())
        };
        assert_eq!(numbers, expected);
    }
}

#[test]
fn options_that_nobody_understands_are_not_translated_in_part() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, flow, known_clocks()) else { return };
    for options in
        [vec![Field::Nop; 20], vec![Field::Other(8, vec![0; 4])], vec![Field::Other(5, vec![0; 6])]]
    {
        let frame = Frame { options, ..Frame::new(key) }.encode();
        assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame).0, TC_ACT_SHOT);
    }
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::OptionsRefused, 3)]));
}

#[test]
fn a_flow_that_is_over_is_none() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, Flow { state: STATE_OVER, ..flow }, known_clocks()) else {
        return;
    };
    let frame = Frame::new(key).encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::NoListener, 1)]));
    assert_eq!(pair(&bpf), known_clocks());
}

#[test]
fn a_new_connection_on_the_tuple_of_a_pair_that_the_agent_has_ended_is_for_the_local_stack() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, Flow { state: STATE_RESET, ..flow }, known_clocks()) else {
        return;
    };
    let frame = Frame { flags: FLAG_SYN, payload: Vec::new(), ..Frame::new(key) }.encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    let flows: BpfHashMap<_, FourTuple, Flow> = bpf.ebpf.map(FLOWS).unwrap().try_into().unwrap();
    // The agent tells nobody of its end any more who might take it for that of the new one.
    assert_eq!(flows.get(&key, 0).unwrap().state, STATE_OVER);
}

#[test]
fn a_flow_without_its_pair_is_none() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, Flow { pair: PAIR + 1, ..flow }, known_clocks()) else { return };
    let frame = Frame::new(key).encode();
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::PairMissing, 1)]));
}

#[test]
fn directions_are_noted_apart() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, Flow { direction: DIRECTION_RESPONSE, ..flow }, known_clocks())
    else {
        return;
    };
    run(&bpf, PROGRAM_ETHERNET, &Frame::new(key).encode());
    let pair = pair(&bpf);
    assert_eq!((pair.request.packets, pair.response.packets), (0, 1));
}

#[test]
fn what_comes_by_another_interface_is_left_to_a_stack_that_would_not_take_it() {
    let elsewhere = |(key, flow): (FourTuple, Flow)| (key, Flow { arrival: LOOPBACK + 1, ..flow });
    let (key, flow) = elsewhere(flow_v4());
    for frame in [Frame::new(key), Frame { flags: FLAG_SYN, ..Frame::new(key) }] {
        let Some((_bpffs, bpf)) = with_flow(key, flow, at(&Frame::new(key))) else { return };
        let frame = frame.encode();
        assert_eq!(run(&bpf, PROGRAM_ETHERNET, &frame), (TC_ACT_UNSPEC, frame.clone()));
        assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::OtherInterface, 1)]));
        assert_eq!(pair(&bpf), at(&Frame::new(key)));
        // Where it is not strict, packets may come by any.
        bpf.paths().take_from_any(LOOPBACK);
        assert_ne!(run(&bpf, PROGRAM_ETHERNET, &frame).0, TC_ACT_UNSPEC);
    }
    // IPv6 looks into none.
    let (key, flow) = elsewhere(flow_v6());
    let Some((_bpffs, bpf)) = with_flow(key, flow, at(&Frame::new(key))) else { return };
    assert_eq!(run(&bpf, PROGRAM_ETHERNET, &Frame::new(key).encode()).0, TC_ACT_REDIRECT);
}

/// A stranger's packet is forwarded, for the receiver to decide on, but the local socket must not hear from it what has arrived.
#[test]
fn only_what_the_receiver_takes_is_cloned_for_the_local_socket() {
    in_namespace(|_| {
        let (key, flow) = flow_v4();
        let honest = Frame::new(key);
        let flow = Flow { state: STATE_HANDOVER, ..flow };
        let Some((_bpffs, mut bpf)) = with_flow(key, flow, at(&honest)) else { return };
        assert!(bpf.attach(&interfaces(), &BTreeSet::from([BindAddress::Any])).is_empty());
        // Clones come by the interface's own ingress; there is no socket that would be told.
        let clones = || verdicts(&bpf).get(&Verdict::HandoverIgnored).copied().unwrap_or_default();
        let send = |frame: &Frame| run(&bpf, PROGRAM_ETHERNET, &frame.encode());
        let arrives = |expected: u64| {
            let deadline = Instant::now() + Duration::from_secs(10);
            while clones() < expected && Instant::now() < deadline {
                std::thread::yield_now();
            }
            assert_eq!(clones(), expected);
        };
        send(&honest);
        arrives(1);
        let strangers = [
            Frame { sequence: honest.sequence.wrapping_add(1 << 31), ..honest.clone() },
            Frame { acknowledgement: honest.acknowledgement.wrapping_add(1 << 30), ..honest.clone() },
        ];
        for frame in strangers {
            assert_eq!(send(&frame).0, TC_ACT_REDIRECT, "it is forwarded all the same");
        }
        send(&honest);
        arrives(2);
    });
}

/// Prints what the program takes for a packet of a flow, which it turns into itself, so that it may be repeated. For comparisons: a
/// machine's figures are its own.
#[test]
fn what_a_packet_costs() {
    const REPEAT: u32 = 200_000;
    for (family, (key, flow)) in [("IPv4", flow_v4()), ("IPv6", flow_v6())] {
        let (sequence_shift, acknowledgement_shift) = (0, 0);
        let flow = Flow { out: key, sequence_shift, acknowledgement_shift, ..flow };
        let frame = Frame::new(key);
        let pair = at(&frame);
        let Some((_bpffs, bpf)) = with_flow(key, flow, pair) else { return };
        let program: &SchedClassifier = bpf.ebpf.program(PROGRAM_ETHERNET).unwrap().try_into().unwrap();
        let packet = frame.encode();
        let least = (0..7)
            .map(|_| {
                let options =
                    TestRunOptions { data_in: Some(&packet), repeat: REPEAT, ..TestRunOptions::default() };
                // The mean of all of them.
                program.test_run(options).unwrap().duration
            })
            .min();
        println!("{family}: {least:?} a packet");
        assert_eq!(verdicts(&bpf), BTreeMap::from([(Verdict::Redirected, u64::from(REPEAT) * 7)]));
    }
}
