//! The way of a connection to tier `tc`: how both sides are joined, how their last bytes leave userspace, and the way back.

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::pin;
use std::time::{Duration, Instant};

use forwarder_common::flow::{DIRECTION_REQUEST, DIRECTION_RESPONSE, Pair};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::time::sleep;

use super::Connection;
use super::attempt::Attempt;
use super::probation::{self, Heard, Probation};
use super::relaying::Relay;
use crate::counters::End;
use crate::offload::tc::{Asked, Offloader, reset_by_end};
use crate::relay::{Direction, Tier};
use crate::upstream;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::flows::JoinPermit;
use forwarder_kernel::flows::joined_pair::JoinedPair;
use forwarder_kernel::maps::DatapathError;
use forwarder_kernel::net::egress_path::EgressPath;
use forwarder_kernel::tcp::leg::{self, Inbound, Leg, Relayed};
use forwarder_kernel::tcp::timestamp_clock::Clock;
use forwarder_runtime::failpoint;

/// How often it is looked whether the sockets of a joined pair have delivered what they had: at first, and after a while.
const CHECK: Duration = Duration::from_millis(3);
const SLOW_CHECK: Duration = Duration::from_millis(50);
/// For how long the first of them.
const CHECKED_OFTEN: Duration = Duration::from_millis(200);
/// What may be on its way through userspace as the handover begins, even where that is most of the receiver's window.
const SMALL_REMAINDER: u64 = 16 << 10;
/// The largest window that TCP can announce (RFC 7323, 2.3), in bytes.
const LARGEST_WINDOW: u32 = 1 << 30;

/// Joins the two sides at TC, and hands them over once what their sockets had received before has been delivered.
pub(super) async fn attempt(offloader: &Offloader, relay: &mut Relay<'_>) -> Attempt {
    let Relay { context, connection, downstream, upstream, .. } = *relay;
    let Ok(local) = downstream.local_addr() else { return Attempt::Refused(FallbackReason::Ended) };
    let permit = tokio::select! {
        biased;
        permit = offloader.flows.ready(connection.downstream, local) => permit,
        // What is not relayed meanwhile would be all the more to deliver afterwards.
        end = poll_fn(|cx| relay.poll(cx)) => return Attempt::Ended(end),
    };
    // An end may have been passed on while it waited.
    if !relay.is_open() {
        return Attempt::Refused(FallbackReason::Ended);
    }
    let (pair, inbound) = match join(offloader, &permit, relay) {
        Ok(joined) => joined,
        Err(fallback_reason) => return Attempt::Refused(fallback_reason),
    };
    failpoint::block("join.pair_written");
    drop(permit);
    context.counters().offloaded.add(1);
    let sockets = [downstream, upstream];
    let joined = Joined { offloader, pair: Some(pair), connection, sockets, inbound };
    connection.is_in_handover.set(true);
    let delivery = deliver(joined, relay).await;
    connection.is_in_handover.set(false);
    match delivery {
        Delivery::Delivered => Attempt::HandedOver,
        Delivery::Ended(end) => Attempt::Ended(end),
        Delivery::TakenBack => Attempt::Refused(FallbackReason::PathBroken),
    }
}

