//! Programs of agents that hang on interfaces while nothing that they use is pinned where it can be seen.
//!
//! Their pins were removed by hand; or an agent runs whose BPF file system is not mounted here. The names of a program and its maps
//! do not tell these apart, and anybody may use such names: so they are told, and never removed.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fmt;

use aya::maps::loaded_maps;
use aya::programs::{SchedClassifier, loaded_programs};
use forwarder_common::layout::PINNED_MAPS;
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP, PROGRAM_ETHERNET, PROGRAM_IP};
use rustix::io::Errno;

use super::{CleanupError, Side, interfaces, uses};
use crate::load_error::{errno_of, with_causes};
use crate::net::filters::Filters;

/// The programs that hang on interfaces.
const PROGRAMS: [&str; 4] = [PROGRAM_ETHERNET, PROGRAM_IP, PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP];
/// How much of a program's name the kernel keeps (`BPF_OBJ_NAME_LEN`, less a null).
const NAME_LENGTH: usize = 15;

/// A program on an interface, called as an agent's, with maps that are.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Orphan {
    interface: String,
    side: Side,
    program: u32,
    name: String,
}

impl fmt::Display for Orphan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface, side, program, name } = self;
        write!(f, "program {name} ({program}) at {} of interface {interface}", side.as_str())
    }
}

/// Finds them on the interfaces of this network namespace. Needs a tokio runtime.
///
/// # Errors
/// The kernel does not list its programs, or the interfaces.
pub(super) async fn find(pinned: &BTreeSet<u32>) -> Result<Vec<Orphan>, CleanupError> {
    let named = named_as_ours(pinned)?;
    if named.is_empty() {
        return Ok(Vec::new());
    }
    let mut filters = Filters::open().map_err(CleanupError::Socket)?;
    let mut orphans = Vec::new();
    for (index, interface) in interfaces().await? {
        for side in Side::ALL {
            let filters = filters.list(index, side.attach_type()).map_err(CleanupError::Socket)?;
            let mut programs: Vec<u32> = filters.iter().map(|filter| filter.program).collect();
            // A kernel without tcx knows no such question.
            if let Ok((_, linked)) = SchedClassifier::query_tcx(&interface, side.attach_type()) {
                programs.extend(linked.iter().map(aya::programs::ProgramInfo::id));
            }
            orphans.extend(programs.into_iter().filter_map(|program| {
                let name = named.get(&program)?.clone();
                Some(Orphan { interface: interface.clone(), side, program, name })
            }));
        }
    }
    Ok(orphans)
}

/// The programs that are called as ours and use maps that are, none of which is pinned: their names by their numbers.
fn named_as_ours(pinned: &BTreeSet<u32>) -> Result<BTreeMap<u32, String>, CleanupError> {
    let mut maps = BTreeSet::new();
    for map in there(loaded_maps()) {
        let map = map?;
        if map.name_as_str().is_some_and(|name| PINNED_MAPS.iter().any(|map| map.name == name)) {
            maps.insert(map.id());
        }
    }
    let mut named = BTreeMap::new();
    for program in there(loaded_programs()) {
        let program = program?;
        let name = program.name_as_str().unwrap_or_default();
        let is_named = PROGRAMS.iter().any(|ours| ours.get(..NAME_LENGTH).unwrap_or(ours) == name);
        if is_named && uses(&program, &maps) && !uses(&program, pinned) {
            named.insert(program.id(), name.to_owned());
        }
    }
    Ok(named)
}

/// What the kernel lists, less what has gone between being numbered and being looked at.
fn there<T, E: Error + 'static>(
    listed: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, CleanupError>> {
    listed
        .filter(|one| !one.as_ref().is_err_and(|error| errno_of(error) == Some(Errno::NOENT)))
        .map(|one| one.map_err(|error| CleanupError::Programs { reason: with_causes(&error) }))
}
