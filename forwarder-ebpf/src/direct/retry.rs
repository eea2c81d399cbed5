//! Another endpoint for a client's SYN, in the place of one that refuses it, or does not answer.
//!
//! The attempt with the other endpoint is a connection of its own, in a slot of its own; the client's tuple leads there from then on. The slot of
//! the former one says that it was replaced, and its packets are the stack's, which resets an endpoint that answers late.

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_EXIST, BPF_NOEXIST, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use forwarder_common::direct::{DirectSlot, HANDSHAKE_ASKED, MOST_ASKED};
use forwarder_common::flow::{
    DIRECTION_REQUEST, DIRECTION_RESPONSE, Flow, REPLACED, SENDER_RESET, STATE_OFFLOADED, STATE_OVER,
};
use forwarder_common::layout::STATE_READY;
use forwarder_common::packet::{FLAG_ACK, FLAG_SYN, Segment};
use forwarder_common::tuple::FourTuple;
use forwarder_common::verdict::Verdict;

use super::choice::{hash_of, other, targets_of};
use super::handshake::answers;
use super::{aim, claim, count_half_open, has_no_room_for, take_slot};
use crate::admission::find_listener;
use crate::arrival::is_expected;
use crate::compose::{Composed, compose};
use crate::flow::find_direct;
use crate::maps::{DIRECT, DIRECT_FREE};
use crate::outcome::{Outcome, redirect_to_neighbour};

/// How long an endpoint may be silent before the client's next SYN goes to another one, in nanoseconds: a client repeats its SYN after a second
/// (RFC 6298, 2).
const SILENCE: u64 = 900_000_000;
/// Whether another endpoint may be asked in the place of the one of an attempt.
#[inline(always)]
fn may_be_replaced(flow: &Flow, slot: &DirectSlot) -> bool {
    let has_reset = (slot.pair.request.flags | slot.pair.response.flags) & SENDER_RESET != 0;
    flow.state == STATE_OFFLOADED
        && slot.handshake == HANDSHAKE_ASKED
        && slot.asked_before + 1 < MOST_ASKED
        && !has_reset
        && !has_no_room_for(&slot.flows[1].out.destination)
}

/// The attempt that a repeated SYN is to be taken from, because its endpoint has been silent for too long; null if there is none.
#[inline(always)]
pub(super) fn find_silent(context: &TcContext, segment: &Segment) -> *mut DirectSlot {
    let Some((flow, slot)) = find_direct(&segment.tuple) else { return null_mut() };
    // SAFETY: the element of an array lives as long as the map, and stays this connection's while this program runs; others may write its words.
    let (flow, slot) = unsafe { (&*flow, &mut *slot) };
    // SAFETY: the helper has no conditions.
    let age = unsafe { bpf_ktime_get_ns() }.wrapping_sub(slot.pair.opened);
    let is_silent = flow.direction == DIRECTION_REQUEST
        && age >= SILENCE
        && may_be_replaced(flow, slot)
        && is_expected(context, segment.version, flow);
    if is_silent { &raw mut *slot } else { null_mut() }
}

/// Notes that an attempt is in the place of another one.
#[inline(always)]
pub(super) fn note_replacement(slot: &mut DirectSlot, former: &DirectSlot) {
    slot.asked_before = former.asked_before + 1;
    slot.tried = hash_of(&former.flows[0].out);
}

