//! The kernel's maps and programs, through aya.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::{Map, MapData, Queue};
use aya_log::EbpfLogger;
use forwarder_common::direct::DIRECT_FREE;
use forwarder_common::flow::PAIRS_CAPACITY;
use forwarder_common::layout::LOOSE_INTERFACES;
use forwarder_common::{ListenerCounters, Verdict};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

mod loading;

pub(crate) use self::loading::raise_memory_limit;
pub use crate::load_error::LoadError;
pub use crate::programs::attach::{AttachKind, AttachProblem, Attachment};

use self::loading::{LOG_OFF, LOG_TRACE, LoadSettings, OBJECT, load};
use crate::flows::arrival::LooseInterfaces;
use crate::flows::paths::Paths;
use crate::flows::{FlowTable, FlowTableError};
use crate::listener_maps::ListenerMaps;
use crate::load_error::kernel_release;
use crate::maps::listeners::{self, Maps};
use crate::maps::updates::Updates;
use crate::maps::{BackendEntry, DatapathError, ListenerId, ListenerState, MapError};
use crate::net::interfaces::{Interface, arrivals, wanted};
use crate::net::routes::Routes;
use crate::programs::attach::{Attachments, Stay};
use crate::programs::pins::Pins;
use crate::programs::xdp::XdpHooks;
use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{BindAddress, ListenerKey, Xdp};

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
    /// How many SYNs to listeners each CPU leaves to sockets in a second; programs answer further ones with SYN cookies. 0 where they leave all.
    pub syn_cookies_above: u32,
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
            syn_cookies_above: options.syn_cookies_above,
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

#[cfg(test)]
mod tests;
