//! The connections that a dead agent has left in the kernel, offloaded and direct ones, as somebody sees and ends them who is no agent.

use std::io;
use std::path::Path;

use aya::maps::MapError;
use forwarder_common::direct::DIRECT;
use forwarder_common::flow::{Pair, STATE_RESET};
use forwarder_common::layout::FLOWS;

use super::direct::{DirectMaps, Remover, is_direct};
use super::flow_maps::{FlowMaps, error};
use super::joined_pair::JoinedPair;
use crate::load_error::LoadError;
use crate::maps::versions::{has_entries, map_path};
use crate::maps::{DatapathError, updates};
use crate::programs::pin_dir::lock;

/// Whether an agent of this version has pinned its flows in a directory.
pub fn are_pinned(pin_dir: &Path) -> bool {
    map_path(pin_dir, FLOWS).exists()
}

/// What a dead agent, or a running one, has pinned in a directory.
///
/// # Errors
/// Nothing is pinned there, or it cannot be read.
pub fn read(pin_dir: &Path) -> Result<Vec<(JoinedPair, Pair)>, DatapathError> {
    let mut living = FlowMaps::open(pin_dir)?.living()?;
    if has_direct(pin_dir) {
        let (maps, mut numbers) = (DirectMaps::open(pin_dir)?, Vec::new());
        maps.for_each_number(|number| numbers.push(number));
        living.extend(
            numbers.into_iter().filter_map(|number| maps.get(number)).filter(|(pair, _)| pair.is_offloaded()),
        );
    }
    Ok(living)
}

/// Has the kernel forward nothing more of pairs that a dead agent has pinned in a directory, and reset whoever still sends
/// something of them, until they are forgotten.
///
/// # Errors
/// The program that the agent has left for this cannot be opened, or the kernel refuses.
pub fn end<'a>(pin_dir: &Path, pairs: impl IntoIterator<Item = &'a JoinedPair>) -> Result<(), DatapathError> {
    let setter = updates::open_flow_setter(pin_dir)?;
    let direct = has_direct(pin_dir).then(|| DirectMaps::open(pin_dir)).transpose()?;
    pairs.into_iter().try_for_each(|pair| match &direct {
        Some(direct) if is_direct(pair.number) => {
            direct.set_flows(&pair.in_state(STATE_RESET));
            Ok(())
        }
        _ => updates::set_flows(&setter, &pair.in_state(STATE_RESET)),
    })
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
    let direct = has_direct(pin_dir).then(|| Remover::open(pin_dir)).transpose()?;
    for pair in pairs {
        match &direct {
            Some(direct) if is_direct(pair.number) => {
                direct.forget(&direct.take(pair.number).collect::<Vec<_>>());
            }
            _ => maps.remove(pair.key().condemned()),
        }
    }
    Ok(())
}

/// Whether direct connections are there: most agents make none, and map nothing.
fn has_direct(pin_dir: &Path) -> bool {
    has_entries(&map_path(pin_dir, DIRECT))
}
