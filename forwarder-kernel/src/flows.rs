//! The flows of offloaded pairs in the kernel's maps, shared by the workers.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use aya::maps::{MapData, Queue};
use forwarder_common::direct::DIRECT_NUMBER;
use forwarder_common::flow::{
    FLOW_BY_STACK, FLOW_ENDED, FLOW_REVERSE_ENDED, Flow, NextHop, Pair, STATE_OFFLOADED, STATE_OVER,
    STATE_RESET,
};
use forwarder_common::layout::FLOWS;
use forwarder_common::layout::{AGENT, HoldState};
use forwarder_common::tuple::FourTuple;
use rustix::io::Errno;

use self::direct::DirectTable;
pub use self::direct::is_direct;
pub use self::pinned::{are_pinned, end, forget, read};
use crate::flows::flow_maps::{FlowMaps, Listed, ListedPair, capacity, error};
use crate::flows::joined_pair::{Condemned, JoinedPair, PairKey, ends, key_of};
use crate::maps::gate::{Gate, Permit};
use crate::net::conntrack::Conntrack;

use crate::clock::monotonic;
use crate::fallback_reason::FallbackReason;
use crate::flows::paths::Paths;
use crate::flows::ports::TakenPorts;
use crate::load_error::errno_of;
use crate::maps::DatapathError;
use crate::maps::updates::Updates;

use crate::net::egress_path::Via;
use crate::net::routes::{KnownRoutes, RouteError, Routes};
use crate::net::stack::Family;
use crate::tcp::join::{Placement, join};
use crate::tcp::leg::Leg;
use forwarder_runtime::lock::lock;

pub mod arrival;
pub(crate) mod direct;
mod flow_maps;
mod hops;
pub mod joined_pair;
pub mod paths;
mod pinned;
pub mod ports;
pub mod targets;

/// The flag of `bpf(BPF_MAP_UPDATE_ELEM)` by which an entry must not be there yet: what replaced one would free it.
const BPF_NOEXIST: u64 = 1;

/// The maps of flows, open.
pub struct FlowTable {
    maps: Mutex<FlowMaps>,
    /// The same maps, to be read by several threads at once.
    reader: FlowMaps,
    updates: Arc<Updates>,
    /// Before the maps are inserted into.
    gate: Gate<Condemned>,
    routes: Routes,
    conntrack: Conntrack,
    paths: Arc<Paths>,
    ports: Arc<TakenPorts>,
    next: AtomicU32,
    /// How many pairs stand in the maps.
    live: Arc<AtomicUsize>,
    /// How many the maps have room for.
    room: usize,
    /// The direct connections, where there may be some.
    direct: Option<DirectTable>,
}

/// Leave to join connections. The programs may meanwhile not be told to forget others.
pub type JoinPermit = Permit<Condemned>;

/// A pair that a former agent has left in the maps.
#[derive(Clone, Copy, Debug)]
pub struct Inherited {
    /// What tells it from all others.
    pub key: PairKey,
    /// Whether the former agent had let go of it: what its sockets held otherwise is lost.
    pub is_offloaded: bool,
    /// [`JoinedPair::has_early_end`].
    pub has_early_end: bool,
}

