//! How the ends of a pair that the agent has ended hear of it: whoever still sends is answered with a reset.
//!
//! The agent does not always know the number that an end expects, and an end takes no other reset (RFC 5961, 3). What the end
//! itself sends tells it. The local stack would answer in the same way, since it has no socket, but never sees the packet
//! where a firewall drops what connection tracking takes for invalid: that has seen nothing of what was redirected.

use aya_ebpf::helpers::generated::bpf_redirect;
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{DIRECTION_REQUEST, FLOW_BY_STACK, Flow};
use forwarder_common::packet::{FLAG_ACK, FLAG_RST, Segment};
use forwarder_common::verdict::Verdict;

use crate::arrival;
use crate::clock::coarse_time;
use crate::compose::{Composed, compose};
use crate::flow::{self, Found};
use crate::outcome::{Outcome, redirect_to_neighbour};

/// What becomes of a packet of a pair that the agent has ended, unless it opens a new connection.
#[inline(never)]
pub(crate) fn answer(context: &TcContext, segment: &Segment, found: &Found) -> Outcome {
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let flow = unsafe { &*found.flow };
    note(found);
    // A reset is never answered, and what acknowledges nothing tells no number (RFC 9293, 3.10.7.1).
    if segment.flags & (FLAG_ACK | FLAG_RST) != FLAG_ACK {
        return Outcome::pass(Verdict::PairMissing);
    }
    let Some(back) = flow::find(&flow.out.reversed()) else {
        return Outcome::pass(Verdict::PairMissing);
    };
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let back = unsafe { &*back.flow };
    // What the stack would take off what it sends on, it does not see.
    let hop_limit = back.hop_limit.saturating_sub((back.flags & FLOW_BY_STACK != 0) as u8);
    if compose(context, segment, &Composed::reset(segment, &back.out, hop_limit)) {
        Outcome { action: send_back(context, back), verdict: Verdict::ResetAnswered }
    } else {
        Outcome::drop(Verdict::Unwritable)
    }
}

/// Notes that an end has not been quiet: the agent keeps the pair for as long.
#[inline(always)]
fn note(found: &Found) {
    let Some(pair) = found.pair() else { return };
    // SAFETY: as for flows. Other CPUs may write the same word at the same time.
    let pair = unsafe { &mut *pair };
    // SAFETY: as above.
    let direction = unsafe { (*found.flow).direction };
    let forward = if direction == DIRECTION_REQUEST { &mut pair.request } else { &mut pair.response };
    forward.last_seen = coarse_time();
}

/// Sends the packet to its sender, whom `back` leads to: never by the stack, whose connection tracking takes it for
/// invalid.
#[inline(always)]
fn send_back(context: &TcContext, back: &Flow) -> i32 {
    let arrival = arrival::interface(context);
    if back.interface != arrival {
        return redirect_to_neighbour(back);
    }
    // SAFETY: the helper has no conditions.
    let action = unsafe { bpf_redirect(arrival, 0) };
    action as i32
}
