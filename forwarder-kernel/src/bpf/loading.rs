//! How the kernel gets the object: what it is told before, and the programs that it has to verify.

use std::path::Path;

use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfError, EbpfLoader, VerifierLogLevel};
use forwarder_common::direct::{
    DIRECT, DIRECT_FREE, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS, DIRECT_TARGETS_CAPACITY,
};
use forwarder_common::flow::PAIRS_CAPACITY;
use forwarder_common::layout::{
    FLOWS, PAIRS, PINNED_MAPS, PinnedMap, XDP_INTERFACES, XDP_INTERFACES_CAPACITY, XDP_NEIGHBOURS,
    XDP_NEIGHBOURS_BITS, XDP_TARGETS, XDP_TARGETS_CAPACITY,
};
use forwarder_common::update::{PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP, PROGRAM_ETHERNET, PROGRAM_IP};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::load_error::LoadError;
use crate::maps::versions::map_path;
use crate::programs::uninterrupted;

/// The programs, as `cargo xtask build-ebpf` compiled them; empty if it did not.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/forwarder.bpf.o"));

/// What the programs ask whether there may be direct connections.
const DIRECT_ON: &str = "DIRECT_ON";
/// What they ask how far apart the SYNs are that a CPU leaves to sockets, in nanoseconds.
const SYN_INTERVAL: &str = "SYN_INTERVAL";
/// Where the records of the programs' logs go from; see `aya_log_common::Level`.
pub(super) const LOG_OFF: u8 = 0;
pub(super) const LOG_TRACE: u8 = aya_log::Level::Trace as u8;

/// How the object is loaded.
pub(super) struct LoadSettings<'a> {
    pub(super) log_level: u8,
    /// Where maps are pinned, and taken from if they are there.
    pub(super) pin_dir: Option<&'a Path>,
    /// Whether there are programs at egress too.
    pub(super) has_flows: bool,
    pub(super) most_pairs: u32,
    pub(super) most_direct: u32,
    /// Whether a program at XDP may send packets on.
    pub(super) sends_at_xdp: bool,
    /// As [`BpfOptions::syn_cookies_above`].
    pub(super) syn_cookies_above: u32,
}

impl LoadSettings<'_> {
    /// To see what the kernel takes: nothing is pinned.
    pub(super) const PROBE: Self = Self {
        log_level: LOG_OFF,
        pin_dir: None,
        has_flows: false,
        most_pairs: PAIRS_CAPACITY,
        most_direct: 0,
        sends_at_xdp: false,
        syn_cookies_above: 1,
    };
}

/// Before 5.11 maps count as locked memory. Where raising the limit fails, so may creating the maps, with a reason.
pub(crate) fn raise_memory_limit() {
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
}

/// Creates the maps and loads the programs.
pub(super) fn load(settings: &LoadSettings<'_>) -> Result<Ebpf, LoadError> {
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
    let syn_interval = 1_000_000_000_u64.checked_div(settings.syn_cookies_above.into()).unwrap_or_default();
    let at_xdp = |capacity| if settings.sends_at_xdp { capacity } else { 1 };
    let mut loader = EbpfLoader::new();
    loader
        .verifier_log_level(log)
        .override_global(aya_log::LEVEL, &settings.log_level, true)
        .override_global(DIRECT_ON, &is_direct_on, true)
        .override_global(SYN_INTERVAL, &syn_interval, true)
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
pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| LoadError::Object { reason: format!("they have no program {name}") })?;
    <&mut SchedClassifier>::try_from(program)
        .and_then(|program| uninterrupted(|| program.load()))
        .map_err(|error| LoadError::new(format!("load program {name}"), name, EbpfError::from(error)))
}