/// Why connections cannot be joined at all.
#[derive(Debug, thiserror::Error)]
pub enum FlowTableError {
    /// The maps cannot be opened.
    #[error(transparent)]
    Map(#[from] DatapathError),
    /// Routes cannot be asked for.
    #[error(transparent)]
    Routes(#[from] RouteError),
    /// No thread can be made.
    #[error("cannot start the thread that removes flows: {0}")]
    Thread(#[from] std::io::Error),
}

impl FlowTable {
    /// Opens the pinned maps of a directory.
    ///
    /// # Errors
    /// They cannot be opened.
    pub(super) fn open(
        pin_dir: &Path,
        updates: Arc<Updates>,
        routes: Routes,
        paths: Arc<Paths>,
        free: Option<Queue<MapData, u32>>,
    ) -> Result<Self, FlowTableError> {
        let (maps, reader) = (Mutex::new(FlowMaps::open(pin_dir)?), FlowMaps::open(pin_dir)?);
        let (next, live) = (AtomicU32::new(1), Arc::new(AtomicUsize::new(0)));
        // Those that are removed from, open for the thread that does so.
        let (mut removed_from, left) = (FlowMaps::open(pin_dir)?, Arc::clone(&live));
        let ports = Arc::<TakenPorts>::default();
        let freed = Arc::clone(&ports);
        let gate = Gate::start("flows", move |batch| {
            for condemned in batch {
                removed_from.remove(condemned);
                if let Condemned::Pair(_, [_, response]) = condemned {
                    left.fetch_sub(1, Ordering::Relaxed);
                    // Not before: a connection from the same port could not be joined.
                    let (endpoint, local) = ends(&response);
                    freed.free(local, endpoint);
                }
            }
        })?;
        let conntrack = Conntrack::open();
        let room = capacity(pin_dir)?;
        let direct = free.map(|free| DirectTable::open(pin_dir, free, &paths)).transpose()?;
        Ok(Self { maps, reader, updates, gate, routes, conntrack, paths, ports, next, live, room, direct })
    }

    fn maps(&self) -> MutexGuard<'_, FlowMaps> {
        lock(&self.maps)
    }

    /// What is known of the interfaces.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The local ports that pairs use.
    pub fn ports(&self) -> &TakenPorts {
        &self.ports
    }

    /// How many pairs the maps have room for.
    pub fn room(&self) -> usize {
        self.room
    }

    /// How many pairs there are.
    pub fn count(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// Whether packets from `peer` to `local` belong to a pair: then no socket may use these addresses.
    pub fn is_taken(&self, local: SocketAddr, peer: SocketAddr) -> bool {
        if self.live.load(Ordering::Relaxed) == 0 {
            return false;
        }
        self.reader.flows.get(&key_of(peer, local), 0).is_ok()
    }

    /// Waits until a connection from `client` to `local` may be joined, which is so at once unless others have been removed
    /// within the last milliseconds: see [`crate::maps::gate`]. Removals wait meanwhile for the permit's end.
    pub async fn ready(&self, client: SocketAddr, local: SocketAddr) -> JoinPermit {
        // What is left there of a former connection of the client's has to go first.
        let key = key_of(client, local);
        let there = self.reader.flows.get(&key, 0).ok();
        if let Some(flow) = there.filter(|flow| flow.state == STATE_OVER) {
            self.gate.condemn(Condemned::Flows(flow.pair, [key, flow.out.reversed()]));
            self.gate.hasten();
        }
        self.gate.permit().await
    }

    /// Joins two legs in state handover: from now on their new packets pass by the sockets. The client's connection was
    /// accepted at `opened` (`CLOCK_MONOTONIC`, nanoseconds). The legs are to be read while the permit is held: they change.
    ///
    /// # Errors
    /// Why they stay as they are.
    pub fn join(
        &self,
        _: &JoinPermit,
        opened: u64,
        downstream: &Leg,
        upstream: &Leg,
    ) -> Result<JoinedPair, FallbackReason> {
        let client = downstream.peer.ip();
        let placement = Placement {
            downstream: self.hop(client, downstream.local, downstream.peer)?,
            upstream: self.hop(client, upstream.local, upstream.peer)?,
            // Those above are direct.
            pair: self.next.fetch_add(1, Ordering::Relaxed) & (DIRECT_NUMBER - 1),
        };
        let mut joint = join(downstream, upstream, placement)?;
        self.check_stack(&joint.flows)?;
        for leg in [downstream, upstream] {
            self.check_translation(leg)?;
        }
        joint.pair.opened = opened;
        let pair = JoinedPair { number: placement.pair, flows: joint.flows };
        self.keep_valid(&pair);
        // Before the maps refuse: what was written in part would take others' room until it is removed.
        if self.live.fetch_add(1, Ordering::Relaxed) >= self.room {
            self.live.fetch_sub(1, Ordering::Relaxed);
            self.gate.hasten();
            return Err(FallbackReason::MapFull);
        }
        let mut maps = self.maps();
        // The pair last: it turns both directions on at once.
        let mut written = Ok(());
        for (key, flow) in &pair.flows {
            written = written.and_then(|()| maps.flows.insert(key, flow, BPF_NOEXIST));
            forwarder_runtime::failpoint::block(
                forwarder_runtime::failpoint::FLOWS_WRITTEN[flow.direction as usize],
            );
        }
        written = written.and_then(|()| maps.pairs.insert(pair.number, joint.pair, BPF_NOEXIST));
        drop(maps);
        written.map_err(|source| {
            self.live.fetch_sub(1, Ordering::Relaxed);
            self.gate.condemn(Condemned::Flows(pair.number, pair.flows.map(|(key, _)| key)));
            if errno_of(&source) == Some(Errno::TOOBIG) {
                self.gate.hasten();
                return FallbackReason::MapFull;
            }
            let error = error("write to", FLOWS, Some(pair.number), source);
            tracing::warn!(%error, "a connection stays in userspace");
            FallbackReason::Kernel
        })?;
        let (endpoint, local) = pair.upstream();
        self.ports.take(local, endpoint);
        Ok(pair)
    }

    /// Notes that the end of a direction reached a local socket before the handover: the egress program then lets the agent's
    /// other socket pass it on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pass_end_on(&self, pair: &mut JoinedPair, direction: u32) -> Result<(), DatapathError> {
        for (_, flow) in &mut pair.flows {
            flow.flags |= if flow.direction == direction { FLOW_ENDED } else { FLOW_REVERSE_ENDED };
        }
        self.updates.set_flows(&pair.flows)
    }

    /// Has nothing less acknowledged to the client, and to the endpoint, in their own numbers.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn promise(&self, pair: &mut JoinedPair, acknowledged: [u32; 2]) -> Result<(), DatapathError> {
        let [to_client, to_endpoint] = acknowledged;
        let [(_, request), (_, response)] = &mut pair.flows;
        (request.acknowledged, response.acknowledged) = (to_endpoint, to_client);
        self.updates.set_flows(&pair.flows)
    }

    /// Ends the handover, so that the egress programs let nothing more out: the local sockets have delivered everything.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn complete(&self, pair: &mut JoinedPair) -> Result<(), DatapathError> {
        for (_, flow) in &mut pair.flows {
            flow.state = STATE_OFFLOADED;
        }
        self.updates.set_flows(&pair.flows)
    }

