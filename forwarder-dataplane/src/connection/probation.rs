//! Whether the two ends of a joined pair hear each other by the paths that their packets take now.

use std::time::{Duration, Instant};

use forwarder_common::flow::{DirectionState, Flow, Pair};
use forwarder_common::translate::is_before;

use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::net::egress_path::EgressPath;

/// How long what was redirected may remain without an answer before it is taken for lost: longer than the first retransmission takes.
/// A sender that has not heard the answers sends nothing new after that.
const PROBATION: Duration = Duration::from_millis(1_500);
/// How often a sender has to repeat what has been acknowledged, and for how long, before the acknowledgements are taken for lost:
/// some are lost on any path, and a path may become slower by seconds (RFC 6298, 5.5: each repetition waits twice as long).
const UNHEARD_REPEATS: u32 = 5;
const UNHEARD: Duration = Duration::from_millis(4_500);

/// What is known of the ends of a joined pair before it is known whether they hear each other.
#[derive(Debug)]
pub(super) struct Probation {
    /// By direction: how many bytes the local socket that receives from its sender may have let that send beyond what it has
    /// passed on.
    room: [u32; 2],
    /// How many bytes the ends had sent when the local sockets had nothing more to say.
    quiet: Option<[u64; 2]>,
    flowing: Option<Flowing>,
    /// By direction: how many packets had come from the other end when the last of them was seen, and when that was, or when
    /// something was first sent again after that.
    silent: [Option<(u64, Instant)>; 2],
    /// By direction: what its sender repeats though it was acknowledged.
    unheard: [Option<Unheard>; 2],
    /// How many bytes had been sent again when the present path was taken.
    repeated: [u64; 2],
}

/// Redirected data that was acknowledged only by redirected packets, which its sender may not have got.
#[derive(Clone, Copy, Debug)]
struct Flowing {
    /// How many bytes the ends had sent.
    sent: [u64; 2],
    /// How far each may send without having got those packets, in the numbers of the other's leg.
    limits: [u32; 2],
    since: Instant,
}

/// The repetitions of a sender that sends nothing new, and all of whose bytes were acknowledged.
#[derive(Clone, Copy, Debug)]
struct Unheard {
    sent: u32,
    repeated: u64,
    repeats: u32,
    since: Instant,
}

/// Whether the two ends of a pair hear each other.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Heard {
    /// They do.
    Both,
    /// That is not known yet.
    Waiting,
    /// Nothing that was sent on has arrived; how it left.
    Blackholed(EgressPath),
    /// Nothing of one direction has arrived, data or acknowledgements, but something of the other has, so that the sockets do
    /// not know all; how the former left.
    OneWay(EgressPath),
}

impl Probation {
    /// Of a pair whose local sockets have nothing to say any more, and have let the ends send at most so many bytes beyond what they
    /// have passed on: the client, and the endpoint.
    pub(super) fn new(room: [u32; 2]) -> Self {
        let (silent, unheard) = ([None; 2], [None; 2]);
        Self { room, quiet: None, flowing: None, silent, unheard, repeated: [0; 2] }
    }

    /// Anew, of a pair that takes another path from now on.
    pub(super) fn restart(&mut self, state: &Pair) {
        *self = Self { repeated: [state.request.repeated, state.response.repeated], ..Self::new(self.room) };
    }

    /// What `state` says at `now`; the local sockets have passed on `relayed` bytes of each direction.
    pub(super) fn evaluate(
        &mut self,
        pair: &JoinedPair,
        state: &Pair,
        relayed: [u64; 2],
        now: Instant,
    ) -> Heard {
        let directions = directions(pair, state);
        let progress = progress(pair, state, relayed);
        let is_heard = progress.iter().any(|direction| direction.is_heard);
        if is_heard && progress.iter().all(|direction| direction.is_heard || !direction.is_used) {
            // Acknowledgements of the direction that is heard have to arrive too. What arrives the other way shows it, or else that
            // their receiver goes on.
            if progress.iter().all(|direction| direction.is_heard)
                || self.goes_on(pair, state, progress, relayed, now)
            {
                return Heard::Both;
            }
        }
        let verdict = if is_heard { Heard::OneWay } else { Heard::Blackholed };
        for (number, (forward, other, flow)) in directions.into_iter().enumerate() {
            // Sent more than once, and no answer of any kind since. What has acknowledged the remainder before is no answer.
            let is_repeated = forward.repeated > self.repeated[number];
            let silent = &mut self.silent[number];
            let since = match *silent {
                Some((packets, since)) if packets == other.packets && is_repeated => since,
                _ => silent.insert((other.packets, now)).1,
            };
            let end = forward.sequence_end.wrapping_add(flow.sequence_shift);
            let is_acknowledged = !is_before(other.acknowledged, end);
            if !is_acknowledged && now.duration_since(since) >= PROBATION {
                return verdict(EgressPath::of(flow));
            }
            let back = directions[1 - number].2;
            if !is_acknowledged {
                self.unheard[number] = None;
            } else if Unheard::lasts(&mut self.unheard[number], forward, now) {
                return verdict(EgressPath::of(back));
            }
        }
        Heard::Waiting
    }

