//! Sends on what is ordinary of established connections: segments with an acknowledgement that neither open nor end one, in a frame of one piece, whose
//! receiver takes them and whose neighbour is known. All else is left to TC, unchanged.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS, XDP_REDIRECT, XDP_TX};
use aya_ebpf::programs::XdpContext;
use forwarder_common::flow::{DIRECTION_REQUEST, FLOW_BY_STACK, FLOW_OPENING, STATE_OFFLOADED};
use forwarder_common::layout::{XDP_ADDRESS, XDP_TAKES};
use forwarder_common::packet::{
    FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, IpVersion, LinkLayer, Segment, USUAL_WORDS_V4, USUAL_WORDS_V6,
    parse, parse_usual, tcp_field,
};
use forwarder_common::translate::is_pseudo_header_sum;
use forwarder_common::verdict::Verdict;

use crate::flow::{self, has_direct};
use crate::frame::seen_with;
use crate::maps::{FRAME, Frame, INGRESS, XDP_INTERFACES, XDP_TARGETS};
use crate::outcome::Outcome;
use crate::packet::PacketMut as _;
use crate::rewrite::{is_usual, readdress_any, readdress_usual, rewrite_any, rewrite_usual};
use crate::xdp::frame::{ETHERNET_HEADER, UsualFrame, XdpFrame};
use crate::xdp::neighbour;

/// Finds the TCP segment in a frame; `None` if there is none.
#[inline(always)]
pub(super) fn find_segment<'a>(context: &XdpContext) -> Option<&'a mut Frame> {
    let frame = FRAME.get_ptr_mut(INGRESS)?;
    // SAFETY: as in `frame::find_segment`: this program ends before one at TC sees the packet.
    let frame = unsafe { &mut *frame };
    let at_hand = UsualFrame(context).load_headers(&mut frame.headers);
    if let Some(segment) = parse_usual(&frame.headers, at_hand) {
        frame.segment = segment;
        frame.is_usual = true;
        return Some(frame);
    }
    if walk_headers(context, &mut frame.segment) == 0 {
        return None;
    }
    frame.is_usual = false;
    Some(frame)
}

/// The same for any headers; 1 if there is a segment, 0 otherwise. A function of its own, so that the headers that it reads leave the stack with it.
#[inline(never)]
fn walk_headers(context: &XdpContext, segment: &mut Segment) -> u32 {
    let Ok(found) = parse(&XdpFrame(context), LinkLayer::Ethernet) else { return 0 };
    *segment = found;
    1
}