    /// Looks up anew how a pair's packets leave, after routes or MTUs have changed; tells whether that is another path now. `known` are
    /// the routes that others were given since.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reroute(&self, pair: &mut JoinedPair, known: &mut KnownRoutes) -> Result<bool, DatapathError> {
        let before = *pair;
        let (client, number) = (pair.downstream().0.ip(), pair.number);
        let [(_, request), (_, response)] = &pair.flows;
        // Where the endpoint is now, and the client: what they send is expected by there, whether what is sent to them leaves so
        // or not.
        let mut towards = [response.arrival, request.arrival];
        for ((_, flow), towards) in pair.flows.iter_mut().zip(&mut towards) {
            let (local, peer) = ends(&flow.out);
            // Where there is no route for the moment, the old one is as good.
            let Some(egress) = known.egress(&self.routes, local.ip(), peer.ip()) else { continue };
            if egress.is_local {
                continue;
            }
            *towards = egress.interface;
            if flow.interface != egress.interface {
                let Ok(via) = self.paths.check(egress.interface, client) else { continue };
                // Of a direct one nothing goes by the stack.
                if is_direct(number) && via == Via::Stack {
                    continue;
                }
                flow.flags = flow.flags & !FLOW_BY_STACK | via.flag();
                flow.hop_limit = self.hop_limit(egress.interface, Family::of(peer.ip()), via);
            }
            (flow.interface, flow.next_hop) = (egress.interface, NextHop::new(egress.next_hop));
            flow.mtu = self.mtu(&egress);
        }
        let [(_, request), (_, response)] = &mut pair.flows;
        [response.arrival, request.arrival] = towards;
        let has_moved = before != *pair;
        if has_moved {
            self.keep_valid(pair);
            self.set_flows(&pair.flows)?;
        }
        Ok(has_moved)
    }

    /// Has packets of a pair leave by other paths if those that they take are avoided now; tells whether there are such.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn change_paths(&self, pair: &mut JoinedPair) -> Result<bool, DatapathError> {
        let mut changed = *pair;
        let client = pair.downstream().0.ip();
        for (_, flow) in &mut changed.flows {
            let Ok(via) = self.paths.check(flow.interface, client) else { return Ok(false) };
            flow.flags = flow.flags & !FLOW_BY_STACK | via.flag();
            flow.hop_limit = self.hop_limit(flow.interface, Family::of(ends(&flow.out).1.ip()), via);
        }
        if changed == *pair || self.check_stack(&changed.flows).is_err() {
            return Ok(false);
        }
        *pair = changed;
        self.keep_valid(pair);
        self.updates.set_flows(&pair.flows)?;
        Ok(true)
    }

    /// Visits what is known of every pair, with few system calls however many there are. One that is joined or removed meanwhile is
    /// visited or not.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn for_each_pair(&self, mut visit: impl FnMut(u32, &Pair)) -> Result<(), DatapathError> {
        // Not under the lock: workers join others meanwhile.
        self.reader.for_each_pair(&mut visit)
    }

    /// A pair as it stands in the maps; `None` if it does not stand there whole any more.
    pub fn find(&self, key: &PairKey) -> Option<JoinedPair> {
        if is_direct(key.number) {
            return self.direct.as_ref()?.maps().find(key);
        }
        self.reader.find(key)
    }

    /// What is known of a pair; `None` if it is gone.
    pub fn pair(&self, number: u32) -> Option<Pair> {
        if is_direct(number) {
            return self.direct.as_ref()?.maps().pair(number);
        }
        self.reader.pairs.get(&number, 0).ok()
    }

    /// Leaves a pair's packets to the local stack again, at once. What is known of the pair stays until it is removed.
    pub fn release(&self, pair: &JoinedPair) {
        if let Err(error) = self.set_flows(&pair.in_state(STATE_OVER)) {
            tracing::warn!(%error, "cannot end an offloaded connection at once: it goes on until its map entries are removed");
        }
    }

    /// Takes a pair out of the kernel: it is released, and what stands there of it goes a little later. To be called once for
    /// each pair that was joined or inherited.
    pub fn remove(&self, pair: &JoinedPair) {
        self.release(pair);
        self.condemn(&pair.key());
    }

    fn condemn(&self, key: &PairKey) {
        match &self.direct {
            Some(direct) if is_direct(key.number) => {
                direct.remove(key);
                let (endpoint, local) = key.upstream();
                self.ports.free(local, endpoint);
            }
            _ => self.gate.condemn(key.condemned()),
        }
    }

    /// Changes the flows of a pair in place, wherever they stand.
    fn set_flows(&self, flows: &[(FourTuple, Flow); 2]) -> Result<(), DatapathError> {
        match &self.direct {
            Some(direct) if is_direct(flows[0].1.pair) => {
                direct.maps().set_flows(flows);
                Ok(())
            }
            _ => self.updates.set_flows(flows),
        }
    }

    /// The same of a pair of which no more is known.
    pub fn forget(&self, key: &PairKey) {
        match self.find(key) {
            Some(pair) => self.remove(&pair),
            // What another connection has by now is not this one's to give up.
            None if is_direct(key.number) => {}
            None => self.gate.condemn(key.condemned()),
        }
    }

    /// Has the kernel forward nothing of a pair any more, and reset whoever still sends something of it. Its addresses are
    /// nobody else's until it is removed: unless its client opens a new connection.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn end(&self, pair: &JoinedPair) -> Result<(), DatapathError> {
        self.set_flows(&pair.in_state(STATE_RESET))
    }

    /// Whether the addresses and ports are still this pair's.
    pub fn holds(&self, pair: &JoinedPair) -> bool {
        if is_direct(pair.number) {
            let there = self.find(&pair.key());
            return there.is_some_and(|there| there.flows.iter().all(|(_, flow)| flow.state != STATE_OVER));
        }
        pair.flows.iter().all(|(key, _)| {
            let there = self.reader.flows.get(key, 0);
            there.is_ok_and(|flow| flow.pair == pair.number && flow.state != STATE_OVER)
        })
    }

    /// Holds new connections back for `duration` from now where nobody listens, or even where somebody does if
    /// `is_leaving`.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn hold(&self, duration: Duration, is_leaving: bool) -> Result<(), DatapathError> {
        let hold_until = match u64::try_from(duration.as_nanos()) {
            Ok(0) => 0,
            Ok(nanoseconds) => monotonic().saturating_add(nanoseconds),
            Err(_) => u64::MAX,
        };
        let state = HoldState { hold_until, is_leaving: u32::from(is_leaving), pad: 0 };
        self.maps().agent.set(0, state, 0).map_err(|source| error("write to", AGENT, None, source))
    }

    /// Takes over what a former agent has left: `take` gets each whole pair. Yields how many entries made none, and were removed. To be
    /// called once, before anything is joined.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn inherit(&self, mut take: impl FnMut(&Inherited)) -> Result<usize, DatapathError> {
        let Listed { pairs, orphans, states } = self.reader.list()?;
        let numbers = states.iter().copied().chain(pairs.iter().map(|pair| pair.key.number));
        self.next.store(numbers.max().map_or(1, |last| last.wrapping_add(1)), Ordering::Relaxed);
        for (number, key) in &orphans {
            self.gate.condemn(Condemned::Flows(*number, [*key; 2]));
        }
        for number in &states {
            self.gate.condemn(Condemned::State(*number));
        }
        self.live.store(pairs.len(), Ordering::Relaxed);
        let mut known = BTreeSet::new();
        for ListedPair { key, paths, is_offloaded, has_early_end, .. } in pairs {
            let (endpoint, local) = key.upstream();
            self.ports.take(local, endpoint);
            if known.insert((paths, is_offloaded)) {
                let [request, response] = paths;
                self.paths.want(request.interface);
                self.paths.want(response.interface);
                // The former agent had seen that its ends hear each other.
                if is_offloaded {
                    self.paths.prove([response, request]);
                }
            }
            take(&Inherited { key, is_offloaded, has_early_end });
        }
        Ok(orphans.len() + states.len())
    }
}
