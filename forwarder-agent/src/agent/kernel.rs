//! The kernel's part of an agent: what is loaded, and what a former agent has left there.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::settings::Settings;
use crate::state::AgentState;
use crate::view;
use forwarder_dataplane::offload::tc::{
    FindListener, ListenerLookup, OffloadTrigger, Offloader, PairSettings, Pairs,
};
use forwarder_dataplane::reconciler::SocketState;
use forwarder_dataplane::worker::drain::SWEEP_PERIOD;
use forwarder_gateway::model::{BindAddress, Datapath as DatapathChoice, ListenerKey};
use forwarder_kernel::bpf::{Bpf, BpfOptions};
use forwarder_kernel::flows::{FlowTable, FlowTableError};
use forwarder_kernel::listener_maps::ListenerMaps;
use forwarder_kernel::maps::grace::Grace;
use forwarder_kernel::net::interfaces::{self, Interface, InterfacesError};
use forwarder_kernel::net::routes;
use forwarder_kernel::probe::kernel_obstacle;
use forwarder_kernel::tcp::segments::SegmentSocket;
use forwarder_runtime::failpoint;
use forwarder_runtime::lock::lock;

/// The kernel's part, where it can be had.
pub(super) struct Kernel {
    pub(super) datapath: Option<Box<dyn ListenerMaps>>,
    pub(super) routes: Option<watch::Receiver<u64>>,
    pub(super) offloader: Option<Arc<Offloader>>,
    pub(super) view: view::DatapathView,
}

impl Kernel {
    /// Loads the programs; without them, or where the interfaces are not known, the agent says why, once, and forwards all the same.
    pub(super) fn load(settings: &Settings, interfaces: Result<(), &InterfacesError>) -> Self {
        let is_wanted = match settings.listener_defaults.datapath {
            DatapathChoice::Auto | DatapathChoice::Tc | DatapathChoice::Direct => true,
            DatapathChoice::Sockmap | DatapathChoice::Splice | DatapathChoice::Copy => false,
        };
        let mut tc_error = kernel_obstacle().filter(|_| is_wanted).map(str::to_owned);
        let options = BpfOptions {
            most_pairs: (is_wanted && tc_error.is_none()).then_some(settings.max_pairs),
            most_direct: settings.max_direct,
            xdp: settings.xdp,
            syn_cookies_above: settings.syn_cookies_above,
            pin_dir: settings.pin_dir.clone(),
            trace: tracing::enabled!(target: "forwarder_kernel::programs", tracing::Level::TRACE),
        };
        if let Err(error) = interfaces {
            return Self::without(error);
        }
        let mut bpf = match Bpf::load(&options) {
            Ok(bpf) => bpf,
            Err(error) => return Self::without(&error),
        };
        match bpf.take_log() {
            Ok(Some(log)) if options.trace => drop(tokio::spawn(log)),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot read the log of the eBPF programs: their trace lines are missing; traffic is not affected");
            }
        }
        tracing::info!(pins = %bpf.pin_dir().display(), attach = bpf.attach_kind().as_str(), "eBPF programs loaded");
        let direct_error = bpf.direct_error().map(str::to_owned);
        if let Some(reason) = &direct_error {
            tracing::warn!(reason, "tier direct does not work: connections are accepted");
        }
        let xdp_error = bpf.xdp_error().map(str::to_owned);
        if let Some(reason) = &xdp_error {
            tracing::warn!(reason, "there is less at XDP than --xdp asks for: TC does the rest");
        }
        let offloader = bpf.flows().and_then(|flows| match make_offloader(flows, settings) {
            Ok(made) => Some(Arc::new(made)),
            Err(error) => {
                tc_error = Some(error.to_string());
                None
            }
        });
        if let Some(reason) = &tc_error {
            tracing::warn!(
                reason,
                "tier tc does not work: connections are forwarded in userspace, at tier splice"
            );
        }
        let routes = if offloader.is_some() { follow_routes() } else { None };
        Self {
            offloader,
            routes,
            datapath: Some(Box::new(bpf)),
            view: view::DatapathView {
                programs: true,
                tc_error,
                direct_error,
                xdp_error,
                ..view::DatapathView::default()
            },
        }
    }

    fn without(error: &dyn std::error::Error) -> Self {
        let error = error.to_string();
        tracing::warn!(reason = %error, "no eBPF programs: every connection is forwarded in userspace; the kernel's counters and maps are missing");
        Self {
            offloader: None,
            routes: None,
            datapath: None,
            view: view::DatapathView {
                error: Some(error.clone()),
                tc_error: Some(error),
                ..view::DatapathView::default()
            },
        }
    }
}

