//! The maps that the agent shares with the programs, and a copy of what stands in them, so that only what differs is
//! written. See [`Datapath`](super::Datapath) and [`Bpf`](super::bpf::Bpf) for what the functions do.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use aya::maps::{HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::{Ebpf, Pod};
use forwarder_common::layout::{
    self, ANY_ADDRESS, AddressBytes, STATE_DRAINING, STATE_READY, address_bytes, address_of,
};
use forwarder_common::{BackendKey, BackendValue, ListenerCounters, ListenerValue, Verdict};
use rustix::io::Errno;

use super::interfaces::Interface;
use super::load_error::{LoadError, errno_of};
use super::{BackendEntry, DatapathError, ListenerId, ListenerState};
use crate::model::{BindAddress, ListenerKey};

type Table<K, V> = BpfHashMap<MapData, K, V>;

/// The maps, open.
pub(super) struct Maps {
    listeners: Table<layout::ListenerKey, ListenerValue>,
    pub(super) backends: Table<BackendKey, BackendValue>,
    pub(super) counters: PerCpuHashMap<MapData, u32, ListenerCounters>,
    local_addresses: Table<AddressBytes, u32>,
    verdicts: PerCpuArray<MapData, u64>,
    /// The listener that each key of `listeners` was last written for.
    known_listeners: HashMap<layout::ListenerKey, ListenerId>,
    /// The listeners that have counters.
    known_counters: BTreeSet<ListenerId>,
    /// What stands in `backends`, by slot.
    known_backends: HashMap<ListenerId, Vec<BackendEntry>>,
    /// What stands in `local_addresses`.
    known_addresses: BTreeMap<AddressBytes, u32>,
    /// The listeners that a former agent has left: their new connections are held back until this one has its own.
    former_listeners: HashSet<layout::ListenerKey>,
}

