//! What the agent knows of one offloaded pair: little, for there may be millions. The rest stands in the maps.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forwarder_common::flow::Pair;
use forwarder_common::tuple::{AddressBytes, address_bytes, address_of};

use super::keepalive::Keepalive;
use super::probes::Asked;
use crate::counters::End;
use crate::listener::{BoundListener, RouteSnapshot};
use crate::record::{self, Record};
use crate::relay::{Moved, Tier};
use crate::removal::RemovalWatch;
use crate::upstream::Upstream;
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::is_direct;
use forwarder_kernel::flows::joined_pair::{JoinedPair, PairKey};

/// What many pairs have in common: the addresses of this node that both ends speak to, the endpoint, and what serves them.
#[derive(Debug)]
pub(super) struct Place {
    /// What the client has connected to.
    pub(super) address: SocketAddr,
    pub(super) endpoint: SocketAddr,
    /// Where the endpoint was connected from.
    pub(super) local: IpAddr,
    /// `None` for pairs of a former agent until their listener is there.
    pub(super) served: Option<Served>,
}

/// What serves a pair.
#[derive(Clone, Debug)]
pub(super) struct Served {
    pub(super) listener: Arc<BoundListener>,
    /// What served the listener's new connections when it was accepted.
    pub(super) serving: Arc<RouteSnapshot>,
    /// `None` for a pair of a former agent whose endpoint no backend leads to.
    pub(super) upstream: Option<Arc<Upstream>>,
}

/// Whether a pair is counted for a listener.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Stage {
    /// Not yet: its listener is not there, or has not been looked for.
    Awaited,
    /// Not yet: it is a direct connection whose handshake is not done. If another endpoint is asked in its place, it never is.
    Opening,
    Counted,
    /// Not any more: its end is.
    Ended,
}

/// A pair. 120 bytes.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) number: u32,
    /// When it was looked at last: the number of the round.
    pub(super) round: u32,
    /// Its place in the order of that round.
    pub(super) rank: u32,
    client: AddressBytes,
    client_port: u16,
    local_port: u16,
    pub(super) stage: Stage,
    /// Whether an end of it reached a local socket: then no FIN of it is seen.
    pub(super) has_early_end: bool,
    pub(super) place: Arc<Place>,
    /// Bytes that each end had sent when it was looked at last, as they were counted; and what was sent again.
    pub(super) bytes: [u64; 2],
    pub(super) repeated: u64,
    /// When payload was last seen to have moved, and when it was accepted: `CLOCK_MONOTONIC` in nanoseconds. 0 before the latter is
    /// known.
    pub(super) active: u64,
    pub(super) opened: u64,
    pub(super) removal: RemovalWatch,
    /// What most pairs do not have.
    rare: Option<Box<Rare>>,
}

const _: () = assert!(size_of::<Entry>() <= 120, "there are millions of them");

/// What is known of a pair to which something happens.
#[derive(Debug, Default)]
pub(super) struct Rare {
    /// Since when it is over.
    pub(super) over: Option<Instant>,
    /// Since when the listener of a pair of a former agent is known to be gone.
    pub(super) gone: Option<Instant>,
    /// The probes that each end has not answered.
    pub(super) keepalive: [Keepalive; 2],
    /// What the ends were asked for a stranger's sake.
    pub(super) asked: Asked,
}

/// A pair that the table does not have yet.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) key: PairKey,
    pub(super) has_early_end: bool,
    served: Option<Served>,
    bytes: [u64; 2],
    opened: u64,
    removal: RemovalWatch,
}

impl Incoming {
    /// A pair of a former agent.
    pub(super) fn inherited(key: PairKey, has_early_end: bool) -> Self {
        let removal = RemovalWatch::default();
        Self { key, has_early_end, served: None, bytes: [0; 2], opened: 0, removal }
    }

    /// A direct connection, which the programs have opened at this time.
    pub(super) fn opened(key: PairKey, opened: u64) -> Self {
        Self { opened, ..Self::inherited(key, false) }
    }

    /// A pair whose connection was recorded by a worker.
    pub(super) fn recorded(pair: &JoinedPair, mut record: Record) -> Self {
        record.is_moved = true;
        Self {
            key: pair.key(),
            has_early_end: pair.has_early_end(),
            served: Some(Served {
                listener: Arc::clone(&record.listener),
                serving: Arc::clone(&record.serving),
                upstream: record.upstream.as_ref().map(|(upstream, _)| Arc::clone(upstream)),
            }),
            bytes: [record.received, record.sent],
            opened: record.opened_at(),
            removal: std::mem::take(&mut record.removal),
        }
    }

    /// Where it belongs.
    pub(super) fn place(&self) -> Place {
        let ((_, address), (endpoint, local)) = (self.key.downstream(), self.key.upstream());
        Place { address, endpoint, local: local.ip(), served: self.served.clone() }
    }
}

impl Entry {
    pub(super) fn new(incoming: Incoming, place: Arc<Place>) -> Self {
        let Incoming { key, has_early_end, served, bytes, opened, removal } = incoming;
        let ((client, _), (_, local)) = (key.downstream(), key.upstream());
        Self {
            number: key.number,
            round: 0,
            rank: 0,
            client: address_bytes(client.ip()),
            client_port: client.port(),
            local_port: local.port(),
            stage: if served.is_some() { Stage::Counted } else { Stage::Awaited },
            has_early_end,
            place,
            bytes,
            repeated: 0,
            active: monotonic(),
            opened,
            removal,
            rare: None,
        }
    }

    pub(super) fn client(&self) -> SocketAddr {
        SocketAddr::new(address_of(self.client), self.client_port)
    }

