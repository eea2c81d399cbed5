//! The agent: wires source, resolver, reconciler, workers, datapath and admin endpoint, and ends them in order.

mod control;
mod input;
mod kernel;
mod leaving;
mod sockmap;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use forwarder_common::sockmap::STREAMS_CAPACITY;
use tokio::signal::unix::{SignalKind, signal};

use self::control::Control;
use self::kernel::{Kernel, find_listener, inherit, promote_after};
use self::leaving::{Leaving, Signals};
use self::sockmap::SockmapTier;
use crate::admin::{self, AdminHealth};
use crate::allowed::{AllowedAddresses, AllowedPorts};
use crate::counters::{ListenerCounters, PerWorker, WorkerCounters};
use crate::datapath::interfaces::smallest_mtu;
use crate::descriptors::Descriptors;
use crate::listener::ListenSettings;
use crate::live::LiveConnections;
use crate::manifests::NamespacedName;
use crate::plan::Op;
use crate::problem::Severity;
use crate::reconciler::{InForce, Reconciler, SocketState};
use crate::relay::Tier;
use crate::report::{InputProblems, Report};
use crate::resolve::{self, OwnSockets, ResolveSettings, Resolved};
use crate::segment_size::SegmentSize;
use crate::settings::{Settings, SourceSettings};
use crate::sockmap::{SockmapPairs, SockmapSettings};
use crate::source::Loaded;
use crate::source::kube::ConnectError;
use crate::switches::Switches;
use crate::upstream::ConnectSettings;
use crate::view::{self, DatapathTiers, TierState, TierView};
use crate::worker::{WorkerSettings, Workers};
use crate::{metrics, panics, reconciler};

pub use self::input::ClusterHealth;
pub use self::sockmap::SockmapCell;

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

/// What the admin endpoint reads.
pub struct Shared {
    /// Listeners, routes and endpoints in force.
    pub in_force: reconciler::Shared,
    /// What the input amounts to.
    pub report: Mutex<Report>,
    /// What workers counted.
    pub worker_counters: Arc<PerWorker<WorkerCounters>>,
    /// The connections that are open.
    pub connections: LiveConnections,
    /// Which of the kernel's tiers take connections.
    pub switches: Arc<Switches>,
    /// How it goes with the Kubernetes API, where that is the source.
    pub cluster: Option<ClusterHealth>,
    /// Which ways into the admin endpoint are open.
    pub admin: AdminHealth,
}

impl Shared {
    fn report(&self) -> MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn in_force(&self) -> MutexGuard<'_, InForce> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the agent is not ready; empty if it is: every listener that can be programmed is bound.
    pub fn unready(&self) -> Vec<String> {
        let report = self.report();
        if report.draining {
            return vec!["the agent is draining".to_owned()];
        }
        if report.updates.full == 0 {
            let what = if self.cluster.is_some() { "the Kubernetes API has" } else { "the manifests have" };
            return vec![format!("{what} not been read yet")];
        }
        drop(report);
        let serves_nothing = self.in_force().table.listeners.is_empty();
        // In a cluster, somebody else's mistake must not make every agent look broken.
        if serves_nothing && self.cluster.is_none() {
            let problems = self.report().input.list();
            if let Some(error) = problems.iter().find(|problem| problem.severity == Severity::Error) {
                return vec![format!("nothing is served: {error}")];
            }
        }
        let failures = self.in_force().bind_failures();
        failures.iter().map(|failure| format!("listener {}: {}", failure.listener, failure.message)).collect()
    }

