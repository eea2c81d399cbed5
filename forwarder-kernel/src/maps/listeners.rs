//! The maps that the agent shares with the programs, and a copy of what stands in them, so that only what differs is
//! written. See [`ListenerMaps`](crate::listener_maps::ListenerMaps) and [`Bpf`](crate::bpf::Bpf) for what the functions do.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use aya::maps::{
    HashMap as BpfHashMap, LpmTrie, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues,
};
use aya::{Ebpf, Pod};
use forwarder_common::layout::{self, ANY_ADDRESS, STATE_DRAINING, STATE_READY, STATE_REMOVED};
use forwarder_common::tuple::{AddressBytes, address_bytes, address_of};
use forwarder_common::{BackendKey, BackendValue, ListenerCounters, ListenerValue, Verdict};

use crate::load_error::LoadError;
use crate::maps::client_rules::ClientRules;
use crate::maps::gate::Gate;
use crate::maps::remover::{Remover, Stale, absent};
use crate::maps::updates::Updates;
use crate::maps::{BackendEntry, DatapathError, ListenerId, ListenerState};
use crate::net::interfaces::Interface;
use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{BindAddress, ListenerKey};

type Table<K, V> = BpfHashMap<MapData, K, V>;

/// The flag of `bpf(BPF_MAP_UPDATE_ELEM)` by which an entry must not be there yet: what replaced one would free it.
const BPF_NOEXIST: u64 = 1;
/// How many removals are remembered before all of them are waited for.
const MOST_CONDEMNED: usize = 4096;

/// The maps, open.
pub(crate) struct Maps {
    listeners: Table<layout::ListenerKey, ListenerValue>,
    pub(crate) backends: Table<BackendKey, BackendValue>,
    pub(crate) counters: PerCpuHashMap<MapData, u32, ListenerCounters>,
    local_addresses: Table<AddressBytes, u32>,
    verdicts: PerCpuArray<MapData, u64>,
    /// The listener that each key of `listeners` was last written for.
    known_listeners: HashMap<layout::ListenerKey, ListenerId>,
    /// What stands in `listeners` for each of them, or is to once it is set.
    values: HashMap<ListenerId, ListenerValue>,
    client_rules: ClientRules,
    /// The listeners of which the programs do not know which clients to let in, and how often.
    unchecked: BTreeMap<ListenerId, (ListenerKey, Arc<AllowedAddresses>, u32)>,
    /// The listeners that have counters.
    known_counters: BTreeSet<ListenerId>,
    /// What stands in `backends`, by slot.
    known_backends: HashMap<ListenerId, Vec<BackendEntry>>,
    /// What stands in `local_addresses`.
    known_addresses: BTreeMap<AddressBytes, u32>,
    /// The listeners that a former agent has left: their new connections are held back until this one has its own.
    former_listeners: HashSet<layout::ListenerKey>,
    /// Before what programs read is inserted into.
    gate: Gate<Stale>,
    /// What was condemned since everything that was had to be removed, last: it may still stand there.
    condemned: HashSet<Stale>,
    updates: Arc<Updates>,
}

impl Maps {
    /// Takes the maps out of what was loaded.
    ///
    /// # Errors
    /// One is not there, or of another layout.
    pub(crate) fn take(ebpf: &mut Ebpf, pin_dir: &Path, updates: Arc<Updates>) -> Result<Self, LoadError> {
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
        let failed =
            |operation: &str, error: MapError| LoadError::new(operation.to_owned(), "", error.into());
        let mut remover = Remover::open(pin_dir).map_err(|error| failed("open the BPF maps", error))?;
        // After what has just been removed.
        let gate = Gate::start("maps", move |batch| remover.remove_all(batch));
        Ok(Self {
            gate: gate.map_err(|error| failed("start a thread for the BPF maps", error.into()))?,
            condemned: HashSet::new(),
            updates,
            former_listeners: listeners.keys().filter_map(Result::ok).collect(),
            known_addresses: local_addresses.iter().filter_map(Result::ok).collect(),
            listeners,
            backends,
            counters,
            local_addresses,
            verdicts: typed(ebpf, layout::VERDICTS, PerCpuArray::try_from)?,
            known_listeners: HashMap::new(),
            values: HashMap::new(),
            client_rules: ClientRules::new(typed(ebpf, layout::CLIENT_RULES, LpmTrie::try_from)?),
            unchecked: BTreeMap::new(),
            known_counters: BTreeSet::new(),
            known_backends: HashMap::new(),
        })
    }

