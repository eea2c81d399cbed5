use super::super::tests::{ended, flows};
use super::super::*;

/// What the endpoint takes beyond what it has acknowledged: the client's numbers 5,000 to 69,999.
const WINDOW: u32 = 65_000;

fn seen(sequence: u32, payload: u32, acknowledgement: u32, flags: u8) -> Seen {
    Seen { sequence, acknowledgement, payload, window: 9, flags: flags | FLAG_ACK, time: 77 }
}

/// A client at 5,000 and an endpoint at 200, each of whom has acknowledged all of the other: 700 and 4,000 in their terms.
fn directions() -> [DirectionState; 2] {
    [
        DirectionState {
            sequence_end: 5_000,
            acknowledged: 700,
            edge: 700 + 1_000,
            ..DirectionState::default()
        },
        DirectionState {
            sequence_end: 200,
            acknowledged: 4_000,
            edge: 4_000 + WINDOW,
            ..DirectionState::default()
        },
    ]
}

fn note(forward: &mut DirectionState, reverse: &DirectionState, flow: &Flow, segment: &Seen) {
    let is_accepted = forward.accepts(reverse, flow, segment);
    forward.note(reverse, flow, segment, is_accepted);
}

fn noted(segments: &[Seen]) -> DirectionState {
    let [mut request, response] = directions();
    for segment in segments {
        note(&mut request, &response, &flows()[0], segment);
    }
    request
}

/// Checks that a segment is counted as a packet, and nothing else is noted of it.
#[track_caller]
fn check_ignored(segment: Seen) {
    let [request, _] = directions();
    assert_eq!(noted(&[segment]), DirectionState { packets: 1, ..request }, "{segment:?}");
}

#[test]
fn each_byte_is_counted_once() {
    let forward = noted(&[seen(5_000, 100, 700, 0), seen(5_200, 50, 700, 0), seen(5_100, 150, 700, 0)]);
    assert_eq!((forward.bytes, forward.repeated, forward.packets, forward.last_seen), (250, 150, 3, 77));
    assert_eq!((forward.sequence_end, forward.window), (5_250, 9));
}

#[test]
fn an_end_that_has_sent_more_than_is_read_is_still_heard() {
    let [mut request, response] = directions();
    // In state handover it was seen to send beyond the window; now the endpoint reads nothing, and the client acknowledges on.
    request.sequence_end = 5_000 + 3 * WINDOW;
    let acknowledgement = seen(request.sequence_end, 0, 720, 0);
    note(&mut request, &response, &flows()[0], &acknowledgement);
    assert_eq!((request.acknowledged, request.bytes), (720, 0));
}

#[test]
fn an_end_that_sends_again_what_has_arrived_is_still_heard() {
    let [mut request, response] = directions();
    let [flow, _] = flows();
    // The endpoint has acknowledged up to 5,000, but the client does not take it, and sends the bytes before it again.
    note(&mut request, &response, &flow, &seen(3_000, 1_000, 720, 0));
    assert_eq!((request.acknowledged, request.bytes, request.repeated), (720, 0, 1_000));
    // Or answers, from the edge of the window that it knows of.
    note(&mut request, &response, &flow, &seen(4_000, 0, 730, 0));
    assert_eq!((request.acknowledged, request.sequence_end), (730, 5_000));
    // An end it is not.
    note(&mut request, &response, &flow, &seen(3_000, 1_000, 740, FLAG_FIN));
    assert_eq!((request.acknowledged, request.fin_end()), (740, None));
}

#[test]
fn numbers_wrap() {
    let [request, response] = directions();
    let first = u32::MAX - 9;
    let mut forward = DirectionState { sequence_end: first, ..request };
    let acknowledged = first.wrapping_sub(1_000);
    let response = DirectionState { acknowledged, edge: acknowledged.wrapping_add(WINDOW), ..response };
    note(&mut forward, &response, &flows()[0], &seen(first, 30, 700, 0));
    assert_eq!((forward.bytes, forward.sequence_end), (30, 20));
}

#[test]
fn an_end_is_noted_and_no_payload() {
    let forward = noted(&[seen(5_000, 10, 700, FLAG_FIN), seen(5_000, 10, 700, FLAG_FIN)]);
    assert_eq!((forward.bytes, forward.fin_end()), (10, Some(5_011)));
}

#[test]
fn an_end_that_an_acknowledgement_has_overtaken_is_no_payload() {
    let forward = noted(&[seen(5_000, 10, 700, 0), seen(5_011, 0, 700, 0), seen(5_010, 0, 700, FLAG_FIN)]);
    assert_eq!((forward.bytes, forward.sequence_end, forward.fin_end()), (10, 5_011, Some(5_011)));
    // Sent again, it is known.
    let fin = seen(5_010, 0, 700, FLAG_FIN);
    let forward = noted(&[seen(5_000, 10, 700, 0), seen(5_011, 0, 700, 0), fin, fin]);
    assert_eq!((forward.bytes, forward.fin_end()), (10, Some(5_011)));
}

