//! The redirector: sends the packets of a promoted pair's one leg on as packets of the other leg.
//!
//! See [`forwarder_common::flow`] for what stands in the maps, and [`crate::rewrite`] for what changes in a packet.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns, bpf_redirect_neigh};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    DIRECTION_REQUEST, FLOW_BY_STACK, Flow, Half, NextHop, STATE_OVER, STATE_RESET, STATE_SPLICED,
    STATE_TAIL, Seen,
};
use forwarder_common::packet::Segment;
use forwarder_common::verdict::Verdict;

use crate::classify::Found;
use crate::maps::{CLOCK, FLOWS, PAIRS};
use crate::rewrite::rewrite;
use crate::{icmp, tail};

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
pub(crate) fn redirect(context: &TcContext, found: &Found) -> Option<Outcome> {
    let segment = &found.segment;
    #[expect(clippy::needless_borrows_for_generic_args, reason = "a copy would stand on the stack")]
    let flow = FLOWS.get_ptr(&segment.tuple)?;
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`. The agent may change words of it
    // meanwhile: see `update`.
    let flow = unsafe { &*flow };
    if tail::is_clone(context) {
        return Some(tail::acknowledge(context, segment));
    }
    if flow.state == STATE_OVER {
        return None;
    }
    let is_new_connection = segment.is_attempt();
    if flow.state == STATE_RESET {
        if is_new_connection {
            release(segment, flow);
            return None;
        }
        return Some(Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::PairMissing });
    }
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else {
        // One that the agent has ended: the stack resets who does not know yet.
        if is_new_connection {
            release(segment, flow);
            return None;
        }
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
    if is_new_connection {
        // Where the pair is over, the local stack accepts it. Else the agent asks the other end, whose answer the client
        // resets (RFC 9293, 3.5.1).
        if flow.state == STATE_SPLICED && flow.is_over(half, reverse) {
            release(segment, flow);
            return None;
        }
        note(context, segment, flow, half, reverse);
        return Some(Outcome::drop(Verdict::Held));
    }
    if flow.state == STATE_TAIL {
        tail::send_clone(context);
    }
    if icmp::is_too_big(context, segment, flow) {
        return Some(Outcome { action: icmp::refuse(context, segment, flow), verdict: Verdict::TooBig });
    }
    Some(match rewrite(context, found, flow, half, reverse) {
        Ok(()) => {
            note(context, segment, flow, half, reverse);
            leave(flow)
        }
        Err(verdict) => Outcome::drop(verdict),
    })
}

/// Sends what has been translated on its way.
#[inline(always)]
pub(crate) fn leave(flow: &Flow) -> Outcome {
    if flow.flags & FLOW_BY_STACK != 0 {
        return Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::LeftToStack };
    }
    // SAFETY: `NextHop` is laid out as the helper's parameters, which it copies.
    let action = unsafe {
        let next_hop = (&raw const flow.next_hop).cast_mut().cast();
        bpf_redirect_neigh(flow.interface, next_hop, size_of::<NextHop>() as i32, 0)
    };
    Outcome { action: action as i32, verdict: Verdict::Redirected }
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

/// Notes the packet in what is known of its direction.
#[inline(always)]
fn note(context: &TcContext, segment: &Segment, flow: &Flow, half: &mut Half, reverse: &Half) {
    let seen = Seen {
        sequence: segment.sequence,
        acknowledgement: segment.acknowledgement,
        payload: payload_length(context, segment),
        window: segment.window,
        flags: segment.flags,
        time: coarse_time(),
    };
    half.note(reverse, flow, &seen);
}

/// `CLOCK_MONOTONIC` in nanoseconds as it stood at the first packet of this tick of the kernel's timer: to read the clock
/// costs more than to look at the tick, which the kernel inlines.
#[inline(always)]
fn coarse_time() -> u64 {
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
