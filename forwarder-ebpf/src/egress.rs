//! The programs at the egress of interfaces: keep what the local sockets of an offloaded pair say from reaching the two ends, who
//! now speak with each other.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    AGENT_LINK_PRIORITY, AGENT_PRIORITY, DirectionState, FLOW_REVERSE_ENDED, Flow, STATE_HANDOVER, STATE_OVER,
};
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, LinkLayer, Segment, tcp_field};
use forwarder_common::translate::{self, ChecksumChange};
use forwarder_common::verdict::Verdict;

use crate::flow;
use crate::frame::find_segment;
use crate::maps::{EGRESS, FLOWS, Frame, PAIRS};
use crate::outcome::{count_verdict, redirect_to_neighbour};
use crate::packet::{PacketMut, Summed};
use crate::skb::{SocketBuffer, store};

/// For interfaces whose packets begin with an Ethernet header.
#[classifier]
pub fn fwd_egress_eth(context: TcContext) -> i32 {
    egress(&context, LinkLayer::Ethernet)
}

/// For interfaces whose packets begin with the IP header.
#[classifier]
pub fn fwd_egress_ip(context: TcContext) -> i32 {
    egress(&context, LinkLayer::Ip)
}

#[inline(always)]
fn egress(context: &TcContext, link: LinkLayer) -> i32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`; the fields may be read.
    let (ingress, priority) = unsafe { ((*context.skb.skb).ingress_ifindex, (*context.skb.skb).priority) };
    // What is forwarded, and what the agent itself says in the name of a pair.
    if ingress != 0 || priority == AGENT_PRIORITY {
        return TC_ACT_UNSPEC;
    }
    let Ok(Frame { segment, .. }) = find_segment(context, link, EGRESS) else { return TC_ACT_UNSPEC };
    if priority == AGENT_LINK_PRIORITY {
        return hand_over(context, link, segment);
    }
    let Some(verdict) = verdict_of(context, segment) else { return TC_ACT_UNSPEC };
    count_verdict(verdict);
    match verdict {
        Verdict::HandoverSent => TC_ACT_UNSPEC,
        _ => TC_ACT_SHOT,
    }
}

/// Hands what the agent says in the name of a pair to the neighbour that the pair's packets go to. It comes by this way again
/// then, as what the agent says.
#[inline(always)]
fn hand_over(context: &TcContext, link: LinkLayer, segment: &Segment) -> i32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose priority may be written.
    let set_priority = || unsafe { (*context.skb.skb).priority = AGENT_PRIORITY };
    if let LinkLayer::Ip = link {
        set_priority();
        return TC_ACT_UNSPEC;
    }
    // Otherwise another installation's agent says it: the program of that one knows the neighbour.
    let Some(flow) = flow::find(&segment.tuple.reversed()) else { return TC_ACT_UNSPEC };
    set_priority();
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let Some(back) = flow::find(&unsafe { &*flow.flow }.out.reversed()) else { return TC_ACT_SHOT };
    // SAFETY: as above.
    redirect_to_neighbour(unsafe { &*back.flow })
}

/// What becomes of a packet that a local socket of a flow sends; `None` for all others.
#[inline(always)]
fn verdict_of(context: &TcContext, segment: &Segment) -> Option<Verdict> {
    let flow = FLOWS.get_ptr(segment.tuple.reversed())?;
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let flow = unsafe { &*flow };
    if flow.state == STATE_OVER {
        return None;
    }
    let pair = PAIRS.get_ptr(flow.pair)?;
    // SAFETY: as above.
    let (forward, other) = unsafe { &*pair }.directions(flow);
    // Both ends know that it is over; one that has forgotten the connection would answer with a reset.
    if flow.has_ended(forward, other) {
        return Some(Verdict::Suppressed);
    }
    // What the socket had received before the handover it still delivers and acknowledges. An end it passes on only if
    // it came before the handover too, as the agent has noted then; the one that a dying agent's socket sends would
    // make a cut stream look whole.
    let is_end = segment.flags & FLAG_FIN != 0 && flow.flags & FLOW_REVERSE_ENDED == 0;
    let is_in_handover =
        flow.state == STATE_HANDOVER && segment.flags & (FLAG_RST | FLAG_SYN) == 0 && !is_end;
    if !is_in_handover {
        return Some(Verdict::Suppressed);
    }
    Some(match bring_up_to_date(context, segment, flow, other) {
        Ok(()) => Verdict::HandoverSent,
        Err(verdict) => verdict,
    })
}

/// Has a packet of a local socket acknowledge what the other end has acknowledged past it. The socket knows nothing of
/// that, and its peer drops what comes with too old an acknowledgement (RFC 5961, 5.2). `other` is what is known of the
/// opposite direction.
///
/// # Errors
/// The packet cannot be rewritten, and must be dropped.
#[inline(always)]
fn bring_up_to_date(
    context: &TcContext,
    segment: &Segment,
    flow: &Flow,
    other: &DirectionState,
) -> Result<(), Verdict> {
    let Some(reverse) = FLOWS.get_ptr(flow.out.reversed()) else { return Ok(()) };
    // SAFETY: as above.
    let reverse = unsafe { &*reverse };
    let acknowledged = other.acknowledged.wrapping_sub(flow.sequence_shift);
    if segment.flags & FLAG_ACK == 0 || !translate::is_before(segment.acknowledgement, acknowledged) {
        return Ok(());
    }
    let window = translate::window(other.window, reverse.source_scale, reverse.target_scale).to_be();
    let acknowledged = acknowledged.to_be();
    store(context, segment.tcp_offset + tcp_field::ACKNOWLEDGEMENT as u32, &acknowledged)?;
    store(context, segment.tcp_offset + tcp_field::WINDOW as u32, &window)?;
    let change = ChecksumChange::NONE
        .and(segment.acknowledgement.to_be(), acknowledged)
        .and(u32::from(segment.window.to_be()), u32::from(window));
    SocketBuffer(context).change_checksum(segment, change, Summed::Segment)
}
