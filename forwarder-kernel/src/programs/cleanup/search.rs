//! Looks for the pin directories of agents on every BPF file system that is mounted here.

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use aya::maps::MapInfo;
use forwarder_common::layout::PINNED_MAPS;

use super::{CleanupError, list};
use crate::programs::pin_dir::is_bpffs;

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
    let there: Vec<&str> =
        PINNED_MAPS.iter().map(|map| map.name).filter(|name| folder.join(name).exists()).collect();
    // What cannot be looked at may be ours.
    let is_ours = |name: &&str| {
        MapInfo::from_pin(folder.join(name)).map_or(true, |info| info.name_as_str() == Some(*name))
    };
    there.len() >= ENOUGH_MAPS && there.iter().all(is_ours)
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
    let (versions, others): (Vec<_>, Vec<_>) = folders.partition(|path| holds_maps(path));
    if !versions.is_empty() {
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
        for path in
            ["theirs/v1/flows", "theirs/v1/pairs", "ours/gone/flows", "ours/gone/pairs", "ours/gone/agent"]
        {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        // Neither is a symbolic link followed.
        std::os::unix::fs::symlink(root.path().join("ours"), root.path().join("link")).unwrap();
        let mut places = Places::default();
        walk(root.path(), DEPTH, &mut HashSet::new(), &mut places);
        assert_eq!(places.pin_dirs, [root.path().join("ours")]);
        assert!(places.closed.is_empty(), "{:?}", places.closed);
    }
}
