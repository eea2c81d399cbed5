//! What dead agents left in the kernel: pinned maps, links and programs, and filters of clsact.
//!
//! To unpin a link that nobody holds detaches its program. A filter is that of an agent of this pin directory if its program is
//! pinned there or uses a map that is: programs of other installations have the same names, and are left alone.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use aya::programs::{Link, ProgramError, ProgramInfo, TcAttachType, loaded_programs};
use futures_util::TryStreamExt;
use rtnetlink::new_connection;
use rtnetlink::packet_route::link::LinkAttribute;
use rustix::io::Errno;

use crate::load_error::{LoadError, errno_of, with_causes};
use crate::maps::versions::is_version;
use crate::net::filters::{Filter, Filters};
use crate::programs::hook::pinned_program;
use crate::programs::pin_dir::{self, is_on_bpffs};
use crate::programs::pins;

mod orphans;
mod search;

pub use self::orphans::Orphan;

/// Why it cannot be told what is left.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// An agent runs: what is there is its own.
    #[error("an agent is running with the pin directory {}: nothing is removed; stop it first", .path.display())]
    InUse {
        /// The pin directory.
        path: PathBuf,
    },
    /// The pin directory cannot be worked with.
    #[error(transparent)]
    PinDir(LoadError),
    /// A folder in it cannot be listed.
    #[error("cannot list {}: {source}", .path.display())]
    List {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// What is pinned cannot be looked at.
    #[error(
        "cannot look at {}, by which a program may hang on an interface: not permitted, and nothing is removed, because the program would \
         stay there and belong to nobody; run as root, with CAP_BPF",
        .path.display()
    )]
    Denied {
        /// The pin.
        path: PathBuf,
    },
    /// The kernel does not list its programs.
    #[error(
        "cannot list the programs of the kernel, and so not say whether some hang on interfaces that nothing is pinned of: \
         {reason}; run as root, with CAP_SYS_ADMIN"
    )]
    Programs {
        /// What the kernel said.
        reason: String,
    },
    /// The socket to the kernel cannot be opened.
    #[error("cannot open a netlink socket: {0}")]
    Socket(#[source] io::Error),
    /// The kernel does not list interfaces.
    #[error("cannot list the network interfaces: {0}")]
    Interfaces(#[source] rtnetlink::Error),
}

/// What could not be removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot remove {leftover}: {reason}")]
pub struct RemoveError {
    leftover: Leftover,
    reason: String,
}

/// Something that a dead agent left.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Leftover {
    /// A pinned map or link.
    Pin(PathBuf),
    /// A folder of pins.
    Folder(PathBuf),
    /// A filter on an interface.
    Filter(LeftFilter),
}

/// A filter that a dead agent left.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LeftFilter {
    interface: String,
    side: Side,
    filter: Filter,
}

/// A side of an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// What it receives.
    Ingress,
    /// What it sends.
    Egress,
}

impl Side {
    const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pin(path) => write!(f, "pin {}", path.display()),
            Self::Folder(path) => write!(f, "folder {}", path.display()),
            Self::Filter(LeftFilter { interface, side, filter: Filter { name, program, .. } }) => {
                write!(f, "filter {name} (program {program}) at {} of interface {interface}", side.as_str())
            }
        }
    }
}

impl Leftover {
    /// Removes it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn remove(&self) -> Result<(), RemoveError> {
        let failed = |reason| RemoveError { leftover: self.clone(), reason };
        match self {
            Self::Pin(path) => fs::remove_file(path).map_err(|error| failed(error.to_string())),
            Self::Folder(path) => fs::remove_dir(path).map_err(|error| failed(error.to_string())),
            Self::Filter(LeftFilter { interface, side, filter }) => filter
                .link(interface, side.attach_type())
                .map_err(ProgramError::from)
                .and_then(Link::detach)
                .map_err(|error| failed(with_causes(&error))),
        }
    }
}

/// What dead agents left. While it lives, no agent can start with that pin directory.
#[derive(Debug)]
pub struct Leftovers {
    /// In the order in which it is to be removed.
    pub leftovers: Vec<Leftover>,
    pin_dir: PathBuf,
    _lock: Option<File>,
}

impl Leftovers {
    /// Removes the pin directory itself, if nothing is left in it.
    pub fn finish(self) {
        // It may hold what is not ours.
        let _ = fs::remove_dir(&self.pin_dir);
    }
}

/// What [`search`] found.
#[derive(Debug)]
pub struct Search {
    /// Where BPF file systems are mounted.
    pub mounts: Vec<PathBuf>,
    /// The pin directories on them, and what is left in each, or why nothing is removed there.
    pub pin_dirs: Vec<(PathBuf, Result<Leftovers, CleanupError>)>,
    /// The folders that cannot be looked into.
    pub closed: Vec<CleanupError>,
    /// Programs on interfaces whose pins are not on these file systems; or why they cannot be looked for.
    pub orphans: Result<Vec<Orphan>, CleanupError>,
}

