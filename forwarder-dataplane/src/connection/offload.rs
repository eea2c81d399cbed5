//! The way of a connection into the kernel: when it is due, which tiers are tried, and what becomes of it where none takes it.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use tokio::net::TcpStream;

use super::attempt::Attempt;
use super::relaying::Relay;
use super::{Connection, clocks, handover, insertion};
use crate::counters::End;
use crate::relay::Tier;
use crate::worker_context::WorkerContext;
use forwarder_gateway::model::Datapath;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::flows::FlowTable;

/// After how many more bytes, and after how many sweeps, a connection that could not be offloaded is tried again.
const RETRY_BYTES: u64 = 1 << 20;
const RETRY_SWEEPS: u32 = 4;
/// How often that doubles for a reason that lasts.
const DOUBLINGS: u32 = 4;

/// Relays until the connection is due, joins its two sides, and hands it over to the kernel (`None`), or relays it to its
/// end where that cannot be.
pub(super) async fn carry(mut relay: Relay<'_>) -> Option<End> {
    let Relay { context, connection, .. } = relay;
    let tier = match connection.serving.listener.settings.datapath {
        Datapath::Auto | Datapath::Tc | Datapath::Direct | Datapath::Splice | Datapath::Copy => Tier::Tc,
        Datapath::Sockmap => Tier::Sockmap,
    };
    let after = context.settings().offload_after;
    let bytes = if context.offloads_all() { 0 } else { after.bytes.unwrap_or(u64::MAX) };
    connection.offload_at.set(Some(bytes));
    connection.offload_from.set(after.sweeps.map(|sweeps| context.sweep().wrapping_add(sweeps)));
    if let Err(fallback_reason) = is_offered(tier, context)
        && !fallback_reason.may_pass()
    {
        refuse(context, connection, fallback_reason);
        return Some(poll_fn(|cx| relay.poll(cx)).await);
    }
    loop {
        let until_due = poll_fn(|cx| match relay.poll(cx) {
            // An end that was passed on counts among the numbers of a leg, and little is left to gain.
            Poll::Pending if relay.is_open() && is_due(connection) => Poll::Ready(None),
            polled => polled.map(Some),
        });
        if let Some(end) = until_due.await {
            return Some(end);
        }
        match attempt(tier, &mut relay).await {
            Attempt::HandedOver => return None,
            Attempt::Ended(end) => return Some(end),
            Attempt::Refused(fallback_reason) => refuse(context, connection, fallback_reason),
        }
    }
}

async fn attempt(tier: Tier, relay: &mut Relay<'_>) -> Attempt {
    let Relay { context, connection, downstream, upstream, .. } = *relay;
    if let Err(fallback_reason) = is_offered(tier, context) {
        return Attempt::Refused(fallback_reason);
    }
    let settings = context.settings();
    match (tier, &settings.offloader, settings.sockmap.get()) {
        (Tier::Tc, Some(offloader), _) => {
            if connection.refused.get() > 0
                && let Err(fallback_reason) = check_paths(&offloader.flows, downstream, upstream)
            {
                return Attempt::Refused(fallback_reason);
            }
            if let Err(attempt) = clocks::learn(relay).await {
                return attempt;
            }
            handover::attempt(offloader, relay).await
        }
        (Tier::Sockmap, _, Some(Ok(pairs))) => insertion::attempt(pairs, relay).await,
        _ => Attempt::Refused(FallbackReason::NoPrograms),
    }
}

/// Looks whether packets can leave to both sides now: what has kept a connection in userspace before is found so without
/// its sockets being put under repair each time.
fn check_paths(
    flows: &FlowTable,
    downstream: &TcpStream,
    upstream: &TcpStream,
) -> Result<(), FallbackReason> {
    let ends = |socket: &TcpStream| Ok((socket.local_addr()?, socket.peer_addr()?));
    let ends =
        [downstream, upstream].map(|socket| ends(socket).map_err(|_: io::Error| FallbackReason::Ended));
    let [downstream, upstream] = ends;
    flows.check_paths(downstream?, upstream?)
}

/// Whether a tier takes connections at all.
fn is_offered(tier: Tier, context: &WorkerContext) -> Result<(), FallbackReason> {
    let settings = context.settings();
    match tier {
        Tier::Tc if settings.offloader.is_none() => return Err(FallbackReason::NoPrograms),
        Tier::Sockmap => match settings.sockmap.get() {
            None => return Err(FallbackReason::NoPrograms),
            Some(Err(fallback_reason)) => return Err(*fallback_reason),
            // Nobody would look after the sockets.
            Some(Ok(pairs)) if pairs.is_leaving() => return Err(FallbackReason::Shutdown),
            Some(Ok(_)) => {}
        },
        Tier::Tc | Tier::Direct | Tier::Splice | Tier::Copy => {}
    }
    if settings.toggles.is_on(tier) { Ok(()) } else { Err(FallbackReason::SwitchedOff) }
}

/// Notes why a connection stays where it is, and when it is tried again, if ever.
fn refuse(context: &WorkerContext, connection: &Connection, fallback_reason: FallbackReason) {
    if connection.fallback_reason.replace(Some(fallback_reason)) != Some(fallback_reason) {
        context.counters().fallback_reasons[fallback_reason as usize].add(1);
        tracing::debug!(
            listener = %connection.serving.listener.name,
            downstream.addr = %connection.downstream,
            reason = fallback_reason.as_str(),
            "not offloaded"
        );
    }
    if fallback_reason.may_pass() {
        let refused = connection.refused.get();
        connection.refused.set(refused.saturating_add(1));
        let factor = if fallback_reason.lasts() { 1 << refused.min(DOUBLINGS) } else { 1 };
        // An agent that shuts down has little time.
        let sweeps = if context.offloads_all() { 1 } else { RETRY_SWEEPS * factor };
        let bytes = RETRY_BYTES * u64::from(factor);
        connection.offload_at.set(Some(connection.moved().saturating_add(bytes)));
        connection.offload_from.set(Some(context.sweep().wrapping_add(sweeps)));
    } else {
        connection.offload_at.set(None);
        connection.offload_from.set(None);
    }
}

fn is_due(connection: &Connection) -> bool {
    connection.offload_at.get().is_some_and(|at| connection.moved() >= at)
}
