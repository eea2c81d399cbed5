//! The directory on the BPF file system where operators find the maps.
//!
//! It belongs to one running agent, by a lock (`flock`) on the directory itself: it excludes whoever sees that file
//! system, in whatever namespaces, and ends with the process, however that ends. What a dead agent left is removed.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use aya::maps::Map;
use forwarder_common::ABI_VERSION;
use rustix::fs::{FlockOperation, OFlags, flock, statfs};
use rustix::io::Errno;

use super::load_error::{LoadError, with_causes};

/// What `statfs` says of a BPF file system (`BPF_FS_MAGIC` in `linux/magic.h`).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// How often to lock again a directory that its owner removed just before it let go of the lock.
const ATTEMPTS: usize = 16;

/// The pin directory, ours while this lives. Dropping it removes the pins, and the directories that are empty then.
#[derive(Debug)]
pub(super) struct Pins {
    parent: PathBuf,
    directory: PathBuf,
    _lock: File,
}

impl Pins {
    /// Takes `parent` for this agent and empties the directory of this version in it.
    ///
    /// # Errors
    /// It is not on a BPF file system, another running agent has it, or the kernel refuses.
    pub(super) fn acquire(parent: &Path) -> Result<Self, LoadError> {
        if !is_on_bpffs(parent)? {
            return Err(LoadError::NotBpffs { path: parent.to_owned() });
        }
        let lock = lock(parent)?;
        let directory = parent.join(format!("v{ABI_VERSION}"));
        create(&directory)?;
        let pins = Self { parent: parent.to_owned(), directory, _lock: lock };
        pins.clear().map_err(|source| LoadError::PinDir {
            operation: "remove what a former agent left in",
            path: pins.directory.clone(),
            source,
        })?;
        Ok(pins)
    }

    /// Where this version's maps are pinned.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Pins a map under its name.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn pin(&self, name: &str, map: &Map) -> Result<(), LoadError> {
        let path = self.directory.join(name);
        map.pin(&path).map_err(|error| LoadError::PinDir {
            operation: "pin a map as",
            path,
            source: io::Error::other(with_causes(&error)),
        })
    }

    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            tracing::warn!(path = %self.directory.display(), %error, "cannot remove the pinned maps");
        }
        // Neither is an error: the parent may hold what is not ours.
        let _ = fs::remove_dir(&self.directory);
        let _ = fs::remove_dir(&self.parent);
    }
}

/// Whether `path`, or what will be its nearest parent, lies on a BPF file system.
fn is_on_bpffs(path: &Path) -> Result<bool, LoadError> {
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
fn lock(path: &Path) -> Result<File, LoadError> {
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
