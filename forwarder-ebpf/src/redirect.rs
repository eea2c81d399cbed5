//! Sends the packets of a pair's one leg on as packets of the other leg.
//!
//! See [`forwarder_common::flow`] for what stands in the maps, and [`crate::rewrite`] for what changes in a packet.

use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    DIRECTION_REQUEST, Flow, STATE_HANDOVER, STATE_OFFLOADED, STATE_OVER, STATE_RESET,
};
use forwarder_common::packet::Segment;
use forwarder_common::verdict::Verdict;

use crate::arrival::is_expected;
use crate::flow::{self, Found};
use crate::frame::seen;
use crate::maps::{FLOWS, Frame, PAIRS};
use crate::outcome::{Outcome, transmit};
use crate::rewrite::rewrite;
use crate::skb::SocketBuffer;
use crate::{direct, fragment, handover, icmp, reset};

/// Translates and redirects the packet if it is one of a flow. `None` for every other packet, which is unchanged.
#[inline(always)]
pub(crate) fn redirect(context: &TcContext, frame: &mut Frame) -> Option<Outcome> {
    // First, where there may be some: the other map is the larger one, and to find nothing there costs as much as to find something.
    if flow::has_direct()
        && let Some((flow, slot)) = flow::find_direct(&frame.segment.tuple)
    {
        return direct::redirect(context, frame, flow, slot);
    }
    let segment = &frame.segment;
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
    if handover::is_clone(context) {
        return Some(handover::acknowledge(context, segment));
    }
    if flow.state == STATE_OVER {
        if segment.is_first_fragment {
            fragment::forget(context, segment);
        }
        return None;
    }
    if !is_expected(context, segment.version, flow) {
        return Some(Outcome::pass(Verdict::OtherInterface));
    }
    let is_new_connection = segment.is_attempt();
    if flow.state == STATE_RESET {
        if is_new_connection {
            release(segment, flow);
            return None;
        }
        return Some(reset::answer(context, segment, &Found::offloaded(flow)));
    }
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else {
        // The agent is just about to insert it: the connection is the local socket's still, a SYN on its tuple included.
        return Some(Outcome::pass(Verdict::PairMissing));
    };
    // SAFETY: as above. Other CPUs may write to it at the same time: each field is of one word, and none depends on
    // another but for the learning of a timestamp, which writes the value before it says that it is known.
    let pair = unsafe { &mut *pair };
    let (forward, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    frame.seen = seen(context, segment);
    frame.is_accepted = forward.accepts(reverse, flow, &frame.seen);
    if is_new_connection {
        // Where the pair is over, the local stack accepts it. Else the agent asks the other end, whose answer the client
        // resets (RFC 9293, 3.5.1).
        if flow.state == STATE_OFFLOADED && flow.is_over(forward, reverse) {
            release(segment, flow);
            return None;
        }
        forward.note(reverse, flow, &frame.seen, frame.is_accepted);
        return Some(Outcome::drop(Verdict::Held));
    }
    if segment.is_first_fragment
        && let Err(verdict) = fragment::announce(context, segment)
    {
        return Some(Outcome::drop(verdict));
    }
    // What the receiver would not take tells the local socket nothing: it would be made believe that all has arrived.
    if flow.state == STATE_HANDOVER && frame.is_accepted {
        handover::send_clone(context);
    }
    if icmp::is_too_big(context, segment, flow) {
        return Some(icmp::answer_too_big(context, segment, flow));
    }
    Some(match rewrite(SocketBuffer(context), frame, flow, forward, reverse) {
        Ok(()) => {
            forward.note(reverse, flow, &frame.seen, frame.is_accepted);
            transmit(flow)
        }
        Err(verdict) => Outcome::drop(verdict),
    })
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
