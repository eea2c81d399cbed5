//! Offloaded pairs, which the kernel forwards by itself: counted, timed out, ended, and taken over from a former agent.
//!
//! A pair has no socket and no task. What is known of it stands in the maps, and is looked at a few times a second.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forwarder_common::flow::{Flow, Pair, SENDER_RESET};

use crate::counters::End;
use crate::listener::BoundListener;
use crate::record::Record;
use crate::relay::Tier;
use crate::removal::{self, RemovalWatch};
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::FlowTable;
use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::maps::grace::Grace;
use forwarder_kernel::tcp::segments::SegmentSocket;
use forwarder_runtime::lock::lock;

mod ending;
mod keepalive;
mod probes;
mod segments;
mod view;

use self::ending::{PendingReset, RESET_AGAIN};
use self::keepalive::{Due, Keepalive};
pub(crate) use self::probes::Asked;
use self::segments::Said;
pub use self::view::{from_pins, reset_pinned};

/// How often pairs are looked at.
const PERIOD: Duration = Duration::from_millis(250);
/// Where there are many, how much longer than looking at them takes the thread waits before the next time, and at most:
/// what is over has to make room for others.
const MOST_WORK: u32 = 40;
const LONGEST_PERIOD: Duration = Duration::from_secs(1);
/// How long after its last packet a pair of which both ends have ended is kept, for what is sent again.
const LINGER: Duration = Duration::from_secs(2);
/// How long a reset is given to be followed by something else of the same sender: then it was a stranger's who knew the number.
const RESET_STANDS: Duration = Duration::from_millis(200);
/// When a connection is offloaded: whichever comes first.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct OffloadTrigger {
    /// After it has moved so many bytes.
    pub bytes: Option<u64>,
    /// After it has lived through so many sweeps of its worker.
    pub sweeps: Option<u32>,
}

/// What takes connections into the kernel. Shared by the workers.
pub struct Offloader {
    /// The flows.
    pub flows: Arc<FlowTable>,
    /// Tells when packets have landed.
    pub grace: Grace,
    /// Where a pair lives then.
    pub pairs: Arc<Pairs>,
}

/// Settings of offloaded pairs.
#[derive(Clone, Copy, Debug)]
pub struct PairSettings {
    /// For how long an end may be silent before it is probed; `None` is off.
    pub keepalive: Option<Duration>,
    /// The time-outs of pairs whose listener is not known.
    pub idle_timeout: Option<Duration>,
    /// The same for those of which one direction has ended.
    pub half_closed_timeout: Option<Duration>,
    /// For how long pairs may go on whose listener is gone for all that is known of it; `None` is for ever.
    pub removal_window: Option<Duration>,
    /// For how long after the agent's end new connections are held back.
    pub hold: Duration,
    /// Whose counters the pairs are counted in.
    pub slot: usize,
}

/// Finds the listener that has an address.
pub type FindListener = Box<dyn Fn(SocketAddr) -> ListenerLookup + Send>;

/// What is known of the listener that has an address.
#[derive(Debug)]
pub enum ListenerLookup {
    /// It is bound.
    Bound(Arc<BoundListener>),
    /// It may come to be bound.
    Awaited,
    /// There is to be none.
    Gone,
}

/// The offloaded pairs.
pub struct Pairs {
    flows: Arc<FlowTable>,
    socket: SegmentSocket,
    settings: PairSettings,
    table: Mutex<HashMap<u32, Entry>>,
    /// Those that have come since the table was last looked at: workers do not wait for that.
    incoming: Mutex<Vec<Entry>>,
    /// How many there are in both: whoever counts them does not wait for a sweep.
    count: AtomicUsize,
    resets: Mutex<Vec<PendingReset>>,
    questions: probes::Limit,
    routes_changed: AtomicBool,
    /// When pairs looked for their paths anew, last: `CLOCK_MONOTONIC` in nanoseconds.
    rerouted: AtomicU64,
    /// Whether new connections are held back though the agent listens. The map is written while this is locked.
    leaves: Mutex<bool>,
    stops: AtomicBool,
}

