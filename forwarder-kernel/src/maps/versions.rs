//! Where in the pin directory each map stands, by the version of its layout, and what stands there in other versions.

use std::fs;
use std::path::{Path, PathBuf};

use forwarder_common::layout::{
    AGENT, BACKENDS, COUNTERS, FLOWS, LISTENERS, LOCAL_ADDRESSES, PAIRS, PINNED_MAPS, PROGRAMS_VERSION,
    VERDICTS,
};

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

/// A map that an agent of another version has pinned.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct ForeignMap {
    /// Its name.
    pub(crate) name: &'static str,
    /// Where it is pinned.
    pub(crate) path: PathBuf,
}

impl ForeignMap {
    /// What is lost because this agent cannot take it over; `None` if nothing is, because each agent writes it anew.
    pub(crate) fn loss(&self) -> Option<&'static str> {
        match self.name {
            FLOWS | PAIRS => Some(
                "the connections that the kernel forwarded by it end: each end is reset when it sends next",
            ),
            COUNTERS => Some("packets and bytes of listeners are counted from zero"),
            VERDICTS => Some("verdicts are counted from zero"),
            AGENT => Some("clients that connect before this agent listens may be refused instead of waiting"),
            LISTENERS | BACKENDS | LOCAL_ADDRESSES => None,
            _ => Some("what stood in it is not known to this agent"),
        }
    }
}

/// The maps of other versions that stand in the pin directory, where an agent of that version has pinned them.
pub(crate) fn foreign_maps(pin_dir: &Path) -> Vec<ForeignMap> {
    let entries = fs::read_dir(pin_dir).into_iter().flatten().flatten();
    let folders: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    let of = |name: &'static str| {
        let own = map_path(pin_dir, name);
        let paths = folders.iter().map(move |folder| folder.join(name));
        paths.filter(move |path| *path != own && path.exists()).map(move |path| ForeignMap { name, path })
    };
    PINNED_MAPS.iter().flat_map(|map| of(map.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pinned_map_says_what_its_loss_means() {
        for map in PINNED_MAPS {
            let foreign = ForeignMap { name: map.name, path: PathBuf::new() };
            assert!(foreign.loss().is_none_or(|loss| !loss.contains("not known")), "{}", map.name);
        }
    }

    #[test]
    fn maps_of_other_versions_are_found_by_their_folders() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["v3/flows", "v3/other", "v4/counters", "v99/verdicts"] {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        let found = foreign_maps(directory.path());
        assert_eq!(found.iter().map(|map| map.name).collect::<Vec<_>>(), ["verdicts", "flows"]);
        assert_eq!(map_path(directory.path(), COUNTERS), directory.path().join("v4/counters"));
    }
}