    /// The tiers that take connections into the kernel.
    pub fn tiers(&self) -> DatapathTiers {
        let (tc_error, sockmap_error) = {
            let report = self.report();
            (report.datapath.error.clone(), report.datapath.sockmap_error.clone())
        };
        let (pairs, sockmap) = (&self.connections.pairs, self.connections.sockmap.get());
        let state = |tier, is_available: Option<bool>| match is_available {
            None => TierState::Unused,
            Some(false) => TierState::Unavailable,
            Some(true) if self.switches.is_on(tier) => TierState::On,
            Some(true) => TierState::Off,
        };
        let has_tc = pairs.is_some().then_some(true).or(tc_error.is_some().then_some(false));
        DatapathTiers {
            tiers: vec![
                TierView {
                    tier: Tier::Tc,
                    state: state(Tier::Tc, has_tc),
                    connections: pairs.as_ref().map_or(0, |pairs| pairs.count()),
                    reason: tc_error,
                },
                TierView {
                    tier: Tier::Sockmap,
                    state: state(Tier::Sockmap, sockmap.map(Result::is_ok)),
                    connections: self.connections.sockmap().map_or(0, SockmapPairs::count),
                    reason: sockmap_error,
                },
            ],
        }
    }

    /// The state, for people and programs.
    pub fn state(&self) -> view::State {
        let in_force = self.in_force();
        let failures = in_force.bind_failures();
        let listeners = in_force.table.listeners.iter().map(|(key, listener)| {
            let mut row = view::listener(*key, listener, &in_force.table);
            match in_force.sockets.get(key) {
                Some(SocketState::Bound(bound)) => {
                    let sum = |field: fn(&ListenerCounters) -> u64| Some(bound.counters.sum(field));
                    row.id = Some(bound.id.0);
                    row.bound = Some(true);
                    row.connections = sum(|own| own.accepted.get());
                    row.active = Some(metrics::active_connections(&bound.counters));
                    row.received_bytes =
                        sum(|own| own.received_bytes.iter().map(crate::counters::Counter::get).sum());
                    row.sent_bytes =
                        sum(|own| own.sent_bytes.iter().map(crate::counters::Counter::get).sum());
                }
                Some(SocketState::Failed(_)) | None => row.bound = Some(false),
            }
            row.error =
                failures.iter().find(|failure| failure.key == *key).map(|failure| failure.message.clone());
            row
        });
        let listeners = listeners.collect();
        drop(in_force);
        let report = self.report();
        view::State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listeners,
            problems: report.problems().iter().map(Into::into).collect(),
            datapath: Some(report.datapath.clone()),
            statuses: view::statuses(&report.statuses),
        }
    }
}

/// Resolves what a source has loaded.
#[derive(Clone, Debug)]
pub struct Resolver(ResolveSettings);

/// What a source has loaded, resolved.
#[derive(Debug)]
pub struct Resolution {
    /// The result.
    pub resolved: Resolved,
    /// What is wrong.
    pub problems: InputProblems,
}

impl Resolver {
    /// A resolver without an agent.
    pub fn new(settings: ResolveSettings) -> Self {
        Self(settings)
    }

    /// A resolver for what the agent follows.
    fn of_agent(settings: &Settings) -> Self {
        let (defaults, cidrs) = (settings.listener_defaults.clone(), settings.endpoint_cidrs.clone());
        let (base, endpoint_addresses) = match settings.source {
            SourceSettings::Files { .. } => {
                (ResolveSettings::for_files(defaults), AllowedAddresses::for_files(cidrs))
            }
            SourceSettings::Kube(_) => {
                (ResolveSettings::for_cluster(defaults), AllowedAddresses::for_cluster(cidrs))
            }
        };
        Self(ResolveSettings {
            controller_name: settings.controller_name.clone(),
            listener_ports: AllowedPorts::new(settings.listener_ports.clone()),
            endpoint_addresses,
            own: OwnSockets { admin: settings.admin.address, ..OwnSockets::default() },
            ..base
        })
    }

    /// Sets by which addresses the node is reached; tells whether they are others than before.
    fn set_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let before = std::mem::replace(&mut self.0.own.addresses, addresses);
        before != self.0.own.addresses
    }

    /// Brings what was resolved up to date with what was loaded, which differs in the EndpointSlices of `services` alone.
    fn update_endpoints(
        &self,
        resolved: &mut Resolved,
        loaded: &Loaded,
        services: &BTreeSet<NamespacedName>,
    ) -> Vec<Op> {
        resolve::update_endpoints(resolved, &loaded.manifests, &self.0, services)
    }

    /// Resolves.
    pub fn resolve(&self, loaded: &Loaded) -> Resolution {
        let resolved = resolve::resolve(&loaded.manifests, &self.0);
        Resolution { problems: InputProblems::new(loaded, resolved.problems.clone()), resolved }
    }
}

