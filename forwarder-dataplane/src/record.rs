//! What is recorded of a connection, wherever it lives: in a worker, or, once offloaded, in the kernel.

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

/// A connection's place in counters and logs. When it is dropped, the connection's end is counted and logged: exactly once.
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
    /// The endpoint of a pair of a former agent that no backend leads to.
    pub(crate) orphan: Option<SocketAddr>,
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
}

impl Record {
    /// Counts bytes as they move, for the listener, the backend and the connection.
    pub(crate) fn count(&mut self, received: Moved, sent: Moved) {
        let up: u64 = received.bytes.iter().sum();
        let down: u64 = sent.bytes.iter().sum();
        let counters = self.listener.counters.of(self.slot);
        let add = |counters: &[Counter], moved: Moved| {
            for (counter, bytes) in counters.iter().zip(moved.bytes) {
                counter.add(bytes);
            }
        };
        add(&counters.received_bytes, received);
        add(&counters.sent_bytes, sent);
        if let Some((upstream, _)) = &self.upstream {
            let counters = upstream.counters.of(self.slot);
            counters.received_bytes.add(up);
            counters.sent_bytes.add(down);
        }
        self.received += up;
        self.sent += down;
    }

    /// Whether it has to end since its listener, backend or endpoint was removed. To be asked a few times a second.
    pub(crate) fn is_removed(&mut self) -> bool {
        let listener = &self.listener;
        let removals = &listener.removals;
        if self.removal.is_settled(removals) {
            return false;
        }
        let latest = removals.latest();
        let (backend, endpoint) = match &self.upstream {
            Some((upstream, endpoint)) => (Some(&upstream.key), Some(*endpoint)),
            None => (None, self.orphan),
        };
        let serving = listener.serving.load();
        if !removals.is_gone() {
            // While it is being connected its endpoint is not known: what is removed meanwhile is looked at then.
            let Some(endpoint) = endpoint else { return false };
            if serving.leads_to(backend, endpoint) {
                self.removal.settle(latest);
                return false;
            }
        }
        let present = &serving.listener.settings;
        self.removal.lose(removals, (backend, endpoint), present, self.downstream.port())
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
        let tc = |bytes: u64| {
            let mut moved = Moved::default();
            moved.bytes[Tier::Tc as usize] = bytes;
            moved
        };
        let new = (from_client.saturating_sub(self.received), from_endpoint.saturating_sub(self.sent));
        self.count(tc(new.0), tc(new.1));
    }
}

impl Drop for Record {
    fn drop(&mut self) {
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
