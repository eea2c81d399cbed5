//! The maps of flows as they lie in the kernel, and what a dead agent has left in them.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::thread;

use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, MapInfo};
use forwarder_common::flow::{
    DIRECTION_REQUEST, DIRECTION_RESPONSE, Flow, Pair, STATE_OFFLOADED, STATE_OVER, STATE_RESET,
};
use forwarder_common::layout::{AGENT, HoldState};
use forwarder_common::layout::{FLOWS, PAIRS};
use forwarder_common::tuple::FourTuple;

use crate::flows::joined_pair::{Condemned, JoinedPair, PairKey, is_early_end};
use crate::maps::versions::map_path;
use crate::maps::{DatapathError, batch};
use crate::net::egress_path::EgressPath;

/// The maps, open.
pub(super) struct FlowMaps {
    pub(super) flows: BpfHashMap<MapData, FourTuple, Flow>,
    pub(super) pairs: BpfHashMap<MapData, u32, Pair>,
    pub(super) agent: Array<MapData, HoldState>,
    /// The first two once more, to be read by thousands of entries at a time.
    bulk: Bulk,
}

struct Bulk {
    flows: MapData,
    pairs: MapData,
}

/// What stands in the maps.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// The pairs that stand whole there.
    pub(super) pairs: Vec<ListedPair>,
    /// The directions that have no pair or no opposite, or are over: their pairs' numbers, and their tuples.
    pub(super) orphans: Vec<(u32, FourTuple)>,
    /// The pairs that have no directions.
    pub(super) states: Vec<u32>,
}

/// A pair that stands whole in the maps.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListedPair {
    pub(super) key: PairKey,
    /// Where its packets leave: from the client first.
    pub(super) paths: [EgressPath; 2],
    /// Whether the sockets of its agent have nothing more to do with it.
    pub(super) is_offloaded: bool,
    /// [`JoinedPair::has_early_end`].
    pub(super) has_early_end: bool,
    /// Whether an agent has ended it.
    pub(super) is_ended: bool,
}

/// One direction of a pair, as far as it takes to find the other one: there may be millions.
struct ListedFlow {
    pair: u32,
    direction: u32,
    state: u32,
    flags: u16,
    path: EgressPath,
    tuple: FourTuple,
}

