//! The TCP segment in a packet.

use aya_ebpf::programs::TcContext;
use forwarder_common::flow::Seen;
use forwarder_common::packet::{
    FLAG_FIN, LinkLayer, Segment, USUAL_OFFSET, USUAL_WORDS_OF_OPTIONS, USUAL_WORDS_V4, USUAL_WORDS_V6,
    UsualHeaders, is_usual_v6, parse, parse_usual,
};
use forwarder_common::verdict::Verdict;

use crate::clock::coarse_time;
use crate::maps::{FRAME, Frame};
use crate::skb::{SocketBuffer, load_into};

/// Finds the TCP segment in the packet. `side` is [`INGRESS`] or [`EGRESS`].
///
/// # Errors
/// The verdict on a packet in which there is none.
#[inline(always)]
pub(crate) fn find_segment<'a>(
    context: &TcContext,
    link: LinkLayer,
    side: u32,
) -> Result<&'a mut Frame, Verdict> {
    let frame = FRAME.get_ptr_mut(side).ok_or(Verdict::Truncated)?;
    // SAFETY: the pointer is to this CPU's value, and of programs that do not interrupt each other; it begins as zeros, which
    // are valid.
    let frame = unsafe { &mut *frame };
    frame.is_usual = link == LinkLayer::Ethernet && find_usual(context, frame) != 0;
    if !frame.is_usual {
        walk_headers(context, link, &mut frame.segment)?;
    }
    Ok(frame)
}

/// Finds the segment in a packet with headers such as most are; 1 if it has such, 0 otherwise. (A function of its own, so that what it has on the stack leaves it
/// with it.)
#[inline(never)]
fn find_usual(context: &TcContext, frame: &mut Frame) -> u32 {
    let at_hand = load_usual(context, &mut frame.headers);
    let Some(segment) = parse_usual(&frame.headers, at_hand) else { return 0 };
    frame.segment = segment;
    1
}

/// Reads what may be usual headers, and tells how many words of them there are: of all that may be first, because a call more costs as much as many words.
#[inline(always)]
fn load_usual(context: &TcContext, headers: &mut UsualHeaders) -> usize {
    const WHOLE_V4: usize = USUAL_WORDS_V4 + USUAL_WORDS_OF_OPTIONS;
    const WHOLE_V6: usize = USUAL_WORDS_V6 + USUAL_WORDS_OF_OPTIONS;
    const OFFSET: u32 = USUAL_OFFSET as u32;
    let Some(whole) = headers.first_chunk_mut::<WHOLE_V4>() else { return 0 };
    if !load_into(context, OFFSET, whole) {
        let bare = headers.first_chunk_mut::<USUAL_WORDS_V4>();
        return if bare.is_some_and(|bare| load_into(context, OFFSET, bare)) { USUAL_WORDS_V4 } else { 0 };
    }
    let [kind, ..] = *whole;
    if !is_usual_v6(kind) {
        return WHOLE_V4;
    }
    let offset = OFFSET + WHOLE_V4 as u32 * 4;
    let Some(rest) = headers.last_chunk_mut::<{ WHOLE_V6 - WHOLE_V4 }>() else { return WHOLE_V4 };
    if load_into(context, offset, rest) {
        return WHOLE_V6;
    }
    let bare = rest.first_chunk_mut::<{ USUAL_WORDS_V6 - WHOLE_V4 }>();
    if bare.is_some_and(|bare| load_into(context, offset, bare)) { USUAL_WORDS_V6 } else { WHOLE_V4 }
}

/// The same for any headers: a function of its own, so that those that it reads leave the stack with it. (A segment as part of
/// its result would need a type whose description the kernel refuses.)
#[inline(never)]
fn walk_headers(context: &TcContext, link: LinkLayer, segment: &mut Segment) -> Result<(), Verdict> {
    *segment = parse(&SocketBuffer(context), link)?;
    Ok(())
}

/// Bytes of TCP payload, without what pads a short frame.
#[inline(always)]
pub(crate) fn payload_length(context: &TcContext, segment: &Segment) -> u32 {
    let total = match segment.ip_length {
        0 => context.len().wrapping_sub(segment.ip_offset),
        length => length,
    };
    let headers = segment.tcp_offset.wrapping_sub(segment.ip_offset) + segment.header_length;
    total.saturating_sub(headers)
}

/// What is noted of the packet.
#[inline(always)]
pub(crate) fn seen(context: &TcContext, segment: &Segment) -> Seen {
    seen_with(segment, payload_length(context, segment))
}

/// What is noted of a packet with so many bytes of payload.
#[inline(always)]
pub(crate) fn seen_with(segment: &Segment, payload: u32) -> Seen {
    Seen {
        sequence: segment.sequence,
        acknowledgement: segment.acknowledgement,
        payload,
        window: segment.window,
        // The end of a segment is noted with its last fragment, which tells where it is.
        flags: if segment.is_first_fragment { segment.flags & !FLAG_FIN } else { segment.flags },
        time: coarse_time(),
    }
}
