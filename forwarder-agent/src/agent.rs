//! The agent: wires source, resolver, reconciler, workers, datapath and admin endpoint, and ends them in order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{self, AdminError};
use crate::counters::{ListenerCounters, PerWorker, WorkerCounters};
use crate::datapath::bpf::{Bpf, BpfOptions};
use crate::model::{ListenerKey, ListenerSettings};
use crate::problem::{Problem, Reason};
use crate::reconciler::{InForce, Reconciler, SocketState};
use crate::resolve::{self, ResolveSettings, Resolved};
use crate::settings::Settings;
use crate::source::{self, FileSource, Loaded};
use crate::status::{self, Statuses};
use crate::upstream::ConnectSettings;
use crate::view;
use crate::worker::{WorkerSettings, Workers};
use crate::{metrics, reconciler};

/// How often listeners that could not be bound are tried again.
const BIND_RETRY: Duration = Duration::from_secs(1);
/// File descriptors that are not for connections: listeners, maps, pipes, the admin endpoint.
const RESERVED_FILES: u64 = 256;

/// An agent that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No event loop, thread or signal handler could be made.
    #[error("cannot start: {0}")]
    Start(#[from] std::io::Error),
    /// The admin endpoint could not be opened.
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// What the admin endpoint reads.
pub struct Shared {
    /// Listeners, routes and endpoints in force.
    pub in_force: reconciler::Shared,
    /// What the input amounts to.
    pub report: Mutex<Report>,
    /// What workers counted.
    pub worker_counters: Arc<PerWorker<WorkerCounters>>,
}

/// What the input amounts to.
#[derive(Debug, Default)]
pub struct Report {
    /// What is wrong, with its place.
    pub problems: Vec<Problem>,
    /// The statuses, bind failures included.
    pub statuses: Statuses,
    /// How often manifests were put into force.
    pub loads: u64,
    /// What the kernel does for the agent.
    pub datapath: view::DatapathView,
    /// The agent is ending.
    pub draining: bool,
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
        if report.loads == 0 {
            return vec!["the manifests have not been read yet".to_owned()];
        }
        drop(report);
        let failures = self.in_force().bind_failures();
        failures.iter().map(|failure| format!("listener {}: {}", failure.listener, failure.message)).collect()
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
            problems: report.problems.iter().map(Into::into).collect(),
            datapath: Some(report.datapath.clone()),
            statuses: view::statuses(&report.statuses),
        }
    }
}

/// Resolves what a source has loaded.
#[derive(Clone, Debug)]
pub struct Resolver(ResolveSettings);

/// What a source has loaded, resolved; problems have their places and stand in order.
#[derive(Debug)]
pub struct Resolution(pub Resolved);

impl Resolver {
    /// A resolver for manifests from files.
    pub fn new(controller_name: String, listener_defaults: ListenerSettings) -> Self {
        Self(ResolveSettings { controller_name, ..ResolveSettings::for_files(listener_defaults) })
    }

    /// Resolves; the problems of the source come first.
    pub fn resolve(&self, loaded: &Loaded) -> Resolution {
        let mut resolved = resolve::resolve(&loaded.manifests, &self.0);
        for problem in &mut resolved.problems {
            loaded.locations.locate(problem);
        }
        let mut problems = loaded.problems.clone();
        problems.append(&mut resolved.problems);
        problems.sort_by(|a, b| (&a.location, a.severity, &a.field).cmp(&(&b.location, b.severity, &b.field)));
        resolved.problems = problems;
        Resolution(resolved)
    }
}

impl Resolution {
    /// The state that an agent would have, without anything live.
    pub fn state(&self) -> view::State {
        let table = &self.0.table;
        view::State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            listeners: table
                .listeners
                .iter()
                .map(|(key, listener)| view::listener(*key, listener, table))
                .collect(),
            problems: self.0.problems.iter().map(Into::into).collect(),
            datapath: None,
            statuses: view::statuses(&self.0.statuses),
        }
    }
}

/// How many connections fit into a number of file descriptors.
pub fn max_connections(files: u64) -> usize {
    usize::try_from(files.saturating_sub(RESERVED_FILES.min(files / 4)) / 2).unwrap_or(usize::MAX).max(1)
}

/// Runs an agent until SIGTERM or SIGINT, and drains it then.
///
/// # Errors
/// It cannot start.
pub fn run(settings: Settings) -> Result<(), AgentError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(run_until_signalled(settings))
}

async fn run_until_signalled(settings: Settings) -> Result<(), AgentError> {
    let mut signals = Signals { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? };
    let worker_settings = WorkerSettings {
        connect: ConnectSettings {
            source_addresses: settings.source_addresses.clone(),
            keepalive: settings.keepalive,
        },
        max_connections: max_connections(raise_file_limit()),
    };
    let workers = Workers::start(settings.workers, worker_settings)?;
    let (bpf, datapath) = load_datapath(&settings);
    let interfaces = bpf.then(crate::datapath::interfaces::watch);
    let shared = Arc::new(Shared {
        in_force: Arc::new(Mutex::new(InForce::new(datapath.0))),
        report: Mutex::new(Report { datapath: datapath.1, ..Report::default() }),
        worker_counters: Arc::clone(&workers.counters),
    });
    let reconciler = Reconciler::new(workers, settings.keepalive, Arc::clone(&shared.in_force));
    if let Some(address) = settings.admin {
        tokio::spawn(admin::open(address, Arc::clone(&shared)).await?);
    }
    let (updates, loaded) = watch::channel(Arc::default());
    tokio::spawn(source::watch(FileSource::new(&settings.manifests), updates));
    let resolver = Resolver::new(settings.controller_name, settings.listener_defaults);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        manifests = %settings.manifests.display(),
        workers = settings.workers,
        admin = settings.admin.map(tracing::field::display),
        "agent started"
    );
    tokio::select! {
        () = control(&reconciler, &shared, &resolver, loaded, interfaces) => {}
        () = signals.next() => {}
    }
    end(&mut signals, reconciler, &shared, settings.drain_timeout).await;
    Ok(())
}
