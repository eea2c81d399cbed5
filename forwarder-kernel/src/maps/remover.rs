//! Removes from the maps that programs read, on the thread of their gate.

use std::path::Path;

use aya::maps::{HashMap as BpfHashMap, LpmTrie, Map, MapData, MapError, PerCpuHashMap};
use forwarder_common::layout;
use forwarder_common::tuple::{AddressBytes, address_of};
use forwarder_common::{ListenerCounters, ListenerValue};
use rustix::io::Errno;

use crate::load_error::errno_of;
use crate::maps::client_rules::ClientRule;
use crate::maps::versions::map_path;
use crate::maps::{DatapathError, grace};

type Table<K, V> = BpfHashMap<MapData, K, V>;

/// What is of no use any more.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Stale {
    Listener(layout::ListenerKey),
    Counters(u32),
    Address(AddressBytes),
    /// Of rules that no listener has any more.
    ClientRule(ClientRule),
}

/// The maps that programs read, open for who removes from them.
pub(super) struct Remover {
    listeners: Table<layout::ListenerKey, ListenerValue>,
    counters: PerCpuHashMap<MapData, u32, ListenerCounters>,
    local_addresses: Table<AddressBytes, u32>,
    client_rules: LpmTrie<MapData, layout::ClientNetwork, u32>,
}

impl Remover {
    /// Opens the maps that are pinned in a directory.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, MapError> {
        let open = |name: &str| MapData::from_pin(map_path(pin_dir, name));
        Ok(Self {
            listeners: BpfHashMap::try_from(Map::HashMap(open(layout::LISTENERS)?))?,
            counters: PerCpuHashMap::try_from(Map::PerCpuHashMap(open(layout::COUNTERS)?))?,
            local_addresses: BpfHashMap::try_from(Map::HashMap(open(layout::LOCAL_ADDRESSES)?))?,
            client_rules: LpmTrie::try_from(Map::LpmTrie(open(layout::CLIENT_RULES)?))?,
        })
    }

    /// Removes all of it.
    pub(super) fn remove_all(&mut self, stale: Vec<Stale>) {
        // A program that has just read the number of rules would let everybody in where they are gone.
        if stale.iter().any(|stale| matches!(stale, Stale::ClientRule(_))) {
            grace::wait();
        }
        for stale in stale {
            self.remove(stale);
        }
    }

    fn remove(&mut self, stale: Stale) {
        let removed = match stale {
            Stale::Listener(key) => {
                let entry = || format!("port {}", key.port);
                absent(layout::LISTENERS, self.listeners.remove(&key), entry)
            }
            Stale::Counters(id) => {
                absent(layout::COUNTERS, self.counters.remove(&id), || format!("listener {id}"))
            }
            Stale::Address(address) => {
                let entry = || address_of(address).to_string();
                absent(layout::LOCAL_ADDRESSES, self.local_addresses.remove(&address), entry)
            }
            Stale::ClientRule(rule) => {
                absent(layout::CLIENT_RULES, self.client_rules.remove(&rule.key()), || rule.to_string())
            }
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "cannot remove an entry from the BPF maps: the programs keep it");
        }
    }
}

/// Whether an entry is absent after its removal; that it was not there is no error.
pub(super) fn absent(
    map: &'static str,
    removed: Result<(), MapError>,
    entry: impl FnOnce() -> String,
) -> Result<(), DatapathError> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => Ok(()),
        Err(source) if errno_of(&source) == Some(Errno::NOENT) => Ok(()),
        Err(source) => Err(DatapathError {
            operation: "remove from",
            map,
            entry: Some(entry()),
            source: Box::new(source),
        }),
    }
}
