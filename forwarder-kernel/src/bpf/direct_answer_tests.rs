//! What the program at TC makes of an endpoint's first answer to the SYN of a direct connection, and of the client's next SYN.

use std::collections::HashSet;

use aya::maps::Array;
use forwarder_common::direct::{DIRECT_SLOTS, DirectSlot, HANDSHAKE_ANSWERED, HANDSHAKE_ASKED, direct_flow};
use forwarder_common::flow::{DIRECTION_REQUEST, REPLACED, SENDER_RESET, STATE_OVER};
use forwarder_common::packet::{FLAG_ACK, FLAG_RST, FLAG_SYN};

use super::direct_tests::{ROOM, answer, map, sent, syn, with_endpoints};
use super::frames::{Frame, TC_ACT_REDIRECT};
use super::*;

/// The TCP segment of a frame.
fn tcp_of(frame: &[u8]) -> &[u8] {
    if frame[12..14] == [0x86, 0xdd] { &frame[54..] } else { &frame[34..] }
}

#[test]
fn the_tuple_of_a_connection_that_is_over_is_the_sockets() {
    with_endpoints(1, ROOM, |world| {
        let syn = syn(world.family.client(0));
        let (number, slot) = world.open(&syn);
        let refusal = answer(&slot, FLAG_RST | FLAG_ACK, 0, syn.sequence.wrapping_add(1));
        world.check(&refusal, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_ne!(world.slot(number).pair.response.flags & SENDER_RESET, 0);
        world.check_refused(&syn);
        assert_eq!(world.slot(number).flows[0].state, STATE_OVER);
    });
}

#[test]
fn a_refusal_becomes_the_syn_to_each_of_the_others_once() {
    with_endpoints(3, ROOM, |world| {
        let syn = syn(world.family.client(0));
        let (first, slot) = world.open(&syn);
        let (mut former, mut asked) = ((first, slot), HashSet::from([slot.flows[0].out.destination_port]));
        for _ in 0..2 {
            let refusal = answer(&former.1, FLAG_RST | FLAG_ACK, 0, syn.sequence.wrapping_add(1));
            let out = world.check(&refusal, TC_ACT_REDIRECT, Verdict::DirectRetried);
            let number = world.leads_to(&syn.tuple).unwrap() >> 1;
            let next = world.slot(number);
            assert_ne!(number, former.0);
            // It is a packet of its own: what is in the header of IP is the program's.
            assert_eq!(tcp_of(&out), tcp_of(&sent(&syn, &next).encode()));
            assert!(asked.insert(next.flows[0].out.destination_port), "asked twice");
            assert_eq!(world.slot(former.0).pair.offloaded, REPLACED);
            former = (number, next);
        }
        let refusal = answer(&former.1, FLAG_RST | FLAG_ACK, 0, syn.sequence.wrapping_add(1));
        world.check(&refusal, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!(world.used().len(), 3);
    });
}

#[test]
fn a_reset_that_does_not_acknowledge_the_syn_is_no_refusal() {
    with_endpoints(2, ROOM, |world| {
        let syn = syn(world.family.client(0));
        let (number, slot) = world.open(&syn);
        for (flags, acknowledgement) in [
            (FLAG_RST | FLAG_ACK, syn.sequence),
            (FLAG_RST | FLAG_ACK, syn.sequence.wrapping_add(2)),
            (FLAG_RST, 0),
        ] {
            world.check(&answer(&slot, flags, 0, acknowledgement), TC_ACT_REDIRECT, Verdict::Redirected);
        }
        assert_eq!((world.used(), world.slot(number).pair.response.flags & SENDER_RESET), (vec![number], 0));
    });
}

#[test]
fn what_is_left_of_an_earlier_connection_is_reset_and_asked_again_but_not_for_ever() {
    with_endpoints(1, ROOM, |world| {
        let syn = syn(world.family.client(0));
        let (number, slot) = world.open(&syn);
        let stale = answer(&slot, FLAG_ACK, 5_000, syn.sequence.wrapping_add(1_000_000));
        for round in 1..=2 {
            let out = world.check(&stale, TC_ACT_REDIRECT, Verdict::DirectStale);
            assert_eq!(tcp_of(&out), tcp_of(&sent(&syn, &slot).encode()));
            assert_eq!(world.slot(number).resets, round);
        }
        // Then the client answers it.
        world.check(&stale, TC_ACT_REDIRECT, Verdict::Redirected);
        // Until it asks again.
        world.check(&syn, TC_ACT_REDIRECT, Verdict::Redirected);
        world.check(&stale, TC_ACT_REDIRECT, Verdict::DirectStale);
        // What acknowledges the SYN is about this connection.
        let own = answer(&slot, FLAG_ACK, 5_000, syn.sequence.wrapping_add(1));
        world.check(&own, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!(world.used(), [number]);
    });
}

#[test]
fn a_silent_endpoint_is_replaced_at_the_next_syn_and_its_late_answer_is_the_stacks() {
    with_endpoints(2, ROOM, |mut world| {
        let syn = syn(world.family.client(0));
        let (first, mut slot) = world.open(&syn);
        slot.pair.opened -= 950_000_000;
        map::<Array<_, DirectSlot>>(&mut world.bpf, DIRECT_SLOTS).set(first, slot, 0).unwrap();
        let (second, next) = world.open(&syn);
        assert_ne!(next.flows[0].out.destination_port, slot.flows[0].out.destination_port);
        assert_eq!(world.leads_to(&syn.tuple), Some(direct_flow(second, DIRECTION_REQUEST)));
        assert_eq!(world.slot(first).pair.offloaded, REPLACED);
        let late = answer(&slot, FLAG_SYN | FLAG_ACK, 77, syn.sequence.wrapping_add(1));
        world.check(&late, TC_ACT_UNSPEC, Verdict::NoListener);
        // The other one is asked for its first answer only.
        world.check(&syn, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!(world.used().len(), 2);
    });
}

#[test]
fn a_client_that_begins_anew_is_followed_whichever_syn_is_answered() {
    with_endpoints(1, ROOM, |world| {
        for (client, is_former) in [(0, false), (1, true)] {
            let data = Frame { payload: b"data".to_vec(), ..syn(world.family.client(client)) };
            let (number, slot) = world.open(&data);
            let anew = Frame { sequence: 9_000, ..syn(data.tuple) };
            let out = world.check(&anew, TC_ACT_REDIRECT, Verdict::Redirected);
            assert_eq!(out, sent(&anew, &slot).encode());
            let slot = world.slot(number);
            assert_eq!((slot.first_sequence, slot.former_sequence), (9_000, data.sequence));
            // The endpoint has heard the former one, with its data, or the other.
            let acknowledged = if is_former { data.sequence.wrapping_add(5) } else { 9_001 };
            world.check(
                &answer(&slot, FLAG_SYN | FLAG_ACK, 77, acknowledged),
                TC_ACT_REDIRECT,
                Verdict::Redirected,
            );
            let slot = world.slot(number);
            let first = if is_former { data.sequence } else { 9_000 };
            assert_eq!((slot.first_sequence, slot.handshake), (first, HANDSHAKE_ANSWERED));
        }
    });
}

#[test]
fn a_syn_of_the_endpoint_is_the_clients_to_answer() {
    with_endpoints(1, ROOM, |world| {
        let (number, slot) = world.open(&syn(world.family.client(0)));
        let simultaneous = answer(&slot, FLAG_SYN, 77, 0);
        world.check(&simultaneous, TC_ACT_REDIRECT, Verdict::Redirected);
        assert_eq!((world.used(), world.slot(number).handshake), (vec![number], HANDSHAKE_ASKED));
    });
}