/// Looks for pin directories of agents on all BPF file systems that are mounted, and for what is left in each. Needs a tokio
/// runtime.
///
/// # Errors
/// The kernel does not say what is mounted.
pub async fn search() -> Result<Search, CleanupError> {
    let search::Places { mounts, pin_dirs: places, closed } = search::pin_dirs()?;
    let mut pinned = Vec::new();
    let mut pin_dirs = Vec::new();
    let is_agents = |folder: &Path| search::holds_maps(folder) || search::is_part(folder);
    for pin_dir in places {
        // Of running agents too: what they have pinned is no orphan's.
        pinned.extend(pins_in(&pin_dir, is_agents).unwrap_or_default());
        // What is only called as a version's folder may be somebody else's where nobody has said that this is a pin directory.
        let found = find_by(&pin_dir, is_agents).await;
        pin_dirs.push((pin_dir, found));
    }
    let orphans = orphans::find(&maps_of(&pinned)).await;
    Ok(Search { mounts, pin_dirs, closed, orphans })
}

/// Finds what agents of any version left in `pin_dir`, and their filters on all interfaces. Needs a tokio runtime.
///
/// # Errors
/// An agent is running with this pin directory, it is not on a BPF file system, or the kernel refuses.
pub async fn find(pin_dir: &Path) -> Result<Leftovers, CleanupError> {
    // Somebody may have renamed it: then its maps tell.
    find_by(pin_dir, |folder| is_version(folder) || search::holds_maps(folder)).await
}

async fn find_by(pin_dir: &Path, is_ours: impl Fn(&Path) -> bool) -> Result<Leftovers, CleanupError> {
    let lock = lock(pin_dir)?;
    let pins = if lock.is_some() { pins_in(pin_dir, is_ours)? } else { Vec::new() };
    // The filters first: what they are known by is pinned.
    let mut leftovers = filters(&programs_of(&pins)?).await?;
    leftovers.extend(pins);
    Ok(Leftovers { leftovers, pin_dir: pin_dir.to_owned(), _lock: lock })
}

/// What is pinned in the folders of `pin_dir` that are an agent's, of whatever version.
fn pins_in(pin_dir: &Path, is_ours: impl Fn(&Path) -> bool) -> Result<Vec<Leftover>, CleanupError> {
    let mut pins = Vec::new();
    for (path, is_folder) in list(pin_dir)? {
        if is_folder && is_ours(&path) {
            find_pins(path, &mut pins)?;
        }
    }
    Ok(pins)
}

/// Locks the pin directory, if there is one.
fn lock(pin_dir: &Path) -> Result<Option<File>, CleanupError> {
    if !is_on_bpffs(pin_dir).map_err(CleanupError::PinDir)? {
        return Err(CleanupError::PinDir(LoadError::NotBpffs { path: pin_dir.to_owned() }));
    }
    if !pin_dir.exists() {
        return Ok(None);
    }
    match pin_dir::lock(pin_dir) {
        Ok(lock) => Ok(Some(lock)),
        Err(LoadError::InUse { path }) => Err(CleanupError::InUse { path }),
        Err(error) => Err(CleanupError::PinDir(error)),
    }
}

/// What is in a folder, and whether it is a folder itself; sorted.
fn list(folder: &Path) -> Result<Vec<(PathBuf, bool)>, CleanupError> {
    let entries = fs::read_dir(folder).and_then(|entries| {
        // The type of a symbolic link is that of the link: none is followed.
        entries.map(|entry| entry.and_then(|entry| Ok((entry.path(), entry.file_type()?.is_dir())))).collect()
    });
    let mut entries: Vec<_> =
        entries.map_err(|source| CleanupError::List { path: folder.to_owned(), source })?;
    entries.sort();
    Ok(entries)
}

/// Everything in a folder, inner folders first, then the folder.
fn find_pins(folder: PathBuf, found: &mut Vec<Leftover>) -> Result<(), CleanupError> {
    let (folders, files): (Vec<_>, Vec<_>) =
        list(&folder)?.into_iter().partition(|(_, is_folder)| *is_folder);
    for (inner, _) in folders {
        find_pins(inner, found)?;
    }
    found.extend(files.into_iter().map(|(path, _)| Leftover::Pin(path)));
    found.push(Leftover::Folder(folder));
    Ok(())
}

