//! What becomes of open connections when the listener, the backend or the endpoint that they rely on is removed.
//!
//! A removal is noted at the listeners that it concerns. Whoever looks at the connections again and again anyway
//! compares a number, and looks closer where it has changed: a change that removes nothing costs no connection anything.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use forwarder_gateway::model::{BackendKey, ListenerSettings};
use forwarder_runtime::lock::lock;

/// How long a removal is remembered: longer than it takes until every connection has been looked at.
const MEMORY: Duration = Duration::from_mins(1);
/// Longer windows would overflow clocks.
const LONGEST: Duration = Duration::from_hours(10 * 365 * 24);
/// Which part of a window is left for ending what has not ended by itself, so that not all clients come back at once.
const CLOSING_SHARE: u32 = 4;

/// What connections of a listener rely on, and is not there any more.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Removed {
    /// The listener.
    Listener,
    /// Backends that its route does not refer to any more.
    Backends(Vec<BackendKey>),
    /// Endpoints of one backend.
    Endpoints {
        /// The backend.
        backend: BackendKey,
        /// Those that take no new connections any more.
        gone: Arc<[SocketAddr]>,
    },
}

impl Removed {
    /// Whether a connection to an endpoint relied on it; what is not known of one may be what was removed.
    fn concerns(&self, backend: Option<&BackendKey>, endpoint: Option<SocketAddr>) -> bool {
        match self {
            Self::Listener => true,
            Self::Backends(backends) => backend.is_none_or(|backend| backends.contains(backend)),
            Self::Endpoints { backend: of, gone } => {
                backend.is_none_or(|backend| backend == of)
                    && endpoint.is_some_and(|endpoint| gone.contains(&endpoint))
            }
        }
    }
}

/// What has been removed of one listener since it was bound, as far as its settings end connections for that.
#[derive(Debug, Default)]
pub struct Removals {
    /// The number of the last one.
    latest: AtomicU64,
    is_gone: AtomicBool,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    notes: VecDeque<Note>,
    /// The number of the last one that is not remembered any more.
    forgotten: u64,
}

#[derive(Debug)]
struct Note {
    number: u64,
    removed: Removed,
    at: Instant,
    window: Duration,
}

impl Removals {
    /// Notes a removal that is in force, and for how long connections may go on by these settings.
    pub fn note(&self, removed: Removed, settings: &ListenerSettings) {
        let Some(window) = settings.removal_window() else { return };
        let at = Instant::now();
        if removed == Removed::Listener {
            self.is_gone.store(true, Ordering::Release);
        }
        let mut log = self.log();
        while let Some(first) = log.notes.pop_front_if(|note| at.duration_since(note.at) > MEMORY) {
            log.forgotten = first.number;
        }
        let number = self.latest() + 1;
        log.notes.push_back(Note { number, removed, at, window });
        self.latest.store(number, Ordering::Release);
    }

    /// The number of the last one; 0 before the first.
    pub(crate) fn latest(&self) -> u64 {
        self.latest.load(Ordering::Acquire)
    }

    /// Whether the listener itself is gone, and its connections are to end for that.
    pub(crate) fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }

    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }
}

/// How a connection stands with the removals of its listener.
#[derive(Debug, Default)]
pub(crate) struct RemovalWatch {
    /// The number of the last one that was looked at.
    seen: u64,
    /// Until when the connection may go on, where something that it relies on is gone.
    until: Option<Instant>,
}

impl RemovalWatch {
    /// Whether nothing has changed since it was looked at, and nothing is gone: the usual case.
    pub(crate) fn is_settled(&self, removals: &Removals) -> bool {
        self.until.is_none() && self.seen == removals.latest()
    }

    /// Notes that what the connection relies on is there, by what was in force at removal number `latest`.
    pub(crate) fn settle(&mut self, latest: u64) {
        *self = Self { seen: latest, until: None };
    }

    /// Notes that something is gone that the connection relies on, and tells whether it has to end now. `present` are the
    /// settings of its listener, for removals that nobody remembers; `spread` tells connections apart.
    pub(crate) fn lose(
        &mut self,
        removals: &Removals,
        (backend, endpoint): (Option<&BackendKey>, Option<SocketAddr>),
        present: &ListenerSettings,
        spread: u16,
    ) -> bool {
        let now = Instant::now();
        if self.seen != removals.latest() {
            let log = removals.log();
            let is_meant = |note: &&Note| note.number > self.seen && note.removed.concerns(backend, endpoint);
            let found = match log.notes.iter().rev().find(is_meant) {
                Some(note) => Some((note.at, note.window)),
                None if self.seen < log.forgotten => present.removal_window().map(|window| (now, window)),
                None => None,
            };
            self.seen = log.notes.back().map_or(log.forgotten, |last| last.number);
            let until = found.map(|(at, window)| deadline(at, window, spread));
            self.until = self.until.into_iter().chain(until).min();
        }
        self.until.is_some_and(|until| now >= until)
    }

