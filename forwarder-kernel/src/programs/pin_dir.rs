//! The pin directory itself: on which file system it stands, whose it is, and who has it.
//!
//! Whoever may rename what is in it can take away what a dead agent has left for the next one, and whoever may open it can have
//! its lock. So it is root's or the agent's own, and nobody else may open it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, OFlags, flock, statfs};
use rustix::io::Errno;
use rustix::process::geteuid;

use crate::load_error::LoadError;

/// What `statfs` says of a BPF file system (`BPF_FS_MAGIC` in `linux/magic.h`).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;
/// How often to lock again a directory that its owner removed just before it let go of the lock.
const ATTEMPTS: usize = 16;
/// The permissions of the directory: its owner's alone.
const MODE: u32 = 0o700;
/// Of permissions, those of everybody else.
const OF_OTHERS: u32 = 0o077;
const WRITABLE_BY_ALL: u32 = 0o002;

/// Whether `path`, or what will be its nearest parent, lies on a BPF file system.
pub(super) fn is_on_bpffs(path: &Path) -> Result<bool, LoadError> {
    for ancestor in path.ancestors() {
        match is_bpffs(ancestor) {
            Ok(is_on_it) => return Ok(is_on_it),
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

/// Whether what is at `path` lies on a BPF file system.
///
/// # Errors
/// Nothing is there, or the kernel does not say.
pub(super) fn is_bpffs(path: &Path) -> Result<bool, Errno> {
    let found = statfs(path)?;
    // The type of `f_type` differs between architectures.
    #[expect(clippy::allow_attributes, reason = "the cast is needed on some architectures only")]
    #[allow(clippy::unnecessary_cast, clippy::cast_lossless, reason = "as above")]
    let magic = found.f_type as i64 & 0xffff_ffff;
    Ok(magic == BPF_FS_MAGIC)
}

/// Creates a folder, and those above it, for nobody but the agent.
pub(super) fn create(path: &Path) -> Result<(), LoadError> {
    DirBuilder::new().recursive(true).mode(MODE).create(path).map_err(|source| LoadError::PinDir {
        operation: "create",
        path: path.to_owned(),
        source,
    })
}

/// Creates and locks the directory for an agent: nobody else may open it from now on.
pub(super) fn take(path: &Path) -> Result<File, LoadError> {
    lock_as(path, |directory, permissions| {
        // Before the lock, which whoever may open it can have.
        if permissions & OF_OTHERS != 0 {
            directory.set_permissions(Permissions::from_mode(MODE))?;
            tracing::info!(path = %path.display(), "changed the mode of the pin directory to 0700");
        }
        Ok(())
    })
}

/// Locks the directory, as it is, against agents.
pub(crate) fn lock(path: &Path) -> Result<File, LoadError> {
    lock_as(path, |_, _| Ok(()))
}

fn lock_as(path: &Path, prepare: impl Fn(&File, u32) -> io::Result<()>) -> Result<File, LoadError> {
    let failed = |operation, source| LoadError::PinDir { operation, path: path.to_owned(), source };
    for _ in 0..ATTEMPTS {
        create(path)?;
        // Not by a symbolic link, which others may make and change.
        let flags = (OFlags::DIRECTORY | OFlags::NOFOLLOW).bits().cast_signed();
        let directory = match OpenOptions::new().read(true).custom_flags(flags).open(path) {
            Ok(directory) => directory,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed("open", error)),
        };
        let opened = directory.metadata().map_err(|error| failed("look at", error))?;
        check_owner(path, &opened)?;
        prepare(&directory, opened.mode())
            .map_err(|error| failed("take the permissions of others from", error))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                return Err(LoadError::InUse { path: path.to_owned() });
            }
            Err(error) => return Err(failed("lock", error.into())),
        }
        // A stopping agent removes the directory while it holds the lock: then this is a lock on nothing.
        match fs::metadata(path) {
            Ok(found) if (found.dev(), found.ino()) == (opened.dev(), opened.ino()) => return Ok(directory),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("lock", error)),
        }
    }
    Err(LoadError::InUse { path: path.to_owned() })
}

/// Refuses a directory that others could exchange, and says if its file system lets others make it first.
///
/// # Errors
/// A folder above it belongs to somebody else, or the kernel does not say.
pub(super) fn check_folders_above(path: &Path) -> Result<(), LoadError> {
    let mut open_to_all = None;
    // What lies above the BPF file system is the node's.
    for folder in path.ancestors().skip(1).take_while(|folder| is_bpffs(folder) == Ok(true)) {
        let found = fs::metadata(folder).map_err(|source| LoadError::PinDir {
            operation: "look at",
            path: folder.to_owned(),
            source,
        })?;
        check_owner(folder, &found)?;
        if found.mode() & WRITABLE_BY_ALL != 0 {
            open_to_all = Some(folder);
        }
    }
    if let Some(folder) = open_to_all {
        tracing::info!(
            folder = %folder.display(),
            "every user of this node may create the pin directory here before the agent does, and the agent then refuses it: run `chmod 0700 {0}`, and mount the BPF file system with `-o mode=0700`",
            folder.display()
        );
    }
    Ok(())
}

/// Refuses what belongs to somebody else than root and the agent.
fn check_owner(path: &Path, found: &fs::Metadata) -> Result<(), LoadError> {
    let own = geteuid().as_raw();
    if found.uid() == own || found.uid() == 0 {
        return Ok(());
    }
    Err(LoadError::ForeignOwner { path: path.to_owned(), owner: found.uid(), own })
}