#[test]
fn acknowledgements_go_forward_only_and_not_beyond_what_may_have_been_sent() {
    assert_eq!(noted(&[seen(5_000, 0, 690, 0)]).acknowledged, 700);
    // The endpoint is known to have sent up to 200, which is 700, and may have sent more.
    assert_eq!(noted(&[seen(5_000, 0, 710, 0)]).acknowledged, 710);
    assert_eq!(noted(&[seen(5_000, 0, 700 + 0xffff, 0)]).acknowledged, 700 + 0xffff);
    check_ignored(seen(5_000, 0, 700 + 0x1_0000, 0));
    check_ignored(seen(5_000, 100, 700 + 0x1_0000, FLAG_FIN));
}

#[test]
fn what_acknowledges_something_older_than_a_window_is_not_noted() {
    assert_eq!(noted(&[seen(5_000, 10, 700_u32.wrapping_sub(0xffff), 0)]).bytes, 10);
    check_ignored(seen(5_000, 10, 700_u32.wrapping_sub(0x1_0000), 0));
}

#[test]
fn what_has_no_acknowledgement_is_not_noted() {
    check_ignored(Seen { flags: 0, ..seen(5_000, 10, 700, 0) });
    check_ignored(Seen { flags: FLAG_FIN, ..seen(5_000, 10, 700, 0) });
}

#[test]
fn the_window_bounds_what_is_noted() {
    let last = seen(5_000 + WINDOW, 1, 700, FLAG_FIN);
    assert_eq!(noted(&[last]).bytes, u64::from(WINDOW) + 1);
    for flags in [0, FLAG_FIN] {
        check_ignored(seen(5_000 + WINDOW + 1, 1_000, 700, flags));
        check_ignored(seen(2_000_000_000, 1_000, 700, flags));
        check_ignored(seen(5_000 + (16 << 20), 0, 700, flags));
    }
}

#[test]
fn a_blind_walk_through_all_numbers_forges_no_more_than_a_window() {
    // A stranger who knows neither number; some of the acknowledgements happen to be right.
    let acknowledgements = (0..64).map(|step| step << 16);
    let segments: Vec<_> = acknowledgements
        .flat_map(|acknowledgement| {
            (0..269_u32).map(move |step| seen(step.wrapping_mul(16_000_000), 0, acknowledgement, FLAG_FIN))
        })
        .collect();
    let forward = noted(&segments);
    assert!(forward.bytes <= u64::from(WINDOW), "{forward:?}");
    assert!(forward.acknowledged <= 0x1_0000, "{forward:?}");
}

#[test]
fn an_edge_is_what_was_granted_under_the_scale_and_never_goes_back() {
    let [mut forward, response] = directions();
    let [flow, _] = flows();
    let flow = Flow { source_scale: 4, ..flow };
    let with_window = |acknowledgement, window| Seen { window, ..seen(5_000, 0, acknowledgement, 0) };
    note(&mut forward, &response, &flow, &with_window(800, 1_000));
    assert_eq!((forward.acknowledged, forward.edge), (800, 800 + 16_000));
    note(&mut forward, &response, &flow, &with_window(900, 0));
    assert_eq!((forward.acknowledged, forward.edge, forward.window), (900, 800 + 16_000, 0));
    // One that was overtaken.
    note(&mut forward, &response, &flow, &with_window(800, 9));
    assert_eq!((forward.acknowledged, forward.window), (900, 0));
}

#[test]
fn what_is_sent_again_is_seen_and_advances_nothing() {
    let forward = noted(&[seen(4_900, 100, 690, 0)]);
    assert_eq!((forward.last_seen, forward.repeated, forward.bytes), (77, 100, 0));
    let forward = noted(&[seen(4_000, 100, 700, FLAG_FIN)]);
    assert_eq!((forward.last_seen, forward.repeated, forward.flags, forward.window), (77, 100, 0, 9));
    assert_eq!(forward.fin_end(), None);
    check_ignored(seen(5_000_u32.wrapping_sub(0x1_0000), 0, 700, 0));
}

#[test]
fn keepalive_probes_and_their_answers_carry_nothing() {
    // A number that was acknowledged, with the byte of some stacks or without; and the answer to one.
    for segment in [seen(4_999, 0, 700, 0), seen(4_999, 1, 700, 0), seen(5_000, 0, 700, 0)] {
        let forward = noted(&[segment]);
        assert_eq!((forward.last_seen, forward.bytes, forward.repeated), (77, 0, 0), "{segment:?}");
    }
}

#[test]
fn an_end_that_its_sender_goes_beyond_was_none() {
    let fin = seen(6_000, 0, 700, FLAG_FIN);
    assert_eq!(noted(&[fin, seen(5_000, 500, 700, 0)]).fin_end(), Some(6_001));
    assert_eq!(noted(&[fin, seen(5_000, 1_100, 700, 0)]).fin_end(), None);
    // The receiver has acknowledged more.
    let [_, response] = directions();
    let mut forward = noted(&[fin]);
    let response = DirectionState { acknowledged: 5_500, edge: 5_500 + WINDOW, ..response };
    note(&mut forward, &response, &flows()[0], &seen(6_500, 0, 700, 0));
    assert_eq!(forward.fin_end(), None);
}

