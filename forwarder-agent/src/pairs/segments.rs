//! What the agent says to the ends of a pair, with the numbers that they expect.

use forwarder_common::flow::{FLOW_TIMESTAMPS, Flow, Half, Pair};
use forwarder_common::translate::{self, Timestamps};

use crate::datapath::flows::JoinedPair;
use crate::datapath::segments::{Bare, BareKind};

/// The resets that end a pair: to the client, and to the endpoint.
pub(super) fn resets(pair: &JoinedPair, state: &Pair, now: u64) -> [Bare; 2] {
    [0, 1].map(|side| {
        let (own, _, _) = halves(pair, state, side);
        bare(pair, state, side, now, BareKind::Reset, own.acknowledged)
    })
}

/// A keepalive probe to the client (side 0) or the endpoint (side 1): a number that it has acknowledged, which it answers.
pub(super) fn probe(pair: &JoinedPair, state: &Pair, side: usize, now: u64) -> Bare {
    let (own, _, _) = halves(pair, state, side);
    bare(pair, state, side, now, BareKind::Probe, own.acknowledged.wrapping_sub(1))
}

/// What comes from one side, what comes from the other, and the flow of what goes to that side.
fn halves<'a>(pair: &'a JoinedPair, state: &'a Pair, side: usize) -> (&'a Half, &'a Half, &'a Flow) {
    let [(_, request), (_, response)] = &pair.flows;
    if side == 0 {
        (&state.request, &state.response, response)
    } else {
        (&state.response, &state.request, request)
    }
}

fn bare(pair: &JoinedPair, state: &Pair, side: usize, now: u64, kind: BareKind, sequence: u32) -> Bare {
    let (own, other, towards) = halves(pair, state, side);
    let (to, from) = if side == 0 { pair.downstream() } else { pair.upstream() };
    // What the other end has acknowledged, in the numbers of this one.
    let acknowledgement = other.acknowledged.wrapping_add(towards.acknowledgement_shift);
    let has_timestamps = towards.flags & FLOW_TIMESTAMPS != 0;
    Bare {
        from,
        to,
        sequence,
        acknowledgement: match kind {
            BareKind::Reset => own.sequence_end,
            BareKind::Probe => acknowledgement,
        },
        window: translate::window(other.window, towards.source_scale, towards.target_scale),
        timestamps: has_timestamps.then(|| Timestamps {
            value: translate::clock_at(towards.clock, towards.clock_time, now),
            echo: 0,
        }),
        kind,
    }
}
