//! The agent: wires source, resolver, reconciler, workers, datapath and admin endpoint, and ends them in order.

mod input;
mod kernel;
mod leaving;
mod sockmap;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forwarder_common::sockmap::STREAMS_CAPACITY;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::SignalKind;
use tokio::sync::watch;

use self::input::OutcomeSender;
use self::kernel::{Kernel, find_listener, inherit, promote_after};
use self::leaving::{Leaving, Signals};
use self::sockmap::SockmapTier;
use crate::admin::{self, AdminError};
use crate::counters::{ListenerCounters, PerWorker, WorkerCounters};
use crate::datapath::interfaces::{Interface, smallest_mtu};
use crate::listener::ListenSettings;
use crate::live::LiveConnections;
use crate::manifests::Change;
use crate::model::ListenerSettings;
use crate::pairs::Promoter;
use crate::publish::Outcome;
use crate::reconciler::{InForce, Reconciler, SocketState};
use crate::relay::Tier;
use crate::report::{InputProblems, Report};
use crate::resolve::{self, ResolveSettings, Resolved};
use crate::segment_size::SegmentSize;
use crate::settings::Settings;
use crate::sockmap::{SockmapPairs, SockmapSettings};
use crate::source::Loaded;
use crate::source::kube::ConnectError;
use crate::status::nodes::NodeReport;
use crate::status::{self, BindFailure};
use crate::switches::Switches;
use crate::upstream::ConnectSettings;
use crate::view::{self, DatapathTiers, TierState, TierView};
use crate::worker::{WorkerSettings, Workers};
use crate::{metrics, reconciler};

pub use self::input::ClusterHealth;
pub use self::sockmap::SockmapCell;

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
    /// The Kubernetes API is the source, and nothing says where it is.
    #[error(transparent)]
    Connect(#[from] ConnectError),
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
    /// A resolver for manifests from files.
    pub fn for_files(controller_name: String, listener_defaults: ListenerSettings) -> Self {
        Self(ResolveSettings { controller_name, ..ResolveSettings::for_files(listener_defaults) })
    }

    /// A resolver for the objects of a Kubernetes API.
    pub fn for_cluster(controller_name: String, listener_defaults: ListenerSettings) -> Self {
        Self(ResolveSettings { controller_name, ..ResolveSettings::for_cluster(listener_defaults) })
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
    let ended = runtime.block_on(run_until_signalled(settings));
    // A read that hangs, on a dead network mount say, must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn run_until_signalled(settings: Settings) -> Result<(), AgentError> {
    let mut signals = Signals::listen()?;
    let input = input::open(&settings).await?;
    let kernel = Kernel::load(&settings).await;
    let segment_size = Arc::new(SegmentSize::default());
    if let (Some(interfaces), Some(_)) = (&kernel.interfaces, &kernel.promoter) {
        segment_size.set_mtu(smallest_mtu(&interfaces.borrow()));
    }
    let sockmap = Arc::new(SockmapTier::new(SockmapSettings {
        memory: settings.sockmap_memory,
        pairs: settings.max_pairs.min(STREAMS_CAPACITY / 2),
        slot: settings.workers + 1,
    }));
    let switches = Arc::<Switches>::default();
    let worker_settings = WorkerSettings {
        connect: ConnectSettings {
            source_addresses: settings.source_addresses.clone(),
            keepalive: settings.keepalive,
            flows: kernel.promoter.as_ref().map(|promoter| Arc::clone(&promoter.flows)),
            segment_size: Arc::clone(&segment_size),
            port_range: Arc::default(),
        },
        max_connections: max_connections(raise_file_limit()),
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
    });
    let pairs_thread = match &kernel.promoter {
        Some(promoter) => {
            inherit(promoter, &shared, settings.workers);
            Some(promoter.pairs.start(find_listener(&shared))?)
        }
        None => None,
    };
    let listen = ListenSettings { keepalive: settings.keepalive, segment_size: Arc::clone(&segment_size) };
    let reconciler = Reconciler::new(workers, listen, Arc::clone(&shared.in_force));
    if let Some(address) = settings.admin {
        tokio::spawn(admin::open(address, Arc::clone(&shared)).await?);
    }
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        workers = settings.workers,
        admin = settings.admin.map(tracing::field::display),
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
        () = control.follow(input.loaded, kernel.interfaces, kernel.routes) => SignalKind::terminate(),
        signal = signals.next() => signal,
    };
    let leaving = Leaving { signal, promoter: kernel.promoter, sockmap, window: settings.drain_timeout };
    leaving.end(&mut signals, control.reconciler, &shared).await;
    if let (Some(pairs), Some(thread)) = (&shared.connections.pairs, pairs_thread) {
        pairs.stop();
        thread.thread().unpark();
        // A panic of the thread has been printed.
        let _ = thread.join();
    }
    Ok(())
}