/// The ids of the programs that are pinned, and of those that use a map that is.
///
/// # Errors
/// What is pinned may be a program, and cannot be looked at: its filters would be overlooked.
fn programs_of(pins: &[Leftover]) -> Result<BTreeSet<u32>, CleanupError> {
    let maps = maps_of(pins);
    let mut programs = BTreeSet::new();
    for path in attachments_in(pins, true) {
        let looked = ProgramInfo::from_pin(path);
        if looked.is_err_and(|error| matches!(errno_of(&error), Some(Errno::PERM | Errno::ACCESS))) {
            return Err(CleanupError::Denied { path: path.clone() });
        }
        programs.extend(pinned_program(path));
    }
    // The kernel lists all programs for CAP_SYS_ADMIN alone. Without it the pinned ones are known.
    for program in loaded_programs().filter_map(Result::ok) {
        if uses(&program, &maps) {
            programs.insert(program.id());
        }
    }
    Ok(programs)
}

/// The ids of the maps that are pinned.
fn maps_of(pins: &[Leftover]) -> BTreeSet<u32> {
    attachments_in(pins, false).flat_map(|path| MapInfo::from_pin(path).map(|info| info.id())).collect()
}

/// The pins of what holds programs on interfaces, or all others. The kernel does not say what kind of object is pinned: the
/// folder does.
fn attachments_in(pins: &[Leftover], are_wanted: bool) -> impl Iterator<Item = &PathBuf> {
    pins.iter().filter_map(move |pin| match pin {
        Leftover::Pin(path) => {
            let is_one = path.parent().is_some_and(|folder| folder.ends_with(pins::LINKS));
            (is_one == are_wanted).then_some(path)
        }
        Leftover::Folder(_) | Leftover::Filter(_) => None,
    })
}

/// Whether a program uses one of these maps.
fn uses(program: &ProgramInfo, maps: &BTreeSet<u32>) -> bool {
    let uses_one = |ids: Vec<u32>| ids.iter().any(|id| maps.contains(id));
    program.map_ids().is_ok_and(|ids| ids.is_some_and(uses_one))
}

/// The filters that have one of these programs, on every interface.
async fn filters(programs: &BTreeSet<u32>) -> Result<Vec<Leftover>, CleanupError> {
    if programs.is_empty() {
        return Ok(Vec::new());
    }
    let mut listed = Filters::open().map_err(CleanupError::Socket)?;
    let mut found = Vec::new();
    for (index, interface) in interfaces().await? {
        for side in Side::ALL {
            let filters = listed.list(index, side.attach_type()).map_err(CleanupError::Socket)?;
            let ours = filters.into_iter().filter(|filter| programs.contains(&filter.program));
            found.extend(
                ours.map(|filter| {
                    Leftover::Filter(LeftFilter { interface: interface.clone(), side, filter })
                }),
            );
        }
    }
    Ok(found)
}

/// The indices and names of all interfaces.
async fn interfaces() -> Result<Vec<(u32, String)>, CleanupError> {
    let (connection, handle, _) = new_connection().map_err(CleanupError::Socket)?;
    // It ends when the handle is dropped.
    tokio::spawn(connection);
    let links: Vec<_> =
        handle.link().get().execute().try_collect().await.map_err(CleanupError::Interfaces)?;
    let named = links.into_iter().filter_map(|link| {
        let name = link.attributes.into_iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name),
            _ => None,
        });
        Some((link.header.index, name?))
    });
    Ok(named.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pins_are_found_in_folders_of_versions_only_inner_ones_first() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("v1/links/eth0")).unwrap();
        fs::create_dir_all(at("valuables")).unwrap();
        for file in ["v1/flows", "v1/links/eth0/ingress", "valuables/x", "v2"] {
            fs::write(at(file), "").unwrap();
        }
        std::os::unix::fs::symlink(at("valuables"), at("v3")).unwrap();
        let versions: Vec<_> = list(root.path()).unwrap();
        let versions: Vec<_> =
            versions.into_iter().filter(|(path, is_folder)| *is_folder && is_version(path)).collect();
        assert_eq!(versions, [(at("v1"), true)]);
        let mut found = Vec::new();
        find_pins(at("v1"), &mut found).unwrap();
        assert_eq!(
            found,
            [
                Leftover::Pin(at("v1/links/eth0/ingress")),
                Leftover::Folder(at("v1/links/eth0")),
                Leftover::Folder(at("v1/links")),
                Leftover::Pin(at("v1/flows")),
                Leftover::Folder(at("v1")),
            ]
        );
        for leftover in &found {
            leftover.remove().unwrap();
        }
        assert!(!at("v1").exists());
        assert!(at("valuables/x").exists());
    }

    #[tokio::test]
    async fn a_folder_that_is_not_on_a_bpf_file_system_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let error = find(root.path()).await.unwrap_err();
        assert!(error.to_string().contains("not on a BPF file system"), "{error}");
    }
}