    /// That of a connection of which nothing is known but that what it relies on is gone.
    pub(crate) fn lost(removals: &Removals, present: &ListenerSettings, spread: u16) -> Self {
        let until = present.removal_window().map(|window| deadline(Instant::now(), window, spread));
        Self { seen: removals.latest(), until }
    }
}

/// When a connection ends: within the last part of the window.
pub(crate) fn deadline(at: Instant, window: Duration, spread: u16) -> Instant {
    let window = window.min(LONGEST);
    // Neighbouring numbers lie far apart when multiplied by 2^16 divided by the golden ratio.
    let share = u32::from(spread.wrapping_mul(40_503));
    at + window.saturating_sub(window / CLOSING_SHARE * share / (1 << 16))
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::*;
    use forwarder_gateway::manifests::NamespacedName;
    use forwarder_gateway::model::OnRemoval;

    fn settings(on_removal: OnRemoval) -> ListenerSettings {
        ListenerSettings { on_removal, removal_drain: Duration::from_mins(1), ..ListenerSettings::default() }
    }

    fn backend(name: &str) -> BackendKey {
        BackendKey { service: NamespacedName::new("default", name), port: NonZeroU16::MIN }
    }

    fn endpoint(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 80))
    }

    fn endpoints(name: &str, last: u8) -> Removed {
        Removed::Endpoints { backend: backend(name), gone: [endpoint(last)].into() }
    }

    /// Whether a connection to endpoint 1 of backend `a` has to end, given that it is gone from where it was.
    fn ends(watch: &mut RemovalWatch, removals: &Removals) -> bool {
        let (key, present) = (backend("a"), settings(OnRemoval::Reset));
        watch.lose(removals, (Some(&key), Some(endpoint(1))), &present, 0)
    }

    #[test]
    fn what_was_removed_ends_the_connections_that_relied_on_it() {
        for (removed, is_meant) in [
            (Removed::Listener, true),
            (Removed::Backends(vec![backend("b"), backend("a")]), true),
            (Removed::Backends(vec![backend("b")]), false),
            (endpoints("a", 1), true),
            (endpoints("a", 2), false),
            (endpoints("b", 1), false),
        ] {
            let (removals, mut watch) = (Removals::default(), RemovalWatch::default());
            assert!(watch.is_settled(&removals));
            removals.note(removed.clone(), &settings(OnRemoval::Reset));
            assert!(!watch.is_settled(&removals), "{removed:?}");
            assert_eq!(ends(&mut watch, &removals), is_meant, "{removed:?}");
        }
    }

    #[test]
    fn the_settings_at_the_time_of_the_removal_decide() {
        let (removals, mut watch) = (Removals::default(), RemovalWatch::default());
        removals.note(endpoints("a", 1), &settings(OnRemoval::Keep));
        assert!(watch.is_settled(&removals), "nothing is to be done for it");
        // Later the settings change, and something else is removed.
        removals.note(endpoints("a", 2), &settings(OnRemoval::Reset));
        assert!(!ends(&mut watch, &removals));
        assert!(watch.is_settled(&removals));
    }

    #[test]
    fn a_connection_is_drained_until_what_it_relies_on_is_back() {
        let (removals, mut watch) = (Removals::default(), RemovalWatch::default());
        removals.note(endpoints("a", 1), &settings(OnRemoval::Drain));
        assert!(!ends(&mut watch, &removals));
        assert!(!watch.is_settled(&removals), "it is being drained");
        watch.settle(removals.latest());
        assert!(watch.is_settled(&removals));
        // Drained once more, and then its listener is removed for good.
        removals.note(endpoints("a", 1), &settings(OnRemoval::Drain));
        assert!(!ends(&mut watch, &removals));
        removals.note(Removed::Listener, &settings(OnRemoval::Reset));
        assert!(ends(&mut watch, &removals));
    }

    #[test]
    fn ends_are_spread_over_the_last_quarter_of_the_window() {
        let (at, window) = (Instant::now(), Duration::from_secs(40));
        let mut seconds: Vec<u64> =
            (0..400).map(|port| deadline(at, window, port).duration_since(at).as_secs()).collect();
        seconds.sort_unstable();
        assert!(seconds.iter().all(|second| (30..=40).contains(second)), "{seconds:?}");
        seconds.dedup();
        assert!(seconds.len() >= 10, "{seconds:?}");
        assert_eq!(deadline(at, Duration::ZERO, 7), at);
        assert!(deadline(at, Duration::MAX, u16::MAX) > at);
    }
}