#[test]
fn a_new_connection_is_noted_until_the_old_one_goes_on() {
    let syn = Seen { flags: FLAG_SYN, ..seen(9_000, 0, 700, 0) };
    let forward = noted(&[syn]);
    assert_eq!(
        (forward.sequence_end, forward.packets, forward.flags, forward.last_seen),
        (5_000, 1, SENDER_SYN, 0)
    );
    assert_eq!(noted(&[syn, seen(5_000, 0, 700, 0)]).flags, 0);
    // Not what only looks like it.
    assert_eq!(noted(&[syn, seen(2_000_000_000, 0, 700, 0)]).flags, SENDER_SYN);
}

#[test]
fn a_reset_counts_on_the_exact_number_until_its_sender_goes_on() {
    let exact = seen(5_000, 0, 700, FLAG_RST);
    assert_eq!(noted(&[exact]).flags, SENDER_RESET);
    assert_eq!(noted(&[exact, seen(5_000, 1, 700, 0)]).flags, 0);
    assert_eq!(noted(&[exact, seen(2_000_000_000, 1, 700, 0)]).flags, SENDER_RESET);
    // What has been sent and is not acknowledged may have arrived, or not.
    let sent = seen(5_000, 100, 700, 0);
    assert_eq!(noted(&[sent, exact]).flags, SENDER_RESET);
    assert_eq!(noted(&[sent, seen(5_100, 0, 700, FLAG_RST)]).flags, SENDER_RESET);
    assert_eq!(noted(&[sent, seen(5_050, 0, 700, FLAG_RST)]).flags, SENDER_CHALLENGE);
}

#[test]
fn a_reset_with_another_number_of_the_window_has_its_sender_asked() {
    for sequence in [5_001, 5_000 + WINDOW] {
        let reset = seen(sequence, 0, 700, FLAG_RST);
        assert_eq!(noted(&[reset]).flags, SENDER_CHALLENGE);
        assert_eq!(noted(&[reset, seen(5_000, 0, 700, 0)]).flags, 0);
        assert_eq!(noted(&[reset, seen(5_000, 0, 700, FLAG_RST)]).flags, SENDER_CHALLENGE | SENDER_RESET);
    }
    for sequence in [4_999, 5_000 + WINDOW + 1, 2_000_000_000] {
        check_ignored(seen(sequence, 0, 700, FLAG_RST));
    }
}

#[test]
fn a_blind_sweep_of_resets_ends_nothing() {
    // The number of the receiver is met once in 65,000 sweeps of this kind; this one passes it by.
    let sweep: Vec<_> =
        (0..66_078_u32).map(|step| seen(step.wrapping_mul(65_000) + 7, 0, 0, FLAG_RST)).collect();
    let forward = noted(&sweep);
    assert_eq!((forward.flags, forward.sequence_end, forward.bytes), (SENDER_CHALLENGE, 5_000, 0));
}

#[test]
fn in_state_handover_the_local_sockets_may_have_received_more() {
    // The agent holds what the endpoint's window does not admit.
    let [request, response] = directions();
    let response = DirectionState { edge: 4_000 + 10, ..response };
    let [flow, _] = flows();
    for (state, is_noted) in [(STATE_HANDOVER, true), (STATE_OFFLOADED, false)] {
        let mut forward = DirectionState { sequence_end: 90_000, ..request };
        note(&mut forward, &response, &Flow { state, ..flow }, &seen(95_000, 10, 5_000, 0));
        assert_eq!((forward.sequence_end == 95_010, forward.acknowledged == 5_000), (is_noted, is_noted));
    }
}

#[test]
fn words_that_are_read_apart_open_no_window() {
    // Another CPU has noted an acknowledgement, and not yet the edge that goes with it.
    let [_, response] = directions();
    let torn = DirectionState { edge: response.acknowledged - 10, ..response };
    let [mut forward, _] = directions();
    let [flow, _] = flows();
    note(&mut forward, &torn, &flow, &seen(2_000_000_000, 10, 700, FLAG_FIN));
    assert_eq!((forward.bytes, forward.fin_end()), (0, None));
}

#[test]
fn a_reset_after_both_ends_says_nothing() {
    let [flow, _] = flows();
    let reset = seen(5_000, 0, 700, FLAG_RST);
    // The sender has ended its direction at 5,000, and the receiver both acknowledged that and ended its own.
    let over = ended(200, 4_000);
    for (reverse, expected) in [(over, 0), (DirectionState { fin: 0, ..over }, SENDER_RESET)] {
        let mut forward = DirectionState { sequence_end: 5_000, ..ended(5_000, 700) };
        note(&mut forward, &reverse, &flow, &reset);
        assert_eq!(forward.flags, expected);
    }
}