/// What follows the input.
struct Control {
    reconciler: Reconciler,
    shared: Arc<Shared>,
    resolver: Resolver,
    promoter: Option<Arc<Promoter>>,
    sockmap: Arc<SockmapTier>,
    segment_size: Arc<SegmentSize>,
    /// Who is told what became of the manifests.
    outcome: Option<OutcomeSender>,
    /// What was loaded and put into force last.
    in_force: Option<(Arc<Loaded>, Resolution)>,
}

impl Control {
    /// Puts into force what the source loads, keeps the classifier where listeners are, and tries again what failed.
    async fn follow(
        &mut self,
        mut loaded: watch::Receiver<Arc<Loaded>>,
        mut interfaces: Option<watch::Receiver<Vec<Interface>>>,
        mut routes: Option<watch::Receiver<u64>>,
    ) {
        let promoter = self.promoter.clone();
        let mut retry = tokio::time::interval(BIND_RETRY);
        loop {
            tokio::select! {
                Ok(()) = loaded.changed() => {
                    let started = Instant::now();
                    let loaded = Arc::clone(&loaded.borrow_and_update());
                    if self.update_endpoints(&loaded, started).await {
                        continue;
                    }
                    self.resolve(loaded).await;
                    // Before ports open, so that the first SYN is counted.
                    self.attach(interfaces.as_mut());
                    self.put_into_force(started).await;
                }
                () = changed(interfaces.as_mut()) => {
                    self.attach(interfaces.as_mut());
                    self.reconciler.retry();
                }
                () = changed(routes.as_mut()) => {
                    if let Some(promoter) = &promoter {
                        promoter.pairs.routes_changed();
                    }
                    continue;
                }
                () = path_wanted(promoter.as_deref()) => self.attach(interfaces.as_mut()),
                _ = retry.tick() => {
                    if !self.reconciler.retry() {
                        continue;
                    }
                }
            }
            self.report();
        }
    }

    /// Puts into force what was loaded if nothing but endpoints has changed, at the cost of these; tells whether it did.
    async fn update_endpoints(&mut self, loaded: &Arc<Loaded>, started: Instant) -> bool {
        let Some((before, Resolution { resolved, problems })) = &mut self.in_force else { return false };
        let Change::Endpoints(services) = before.manifests.change_to(&loaded.manifests) else { return false };
        let ops = resolve::update_endpoints(resolved, &loaded.manifests, &services);
        let backends = ops.len();
        self.reconciler.perform(ops).await;
        *problems = InputProblems::new(loaded, resolved.problems.clone());
        *before = Arc::clone(loaded);
        let mut report = self.shared.report();
        report.updates.endpoints += 1;
        report.set_input(problems.clone());
        drop(report);
        tracing::debug!(
            services = services.len(),
            backends,
            duration_ms = milliseconds(started),
            "endpoints in force"
        );
        true
    }

    async fn resolve(&mut self, loaded: Arc<Loaded>) {
        let (resolver, input) = (self.resolver.clone(), Arc::clone(&loaded));
        // Thousands of routes take a while: health checks are answered meanwhile.
        match tokio::task::spawn_blocking(move || resolver.resolve(&input)).await {
            Ok(resolution) => self.in_force = Some((loaded, resolution)),
            Err(error) => {
                tracing::error!(%error, "resolving the manifests failed; the former state stays in force");
            }
        }
    }