/// Translates a packet and sends it on. `None` where it is none of a connection, or none that would be ordinary.
#[inline(always)]
pub(super) fn forward(context: &XdpContext, frame: &mut Frame) -> Option<Outcome> {
    let packet = XdpFrame(context);
    let segment = &frame.segment;
    if segment.flags & (FLAG_SYN | FLAG_FIN | FLAG_RST | FLAG_ACK) != FLAG_ACK || segment.is_first_fragment {
        return None;
    }
    let found = flow::find(&segment.tuple)?;
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`. The agent may change words of it
    // meanwhile: see `update`.
    let flow = unsafe { &*found.flow };
    let left = Some(leave(Verdict::XdpLeft));
    let own = own_address(context);
    let headers = segment.tcp_offset.wrapping_sub(segment.ip_offset) + segment.header_length;
    if flow.state != STATE_OFFLOADED
        || flow.flags & (FLOW_BY_STACK | FLOW_OPENING) != 0
        // Larger than its first part, and so in several, or cut short.
        || segment.ip_length.wrapping_add(ETHERNET_HEADER as u32) > packet.length()
        || segment.ip_length < headers
        || flow.is_too_big(segment.ip_length)
        || flow.arrival != interface(context)
        || !is_for(packet, own)
    {
        return left;
    }
    let Some(pair) = found.pair() else { return left };
    // SAFETY: as above. Other CPUs may write to it at the same time: each field is of one word.
    let pair = unsafe { &mut *pair };
    let (forward, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    frame.seen = seen_with(segment, segment.ip_length - headers);
    frame.is_accepted = forward.accepts(reverse, flow, &frame.seen);
    // What is sent again may have been lost on the way from here: then TC sends it.
    if !frame.is_accepted || !forward.is_news(&frame.seen) {
        return left;
    }
    if is_unfinished(context, frame) {
        return Some(leave(Verdict::XdpUnfinished));
    }
    let Some(addresses) = neighbour::addresses(context, flow, &frame.seen) else {
        return Some(leave(Verdict::XdpNeighbour));
    };
    let Some(action) = send_by(context, flow.interface, own) else {
        return Some(leave(Verdict::XdpNoTarget));
    };
    let rewritten = match (has_direct() && found.is_direct(), is_usual(frame, flow)) {
        (true, true) => readdress_usual(UsualFrame(context), frame, flow),
        (true, false) => readdress_any(packet, frame, flow),
        (false, true) => rewrite_usual(UsualFrame(context), frame, flow, forward, reverse),
        (false, false) => rewrite_any(packet, frame, flow, forward, reverse),
    };
    Some(match rewritten.and_then(|()| UsualFrame(context).store(0, &addresses)) {
        Ok(()) => {
            forward.note(reverse, flow, &frame.seen, true);
            Outcome { action: action as i32, verdict: Verdict::XdpRedirected }
        }
        Err(verdict) => Outcome { action: XDP_DROP as i32, verdict },
    })
}

/// The packet goes on, and TC sends it.
#[inline(always)]
fn leave(verdict: Verdict) -> Outcome {
    Outcome { action: XDP_PASS as i32, verdict }
}

/// The index of the interface that the frame has come by.
#[inline(always)]
pub(super) fn interface(context: &XdpContext) -> u32 {
    // SAFETY: the kernel hands the program a valid `xdp_md`, whose field may be read.
    unsafe { (*context.ctx).ingress_ifindex }
}

/// What [`XDP_INTERFACES`] has of the interface that the frame has come by.
#[inline(always)]
pub(super) fn own_address(context: &XdpContext) -> u64 {
    let Some(own) = XDP_INTERFACES.get_ptr(interface(context)) else { return 0 };
    // SAFETY: one word of the element of an array, which the agent may write meanwhile.
    unsafe { own.read_volatile() }
}

/// Whether a frame has the Ethernet address of an interface that packets are sent on from.
#[inline(always)]
pub(super) fn is_for(packet: XdpFrame<'_>, own: u64) -> bool {
    let Some([a, b, c, d, e, f]) = packet.first() else { return false };
    own != 0 && own & XDP_ADDRESS == u64::from_ne_bytes([*a, *b, *c, *d, *e, *f, 0, 0])
}

/// Whether the segment's checksum is one of the pseudo-header alone, as where it never was on a wire (veth): whoever sent it left the rest to a device,
/// and only TC can tell the next one so. One of many thousands of finished ones looks the same, and goes by TC too.
#[inline(always)]
fn is_unfinished(context: &XdpContext, frame: &Frame) -> bool {
    let segment = &frame.segment;
    let last = match (frame.is_usual, segment.version) {
        (true, IpVersion::V4) => frame.headers[USUAL_WORDS_V4 - 1],
        (true, IpVersion::V6) => frame.headers[USUAL_WORDS_V6 - 1],
        (false, _) => {
            let last = XdpFrame(context).load(segment.tcp_offset + tcp_field::CHECKSUM as u32);
            let Ok(last) = last else { return true };
            last
        }
    };
    let checksum = ((u32::from_be(last) >> 16) as u16).to_be();
    let length = segment.ip_length - (segment.tcp_offset - segment.ip_offset);
    is_pseudo_header_sum(checksum, segment.tuple.address_words(), length)
}

/// What the program returns to have the packet leave by an interface; `None` if that does not take it from here.
#[inline(always)]
pub(super) fn send_by(context: &XdpContext, to: u32, own: u64) -> Option<u32> {
    if own & XDP_TAKES != 0 && to == interface(context) {
        return Some(XDP_TX);
    }
    // Where the packet goes is written down; it goes there if that is what the program returns.
    XDP_TARGETS.redirect(to, u64::from(XDP_PASS)).ok().map(|_| XDP_REDIRECT)
}
