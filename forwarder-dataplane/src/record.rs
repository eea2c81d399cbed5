//! What is recorded of a connection in a worker or at tier `sockmap`. Less is known of an offloaded pair (`offload/tc/entry.rs`).

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use crate::counters::{Counter, End};
use crate::listener::{BoundListener, RouteSnapshot};
use crate::relay::{Moved, Tier};
use crate::removal::RemovalWatch;
use crate::upstream::Upstream;
use crate::view::{ConnectionState, ConnectionView};
use crate::view::{canonical, milliseconds};
use forwarder_kernel::clock::monotonic;

/// A connection's place in counters and logs. When it is dropped, the connection's end is counted and logged: exactly once,
/// unless it has moved to a pair.
#[derive(Debug)]
pub(crate) struct Record {
    /// The listener that accepted it.
    pub(crate) listener: Arc<BoundListener>,
    /// What served the listener's new connections when it was accepted.
    pub(crate) serving: Arc<RouteSnapshot>,
    /// The client.
    pub(crate) downstream: SocketAddr,
    /// The backend and the endpoint, once connected.
    pub(crate) upstream: Option<(Arc<Upstream>, SocketAddr)>,
    /// The node's address towards the endpoint, by which the endpoint knows the connection; `None` while nobody has asked for it.
    pub(crate) upstream_local: Option<SocketAddr>,
    /// The tier that it has come to.
    pub(crate) tier: Tier,
    /// How it stands with what was removed of its listener.
    pub(crate) removal: RemovalWatch,
    /// Whose counters it is counted in.
    pub(crate) slot: usize,
    /// When it was accepted.
    pub(crate) opened: Instant,
    /// Bytes passed on from the client.
    pub(crate) received: u64,
    /// Bytes passed on from the endpoint.
    pub(crate) sent: u64,
    /// How it ends, if it ends now.
    pub(crate) end: End,
    /// Whether its end is counted elsewhere.
    pub(crate) is_moved: bool,
}

impl Record {
    /// When it was accepted: `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) fn opened_at(&self) -> u64 {
        let age = u64::try_from(self.opened.elapsed().as_nanos()).unwrap_or(u64::MAX);
        monotonic().saturating_sub(age)
    }

    /// Counts bytes as they move, for the listener, the backend and the connection.
    pub(crate) fn count(&mut self, received: Moved, sent: Moved) {
        let upstream = self.upstream.as_ref().map(|(upstream, _)| &**upstream);
        count(&self.listener, upstream, self.slot, [received, sent]);
        self.received += received.bytes.iter().sum::<u64>();
        self.sent += sent.bytes.iter().sum::<u64>();
    }

    /// Whether it has to end since its listener, backend or endpoint was removed. To be asked a few times a second.
    pub(crate) fn is_removed(&mut self) -> bool {
        let (upstream, endpoint) = match &self.upstream {
            Some((upstream, endpoint)) => (Some(&**upstream), Some(*endpoint)),
            None => (None, None),
        };
        is_removed(&mut self.removal, &self.listener, upstream, endpoint, self.downstream.port())
    }

    /// What operators see of it, as far as it is recorded.
    pub(crate) fn view(&self) -> ConnectionView {
        let listener = &self.serving.listener;
        let upstream = self.upstream.as_ref();
        ConnectionView {
            listener: listener.name.to_string(),
            address: self.listener.key.to_string(),
            route: listener.route.as_ref().map(|route| route.name.to_string()),
            backend: upstream.map(|(upstream, _)| upstream.key.to_string()),
            downstream: canonical(self.downstream),
            upstream: upstream.map(|(_, endpoint)| *endpoint),
            upstream_local: self.upstream_local.map(canonical),
            tier: self.tier,
            state: ConnectionState::Open,
            received_bytes: self.received,
            sent_bytes: self.sent,
            age_ms: milliseconds(self.opened.elapsed()),
            idle_ms: 0,
            reason: None,
        }
    }

    /// Counts what the kernel has forwarded, given how many bytes have come from either end in all.
    pub(crate) fn count_forwarded(&mut self, from_client: u64, from_endpoint: u64) {
        let new = [from_client.saturating_sub(self.received), from_endpoint.saturating_sub(self.sent)];
        let [received, sent] = new.map(|bytes| Moved::by(Tier::Tc, bytes));
        self.count(received, sent);
    }
}

/// Counts bytes as they move, from the client and from the endpoint, for a listener and a backend.
pub(crate) fn count(
    listener: &BoundListener,
    upstream: Option<&Upstream>,
    slot: usize,
    [received, sent]: [Moved; 2],
) {
    let counters = listener.counters.of(slot);
    let add = |counters: &[Counter], moved: Moved| {
        for (counter, bytes) in counters.iter().zip(moved.bytes) {
            counter.add(bytes);
        }
    };
    add(&counters.received_bytes, received);
    add(&counters.sent_bytes, sent);
    if let Some(upstream) = upstream {
        let counters = upstream.counters.of(slot);
        counters.received_bytes.add(received.bytes.iter().sum());
        counters.sent_bytes.add(sent.bytes.iter().sum());
    }
}

/// Whether a connection of a listener has to end since that, its backend or its endpoint was removed; an unknown backend counts as
/// removed. `spread` tells connections apart.
pub(crate) fn is_removed(
    watch: &mut RemovalWatch,
    listener: &BoundListener,
    upstream: Option<&Upstream>,
    endpoint: Option<SocketAddr>,
    spread: u16,
) -> bool {
    let removals = &listener.removals;
    if watch.is_settled(removals) {
        return false;
    }
    let latest = removals.latest();
    let backend = upstream.map(|upstream| &upstream.key);
    let serving = listener.serving.load();
    if !removals.is_gone() {
        // While it is being connected its endpoint is not known: what is removed meanwhile is looked at then.
        let Some(endpoint) = endpoint else { return false };
        if serving.leads_to(backend, endpoint) {
            watch.settle(latest);
            return false;
        }
    }
    watch.lose(removals, (backend, endpoint), &serving.listener.settings, spread)
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.is_moved {
            return;
        }
        self.listener.counters.of(self.slot).ended[self.end as usize].add(1);
        let upstream = self.upstream.as_ref();
        if let Some((upstream, _)) = upstream {
            upstream.counters.of(self.slot).ended.add(1);
        }
        tracing::debug!(
            target: "access",
            listener = %self.serving.listener.name,
            route = self.serving.listener.route.as_ref().map(|route| tracing::field::display(&route.name)),
            backend = upstream.map(|(upstream, _)| tracing::field::display(&upstream.key)),
            endpoint = upstream.map(|(_, endpoint)| tracing::field::display(endpoint)),
            // By which the endpoint knows the connection.
            upstream.local = self.upstream_local.map(canonical).map(tracing::field::display),
            downstream.addr = %canonical(self.downstream),
            tier = self.tier.as_str(),
            bytes_rx = self.received,
            bytes_tx = self.sent,
            duration_ms = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX),
            end = self.end.as_str(),
            "connection ended"
        );
    }
}