/// Has the client's tuple lead to `request` instead of to the attempt in `former`; tells whether it does. Not if another program does the same just now, or has
/// done so.
#[inline(always)]
pub(super) fn replace(client: &mut FourTuple, request: u32, former: &mut DirectSlot) -> bool {
    // Nobody listens there: who inserts it has the attempt to himself.
    let port = client.destination_port;
    client.destination_port = 0;
    if DIRECT.insert(&*client, &request, u64::from(BPF_NOEXIST)).is_err() {
        return false;
    }
    client.destination_port = port;
    let is_mine = former.flows[0].state == STATE_OFFLOADED
        && DIRECT.insert(&*client, &request, u64::from(BPF_EXIST)).is_ok();
    if is_mine {
        // SAFETY: a valid place. The agent has to see that it was replaced before it sees that it is over.
        unsafe { (&raw mut former.pair.offloaded).write_volatile(REPLACED) };
        for flow in &mut former.flows {
            // SAFETY: as above.
            unsafe { (&raw mut flow.state).write_volatile(STATE_OVER) };
        }
    }
    client.destination_port = 0;
    let _ = DIRECT.remove(&*client);
    is_mine
}

/// Sends the client's SYN to another endpoint, if the segment is the refusal of one: the segment becomes it. `None` where the refusal is the client's to hear.
#[inline(always)]
pub(crate) fn ask_another(context: &TcContext, segment: &Segment) -> Option<Outcome> {
    Outcome::decided(ask(context, segment), Verdict::DirectRetried)
}

/// The same, for [`Outcome::decided`].
#[inline(never)]
fn ask(context: &TcContext, segment: &Segment) -> u32 {
    let Some((flow, former)) = find_direct(&segment.tuple) else { return 0 };
    // SAFETY: as in `find_silent`.
    let (flow, former) = unsafe { (&*flow, &mut *former) };
    if flow.direction != DIRECTION_RESPONSE
        || segment.flags & FLAG_ACK == 0
        || !answers(segment, former)
        || !may_be_replaced(flow, former)
        || !is_expected(context, segment.version, flow)
    {
        return 0;
    }
    let Ok(listener) = find_listener(&flow.out.source, flow.out.source_port) else { return 0 };
    let (first, count) = targets_of(&listener, segment.version);
    if listener.state != STATE_READY || count < 2 {
        return 0;
    }
    let Some(target) = other(first, count, former) else { return 0 };
    let Some((number, slot)) = take_slot() else { return 0 };
    copy(slot, former);
    // The agent reads it with what `claim` writes. If there is no other attempt, this refusal is the client's, and is noted all the same.
    former.pair.response.flags |= SENDER_RESET;
    aim(target, number, slot);
    slot.pair.request.sequence_end = slot.first_sequence.wrapping_add(1);
    note_replacement(slot, former);
    if !claim(context, target, number, slot, &raw mut *former) {
        let _ = DIRECT_FREE.push(number, 0);
        return 0;
    }
    count_half_open(1);
    attempt(context, segment, slot)
}

/// Turns the packet of `segment` into the client's SYN as it is kept in the slot, and sends it to the endpoint. Returns what the program is to return.
#[inline(always)]
pub(super) fn attempt(context: &TcContext, segment: &Segment, slot: &DirectSlot) -> u32 {
    let [request, _] = &slot.flows;
    let length = u32::from(slot.first_options_length);
    let composed = Composed {
        out: &request.out,
        sequence: slot.first_sequence,
        acknowledgement: 0,
        rest: (5 + length / 4) << 28 | u32::from(FLAG_SYN) << 16 | u32::from(slot.first_window),
        hop_limit: request.hop_limit,
        options: &slot.first_options,
        options_length: length,
    };
    if compose(context, segment, &composed) {
        redirect_to_neighbour(request) as u32
    } else {
        TC_ACT_SHOT as u32
    }
}

/// What stays the same with another endpoint.
#[inline(always)]
fn copy(slot: &mut DirectSlot, former: &DirectSlot) {
    // What is not the same, `aim` writes.
    slot.flows[1] = former.flows[1];
    slot.handshake = HANDSHAKE_ASKED;
    slot.resets = 0;
    slot.first_sequence = former.first_sequence;
    slot.former_sequence = former.former_sequence;
    slot.first_window = former.first_window;
    slot.first_scale = former.first_scale;
    slot.first_options = former.first_options;
    slot.first_options_length = former.first_options_length;
    slot.first_payload = former.first_payload;
}
