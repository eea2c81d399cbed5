//! The directory on the BPF file system where operators find the maps.
//!
//! It belongs to one running agent, by a lock (`flock`) on the directory itself: it excludes whoever sees that file
//! system, in whatever namespaces, and ends with the process, however that ends. What a dead agent left is taken over where
//! connections may live in it, and removed otherwise.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use forwarder_common::direct::{DIRECT, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS};
use forwarder_common::layout::FLOWS;
use forwarder_common::update::{PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};

use crate::load_error::LoadError;
use crate::maps::versions::{folders, foreign_maps, has_entries, map_path, programs_folder, version_folders};
use crate::programs::hook;
use crate::programs::pin_dir::{check_folders_above, create, is_on_bpffs, take};

/// Where is pinned what holds the programs on interfaces, in the folder of the programs: links, or with clsact the programs.
pub(super) const LINKS: &str = "links";

/// The pin directory, ours while this lives. Dropping it removes the pins, and the directories that are empty then, unless
/// they are to be left.
#[derive(Debug)]
pub(crate) struct Pins {
    pin_dir: PathBuf,
    is_left: bool,
    /// Whether something of other versions may stand there, which this agent cannot take over.
    may_have_foreign: bool,
    _lock: File,
}

impl Pins {
    /// Takes a pin directory for this agent. What a dead agent left in it is kept if its programs still hang on interfaces, or
    /// connections live in it.
    ///
    /// # Errors
    /// It is not on a BPF file system, it is somebody else's, another running agent has it, programs that this agent could not replace
    /// still hang on interfaces or have connections, or the kernel refuses.
    pub(crate) fn acquire(pin_dir: &Path) -> Result<Self, LoadError> {
        if !is_on_bpffs(pin_dir)? {
            return Err(LoadError::NotBpffs { path: pin_dir.to_owned() });
        }
        let lock = take(pin_dir)?;
        // Once they are there: what is missing others could make.
        check_folders_above(pin_dir)?;
        let programs = programs_folder(pin_dir);
        let are_attached = has_attachments(&programs);
        refuse_foreign(pin_dir, &programs, are_attached)?;
        for folder in folders(pin_dir) {
            create(&folder)?;
        }
        // Whoever fails before it has taken over what is there leaves it to one who does not.
        let is_left = are_attached || has_flows(pin_dir);
        let pins = Self { pin_dir: pin_dir.to_owned(), is_left, may_have_foreign: true, _lock: lock };
        if !is_left {
            pins.clear().map_err(|source| LoadError::PinDir {
                operation: "remove what a former agent left in",
                path: pin_dir.to_owned(),
                source,
            })?;
        }
        Ok(pins)
    }

    /// Whether connections of a former agent may live here: it had egress programs, or there are flows.
    pub(crate) fn has_connections(&self) -> bool {
        attachments(&programs_folder(&self.pin_dir)).any(|name| hook::is_egress(&name))
            || has_flows(&self.pin_dir)
    }

    /// For how many direct connections maps are to be made, where `wanted` are: as many as the pinned ones have room for, if connections live in
    /// them, or may. Otherwise those are removed, so that they are made anew.
    pub(crate) fn room_for_direct(&self, wanted: u32) -> u32 {
        let path = map_path(&self.pin_dir, DIRECT_SLOTS);
        let Some(room) = MapInfo::from_pin(&path).ok().map(|info| info.max_entries()) else { return wanted };
        if room == wanted.max(1) {
            return wanted;
        }
        // Programs that hang on interfaces may be making some just now, if there is room for more than none.
        let may_have = room > 1 && has_attachments(&programs_folder(&self.pin_dir));
        if may_have || has_entries(&map_path(&self.pin_dir, DIRECT)) {
            tracing::warn!(
                wanted,
                room,
                "a former agent's maps have room for another number of connections than --max-direct: it stays until they are removed, by SIGINT or `forwarder cleanup`"
            );
            return room;
        }
        for name in [DIRECT, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS] {
            remove_foreign(&map_path(&self.pin_dir, name));
        }
        wanted
    }

