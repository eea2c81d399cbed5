//! What the agent says to the ends of a pair, with the numbers that they expect.

use forwarder_common::flow::{DirectionState, FLOW_TIMESTAMPS, Flow, Pair};
use forwarder_common::translate::{self, Timestamps};

use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::net::egress_path::EgressPath;
use forwarder_kernel::tcp::segments::{Bare, BareKind, SegmentError, SegmentSocket};

/// A segment, and how it leaves.
#[derive(Clone, Copy, Debug)]
pub(super) struct Said {
    bare: Bare,
    path: EgressPath,
}

impl Said {
    /// Sends it; does not wait.
    pub(super) fn send(&self, socket: &SegmentSocket) -> Result<(), SegmentError> {
        socket.send_by(&self.bare, self.path)
    }
}

/// What ends a pair: to the client, and to the endpoint. First a probe, since an end answers neither twice within half a
/// second (`tcp_oow_rate_limited`), and of the two only the probe is answered whatever its number.
pub(super) fn last_words(pair: &JoinedPair, state: &Pair, now: u64) -> [Said; 4] {
    let reset = |side| {
        let (own, _, _) = directions(pair, state, side);
        bare(pair, state, side, now, BareKind::Reset, own.acknowledged)
    };
    [probe(pair, state, 0, now), reset(0), probe(pair, state, 1, now), reset(1)]
}

/// A keepalive probe to the client (side 0) or the endpoint (side 1): a number that it has acknowledged, which it answers.
pub(super) fn probe(pair: &JoinedPair, state: &Pair, side: usize, now: u64) -> Said {
    let (own, _, _) = directions(pair, state, side);
    bare(pair, state, side, now, BareKind::Probe, own.acknowledged.wrapping_sub(1))
}

/// What comes from one side, what comes from the other, and the flow of what goes to that side.
fn directions<'a>(
    pair: &'a JoinedPair,
    state: &'a Pair,
    side: usize,
) -> (&'a DirectionState, &'a DirectionState, &'a Flow) {
    let [(_, request), (_, response)] = &pair.flows;
    if side == 0 {
        (&state.request, &state.response, response)
    } else {
        (&state.response, &state.request, request)
    }
}

fn bare(pair: &JoinedPair, state: &Pair, side: usize, now: u64, kind: BareKind, sequence: u32) -> Said {
    let (own, other, towards) = directions(pair, state, side);
    let (to, from) = if side == 0 { pair.downstream() } else { pair.upstream() };
    // What the other end has acknowledged, in the numbers of this one.
    let acknowledgement = other.acknowledged.wrapping_add(towards.acknowledgement_shift);
    let has_timestamps = towards.flags & FLOW_TIMESTAMPS != 0;
    let bare = Bare {
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
    };
    Said { bare, path: EgressPath::of(towards) }
}