/// Reads both sides and joins them in the kernel. Yields where the streams begin that the sockets receive, too.
fn join(
    offloader: &Offloader,
    permit: &JoinPermit,
    relay: &Relay<'_>,
) -> Result<(JoinedPair, [Inbound; 2]), FallbackReason> {
    let Relay { connection, downstream, upstream, .. } = *relay;
    let leg = |socket: &TcpStream, written: u64, first_sent: &Cell<Option<u32>>, clock: &Cell<Clock>| {
        let clock_offset = clock.get().offset().ok_or(FallbackReason::Unreadable)?;
        let relayed = Relayed { written, kept: 0, first_sent: first_sent.get() };
        let leg = Leg::read(socket, relayed, clock_offset).map_err(|error| {
            if error.kind() == std::io::ErrorKind::NotConnected {
                return FallbackReason::Ended;
            }
            tracing::debug!(downstream.addr = %connection.downstream, %error, "cannot read the state of a connection: it stays in userspace");
            FallbackReason::Unreadable
        })?;
        first_sent.set(Some(leg.first_sent));
        Ok(leg)
    };
    failpoint::block("join.begin");
    let [to_downstream, to_upstream] = &connection.first_sent;
    let [downstream_clock, upstream_clock] = &connection.clocks;
    let down = leg(downstream, connection.sent.get(), to_downstream, downstream_clock)?;
    failpoint::block("join.downstream_read");
    let up = leg(upstream, connection.received.get(), to_upstream, upstream_clock)?;
    failpoint::block("join.upstream_read");
    for (from, to, relayed) in [(&down, &up, connection.received.get()), (&up, &down, connection.sent.get())]
    {
        // What is held must lie within the receiver's window, or it stays here for as long as the receiver does not read. And the
        // receiver drops what comes beyond its window while the remainder is on its way: it would be sent again only after a
        // time-out.
        let remainder = from.received.saturating_sub(relayed) + u64::from(to.unacknowledged);
        let window = u64::from(to.send_window);
        if remainder > window || remainder > SMALL_REMAINDER.max(window / 2) {
            return Err(FallbackReason::SlowReceiver);
        }
    }
    let pair = offloader.flows.join(permit, connection.opened_at(), &down, &up)?;
    Ok((pair, [down.inbound(), up.inbound()]))
}

/// How a handover ended.
enum Delivery {
    /// The pair is the kernel's, the sockets are gone.
    Delivered,
    /// The connection has ended meanwhile.
    Ended(End),
    /// What was redirected did not arrive; the connection goes on in userspace.
    TakenBack,
}

/// A joined pair that is taken out of the kernel unless it is handed over.
struct Joined<'a> {
    offloader: &'a Offloader,
    pair: Option<JoinedPair>,
    connection: &'a Connection,
    /// Those towards the client and towards the endpoint.
    sockets: [&'a TcpStream; 2],
    /// Where the streams begin that they receive.
    inbound: [Inbound; 2],
}

impl Joined<'_> {
    /// Ends the pair from outside: its sockets do not know the numbers that its ends expect.
    fn abort(&mut self) {
        self.count();
        if let Some(pair) = self.pair.take() {
            self.offloader.pairs.reset_joined(&pair);
        }
    }

    /// Has nothing less acknowledged than the sockets have: until now packets of before may have reached them, of which the
    /// snapshots do not know.
    fn promise(&mut self) -> Result<(), DatapathError> {
        let Some(pair) = &mut self.pair else { return Ok(()) };
        let next = |side: usize| self.inbound[side].next(self.sockets[side]);
        // A socket that is gone tells so elsewhere.
        let (Ok(to_client), Ok(to_endpoint)) = (next(0), next(1)) else { return Ok(()) };
        self.offloader.flows.promise(pair, [to_client, to_endpoint])
    }

    /// Counts what the kernel has forwarded of a connection that ends now, of which nobody else will: what its ends have sent
    /// that no socket has received.
    fn count(&self) {
        let state = self.pair.as_ref().and_then(|pair| self.offloader.flows.pair(pair.number));
        let record = &mut *self.connection.record.borrow_mut();
        let received = |side: usize| self.inbound[side].received(self.sockets[side]);
        let (Ok(from_client), Ok(from_endpoint)) = (received(0), received(1)) else { return };
        let (Some(state), Some(record)) = (state, record) else { return };
        record.count_forwarded(
            record.received + state.request.bytes.saturating_sub(from_client),
            record.sent + state.response.bytes.saturating_sub(from_endpoint),
        );
    }
}

impl Drop for Joined<'_> {
    fn drop(&mut self) {
        if let Some(pair) = &self.pair {
            self.offloader.flows.remove(pair);
        }
    }
}

