//! The guard: keeps what the local sockets of a promoted pair say from reaching the two ends, who now speak with each
//! other.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::STATE_TAIL;
use forwarder_common::packet::{FLAG_FIN, FLAG_RST, LinkLayer, Segment};
use forwarder_common::verdict::Verdict;

use crate::classify::{count_verdict, read_segment};
use crate::maps::FLOWS;
use crate::redirect::payload_length;

/// For interfaces whose packets begin with an Ethernet header.
#[classifier]
pub fn fwd_egress_eth(context: TcContext) -> i32 {
    guard(&context, LinkLayer::Ethernet)
}

/// For interfaces whose packets begin with the IP header.
#[classifier]
pub fn fwd_egress_ip(context: TcContext) -> i32 {
    guard(&context, LinkLayer::Ip)
}

#[inline(always)]
fn guard(context: &TcContext, link: LinkLayer) -> i32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`; the field may be read.
    let is_local = unsafe { (*context.skb.skb).ingress_ifindex } == 0;
    if !is_local {
        return TC_ACT_UNSPEC;
    }
    let mut segment = Segment::EMPTY;
    if read_segment(context, link, &mut segment).is_err() {
        return TC_ACT_UNSPEC;
    }
    let Some(verdict) = judge(context, &segment) else { return TC_ACT_UNSPEC };
    count_verdict(verdict);
    match verdict {
        Verdict::TailSent => TC_ACT_UNSPEC,
        _ => TC_ACT_SHOT,
    }
}

/// What becomes of a packet that a local socket of a flow sends; `None` for all others.
#[inline(always)]
fn judge(context: &TcContext, segment: &Segment) -> Option<Verdict> {
    let flow = FLOWS.get_ptr(segment.tuple.reversed())?;
    // SAFETY: the element lives until every running program has left it, for the map is not preallocated.
    let state = unsafe { (*flow).state };
    // What the socket had received before the promotion it still delivers, and ends what had ended before.
    let is_tail = segment.flags & FLAG_RST == 0
        && (segment.flags & FLAG_FIN != 0 || payload_length(context, segment) > 0);
    Some(if state == STATE_TAIL && is_tail { Verdict::TailSent } else { Verdict::Guarded })
}
