//! Looking at every offloaded pair, again and again: what the programs have seen of it, and what is to be done then.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use forwarder_common::flow::Pair;

use super::entry::{Entry, Place, Served, Stage};
use super::keepalive::Due;
use super::table::Places;
use super::{FindListener, ListenerLookup, Pairs, probes, reset_by_end, segments};
use crate::counters::{ConnectFailure, End};
use crate::relay::Tier;
use crate::removal::{self, RemovalWatch};
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::net::routes::KnownRoutes;
use forwarder_runtime::lock::lock;

/// How long after its last packet a pair of which both ends have ended is kept, for what is sent again.
const LINGER: Duration = Duration::from_secs(2);
/// How long nothing may be heard of a direct connection whose handshake is not done: longer than between the first SYNs of a client.
const HALF_OPEN: Duration = Duration::from_secs(20);
/// How long a reset is given to be followed by something else of the same sender: then it was a stranger's who knew the number.
const RESET_STANDS: Duration = Duration::from_millis(200);

/// What was found in one sweep of the listeners of a former agent's pairs, by the places of these.
type Found = HashMap<*const Place, Listener>;

/// The listener of a former agent's pairs.
enum Listener {
    /// It is bound; where its pairs are counted.
    Bound(Arc<Place>),
    /// As [`ListenerLookup`] says.
    Awaited,
    Gone,
}

/// What becomes of a pair that was looked at.
enum Fate {
    Stays,
    /// It is over and nothing more is to be expected.
    Leaves,
    /// The agent ends it.
    Reset(End),
}

impl Pairs {
    /// Does what does not wait for the next look at all pairs.
    pub(super) fn tick(&self) {
        self.hold(None);
        self.flows.paths().refresh_filters();
        self.send_resets_again();
    }

    /// Looks at some pairs that do not wait for the next look at all of them; yields those that still do not.
    pub(super) fn look_again(&self, urgent: &[u32]) -> Vec<u32> {
        let (mut still, now) = (Vec::new(), monotonic());
        let gone = lock(&self.table)
            .retain_of(urgent, &self.flows, |entry, state| self.keeps(entry, state, now, &mut still));
        self.count.fetch_sub(gone, Ordering::Relaxed);
        still
    }

    /// Looks at every pair once. Yields those that cannot wait for the next time, where that takes long.
    pub(super) fn sweep(&self, find: &FindListener) -> Vec<u32> {
        let reroutes =
            self.routes_changed.swap(false, Ordering::Relaxed) | self.flows.paths().take_changed_mtus();
        if reroutes {
            self.rerouted.store(monotonic(), Ordering::Relaxed);
        }
        let (mut found, mut urgent, now) = (Found::new(), Vec::new(), monotonic());
        let (mut half_open, mut direct) = (0, 0);
        self.discover();
        self.retain(|entry, state, places| {
            if entry.stage == Stage::Awaited
                && let Some(state) = state
            {
                self.inherit(entry, is_half_open(state), find, &mut found, places);
            }
            let stays = self.keeps(entry, state, now, &mut urgent);
            half_open += u32::from(stays && state.is_some_and(is_half_open));
            direct += usize::from(stays && entry.tier() == Tier::Direct);
            stays
        });
        self.flows.set_half_open(half_open);
        self.count_direct.store(direct, Ordering::Relaxed);
        if reroutes {
            // Those that have come since look for theirs by themselves.
            lock(&self.table).reroute_all();
        }
        urgent
    }

    /// Looks at a pair, and does what is to be done; whether it stays. If it is over, or somebody claims something of it, it is
    /// `urgent`.
    fn keeps(&self, entry: &mut Entry, state: Option<&Pair>, now: u64, urgent: &mut Vec<u32>) -> bool {
        match self.look(entry, state, now) {
            Fate::Stays => {
                if entry.over().is_some() || state.is_some_and(probes::is_claimed) {
                    urgent.push(entry.number);
                }
                true
            }
            Fate::Leaves => {
                self.flows.forget(&entry.key());
                false
            }
            Fate::Reset(reason) => {
                self.reset_entry(entry, state, reason);
                false
            }
        }
    }