/// Relays what the sockets of a joined pair had received before, until nothing is left of it, and the two ends have heard
/// each other.
async fn deliver(mut joined: Joined<'_>, relay: &mut Relay<'_>) -> Delivery {
    let Relay { context, connection, downstream, upstream, .. } = *relay;
    let offloader = joined.offloader;
    let started = Instant::now();
    let mut landed = pin!(offloader.grace.period());
    let mut has_landed = false;
    let mut probation = None;
    let mut asked = Asked::default();
    let mut seen = 0;
    relay.hold_ends(true);
    failpoint::reached("handover.begin").await;
    loop {
        let check = if started.elapsed() < CHECKED_OFTEN { CHECK } else { SLOW_CHECK };
        tokio::select! {
            biased;
            end = poll_fn(|cx| relay.poll(cx)) => {
                // What the sockets say from now on is the stack's again; but they do not know what the kernel has passed.
                if end == End::Finished {
                    joined.count();
                } else {
                    joined.abort();
                }
                return Delivery::Ended(end);
            }
            () = &mut landed, if !has_landed => {
                has_landed = true;
                if let Err(error) = joined.promise() {
                    tracing::warn!(%error, "cannot note the timestamps that a peer has seen: it may ignore acknowledgements for a while, and retransmit");
                }
            }
            () = sleep(check) => {}
        }
        let Some(pair) = &mut joined.pair else { return Delivery::Ended(End::Finished) };
        let Some(state) = offloader.flows.pair(pair.number) else {
            return Delivery::Ended(End::Lost);
        };
        let bytes = state.request.bytes.wrapping_add(state.response.bytes);
        if bytes != seen {
            seen = bytes;
            connection.active.set(context.sweep());
        }
        if let Some(end) = reset_by_end(&state) {
            // The other end may have taken it for one beyond what it has received so far.
            joined.abort();
            silence(downstream, upstream);
            return Delivery::Ended(end);
        }
        offloader.pairs.ask(pair, &mut asked, &state);
        if !has_landed {
            continue;
        }
        failpoint::reached("handover.landed").await;
        if let Err(error) = pass_ends_on(offloader, pair, relay) {
            tracing::warn!(%error, "cannot pass on the end of a stream: the connection is reset");
            joined.abort();
            return Delivery::Ended(End::Lost);
        }
        // Where each end has acknowledged the other's end, nothing is missing. What the sockets still want to say of it, which the
        // egress program holds back, nobody needs: they would try for minutes, and hold the addresses against a new connection.
        let has_ended = state.has_ended(&pair.flows[0].1);
        let is_delivered = || {
            relay.is_delivered()
                && is_delivered(downstream, &relay.request)
                && is_delivered(upstream, &relay.response)
        };
        if !has_ended && !is_delivered() {
            continue;
        }
        let heard =
            if has_ended { Heard::Both } else { evaluate(&mut probation, relay, offloader, pair, &state) };
        match heard {
            Heard::Both => {}
            Heard::Waiting => continue,
            Heard::Blackholed(path) => {
                if takes_another_path(offloader, pair, path, connection) {
                    if let Some(probation) = &mut probation {
                        Probation::restart(probation, &state);
                    }
                    continue;
                }
                failpoint::reached("take_back.begin").await;
                if let Err(end) = take_back(&mut joined).await {
                    return Delivery::Ended(end);
                }
                context.counters().taken_back.add(1);
                relay.hold_ends(false);
                return Delivery::TakenBack;
            }
            Heard::OneWay(path) => {
                if takes_another_path(offloader, pair, path, connection) {
                    if let Some(probation) = &mut probation {
                        Probation::restart(probation, &state);
                    }
                    continue;
                }
                joined.abort();
                return Delivery::Ended(End::Lost);
            }
        }
        failpoint::reached("complete.before").await;
        if let Err(error) = offloader.flows.complete(pair) {
            tracing::warn!(%error, "cannot complete the handover of a connection to the kernel: it is reset");
            joined.abort();
            return Delivery::Ended(End::Lost);
        }
        failpoint::reached("complete.after").await;
        silence(downstream, upstream);
        failpoint::reached("complete.silenced").await;
        tracing::debug!(
            listener = %connection.serving.listener.name,
            downstream.addr = %connection.downstream,
            handover_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "offloaded"
        );
        if let (Some(pair), Some(mut record)) = (joined.pair.take(), connection.hand_over()) {
            record.tier = Tier::Tc;
            offloader.pairs.add(&pair, record);
        }
        failpoint::reached("complete.handed_over").await;
        return Delivery::Delivered;
    }
}

