//! How the ends of a pair that the agent ends are told.

use std::thread;
use std::time::{Duration, Instant};

use super::segments::{self, Said};
use super::sweep::quiet;
use super::{PERIOD, Pairs};
use crate::counters::End;
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::joined_pair::{JoinedPair, PairKey};
use forwarder_runtime::lock::lock;

/// When what ends a pair is sent again: it may be lost, and an end with nothing to say tells nobody.
pub(super) const RESET_AGAIN: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(1)];
/// For how long after that, and after the last packet of either end, who still sends is reset; and at most.
const RESET_LINGER: Duration = Duration::from_secs(1);
const LONGEST_RESET: Duration = Duration::from_secs(8);
/// How long an agent that leaves nothing behind waits for the ends to ask for the right number.
const LAST_RESETS: Duration = Duration::from_millis(200);

/// A pair that was ended, until both ends know.
pub(super) struct PendingReset {
    pair: JoinedPair,
    since: Instant,
    due: Instant,
    /// How often it was sent.
    sent: usize,
    segments: [Said; 4],
}

impl Pairs {
    /// Ends a pair from outside: its packets are nobody's from now on, and both ends are told.
    ///
    /// Whoever sends something of it is reset by the program, with the number that it acknowledges. An end that is silent is
    /// made to send: by a number that it has acknowledged before (RFC 9293, 3.10.7.4), and by a reset, which it answers with
    /// the right number if that of the reset is wrong (RFC 5961, 3.2).
    pub fn reset(&self, key: &PairKey) {
        let Some(pair) = self.flows.find(key) else { return self.flows.forget(key) };
        self.reset_joined(&pair);
    }

    /// The same of a pair as it stands in the maps.
    pub(crate) fn reset_joined(&self, pair: &JoinedPair) {
        if let Err(error) = self.flows.end(pair) {
            tracing::debug!(%error, "cannot mark an offloaded connection as ended: its peers learn it from their own next segments");
            return self.flows.remove(pair);
        }
        let Some(state) = self.flows.pair(pair.number) else { return self.flows.remove(pair) };
        let segments = segments::last_words(pair, &state, monotonic());
        let now = Instant::now();
        let reset = PendingReset { pair: *pair, since: now, due: now, sent: 0, segments };
        if let Some(reset) = self.send_reset(reset) {
            lock(&self.resets).push(reset);
        }
    }

    /// The same of a pair whose packets are the local stack's already, and which has no sockets any more: it is the stack that resets
    /// whoever sends something of it.
    pub fn reset_released(&self, pair: &JoinedPair) {
        if let Some(state) = self.flows.pair(pair.number) {
            self.send(&segments::last_words(pair, &state, monotonic()));
        }
        self.flows.remove(pair);
    }

    /// Tells both ends, or waits until they are quiet, unless the pair's addresses are another connection's by now; says what is
    /// left to do.
    fn send_reset(&self, mut reset: PendingReset) -> Option<PendingReset> {
        let has_been_told = reset.sent > RESET_AGAIN.len();
        if !self.flows.holds(&reset.pair) || has_been_told && !self.is_heard(&reset) {
            self.flows.remove(&reset.pair);
            return None;
        }
        if has_been_told {
            reset.due += PERIOD;
        } else {
            self.send(&reset.segments);
            reset.due += RESET_AGAIN.get(reset.sent).copied().unwrap_or(RESET_LINGER);
            reset.sent += 1;
        }
        Some(reset)
    }

    /// Whether an end of a pair that was ended still sends.
    fn is_heard(&self, reset: &PendingReset) -> bool {
        let Some(state) = self.flows.pair(reset.pair.number) else { return false };
        quiet(&state, monotonic()) < RESET_LINGER && reset.since.elapsed() < LONGEST_RESET
    }

    /// Ends every pair, for an agent that leaves nothing behind.
    pub fn reset_all(&self) {
        self.discover();
        self.retain(|entry, state, _| {
            self.reset_entry(entry, state, End::Drained);
            false
        });
        let resets = std::mem::take(&mut *lock(&self.resets));
        if !resets.is_empty() {
            // Who looks after the pairs has ended, and so will the programs.
            thread::sleep(LAST_RESETS);
        }
        for reset in resets {
            self.flows.remove(&reset.pair);
        }
    }

    /// Tells those that may not know yet.
    pub(super) fn send_resets_again(&self) {
        let resets = std::mem::take(&mut *lock(&self.resets));
        let now = Instant::now();
        let left: Vec<_> = resets
            .into_iter()
            .filter_map(|reset| if now < reset.due { Some(reset) } else { self.send_reset(reset) })
            .collect();
        lock(&self.resets).extend(left);
    }
}