    /// Where links are pinned; made if it is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn links(&self) -> Result<PathBuf, LoadError> {
        let links = programs_folder(&self.pin_dir).join(LINKS);
        create(&links)?;
        Ok(links)
    }

    /// Takes over what is pinned: it ends with this agent, unless it is left to the next one.
    pub(crate) fn take_over(&mut self) {
        self.is_left = false;
    }

    /// Removes what agents of other versions have pinned, and tells what is lost with it. To be called once this agent's programs hang
    /// wherever those of a former one did: then nothing uses it any more.
    pub(crate) fn forget_foreign(&mut self) {
        if !std::mem::take(&mut self.may_have_foreign) {
            return;
        }
        for map in foreign_maps(&self.pin_dir) {
            if let Some(loss) = map.loss() {
                tracing::warn!(
                    map = map.name,
                    path = %map.path.display(),
                    "an agent of another version has left a map whose layout this agent does not know: {loss}"
                );
            }
            remove_foreign(&map.path);
        }
        let own = folders(&self.pin_dir);
        for folder in version_folders(&self.pin_dir).into_iter().filter(|folder| !own.contains(folder)) {
            for program in [PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER] {
                remove_foreign(&folder.join(program));
            }
            // Neither is an error: it may be somebody else's, or hold more.
            let _ = fs::remove_dir(folder.join(LINKS));
            let _ = fs::remove_dir(folder);
        }
    }

    /// Leaves what is pinned to the next agent.
    pub(crate) fn leave(&mut self) {
        self.is_left = true;
    }

    /// The pin directory.
    pub(crate) fn pin_dir(&self) -> &Path {
        &self.pin_dir
    }

    fn clear(&self) -> io::Result<()> {
        // The links first: a program that hangs nowhere misses no map.
        for folder in [vec![programs_folder(&self.pin_dir).join(LINKS)], folders(&self.pin_dir)].concat() {
            let entries = match fs::read_dir(&folder) {
                Ok(entries) => entries,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for entry in entries {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    fs::remove_dir(entry.path())?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if self.is_left {
            return;
        }
        if let Err(error) = self.clear() {
            tracing::warn!(path = %self.pin_dir.display(), %error, "cannot remove the pinned maps");
        }
        // None is an error: the directory may hold what is not ours, or be where a container has the node's.
        for folder in folders(&self.pin_dir) {
            let _ = fs::remove_dir(folder);
        }
        let _ = fs::remove_dir(&self.pin_dir);
    }
}

/// Whether connections are in the maps of this version.
fn has_flows(pin_dir: &Path) -> bool {
    [FLOWS, DIRECT].into_iter().any(|name| has_entries(&map_path(pin_dir, name)))
}

/// The names of what is pinned for the places where programs hang, in a folder of programs.
fn attachments(programs: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(programs.join(LINKS)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

fn has_attachments(programs: &Path) -> bool {
    attachments(programs).next().is_some()
}

/// Removes a pin of another version, if it is there.
fn remove_foreign(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove a pin of another version: its memory is not freed");
        }
        _ => {}
    }
}

/// Refuses to start beside programs that this agent could not replace: those of which an agent of another version has pinned what
/// holds them, and those that have flows of another version and of which nothing is pinned in `programs`, so that it is not known
/// where they hang.
fn refuse_foreign(pin_dir: &Path, programs: &Path, are_attached: bool) -> Result<(), LoadError> {
    let mut folders = version_folders(pin_dir).into_iter().filter(|folder| folder != programs);
    let attached = folders.find(|folder| has_attachments(folder));
    let maps = if are_attached { Vec::new() } else { foreign_maps(pin_dir) };
    let connected = maps.iter().find(|map| map.name == FLOWS && has_entries(&map.path));
    let path = attached.or_else(|| connected?.path.parent().map(Path::to_owned));
    path.map_or(Ok(()), |path| Err(LoadError::ForeignLayout { path }))
}
