//! The kernel's maps and programs, through aya.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use aya_log::EbpfLogger;
use forwarder_common::layout::{
    self, ANY_ADDRESS, AddressBytes, PINNED_MAPS, STATE_DRAINING, STATE_READY, address_bytes, address_of,
};
use forwarder_common::{
    BackendKey, BackendValue, ListenerCounters, ListenerValue, PROGRAM_ETHERNET, PROGRAM_IP, Verdict,
};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use super::attach::{AttachKind, AttachProblem, Attachment};
pub use super::load_error::LoadError;

use super::attach::Attachments;
use super::interfaces::{Interface, wanted};
use super::load_error::{errno_of, kernel_release};
use super::pins::Pins;
use super::{BackendEntry, Datapath, DatapathError, ListenerId, ListenerState};
use crate::model::{BindAddress, ListenerKey};

/// The programs, as `cargo xtask build-ebpf` compiled them; empty if it did not.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder.bpf.o"));

/// Where the records of the programs' logs go from; see `aya_log_common::Level`.
const LOG_OFF: u8 = 0;
const LOG_TRACE: u8 = aya_log::Level::Trace as u8;

/// How the programs are loaded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BpfOptions {
    /// Where the maps are pinned, under `v{ABI_VERSION}`; on a BPF file system, such as `/sys/fs/bpf/forwarder`.
    pub pin_dir: PathBuf,
    /// Whether the programs log each connection attempt; read it with [`Bpf::take_log`].
    pub trace: bool,
}

/// What [`probe`] found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProbeReport {
    /// How classifiers would be attached.
    pub attach: AttachKind,
    /// Whether the kernel describes its types: `bpftool` then prints the maps' fields by name.
    pub btf: bool,
    /// The kernel's release.
    pub kernel: String,
}

/// Loads the programs, without pinning or attaching anything, and unloads them.
///
/// # Errors
/// As [`Bpf::load`].
pub fn probe() -> Result<ProbeReport, LoadError> {
    let _ebpf = load(LOG_OFF)?;
    Ok(ProbeReport {
        attach: AttachKind::of_kernel(),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        kernel: kernel_release(),
    })
}

/// The loaded programs, their maps and pins, and the interfaces that the programs are attached to. Dropping it detaches
/// the programs and removes the pins.
// Fields are dropped in order: what is attached first, the pins before the maps.
pub struct Bpf {
    attachments: Attachments,
    pins: Pins,
    listeners: Table<layout::ListenerKey, ListenerValue>,
    backends: Table<BackendKey, BackendValue>,
    counters: PerCpuHashMap<MapData, u32, ListenerCounters>,
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
    /// The problems that were told and last.
    told: BTreeSet<String>,
    ebpf: Ebpf,
}

type Table<K, V> = BpfHashMap<MapData, K, V>;

impl Bpf {
    /// Loads the programs, creates their maps, and pins these. Pins that a dead agent left are removed.
    ///
    /// # Errors
    /// The kernel or the pin directory does not allow it; the message says what to do. Nothing is left behind.
    pub fn load(options: &BpfOptions) -> Result<Self, LoadError> {
        if OBJECT.is_empty() {
            return Err(LoadError::NoPrograms);
        }
        let pins = Pins::acquire(&options.pin_dir)?;
        let mut ebpf = load(if options.trace { LOG_TRACE } else { LOG_OFF })?;
        for name in PINNED_MAPS {
            let map = ebpf.map(name).ok_or_else(|| no_map(name))?;
            pins.pin(name, map)?;
        }
        Ok(Self {
            attachments: Attachments::new(AttachKind::of_kernel()),
            listeners: table(&mut ebpf, layout::LISTENERS)?,
            backends: table(&mut ebpf, layout::BACKENDS)?,
            counters: typed(layout::COUNTERS, ebpf.take_map(layout::COUNTERS), PerCpuHashMap::try_from)?,
            local_addresses: table(&mut ebpf, layout::LOCAL_ADDRESSES)?,
            verdicts: typed(layout::VERDICTS, ebpf.take_map(layout::VERDICTS), PerCpuArray::try_from)?,
            pins,
            known_listeners: HashMap::new(),
            known_counters: BTreeSet::new(),
            known_backends: HashMap::new(),
            known_addresses: BTreeMap::new(),
            told: BTreeSet::new(),
            ebpf,
        })
    }

