//! One accepted connection: chosen a backend, connected, relayed, offloaded where that is possible, recorded.

mod actions;
mod attempt;
mod clocks;
mod handover;
mod insertion;
pub(crate) mod listing;
mod offload;
mod probation;
mod relaying;

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use crate::counters::{ConnectFailure, End};
use crate::listener::{BoundListener, RouteSnapshot};
use crate::record::Record;
use crate::relay::{Moved, Tier, deliver_on_close};
use crate::removal::RemovalWatch;
use crate::upstream::{self, Upstream};
use crate::worker_context::WorkerContext;
use forwarder_gateway::model::Datapath;
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::tcp::tcp_info::Silence;
use forwarder_kernel::tcp::timestamp_clock::Clock;

pub(crate) use self::actions::Action;
use self::actions::Actions;
use self::relaying::Relay;

/// How often it is looked in the time that a peer may say nothing whether it does.
const LOOKS: u128 = 16;
/// After how many sweeps a connection is no longer a short one.
const KEEPALIVE_AFTER_SWEEPS: u32 = 4;

/// A live connection as its worker sees it.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Its counters and its end; `None` once it is the kernel's.
    record: RefCell<Option<Record>>,
    listener: Arc<BoundListener>,
    serving: Arc<RouteSnapshot>,
    downstream: SocketAddr,
    /// Bytes passed on from the client, and from the endpoint.
    received: Cell<u64>,
    sent: Cell<u64>,
    /// The sweep during which a byte last moved.
    active: Cell<u32>,
    half_closed: Cell<bool>,
    /// A direction is not reading, so only [`Action::CheckReset`] would find a reset.
    blind: Cell<bool>,
    /// The sweep from which on the upstream side wants keepalive; `None` once it has it.
    keepalive_from: Cell<Option<u32>>,
    /// How many bytes must have moved before it is offloaded; `None` where it never is.
    offload_at: Cell<Option<u64>>,
    /// The numbers of the first bytes that were sent to the client and to the endpoint, once they were read.
    first_sent: [Cell<Option<u32>>; 2],
    /// The timestamp clocks of both sockets.
    clocks: [Cell<Clock>; 2],
    /// How often it was not offloaded for a reason that may pass.
    refused: Cell<u32>,
    /// Since when each peer does not answer.
    silences: [Cell<Silence>; 2],
    /// The sweep from which on it is offloaded whatever has moved.
    offload_from: Cell<Option<u32>>,
    /// The kernel forwards what arrives; what had arrived before is still delivered here.
    is_in_handover: Cell<bool>,
    /// Why it was not offloaded when it was due.
    fallback_reason: Cell<Option<FallbackReason>>,
    /// What it has been told and has not done yet.
    actions: Cell<Actions>,
    waker: RefCell<Option<Waker>>,
}

impl Connection {
    pub(crate) fn new(
        listener: Arc<BoundListener>,
        downstream: SocketAddr,
        worker: usize,
        sweep: u32,
    ) -> Self {
        listener.counters.of(worker).accepted.add(1);
        let serving = listener.serving.load_full();
        let record = Record {
            listener: Arc::clone(&listener),
            serving: Arc::clone(&serving),
            downstream,
            upstream: None,
            upstream_local: None,
            tier: match serving.listener.settings.datapath {
                Datapath::Auto | Datapath::Splice | Datapath::Tc | Datapath::Sockmap | Datapath::Direct => {
                    Tier::Splice
                }
                Datapath::Copy => Tier::Copy,
            },
            removal: RemovalWatch::default(),
            slot: worker,
            opened: Instant::now(),
            received: 0,
            sent: 0,
            end: End::Drained,
            is_moved: false,
        };
        Self {
            record: RefCell::new(Some(record)),
            listener,
            serving,
            downstream,
            received: Cell::new(0),
            sent: Cell::new(0),
            active: Cell::new(sweep),
            half_closed: Cell::new(false),
            blind: Cell::new(false),
            keepalive_from: Cell::new(None),
            offload_at: Cell::new(None),
            offload_from: Cell::new(None),
            first_sent: [const { Cell::new(None) }; 2],
            clocks: <[Cell<Clock>; 2]>::default(),
            refused: Cell::new(0),
            silences: <[Cell<Silence>; 2]>::default(),
            is_in_handover: Cell::new(false),
            fallback_reason: Cell::new(None),
            actions: Cell::default(),
            waker: RefCell::new(None),
        }
    }

