//! The kernel's maps and programs, through aya.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::maps::{Map, MapData, Queue};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use aya_log::EbpfLogger;
use forwarder_common::direct::{
    DIRECT, DIRECT_FREE, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS, DIRECT_TARGETS_CAPACITY,
};
use forwarder_common::flow::PAIRS_CAPACITY;
use forwarder_common::layout::{
    FLOWS, LOOSE_INTERFACES, PAIRS, PINNED_MAPS, PinnedMap, XDP_INTERFACES, XDP_INTERFACES_CAPACITY,
    XDP_NEIGHBOURS, XDP_NEIGHBOURS_BITS, XDP_TARGETS, XDP_TARGETS_CAPACITY,
};
use forwarder_common::update::{PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};
use forwarder_common::{
    ListenerCounters, PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP, PROGRAM_ETHERNET, PROGRAM_IP, Verdict,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

pub use crate::load_error::LoadError;
pub use crate::programs::attach::{AttachKind, AttachProblem, Attachment};

use crate::flows::arrival::LooseInterfaces;
use crate::flows::paths::Paths;
use crate::flows::{FlowTable, FlowTableError};
use crate::listener_maps::ListenerMaps;
use crate::load_error::kernel_release;
use crate::maps::listeners::{self, Maps};
use crate::maps::updates::Updates;
use crate::maps::versions::map_path;
use crate::maps::{BackendEntry, DatapathError, ListenerId, ListenerState, MapError};
use crate::net::interfaces::{Interface, arrivals, wanted};
use crate::net::routes::Routes;
use crate::programs::attach::{Attachments, Stay};
use crate::programs::pins::Pins;
use crate::programs::uninterrupted;
use crate::programs::xdp::XdpHooks;
use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{BindAddress, ListenerKey, Xdp};

/// The programs, as `cargo xtask build-ebpf` compiled them; empty if it did not.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder.bpf.o"));

/// What the programs ask whether there may be direct connections.
const DIRECT_ON: &str = "DIRECT_ON";
/// Where the records of the programs' logs go from; see `aya_log_common::Level`.
const LOG_OFF: u8 = 0;
const LOG_TRACE: u8 = aya_log::Level::Trace as u8;

/// How the programs are loaded.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct BpfOptions {
    /// Where the maps are pinned, each in the folder of its version; on a BPF file system, such as `/sys/fs/bpf/forwarder`.
    pub pin_dir: PathBuf,
    /// Whether the programs log each connection attempt; read it with [`Bpf::take_log`].
    pub trace: bool,
    /// How many connections may be joined at most; `None` where none may be. Otherwise programs hang at the egress of
    /// the interfaces too, and programs, maps and pins outlive the process.
    pub most_pairs: Option<u32>,
    /// How many connections may be direct at most; 0 where none may be. Only where connections may be joined.
    pub most_direct: u32,
    /// Whether, and how, programs hang at XDP.
    pub xdp: Xdp,
}

/// What [`probe`] found.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ProbeReport {
    /// How programs would be attached.
    pub attach: AttachKind,
    /// Whether the kernel describes its types: `bpftool` then prints the maps' fields by name.
    pub btf: bool,
    /// The kernel's release.
    pub kernel: String,
}

/// Loads the programs, without pinning or attaching anything, and unloads them: those that also make direct connections, if
/// `makes_direct`.
///
/// # Errors
/// As [`Bpf::load`].
pub fn probe(makes_direct: bool) -> Result<ProbeReport, LoadError> {
    let most_direct = u32::from(makes_direct);
    load(&LoadSettings { has_flows: true, most_direct, ..LoadSettings::PROBE })?;
    Ok(ProbeReport {
        attach: AttachKind::of_kernel(),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        kernel: kernel_release(),
    })
}

/// Has the kernel verify a program at XDP, and unloads it. Returns why it only drops, where it does.
///
/// # Errors
/// It takes none, and why.
pub fn probe_xdp() -> Result<Option<String>, String> {
    let settings = LoadSettings { sends_at_xdp: true, most_direct: 1, ..LoadSettings::PROBE };
    let mut ebpf = load(&settings).map_err(|error| error.to_string())?;
    match XdpHooks::load(&mut ebpf, Xdp::Native) {
        (hooks, problem) if hooks.has_program() => Ok(problem),
        (_, problem) => Err(problem.unwrap_or_default()),
    }
}

