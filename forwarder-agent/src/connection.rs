//! One accepted connection: chosen a backend, connected, relayed, recorded.

use std::cell::{Cell, OnceCell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::counters::{ConnectFailure, Counter, End};
use crate::listener::{BoundListener, Serving};
use crate::model::Datapath;
use crate::relay::{Direction, Fault, Moved, Tier};
use crate::upstream::{self, Upstream};
use crate::worker::Worker;

/// After how many sweeps a connection is no longer a short one.
const KEEPALIVE_AFTER_SWEEPS: u32 = 4;

/// A live connection as its worker sees it. When it is dropped, its end is counted and logged: exactly once.
#[derive(Debug)]
pub(crate) struct Connection {
    listener: Arc<BoundListener>,
    serving: Arc<Serving>,
    downstream: SocketAddr,
    upstream: OnceCell<(Arc<Upstream>, SocketAddr)>,
    worker: usize,
    opened: Instant,
    received: Cell<u64>,
    sent: Cell<u64>,
    end: Cell<End>,
    /// The sweep during which a byte last moved.
    active: Cell<u32>,
    half_closed: Cell<bool>,
    /// A direction is not reading, so only [`Order::Look`] would find a reset.
    blind: Cell<bool>,
    /// The sweep from which on the upstream side wants keepalive; `None` once it has it.
    keepalive_from: Cell<Option<u32>>,
    order: Cell<Option<Order>>,
    waker: RefCell<Option<Waker>>,
}

/// What a worker wants of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// See whether a peer has reset a side that is not being read.
    Look,
    /// Set keepalive on the upstream side: short connections are spared the system calls.
    KeepAlive,
    /// Reset both sides.
    End(End),
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
        Self {
            listener,
            serving,
            downstream,
            upstream: OnceCell::new(),
            worker,
            opened: Instant::now(),
            received: Cell::new(0),
            sent: Cell::new(0),
            end: Cell::new(End::Drained),
            active: Cell::new(sweep),
            half_closed: Cell::new(false),
            blind: Cell::new(false),
            keepalive_from: Cell::new(None),
            order: Cell::new(None),
            waker: RefCell::new(None),
        }
    }

    /// Tells the connection's task to do something the next time that it runs, which is soon.
    pub(crate) fn order(&self, order: Order) {
        self.order.set(Some(order));
        if let Some(waker) = self.waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// What is due for a connection at this sweep, given how long a sweep takes.
    pub(crate) fn due(&self, sweep: u32, period: Duration) -> Option<Order> {
        let settings = &self.serving.listener.settings;
        let idle = period * sweep.wrapping_sub(self.active.get());
        let over = |timeout: Option<Duration>| timeout.is_some_and(|timeout| idle >= timeout);
        if self.half_closed.get() && over(settings.half_closed_timeout) {
            return Some(Order::End(End::HalfClosedTimeout));
        }
        if over(settings.idle_timeout) {
            return Some(Order::End(End::IdleTimeout));
        }
        if self.keepalive_from.get().is_some_and(|from| sweep.wrapping_sub(from) < u32::MAX / 2) {
            self.keepalive_from.set(None);
            return Some(Order::KeepAlive);
        }
        self.blind.get().then_some(Order::Look)
    }

    /// Counts bytes as they move, for the listener, the backend and the connection.
    fn count(&self, received: Moved, sent: Moved, worker: &Worker) {
        let up: u64 = received.bytes.iter().sum();
        let down: u64 = sent.bytes.iter().sum();
        for fallback in [received.fallback, sent.fallback].into_iter().flatten() {
            worker.counters().fallbacks[fallback as usize].add(1);
            tracing::debug!(
                listener = %self.serving.listener.name,
                reason = fallback.as_str(),
                "bytes are copied instead of spliced"
            );
        }
        if up + down == 0 {
            return;
        }
        self.active.set(worker.sweep());
        let counters = self.listener.counters.of(self.worker);
        let add = |counters: &[Counter], moved: Moved| {
            for (counter, bytes) in counters.iter().zip(moved.bytes) {
                counter.add(bytes);
            }
        };
        add(&counters.received_bytes, received);
        add(&counters.sent_bytes, sent);
        if let Some((upstream, _)) = self.upstream.get() {
            let counters = upstream.counters.of(self.worker);
            counters.received_bytes.add(up);
            counters.sent_bytes.add(down);
        }
        self.received.set(self.received.get() + up);
        self.sent.set(self.sent.get() + down);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let end = self.end.get();
        self.listener.counters.of(self.worker).ended[end as usize].add(1);
        let upstream = self.upstream.get();
        if let Some((upstream, _)) = upstream {
            upstream.counters.of(self.worker).ended.add(1);
        }
        tracing::debug!(
            target: "access",
            listener = %self.serving.listener.name,
            route = self.serving.listener.route.as_ref().map(|route| tracing::field::display(&route.name)),
            backend = upstream.map(|(upstream, _)| tracing::field::display(&upstream.key)),
            endpoint = upstream.map(|(_, endpoint)| tracing::field::display(endpoint)),
            downstream.addr = %self.downstream,
            bytes_rx = self.received.get(),
            bytes_tx = self.sent.get(),
            duration_ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX),
            end = end.as_str(),
            "connection ended"
        );
    }
}

