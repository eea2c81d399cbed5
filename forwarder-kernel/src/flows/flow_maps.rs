//! The maps of flows as they lie in the kernel, and what a dead agent has left in them.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use aya::maps::{Array, HashMap as BpfHashMap, Map, MapData, MapError, MapInfo};
use forwarder_common::flow::{DIRECTION_REQUEST, Flow, Pair, STATE_OVER, STATE_RESET};
use forwarder_common::layout::{AGENT, HoldState};
use forwarder_common::layout::{FLOWS, PAIRS};
use forwarder_common::tuple::FourTuple;

use crate::flows::joined_pair::{Condemned, JoinedPair};
use crate::load_error::LoadError;
use crate::maps::versions::map_path;
use crate::maps::{DatapathError, updates};
use crate::programs::pin_dir::lock;

/// The maps, open.
pub(super) struct FlowMaps {
    pub(super) flows: BpfHashMap<MapData, FourTuple, Flow>,
    pub(super) pairs: BpfHashMap<MapData, u32, Pair>,
    pub(super) agent: Array<MapData, HoldState>,
}

/// What stands in the maps.
pub(super) struct Listed {
    /// The pairs that stand whole there.
    pub(super) pairs: Vec<(JoinedPair, Pair)>,
    /// The directions that have no pair or no opposite, or are over: their pairs' numbers, and their tuples.
    pub(super) orphans: Vec<(u32, FourTuple)>,
}

impl FlowMaps {
    /// Opens the pinned maps of a directory.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, DatapathError> {
        let open = |name: &'static str| {
            MapData::from_pin(map_path(pin_dir, name)).map_err(|source| error("open", name, None, source))
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
    pub(super) fn list(&self) -> Result<Listed, DatapathError> {
        let mut found = HashMap::new();
        for entry in &self.flows {
            let (key, flow) = entry.map_err(|source| error("read", FLOWS, None, source))?;
            let directions: &mut [Option<(FourTuple, Flow)>; 2] = found.entry(flow.pair).or_default();
            directions[usize::from(flow.direction != DIRECTION_REQUEST)] = Some((key, flow));
        }
        let (mut pairs, mut orphans) = (Vec::new(), Vec::new());
        for (number, directions) in found {
            match (directions, self.pairs.get(&number, 0)) {
                ([Some(request), Some(response)], Ok(state))
                    if request.1.state != STATE_OVER && response.1.state != STATE_OVER =>
                {
                    pairs.push((JoinedPair { number, flows: [request, response] }, state));
                }
                (directions, _) => {
                    orphans.extend(directions.into_iter().flatten().map(|(key, _)| (number, key)));
                }
            }
        }
        Ok(Listed { pairs, orphans })
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

/// Whether an agent of this version has pinned its flows in a directory.
pub fn are_pinned(pin_dir: &Path) -> bool {
    map_path(pin_dir, FLOWS).exists()
}

/// What a dead agent, or a running one, has pinned in a directory.
///
/// # Errors
/// Nothing is pinned there, or it cannot be read.
pub fn read(pin_dir: &Path) -> Result<Vec<(JoinedPair, Pair)>, DatapathError> {
    let maps = FlowMaps::open(pin_dir)?;
    let mut pairs = maps.list()?.pairs;
    pairs.retain(|(pair, _)| !pair.is_ended());
    Ok(pairs)
}

/// Has the kernel forward nothing more of pairs that a dead agent has pinned in a directory, and reset whoever still sends
/// something of them, until they are forgotten.
///
/// # Errors
/// The program that the agent has left for this cannot be opened, or the kernel refuses.
pub fn end<'a>(pin_dir: &Path, pairs: impl IntoIterator<Item = &'a JoinedPair>) -> Result<(), DatapathError> {
    let setter = updates::open_flow_setter(pin_dir)?;
    pairs.into_iter().try_for_each(|pair| updates::set_flows(&setter, &pair.in_state(STATE_RESET)))
}

/// Takes pairs out of the maps that a dead agent has pinned in a directory; an agent that runs by now has taken them over, and
/// removes them itself. None starts meanwhile, and the next one waits for a grace period before it puts anything into them.
///
/// # Errors
/// The directory cannot be locked, such as one that is somebody else's, or the maps cannot be opened: the pairs stay in them.
pub fn forget<'a>(
    pin_dir: &Path,
    pairs: impl IntoIterator<Item = &'a JoinedPair>,
) -> Result<(), DatapathError> {
    let _lock = match lock(pin_dir) {
        Ok(lock) => lock,
        Err(LoadError::InUse { .. }) => return Ok(()),
        Err(refused) => {
            return Err(error(
                "remove connections that have ended from",
                FLOWS,
                None,
                MapError::from(io::Error::other(refused)),
            ));
        }
    };
    let mut maps = FlowMaps::open(pin_dir)?;
    pairs.into_iter().for_each(|pair| maps.remove(pair.condemned()));
    Ok(())
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