impl Maps {
    /// Takes the maps out of what was loaded.
    ///
    /// # Errors
    /// One is not there, or of another layout.
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        let listeners: Table<layout::ListenerKey, ListenerValue> = table(ebpf, layout::LISTENERS)?;
        let mut backends: Table<BackendKey, BackendValue> = table(ebpf, layout::BACKENDS)?;
        let mut counters: PerCpuHashMap<MapData, u32, ListenerCounters> =
            typed(ebpf, layout::COUNTERS, PerCpuHashMap::try_from)?;
        let local_addresses: Table<AddressBytes, u32> = table(ebpf, layout::LOCAL_ADDRESSES)?;
        // What stands under numbers that this agent gives anew.
        for key in backends.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _ = backends.remove(&key);
        }
        for key in counters.keys().filter_map(Result::ok).collect::<Vec<_>>() {
            let _ = counters.remove(&key);
        }
        Ok(Self {
            former_listeners: listeners.keys().filter_map(Result::ok).collect(),
            known_addresses: local_addresses.iter().filter_map(Result::ok).collect(),
            listeners,
            backends,
            counters,
            local_addresses,
            verdicts: typed(ebpf, layout::VERDICTS, PerCpuArray::try_from)?,
            known_listeners: HashMap::new(),
            known_counters: BTreeSet::new(),
            known_backends: HashMap::new(),
        })
    }

    pub(super) fn set_listener(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        state: ListenerState,
    ) -> Result<(), DatapathError> {
        // First the counters: a program that finds the listener looks for them.
        let is_new = !self.known_counters.contains(&id);
        self.create_counters(id)?;
        let state = match state {
            ListenerState::Ready => STATE_READY,
            ListenerState::Draining => STATE_DRAINING,
        };
        let map_key = map_key(key);
        match self.listeners.insert(map_key, ListenerValue { listener_id: id.0, state }, 0) {
            Ok(()) => {
                self.former_listeners.remove(&map_key);
                self.known_listeners.insert(map_key, id);
                Ok(())
            }
            Err(source) => {
                if is_new {
                    self.remove_counters(id)?;
                }
                Err(write_error(layout::LISTENERS, key.to_string(), source))
            }
        }
    }

    pub(super) fn set_backends(
        &mut self,
        id: ListenerId,
        backends: Vec<BackendEntry>,
    ) -> Result<(), DatapathError> {
        let known = self.known_backends.entry(id).or_default();
        let describe = |slot: u32| format!("listener {} slot {slot}", id.0);
        // First what is superfluous: that makes room.
        while known.len() > backends.len() {
            let slot = slot(known.len() - 1);
            let removed = self.backends.remove(&BackendKey { listener_id: id.0, slot });
            absent(layout::BACKENDS, removed, || describe(slot))?;
            known.pop();
        }
        for (index, backend) in backends.into_iter().enumerate() {
            if known.get(index) == Some(&backend) {
                continue;
            }
            let slot = slot(index);
            self.backends
                .insert(BackendKey { listener_id: id.0, slot }, backend_value(backend), 0)
                .map_err(|source| write_error(layout::BACKENDS, describe(slot), source))?;
            match known.get_mut(index) {
                Some(known) => *known = backend,
                None => known.push(backend),
            }
        }
        Ok(())
    }

    pub(super) fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError> {
        // The reverse of the order in which they are written. Each part is tried, whatever becomes of the others, and
        // forgotten only when it is gone, so that the next call tries the rest again.
        let map_key = map_key(key);
        let mut listener = Ok(());
        // Another listener may have the key by now.
        if self.known_listeners.get(&map_key) == Some(&id) {
            listener = absent(layout::LISTENERS, self.listeners.remove(&map_key), || key.to_string());
            if listener.is_ok() {
                self.known_listeners.remove(&map_key);
            }
        }
        let backends = self.set_backends(id, Vec::new());
        if backends.is_ok() {
            self.known_backends.remove(&id);
        }
        let counters = self.remove_counters(id);
        listener.and(backends).and(counters)
    }

    pub(super) fn remove_former_listeners(&mut self) -> Result<(), DatapathError> {
        for key in std::mem::take(&mut self.former_listeners) {
            let removed = self.listeners.remove(&key);
            absent(layout::LISTENERS, removed, || format!("port {} of a former agent", key.port))?;
        }
        Ok(())
    }

    pub(super) fn counters(&self, id: ListenerId) -> Result<ListenerCounters, DatapathError> {
        let values = match self.counters.get(&id.0, 0) {
            Ok(values) => values,
            Err(MapError::KeyNotFound) => return Ok(ListenerCounters::default()),
            Err(source) => return Err(read_error(layout::COUNTERS, format!("listener {}", id.0), source)),
        };
        Ok(values.iter().fold(ListenerCounters::default(), |sum, cpu| ListenerCounters {
            syns: sum.syns.wrapping_add(cpu.syns),
            packets: sum.packets.wrapping_add(cpu.packets),
            bytes: sum.bytes.wrapping_add(cpu.bytes),
        }))
    }

    pub(super) fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
        Verdict::ALL
            .into_iter()
            .map(|verdict| {
                let values = self
                    .verdicts
                    .get(&verdict.index(), 0)
                    .map_err(|source| read_error(layout::VERDICTS, verdict.as_str().to_owned(), source))?;
                Ok((verdict, values.iter().copied().fold(0, u64::wrapping_add)))
            })
            .collect()
    }

    pub(super) fn set_local_addresses(&mut self, interfaces: &[Interface]) -> Vec<DatapathError> {
        let want: BTreeMap<AddressBytes, u32> = interfaces
            .iter()
            .flat_map(|interface| interface.addresses.iter().map(|a| (address_bytes(*a), interface.index)))
            .collect();
        let mut errors = Vec::new();
        let describe = |address: &AddressBytes| address_of(*address).to_string();
        self.known_addresses.retain(|address, _| {
            if want.contains_key(address) {
                return true;
            }
            let removed = self.local_addresses.remove(address);
            match absent(layout::LOCAL_ADDRESSES, removed, || describe(address)) {
                Ok(()) => false,
                Err(error) => {
                    errors.push(error);
                    true
                }
            }
        });
        for (address, index) in want {
            if self.known_addresses.get(&address) == Some(&index) {
                continue;
            }
            match self.local_addresses.insert(address, index, 0) {
                Ok(()) => {
                    self.known_addresses.insert(address, index);
                }
                Err(source) => errors.push(write_error(layout::LOCAL_ADDRESSES, describe(&address), source)),
            }
        }
        errors
    }

    /// Creates the counters of a listener, with zeros, unless it has some.
    fn create_counters(&mut self, id: ListenerId) -> Result<(), DatapathError> {
        if self.known_counters.contains(&id) {
            return Ok(());
        }
        let failed = |source| write_error(layout::COUNTERS, format!("listener {}", id.0), source);
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| failed(error.into()))?;
        let zeros =
            PerCpuValues::try_from(vec![ListenerCounters::default(); cpus]).map_err(|e| failed(e.into()))?;
        self.counters.insert(id.0, zeros, 0).map_err(failed)?;
        self.known_counters.insert(id);
        Ok(())
    }

    fn remove_counters(&mut self, id: ListenerId) -> Result<(), DatapathError> {
        if self.known_counters.contains(&id) {
            let removed = self.counters.remove(&id.0);
            absent(layout::COUNTERS, removed, || format!("listener {}", id.0))?;
            self.known_counters.remove(&id);
        }
        Ok(())
    }
}

pub(super) fn table<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Table<K, V>, LoadError> {
    typed(ebpf, name, BpfHashMap::try_from)
}

/// Takes a map out of what was loaded.
pub(super) fn typed<T>(
    ebpf: &mut Ebpf,
    name: &str,
    convert: impl FnOnce(Map) -> Result<T, MapError>,
) -> Result<T, LoadError> {
    let map = ebpf.take_map(name).ok_or_else(|| LoadError::no_map(name))?;
    convert(map).map_err(|error| LoadError::Object { reason: format!("map {name}: {error}") })
}

fn map_key(key: ListenerKey) -> layout::ListenerKey {
    let address = match key.address {
        BindAddress::Ip(ip) if !ip.is_unspecified() => address_bytes(ip),
        BindAddress::Ip(_) | BindAddress::Any => ANY_ADDRESS,
    };
    layout::ListenerKey::new(address, key.port.get())
}

fn backend_value(backend: BackendEntry) -> BackendValue {
    let ip = backend.address.ip();
    BackendValue { address: address_bytes(ip), weight: backend.weight, port: backend.address.port(), pad: 0 }
}

/// The map holds fewer endpoints than a `u32` counts, so the list does not get longer.
fn slot(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn write_error(map: &'static str, entry: String, source: MapError) -> DatapathError {
    DatapathError { operation: "write to", map, entry: Some(entry), source: Box::new(source) }
}

fn read_error(map: &'static str, entry: String, source: MapError) -> DatapathError {
    DatapathError { operation: "read", map, entry: Some(entry), source: Box::new(source) }
}

/// Whether an entry is absent after its removal; that it was not there is no error.
fn absent(
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
