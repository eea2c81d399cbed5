//! Which interfaces the node's stack takes packets from, whoever is expected behind them: the programs do as it does.
//!
//! Of IPv4 the larger of two variables counts, that of all interfaces and the interface's own: 1 is strict, 0 and 2 let packets
//! in by any interface (`fib_validate_source`). IPv6 has no such check.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use aya::maps::{HashMap as BpfHashMap, MapData, MapError};
use forwarder_common::layout::LOOSE_INTERFACES;

use crate::maps::DatapathError;

/// Where the variables of IPv4 interfaces stand.
const VARIABLES: &str = "/proc/sys/net/ipv4/conf";

/// The map of the interfaces that are not strict, and what stands in it.
pub(crate) struct LooseInterfaces {
    map: BpfHashMap<MapData, u32, u32>,
    known: BTreeSet<u32>,
}

impl std::fmt::Debug for LooseInterfaces {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("LooseInterfaces").field(&self.known).finish()
    }
}

impl LooseInterfaces {
    /// That of programs which have just been loaded: empty.
    pub(crate) fn new(map: BpfHashMap<MapData, u32, u32>) -> Self {
        Self { map, known: BTreeSet::new() }
    }

    #[cfg(test)]
    pub(super) fn let_in(&mut self, interface: u32) {
        self.map.insert(interface, 1, 0).unwrap();
    }

    /// Reads the variables anew of interfaces, by index and name, and writes what has changed.
    ///
    /// # Errors
    /// The kernel refuses; the rest is written.
    pub(super) fn update<'a>(
        &mut self,
        interfaces: impl IntoIterator<Item = (u32, &'a str)>,
    ) -> Result<(), DatapathError> {
        let wanted = loose(Path::new(VARIABLES), interfaces);
        let mut result = Ok(());
        for index in self.known.symmetric_difference(&wanted).copied().collect::<Vec<_>>() {
            let is_loose = wanted.contains(&index);
            let written = if is_loose { self.map.insert(index, 1, 0) } else { self.map.remove(&index) };
            match written {
                Ok(()) if is_loose => drop(self.known.insert(index)),
                Ok(()) | Err(MapError::KeyNotFound) => drop(self.known.remove(&index)),
                Err(source) => {
                    result = Err(DatapathError {
                        operation: "write to",
                        map: LOOSE_INTERFACES,
                        entry: Some(format!("interface {index}")),
                        source: Box::new(source),
                    });
                }
            }
        }
        result
    }
}

/// The interfaces that are not strict. What cannot be read is taken for strict.
fn loose<'a>(variables: &Path, interfaces: impl IntoIterator<Item = (u32, &'a str)>) -> BTreeSet<u32> {
    let value = |device: &str| -> Option<u32> {
        fs::read_to_string(variables.join(device).join("rp_filter")).ok()?.trim().parse().ok()
    };
    let Some(all) = value("all") else { return BTreeSet::new() };
    let is_loose = |name: &str| value(name).is_some_and(|own| own.max(all) != 1);
    interfaces.into_iter().filter(|(_, name)| is_loose(name)).map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(all: Option<&str>, own: Option<&str>, is_loose: bool) {
        let folder = tempfile::tempdir().unwrap();
        for (device, value) in [("all", all), ("eth0.5", own)] {
            let Some(value) = value else { continue };
            fs::create_dir_all(folder.path().join(device)).unwrap();
            fs::write(folder.path().join(device).join("rp_filter"), format!("{value}\n")).unwrap();
        }
        let expected = if is_loose { BTreeSet::from([7]) } else { BTreeSet::new() };
        assert_eq!(loose(folder.path(), [(7, "eth0.5")]), expected, "{all:?} {own:?}");
    }

    #[test]
    fn the_larger_of_the_two_variables_counts() {
        check(Some("0"), Some("0"), true);
        check(Some("0"), Some("1"), false);
        check(Some("1"), Some("0"), false);
        check(Some("1"), Some("1"), false);
        check(Some("1"), Some("2"), true);
        check(Some("2"), Some("1"), true);
    }

    #[test]
    fn what_cannot_be_read_is_strict() {
        check(None, Some("0"), false);
        check(Some("0"), None, false);
        check(Some("0"), Some("?"), false);
    }
}