    /// Whether a sender sends what it would not if it did not get the acknowledgements that are redirected to it: more than a window,
    /// or something new for longer than it waits for an acknowledgement.
    fn goes_on(
        &mut self,
        pair: &JoinedPair,
        state: &Pair,
        progress: [DirectionProgress; 2],
        relayed: [u64; 2],
        now: Instant,
    ) -> bool {
        // An end of a direction is sent whatever was heard.
        let bytes = [state.request.bytes, state.response.bytes];
        let sent = [0, 1].map(|number: usize| if progress[number].is_heard { bytes[number] } else { 0 });
        let directions = directions(pair, state);
        let Some(flowing) = self.flowing else {
            // What was sent before the sockets fell silent, they may have acknowledged.
            let quiet = *self.quiet.get_or_insert(sent);
            if quiet != sent {
                let limit = |number: usize| {
                    let (_, other, _) = directions[number];
                    let by_socket =
                        local_end(directions[number], relayed[number]).wrapping_add(self.room[number]);
                    if is_before(by_socket, other.edge) { other.edge } else { by_socket }
                };
                self.flowing = Some(Flowing { sent, limits: [limit(0), limit(1)], since: now });
            }
            return false;
        };
        let is_beyond = directions.iter().zip(flowing.limits).any(|(direction, limit)| {
            // Some probe a closed window with one byte beyond it.
            is_before(limit.wrapping_add(1), data_end(*direction))
        });
        let is_late = now.duration_since(flowing.since) >= PROBATION;
        if is_beyond || is_late && flowing.sent != sent {
            return true;
        }
        if !is_late {
            // Only what is new after that counts.
            self.flowing = Some(Flowing { sent, ..flowing });
        }
        false
    }
}

impl Unheard {
    /// Notes what a sender has sent by now; whether it has repeated what was acknowledged for too long.
    fn lasts(known: &mut Option<Self>, forward: &DirectionState, now: Instant) -> bool {
        let (sent, repeated) = (forward.sequence_end, forward.repeated);
        let Some(unheard) = known.as_mut().filter(|unheard| unheard.sent == sent) else {
            *known = Some(Self { sent, repeated, repeats: 0, since: now });
            return false;
        };
        // One byte may be a keepalive probe, which says nothing of what its sender has heard.
        if repeated.saturating_sub(unheard.repeated) > 1 {
            if unheard.repeats == 0 {
                unheard.since = now;
            }
            unheard.repeats += 1;
        }
        unheard.repeated = repeated;
        unheard.repeats >= UNHEARD_REPEATS && now.duration_since(unheard.since) >= UNHEARD
    }
}

/// Whether an end has acknowledged what was redirected to it: then the local sockets do not know all.
pub(super) fn is_heard(pair: &JoinedPair, state: &Pair, relayed: [u64; 2]) -> bool {
    progress(pair, state, relayed).iter().any(|direction| direction.is_heard)
}

/// Both directions, from the client first: what their sender has sent, what its peer has, and how its packets leave.
fn directions<'a>(
    pair: &'a JoinedPair,
    state: &'a Pair,
) -> [(&'a DirectionState, &'a DirectionState, &'a Flow); 2] {
    let [(_, request), (_, response)] = &pair.flows;
    let (client, endpoint) = (&state.request, &state.response);
    [(client, endpoint, request), (endpoint, client, response)]
}

fn progress(pair: &JoinedPair, state: &Pair, [received, sent]: [u64; 2]) -> [DirectionProgress; 2] {
    let [request, response] = directions(pair, state);
    [DirectionProgress::of(request, received), DirectionProgress::of(response, sent)]
}

/// What is known of one direction of a pair on probation.
#[derive(Clone, Copy, Debug)]
struct DirectionProgress {
    /// Something of it was redirected.
    is_used: bool,
    /// Something of that was acknowledged.
    is_heard: bool,
}

impl DirectionProgress {
    /// Of a direction of whose bytes the local sockets have passed on `relayed`.
    fn of(direction: (&DirectionState, &DirectionState, &Flow), relayed: u64) -> Self {
        let (local_end, (_, other, _)) = (local_end(direction, relayed), direction);
        Self {
            is_used: is_before(local_end, data_end(direction)),
            is_heard: is_before(local_end, other.acknowledged),
        }
    }
}

/// The number after the last byte of a direction, without its end, on the leg that it is sent on.
fn data_end((forward, _, flow): (&DirectionState, &DirectionState, &Flow)) -> u32 {
    let end = u32::from(forward.fin_end() == Some(forward.sequence_end));
    forward.sequence_end.wrapping_sub(end).wrapping_add(flow.sequence_shift)
}

/// The same of what the local sockets have sent of it.
fn local_end(direction: (&DirectionState, &DirectionState, &Flow), relayed: u64) -> u32 {
    let beyond = direction.0.bytes.wrapping_sub(relayed);
    #[expect(clippy::cast_possible_truncation, reason = "modulo 2^32")]
    let beyond = beyond as u32;
    data_end(direction).wrapping_sub(beyond)
}

#[cfg(test)]
mod tests;
