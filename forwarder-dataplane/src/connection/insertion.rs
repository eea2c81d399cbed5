//! The way of a connection to tier `sockmap`: both sockets are put into the maps, and whoever looks after them gets them.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::time::timeout;

use super::attempt::Attempt;
use super::relaying::{Relay, set_keepalive};
use crate::offload::sockmap::SockmapPairs;
use crate::relay::Tier;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_runtime::failpoint;

/// How long nothing more is read while what was read is written.
const PAUSE: Duration = Duration::from_millis(100);

/// Hands both sockets over once everything that was read of them has been written: what they have received beyond that the
/// kernel hands on itself.
pub(super) async fn attempt(pairs: &SockmapPairs, relay: &mut Relay<'_>) -> Attempt {
    let Relay { context, connection, downstream, upstream, .. } = *relay;
    failpoint::reached("insert.begin").await;
    relay.hold_reads(true);
    let emptied = poll_fn(|cx| match relay.poll(cx) {
        Poll::Pending if relay.is_empty() => Poll::Ready(None),
        polled => polled.map(Some),
    });
    let emptied = timeout(PAUSE, emptied).await;
    relay.hold_reads(false);
    match emptied {
        Ok(None) if relay.is_open() => {}
        Ok(None) => return Attempt::Refused(FallbackReason::Ended),
        Ok(Some(end)) => return Attempt::Ended(end),
        Err(_) => return Attempt::Refused(FallbackReason::SlowReceiver),
    }
    failpoint::reached("insert.emptied").await;
    let moved = [connection.received.get(), connection.sent.get()];
    let pair = match pairs.join(downstream, upstream, moved, connection.listener.id.0) {
        Ok(pair) => pair,
        Err(error) => {
            if error.touched {
                relay.copy_only();
            }
            return Attempt::Refused(error.fallback_reason);
        }
    };
    failpoint::reached("insert.joined").await;
    if connection.keepalive_from.take().is_some() {
        set_keepalive(upstream, context);
    }
    context.counters().offloaded.add(1);
    tracing::debug!(
        listener = %connection.serving.listener.name,
        downstream.addr = %connection.downstream,
        "joined by a sockmap"
    );
    if let Some(mut record) = connection.hand_over() {
        record.upstream_local = upstream.local_addr().ok();
        record.tier = Tier::Sockmap;
        pairs.add(pair, record);
    }
    failpoint::reached("insert.handed_over").await;
    Attempt::HandedOver
}