/// Serves one accepted connection to its end.
pub(crate) async fn serve(worker: Rc<Worker>, downstream: TcpStream, connection: Rc<Connection>) {
    let end = match choose(&connection) {
        Ok(upstream) => forward(&worker, &downstream, upstream, &connection).await,
        Err(end) => end,
    };
    connection.end.set(end);
    // The side that was reset is closed already.
    if !matches!(end, End::Finished | End::DownstreamReset) {
        reset(&downstream);
    }
}

/// Chooses the backend of a new connection.
fn choose(connection: &Connection) -> Result<Arc<Upstream>, End> {
    let serving = &connection.serving;
    if serving.listener.route.is_none() {
        return Err(End::NoRoute);
    }
    let turn = connection.listener.turn.fetch_add(1, Ordering::Relaxed);
    let chosen = serving.balancer.pick(turn).ok_or(End::NoDestination)?;
    serving.upstreams.get(chosen).and_then(Clone::clone).ok_or(End::InvalidBackend)
}

/// Connects an endpoint and relays until both directions have ended.
async fn forward(
    worker: &Worker,
    downstream: &TcpStream,
    backend: Arc<Upstream>,
    connection: &Connection,
) -> End {
    let settings = &connection.serving.listener.settings;
    let connected =
        upstream::connect(&backend, &worker.settings().connect, settings.connect_timeout, connection.worker);
    let (upstream, endpoint) = match Box::pin(connected).await {
        Ok(connected) => connected,
        Err(None) => return End::NoEndpoints,
        Err(Some(failure)) => {
            log_connect_failure(&backend, failure);
            return End::ConnectFailed;
        }
    };
    backend.counters.of(connection.worker).connected.add(1);
    connection.active.set(worker.sweep());
    connection.keepalive_from.set(Some(worker.sweep().wrapping_add(KEEPALIVE_AFTER_SWEEPS)));
    // Set once, before anything is counted: the cell is empty.
    let _ = connection.upstream.set((backend, endpoint));
    let tier = match settings.datapath {
        Datapath::Auto | Datapath::Splice => Tier::Splice,
        Datapath::Copy => Tier::Copy,
    };
    let end = relay(worker, downstream, &upstream, tier, connection).await;
    if !matches!(end, End::Finished | End::UpstreamReset) {
        reset(&upstream);
    }
    end
}

fn log_connect_failure(backend: &Upstream, failure: ConnectFailure) {
    tracing::debug!(backend = %backend.key, reason = failure.as_str(), "no endpoint could be connected");
}

/// Relays both directions until both have ended, one has failed, or the worker says so.
async fn relay(
    worker: &Worker,
    downstream: &TcpStream,
    upstream: &TcpStream,
    tier: Tier,
    connection: &Connection,
) -> End {
    let mut request = Direction::new(tier);
    let mut response = Direction::new(tier);
    let mut first = true;
    poll_fn(|cx| {
        {
            let mut waker = connection.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        match connection.order.take() {
            Some(Order::End(end)) => return Poll::Ready(end),
            Some(Order::Look) if has_failed(downstream) => return Poll::Ready(End::DownstreamReset),
            Some(Order::Look) if has_failed(upstream) => return Poll::Ready(End::UpstreamReset),
            Some(Order::KeepAlive) => set_keepalive(upstream, worker),
            Some(Order::Look) | None => {}
        }
        let (mut received, mut sent) = (Moved::default(), Moved::default());
        let (up, down) = {
            let mut shared = worker.shared();
            (
                request.poll(cx, downstream, upstream, &mut shared, &mut received),
                response.poll(cx, upstream, downstream, &mut shared, &mut sent),
            )
        };
        connection.count(received, sent, worker);
        if first {
            first = false;
            // Nothing was sent that would have carried it.
            if connection.received.get() == 0 {
                upstream::send_ack(upstream);
            }
        }
        connection.half_closed.set(request.is_done() != response.is_done());
        connection.blind.set(!(request.is_reading() && response.is_reading()));
        match (up, down) {
            (Poll::Ready(Err(Fault::Source(error))), _)
            | (_, Poll::Ready(Err(Fault::Destination(error)))) => {
                tracing::trace!(downstream.addr = %connection.downstream, %error, "client side failed");
                Poll::Ready(End::DownstreamReset)
            }
            (Poll::Ready(Err(Fault::Destination(error))), _)
            | (_, Poll::Ready(Err(Fault::Source(error)))) => {
                tracing::trace!(downstream.addr = %connection.downstream, %error, "endpoint side failed");
                Poll::Ready(End::UpstreamReset)
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Finished),
            (Poll::Pending, _) | (_, Poll::Pending) => Poll::Pending,
        }
    })
    .await
}

fn set_keepalive(upstream: &TcpStream, worker: &Worker) {
    let Some(idle) = worker.settings().connect.keepalive else { return };
    if let Err(error) = SockRef::from(upstream).set_tcp_keepalive(&upstream::keepalive(idle)) {
        tracing::debug!(%error, "cannot set keepalive on the upstream side");
    }
}

/// Whether the peer has reset the connection; tells even where nobody reads the socket.
fn has_failed(stream: &TcpStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut polled, Some(&now)) {
        Ok(ready) => ready > 0 && polled.iter().any(|fd| fd.revents().contains(PollFlags::ERR)),
        Err(_) => false,
    }
}

/// Makes the close of `stream`, which follows, a reset: the peer must not take a cut stream for a whole one.
fn reset(stream: &TcpStream) {
    // Fails only on a socket that is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}