    pub(crate) fn set_listener(
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
        let value = ListenerValue { state, ..self.value(id) };
        match self.write_listener(map_key, value) {
            Ok(()) => {
                self.values.insert(id, value);
                self.former_listeners.remove(&map_key);
                self.known_listeners.insert(map_key, id);
                Ok(())
            }
            Err(source) => {
                if is_new {
                    self.remove_counters(id);
                }
                Err(write_error(layout::LISTENERS, key.to_string(), source))
            }
        }
    }

    pub(crate) fn set_targets(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        targets: [u64; 2],
    ) -> Result<(), DatapathError> {
        let former = self.value(id);
        if former.targets == targets {
            return Ok(());
        }
        self.change(key, id, ListenerValue { targets, ..former })
    }

    pub(crate) fn set_clients(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        clients: &Arc<AllowedAddresses>,
        client_rate: u32,
    ) -> Result<(), DatapathError> {
        let former = self.value(id);
        let written = self.client_rules.number(clients).map_err(|(network, source)| {
            write_error(layout::CLIENT_RULES, format!("{network} of listener {key}"), source)
        });
        let changed = match written {
            Ok(client_rules) => self.change(key, id, ListenerValue { client_rules, client_rate, ..former }),
            // Neither those of before, which may refuse whom these let in: its socket decides.
            Err(error) => self
                .change(key, id, ListenerValue { client_rules: 0, client_rate, targets: [0; 2], ..former })
                .and(Err(error)),
        };
        if changed.is_ok() {
            self.unchecked.remove(&id);
        } else {
            self.unchecked.insert(id, (key, Arc::clone(clients), client_rate));
        }
        self.forget_client_rules(former.client_rules);
        changed
    }

    /// Tries again what programs could not be told of clients: there may be room by now.
    pub(crate) fn retry_clients(&mut self) {
        for (id, (key, clients, client_rate)) in self.unchecked.clone() {
            if self.set_clients(key, id, &clients, client_rate).is_ok() {
                tracing::info!(listener = %key, "the BPF programs know now which clients the listener does not let in");
            }
        }
    }

    /// Whether programs know which clients a listener lets in.
    pub(crate) fn are_clients_checked(&self, id: ListenerId) -> bool {
        !self.unchecked.contains_key(&id)
    }

    /// Removes rules on clients if no listener has them.
    fn forget_client_rules(&mut self, number: u32) {
        if number == 0 || self.values.values().any(|value| value.client_rules == number) {
            return;
        }
        for rule in self.client_rules.forget(number) {
            self.gate.condemn(Stale::ClientRule(rule));
        }
    }

    /// What stands there for a listener, or is to.
    pub(crate) fn value(&self, id: ListenerId) -> ListenerValue {
        let new = ListenerValue {
            listener_id: id.0,
            state: STATE_READY,
            targets: [0; 2],
            client_rules: 0,
            client_rate: 0,
        };
        self.values.get(&id).copied().unwrap_or(new)
    }

    /// Makes a listener what is said, now if it stands there.
    fn change(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        value: ListenerValue,
    ) -> Result<(), DatapathError> {
        let map_key = map_key(key);
        // Another listener may have the key by now.
        if self.known_listeners.get(&map_key) == Some(&id) && self.values.get(&id) != Some(&value) {
            self.updates
                .set_listener(map_key, value)
                .map_err(|source| write_error(layout::LISTENERS, key.to_string(), source))?;
        }
        self.values.insert(id, value);
        Ok(())
    }

    /// Makes a listener that stands there what is said, or a new one.
    fn write_listener(&mut self, key: layout::ListenerKey, value: ListenerValue) -> Result<(), MapError> {
        let is_condemned = self.condemned.contains(&Stale::Listener(key));
        if !is_condemned && self.updates.set_listener(key, value)? {
            return Ok(());
        }
        self.settle(Stale::Listener(key));
        let _permit = self.gate.permit_blocking();
        self.listeners.insert(key, value, BPF_NOEXIST)
    }

    /// Has something removed, which may stand there for a moment still.
    fn condemn(&mut self, stale: Stale) {
        self.gate.condemn(stale);
        if self.condemned.len() < MOST_CONDEMNED {
            self.condemned.insert(stale);
        } else {
            self.condemned.clear();
            self.gate.hasten();
            // With leave to insert, all of it is gone: nothing is written in place that is about to be removed.
            drop(self.gate.permit_blocking());
        }
    }

    /// Has it removed before the next permit, if it may still stand there.
    fn settle(&mut self, stale: Stale) {
        if self.condemned.contains(&stale) {
            self.condemned.clear();
            self.gate.hasten();
        }
    }