    fn look(&self, entry: &mut Entry, state: Option<&Pair>, now: u64) -> Fate {
        let Some(state) = state else {
            entry.end(End::Lost, self.settings.slot);
            return Fate::Leaves;
        };
        if state.is_replaced() {
            // Its failure is counted once its listener is there.
            let is_awaited =
                entry.stage == Stage::Awaited && entry.if_rare().is_none_or(|rare| rare.gone.is_none());
            if is_awaited && quiet(state, now) < HALF_OPEN {
                return Fate::Stays;
            }
            replaced(entry, state, self.settings.slot);
            return Fate::Leaves;
        }
        entry.note(state, self.settings.slot, now);
        if self.is_over(entry, state) {
            return close(entry, state, self.settings.slot);
        }
        if is_half_open(state) {
            if self.is_removed(entry) {
                return Fate::Reset(End::Removed);
            }
            // Nothing else is known of it, that its ends could be asked about.
            if quiet(state, now) < HALF_OPEN {
                return Fate::Stays;
            }
            fail(entry, ConnectFailure::TimedOut, self.settings.slot);
            return Fate::Leaves;
        }
        self.answer_claims(entry, state);
        if self.is_removed(entry) {
            return Fate::Reset(End::Removed);
        }
        self.time_out(entry, state, now)
    }

    /// Asks the ends of a pair what is true of what somebody claims.
    fn answer_claims(&self, entry: &mut Entry, state: &Pair) {
        if let Some(rare) = entry.if_rare() {
            rare.over = None;
        }
        if probes::is_claimed(state)
            && let Some(pair) = self.flows.find(&entry.key())
        {
            self.ask(&pair, &mut entry.rare().asked, state);
        }
    }

    /// Whether a pair has to end since its listener, backend or endpoint was removed.
    fn is_removed(&self, entry: &mut Entry) -> bool {
        if entry.stage == Stage::Awaited {
            let spread = entry.client().port();
            let gone = entry.if_rare().and_then(|rare| rare.gone);
            let since = gone.zip(self.settings.removal_window);
            return since
                .is_some_and(|(gone, window)| Instant::now() >= removal::deadline(gone, window, spread));
        }
        entry.is_removed()
    }

    /// Whether a pair has been idle for too long, or one of its ends is dead.
    fn time_out(&self, entry: &mut Entry, state: &Pair, now: u64) -> Fate {
        let (idle_timeout, half_closed_timeout) = match &entry.place.served {
            Some(served) => {
                let settings = &served.serving.listener.settings;
                (settings.idle_timeout, settings.half_closed_timeout)
            }
            None => (self.settings.idle_timeout, self.settings.half_closed_timeout),
        };
        let idle = entry.idle(now);
        let over = |timeout: Option<Duration>| timeout.is_some_and(|timeout| idle >= timeout);
        if state.has_fin() && over(half_closed_timeout) {
            return Fate::Reset(End::HalfClosedTimeout);
        }
        if over(idle_timeout) {
            return Fate::Reset(End::IdleTimeout);
        }
        let Some(keepalive) = self.settings.keepalive else { return Fate::Stays };
        let quiet = [state.request.last_seen, state.response.last_seen]
            .map(|last| Duration::from_nanos(now.saturating_sub(last)));
        if quiet.iter().all(|quiet| *quiet < keepalive) {
            if entry.stage == Stage::Counted && !probes::is_claimed(state) {
                entry.is_usual();
            } else if let Some(rare) = entry.if_rare() {
                rare.keepalive = Default::default();
            }
            return Fate::Stays;
        }
        for (side, reason) in [End::DownstreamReset, End::UpstreamReset].into_iter().enumerate() {
            match entry.rare().keepalive[side].due(quiet[side], keepalive, Instant::now()) {
                Due::Nothing => {}
                Due::Probe => {
                    if let Some(pair) = self.flows.find(&entry.key()) {
                        self.send(&[segments::probe(&pair, state, side, now)]);
                    }
                }
                Due::Dead => return Fate::Reset(reason),
            }
        }
        Fate::Stays
    }