impl FlowMaps {
    /// Opens the pinned maps of a directory.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, DatapathError> {
        let open = |name: &'static str| {
            MapData::from_pin(map_path(pin_dir, name)).map_err(|source| error("open", name, None, source))
        };
        let hash = |name| Ok(Map::HashMap(open(name)?));
        let bulk = Bulk { flows: open(FLOWS)?, pairs: open(PAIRS)? };
        let failed = |name| move |source| error("open", name, None, source);
        Ok(Self {
            flows: BpfHashMap::try_from(hash(FLOWS)?).map_err(failed(FLOWS))?,
            pairs: BpfHashMap::try_from(hash(PAIRS)?).map_err(failed(PAIRS))?,
            agent: Array::try_from(Map::Array(open(AGENT)?)).map_err(failed(AGENT))?,
            bulk,
        })
    }

    /// Visits what is known of every pair.
    pub(super) fn for_each_pair(&self, mut visit: impl FnMut(u32, &Pair)) -> Result<(), DatapathError> {
        batch::for_each(self.bulk.pairs.fd().as_fd(), |number, pair| visit(*number, pair))
            .map_err(|source| error("read", PAIRS, None, source.into()))
    }

    /// The directions of all pairs, sorted.
    fn directions(&self) -> Result<Vec<ListedFlow>, DatapathError> {
        let mut directions = Vec::new();
        batch::for_each(self.bulk.flows.fd().as_fd(), |tuple: &FourTuple, flow: &Flow| {
            let Flow { pair, direction, state, flags, .. } = *flow;
            let path = EgressPath::of(flow);
            directions.push(ListedFlow { pair, direction, state, flags, path, tuple: *tuple });
        })
        .map_err(|source| error("read", FLOWS, None, source.into()))?;
        directions.sort_unstable_by_key(|one| (one.pair, one.direction));
        Ok(directions)
    }

    /// The numbers of all pairs of which something is known, sorted.
    fn numbers(&self) -> Result<Vec<u32>, DatapathError> {
        let mut numbers = Vec::new();
        self.for_each_pair(|number, _| numbers.push(number))?;
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// What stands in the maps.
    pub(super) fn list(&self) -> Result<Listed, DatapathError> {
        // Each waits for memory most of the time.
        let (directions, states) = thread::scope(|scope| {
            let states = thread::Builder::new().spawn_scoped(scope, || self.numbers());
            let directions = self.directions();
            let states = match states {
                Ok(states) => states.join().expect("a panic ends the process"),
                Err(_) => self.numbers(),
            };
            (directions, states)
        });
        let (directions, states) = (directions?, states?);
        let mut listed = Listed::default();
        // Both are sorted by number.
        let mut states = states.into_iter().peekable();
        for of_pair in directions.chunk_by(|one, other| one.pair == other.pair) {
            let number = of_pair[0].pair;
            listed.states.extend(std::iter::from_fn(|| states.next_if(|state| *state < number)));
            let has_state = states.next_if_eq(&number).is_some();
            match of_pair {
                [request, response]
                    if (request.direction, response.direction) == (DIRECTION_REQUEST, DIRECTION_RESPONSE)
                        && of_pair.iter().all(|one| one.state != STATE_OVER)
                        && has_state =>
                {
                    listed.pairs.push(ListedPair {
                        key: PairKey { number, tuples: [request.tuple, response.tuple] },
                        paths: [request.path, response.path],
                        is_offloaded: of_pair.iter().all(|one| one.state == STATE_OFFLOADED),
                        has_early_end: of_pair.iter().any(|one| is_early_end(one.flags)),
                        is_ended: of_pair.iter().any(|one| one.state == STATE_RESET),
                    });
                }
                orphans => {
                    listed.orphans.extend(orphans.iter().map(|one| (number, one.tuple)));
                    listed.states.extend(has_state.then_some(number));
                }
            }
        }
        listed.states.extend(states);
        Ok(listed)
    }

    /// A pair as it stands in the maps; `None` if it does not stand there whole any more.
    pub(super) fn find(&self, key: &PairKey) -> Option<JoinedPair> {
        let flow = |tuple: FourTuple| {
            let flow = self.flows.get(&tuple, 0).ok().filter(|flow| flow.pair == key.number)?;
            Some((tuple, flow))
        };
        let [request, response] = key.tuples;
        Some(JoinedPair { number: key.number, flows: [flow(request)?, flow(response)?] })
    }

    /// The pairs that no agent has ended, and what is known of each.
    pub(super) fn living(&self) -> Result<Vec<(JoinedPair, Pair)>, DatapathError> {
        let listed = self.list()?.pairs;
        let living = listed.iter().filter(|pair| !pair.is_ended);
        Ok(living
            .filter_map(|pair| Some((self.find(&pair.key)?, self.pairs.get(&pair.key.number, 0).ok()?)))
            .collect())
    }

    /// Removes what is there.
    pub(super) fn remove(&mut self, condemned: Condemned) {
        // The pair first: it turns both directions off at once. What is gone needs no removal.
        if let Condemned::Pair(number, _) | Condemned::State(number) = condemned {
            let _ = self.pairs.remove(&number);
        }
        let (Condemned::Pair(number, keys) | Condemned::Flows(number, keys)) = condemned else { return };
        for key in &keys {
            // The tuple may be another pair's by now.
            if self.flows.get(key, 0).is_ok_and(|flow| flow.pair == number) {
                let _ = self.flows.remove(key);
            }
        }
    }
}

/// How many pairs the maps that are pinned in a directory have room for.
pub(super) fn capacity(pin_dir: &Path) -> Result<usize, DatapathError> {
    let info = MapInfo::from_pin(map_path(pin_dir, PAIRS))
        .map_err(|source| error("look at", PAIRS, None, source))?;
    Ok(usize::try_from(info.max_entries()).unwrap_or(usize::MAX))
}

/// What failed on an entry of a map.
pub(super) fn error(
    operation: &'static str,
    map: &'static str,
    entry: Option<u32>,
    source: MapError,
) -> DatapathError {
    DatapathError {
        operation,
        map,
        entry: entry.map(|pair| format!("pair {pair}")),
        source: Box::new(source),
    }
}
