//! Looks for the pin directories of agents on every BPF file system that is mounted here.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use forwarder_common::layout::PINNED_MAPS;
use forwarder_common::update::{PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};

use super::{CleanupError, list};
use crate::maps::versions::{is_named, is_version};
use crate::programs::pin_dir::is_bpffs;
use crate::programs::pins::LINKS;

/// How deep below the root of a BPF file system a pin directory is looked for.
const DEPTH: usize = 4;
/// How many of an agent's maps a folder has to hold: others pin maps of such names too.
const ENOUGH_MAPS: usize = 3;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// Where BPF file systems are mounted.
    pub(super) mounts: Vec<PathBuf>,
    pub(super) pin_dirs: Vec<PathBuf>,
    /// The folders that cannot be looked into.
    pub(super) closed: Vec<CleanupError>,
}

/// Looks for pin directories.
///
/// # Errors
/// The kernel does not say what is mounted.
pub(super) fn pin_dirs() -> Result<Places, CleanupError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read(path).map_err(|source| CleanupError::List { path: path.to_owned(), source })?;
    let mut places = Places::default();
    let mut seen = HashSet::new();
    let mounts: BTreeSet<PathBuf> = bpf_mounts(&text).into_iter().collect();
    for mount in mounts {
        // Another file system may be mounted over it.
        if is_bpffs(&mount) == Ok(true) {
            walk(&mount, DEPTH, &mut seen, &mut places);
            places.mounts.push(mount);
        }
    }
    Ok(places)
}

/// Whether a folder is what an agent pins its maps in, whatever it is called and whichever version the agent was of.
pub(super) fn holds_maps(folder: &Path) -> bool {
    maps_in(folder) >= ENOUGH_MAPS
}

/// Whether a folder of an agent's pin directory is one of those in which it pins what has another version than the rest.
pub(super) fn is_part(folder: &Path) -> bool {
    let programs = [PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER, LINKS];
    let is_known = |name: &OsStr| {
        let mut names = PINNED_MAPS.iter().map(|map| map.name).chain(programs);
        names.any(|known| known == name)
    };
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name()).peekable();
    is_version(folder)
        && names.peek().is_some()
        && names.all(|name| is_known(&name))
        && PINNED_MAPS.iter().all(|map| is_named(&folder.join(map.name), map.name) != Some(false))
}

/// How many maps of an agent a folder holds; none if one of them is somebody else's.
fn maps_in(folder: &Path) -> usize {
    let there: Vec<&str> =
        PINNED_MAPS.iter().map(|map| map.name).filter(|name| folder.join(name).exists()).collect();
    // What cannot be looked at may be ours.
    let are_ours = there.iter().all(|name| is_named(&folder.join(name), name) != Some(false));
    if are_ours { there.len() } else { 0 }
}

/// Notes the folders that hold such folders. One file system may be mounted more than once.
fn walk(folder: &Path, depth: usize, seen: &mut HashSet<(u64, u64)>, places: &mut Places) {
    let folders = fs::symlink_metadata(folder)
        .map_err(|source| CleanupError::List { path: folder.to_owned(), source })
        .and_then(|found| {
            let is_new = seen.insert((found.dev(), found.ino()));
            if is_new { list(folder) } else { Ok(Vec::new()) }
        });
    let folders = match folders {
        Ok(folders) => folders.into_iter().filter(|(_, is_folder)| *is_folder).map(|(path, _)| path),
        Err(error) => return places.closed.push(error),
    };
    let folders: Vec<_> = folders.collect();
    // Maps of one agent may have versions of their own, and stand in several folders.
    let parts: usize = folders.iter().filter(|path| is_part(path)).map(|path| maps_in(path)).sum();
    let (versions, others): (Vec<_>, Vec<_>) = folders.into_iter().partition(|path| holds_maps(path));
    if !versions.is_empty() || parts >= ENOUGH_MAPS {
        places.pin_dirs.push(folder.to_owned());
    }
    if depth > 0 {
        for inner in others {
            walk(&inner, depth - 1, seen, places);
        }
    }
}

/// Where file systems of type `bpf` are mounted, by `/proc/PID/mountinfo` (`proc_pid_mountinfo(5)`).
fn bpf_mounts(mountinfo: &[u8]) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let point = fields.nth(4)?;
            // There may be any number of others before it.
            fields.find(|field| *field == b"-")?;
            (fields.next()? == b"bpf").then(|| unescape(point))
        })
        .collect()
}

/// A path as the kernel writes it: spaces, tabs, ends of lines and backslashes are `\` and three octal digits.
fn unescape(mut text: &[u8]) -> PathBuf {
    let mut bytes = Vec::new();
    while let Some((first, rest)) = text.split_first() {
        let digits = rest.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let byte = digits.and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        text = if byte.is_some() { rest.get(3..).unwrap_or_default() } else { rest };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_bpf_file_systems_are_found_whatever_their_names() {
        let text = b"26 29 0:24 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
            36 26 0:33 / /sys/fs/bpf rw,nosuid shared:9 master:1 - bpf bpf rw,mode=700\n\
            40 29 0:34 / /srv/with\\040space\\134 rw - bpf none rw\n\
            41 29 0:33 /forwarder /bpf/forwarder rw - bpf bpf rw\n\
            42 29 8:1 / /bpf rw - ext4 bpf rw\n\
            43 29 broken\n";
        let expected = ["/sys/fs/bpf", "/srv/with space\\", "/bpf/forwarder"].map(PathBuf::from);
        assert_eq!(bpf_mounts(text), expected);
    }

    #[test]
    fn folders_of_others_are_not_taken_for_an_agents() {
        let root = tempfile::tempdir().unwrap();
        let theirs = ["theirs/v1/flows", "theirs/v1/pairs", "theirs/v2/agent", "theirs/v2/more"];
        let ours = ["ours/gone/flows", "ours/gone/pairs", "ours/gone/agent"];
        let parts = ["parts/v5/flows", "parts/v5/pairs", "parts/v4/agent", "parts/v4/links"];
        for path in [&theirs[..], &ours, &parts].concat() {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        // Neither is a symbolic link followed.
        std::os::unix::fs::symlink(root.path().join("ours"), root.path().join("link")).unwrap();
        let mut places = Places::default();
        walk(root.path(), DEPTH, &mut HashSet::new(), &mut places);
        assert_eq!(places.pin_dirs, ["ours", "parts"].map(|name| root.path().join(name)));
        assert!(places.closed.is_empty(), "{:?}", places.closed);
    }
}