/// The loaded programs, their maps and pins, and the interfaces that the programs are attached to. Dropping it detaches
/// the programs and removes the pins.
// Fields are dropped in order: what is attached first, the pins before the maps.
pub struct Bpf {
    attachments: Attachments,
    xdp: XdpHooks,
    xdp_error: Option<String>,
    paths: Arc<Paths>,
    has_flows: bool,
    /// The queue of free slots, where there may be direct connections.
    direct_free: Option<MapData>,
    direct_error: Option<String>,
    pins: Pins,
    maps: Maps,
    updates: Arc<Updates>,
    /// The problems that were told and last.
    told: BTreeSet<String>,
    ebpf: Ebpf,
}

impl Bpf {
    /// Loads the programs, creates their maps, and pins these. Pins that a dead agent left are removed.
    ///
    /// # Errors
    /// The kernel or the pin directory does not allow it; the message says what to do. Nothing is left behind but what a
    /// former agent has left, which the next one may still take over.
    pub fn load(options: &BpfOptions) -> Result<Self, LoadError> {
        if OBJECT.is_empty() {
            return Err(LoadError::NoPrograms);
        }
        let mut pins = Pins::acquire(&options.pin_dir)?;
        // What another agent has left is served, whatever this one does for connections of its own.
        let has_flows = options.most_pairs.is_some() || pins.has_connections();
        let settings = |most_direct| LoadSettings {
            log_level: if options.trace { LOG_TRACE } else { LOG_OFF },
            pin_dir: Some(pins.pin_dir()),
            has_flows,
            most_pairs: options.most_pairs.unwrap_or(PAIRS_CAPACITY),
            most_direct: pins.room_for_direct(most_direct),
            sends_at_xdp: options.xdp == Xdp::Native,
        };
        let mut settings_in_force = settings(if has_flows { options.most_direct } else { 0 });
        let (mut ebpf, direct_error) = match load(&settings_in_force) {
            // The others are smaller.
            Err(error) if options.most_direct > 0 => {
                settings_in_force = settings(0);
                (load(&settings_in_force)?, Some(error.to_string()))
            }
            loaded => (loaded?, None),
        };
        let kind = AttachKind::of_kernel();
        let (xdp, xdp_error) = XdpHooks::load(&mut ebpf, options.xdp);
        let stay = match (has_flows, kind) {
            (true, _) => Stay::Programs(pins.links()?),
            (false, AttachKind::Clsact) => Stay::Nothing(Some(pins.links()?)),
            (false, AttachKind::Tcx) => Stay::Nothing(None),
        };
        let updates = Arc::new(Updates::take(&mut ebpf, pins.pin_dir())?);
        let free = ebpf.take_map(DIRECT_FREE).ok_or_else(|| LoadError::no_map(DIRECT_FREE))?;
        let Map::Queue(free) = free else {
            return Err(LoadError::Object { reason: format!("map {DIRECT_FREE} is no queue") });
        };
        let direct_free = (has_flows && settings_in_force.most_direct > 0).then_some(free);
        let maps = Maps::take(&mut ebpf, pins.pin_dir(), Arc::clone(&updates))?;
        let paths: Arc<Paths> = Arc::default();
        paths.set_filters(LooseInterfaces::new(listeners::table(&mut ebpf, LOOSE_INTERFACES)?));
        pins.take_over();
        Ok(Self {
            attachments: Attachments::new(kind, stay),
            xdp,
            xdp_error,
            paths,
            has_flows,
            direct_free,
            direct_error,
            maps,
            updates,
            pins,
            told: BTreeSet::new(),
            ebpf,
        })
    }

    /// Why there can be no direct connections, though they were asked for.
    pub fn direct_error(&self) -> Option<&str> {
        self.direct_error.as_deref()
    }

    /// Why there is less at XDP than was asked for.
    pub fn xdp_error(&self) -> Option<&str> {
        self.xdp_error.as_deref()
    }

    /// The pairs that the kernel forwards or may forward; `None` where it may not.
    ///
    /// # Errors
    /// The maps cannot be opened, or routes cannot be asked for.
    pub fn flows(&self) -> Option<Result<FlowTable, FlowTableError>> {
        let open = || {
            let routes = Routes::open()?;
            let (updates, paths) = (Arc::clone(&self.updates), Arc::clone(&self.paths));
            let direct = self.direct_free.as_ref().map(queue).transpose()?;
            FlowTable::open(self.pins.pin_dir(), updates, routes, paths, direct)
        };
        self.has_flows.then(open)
    }

    /// What is known of the interfaces that redirected packets use.
    pub fn paths(&self) -> &Arc<Paths> {
        &self.paths
    }

