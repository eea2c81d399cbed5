//! The way of a connection into the kernel: when it is due, which tiers are tried, and what becomes of it where none takes it.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use tokio::net::TcpStream;

use super::relaying::Relay;
use super::{Connection, clocks, insertion, tail};
use crate::counters::End;
use crate::datapath::flows::FlowTable;
use crate::model::Datapath;
use crate::promote::Refusal;
use crate::relay::Tier;
use crate::worker::Worker;

/// After how many more bytes, and after how many sweeps, a connection that could not be promoted is tried again.
const RETRY_BYTES: u64 = 1 << 20;
const RETRY_SWEEPS: u32 = 4;
/// How often that doubles for a reason that lasts.
const DOUBLINGS: u32 = 4;

/// What became of an attempt to take a connection into the kernel.
pub(super) enum Attempt {
    /// It is the kernel's, or looked after elsewhere.
    HandedOver,
    /// It has ended meanwhile.
    Ended(End),
    /// It stays where it is.
    Refused(Refusal),
}

/// Relays until the connection is due, joins its two sides, and hands it over to the kernel (`None`), or relays it to its
/// end where that cannot be.
pub(super) async fn carry(
    worker: &Worker,
    mut relay: Relay,
    downstream: &TcpStream,
    upstream: &TcpStream,
    connection: &Connection,
) -> Option<End> {
    let tier = match connection.serving.listener.settings.datapath {
        Datapath::Auto | Datapath::Tc | Datapath::Splice | Datapath::Copy => Tier::Tc,
        Datapath::Sockmap => Tier::Sockmap,
    };
    let after = worker.settings().promote_after;
    let bytes = if worker.promotes_all() { 0 } else { after.bytes.unwrap_or(u64::MAX) };
    connection.promote_at.set(Some(bytes));
    connection.promote_from.set(after.sweeps.map(|sweeps| worker.sweep().wrapping_add(sweeps)));
    if let Err(refusal) = is_offered(tier, worker)
        && !refusal.may_pass()
    {
        refuse(worker, connection, refusal);
        return Some(poll_fn(|cx| relay.poll(cx, worker, downstream, upstream, connection)).await);
    }
    loop {
        let until_due = poll_fn(|cx| match relay.poll(cx, worker, downstream, upstream, connection) {
            // An end that was passed on counts among the numbers of a leg, and little is left to gain.
            Poll::Pending if relay.is_open() && is_due(connection) => Poll::Ready(None),
            polled => polled.map(Some),
        });
        if let Some(end) = until_due.await {
            return Some(end);
        }
        match attempt(tier, worker, &mut relay, downstream, upstream, connection).await {
            Attempt::HandedOver => return None,
            Attempt::Ended(end) => return Some(end),
            Attempt::Refused(refusal) => refuse(worker, connection, refusal),
        }
    }
}

async fn attempt(
    tier: Tier,
    worker: &Worker,
    relay: &mut Relay,
    downstream: &TcpStream,
    upstream: &TcpStream,
    connection: &Connection,
) -> Attempt {
    if let Err(refusal) = is_offered(tier, worker) {
        return Attempt::Refused(refusal);
    }
    let settings = worker.settings();
    match (tier, &settings.promoter, settings.sockmap.get()) {
        (Tier::Tc, Some(promoter), _) => {
            if connection.refused.get() > 0
                && let Err(refusal) = check_ways(&promoter.flows, downstream, upstream)
            {
                return Attempt::Refused(refusal);
            }
            if let Err(attempt) = clocks::learn(worker, relay, downstream, upstream, connection).await {
                return attempt;
            }
            tail::attempt(promoter, worker, relay, downstream, upstream, connection).await
        }
        (Tier::Sockmap, _, Some(Ok(pairs))) => {
            insertion::attempt(pairs, worker, relay, downstream, upstream, connection).await
        }
        _ => Attempt::Refused(Refusal::NoPrograms),
    }
}

/// Looks whether packets can leave to both sides now: what has kept a connection in userspace before is found so without
/// its sockets being put under repair each time.
fn check_ways(flows: &FlowTable, downstream: &TcpStream, upstream: &TcpStream) -> Result<(), Refusal> {
    let ends = |socket: &TcpStream| Ok((socket.local_addr()?, socket.peer_addr()?));
    let ends = [downstream, upstream].map(|socket| ends(socket).map_err(|_: io::Error| Refusal::Ended));
    let [downstream, upstream] = ends;
    flows.check_ways(downstream?, upstream?)
}

/// Whether a tier takes connections at all.
fn is_offered(tier: Tier, worker: &Worker) -> Result<(), Refusal> {
    let settings = worker.settings();
    match tier {
        Tier::Tc if settings.promoter.is_none() => return Err(Refusal::NoPrograms),
        Tier::Sockmap => match settings.sockmap.get() {
            None => return Err(Refusal::NoPrograms),
            Some(Err(refusal)) => return Err(*refusal),
            // Nobody would look after the sockets.
            Some(Ok(pairs)) if pairs.is_leaving() => return Err(Refusal::Leaving),
            Some(Ok(_)) => {}
        },
        Tier::Tc | Tier::Splice | Tier::Copy => {}
    }
    if settings.switches.is_on(tier) { Ok(()) } else { Err(Refusal::SwitchedOff) }
}

/// Notes why a connection stays where it is, and when it is tried again, if ever.
fn refuse(worker: &Worker, connection: &Connection, refusal: Refusal) {
    if connection.refusal.replace(Some(refusal)) != Some(refusal) {
        worker.counters().refusals[refusal as usize].add(1);
        tracing::debug!(
            listener = %connection.serving.listener.name,
            downstream.addr = %connection.downstream,
            reason = refusal.as_str(),
            "not promoted"
        );
    }
    if refusal.may_pass() {
        let refused = connection.refused.get();
        connection.refused.set(refused.saturating_add(1));
        let factor = if refusal.lasts() { 1 << refused.min(DOUBLINGS) } else { 1 };
        // An agent that leaves has little time.
        let sweeps = if worker.promotes_all() { 1 } else { RETRY_SWEEPS * factor };
        let bytes = RETRY_BYTES * u64::from(factor);
        connection.promote_at.set(Some(connection.moved().saturating_add(bytes)));
        connection.promote_from.set(Some(worker.sweep().wrapping_add(sweeps)));
    } else {
        connection.promote_at.set(None);
        connection.promote_from.set(None);
    }
}

fn is_due(connection: &Connection) -> bool {
    connection.promote_at.get().is_some_and(|at| connection.moved() >= at)
}
