//! The redirector: sends the packets of a promoted pair's one leg on as packets of the other leg.
//!
//! See [`forwarder_common::flow`] for what stands in the maps, and [`crate::rewrite`] for what changes in a packet.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    DIRECTION_REQUEST, FLOW_BY_STACK, Flow, NextHop, STATE_OVER, STATE_RESET, STATE_SPLICED, STATE_TAIL, Seen,
};
use forwarder_common::packet::{FLAG_FIN, IpVersion, Segment};
use forwarder_common::verdict::Verdict;

use crate::classify::Found;
use crate::maps::{CLOCK, FLOWS, LOOSE_INTERFACES, PAIRS};
use crate::rewrite::rewrite;
use crate::{fragment, icmp, reset, tail};

/// What becomes of a packet that belongs to a flow.
pub(crate) struct Outcome {
    /// What the program returns.
    pub(crate) action: i32,
    /// Why.
    pub(crate) verdict: Verdict,
}

impl Outcome {
    #[inline(always)]
    pub(crate) fn drop(verdict: Verdict) -> Self {
        Self { action: TC_ACT_SHOT, verdict }
    }
}

/// Translates and redirects the packet if it is one of a flow. `None` for every other packet, which is unchanged.
#[inline(always)]
pub(crate) fn redirect(context: &TcContext, found: &mut Found) -> Option<Outcome> {
    let segment = &found.segment;
    #[expect(clippy::needless_borrows_for_generic_args, reason = "a copy would stand on the stack")]
    let Some(flow) = FLOWS.get_ptr(&segment.tuple) else {
        if segment.is_first_fragment {
            fragment::forget(context, segment);
        }
        return None;
    };
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`. The agent may change words of it
    // meanwhile: see `update`.
    let flow = unsafe { &*flow };
    if tail::is_clone(context) {
        return Some(tail::acknowledge(context, segment));
    }
    if flow.state == STATE_OVER {
        if segment.is_first_fragment {
            fragment::forget(context, segment);
        }
        return None;
    }
    if !is_expected(context, segment.version, flow) {
        return Some(Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::OtherInterface });
    }
    let is_new_connection = segment.is_attempt();
    if flow.state == STATE_RESET {
        if is_new_connection {
            release(segment, flow);
            return None;
        }
        return Some(reset::answer(context, segment, flow));
    }
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else {
        // The agent is just about to insert it: the connection is the local socket's still, a SYN on its tuple included.
        return Some(Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::PairMissing });
    };
    // SAFETY: as above. Other CPUs may write to it at the same time: each field is of one word, and none depends on
    // another but for the learning of a timestamp, which writes the value before it says that it is known.
    let pair = unsafe { &mut *pair };
    let (half, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    found.seen = seen(context, segment);
    found.is_accepted = half.accepts(reverse, flow, &found.seen);
    if is_new_connection {
        // Where the pair is over, the local stack accepts it. Else the agent asks the other end, whose answer the client
        // resets (RFC 9293, 3.5.1).
        if flow.state == STATE_SPLICED && flow.is_over(half, reverse) {
            release(segment, flow);
            return None;
        }
        half.note(reverse, flow, &found.seen, found.is_accepted);
        return Some(Outcome::drop(Verdict::Held));
    }
    if segment.is_first_fragment
        && let Err(verdict) = fragment::announce(context, segment)
    {
        return Some(Outcome::drop(verdict));
    }
    if flow.state == STATE_TAIL {
        tail::send_clone(context);
    }
    if icmp::is_too_big(context, segment, flow) {
        return Some(Outcome { action: icmp::refuse(context, segment, flow), verdict: Verdict::TooBig });
    }
    Some(match rewrite(context, found, flow, half, reverse) {
        Ok(()) => {
            half.note(reverse, flow, &found.seen, found.is_accepted);
            leave(flow)
        }
        Err(verdict) => Outcome::drop(verdict),
    })
}

/// Whether the stack would take the packet from this interface. What it does not look into (IPv6), or not strictly, may come
/// by any.
#[inline(always)]
pub(crate) fn is_expected(context: &TcContext, version: IpVersion, flow: &Flow) -> bool {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose field may be read.
    let interface = unsafe { (*context.skb.skb).ifindex };
    interface == flow.arrival
        || matches!(version, IpVersion::V6)
        || LOOSE_INTERFACES.get_ptr(interface).is_some()
}

/// Sends what has been translated on its way.
#[inline(always)]
pub(crate) fn leave(flow: &Flow) -> Outcome {
    if flow.flags & FLOW_BY_STACK != 0 {
        return Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::LeftToStack };
    }
    Outcome { action: redirect_to_neighbour(flow), verdict: Verdict::Redirected }
}

/// Hands the packet to the neighbour that packets of `flow` go to. Returns what the program is to return.
#[inline(always)]
pub(crate) fn redirect_to_neighbour(flow: &Flow) -> i32 {
    // SAFETY: `NextHop` is laid out as the helper's parameters, which it copies.
    let action = unsafe {
        let next_hop = (&raw const flow.next_hop).cast_mut().cast();
        bpf_redirect_neigh(flow.interface, next_hop, size_of::<NextHop>() as i32, 0)
    };
    action as i32
}

/// Has nobody take both directions of a pair that is over for flows any more; the agent removes them.
#[inline(never)]
fn release(segment: &Segment, flow: &Flow) -> u32 {
    for key in [flow.out.reversed(), segment.tuple] {
        let Some(other) = FLOWS.get_ptr_mut(key) else { continue };
        // SAFETY: as in `redirect`; others read the word as it was or as it is.
        unsafe {
            if (*other).pair == flow.pair {
                (*other).state = STATE_OVER;
            }
        }
    }
    0
}

/// What is noted of the packet.
#[inline(always)]
fn seen(context: &TcContext, segment: &Segment) -> Seen {
    Seen {
        sequence: segment.sequence,
        acknowledgement: segment.acknowledgement,
        payload: payload_length(context, segment),
        window: segment.window,
        // The end of a segment is noted with its last fragment, which tells where it is.
        flags: if segment.is_first_fragment { segment.flags & !FLAG_FIN } else { segment.flags },
        time: coarse_time(),
    }
}

/// `CLOCK_MONOTONIC` in nanoseconds as it stood at the first packet of this tick of the kernel's timer: to read the clock
/// costs more than to look at the tick, which the kernel inlines.
#[inline(always)]
pub(crate) fn coarse_time() -> u64 {
    // SAFETY: the helpers have no conditions.
    let (tick, now) = (unsafe { bpf_jiffies64() }, || unsafe { bpf_ktime_get_ns() });
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return now() };
    // SAFETY: the pointer is to this CPU's value, which no other program uses meanwhile.
    let clock = unsafe { &mut *clock };
    if clock.tick != tick {
        clock.tick = tick;
        clock.time = now();
    }
    clock.time
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