    /// Tells the connection's task to do something the next time that it runs, which is soon.
    pub(crate) fn ask_for(&self, action: Action) {
        self.actions.set(self.actions.get().with(action));
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// What is due for a connection at this sweep, given how long a sweep takes, and how long a peer may say nothing.
    pub(crate) fn due(&self, sweep: u32, period: Duration, patience: Option<Duration>) -> Option<Action> {
        if self.record.borrow_mut().as_mut().is_some_and(Record::is_removed) {
            return Some(Action::End(End::Removed));
        }
        let settings = &self.serving.listener.settings;
        let idle = period * sweep.wrapping_sub(self.active.get());
        let over = |timeout: Option<Duration>| timeout.is_some_and(|timeout| idle >= timeout);
        if self.half_closed.get() && over(settings.half_closed_timeout) {
            return Some(Action::End(End::HalfClosedTimeout));
        }
        if over(settings.idle_timeout) {
            return Some(Action::End(End::IdleTimeout));
        }
        if self.keepalive_from.get().is_some_and(|from| sweep.wrapping_sub(from) < u32::MAX / 2) {
            self.keepalive_from.set(None);
            return Some(Action::KeepAlive);
        }
        if self.offload_from.get().is_some_and(|from| sweep.wrapping_sub(from) < u32::MAX / 2) {
            self.offload_from.set(None);
            return Some(Action::Offload);
        }
        (self.blind.get() || patience.is_some_and(|patience| self.is_looked_at(sweep, period, patience)))
            .then_some(Action::CheckReset)
    }

    /// Whether it is this connection's turn to have its peers looked at: a few times in the time that they may say nothing, and not
    /// all connections at once.
    fn is_looked_at(&self, sweep: u32, period: Duration, patience: Duration) -> bool {
        let turns = patience.as_millis() / LOOKS / period.as_millis().max(1);
        let turns = u32::try_from(turns).unwrap_or(u32::MAX).max(1);
        sweep.wrapping_add(self.downstream.port().into()).is_multiple_of(turns)
    }

    /// Has the connection offloaded as soon as it can be, if it ever is.
    pub(crate) fn offload_now(&self) {
        if self.offload_at.get().is_some() {
            self.ask_for(Action::Offload);
        }
    }

    /// Takes the record out: the connection is the kernel's.
    fn hand_over(&self) -> Option<Record> {
        self.record.borrow_mut().take()
    }

    fn set_end(&self, end: End) {
        if let Some(record) = self.record.borrow_mut().as_mut() {
            record.end = end;
        }
    }

    /// Has `cx` run again when there is an action for it.
    fn listen(&self, cx: &Context<'_>) {
        let mut waker = self.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
    }

    /// How many bytes the sockets have passed on, from the client and from the endpoint.
    fn relayed(&self) -> [u64; 2] {
        [self.received.get(), self.sent.get()]
    }

    /// Counts bytes as they move, for the listener, the backend and the connection.
    fn count(&self, received: Moved, sent: Moved, context: &WorkerContext) {
        let up: u64 = received.bytes.iter().sum();
        let down: u64 = sent.bytes.iter().sum();
        for fallback in [received.fallback, sent.fallback].into_iter().flatten() {
            context.counters().fallbacks[fallback as usize].add(1);
            tracing::debug!(
                listener = %self.serving.listener.name,
                reason = fallback.as_str(),
                "bytes are copied instead of spliced"
            );
        }
        if up + down == 0 {
            return;
        }
        self.active.set(context.sweep());
        if let Some(record) = self.record.borrow_mut().as_mut() {
            record.count(received, sent);
            self.received.set(record.received);
            self.sent.set(record.sent);
        }
    }

    /// When it was accepted: `CLOCK_MONOTONIC` in nanoseconds.
    fn opened_at(&self) -> u64 {
        self.record.borrow().as_ref().map_or_else(monotonic, Record::opened_at)
    }

    /// How many bytes have moved.
    fn moved(&self) -> u64 {
        self.relayed().iter().sum()
    }
}

/// Serves one accepted connection to its end, or until the kernel has taken it over. Its sockets close with a reset unless both
/// directions have ended: see [`reset_on_close`](crate::relay::reset_on_close).
pub(crate) async fn serve(context: &WorkerContext, downstream: TcpStream, connection: Rc<Connection>) {
    let end = match choose(&connection) {
        Ok(upstream) => forward(context, &downstream, upstream, &connection).await,
        Err(end) => Some(end),
    };
    let Some(end) = end else { return };
    connection.set_end(end);
    if end == End::Finished {
        deliver_on_close(&downstream);
    }
}

/// Chooses the backend of a new connection.
fn choose(connection: &Connection) -> Result<Arc<Upstream>, End> {
    let serving = &connection.serving;
    // Where no program looks at its SYN.
    if serving.listener.settings.client_cidrs.refusing(connection.downstream.ip().to_canonical()).is_some() {
        return Err(End::ClientDenied);
    }
    if serving.listener.route.is_none() {
        return Err(End::NoRoute);
    }
    let turn = connection.listener.turn.fetch_add(1, Ordering::Relaxed);
    let chosen = serving.balancer.pick(turn).ok_or(End::NoDestination)?;
    serving.upstreams.get(chosen).and_then(Clone::clone).ok_or(End::InvalidBackend)
}

/// Connects an endpoint and moves bytes until both directions have ended; `None` once the kernel does.
async fn forward(
    context: &WorkerContext,
    downstream: &TcpStream,
    backend: Arc<Upstream>,
    connection: &Connection,
) -> Option<End> {
    let settings = &connection.serving.listener.settings;
    let connected =
        upstream::connect(&backend, &context.settings().connect, settings.connect_timeout, context.index());
    let connected = tokio::select! {
        biased;
        end = connection.asked_to_end() => return Some(end),
        connected = Box::pin(connected) => connected,
    };
    let (upstream, endpoint) = match connected {
        Ok(connected) => connected,
        Err(None) => return Some(End::NoEndpoints),
        Err(Some(failure)) => {
            log_connect_failure(&backend, failure);
            return Some(End::ConnectFailed);
        }
    };
    backend.counters.of(context.index()).connected.add(1);
    connection.active.set(context.sweep());
    connection.keepalive_from.set(Some(context.sweep().wrapping_add(KEEPALIVE_AFTER_SWEEPS)));
    if let Some(record) = connection.record.borrow_mut().as_mut() {
        record.upstream = Some((backend, endpoint));
        // Short connections are spared the system call where nobody reads of it.
        if tracing::enabled!(target: "access", tracing::Level::DEBUG) {
            record.upstream_local = upstream.local_addr().ok();
        }
    }
    let end = carry(context, downstream, &upstream, settings.datapath, connection).await;
    if end == Some(End::Finished) {
        deliver_on_close(&upstream);
    }
    end
}

/// Moves the bytes of a pair until its end, or until the kernel does, by the tier that is wanted or the next one that
/// works.
async fn carry(
    context: &WorkerContext,
    downstream: &TcpStream,
    upstream: &TcpStream,
    datapath: Datapath,
    connection: &Connection,
) -> Option<End> {
    let tier = match datapath {
        Datapath::Auto | Datapath::Splice | Datapath::Tc | Datapath::Sockmap | Datapath::Direct => {
            Tier::Splice
        }
        Datapath::Copy => Tier::Copy,
    };
    let mut relay = Relay::new(tier, context, connection, [downstream, upstream]);
    match datapath {
        Datapath::Auto | Datapath::Tc | Datapath::Sockmap | Datapath::Direct => offload::carry(relay).await,
        Datapath::Splice | Datapath::Copy => Some(poll_fn(|cx| relay.poll(cx)).await),
    }
}

fn log_connect_failure(backend: &Upstream, failure: ConnectFailure) {
    tracing::debug!(backend = %backend.key, reason = failure.as_str(), "no endpoint could be connected");
}
