use super::*;

/// The client's numbers are 1,000 behind on the other leg, the endpoint's 500 ahead.
pub(super) fn flows() -> [Flow; 2] {
    let key = FourTuple { source: [0; 16], destination: [0; 16], source_port: 1, destination_port: 2 };
    let request = Flow {
        out: key,
        interface: 1,
        next_hop: NextHop { family: 2, address: [0; 16] },
        mtu: 0,
        clock_time: 0,
        clock: 0,
        pair: 1,
        direction: DIRECTION_REQUEST,
        state: STATE_OFFLOADED,
        sequence_shift: 1_000_u32.wrapping_neg(),
        acknowledgement_shift: 500_u32.wrapping_neg(),
        source_scale: 0,
        target_scale: 0,
        flags: 0,
        acknowledged: 0,
        arrival: 2,
        hop_limit: 64,
        receiver_scale: 0,
        pad: [0; 2],
    };
    let response =
        Flow { direction: DIRECTION_RESPONSE, sequence_shift: 500, acknowledgement_shift: 1_000, ..request };
    [request, response]
}

pub(super) fn ended(fin_end: u32, acknowledged: u32) -> DirectionState {
    let mut forward = DirectionState { acknowledged, ..DirectionState::default() };
    forward.set_fin_end(fin_end);
    forward
}

#[test]
fn a_pair_is_over_once_both_ends_are_acknowledged() {
    // The client ends at 5,000, which is 4,000 for the endpoint; the endpoint at 200, which is 700 for the client.
    let over = Pair { request: ended(5_000, 700), response: ended(200, 4_000), ..Pair::default() };
    let unacknowledged = [
        Pair { request: ended(5_000, 699), ..over },
        Pair { response: ended(200, 3_999), ..over },
        Pair { request: DirectionState { fin: 0, ..over.request }, ..over },
        Pair { response: DirectionState { fin: 0, ..over.response }, ..over },
        Pair::default(),
    ];
    for flow in flows() {
        assert!(over.is_over(&flow));
        for pair in unacknowledged {
            assert!(!pair.is_over(&flow), "{pair:?}");
        }
    }
}

#[test]
fn an_end_that_a_local_socket_passed_on_counts() {
    let pair = Pair {
        response: ended(200, 4_000),
        request: DirectionState { acknowledged: 700, ..DirectionState::default() },
        ..Pair::default()
    };
    let [request, response] = flows();
    assert!(!pair.is_over(&request));
    assert!(pair.is_over(&Flow { flags: FLOW_ENDED, ..request }));
    assert!(pair.is_over(&Flow { flags: FLOW_REVERSE_ENDED, ..response }));
}

#[test]
fn what_a_bare_acknowledgement_says_reaches_a_receiver_without_room() {
    let [flow, _] = flows();
    let segment = |sequence, flags| Segment {
        tuple: flow.out,
        version: crate::packet::IpVersion::V4,
        flags,
        window: 9,
        sequence,
        acknowledgement: 700,
        is_first_fragment: false,
        ip_offset: 14,
        ip_length: 40,
        tcp_offset: 34,
        header_length: 20,
    };
    // The endpoint takes 1,000 bytes up to the client's 6,000 and sees 4,000 for the client's 5,000.
    let endpoint =
        DirectionState { acknowledged: 4_000, window: 1_000, edge: 5_000, ..DirectionState::default() };
    let client = DirectionState { sequence_end: 6_000, ..DirectionState::default() };
    let sent = |sequence, flags, is_bare| {
        flow.numbers(&segment(sequence, flags), &client, &endpoint, is_bare).sequence
    };
    assert_eq!(sent(6_000, FLAG_ACK, true), 5_000);
    assert_eq!(sent(6_001, FLAG_ACK, true), 5_000);
    assert_eq!(sent(90_000, FLAG_ACK, true), 5_000);
    assert_eq!([4_998, 4_999, 5_000].map(|sequence| sent(sequence, FLAG_ACK, true)), [4_000, 3_999, 4_000]);
    // Bytes and ends have numbers of their own, and a stranger's acknowledgement keeps its own.
    assert_eq!(sent(90_000, FLAG_ACK, false), 89_000);
    assert_eq!(sent(90_000, FLAG_ACK | FLAG_FIN, true), 89_000);
    assert_eq!(sent(90_000, FLAG_RST, true), 89_000);
    // It has announced more before, and has no memory now.
    let shrunk = DirectionState { window: 0, edge: 69_000, ..endpoint };
    assert_eq!(flow.numbers(&segment(5_800, FLAG_ACK), &client, &shrunk, true).sequence, 4_000);
    // The client is far beyond, but has been told a window that was rounded down.
    let scaled = Flow { receiver_scale: 7, ..flow };
    let endpoint = DirectionState { window: 9, edge: 4_000 + (9 << 7), ..endpoint };
    let client = DirectionState { sequence_end: 90_000, ..client };
    for (sequence, expected) in [(90_000, 5_152), (6_024, 5_152), (4_999, 3_999)] {
        let numbers = scaled.numbers(&segment(sequence, FLAG_ACK), &client, &endpoint, true);
        assert_eq!(numbers.sequence, expected, "{sequence}");
    }
}

#[test]
fn clocks_are_learnt_from_packets_that_have_waited() {
    let mut forward = DirectionState::default();
    assert_eq!(forward.echo_shift(STATE_HANDOVER), None);
    // The clocks are 1,000 apart; the packets have waited for 3, 8, 0 and 2 ms.
    for waited in [3, 8, 0, 2] {
        forward.learn_clock(1_000 + waited);
    }
    // What follows is not behind what was told before; what is echoed meanwhile is no older than it was.
    assert_eq!(forward.echo_shift(STATE_OFFLOADED), Some(1_008));
    assert_eq!(forward.echo_shift(STATE_HANDOVER), Some(1_000));
}

#[test]
fn a_reset_ends_both() {
    let reset = DirectionState { flags: SENDER_RESET, ..DirectionState::default() };
    for flow in flows() {
        assert!(Pair { request: reset, ..Pair::default() }.is_over(&flow));
        assert!(Pair { response: reset, ..Pair::default() }.is_over(&flow));
    }
}