/// Whether the two ends of a pair hear each other, for all that is known of its paths and of what it has moved since its sockets have
/// delivered everything.
fn evaluate(
    probation: &mut Option<Probation>,
    relay: &Relay<'_>,
    offloader: &Offloader,
    pair: &JoinedPair,
    state: &Pair,
) -> Heard {
    let [request, response] = pair.flows.map(|(_, flow)| EgressPath::of(&flow));
    let paths = [response, request];
    if offloader.flows.paths().is_proven(paths) {
        return Heard::Both;
    }
    let Some(probation) = probation else {
        let room = [relay.downstream, relay.upstream].map(|socket| {
            // What they have not acknowledged yet, they do now: later, it could be taken for an acknowledgement that was redirected.
            upstream::send_ack(socket);
            // No window is larger than the buffer.
            let buffer = SockRef::from(socket).recv_buffer_size();
            buffer
                .ok()
                .and_then(|size| u32::try_from(size).ok())
                .unwrap_or(LARGEST_WINDOW)
                .min(LARGEST_WINDOW)
        });
        *probation = Some(Probation::new(room));
        return Heard::Waiting;
    };
    let heard = probation.evaluate(pair, state, relay.connection.relayed(), Instant::now());
    if heard == Heard::Both {
        offloader.flows.paths().prove(paths);
    }
    heard
}

/// Leaves the packets of a pair, of which nothing has arrived, to the local sockets again.
///
/// # Errors
/// How the connection ends, because one end has heard the other until just now: the sockets do not know of what.
async fn take_back(joined: &mut Joined<'_>) -> Result<(), End> {
    let offloader = joined.offloader;
    let Some(pair) = &joined.pair else { return Ok(()) };
    offloader.flows.release(pair);
    // Whatever is redirected still is noted after that.
    offloader.grace.period().await;
    let Some(state) = offloader.flows.pair(pair.number) else { return Ok(()) };
    let lost = probation::is_heard(pair, &state, joined.connection.relayed()).then_some(End::Lost);
    match reset_by_end(&state).or(lost) {
        Some(end) => {
            joined.count();
            let [downstream, upstream] = joined.sockets;
            silence(downstream, upstream);
            if let Some(pair) = joined.pair.take() {
                offloader.pairs.reset_released(&pair);
            }
            Err(end)
        }
        None => Ok(()),
    }
}

/// Avoids a path for this client for a while; whether the pair that has found out takes another one.
fn takes_another_path(
    offloader: &Offloader,
    pair: &mut JoinedPair,
    path: EgressPath,
    connection: &Connection,
) -> bool {
    if offloader.flows.paths().avoid(path, connection.downstream.ip()) {
        tracing::warn!(
            interface = path.interface,
            via = path.via.as_str(),
            client = %connection.downstream.ip(),
            "packets sent by this interface do not arrive: for a while this client avoids it, or all clients do if several are affected"
        );
    }
    offloader.flows.change_paths(pair).unwrap_or_else(|error| {
        tracing::warn!(
            listener = %connection.serving.listener.name,
            downstream.addr = %connection.downstream,
            %error,
            "packets of a connection do not arrive, and there is no other path: the connection may hang; `forwarder conns reset` ends it"
        );
        false
    })
}

/// Passes on the ends that reached a local socket before the handover.
fn pass_ends_on(
    offloader: &Offloader,
    pair: &mut JoinedPair,
    relay: &mut Relay<'_>,
) -> Result<(), DatapathError> {
    for (direction, number) in
        [(&mut relay.request, DIRECTION_REQUEST), (&mut relay.response, DIRECTION_RESPONSE)]
    {
        if direction.is_at_end() && direction.holds_end() {
            offloader.flows.pass_end_on(pair, number)?;
            direction.hold_end(false);
        }
    }
    Ok(())
}

/// Whether a socket, which `direction` reads, has nothing left to do.
fn is_delivered(socket: &TcpStream, direction: &Direction) -> bool {
    // A socket that cannot be asked is asked again.
    leg::remainder(socket).is_ok_and(|left| left.is_empty && (direction.is_done() || !left.has_ended))
}

/// Makes the closes that follow silent: the connection is the kernel's, or gone.
fn silence(downstream: &TcpStream, upstream: &TcpStream) {
    for socket in [downstream, upstream] {
        if let Err(error) = leg::silence(socket) {
            tracing::debug!(%error, "cannot silence a socket before it is closed: it may send a reset");
        }
        failpoint::block("silence.downstream");
    }
}