    pub(crate) fn set_backends(
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
        known.reserve_exact(backends.len() - known.len());
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

    pub(crate) fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError> {
        // The reverse of the order in which they are written. Each part is tried, whatever becomes of the others, and
        // forgotten only when it is gone, so that the next call tries the rest again.
        let map_key = map_key(key);
        let mut listener = Ok(());
        // Another listener may have the key by now.
        if self.known_listeners.get(&map_key) == Some(&id) {
            listener = self.remove_entry(map_key, || key.to_string());
            if listener.is_ok() {
                self.known_listeners.remove(&map_key);
            }
        }
        // Where it stands still, its rules hold.
        if listener.is_ok() {
            self.unchecked.remove(&id);
            if let Some(value) = self.values.remove(&id) {
                self.forget_client_rules(value.client_rules);
            }
        }
        let backends = self.set_backends(id, Vec::new());
        if backends.is_ok() {
            self.known_backends.remove(&id);
        }
        self.remove_counters(id);
        listener.and(backends)
    }

    /// Has the programs know nothing of a listener any more, and its entry removed.
    fn remove_entry(
        &mut self,
        key: layout::ListenerKey,
        describe: impl FnOnce() -> String,
    ) -> Result<(), DatapathError> {
        // For a program that has found the listener, its clients stay who they are.
        let id = self.known_listeners.get(&key);
        let client_rules = id.map_or(0, |id| self.value(*id).client_rules);
        let gone = ListenerValue {
            listener_id: 0,
            state: STATE_REMOVED,
            targets: [0; 2],
            client_rules,
            client_rate: 0,
        };
        self.updates
            .set_listener(key, gone)
            .map_err(|source| write_error(layout::LISTENERS, describe(), source))?;
        self.condemn(Stale::Listener(key));
        Ok(())
    }

    pub(crate) fn remove_former_listeners(&mut self) -> Result<(), DatapathError> {
        for key in self.former_listeners.clone() {
            self.remove_entry(key, || format!("port {} of a former agent", key.port))?;
            self.former_listeners.remove(&key);
        }
        for rule in self.client_rules.take_former() {
            self.gate.condemn(Stale::ClientRule(rule));
        }
        Ok(())
    }

    pub(crate) fn counters(&self, id: ListenerId) -> Result<ListenerCounters, DatapathError> {
        if !self.known_counters.contains(&id) {
            return Ok(ListenerCounters::default());
        }
        let values = match self.counters.get(&id.0, 0) {
            Ok(values) => values,
            Err(MapError::KeyNotFound) => return Ok(ListenerCounters::default()),
            Err(source) => return Err(read_error(layout::COUNTERS, format!("listener {}", id.0), source)),
        };
        Ok(values.iter().fold(ListenerCounters::default(), |sum, cpu| ListenerCounters {
            syns: sum.syns.wrapping_add(cpu.syns),
            packets: sum.packets.wrapping_add(cpu.packets),
            bytes: sum.bytes.wrapping_add(cpu.bytes),
            denied: sum.denied.wrapping_add(cpu.denied),
            limited: sum.limited.wrapping_add(cpu.limited),
        }))
    }

    pub(crate) fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
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

    pub(crate) fn set_local_addresses(&mut self, interfaces: &[Interface]) -> Vec<DatapathError> {
        let want: BTreeMap<AddressBytes, u32> = interfaces
            .iter()
            .flat_map(|interface| interface.addresses.iter().map(|a| (address_bytes(*a), interface.index)))
            .collect();
        let mut errors = Vec::new();
        let describe = |address: &AddressBytes| address_of(*address).to_string();
        // One that has moved is told anew: until then, packets to it are not counted for listeners on every address.
        let stale = self.known_addresses.iter().filter(|(address, index)| want.get(*address) != Some(*index));
        for address in stale.map(|(address, _)| *address).collect::<Vec<_>>() {
            self.known_addresses.remove(&address);
            self.condemn(Stale::Address(address));
        }
        for (address, index) in want {
            if self.known_addresses.contains_key(&address) {
                continue;
            }
            self.settle(Stale::Address(address));
            let _permit = self.gate.permit_blocking();
            match self.local_addresses.insert(address, index, BPF_NOEXIST) {
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
        self.settle(Stale::Counters(id.0));
        let _permit = self.gate.permit_blocking();
        self.counters.insert(id.0, zeros, BPF_NOEXIST).map_err(failed)?;
        self.known_counters.insert(id);
        Ok(())
    }

    fn remove_counters(&mut self, id: ListenerId) {
        if self.known_counters.remove(&id) {
            self.condemn(Stale::Counters(id.0));
        }
    }
}

pub(crate) fn table<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Table<K, V>, LoadError> {
    typed(ebpf, name, BpfHashMap::try_from)
}

/// Takes a map out of what was loaded.
pub(crate) fn typed<T>(
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
