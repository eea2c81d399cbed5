//! Where in the pin directory each map stands, by the version of its layout, and what stands there in other versions.
#![expect(unsafe_code, reason = "no crate asks a map for a key whose type is not known")]

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};

use aya::maps::{MapData, MapInfo};
use forwarder_common::direct::DIRECT;
use forwarder_common::layout::{
    AGENT, CLIENT_RULES, FLOWS, LISTENERS, LOCAL_ADDRESSES, PINNED_MAPS, PROGRAMS_VERSION, VERDICTS,
};

/// `BPF_MAP_GET_NEXT_KEY` (`linux/bpf.h`).
const GET_NEXT_KEY: libc::c_long = 4;

/// Where a map is pinned: `v{its version}/{name}`.
pub(crate) fn map_path(pin_dir: &Path, name: &str) -> PathBuf {
    let version = PINNED_MAPS.iter().find(|map| map.name == name).map_or(PROGRAMS_VERSION, |map| map.version);
    folder(pin_dir, version).join(name)
}

/// Where programs are pinned, and what holds them on interfaces.
pub(crate) fn programs_folder(pin_dir: &Path) -> PathBuf {
    folder(pin_dir, PROGRAMS_VERSION)
}

/// The folders of all that this agent pins, each once.
pub(crate) fn folders(pin_dir: &Path) -> Vec<PathBuf> {
    let mut versions: Vec<u32> = PINNED_MAPS.iter().map(|map| map.version).collect();
    versions.push(PROGRAMS_VERSION);
    versions.sort_unstable();
    versions.dedup();
    versions.into_iter().map(|version| folder(pin_dir, version)).collect()
}

fn folder(pin_dir: &Path, version: u32) -> PathBuf {
    pin_dir.join(format!("v{version}"))
}

/// Whether a folder is called as that of a version is: `v` and a number.
pub(crate) fn is_version(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.strip_prefix('v').is_some_and(|number| number.parse::<u32>().is_ok())
}

/// The folders of versions in a pin directory, whoever has made them. No symbolic link is followed.
pub(crate) fn version_folders(pin_dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    folders.map(|entry| entry.path()).filter(|path| is_version(path)).collect()
}

/// Whether the map that is pinned at a path has this name in the kernel; `None` if it cannot be looked at.
pub(crate) fn is_named(path: &Path, name: &str) -> Option<bool> {
    MapInfo::from_pin(path).ok().map(|info| info.name_as_str() == Some(name))
}

/// Whether the map that is pinned at a path has entries, whatever its key and value are. One that does not say so may have some.
pub(crate) fn has_entries(path: &Path) -> bool {
    /// What the call is told: `union bpf_attr`, as this command reads it.
    #[repr(C)]
    struct NextKey {
        map: u32,
        pad: u32,
        key: u64,
        next: u64,
    }
    if !path.exists() {
        return false;
    }
    let (Ok(info), Ok(map)) = (MapInfo::from_pin(path), MapData::from_pin(path)) else { return true };
    let mut key = vec![0_u8; usize::try_from(info.key_size()).unwrap_or_default()];
    let map = u32::try_from(map.fd().as_fd().as_raw_fd()).unwrap_or_default();
    let mut told = NextKey { map, pad: 0, key: 0, next: key.as_mut_ptr() as u64 };
    // SAFETY: the pointer is to a value of the size given, which lives as long as the call, and so does the buffer that it points to,
    // which is as long as the map's keys are.
    let result = unsafe { libc::syscall(libc::SYS_bpf, GET_NEXT_KEY, &raw mut told, size_of::<NextKey>()) };
    result == 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT)
}

/// A map that an agent of another version has pinned.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ForeignMap {
    /// Its name.
    pub(crate) name: &'static str,
    /// Where it is pinned.
    pub(crate) path: PathBuf,
}

impl ForeignMap {
    /// What is lost because this agent cannot take it over; `None` if nothing is.
    pub(crate) fn loss(&self) -> Option<&'static str> {
        match self.name {
            FLOWS | DIRECT if has_entries(&self.path) => Some(
                "the connections that the kernel forwarded by it end: each end is reset when it sends next, or times out if a firewall drops \
                 that packet",
            ),
            VERDICTS => Some("verdicts are counted from zero"),
            AGENT | LISTENERS | LOCAL_ADDRESSES => {
                Some("clients that connect before this agent listens may be refused instead of waiting")
            }
            CLIENT_RULES if has_entries(&self.path) => {
                Some("clients that listeners do not let in are let in until this agent has written its rules")
            }
            // Pairs are told of with their flows, and what belongs to direct connections with what leads to them; the rest each agent begins anew.
            _ => None,
        }
    }
}

/// The maps of other versions that agents have pinned in the pin directory.
pub(crate) fn foreign_maps(pin_dir: &Path) -> Vec<ForeignMap> {
    let mut maps = foreign_paths(pin_dir);
    // What has such a name only by chance is somebody else's.
    maps.retain(|map| is_named(&map.path, map.name) == Some(true));
    maps
}

fn foreign_paths(pin_dir: &Path) -> Vec<ForeignMap> {
    let folders = version_folders(pin_dir);
    let of = |name: &'static str| {
        let own = map_path(pin_dir, name);
        let paths = folders.iter().map(move |folder| folder.join(name));
        paths.filter(move |path| *path != own && path.exists()).map(move |path| ForeignMap { name, path })
    };
    PINNED_MAPS.iter().flat_map(|map| of(map.name)).collect()
}

#[cfg(test)]
mod tests {
    use forwarder_common::direct::{
        DIRECT_COUNTS, DIRECT_LINKS, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS,
    };
    use forwarder_common::layout::{BACKENDS, COUNTERS, PAIRS};

    use super::*;

    #[test]
    fn maps_of_other_versions_are_found_by_their_folders() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["v3/flows", "v3/other", "v5/counters", "v99/verdicts", "other/flows", "vx/flows"] {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        std::os::unix::fs::symlink(directory.path().join("other"), directory.path().join("v7")).unwrap();
        let found = foreign_paths(directory.path());
        assert_eq!(found.iter().map(|map| map.name).collect::<Vec<_>>(), ["verdicts", "flows"]);
        assert_eq!(map_path(directory.path(), COUNTERS), directory.path().join("v5/counters"));
        // They are no maps.
        assert_eq!(foreign_maps(directory.path()), []);
    }

    #[test]
    fn each_map_is_one_whose_loss_has_been_thought_of() {
        let known = [
            LISTENERS,
            BACKENDS,
            COUNTERS,
            LOCAL_ADDRESSES,
            CLIENT_RULES,
            VERDICTS,
            FLOWS,
            PAIRS,
            AGENT,
            DIRECT,
            DIRECT_SLOTS,
            DIRECT_STATES,
            DIRECT_TARGETS,
            DIRECT_LINKS,
            DIRECT_COUNTS,
        ];
        assert_eq!(PINNED_MAPS.map(|map| map.name), known, "say in `ForeignMap::loss` what is lost with it");
    }
}
