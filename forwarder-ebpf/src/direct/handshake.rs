//! What is noted of the handshake of a direct connection, which the client and the endpoint do with each other.

use aya_ebpf::programs::TcContext;
use forwarder_common::direct::{DirectSlot, HANDSHAKE_ANSWERED, HANDSHAKE_ASKED, HANDSHAKE_DONE};
use forwarder_common::flow::{DIRECTION_RESPONSE, DirectionState, FLOW_OPENING, Flow, SENDER_RESET};
use forwarder_common::packet::{FLAG_ACK, FLAG_RST, FLAG_SYN, Segment};

use super::count_half_open;
use crate::clock::coarse_time;
use crate::flow::slot_of;
use crate::maps::Frame;
use crate::rewrite::walk_options;
use crate::skb::{SocketBuffer, TCP_HEADER, load_words};

/// Notes the client's SYN. Tells whether its options can be understood.
#[inline(always)]
pub(super) fn note_attempt(context: &TcContext, segment: &Segment, slot: &mut DirectSlot) -> bool {
    let Ok(options) = walk_options(SocketBuffer(context), segment) else { return false };
    slot.pair.request.sequence_end = segment.sequence.wrapping_add(1);
    slot.handshake = HANDSHAKE_ASKED;
    slot.resets = 0;
    slot.first_sequence = segment.sequence;
    slot.former_sequence = segment.sequence;
    slot.first_window = segment.window;
    slot.first_scale = options.scale as u8;
    let headers = segment.tcp_offset.wrapping_sub(segment.ip_offset).wrapping_add(segment.header_length);
    slot.first_payload = segment.ip_length.saturating_sub(headers) as u16;
    true
}

/// Keeps the options of the client's SYN, to send it again.
#[inline(always)]
pub(super) fn keep_options(context: &TcContext, segment: &Segment, slot: &mut DirectSlot) {
    let length = segment.header_length.saturating_sub(TCP_HEADER) & !3;
    let is_kept = load_words(context, segment.tcp_offset + TCP_HEADER, &mut slot.first_options, length);
    slot.first_options_length = if is_kept { length as u8 } else { 0 };
}

/// What is known of a direction of which nothing has been seen. The clocks of both ends stay what they are.
#[inline(always)]
pub(super) fn begin(direction: &mut DirectionState, now: u64) {
    direction.packets = 0;
    direction.bytes = 0;
    direction.repeated = 0;
    direction.last_seen = now;
    direction.fin = 0;
    direction.timestamp_shift = 0;
    direction.timestamp_least = 0;
    direction.edge = 0;
    direction.sequence_end = 0;
    direction.acknowledged = 0;
    direction.window = 0;
    direction.flags = 0;
    direction.timestamp_known = 1;
}

/// Follows the handshake of a direct connection, of which a packet of `flow` has come. Returns 1 where there is nothing else to note of it:
/// before the endpoint has answered, no number is known that a reset could be told true by.
#[inline(never)]
pub(super) fn follow(context: &TcContext, frame: &Frame, flow: &Flow) -> u32 {
    let Some(slot) = slot_of(flow) else { return 0 };
    // SAFETY: the element of an array lives as long as the map; others write its words at the same time.
    let slot = unsafe { &mut *slot };
    let segment = &frame.segment;
    let kind = segment.flags & (FLAG_SYN | FLAG_ACK | FLAG_RST);
    let is_asked = slot.handshake == HANDSHAKE_ASKED;
    if flow.direction == DIRECTION_RESPONSE {
        if kind == FLAG_SYN | FLAG_ACK && slot.handshake != HANDSHAKE_DONE {
            note_answer(context, segment, slot);
        } else if kind & FLAG_RST != 0 && is_asked && answers(segment, slot) {
            slot.pair.response.flags |= SENDER_RESET;
        }
        return is_asked as u32;
    }
    if kind == FLAG_SYN {
        // The client has not given up. If it has begun anew, the endpoint tells it what it makes of that.
        slot.pair.request.last_seen = frame.seen.time;
        slot.resets = 0;
        if is_asked && segment.sequence != slot.first_sequence {
            let (former, payload) = (slot.first_sequence, slot.first_payload);
            note_attempt(context, segment, slot);
            slot.former_sequence = former;
            // The answer to either of them may acknowledge what came with it.
            slot.first_payload = slot.first_payload.max(payload);
            keep_options(context, segment, slot);
        }
    } else if kind & FLAG_RST != 0 && is_asked {
        if segment.sequence == slot.pair.request.sequence_end {
            slot.pair.request.flags |= SENDER_RESET;
        }
    } else if frame.is_accepted && slot.handshake == HANDSHAKE_ANSWERED {
        slot.handshake = HANDSHAKE_DONE;
        slot.pair.offloaded = frame.seen.time;
        for flow in &mut slot.flows {
            flow.flags &= !FLOW_OPENING;
        }
        count_half_open(-1);
    }
    is_asked as u32
}

/// Whether a segment acknowledges the client's SYN, and maybe data that came with it (RFC 7413): the client takes nothing else for an answer, and no reset
/// (RFC 9293, 3.10.7.3).
#[inline(always)]
pub(super) fn answers(segment: &Segment, slot: &DirectSlot) -> bool {
    acknowledges(segment, slot.first_sequence, slot)
}

/// The same of the SYN before, if the client has begun anew: or somebody has in its name.
#[inline(always)]
pub(super) fn answers_former(segment: &Segment, slot: &DirectSlot) -> bool {
    acknowledges(segment, slot.former_sequence, slot)
}

#[inline(always)]
fn acknowledges(segment: &Segment, first: u32, slot: &DirectSlot) -> bool {
    let acknowledged = segment.acknowledgement.wrapping_sub(first);
    (1..=1 + u32::from(slot.first_payload)).contains(&acknowledged)
}

/// Notes the endpoint's SYN-ACK: from now on it is known what each end takes.
#[inline(always)]
fn note_answer(context: &TcContext, segment: &Segment, slot: &mut DirectSlot) {
    if !answers(segment, slot) {
        if !answers_former(segment, slot) {
            return;
        }
        // The SYN that came after it was somebody else's.
        slot.first_sequence = slot.former_sequence;
        slot.pair.request.sequence_end = slot.former_sequence.wrapping_add(1);
    }
    let scale = walk_options(SocketBuffer(context), segment).map_or(0, |options| options.scale as u8);
    // Scales count where both ends announce one (RFC 7323, 2.2).
    let scales = if scale == 0 || slot.first_scale == 0 { [0; 2] } else { [slot.first_scale - 1, scale - 1] };
    for (flow, scale) in slot.flows.iter_mut().zip(scales) {
        (flow.source_scale, flow.target_scale) = (scale, scale);
    }
    let next = segment.sequence.wrapping_add(1);
    let (request, response) = (&mut slot.pair.request, &mut slot.pair.response);
    response.sequence_end = next;
    response.acknowledged = segment.acknowledgement;
    // The window of a SYN is not scaled (RFC 7323, 2.2): as much of it is noted as the scaled word can tell.
    response.window = segment.window >> scales[1];
    response.edge = segment.acknowledgement.wrapping_add(u32::from(segment.window));
    response.last_seen = coarse_time();
    request.acknowledged = next;
    request.window = slot.first_window >> scales[0];
    request.edge = next.wrapping_add(u32::from(slot.first_window));
    slot.handshake = HANDSHAKE_ANSWERED;
}
