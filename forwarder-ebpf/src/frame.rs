//! The TCP segment in a packet.

use aya_ebpf::programs::TcContext;
use forwarder_common::flow::Seen;
use forwarder_common::packet::{FLAG_FIN, LinkLayer, Segment, USUAL_OFFSET, parse, parse_usual};
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
    if let LinkLayer::Ethernet = link
        && load_into(context, USUAL_OFFSET as u32, &mut frame.headers)
        && let Some(segment) = parse_usual(&frame.headers)
    {
        frame.segment = segment;
        frame.is_usual = true;
    } else {
        walk_headers(context, link, &mut frame.segment)?;
        frame.is_usual = false;
    }
    Ok(frame)
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