    async fn put_into_force(&self, started: Instant) {
        let Some((_, Resolution { resolved, problems })) = &self.in_force else { return };
        if let Some(reason) = self.sockmap.start_if_wanted(&resolved.table).await {
            self.shared.report().datapath.sockmap_error = Some(reason);
        }
        self.reconciler.apply(&resolved.table).await;
        self.reconciler.remove_former_listeners();
        self.shared.report().updates.full += 1;
        tracing::info!(
            listeners = resolved.table.listeners.len(),
            backends = resolved.table.backends.len(),
            problems = problems.list().len(),
            duration_ms = milliseconds(started),
            "manifests in force"
        );
    }

    /// Attaches the classifier to the interfaces that hold addresses of listeners.
    fn attach(&self, interfaces: Option<&mut watch::Receiver<Vec<Interface>>>) {
        let Some(interfaces) = interfaces else { return };
        let interfaces = interfaces.borrow_and_update().clone();
        if self.promoter.is_some() {
            self.segment_size.set_mtu(smallest_mtu(&interfaces));
        }
        let table = self.in_force.as_ref().map(|(_, resolution)| &resolution.resolved.table);
        let bound = table.into_iter().flat_map(|table| table.listeners.keys()).map(|key| key.address);
        let bound = bound.collect();
        let mut in_force = self.shared.in_force();
        let Some(datapath) = &mut in_force.datapath else { return };
        for problem in datapath.attach(&interfaces, &bound) {
            tracing::warn!(%problem, "packets of this interface are not counted");
        }
        let attachments = datapath.attachments();
        drop(in_force);
        self.shared.report().datapath.interfaces = attachments
            .into_iter()
            .map(|one| view::InterfaceView { name: one.interface, attachment: one.kind.as_str().to_owned() })
            .collect();
    }

    /// Publishes statuses and problems, and logs the problems that are new.
    fn report(&self) {
        let Some((_, resolution)) = &self.in_force else { return };
        let failures = self.shared.in_force().bind_failures();
        let mut statuses = resolution.resolved.statuses.clone();
        status::apply_bind_failures(&mut statuses, &failures);
        self.publish(resolution, &failures);
        let bind_problems = failures.iter().map(|failure| failure.problem(&statuses)).collect();
        let mut report = self.shared.report();
        report.set_input(resolution.problems.clone());
        report.set_bind_problems(bind_problems);
        report.statuses = statuses;
    }

    /// Tells what became of the manifests, if that is new.
    fn publish(&self, resolution: &Resolution, failures: &[BindFailure]) {
        let (Some(OutcomeSender { node, sender }), Some((loaded, _))) = (&self.outcome, &self.in_force)
        else {
            return;
        };
        let statuses = &resolution.resolved.statuses;
        let report = NodeReport::new(node, statuses, failures);
        sender.send_if_modified(|before| {
            let is_new = before.report != report || before.statuses != *statuses;
            if is_new {
                let (loaded, statuses) = (Arc::clone(loaded), statuses.clone());
                *before = Arc::new(Outcome { loaded, statuses, report });
            }
            is_new
        });
    }
}

/// Down to microseconds: a change of endpoints takes less than one millisecond.
fn milliseconds(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e6).round() / 1e3
}

/// Waits until a program is wanted on another interface; for ever where none can be.
async fn path_wanted(promoter: Option<&Promoter>) {
    match promoter {
        Some(promoter) => promoter.flows.paths().changed().await,
        None => std::future::pending().await,
    }
}

/// Waits for a change; for ever where there is nothing to follow.
async fn changed<T>(receiver: Option<&mut watch::Receiver<T>>) {
    if let Some(receiver) = receiver
        && receiver.changed().await.is_ok()
    {
        return;
    }
    std::future::pending::<()>().await;
}

/// Raises the limit on open files as far as this process may, and returns it.
fn raise_file_limit() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%errno, "cannot raise the limit on open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}
