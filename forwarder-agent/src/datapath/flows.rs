//! The flows of promoted pairs in the kernel's maps, shared by the workers.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError};
use forwarder_common::ABI_VERSION;
use forwarder_common::flow::{
    DIRECTION_REQUEST, FLOW_BY_STACK, FLOW_ENDED, FLOW_REVERSE_ENDED, FLOWS, Flow, FlowKey, NextHop, PAIRS,
    Pair, STATE_SPLICED,
};
use forwarder_common::layout::{AGENT, AgentState, address_bytes, address_of};
use rustix::io::Errno;

use super::conntrack::Conntrack;
use super::load_error::errno_of;
use super::paths::{Exit, Paths};
use super::ports::TakenPorts;
use super::routes::{Egress, RouteError, Routes};
use super::stack::Family;
use super::{DatapathError, monotonic};
use crate::promote::{Hop, Leg, Placement, Refusal, Way, join};

mod ending;
mod tracking;

pub use self::ending::end;

/// The flags of `bpf(BPF_MAP_UPDATE_ELEM)` by which an entry must not be there yet, or must be there.
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

/// The TTL or hop limit of what is sent on: what Linux gives its own packets unless it is told otherwise (`IPDEFTTL`).
const HOP_LIMIT: u8 = 64;

/// The maps of flows, open.
pub struct FlowTable {
    maps: Mutex<FlowMaps>,
    routes: Routes,
    /// `None` where the kernel has none.
    conntrack: Option<Conntrack>,
    paths: Arc<Paths>,
    ports: TakenPorts,
    next: AtomicU32,
    /// How many pairs there are.
    live: AtomicUsize,
}

struct FlowMaps {
    flows: BpfHashMap<MapData, FlowKey, Flow>,
    pairs: BpfHashMap<MapData, u32, Pair>,
    agent: Array<MapData, AgentState>,
}

/// What stands in the maps.
struct Listed {
    /// The pairs that stand whole there.
    pairs: Vec<(JoinedPair, Pair)>,
    /// The tuples of directions that have no pair or no opposite.
    orphans: Vec<FlowKey>,
}

/// A pair that the kernel forwards: its number and its two directions, from the client first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JoinedPair {
    /// Its number: key of the map of pairs.
    pub number: u32,
    /// The tuples of its packets as they arrive, and where they go.
    pub flows: [(FlowKey, Flow); 2],
}

impl JoinedPair {
    /// The client, and the node's address that it has connected to.
    pub fn downstream(&self) -> (SocketAddr, SocketAddr) {
        ends(&self.flows[0].0)
    }

    /// The endpoint, and the node's address that it was connected from.
    pub fn upstream(&self) -> (SocketAddr, SocketAddr) {
        ends(&self.flows[1].0)
    }

    /// Whether the sockets have nothing more to do with it.
    pub fn is_spliced(&self) -> bool {
        self.flows.iter().all(|(_, flow)| flow.state == STATE_SPLICED)
    }
}

/// Where packets of a tuple come from, and where they are sent to.
fn ends(key: &FlowKey) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(address_of(key.source), key.source_port),
        SocketAddr::new(address_of(key.destination), key.destination_port),
    )
}

/// What a former agent has left in the maps.
#[derive(Debug, Default)]
pub struct Inherited {
    /// Whole pairs.
    pub pairs: Vec<JoinedPair>,
    /// How many entries made no whole pair, and were removed.
    pub remnants: usize,
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
}