/// Follows the node's interfaces.
///
/// # Errors
/// The kernel does not list them.
pub(super) async fn follow_interfaces() -> Result<watch::Receiver<Vec<Interface>>, InterfacesError> {
    let (interfaces, follow) = interfaces::watch().await?;
    tokio::spawn(async move {
        if let Err(error) = follow.await {
            tracing::error!(%error, "cannot follow the node's interfaces any longer: new ones get no programs, and their connections are forwarded in userspace; restart the agent");
        }
    });
    Ok(interfaces)
}

/// What takes connections into the kernel.
fn make_offloader(
    flows: Result<FlowTable, FlowTableError>,
    settings: &Settings,
) -> anyhow::Result<Offloader> {
    let flows = Arc::new(flows?);
    flows.paths().set_egress(settings.egress);
    if u32::try_from(flows.room()) != Ok(settings.max_pairs) {
        tracing::warn!(
            max_pairs = settings.max_pairs,
            room = flows.room(),
            "a former agent's maps have room for another number of connections than --max-pairs: it stays until they are removed, by SIGINT or `forwarder cleanup`"
        );
    }
    let pair_settings = PairSettings {
        keepalive: settings.keepalive,
        idle_timeout: settings.listener_defaults.idle_timeout,
        half_closed_timeout: settings.listener_defaults.half_closed_timeout,
        removal_window: settings.listener_defaults.removal_window(),
        hold: settings.hold,
        slot: settings.workers,
    };
    let pairs = Pairs::new(Arc::clone(&flows), SegmentSocket::open()?, pair_settings);
    Ok(Offloader { flows, grace: Grace::start()?, pairs: Arc::new(pairs) })
}

/// When connections are taken into the kernel, in sweeps of their workers.
pub(super) fn offload_after(settings: &Settings) -> OffloadTrigger {
    let sweeps =
        |age: Duration| u32::try_from(age.as_millis().div_ceil(SWEEP_PERIOD.as_millis())).unwrap_or(u32::MAX);
    OffloadTrigger { bytes: settings.offload_after.bytes, sweeps: settings.offload_after.age.map(sweeps) }
}

/// A number that rises whenever routes change.
fn follow_routes() -> Option<watch::Receiver<u64>> {
    match routes::watch() {
        Ok((changes, follow)) => {
            tokio::spawn(async move {
                if let Err(error) = follow.await {
                    tracing::error!(%error, "cannot follow the node's routes any longer: offloaded connections do not follow changes of routes; restart the agent");
                }
            });
            Some(changes)
        }
        Err(error) => {
            tracing::warn!(%error, "cannot follow the node's routes: offloaded connections do not follow changes of routes");
            None
        }
    }
}

/// Takes over what a former agent has left in the kernel.
pub(super) fn inherit(offloader: &Offloader, shared: &AgentState, slot: usize) {
    failpoint::block("adopt.begin");
    let (mut adopted, mut reset) = (0_u64, Vec::new());
    let inherited = offloader.flows.inherit(|pair| {
        if pair.is_offloaded {
            offloader.pairs.adopt(pair);
            adopted += 1;
        } else {
            reset.push(pair.key);
        }
    });
    let remnants = match inherited {
        Ok(remnants) => remnants,
        Err(error) => {
            tracing::error!(%error, "cannot take over the connections that a former agent offloaded: the kernel forwards them, but they are neither counted nor timed out");
            return;
        }
    };
    failpoint::block("adopt.inherited");
    // What its agent had read and not passed on died with it: a gap that nobody can fill.
    for pair in &reset {
        offloader.pairs.reset(pair);
    }
    failpoint::block("adopt.taken_over");
    if adopted > 0 || reset.len() + remnants > 0 {
        tracing::info!(adopted, reset = reset.len(), remnants, "took over a former agent's connections");
    }
    shared.worker_counters.of(slot).inherited.add(adopted);
}

/// Finds the listener that has an address: the one on just this address, else one on every address. Where no listener is in
/// force at all, the manifests have not been read, or could not be.
pub(super) fn find_listener(shared: &Arc<AgentState>) -> FindListener {
    let in_force = Arc::clone(&shared.in_force);
    Box::new(move |address| {
        let in_force = lock(&in_force);
        let Some(port) = std::num::NonZeroU16::new(address.port()) else { return ListenerLookup::Gone };
        let keys =
            [BindAddress::Ip(address.ip()), BindAddress::Any].map(|address| ListenerKey { address, port });
        let bound = keys.iter().find_map(|key| match in_force.sockets.get(key) {
            Some(SocketState::Bound(bound)) => Some(Arc::clone(bound)),
            Some(SocketState::Failed(_)) | None => None,
        });
        let listeners = &in_force.table.listeners;
        match bound {
            Some(bound) => ListenerLookup::Bound(bound),
            None if listeners.is_empty() || keys.iter().any(|key| listeners.contains_key(key)) => {
                ListenerLookup::Awaited
            }
            None => ListenerLookup::Gone,
        }
    })
}