struct Entry {
    pair: JoinedPair,
    /// `None` for one that is over, and for one of a former agent until its listener is there.
    record: Option<Record>,
    is_counted: bool,
    /// Since when the listener of a pair of a former agent is known to be gone.
    gone: Option<Instant>,
    /// When payload was last seen to have moved, and how much had; what was sent again counts apart.
    active: Instant,
    bytes: [u64; 2],
    repeated: [u64; 2],
    /// Since when it is over.
    over: Option<Instant>,
    /// The probes that each end has not answered.
    keepalive: [Keepalive; 2],
    /// What the ends were asked for a stranger's sake.
    asked: Asked,
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
    /// None yet.
    pub fn new(flows: Arc<FlowTable>, socket: SegmentSocket, settings: PairSettings) -> Self {
        Self {
            flows,
            socket,
            settings,
            table: Mutex::default(),
            incoming: Mutex::default(),
            count: AtomicUsize::new(0),
            resets: Mutex::default(),
            questions: probes::Limit::default(),
            routes_changed: AtomicBool::new(false),
            rerouted: AtomicU64::new(0),
            leaves: Mutex::default(),
            stops: AtomicBool::new(false),
        }
    }

    /// Looks after a pair from now on that a former agent offloaded. It gets a record once its listener is bound.
    pub fn adopt(&self, pair: &JoinedPair) {
        self.add(pair, None);
    }

    /// Looks after a pair from now on; `record` is that of its connection, if it is known.
    pub(crate) fn add(&self, pair: &JoinedPair, mut record: Option<Record>) {
        if let Some(record) = &mut record {
            // Only one thread may add to one counter.
            record.slot = self.settings.slot;
        }
        let mut entry = Entry {
            bytes: record.as_ref().map_or([0; 2], |record| [record.received, record.sent]),
            is_counted: record.is_some(),
            record,
            pair: *pair,
            repeated: [0; 2],
            gone: None,
            active: Instant::now(),
            over: None,
            keepalive: Default::default(),
            asked: Asked::default(),
        };
        // Its path was looked for when it was joined; what has changed since, the sweep told those that were here.
        let [(_, Flow { clock_time, .. }), _] = entry.pair.flows;
        if clock_time <= self.rerouted.load(Ordering::Relaxed) {
            self.reroute(&mut entry);
        }
        self.count.fetch_add(1, Ordering::Relaxed);
        lock(&self.incoming).push(entry);
    }