impl FlowMaps {
    /// Opens the pinned maps of a directory.
    fn open(pins: &Path) -> Result<Self, DatapathError> {
        let open = |name: &'static str| {
            MapData::from_pin(pins.join(name)).map_err(|source| error("open", name, None, source))
        };
        let hash = |name| Ok(Map::HashMap(open(name)?));
        let failed = |name| move |source| error("open", name, None, source);
        Ok(Self {
            flows: BpfHashMap::try_from(hash(FLOWS)?).map_err(failed(FLOWS))?,
            pairs: BpfHashMap::try_from(hash(PAIRS)?).map_err(failed(PAIRS))?,
            agent: Array::try_from(Map::Array(open(AGENT)?)).map_err(failed(AGENT))?,
        })
    }

    /// The pairs that stand whole in the maps, and the tuples of directions that have no pair or no opposite.
    fn list(&self) -> Result<Listed, DatapathError> {
        let mut halves = HashMap::new();
        for entry in &self.flows {
            let (key, flow) = entry.map_err(|source| error("read", FLOWS, None, source))?;
            let directions: &mut [Option<(FlowKey, Flow)>; 2] = halves.entry(flow.pair).or_default();
            directions[usize::from(flow.direction != DIRECTION_REQUEST)] = Some((key, flow));
        }
        let (mut pairs, mut orphans) = (Vec::new(), Vec::new());
        for (number, directions) in halves {
            match (directions, self.pairs.get(&number, 0)) {
                ([Some(request), Some(response)], Ok(state)) => {
                    pairs.push((JoinedPair { number, flows: [request, response] }, state));
                }
                (directions, _) => orphans.extend(directions.into_iter().flatten().map(|(key, _)| key)),
            }
        }
        Ok(Listed { pairs, orphans })
    }

    /// Writes both directions of a pair anew.
    fn rewrite(&mut self, pair: &JoinedPair) -> Result<(), DatapathError> {
        for (key, flow) in &pair.flows {
            // What a program has forgotten meanwhile must not come back, nor take the place of what came after it.
            if self.flows.get(key, 0).is_ok_and(|there| there.pair != pair.number) {
                continue;
            }
            self.flows
                .insert(key, flow, BPF_EXIST)
                .map_err(|source| error("write to", FLOWS, Some(pair.number), source))?;
        }
        Ok(())
    }

    /// Removes what is there of a pair.
    fn remove(&mut self, pair: &JoinedPair) {
        // The pair first: it turns both directions off at once. What is gone needs no removal.
        let _ = self.pairs.remove(&pair.number);
        for (key, _) in &pair.flows {
            // The tuple may be another pair's by now.
            if self.flows.get(key, 0).is_ok_and(|flow| flow.pair == pair.number) {
                let _ = self.flows.remove(key);
            }
        }
    }
}

/// What a dead agent, or a running one, has pinned in a directory.
///
/// # Errors
/// Nothing is pinned there, or it cannot be read.
pub fn read(pin_dir: &Path) -> Result<Vec<(JoinedPair, Pair)>, DatapathError> {
    let maps = FlowMaps::open(&pin_dir.join(format!("v{ABI_VERSION}")))?;
    Ok(maps.list()?.pairs)
}

/// Takes pairs out of the maps that a dead agent has pinned in a directory.
///
/// # Errors
/// They cannot be opened.
pub fn forget<'a>(
    pin_dir: &Path,
    pairs: impl IntoIterator<Item = &'a JoinedPair>,
) -> Result<(), DatapathError> {
    let mut maps = FlowMaps::open(&pin_dir.join(format!("v{ABI_VERSION}")))?;
    pairs.into_iter().for_each(|pair| maps.remove(pair));
    Ok(())
}