    /// Has a pair that a former agent has offloaded counted for its listener, once that is there.
    fn inherit(
        &self,
        entry: &mut Entry,
        is_half_open: bool,
        find: &FindListener,
        found: &mut Found,
        places: &mut Places,
    ) {
        let Place { address, endpoint, local, .. } = *entry.place;
        let looked_up = found.entry(Arc::as_ptr(&entry.place)).or_insert_with(|| match find(address) {
            ListenerLookup::Bound(listener) => {
                let serving = listener.serving.load_full();
                let mut upstreams = serving.upstreams.iter().flatten();
                let upstream = upstreams.find(|upstream| upstream.endpoints.load().has(endpoint)).cloned();
                let served = Some(Served { listener, serving, upstream });
                Listener::Bound(places.intern(Place { address, endpoint, local, served }))
            }
            ListenerLookup::Awaited => Listener::Awaited,
            ListenerLookup::Gone => Listener::Gone,
        });
        let place = match looked_up {
            Listener::Bound(place) => Arc::clone(place),
            Listener::Gone => {
                entry.rare().gone.get_or_insert_with(Instant::now);
                return;
            }
            Listener::Awaited => {
                if let Some(rare) = entry.if_rare() {
                    rare.gone = None;
                }
                return;
            }
        };
        entry.is_usual();
        if let Some(Served { listener, serving, upstream: None }) = &place.served {
            // What was removed while no agent ran counts as removed now.
            let (settings, spread) = (&serving.listener.settings, entry.client().port());
            entry.removal = RemovalWatch::lost(&listener.removals, settings, spread);
        }
        (entry.place, entry.stage) = (place, Stage::Opening);
        if !is_half_open {
            entry.count(true, self.settings.slot);
        }
    }

    /// Has pairs look for their paths anew that are to, until it is time to look at all of them: the kernel is asked for each, which
    /// takes seconds where there are many.
    pub(super) fn reroute_some(&self, until: Instant) {
        while Instant::now() < until && !self.stops.load(Ordering::Relaxed) {
            // Not under the lock: others look at the table meanwhile.
            let some = lock(&self.table).next_to_reroute();
            if some.is_empty() {
                return;
            }
            let mut known = KnownRoutes::default();
            for mut pair in some.iter().filter_map(|key| self.flows.find(key)) {
                self.reroute(&mut pair, &mut known);
            }
        }
    }

    pub(super) fn reroute(&self, pair: &mut JoinedPair, known: &mut KnownRoutes) {
        match self.flows.reroute(pair, known) {
            Ok(true) => tracing::debug!(pair = pair.number, "an offloaded connection has another next hop"),
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot change the next hop of an offloaded connection: its packets may be lost; `forwarder conns reset` ends it");
            }
        }
    }
}

/// How long neither end has been heard, at `now` (`CLOCK_MONOTONIC`, nanoseconds).
pub(super) fn quiet(state: &Pair, now: u64) -> Duration {
    let last = state.request.last_seen.max(state.response.last_seen);
    Duration::from_nanos(now.saturating_sub(last))
}

/// Whether a pair is a direct connection whose handshake is not done: also if it has been replaced, until its room is given back.
fn is_half_open(state: &Pair) -> bool {
    state.offloaded == 0 || state.is_replaced()
}

/// Counts that an endpoint did not take a client's connection, which another one was asked for instead: the connection goes on there.
pub(super) fn replaced(entry: &mut Entry, state: &Pair, slot: usize) {
    if let (Stage::Opening, Some(Served { upstream: Some(upstream), .. })) =
        (entry.stage, &entry.place.served)
    {
        let is_refused = reset_by_end(state) == Some(End::UpstreamReset);
        let failure = if is_refused { ConnectFailure::Refused } else { ConnectFailure::TimedOut };
        upstream.counters.of(slot).failures[failure as usize].add(1);
    }
    entry.stage = Stage::Ended;
}

/// Counts and logs that a direct connection has not come to be one.
fn fail(entry: &mut Entry, failure: ConnectFailure, slot: usize) {
    if let Some(Served { upstream: Some(upstream), .. }) = &entry.place.served {
        upstream.counters.of(slot).failures[failure as usize].add(1);
    }
    entry.end(End::ConnectFailed, slot);
}

/// What becomes of a pair that is over.
fn close(entry: &mut Entry, state: &Pair, slot: usize) -> Fate {
    let since = *entry.rare().over.get_or_insert_with(Instant::now);
    if let Some(reason) = reset_by_end(state) {
        if entry.tier() == Tier::Direct && since.elapsed() >= RESET_STANDS {
            // The other end has got the same reset.
            if is_half_open(state) && reason == End::UpstreamReset {
                fail(entry, ConnectFailure::Refused, slot);
            }
            entry.end(reason, slot);
            return Fate::Leaves;
        }
        // The reset may have been lost, or been one that the other end does not believe, which then may have nothing to say.
        return if since.elapsed() >= RESET_STANDS { Fate::Reset(reason) } else { Fate::Stays };
    }
    entry.end(End::Finished, slot);
    if quiet(state, monotonic()) < LINGER { Fate::Stays } else { Fate::Leaves }
}