    /// Leaves programs, maps and pins to the next agent, if connections could be joined.
    pub fn leave(&mut self) {
        if self.has_flows {
            self.attachments.leave();
            self.pins.leave();
        }
    }

    /// Detaches the programs, unloads them and removes the pins, as dropping does.
    pub fn close(self) {}

    /// Where the maps are pinned, each in the folder of its version.
    pub fn pin_dir(&self) -> &Path {
        self.pins.pin_dir()
    }

    /// How programs are attached on this kernel.
    pub fn attach_kind(&self) -> AttachKind {
        self.attachments.kind()
    }

    /// The interfaces that ingress programs hang on.
    pub fn attachments(&self) -> Vec<Attachment> {
        let with_xdp = |(index, attachment)| Attachment { xdp: self.xdp.mode(index), ..attachment };
        self.attachments.iter().map(with_xdp).collect()
    }

    /// Attaches the programs to the interfaces through which connections to listeners on `bound` arrive, see
    /// [`wanted`], where connections may be joined also to all through which their packets may, see [`arrivals`], detaches them from all others, and tells them the addresses of `interfaces` (all of the node's). To
    /// be called whenever one of these changes, and now and then: what somebody has removed is attached again. Returns what fails now and did not in the call before; what fails on one
    /// interface does not concern the others, and is tried again in each call.
    pub fn attach(&mut self, interfaces: &[Interface], bound: &BTreeSet<BindAddress>) -> Vec<AttachProblem> {
        let mut wanted = wanted(interfaces, bound);
        let mut at_xdp = wanted.clone();
        if self.has_flows {
            let demanded = self.paths.wanted();
            let missing = |interface: &&Interface| {
                demanded.contains(&interface.index) && !wanted.iter().any(|one| one.index == interface.index)
            };
            wanted.extend(interfaces.iter().filter(missing).collect::<Vec<_>>());
            if !wanted.is_empty() {
                let known: BTreeSet<u32> = wanted.iter().map(|interface| interface.index).collect();
                wanted.extend(arrivals(interfaces).filter(|interface| !known.contains(&interface.index)));
            }
        }
        if self.xdp.sends_on() {
            at_xdp.clone_from(&wanted);
        }
        let at_xdp = self.xdp.update(&mut self.ebpf, &at_xdp, interfaces);
        // Before programs hang there: until then they take from an interface only what is expected by it.
        self.paths.set_links(interfaces);
        let mut problems = self.attachments.update(&mut self.ebpf, &wanted);
        // What could not be replaced may use what a former agent has pinned. Where there is no program for, none of his hangs.
        if problems.iter().all(|problem| matches!(problem, AttachProblem::Unsupported { .. })) {
            self.pins.forget_foreign();
            self.paths.set_sole();
        }
        let arrivals = arrivals(interfaces).map(|interface| interface.index);
        self.paths.set_attached(self.attachments.indices(), arrivals);
        problems.extend(at_xdp);
        self.maps.retry_clients();
        problems.extend(self.maps.set_local_addresses(interfaces).into_iter().map(AttachProblem::from));
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
        self.maps.verdicts()
    }

    /// What passes on the programs' log records, to be spawned on a runtime: they go to the crate `log`, at level trace. It ends
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
}

impl ListenerMaps for Bpf {
    fn attach(&mut self, interfaces: &[Interface], bound: &BTreeSet<BindAddress>) -> Vec<AttachProblem> {
        Bpf::attach(self, interfaces, bound)
    }

    fn attachments(&self) -> Vec<Attachment> {
        Bpf::attachments(self)
    }

    fn restored(&self) -> u64 {
        self.attachments.restored()
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
        self.maps.set_listener(key, id, state)
    }

    fn set_clients(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        clients: &Arc<AllowedAddresses>,
        client_rate: u32,
    ) -> Result<(), DatapathError> {
        self.maps.set_clients(key, id, clients, client_rate)
    }

    fn are_clients_checked(&self, id: ListenerId) -> bool {
        self.maps.are_clients_checked(id)
    }

    fn set_backends(&mut self, id: ListenerId, backends: Vec<BackendEntry>) -> Result<(), DatapathError> {
        self.maps.set_backends(id, backends)
    }

    fn set_targets(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        targets: [u64; 2],
    ) -> Result<(), DatapathError> {
        self.maps.set_targets(key, id, targets)
    }

    fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError> {
        self.maps.remove_listener(key, id)
    }

    fn remove_former_listeners(&mut self) -> Result<(), DatapathError> {
        self.maps.remove_former_listeners()
    }

    fn leave(&mut self) {
        Bpf::leave(self);
    }