impl FlowTable {
    /// Opens the pinned maps of a directory.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn open(pins: &Path, routes: Routes, paths: Arc<Paths>) -> Result<Self, DatapathError> {
        let maps = Mutex::new(FlowMaps::open(pins)?);
        let (next, live) = (AtomicU32::new(1), AtomicUsize::new(0));
        let conntrack = match Conntrack::open() {
            Ok(conntrack) => Some(conntrack),
            Err(error) => {
                tracing::debug!(%error, "connection tracking cannot be asked");
                None
            }
        };
        Ok(Self { maps, routes, conntrack, paths, ports: TakenPorts::default(), next, live })
    }

    fn maps(&self) -> MutexGuard<'_, FlowMaps> {
        self.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the interfaces.
    pub fn paths(&self) -> &Paths {
        &self.paths
    }

    /// The local ports that pairs use.
    pub fn ports(&self) -> &TakenPorts {
        &self.ports
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
        let key = FlowKey {
            source: address_bytes(peer.ip()),
            destination: address_bytes(local.ip()),
            source_port: peer.port(),
            destination_port: local.port(),
        };
        self.maps().flows.get(&key, 0).is_ok()
    }

    /// Joins two legs in state tail: from now on their new packets pass by the sockets. The client's connection was
    /// accepted at `opened` (`CLOCK_MONOTONIC`, nanoseconds).
    ///
    /// # Errors
    /// Why they stay as they are.
    pub fn join(&self, opened: u64, downstream: &Leg, upstream: &Leg) -> Result<JoinedPair, Refusal> {
        let placement = Placement {
            downstream: self.hop(downstream)?,
            upstream: self.hop(upstream)?,
            pair: self.next.fetch_add(1, Ordering::Relaxed),
        };
        let mut joint = join(downstream, upstream, placement)?;
        self.check_stack(&joint.flows)?;
        for leg in [downstream, upstream] {
            self.check_translation(leg)?;
        }
        joint.pair.opened = opened;
        let pair = JoinedPair { number: placement.pair, flows: joint.flows };
        self.keep_valid(&pair);
        let mut maps = self.maps();
        // The pair last: it turns both directions on at once.
        let mut written = Ok(());
        for (key, flow) in &pair.flows {
            written = written.and_then(|()| maps.flows.insert(key, flow, BPF_NOEXIST));
        }
        written = written.and_then(|()| maps.pairs.insert(pair.number, joint.pair, BPF_NOEXIST));
        written.map_err(|source| {
            maps.remove(&pair);
            if errno_of(&source) == Some(Errno::TOOBIG) {
                return Refusal::MapFull;
            }
            let error = error("write to", FLOWS, Some(pair.number), source);
            tracing::warn!(%error, "a connection stays in userspace");
            Refusal::Kernel
        })?;
        let (endpoint, local) = pair.upstream();
        self.ports.take(local, endpoint);
        self.live.fetch_add(1, Ordering::Relaxed);
        Ok(pair)
    }

    /// Where a leg's packets leave: by an interface on which programs hang.
    fn hop(&self, leg: &Leg) -> Result<Hop, Refusal> {
        let egress = self.routes.egress(leg.local.ip(), leg.peer.ip()).map_err(|error| {
            tracing::debug!(%error, "a connection stays in userspace");
            Refusal::NoRoute
        })?;
        if egress.is_local {
            return Err(Refusal::SameHost);
        }
        let way = self.paths.check(egress.interface)?;
        Ok(Hop {
            interface: egress.interface,
            next_hop: NextHop::new(egress.next_hop),
            mtu: self.mtu(&egress),
            way,
            hop_limit: HOP_LIMIT,
        })
    }

    /// Whether the stack sends on what is left to it: that arrives by the interface that the other direction leaves by.
    fn check_stack(&self, flows: &[(FlowKey, Flow); 2]) -> Result<(), Refusal> {
        let [(key, request), (_, response)] = flows;
        let family = if address_of(key.source).is_ipv4() { Family::V4 } else { Family::V6 };
        for (flow, arrival) in [(request, response.interface), (response, request.interface)] {
            if Way::of(flow) == Way::Stack {
                self.paths.check_stack(arrival, family)?;
            }
        }
        Ok(())
    }

    /// The largest packet that may leave, as [`Flow::mtu`]: what the route says, or the interface.
    fn mtu(&self, egress: &Egress) -> u32 {
        let mtus = egress.mtu.into_iter().chain(self.paths.mtu(egress.interface));
        mtus.min().unwrap_or(0)
    }

    /// Notes that the end of a direction reached a local socket before the promotion: the guard then lets the agent's
    /// other socket pass it on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn pass_end_on(&self, pair: &mut JoinedPair, direction: u32) -> Result<(), DatapathError> {
        for (_, flow) in &mut pair.flows {
            flow.flags |= if flow.direction == direction { FLOW_ENDED } else { FLOW_REVERSE_ENDED };
        }
        self.rewrite(pair)
    }

    /// Closes the guard: the local sockets have delivered everything.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn splice(&self, pair: &mut JoinedPair) -> Result<(), DatapathError> {
        for (_, flow) in &mut pair.flows {
            flow.state = STATE_SPLICED;
        }
        self.rewrite(pair)
    }

    /// Looks up anew how a pair's packets leave, after routes or MTUs have changed; tells whether that is another way now.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn reroute(&self, pair: &mut JoinedPair) -> Result<bool, DatapathError> {
        let mut has_moved = false;
        for (_, flow) in &mut pair.flows {
            let (local, peer) = ends(&flow.out);
            // Where there is no route for the moment, the old one is as good.
            let Ok(egress) = self.routes.egress(local.ip(), peer.ip()) else { continue };
            if egress.is_local {
                continue;
            }
            let before = *flow;
            if flow.interface != egress.interface {
                let Ok(way) = self.paths.check(egress.interface) else { continue };
                flow.flags = flow.flags & !FLOW_BY_STACK | way.flag();
            }
            (flow.interface, flow.next_hop) = (egress.interface, NextHop::new(egress.next_hop));
            flow.mtu = self.mtu(&egress);
            has_moved |= before != *flow;
        }
        let [(_, request), (_, response)] = &mut pair.flows;
        (request.arrival, response.arrival) = (response.interface, request.interface);
        if has_moved {
            self.keep_valid(pair);
            self.rewrite(pair)?;
        }
        Ok(has_moved)
    }

    /// Has packets of a pair leave in other ways where those that they take are avoided now; tells whether there are such.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn change_ways(&self, pair: &mut JoinedPair) -> Result<bool, DatapathError> {
        let mut changed = *pair;
        for (_, flow) in &mut changed.flows {
            let Ok(way) = self.paths.check(flow.interface) else { return Ok(false) };
            flow.flags = flow.flags & !FLOW_BY_STACK | way.flag();
        }
        if changed == *pair || self.check_stack(&changed.flows).is_err() {
            return Ok(false);
        }
        *pair = changed;
        self.keep_valid(pair);
        self.rewrite(pair)?;
        Ok(true)
    }

    fn rewrite(&self, pair: &JoinedPair) -> Result<(), DatapathError> {
        self.maps().rewrite(pair)
    }

    /// What is known of a pair; `None` if it is gone.
    pub fn pair(&self, number: u32) -> Option<Pair> {
        self.maps().pairs.get(&number, 0).ok()
    }

    /// Takes a pair out of the kernel, both directions at once: its packets are the local stack's again. To be called once
    /// for each pair that was joined or inherited.
    pub fn remove(&self, pair: &JoinedPair) {
        self.maps().remove(pair);
        let (endpoint, local) = pair.upstream();
        self.ports.free(local, endpoint);
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether the addresses and ports are still this pair's.
    pub fn holds(&self, pair: &JoinedPair) -> bool {
        let maps = self.maps();
        pair.flows.iter().all(|(key, _)| maps.flows.get(key, 0).is_ok_and(|flow| flow.pair == pair.number))
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
        let state = AgentState { hold_until, is_leaving: u32::from(is_leaving), pad: 0 };
        self.maps().agent.set(0, state, 0).map_err(|source| error("write to", AGENT, None, source))
    }

    /// Takes over what a former agent has left. To be called once, before anything is joined.
    ///
    /// # Errors
    /// The maps cannot be read.
    pub fn inherit(&self) -> Result<Inherited, DatapathError> {
        let mut maps = self.maps();
        let Listed { pairs, orphans } = maps.list()?;
        let pairs: Vec<JoinedPair> = pairs.into_iter().map(|(pair, _)| pair).collect();
        let numbers: Vec<u32> = maps.pairs.keys().filter_map(Result::ok).collect();
        self.next.store(numbers.iter().max().map_or(1, |last| last.wrapping_add(1)), Ordering::Relaxed);
        let whole: HashSet<u32> = pairs.iter().map(|pair| pair.number).collect();
        let mut remnants = orphans.len();
        for key in &orphans {
            let _ = maps.flows.remove(key);
        }
        for number in numbers.iter().filter(|number| !whole.contains(number)) {
            remnants += 1;
            let _ = maps.pairs.remove(number);
        }
        drop(maps);
        self.live.store(pairs.len(), Ordering::Relaxed);
        for pair in &pairs {
            let (endpoint, local) = pair.upstream();
            self.ports.take(local, endpoint);
            let [request, response] = pair.flows.map(|(_, flow)| Exit::of(&flow));
            self.paths.want(request.interface);
            self.paths.want(response.interface);
            // The former agent had seen that its ends hear each other.
            if pair.is_spliced() {
                self.paths.prove([response, request]);
            }
        }
        Ok(Inherited { pairs, remnants })
    }
}

fn error(operation: &'static str, map: &'static str, entry: Option<u32>, source: MapError) -> DatapathError {
    DatapathError {
        operation,
        map,
        entry: entry.map(|pair| format!("pair {pair}")),
        source: Box::new(source),
    }
}
