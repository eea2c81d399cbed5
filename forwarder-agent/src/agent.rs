//! The agent: wires source, resolver, reconciler, workers, datapath and admin endpoint, and ends them in order.

mod control;
mod direct;
mod input;
mod kernel;
mod shutdown;
mod sockmap;

use std::sync::{Arc, Mutex};

use forwarder_common::sockmap::STREAMS_CAPACITY;
use tokio::signal::unix::{SignalKind, signal};

use self::control::Control;
use self::direct::DirectListeners;
use self::kernel::{Kernel, find_listener, inherit, offload_after};
use self::shutdown::{Shutdown, Signals};
use self::sockmap::SockmapTier;
use crate::admin;
use crate::report::Report;
use crate::settings::Settings;
use crate::state::{AdminHealth, AgentState};
use forwarder_dataplane::descriptors::Descriptors;
use forwarder_dataplane::listener::ListenSettings;
use forwarder_dataplane::live::LiveConnections;
use forwarder_dataplane::offload::sockmap::SockmapSettings;
use forwarder_dataplane::offload::tier_toggles::TierToggles;
use forwarder_dataplane::reconciler::{InForce, Reconciler};
use forwarder_dataplane::upstream::segment_size::SegmentSize;
use forwarder_dataplane::upstream::{ConnectSettings, LocalPorts};
use forwarder_dataplane::worker::Workers;
use forwarder_dataplane::worker_context::WorkerSettings;
use forwarder_kernel::net::interfaces::smallest_mtu;
use forwarder_kube::watch::ConnectError;
use forwarder_runtime::panics;

/// An agent that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No event loop, thread or signal handler could be made.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// The Kubernetes API is the source, and nothing says where it is.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It has ended by itself, and in order.
    #[error("BUG: the configuration source has stopped; please report it with the log")]
    SourceStopped,
}

/// Runs an agent until SIGTERM or SIGINT, and drains it then.
///
/// # Errors
/// It cannot start, or has ended by a bug.
pub fn run(settings: Settings) -> Result<(), AgentError> {
    panics::end_the_process();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(run_until_signalled(settings));
    // A read that hangs, on a dead network mount say, must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn run_until_signalled(settings: Settings) -> Result<(), AgentError> {
    let mut signals = Signals::listen()?;
    let hangup = signal(SignalKind::hangup())?;
    let input = input::open(&settings).await?;
    tokio::spawn(shutdown::read_at_hangup(hangup, input.again));
    let interfaces = kernel::follow_interfaces().await;
    let kernel = Kernel::load(&settings, interfaces.as_ref().map(drop));
    let interfaces = interfaces.ok();
    let segment_size = Arc::new(SegmentSize::default());
    if let (Some(interfaces), Some(_)) = (&interfaces, &kernel.offloader) {
        segment_size.set_mtu(smallest_mtu(&interfaces.borrow()));
    }
    let sockmap = Arc::new(SockmapTier::new(SockmapSettings {
        unsafe_kernel: settings.sockmap_unsafe_kernel,
        memory: settings.sockmap_memory,
        pairs: settings.max_pairs.min(STREAMS_CAPACITY / 2),
        slot: settings.workers + 1,
        patience: settings.keepalive.map(forwarder_dataplane::upstream::patience),
    }));
    let has_direct = kernel.offloader.as_ref().is_some_and(|offloader| offloader.flows.room_for_direct() > 0);
    let ports = Arc::new(LocalPorts::new(settings.source_ports, has_direct));
    if kernel.offloader.is_some() {
        ports.warn_if_shared();
    }
    let toggles = Arc::<TierToggles>::default();
    let descriptors = Arc::new(Descriptors::raise());
    let limit = descriptors.limit();
    let worker_settings = WorkerSettings {
        connect: ConnectSettings {
            source_addresses: settings.source_addresses.clone(),
            keepalive: settings.keepalive,
            flows: kernel.offloader.as_ref().map(|offloader| Arc::clone(&offloader.flows)),
            segment_size: Arc::clone(&segment_size),
            ports,
            descriptors: Arc::clone(&descriptors),
        },
        offloader: kernel.offloader.clone(),
        sockmap: Arc::clone(&sockmap.cell),
        toggles: Arc::clone(&toggles),
        offload_after: offload_after(&settings),
    };
    let direct = kernel.offloader.as_ref().and_then(|offloader| {
        let opened = DirectListeners::open(offloader, &settings.pin_dir, worker_settings.connect.clone());
        opened.unwrap_or_else(|error| {
            tracing::warn!(%error, "tier direct does not work: connections are accepted");
            None
        })
    });
    let workers = Workers::start(settings.workers, worker_settings)?;
    let shared = Arc::new(AgentState {
        in_force: Arc::new(Mutex::new(InForce::new(kernel.datapath))),
        report: Mutex::new(Report { datapath: kernel.view, ..Report::default() }),
        worker_counters: Arc::clone(&workers.counters),
        connections: LiveConnections {
            workers: workers.connections(),
            pairs: kernel.offloader.as_ref().map(|offloader| Arc::clone(&offloader.pairs)),
            sockmap: Arc::clone(&sockmap.cell),
        },
        toggles,
        cluster: input.health,
        has_direct: direct.is_some(),
        admin: AdminHealth::new(&settings.admin),
    });
    let pairs_thread = match &kernel.offloader {
        Some(offloader) => {
            inherit(offloader, &shared, settings.workers);
            Some(offloader.pairs.start(find_listener(&shared))?)
        }
        None => None,
    };
    let listen = ListenSettings {
        keepalive: settings.keepalive,
        segment_size: Arc::clone(&segment_size),
        port_wait: settings.port_wait,
        descriptors,
    };
    let reconciler = Reconciler::new(workers, listen, Arc::clone(&shared.in_force));
    let admin = admin::start(&settings.admin, limit, &shared);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = settings.workers,
        admin = settings.admin.address.map(tracing::field::display),
        admin_socket = settings.admin.socket.as_ref().map(|path| tracing::field::display(path.display())),
        "agent started"
    );
    let mut control = Control {
        reconciler,
        shared: Arc::clone(&shared),
        resolver: input.resolver,
        outcome: input.outcome,
        in_force: None,
        offloader: kernel.offloader.clone(),
        sockmap: Arc::clone(&sockmap),
        direct,
        segment_size,
    };
    let signal = tokio::select! {
        () = control.follow(input.loaded, interfaces, kernel.routes) => None,
        signal = signals.next() => Some(signal),
    };
    // Another agent is to write the statuses: the Lease is given back at once.
    drop(control.outcome.take());
    let shutdown = Shutdown {
        signal: signal.unwrap_or(SignalKind::terminate()),
        daemon_set: input.daemon_set,
        offloader: kernel.offloader,
        sockmap,
        window: settings.drain_timeout,
    };
    shutdown.end(&mut signals, control.reconciler, &shared).await;
    if let (Some(pairs), Some(thread)) = (&shared.connections.pairs, pairs_thread) {
        pairs.stop();
        thread.thread().unpark();
        let _ = thread.join();
    }
    admin.close().await;
    signal.map(drop).ok_or(AgentError::SourceStopped)
}