    fn counters(&self, id: ListenerId) -> Result<ListenerCounters, DatapathError> {
        self.maps.counters(id)
    }
}

/// The queue of free slots, open once more.
fn queue(map: &MapData) -> Result<Queue<MapData, u32>, DatapathError> {
    let open = || Queue::try_from(Map::Queue(MapData::from_fd(map.fd().as_fd().try_clone_to_owned()?)?));
    open().map_err(|source: MapError| DatapathError {
        operation: "open",
        map: DIRECT_FREE,
        entry: None,
        source: Box::new(source),
    })
}

/// How the object is loaded.
struct LoadSettings<'a> {
    log_level: u8,
    /// Where maps are pinned, and taken from if they are there.
    pin_dir: Option<&'a Path>,
    /// Whether there are programs at egress too.
    has_flows: bool,
    most_pairs: u32,
    most_direct: u32,
    /// Whether a program at XDP may send packets on.
    sends_at_xdp: bool,
}

impl LoadSettings<'_> {
    /// To see what the kernel takes: nothing is pinned.
    const PROBE: Self = Self {
        log_level: LOG_OFF,
        pin_dir: None,
        has_flows: false,
        most_pairs: PAIRS_CAPACITY,
        most_direct: 0,
        sends_at_xdp: false,
    };
}

/// Before 5.11 maps count as locked memory. Where raising the limit fails, so may creating the maps, with a reason.
pub(super) fn raise_memory_limit() {
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
}

/// Creates the maps and loads the programs.
fn load(settings: &LoadSettings<'_>) -> Result<Ebpf, LoadError> {
    // The whole log costs seconds, and may be longer than the kernel takes: only where it is needed. aya asks for it after any failure, also after an
    // interruption.
    match load_telling(settings, VerifierLogLevel::STATS) {
        Err(LoadError::Verifier { .. }) => load_telling(settings, VerifierLogLevel::default()),
        loaded => loaded,
    }
}

/// The same, with so much in the verifier's log if it refuses a program.
fn load_telling(settings: &LoadSettings<'_>, log: VerifierLogLevel) -> Result<Ebpf, LoadError> {
    if OBJECT.is_empty() {
        return Err(LoadError::NoPrograms);
    }
    raise_memory_limit();
    let (is_direct_on, most_direct) = (u8::from(settings.most_direct > 0), settings.most_direct.max(1));
    let at_xdp = |capacity| if settings.sends_at_xdp { capacity } else { 1 };
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(log)
        .override_global(aya_log::LEVEL, &settings.log_level, true)
        .override_global(DIRECT_ON, &is_direct_on, true)
        .map_max_entries(DIRECT, most_direct.saturating_mul(2))
        .map_max_entries(DIRECT_SLOTS, most_direct)
        .map_max_entries(DIRECT_STATES, most_direct)
        .map_max_entries(DIRECT_FREE, most_direct)
        .map_max_entries(DIRECT_TARGETS, if settings.most_direct == 0 { 1 } else { DIRECT_TARGETS_CAPACITY })
        .map_max_entries(XDP_INTERFACES, at_xdp(XDP_INTERFACES_CAPACITY))
        .map_max_entries(XDP_TARGETS, at_xdp(XDP_TARGETS_CAPACITY))
        .map_max_entries(XDP_NEIGHBOURS, at_xdp(1 << XDP_NEIGHBOURS_BITS))
        .map_max_entries(PAIRS, settings.most_pairs)
        .map_max_entries(FLOWS, settings.most_pairs.saturating_mul(2));
    if let Some(pin_dir) = settings.pin_dir {
        for PinnedMap { name, .. } in PINNED_MAPS {
            loader.map_pin_path(name, map_path(pin_dir, name));
        }
    }
    let mut ebpf =
        loader.load(OBJECT).map_err(|error| LoadError::new("create the BPF maps".to_owned(), "", error))?;
    let egress = [PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP];
    let egress = egress.into_iter().filter(|_| settings.has_flows);
    for name in
        [PROGRAM_ETHERNET, PROGRAM_IP, PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER].into_iter().chain(egress)
    {
        load_program(&mut ebpf, name)?;
    }
    Ok(ebpf)
}

/// Has the kernel verify a program.
fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| LoadError::Object { reason: format!("they have no program {name}") })?;
    <&mut SchedClassifier>::try_from(program)
        .and_then(|program| uninterrupted(|| program.load()))
        .map_err(|error| LoadError::new(format!("load program {name}"), name, EbpfError::from(error)))
}

#[cfg(test)]
mod tests;