impl Resolution {
    /// The state that an agent would have, without anything live.
    pub fn state(&self) -> view::State {
        let table = &self.resolved.table;
        view::State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listeners: table
                .listeners
                .iter()
                .map(|(key, listener)| view::listener(*key, listener, table))
                .collect(),
            problems: self.problems.list().iter().map(Into::into).collect(),
            datapath: None,
            statuses: view::statuses(&self.resolved.statuses),
        }
    }
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
    tokio::spawn(leaving::read_at_hangup(hangup, input.again));
    let interfaces = kernel::follow_interfaces().await;
    let kernel = Kernel::load(&settings, interfaces.as_ref().map(drop));
    let interfaces = interfaces.ok();
    let segment_size = Arc::new(SegmentSize::default());
    if let (Some(interfaces), Some(_)) = (&interfaces, &kernel.promoter) {
        segment_size.set_mtu(smallest_mtu(&interfaces.borrow()));
    }
    let sockmap = Arc::new(SockmapTier::new(SockmapSettings {
        unsafe_kernel: settings.sockmap_unsafe_kernel,
        memory: settings.sockmap_memory,
        pairs: settings.max_pairs.min(STREAMS_CAPACITY / 2),
        slot: settings.workers + 1,
        patience: settings.keepalive.map(crate::upstream::patience),
    }));
    let switches = Arc::<Switches>::default();
    let descriptors = Arc::new(Descriptors::raise());
    let limit = descriptors.limit();
    let worker_settings = WorkerSettings {
        connect: ConnectSettings {
            source_addresses: settings.source_addresses.clone(),
            keepalive: settings.keepalive,
            flows: kernel.promoter.as_ref().map(|promoter| Arc::clone(&promoter.flows)),
            segment_size: Arc::clone(&segment_size),
            port_range: Arc::default(),
        },
        descriptors: Arc::clone(&descriptors),
        promoter: kernel.promoter.clone(),
        sockmap: Arc::clone(&sockmap.cell),
        switches: Arc::clone(&switches),
        promote_after: promote_after(&settings),
    };
    let workers = Workers::start(settings.workers, worker_settings)?;
    let shared = Arc::new(Shared {
        in_force: Arc::new(Mutex::new(InForce::new(kernel.datapath))),
        report: Mutex::new(Report { datapath: kernel.view, ..Report::default() }),
        worker_counters: Arc::clone(&workers.counters),
        connections: LiveConnections {
            workers: workers.connections(),
            pairs: kernel.promoter.as_ref().map(|promoter| Arc::clone(&promoter.pairs)),
            sockmap: Arc::clone(&sockmap.cell),
        },
        switches,
        cluster: input.health,
        admin: AdminHealth::new(&settings.admin),
    });
    let pairs_thread = match &kernel.promoter {
        Some(promoter) => {
            inherit(promoter, &shared, settings.workers);
            Some(promoter.pairs.start(find_listener(&shared))?)
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
        promoter: kernel.promoter.clone(),
        sockmap: Arc::clone(&sockmap),
        segment_size,
    };
    let signal = tokio::select! {
        () = control.follow(input.loaded, interfaces, kernel.routes) => None,
        signal = signals.next() => Some(signal),
    };
    // Another agent is to write the statuses: the Lease is given back at once.
    drop(control.outcome.take());
    let leaving = Leaving {
        signal: signal.unwrap_or(SignalKind::terminate()),
        daemon_set: input.daemon_set,
        promoter: kernel.promoter,
        sockmap,
        window: settings.drain_timeout,
    };
    leaving.end(&mut signals, control.reconciler, &shared).await;
    if let (Some(pairs), Some(thread)) = (&shared.connections.pairs, pairs_thread) {
        pairs.stop();
        thread.thread().unpark();
        let _ = thread.join();
    }
    admin.close().await;
    signal.map(drop).ok_or(AgentError::SourceStopped)
}
