//! What becomes of a packet: what a program returns to the kernel, and why.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_redirect_neigh;
use forwarder_common::flow::{FLOW_BY_STACK, Flow, NextHop};
use forwarder_common::verdict::Verdict;

use crate::maps::VERDICTS;

/// What becomes of a packet.
pub(crate) struct Outcome {
    /// What the program returns.
    pub(crate) action: i32,
    /// Why.
    pub(crate) verdict: Verdict,
}

impl Outcome {
    /// The packet goes on as it is: the next program decides, and then the stack.
    #[inline(always)]
    pub(crate) fn pass(verdict: Verdict) -> Self {
        Self { action: TC_ACT_UNSPEC, verdict }
    }

    /// The packet is dropped.
    #[inline(always)]
    pub(crate) fn drop(verdict: Verdict) -> Self {
        Self { action: TC_ACT_SHOT, verdict }
    }

    /// What a function has decided that returns what the program is to return: 0 where it has not, [`TC_ACT_SHOT`] where it could not rewrite the packet, whose
    /// sender repeats it.
    #[inline(always)]
    pub(crate) fn decided(action: u32, verdict: Verdict) -> Option<Self> {
        match action as i32 {
            0 => None,
            TC_ACT_SHOT => Some(Self::drop(Verdict::Unwritable)),
            action => Some(Self { action, verdict }),
        }
    }
}

/// Sends what has been translated on its way.
#[inline(always)]
pub(crate) fn transmit(flow: &Flow) -> Outcome {
    if flow.flags & FLOW_BY_STACK != 0 {
        return Outcome::pass(Verdict::LeftToStack);
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

/// Counts a verdict.
#[inline(always)]
pub(crate) fn count_verdict(verdict: Verdict) {
    if let Some(count) = VERDICTS.get_ptr_mut(verdict.index()) {
        // SAFETY: the pointer is to this CPU's value, which no program interrupts here, and lives while the map does.
        unsafe { *count += 1 };
    }
}
