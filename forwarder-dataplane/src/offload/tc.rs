//! Offloaded pairs, which the kernel forwards by itself: counted, timed out, ended, and taken over from a former agent.
//!
//! A pair has no socket and no task. What is known of it stands in the maps, and is looked at again and again: a few times a second,
//! or every some seconds where there are very many.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forwarder_common::flow::{Flow, Pair, SENDER_RESET};

use crate::counters::End;
use crate::listener::BoundListener;
use crate::record::Record;
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::flows::{FlowTable, Inherited};
use forwarder_kernel::maps::grace::Grace;
use forwarder_kernel::net::routes::KnownRoutes;
use forwarder_kernel::tcp::segments::SegmentSocket;
use forwarder_runtime::lock::lock;

mod ending;
mod entry;
mod keepalive;
mod probes;
mod segments;
mod sweep;
mod table;
mod view;

use self::ending::{PendingReset, RESET_AGAIN};
use self::entry::{Entry, Incoming};
pub(crate) use self::probes::Asked;
use self::segments::Said;
use self::table::{Places, Table};
pub use self::view::{from_pins, reset_pinned};

/// How often pairs are looked at, if there are few.
const PERIOD: Duration = Duration::from_millis(250);
/// Where there are many, how much longer than looking at them takes the thread waits before the next time, and at most:
/// what is over has to make room for others.
const MOST_WORK: u32 = 20;
const LONGEST_PERIOD: Duration = Duration::from_secs(15);

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
    table: Mutex<Table>,
    /// Those that have come since the table was last looked at: workers do not wait for that.
    incoming: Mutex<Vec<Incoming>>,
    /// How many there are in both: whoever counts them does not wait for a sweep.
    count: AtomicUsize,
    /// How many of them are direct, as of the last look at all.
    count_direct: AtomicUsize,
    resets: Mutex<Vec<PendingReset>>,
    questions: probes::Limit,
    routes_changed: AtomicBool,
    /// When pairs looked for their paths anew, last: `CLOCK_MONOTONIC` in nanoseconds.
    rerouted: AtomicU64,
    /// Whether new connections are held back though the agent listens. The map is written while this is locked.
    leaves: Mutex<bool>,
    stops: AtomicBool,
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
            count_direct: AtomicUsize::new(0),
            resets: Mutex::default(),
            questions: probes::Limit::default(),
            routes_changed: AtomicBool::new(false),
            rerouted: AtomicU64::new(0),
            leaves: Mutex::default(),
            stops: AtomicBool::new(false),
        }
    }

    /// Looks after a pair from now on that a former agent offloaded. It is counted for its listener once that is bound.
    pub fn adopt(&self, inherited: &Inherited) {
        // Routes that have changed since its path was looked for, the sweep told those that were here.
        if self.rerouted.load(Ordering::Relaxed) > 0 {
            self.routes_changed();
        }
        self.push(Incoming::inherited(inherited.key, inherited.has_early_end));
    }

    /// Looks after a pair from now on whose connection a worker has recorded.
    pub(crate) fn add(&self, pair: &JoinedPair, record: Record) {
        self.push(Incoming::recorded(pair, record));
        // Its path was looked for when it was joined.
        let [(_, Flow { clock_time, .. }), _] = pair.flows;
        if clock_time <= self.rerouted.load(Ordering::Relaxed) {
            self.reroute(&mut { *pair }, &mut KnownRoutes::default());
        }
    }

    fn push(&self, incoming: Incoming) {
        self.count.fetch_add(1, Ordering::Relaxed);
        lock(&self.incoming).push(incoming);
    }

    /// Visits every pair with what the maps say of it, `None` where that is gone, and keeps those for which `visit` says so. With a
    /// million pairs it takes part of a second, and waits as long for others who do it: not for a thread that has anything else to do.
    fn retain(&self, visit: impl FnMut(&mut Entry, Option<&Pair>, &mut Places) -> bool) {
        let mut table = lock(&self.table);
        let incoming = std::mem::take(&mut *lock(&self.incoming));
        let mut gone = 0;
        for incoming in incoming {
            if let Some(mut former) = table.insert(incoming) {
                former.end(End::Lost, self.settings.slot);
                gone += 1;
            }
        }
        gone += table.retain(&self.flows, visit);
        self.count.fetch_sub(gone, Ordering::Relaxed);
    }

    /// Looks after the direct connections from now on that programs have made since this was done last.
    pub fn discover(&self) {
        let come = lock(&self.table).discover(&self.flows);
        self.count.fetch_add(come, Ordering::Relaxed);
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many direct connections there are, as of the last look at all.
    pub fn count_direct(&self) -> usize {
        self.count_direct.load(Ordering::Relaxed).min(self.count())
    }

    /// Whether all of them are over, and only kept for what is sent again.
    pub fn are_over(&self) -> bool {
        self.discover();
        let mut are_over = true;
        self.retain(|entry, state, _| {
            are_over &= state.is_none_or(|state| self.is_over(entry, state));
            true
        });
        are_over
    }

    /// Whether nothing more is to be forwarded of a pair but what is sent again.
    fn is_over(&self, entry: &Entry, state: &Pair) -> bool {
        let may_be = state.has_fin() || entry.has_early_end || reset_by_end(state).is_some();
        // The flow tells it: to be asked for where it may say so.
        state.is_replaced()
            || may_be && self.flows.find(&entry.key()).is_none_or(|pair| state.is_over(&pair.flows[0].1))
    }

    /// Ends a pair from outside, and counts it up to now.
    fn reset_entry(&self, entry: &mut Entry, state: Option<&Pair>, reason: End) {
        // Its client is another one's.
        if let Some(state) = state.filter(|state| state.is_replaced()) {
            sweep::replaced(entry, state, self.settings.slot);
            return self.flows.forget(&entry.key());
        }
        if let Some(state) = state {
            entry.note(state, self.settings.slot, monotonic());
        }
        self.reset(&entry.key());
        entry.end(reason, self.settings.slot);
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
                pairs.tick();
                let started = Instant::now();
                let mut urgent = pairs.sweep(&find);
                let until = Instant::now() + (started.elapsed() * MOST_WORK).clamp(PERIOD, LONGEST_PERIOD);
                while !pairs.stops.load(Ordering::Relaxed) {
                    let next = until.min(Instant::now() + PERIOD);
                    pairs.reroute_some(next);
                    thread::park_timeout(next.saturating_duration_since(Instant::now()));
                    if Instant::now() >= until {
                        break;
                    }
                    pairs.tick();
                    urgent = pairs.look_again(&urgent);
                }
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

    fn send(&self, segments: &[Said]) {
        for said in segments {
            if let Err(error) = said.send(&self.socket) {
                tracing::debug!(%error, "cannot send a segment to a peer of an offloaded connection");
            }
        }
    }
}

/// How a connection has ended by a reset of one of its ends, if it has.
pub(crate) fn reset_by_end(state: &Pair) -> Option<End> {
    let ends = [(&state.request, End::DownstreamReset), (&state.response, End::UpstreamReset)];
    ends.into_iter().find(|(forward, _)| forward.flags & SENDER_RESET != 0).map(|(_, end)| end)
}
