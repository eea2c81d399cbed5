//! The directory on the BPF file system where operators find the maps.
//!
//! It belongs to one running agent, by a lock (`flock`) on the directory itself: it excludes whoever sees that file
//! system, in whatever namespaces, and ends with the process, however that ends. What a dead agent left is taken over where
//! connections may live in it, and removed otherwise.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use forwarder_common::ABI_VERSION;
use forwarder_common::flow::{FLOWS, Flow, FlowKey};
use rustix::fs::{FlockOperation, OFlags, flock, statfs};
use rustix::io::Errno;

use super::hook;
use super::load_error::LoadError;

/// What `statfs` says of a BPF file system (`BPF_FS_MAGIC` in `linux/magic.h`).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// How often to lock again a directory that its owner removed just before it let go of the lock.
const ATTEMPTS: usize = 16;

/// Where is pinned what holds the programs on interfaces, in the directory of a version: links, or with clsact the programs.
pub(super) const LINKS: &str = "links";

/// A flow of version 3, whose agents pinned nothing else where they attached by clsact.
type FormerFlow = [u8; 104];

/// The pin directory, ours while this lives. Dropping it removes the pins, and the directories that are empty then, unless
/// they are to be left.
#[derive(Debug)]
pub(super) struct Pins {
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
    /// It is not on a BPF file system, another running agent has it, the programs of another version still hang on
    /// interfaces or have connections, or the kernel refuses.
    pub(super) fn acquire(parent: &Path) -> Result<Self, LoadError> {
        if !is_on_bpffs(parent)? {
            return Err(LoadError::NotBpffs { path: parent.to_owned() });
        }
        let lock = lock(parent)?;
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

    /// Whether connections of a former agent may live here: it had guards, or there are flows.
    pub(super) fn has_connections(&self) -> bool {
        attachments(&self.directory).any(|name| hook::is_egress(&name)) || has_flows(&self.directory)
    }

    /// Where links are pinned; made if it is not there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn links(&self) -> Result<PathBuf, LoadError> {
        let links = self.directory.join(LINKS);
        create(&links)?;
        Ok(links)
    }

    /// Takes over what is pinned: it ends with this agent, unless it is left to the next one.
    pub(super) fn take_over(&mut self) {
        self.is_left = false;
    }

    /// Leaves what is pinned to the next agent.
    pub(super) fn leave(&mut self) {
        self.is_left = true;
    }

    /// Where this version's maps are pinned.
    pub(super) fn directory(&self) -> &Path {
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
        // Neither is an error: the parent may hold what is not ours.
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
    path.exists() && (has_entries::<FlowKey, Flow>(&path) || has_entries::<FlowKey, FormerFlow>(&path))
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

/// Whether `path`, or what will be its nearest parent, lies on a BPF file system.
pub(super) fn is_on_bpffs(path: &Path) -> Result<bool, LoadError> {
    for ancestor in path.ancestors() {
        match statfs(ancestor) {
            // The type of `f_type` differs between architectures.
            #[expect(clippy::allow_attributes, reason = "the cast is needed on some architectures only")]
            #[allow(clippy::unnecessary_cast, clippy::cast_lossless, reason = "as above")]
            Ok(found) => return Ok(found.f_type as i64 & 0xffff_ffff == BPF_FS_MAGIC),
            Err(Errno::NOENT) => {}
            Err(error) => {
                return Err(LoadError::PinDir {
                    operation: "look at",
                    path: ancestor.to_owned(),
                    source: error.into(),
                });
            }
        }
    }
    Ok(false)
}

fn create(path: &Path) -> Result<(), LoadError> {
    fs::create_dir_all(path).map_err(|source| LoadError::PinDir {
        operation: "create",
        path: path.to_owned(),
        source,
    })
}

/// Creates and locks the directory.
pub(super) fn lock(path: &Path) -> Result<File, LoadError> {
    let failed = |source| LoadError::PinDir { operation: "lock", path: path.to_owned(), source };
    for _ in 0..ATTEMPTS {
        create(path)?;
        let flags = OFlags::DIRECTORY.bits().cast_signed();
        let directory = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(LoadError::InUse { path: path.to_owned() });
            }
            Err(error) => return Err(failed(error.into())),
        }
        // A stopping agent removes the directory while it holds the lock: then this is a lock on nothing.
        let locked = directory.metadata().map_err(failed)?;
        match fs::metadata(path) {
            Ok(found) if (found.dev(), found.ino()) == (locked.dev(), locked.ino()) => return Ok(directory),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
    }
    Err(LoadError::InUse { path: path.to_owned() })
}