    /// The pairs, with those that have come since the table was last looked at.
    fn table(&self) -> MutexGuard<'_, HashMap<u32, Entry>> {
        let mut table = lock(&self.table);
        let incoming = std::mem::take(&mut *lock(&self.incoming));
        table.extend(incoming.into_iter().map(|entry| (entry.pair.number, entry)));
        table
    }

    /// Visits every pair, and keeps those for which `visit` says so. With many pairs it takes a second, and waits as long for others who
    /// do it: not for a thread that has anything else to do.
    fn retain(&self, mut visit: impl FnMut(&mut Entry) -> bool) {
        let mut table = self.table();
        let before = table.len();
        table.retain(|_, entry| visit(entry));
        self.count.fetch_sub(before - table.len(), Ordering::Relaxed);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Whether all of them are over, and only kept for what is sent again.
    pub fn are_over(&self) -> bool {
        self.table().values().all(|entry| {
            let [(_, request), _] = &entry.pair.flows;
            self.flows.pair(entry.pair.number).is_none_or(|state| state.is_over(request))
        })
    }

    /// Has every pair look for its path anew.
    pub fn routes_changed(&self) {
        self.routes_changed.store(true, Ordering::Relaxed);
    }

    /// Starts the thread that looks after the pairs; it ends after [`Self::stop`].
    ///
    /// # Errors
    /// No thread can be made.
    pub fn start(self: &Arc<Self>, find: FindListener) -> std::io::Result<JoinHandle<()>> {
        let pairs = Arc::clone(self);
        thread::Builder::new().name("pairs".to_owned()).spawn(move || {
            while !pairs.stops.load(Ordering::Relaxed) {
                let started = Instant::now();
                pairs.sweep(&find);
                thread::park_timeout((started.elapsed() * MOST_WORK).clamp(PERIOD, LONGEST_PERIOD));
            }
        })
    }

    /// Has new connections held back from now on, for the agent's successor: even while the agent's own sockets listen, from which
    /// nobody would accept them.
    pub fn leave(&self) {
        self.hold(Some(true));
    }

    /// Has them held back only where nobody listens: the agent's own sockets are closed, and whoever takes a port serves it.
    pub fn have_left(&self) {
        self.hold(Some(false));
    }

    /// Whether new connections are held back after the agent's end.
    pub fn holds(&self) -> bool {
        !self.settings.hold.is_zero()
    }

    fn hold(&self, leaves: Option<bool>) {
        let mut is_leaving = lock(&self.leaves);
        *is_leaving = leaves.unwrap_or(*is_leaving);
        if self.holds()
            && let Err(error) = self.flows.hold(self.settings.hold, *is_leaving)
        {
            tracing::warn!(%error, "cannot tell the programs to hold SYNs back: new connections may be refused while no agent runs");
        }
    }

    /// Has the thread end soon; what is offloaded lives on.
    pub fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
    }

    /// Looks at every pair once.
    fn sweep(&self, find: &FindListener) {
        self.hold(None);
        self.flows.paths().refresh_filters();
        let reroutes =
            self.routes_changed.swap(false, Ordering::Relaxed) | self.flows.paths().take_changed_mtus();
        if reroutes {
            self.rerouted.store(monotonic(), Ordering::Relaxed);
        }
        self.retain(|entry| {
            if reroutes {
                self.reroute(entry);
            }
            match self.look(entry, find) {
                Fate::Stays => true,
                Fate::Leaves => {
                    self.flows.remove(&entry.pair);
                    false
                }
                Fate::Reset(reason) => {
                    self.reset(&entry.pair);
                    end(entry, reason);
                    false
                }
            }
        });
        self.send_resets_again();
    }

    fn look(&self, entry: &mut Entry, find: &FindListener) -> Fate {
        let Some(state) = self.flows.pair(entry.pair.number) else {
            end(entry, End::Lost);
            return Fate::Leaves;
        };
        if entry.record.is_none() && !entry.is_counted {
            match find(entry.pair.downstream().1) {
                ListenerLookup::Bound(listener) => {
                    entry.record = Some(self.inherit(&entry.pair, &state, listener));
                    entry.is_counted = true;
                    entry.gone = None;
                }
                ListenerLookup::Awaited => entry.gone = None,
                ListenerLookup::Gone => drop(entry.gone.get_or_insert_with(Instant::now)),
            }
        }
        let repeated = [state.request.repeated, state.response.repeated];
        if repeated != entry.repeated {
            entry.repeated = repeated;
            entry.active = Instant::now();
        }
        let bytes = [state.request.bytes, state.response.bytes];
        if bytes != entry.bytes {
            entry.bytes = bytes;
            entry.active = Instant::now();
            if let Some(record) = &mut entry.record {
                record.count_forwarded(bytes[0], bytes[1]);
            }
        }
        let [(_, request), _] = &entry.pair.flows;
        if state.is_over(request) {
            return close(entry, &state);
        }
        entry.over = None;
        self.ask(&entry.pair, &mut entry.asked, &state);
        if self.is_removed(entry) {
            return Fate::Reset(End::Removed);
        }
        self.time_out(entry, &state)
    }

    /// Whether a pair has to end since its listener, backend or endpoint was removed.
    fn is_removed(&self, entry: &mut Entry) -> bool {
        let Some(record) = &mut entry.record else {
            let spread = entry.pair.downstream().0.port();
            let since = entry.gone.zip(self.settings.removal_window);
            return since
                .is_some_and(|(gone, window)| Instant::now() >= removal::deadline(gone, window, spread));
        };
        record.is_removed()
    }

    /// Whether a pair has been idle for too long, or one of its ends is dead.
    fn time_out(&self, entry: &mut Entry, state: &Pair) -> Fate {
        let (idle_timeout, half_closed_timeout) = match &entry.record {
            Some(record) => {
                let settings = &record.serving.listener.settings;
                (settings.idle_timeout, settings.half_closed_timeout)
            }
            None => (self.settings.idle_timeout, self.settings.half_closed_timeout),
        };
        let idle = entry.active.elapsed();
        let over = |timeout: Option<Duration>| timeout.is_some_and(|timeout| idle >= timeout);
        if state.has_fin() && over(half_closed_timeout) {
            return Fate::Reset(End::HalfClosedTimeout);
        }
        if over(idle_timeout) {
            return Fate::Reset(End::IdleTimeout);
        }
        let Some(keepalive) = self.settings.keepalive else { return Fate::Stays };
        let now = monotonic();
        let ends =
            [(state.request.last_seen, End::DownstreamReset), (state.response.last_seen, End::UpstreamReset)];
        for (side, (last, reason)) in ends.into_iter().enumerate() {
            let quiet = Duration::from_nanos(now.saturating_sub(last));
            match entry.keepalive[side].due(quiet, keepalive, Instant::now()) {
                Due::Nothing => {}
                Due::Probe => self.send(&[segments::probe(&entry.pair, state, side, now)]),
                Due::Dead => return Fate::Reset(reason),
            }
        }
        Fate::Stays
    }

    /// The record of a pair that a former agent has offloaded, once its listener is there.
    fn inherit(&self, pair: &JoinedPair, state: &Pair, listener: Arc<BoundListener>) -> Record {
        let (client, _) = pair.downstream();
        let serving = listener.serving.load_full();
        let (endpoint, local) = pair.upstream();
        let mut upstreams = serving.upstreams.iter().flatten();
        let upstream = upstreams.find(|upstream| upstream.endpoints.load().has(endpoint)).cloned();
        listener.counters.of(self.settings.slot).accepted.add(1);
        if let Some(upstream) = &upstream {
            upstream.counters.of(self.settings.slot).connected.add(1);
        }
        // What was removed while no agent ran counts as removed now.
        let removal = match &upstream {
            Some(_) => RemovalWatch::default(),
            None => RemovalWatch::lost(&listener.removals, &serving.listener.settings, client.port()),
        };
        let age = Duration::from_nanos(monotonic().saturating_sub(state.opened));
        Record {
            orphan: upstream.is_none().then_some(endpoint),
            removal,
            listener,
            serving,
            downstream: client,
            upstream: upstream.map(|upstream| (upstream, endpoint)),
            upstream_local: Some(local),
            tier: Tier::Tc,
            slot: self.settings.slot,
            opened: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            received: state.request.bytes,
            sent: state.response.bytes,
            end: End::Drained,
        }
    }

    fn reroute(&self, entry: &mut Entry) {
        match self.flows.reroute(&mut entry.pair) {
            Ok(true) => {
                tracing::debug!(pair = entry.pair.number, "an offloaded connection has another next hop");
            }
            Ok(false) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot change the next hop of an offloaded connection: its packets may be lost; `forwarder conns reset` ends it");
            }
        }
    }

    fn send(&self, segments: &[Said]) {
        for said in segments {
            if let Err(error) = said.send(&self.socket) {
                tracing::debug!(%error, "cannot send a segment to a peer of an offloaded connection");
            }
        }
    }
}

/// What becomes of a pair that is over.
fn close(entry: &mut Entry, state: &Pair) -> Fate {
    let since = *entry.over.get_or_insert_with(Instant::now);
    let reason = if state.request.flags & SENDER_RESET != 0 {
        End::DownstreamReset
    } else if state.response.flags & SENDER_RESET != 0 {
        End::UpstreamReset
    } else {
        End::Finished
    };
    if reason != End::Finished {
        // The reset may have been lost, or been one that the other end does not believe, which then may have nothing to say.
        return if since.elapsed() >= RESET_STANDS { Fate::Reset(reason) } else { Fate::Stays };
    }
    end(entry, reason);
    let last = state.request.last_seen.max(state.response.last_seen);
    let quiet = Duration::from_nanos(monotonic().saturating_sub(last));
    if quiet < LINGER { Fate::Stays } else { Fate::Leaves }
}

/// Counts and logs the end of a pair's connection.
fn end(entry: &mut Entry, reason: End) {
    if let Some(mut record) = entry.record.take() {
        record.end = reason;
    }
}