    /// Detaches the programs, unloads them and removes the pins, as dropping does.
    pub fn close(self) {}

    /// Where the maps are pinned: the directory of this version.
    pub fn pin_directory(&self) -> &Path {
        self.pins.directory()
    }

    /// How classifiers are attached on this kernel.
    pub fn attach_kind(&self) -> AttachKind {
        self.attachments.kind()
    }

    /// The interfaces that classifiers hang on.
    pub fn attachments(&self) -> Vec<Attachment> {
        self.attachments.iter().collect()
    }

    /// Attaches the classifiers to the interfaces through which connections to listeners on `bound` arrive, see
    /// [`wanted`], detaches them from all others, and tells them the addresses of `interfaces` (all of the node's). To
    /// be called whenever one of these changes. Returns what fails now and did not in the call before; what fails on one
    /// interface does not concern the others, and is tried again in each call.
    pub fn attach(&mut self, interfaces: &[Interface], bound: &BTreeSet<BindAddress>) -> Vec<AttachProblem> {
        let wanted = wanted(interfaces, bound);
        let mut problems = self.attachments.update(&mut self.ebpf, interfaces, &wanted);
        problems.extend(self.set_local_addresses(interfaces).into_iter().map(AttachProblem::from));
        let before = std::mem::take(&mut self.told);
        problems.retain(|problem| {
            let message = problem.to_string();
            let is_new = !before.contains(&message);
            self.told.insert(message);
            is_new
        });
        problems
    }

    /// How many packets met with each verdict since the programs were loaded, over all CPUs and interfaces.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
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

    /// What passes on the programs' log records, to be spawned on a runtime: they go to [`log`], at level trace. It ends
    /// only when it is dropped. `None` when it was taken before.
    ///
    /// # Errors
    /// The ring buffer cannot be waited for. Must be called within a tokio runtime.
    pub fn take_log(&mut self) -> io::Result<Option<impl Future<Output = ()> + Send + 'static + use<>>> {
        let Ok(logger) = EbpfLogger::init(&mut self.ebpf) else {
            return Ok(None);
        };
        #[expect(
            deprecated,
            reason = "its successor is unsafe; the logger owns its one descriptor, so both are sound"
        )]
        let mut logger = AsyncFd::with_interest(logger, Interest::READABLE)?;
        Ok(Some(async move {
            while let Ok(mut ready) = logger.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        }))
    }

    fn set_local_addresses(&mut self, interfaces: &[Interface]) -> Vec<DatapathError> {
        let want: BTreeMap<AddressBytes, u32> = interfaces
            .iter()
            .flat_map(|interface| interface.addresses.iter().map(|a| (address_bytes(*a), interface.index)))
            .collect();
        let mut errors = Vec::new();
        let describe = |address: &AddressBytes| address_of(*address).to_string();
        for (address, _) in self.known_addresses.extract_if(.., |address, _| !want.contains_key(address)) {
            let removed = self.local_addresses.remove(&address);
            errors.extend(removed_error(layout::LOCAL_ADDRESSES, removed, || describe(&address)));
        }
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
        if !self.known_counters.remove(&id) {
            return Ok(());
        }
        let removed = self.counters.remove(&id.0);
        removed_error(layout::COUNTERS, removed, || format!("listener {}", id.0)).map_or(Ok(()), Err)
    }
}

impl Datapath for Bpf {
    fn attach(&mut self, interfaces: &[Interface], bound: &BTreeSet<BindAddress>) -> Vec<AttachProblem> {
        Bpf::attach(self, interfaces, bound)
    }

    fn attachments(&self) -> Vec<Attachment> {
        Bpf::attachments(self)
    }

    fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
        Bpf::verdicts(self)
    }

    fn set_listener(
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

    fn set_backends(&mut self, id: ListenerId, backends: Vec<BackendEntry>) -> Result<(), DatapathError> {
        let known = self.known_backends.entry(id).or_default();
        let describe = |slot: u32| format!("listener {} slot {slot}", id.0);
        // First what is superfluous: that makes room.
        while known.len() > backends.len() {
            known.pop();
            let slot = slot(known.len());
            let removed = self.backends.remove(&BackendKey { listener_id: id.0, slot });
            if let Some(error) = removed_error(layout::BACKENDS, removed, || describe(slot)) {
                return Err(error);
            }
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

    fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError> {
        // The reverse of the order in which they are written. Each part is tried, whatever becomes of the others.
        let map_key = map_key(key);
        let mut first_error = None;
        // Another listener may have the key by now.
        if self.known_listeners.get(&map_key) == Some(&id) {
            self.known_listeners.remove(&map_key);
            let removed = self.listeners.remove(&map_key);
            first_error = removed_error(layout::LISTENERS, removed, || key.to_string());
        }
        let backends = self.set_backends(id, Vec::new());
        self.known_backends.remove(&id);
        let counters = self.remove_counters(id);
        first_error.map_or(Ok(()), Err).and(backends).and(counters)
    }

    fn counters(&self, id: ListenerId) -> Result<ListenerCounters, DatapathError> {
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
}

/// Creates the maps and loads the programs.
fn load(log_level: u8) -> Result<Ebpf, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoPrograms);
    }
    // Before 5.11 maps count as locked memory. Where raising the limit fails, so may creating the maps, with a reason.
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
    let mut ebpf = EbpfLoader::new()
        .override_global(aya_log::LEVEL, &log_level, true)
        .load(OBJECT)
        .map_err(|error| LoadError::new("create the BPF maps".to_owned(), "", error))?;
    for name in [PROGRAM_ETHERNET, PROGRAM_IP] {
        let program = ebpf
            .program_mut(name)
            .ok_or_else(|| LoadError::Object { reason: format!("they have no program {name}") })?;
        <&mut SchedClassifier>::try_from(program)
            .and_then(SchedClassifier::load)
            .map_err(|error| LoadError::new(format!("load program {name}"), name, EbpfError::from(error)))?;
    }
    Ok(ebpf)
}

fn no_map(name: &str) -> LoadError {
    LoadError::Object { reason: format!("they have no map {name}") }
}

fn table<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &str) -> Result<Table<K, V>, LoadError> {
    typed(name, ebpf.take_map(name), BpfHashMap::try_from)
}

fn typed<T>(
    name: &str,
    map: Option<aya::maps::Map>,
    convert: impl FnOnce(aya::maps::Map) -> Result<T, MapError>,
) -> Result<T, LoadError> {
    let map = map.ok_or_else(|| no_map(name))?;
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
    let ip: IpAddr = backend.address.ip();
    BackendValue { address: address_bytes(ip), weight: backend.weight, port: backend.address.port(), pad: 0 }
}

/// The map holds fewer endpoints than a `u32` counts, so the list does not get longer.
fn slot(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn write_error(map: &'static str, entry: String, source: MapError) -> DatapathError {
    DatapathError { operation: "write to", map, entry: Some(entry), source }
}

fn read_error(map: &'static str, entry: String, source: MapError) -> DatapathError {
    DatapathError { operation: "read", map, entry: Some(entry), source }
}

/// The error of removing an entry; that it was not there is none.
fn removed_error(
    map: &'static str,
    removed: Result<(), MapError>,
    entry: impl FnOnce() -> String,
) -> Option<DatapathError> {
    match removed {
        Ok(()) | Err(MapError::KeyNotFound) => None,
        Err(source) if errno_of(&source) == Some(Errno::NOENT) => None,
        Err(source) => Some(DatapathError { operation: "remove from", map, entry: Some(entry()), source }),
    }
}

#[cfg(test)]
mod tests;