    /// The node's address and port towards the endpoint.
    pub(super) fn local(&self) -> SocketAddr {
        SocketAddr::new(self.place.local, self.local_port)
    }

    /// By which it is found in the maps.
    pub(super) fn key(&self) -> PairKey {
        let downstream = (self.client(), self.place.address);
        PairKey::new(self.number, downstream, (self.place.endpoint, self.local()))
    }

    /// The tier that it is at.
    pub(super) fn tier(&self) -> Tier {
        if is_direct(self.number) { Tier::Direct } else { Tier::Tc }
    }

    /// Since when it is over.
    pub(super) fn over(&self) -> Option<Instant> {
        self.rare.as_ref().and_then(|rare| rare.over)
    }

    pub(super) fn rare(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// What is known beyond the usual, if anything is.
    pub(super) fn if_rare(&mut self) -> Option<&mut Rare> {
        self.rare.as_deref_mut()
    }

    /// Nothing happens to it any more.
    pub(super) fn is_usual(&mut self) {
        self.rare = None;
    }

    /// [`Self::idle`], but none if something has moved since it was looked at last.
    pub(super) fn idle_by(&self, state: &Pair, now: u64) -> Duration {
        if self.unseen(state) == [0, 0] { self.idle(now) } else { Duration::ZERO }
    }

    /// How many bytes each end has sent since it was looked at last. What sockets received just before the handover, the programs may
    /// not have seen yet.
    fn unseen(&self, state: &Pair) -> [u64; 2] {
        let bytes = [state.request.bytes, state.response.bytes];
        [0, 1].map(|side| bytes[side].saturating_sub(self.bytes[side]))
    }

    /// How long no payload was seen to move, at `now` (`CLOCK_MONOTONIC`, nanoseconds).
    pub(super) fn idle(&self, now: u64) -> Duration {
        Duration::from_nanos(now.saturating_sub(self.active))
    }

    /// Notes what the programs have counted, and counts it for the listener and the backend.
    pub(super) fn note(&mut self, state: &Pair, slot: usize, now: u64) {
        if self.stage == Stage::Opening && state.offloaded != 0 {
            self.count(true, slot);
        }
        let repeated = state.request.repeated.wrapping_add(state.response.repeated);
        if self.opened == 0 {
            // What a former agent has counted.
            (self.opened, self.bytes) = (state.opened, [state.request.bytes, state.response.bytes]);
        }
        if repeated != self.repeated {
            (self.repeated, self.active) = (repeated, now);
        }
        let new = self.unseen(state);
        if new != [0, 0] {
            if let (Stage::Counted, Some(served)) = (self.stage, &self.place.served) {
                let moved = new.map(|bytes| Moved::by(self.tier(), bytes));
                record::count(&served.listener, served.upstream.as_deref(), slot, moved);
            }
            self.bytes = [0, 1].map(|side| self.bytes[side] + new[side]);
            self.active = now;
        }
    }

    /// Whether it has to end since its listener, backend or endpoint was removed.
    pub(super) fn is_removed(&mut self) -> bool {
        let Place { endpoint, served, .. } = &*self.place;
        let Some(Served { listener, upstream, .. }) = served else { return false };
        let (upstream, spread) = (upstream.as_deref(), self.client_port);
        record::is_removed(&mut self.removal, listener, upstream, Some(*endpoint), spread)
    }

    /// Counts it for its listener, and for its backend unless it did not come to be connected.
    pub(super) fn count(&mut self, is_connected: bool, slot: usize) {
        let Some(Served { listener, upstream, .. }) = &self.place.served else { return };
        listener.counters.of(slot).accepted.add(1);
        if let Some(upstream) = upstream.as_ref().filter(|_| is_connected) {
            upstream.counters.of(slot).connected.add(1);
        }
        self.stage = Stage::Counted;
    }

    /// Counts and logs its end, once.
    pub(super) fn end(&mut self, reason: End, slot: usize) {
        let is_connected = self.stage == Stage::Counted;
        if self.stage == Stage::Opening {
            self.count(false, slot);
        }
        let stage = std::mem::replace(&mut self.stage, Stage::Ended);
        let (Stage::Counted, Some(served)) = (stage, &self.place.served) else { return };
        let Served { listener, serving, upstream } = served.clone();
        let upstream = upstream.filter(|_| is_connected);
        let age = Duration::from_nanos(monotonic().saturating_sub(self.opened));
        let [received, sent] = self.bytes;
        drop(Record {
            listener,
            serving,
            downstream: self.client(),
            upstream: upstream.map(|upstream| (upstream, self.place.endpoint)),
            upstream_local: Some(self.local()),
            tier: self.tier(),
            removal: RemovalWatch::default(),
            slot,
            opened: Instant::now().checked_sub(age).unwrap_or_else(Instant::now),
            received,
            sent,
            end: reason,
            is_moved: false,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_programs_have_not_seen_yet_has_not_just_moved() {
        let address = |last, port| SocketAddr::from(([10, 0, 0, last], port));
        let key = PairKey::new(1, (address(1, 40_000), address(2, 80)), (address(3, 80), address(2, 61_000)));
        let incoming = Incoming::inherited(key, false);
        let place = Arc::new(incoming.place());
        let mut entry = Entry::new(incoming, place);
        assert_eq!(entry.key(), key);
        (entry.bytes, entry.active) = ([10, 10], 1_000);
        let mut state = Pair::default();
        state.request.bytes = 9;
        assert_eq!(entry.idle_by(&state, 1_500), Duration::from_nanos(500));
        state.response.bytes = 11;
        assert_eq!(entry.idle_by(&state, 1_500), Duration::ZERO);
    }
}
