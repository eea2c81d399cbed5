//! The kernel's part of an agent: what is loaded, and what a former agent has left there.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use super::Shared;
use crate::datapath::bpf::{Bpf, BpfOptions};
use crate::datapath::flows::{FlowTable, FlowTableError};
use crate::datapath::grace::Grace;
use crate::datapath::interfaces::{self, Interface, InterfacesError};
use crate::datapath::routes;
use crate::datapath::segments::SegmentSocket;
use crate::datapath::{Datapath, kernel_obstacle};
use crate::failpoint;
use crate::model::{BindAddress, Datapath as DatapathChoice, ListenerKey};
use crate::pairs::{FindListener, Found, PairSettings, Pairs, PromoteAfter, Promoter};
use crate::reconciler::SocketState;
use crate::settings::Settings;
use crate::view;
use crate::worker::SWEEP_PERIOD;

/// The kernel's part, where it can be had.
pub(super) struct Kernel {
    pub(super) datapath: Option<Box<dyn Datapath>>,
    pub(super) routes: Option<watch::Receiver<u64>>,
    pub(super) promoter: Option<Arc<Promoter>>,
    pub(super) view: view::DatapathView,
}

impl Kernel {
    /// Loads the classifier; without it, or where the interfaces are not known, the agent says why, once, and forwards all the same.
    pub(super) fn load(settings: &Settings, interfaces: Result<(), &InterfacesError>) -> Self {
        let is_wanted = match settings.listener_defaults.datapath {
            DatapathChoice::Auto | DatapathChoice::Tc => true,
            DatapathChoice::Sockmap | DatapathChoice::Splice | DatapathChoice::Copy => false,
        };
        let obstacle = kernel_obstacle().filter(|_| is_wanted);
        if let Some(reason) = obstacle {
            tracing::warn!(reason, "no connection is taken into the kernel: all stay at tier splice");
        }
        let options = BpfOptions {
            most_pairs: (is_wanted && obstacle.is_none()).then_some(settings.max_pairs),
            pin_dir: settings.pin_dir.clone(),
            trace: tracing::enabled!(target: "forwarder_agent::datapath", tracing::Level::TRACE),
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
            Err(error) => tracing::warn!(%error, "the classifier's log cannot be read"),
        }
        tracing::info!(pins = %bpf.pin_directory().display(), attach = bpf.attach_kind().as_str(), "classifier loaded");
        let promoter = bpf.flows().and_then(|flows| match make_promoter(flows, settings) {
            Ok(made) => Some(Arc::new(made)),
            Err(error) => {
                tracing::warn!(%error, "no connection is taken into the kernel: all stay at tier splice");
                None
            }
        });
        let routes = if promoter.is_some() { follow_routes() } else { None };
        Self {
            promoter,
            routes,
            datapath: Some(Box::new(bpf)),
            view: view::DatapathView {
                classifier: true,
                error: obstacle.map(str::to_owned),
                ..view::DatapathView::default()
            },
        }
    }

    fn without(error: &dyn std::error::Error) -> Self {
        let error = error.to_string();
        tracing::warn!(reason = %error, "no classifier: every connection is forwarded in userspace; the kernel's counters and maps are missing");
        Self {
            promoter: None,
            routes: None,
            datapath: None,
            view: view::DatapathView { error: Some(error), ..view::DatapathView::default() },
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
            tracing::error!(%error, "interfaces are no longer followed: the classifier stays where it is");
        }
    });
    Ok(interfaces)
}

/// What takes connections into the kernel.
fn make_promoter(flows: Result<FlowTable, FlowTableError>, settings: &Settings) -> anyhow::Result<Promoter> {
    let flows = Arc::new(flows?);
    flows.paths().set_egress(settings.egress);
    let pair_settings = PairSettings {
        keepalive: settings.keepalive,
        idle_timeout: settings.listener_defaults.idle_timeout,
        half_closed_timeout: settings.listener_defaults.half_closed_timeout,
        removal_window: settings.listener_defaults.removal_window(),
        hold: settings.hold,
        slot: settings.workers,
    };
    let pairs = Pairs::new(Arc::clone(&flows), SegmentSocket::open()?, pair_settings);
    Ok(Promoter { flows, grace: Grace::start()?, pairs: Arc::new(pairs) })
}

/// When connections are taken into the kernel, in sweeps of their workers.
pub(super) fn promote_after(settings: &Settings) -> PromoteAfter {
    let sweeps =
        |age: Duration| u32::try_from(age.as_millis().div_ceil(SWEEP_PERIOD.as_millis())).unwrap_or(u32::MAX);
    PromoteAfter { bytes: settings.promote_after.bytes, sweeps: settings.promote_after.age.map(sweeps) }
}

/// A number that rises whenever routes change.
fn follow_routes() -> Option<watch::Receiver<u64>> {
    match routes::watch() {
        Ok((changes, follow)) => {
            tokio::spawn(async move {
                if let Err(error) = follow.await {
                    tracing::error!(%error, "routes are no longer followed: connections in the kernel keep their ways");
                }
            });
            Some(changes)
        }
        Err(error) => {
            tracing::warn!(%error, "routes are not followed: connections in the kernel keep their ways");
            None
        }
    }
}

/// Takes over what a former agent has left in the kernel.
pub(super) fn inherit(promoter: &Promoter, shared: &Shared, slot: usize) {
    failpoint::block("adopt.begin");
    let inherited = match promoter.flows.inherit() {
        Ok(inherited) => inherited,
        Err(error) => {
            tracing::error!(%error, "what a former agent has left is not looked after");
            return;
        }
    };
    failpoint::block("adopt.inherited");
    let (mut adopted, mut reset) = (0_u64, 0_usize);
    for pair in inherited.pairs {
        if pair.is_spliced() {
            promoter.pairs.add(&pair, None);
            adopted += 1;
        } else {
            // What its agent had read and not passed on died with it: a gap that nobody can fill.
            promoter.pairs.reset(&pair);
            reset += 1;
        }
    }
    failpoint::block("adopt.taken_over");
    if adopted > 0 || reset + inherited.remnants > 0 {
        tracing::info!(
            adopted,
            reset,
            remnants = inherited.remnants,
            "took over a former agent's connections"
        );
    }
    shared.worker_counters.of(slot).inherited.add(adopted);
}

/// Finds the listener that has an address: the one on just this address, else one on every address. Where no listener is in
/// force at all, the manifests have not been read, or could not be.
pub(super) fn find_listener(shared: &Arc<Shared>) -> FindListener {
    let in_force = Arc::clone(&shared.in_force);
    Box::new(move |address| {
        let in_force = in_force.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(port) = std::num::NonZeroU16::new(address.port()) else { return Found::Gone };
        let keys =
            [BindAddress::Ip(address.ip()), BindAddress::Any].map(|address| ListenerKey { address, port });
        let bound = keys.iter().find_map(|key| match in_force.sockets.get(key) {
            Some(SocketState::Bound(bound)) => Some(Arc::clone(bound)),
            Some(SocketState::Failed(_)) | None => None,
        });
        let listeners = &in_force.table.listeners;
        match bound {
            Some(bound) => Found::Bound(bound),
            None if listeners.is_empty() || keys.iter().any(|key| listeners.contains_key(key)) => {
                Found::Awaited
            }
            None => Found::Gone,
        }
    })
}
