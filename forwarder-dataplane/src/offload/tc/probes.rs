//! What the agent asks the ends of pairs for a stranger's sake: bounded for each pair and in all, as the kernel bounds its
//! own answers (`tcp_invalid_ratelimit`, `tcp_challenge_ack_limit`).

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use forwarder_common::flow::{DirectionState, Pair, SENDER_CHALLENGE, SENDER_SYN};

use super::{Pairs, segments};
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_runtime::lock::lock;

/// How long after a question to an end of a pair the next may follow.
const PAIR_PAUSE: Duration = Duration::from_millis(500);
/// How many questions there may be in each [`PERIOD`].
const LIMIT: u32 = 1_000;
const PERIOD: Duration = Duration::from_secs(1);

/// What bounds the questions of all pairs.
#[derive(Debug, Default)]
pub(super) struct Limit {
    budget: Mutex<Budget>,
    /// How often it did not allow one.
    suppressed: AtomicU64,
}

impl Pairs {
    /// Asks an end of a pair what is true of what somebody claims.
    pub(crate) fn ask(&self, pair: &JoinedPair, asked: &mut Asked, state: &Pair) {
        let now = Instant::now();
        let Some(question) = asked.due(state, now) else { return };
        if !lock(&self.questions.budget).take(now) {
            self.questions.suppressed.fetch_add(1, Ordering::Relaxed);
            return;
        }
        asked.note(question, now);
        self.send(&[segments::probe(pair, state, question.side, monotonic())]);
    }

    /// How often a question to an end of a pair was put off, because there were too many.
    pub fn suppressed_probes(&self) -> u64 {
        self.questions.suppressed.load(Ordering::Relaxed)
    }
}

/// How many questions may still be asked.
#[derive(Debug, Default)]
struct Budget {
    since: Option<Instant>,
    spent: u32,
}

impl Budget {
    /// Whether one more may be asked at `now`; it counts then.
    fn take(&mut self, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.duration_since(since) >= PERIOD) {
            (self.since, self.spent) = (Some(now), 0);
        }
        let may = self.spent < LIMIT;
        self.spent += u32::from(may);
        may
    }
}

/// What was asked for a pair.
#[derive(Debug, Default)]
pub(crate) struct Asked {
    /// How many packets of each direction had come, at the last question that they gave rise to.
    packets: [Option<u64>; 2],
    last: Option<Instant>,
}

/// An end to ask, and the direction of the packet that gives rise to it: 0 is that of the client, 1 that of the endpoint.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Question {
    side: usize,
    direction: usize,
    packets: u64,
}

impl Asked {
    /// What is to be asked at `now`. Each packet is asked about once at most.
    fn due(&self, state: &Pair, now: Instant) -> Option<Question> {
        if self.last.is_some_and(|last| now.duration_since(last) < PAIR_PAUSE) {
            return None;
        }
        [&state.request, &state.response].into_iter().enumerate().find_map(|(direction, seen)| {
            let side = side(seen, direction)?;
            let is_new = self.packets[direction] != Some(seen.packets);
            is_new.then_some(Question { side, direction, packets: seen.packets })
        })
    }

    /// Notes that it is asked.
    fn note(&mut self, question: Question, now: Instant) {
        self.packets[question.direction] = Some(question.packets);
        self.last = Some(now);
    }
}

/// Whether somebody claims something that an end is to be asked about.
pub(super) const fn is_claimed(state: &Pair) -> bool {
    (state.request.flags | state.response.flags) & (SENDER_SYN | SENDER_CHALLENGE) != 0
}

/// Which end is to be asked for what came in a direction, if any: the other one about a new connection, since its answer tells
/// who has forgotten the old one to reset it (RFC 9293, 3.5.1); the sender itself about a reset, since it answers with the exact
/// one if that was its own.
const fn side(seen: &DirectionState, direction: usize) -> Option<usize> {
    if seen.flags & SENDER_SYN != 0 {
        Some(1 - direction)
    } else if seen.flags & SENDER_CHALLENGE != 0 {
        Some(direction)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(flags: u8, packets: u64) -> Pair {
        Pair { request: DirectionState { flags, packets, ..DirectionState::default() }, ..Pair::default() }
    }

    #[test]
    fn each_packet_is_asked_about_once_and_a_pair_no_more_than_twice_a_second() {
        let start = Instant::now();
        let mut asked = Asked::default();
        assert_eq!(asked.due(&state(0, 5), start), None);
        let question = asked.due(&state(SENDER_SYN, 5), start).unwrap();
        assert_eq!(question.side, 1);
        asked.note(question, start);
        assert_eq!(asked.due(&state(SENDER_SYN, 5), start + PAIR_PAUSE * 100), None);
        assert_eq!(asked.due(&state(SENDER_SYN, 6), start + PAIR_PAUSE / 2), None);
        assert!(asked.due(&state(SENDER_SYN, 6), start + PAIR_PAUSE).is_some());
    }

    #[test]
    fn the_sender_of_a_reset_is_asked_and_the_other_end_about_a_new_connection() {
        let now = Instant::now();
        let side = |state: Pair| Asked::default().due(&state, now).unwrap().side;
        assert_eq!(side(state(SENDER_CHALLENGE, 1)), 0);
        assert_eq!(side(state(SENDER_SYN, 1)), 1);
        let response = |flags| Pair { response: state(flags, 1).request, ..Pair::default() };
        assert_eq!(side(response(SENDER_CHALLENGE)), 1);
        assert_eq!(side(response(SENDER_SYN)), 0);
    }

    #[test]
    fn all_pairs_together_ask_no_more_than_the_limit() {
        let start = Instant::now();
        let mut budget = Budget::default();
        let granted = (0..LIMIT * 2).filter(|_| budget.take(start)).count();
        assert_eq!(u32::try_from(granted), Ok(LIMIT));
        assert!(!budget.take(start + PERIOD / 2));
        assert!(budget.take(start + PERIOD));
    }
}
