//! The egress program, run by the kernel over crafted packets.

use std::collections::BTreeMap;

use forwarder_common::flow::{DIRECTION_RESPONSE, FLOW_REVERSE_ENDED, Flow, STATE_HANDOVER, STATE_OFFLOADED};
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN};
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, Verdict};

use super::frames::{Frame, SEQUENCE_SHIFT, TC_ACT_SHOT, flow_v4, known_clocks, with_flow};
use super::{TC_ACT_UNSPEC, bpffs, run, verdicts, write_flows};

/// What the egress program makes of what the local socket on a leg sends.
fn suppressed(state: u32, flags: u8, payload: &[u8]) -> (i32, BTreeMap<Verdict, u64>) {
    suppressed_with(Flow { state, ..flow_v4().1 }, flags, payload)
}

fn suppressed_with(flow: Flow, flags: u8, payload: &[u8]) -> (i32, BTreeMap<Verdict, u64>) {
    let (key, _) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, flow, known_clocks()) else {
        return (TC_ACT_UNSPEC, BTreeMap::new());
    };
    let frame = Frame { flags, payload: payload.to_vec(), ..Frame::new(key.reversed()) }.encode();
    let (action, out) = run(&bpf, PROGRAM_EGRESS_ETHERNET, &frame);
    assert_eq!(out, frame);
    (action, verdicts(&bpf))
}

#[test]
fn egress_lets_only_the_remainder_out() {
    if bpffs().is_none() {
        return;
    }
    let sent = |action, verdict| (action, BTreeMap::from([(verdict, 1)]));
    let passes = sent(TC_ACT_UNSPEC, Verdict::HandoverSent);
    let drops = sent(TC_ACT_SHOT, Verdict::Suppressed);
    assert_eq!(suppressed(STATE_HANDOVER, FLAG_ACK, b"rest"), passes);
    assert_eq!(suppressed(STATE_HANDOVER, FLAG_ACK, b""), passes);
    assert_eq!(suppressed(STATE_HANDOVER, FLAG_RST, b""), drops);
    assert_eq!(suppressed(STATE_HANDOVER, FLAG_SYN, b""), drops);
    // Only an end that came before the handover is passed on; a dying agent's is none.
    assert_eq!(suppressed(STATE_HANDOVER, FLAG_ACK | FLAG_FIN, b""), drops);
    let ended = Flow { state: STATE_HANDOVER, flags: FLOW_REVERSE_ENDED, ..flow_v4().1 };
    assert_eq!(suppressed_with(ended, FLAG_ACK | FLAG_FIN, b"rest"), passes);
    assert_eq!(suppressed(STATE_OFFLOADED, FLAG_ACK, b"late"), drops);
    assert_eq!(suppressed(STATE_OFFLOADED, FLAG_RST | FLAG_ACK, b""), drops);
}

#[test]
fn egress_lets_nothing_out_once_both_ends_have_ended() {
    let (key, flow) = flow_v4();
    let flow = Flow { state: STATE_HANDOVER, ..flow };
    // The sender's end at 1,000, the other's at 2,000, each in its own numbers, and acknowledged in those of the other.
    let mut over = known_clocks();
    for (direction, end, acknowledged) in [
        (&mut over.request, 1_000_u32, 2_000_u32.wrapping_sub(flow.acknowledgement_shift)),
        (&mut over.response, 2_000, 1_000_u32.wrapping_add(flow.sequence_shift)),
    ] {
        direction.set_fin_end(end);
        direction.acknowledged = acknowledged;
    }
    let mut unacknowledged = over;
    unacknowledged.response.acknowledged = unacknowledged.response.acknowledged.wrapping_sub(1);
    for (pair, expected) in [(over, Verdict::Suppressed), (unacknowledged, Verdict::HandoverSent)] {
        let Some((_bpffs, bpf)) = with_flow(key, flow, pair) else { return };
        let frame = Frame::new(key.reversed()).encode();
        run(&bpf, PROGRAM_EGRESS_ETHERNET, &frame);
        assert_eq!(verdicts(&bpf), BTreeMap::from([(expected, 1)]));
    }
}

#[test]
fn egress_has_the_remainder_acknowledge_what_the_other_end_has() {
    let (key, flow) = flow_v4();
    let flow = Flow { state: STATE_HANDOVER, ..flow };
    let reverse = Flow { direction: DIRECTION_RESPONSE, source_scale: 3, target_scale: 4, ..flow };
    let frame = Frame::new(key.reversed());
    for ahead in [1_000_u32, 0, u32::MAX] {
        let mut pair = known_clocks();
        pair.response.acknowledged = frame.acknowledgement.wrapping_add(ahead).wrapping_add(SEQUENCE_SHIFT);
        pair.response.window = 500;
        let Some((_bpffs, mut bpf)) = with_flow(key, flow, pair) else { return };
        write_flows(&mut bpf, &[(flow.out.reversed(), reverse)]);
        let (action, out) = run(&bpf, PROGRAM_EGRESS_ETHERNET, &frame.encode());
        assert_eq!(action, TC_ACT_UNSPEC);
        let mut expected = Frame::new(key.reversed());
        if ahead == 1_000 {
            expected.acknowledgement = expected.acknowledgement.wrapping_add(1_000);
            expected.window = 250;
        }
        assert_eq!(out, expected.encode(), "{ahead}");
    }
}

#[test]
fn egress_touches_nothing_else() {
    let (key, flow) = flow_v4();
    let Some((_bpffs, bpf)) = with_flow(key, flow, known_clocks()) else { return };
    // The direction of the flow itself is what other hosts send.
    let frame = Frame::new(key).encode();
    assert_eq!(run(&bpf, PROGRAM_EGRESS_ETHERNET, &frame), (TC_ACT_UNSPEC, frame));
    assert_eq!(verdicts(&bpf), BTreeMap::new());
}
