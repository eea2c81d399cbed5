//! An endpoint that still has an earlier connection of the same tuple, as a rule in TIME-WAIT because it ended first.
//!
//! It acknowledges the SYN with the numbers of that connection, if the SYN's sequence number or timestamp is older (RFC 6191, 2). Clients differ in both, and
//! share the local ports. A client of its own would reset that connection, and send its SYN again (RFC 9293, 3.5.1): the kernel's after two ticks
//! (`tcp_rcv_synsent_state_process`), and after a second if it has done so before. The program does both at once.

use aya_ebpf::bindings::TC_ACT_SHOT;
use aya_ebpf::helpers::generated::bpf_clone_redirect;
use aya_ebpf::programs::TcContext;
use forwarder_common::direct::{DirectSlot, HANDSHAKE_ASKED};
use forwarder_common::flow::{DIRECTION_RESPONSE, Flow, STATE_OFFLOADED};
use forwarder_common::packet::{FLAG_ACK, FLAG_RST, FLAG_SYN, Segment};
use forwarder_common::verdict::Verdict;

use super::handshake::{answers, answers_former};
use super::retry::attempt;
use crate::arrival;
use crate::compose::{Composed, compose};
use crate::flow::slot_of;
use crate::outcome::Outcome;

/// How often that is done at most for one SYN of the client: an endpoint that the reset does not reach would be asked for ever.
const MOST_RESETS: u8 = 2;

/// Resets the sender of `segment`, a packet of `flow`, and asks it again, if it has an earlier connection: the segment becomes the client's SYN. `None` where it
/// has none, or the client is to do that itself.
#[inline(always)]
pub(super) fn reset(context: &TcContext, segment: &Segment, flow: &Flow) -> Option<Outcome> {
    if flow.direction != DIRECTION_RESPONSE || segment.flags & (FLAG_SYN | FLAG_ACK | FLAG_RST) != FLAG_ACK {
        return None;
    }
    Outcome::decided(ask_again(context, segment, flow), Verdict::DirectStale)
}

/// The same, for [`Outcome::decided`].
#[inline(never)]
fn ask_again(context: &TcContext, segment: &Segment, flow: &Flow) -> u32 {
    let Some(slot) = slot_of(flow) else { return 0 };
    // SAFETY: the element of an array lives as long as the map; others write its words at the same time.
    let slot = unsafe { &mut *slot };
    if slot.handshake != HANDSHAKE_ASKED
        || slot.resets >= MOST_RESETS
        || answers(segment, slot)
        || answers_former(segment, slot)
    {
        return 0;
    }
    let DirectSlot { flows: [request, _], resets, .. } = slot;
    // The copy goes to the neighbour that the segment has come from.
    if request.state != STATE_OFFLOADED || request.interface != arrival::interface(context) {
        return 0;
    }
    *resets += 1;
    if !compose(context, segment, &Composed::reset(segment, &request.out, request.hop_limit)) {
        return TC_ACT_SHOT as u32;
    }
    // SAFETY: the context is the program's own. A copy that cannot be made is like one that was lost: the endpoint answers as before.
    unsafe { bpf_clone_redirect(context.skb.skb, request.interface, 0) };
    attempt(context, segment, slot)
}
