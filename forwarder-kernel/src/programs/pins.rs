//! The directory on the BPF file system where operators find the maps.
//!
//! It belongs to one running agent, by a lock (`flock`) on the directory itself: it excludes whoever sees that file
//! system, in whatever namespaces, and ends with the process, however that ends. What a dead agent left is taken over where
//! connections may live in it, and removed otherwise.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use forwarder_common::ABI_VERSION;
use forwarder_common::flow::Flow;
use forwarder_common::layout::FLOWS;
use forwarder_common::tuple::FourTuple;

use crate::load_error::LoadError;
use crate::programs::hook;
use crate::programs::pin_dir::{check_folders_above, create, is_on_bpffs, take};

/// Where is pinned what holds the programs on interfaces, in the directory of a version: links, or with clsact the programs.
pub(super) const LINKS: &str = "links";

/// A flow of version 3, whose agents pinned nothing else where they attached by clsact.
type FormerFlow = [u8; 104];

/// The pin directory, ours while this lives. Dropping it removes the pins, and the directories that are empty then, unless
/// they are to be left.
#[derive(Debug)]
pub(crate) struct Pins {
    parent: PathBuf,
    directory: PathBuf,
    is_left: bool,
    _lock: File,
}

impl Pins {
    /// Takes `parent` for this agent. What a dead agent left in the directory of this version is kept if its programs still
    /// hang on interfaces, or connections live in it.
    ///
    /// # Errors
    /// It is not on a BPF file system, it is somebody else's, another running agent has it, the programs of another version still hang on
    /// interfaces or have connections, or the kernel refuses.
    pub(crate) fn acquire(parent: &Path) -> Result<Self, LoadError> {
        if !is_on_bpffs(parent)? {
            return Err(LoadError::NotBpffs { path: parent.to_owned() });
        }
        let lock = take(parent)?;
        // Once they are there: what is missing others could make.
        check_folders_above(parent)?;
        let directory = parent.join(format!("v{ABI_VERSION}"));
        refuse_foreign(parent, &directory)?;
        create(&directory)?;
        // Whoever fails before it has taken over what is there leaves it to one who does not.
        let is_left = has_attachments(&directory) || has_flows(&directory);
        let pins = Self { parent: parent.to_owned(), directory, is_left, _lock: lock };
        if !is_left {
            pins.clear().map_err(|source| LoadError::PinDir {
                operation: "remove what a former agent left in",
                path: pins.directory.clone(),
                source,
            })?;
        }
        Ok(pins)
    }

    /// Whether connections of a former agent may live here: it had egress programs, or there are flows.
    pub(crate) fn has_connections(&self) -> bool {
        attachments(&self.directory).any(|name| hook::is_egress(&name)) || has_flows(&self.directory)
    }

    /// Where links are pinned; made if it is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn links(&self) -> Result<PathBuf, LoadError> {
        let links = self.directory.join(LINKS);
        create(&links)?;
        Ok(links)
    }

    /// Takes over what is pinned: it ends with this agent, unless it is left to the next one.
    pub(crate) fn take_over(&mut self) {
        self.is_left = false;
    }

    /// Leaves what is pinned to the next agent.
    pub(crate) fn leave(&mut self) {
        self.is_left = true;
    }

    /// Where this version's maps are pinned.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    fn clear(&self) -> io::Result<()> {
        // The links first: a program that hangs nowhere misses no map.
        for folder in [self.directory.join(LINKS), self.directory.clone()] {
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
            tracing::warn!(path = %self.directory.display(), %error, "cannot remove the pinned maps");
        }
        // Neither is an error: the parent may hold what is not ours, or be where a container has the node's directory.
        let _ = fs::remove_dir(&self.directory);
        let _ = fs::remove_dir(&self.parent);
    }
}

/// The names of what is pinned for the places where programs hang.
fn attachments(directory: &Path) -> impl Iterator<Item = String> {
    let entries = fs::read_dir(directory.join(LINKS)).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok())
}

fn has_attachments(directory: &Path) -> bool {
    attachments(directory).next().is_some()
}

/// Whether flows stand in a version's map.
fn has_flows(directory: &Path) -> bool {
    let path = directory.join(FLOWS);
    path.exists() && (has_entries::<FourTuple, Flow>(&path) || has_entries::<FourTuple, FormerFlow>(&path))
}

/// Whether a map of keys and values of such sizes has entries; not if its sizes are others.
fn has_entries<K: Pod, V: Pod>(path: &Path) -> bool {
    let Ok(data) = MapData::from_pin(path) else { return false };
    let Ok(map) = HashMap::<_, K, V>::try_from(Map::HashMap(data)) else { return false };
    map.keys().next().is_some_and(|key| key.is_ok())
}

/// Refuses to start beside the programs of another version: their flows cannot be known here, and so neither which
/// addresses they use.
fn refuse_foreign(parent: &Path, own: &Path) -> Result<(), LoadError> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let mut others = entries.map(|entry| entry.path()).filter(|path| path != own);
    let foreign = others.find(|path| has_attachments(path) || has_flows(path));
    foreign.map_or(Ok(()), |path| Err(LoadError::ForeignLayout { path }))
}
