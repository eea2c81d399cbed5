//! What follows the input: puts into force what the source loads, and says what became of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::direct::DirectListeners;
use super::input::PublicationSender;
use super::sockmap::SockmapTier;
use crate::report::InputProblems;
use crate::resolver::{Resolution, Resolver};
use crate::state::AgentState;
use crate::view;
use forwarder_dataplane::offload::tc::Offloader;
use forwarder_dataplane::reconciler::Reconciler;
use forwarder_dataplane::upstream::segment_size::SegmentSize;
use forwarder_gateway::manifests::Change;
use forwarder_gateway::status::nodes::NodeReport;
use forwarder_gateway::status::{self, BindFailure};
use forwarder_kernel::net::interfaces::{Interface, node_addresses, smallest_mtu};
use forwarder_kernel::programs::attach::AttachProblem;
use forwarder_kube::publish::Publication;
use forwarder_runtime::panics;
use forwarder_source::Loaded;

/// How often listeners that could not be bound are tried again.
const BIND_RETRY: Duration = Duration::from_secs(1);
/// Every how many times those whose address the node lacks are, where the kernel tells when addresses come.
const ADDRESS_RETRIES: u32 = 30;

/// How long a listener may be without its port before the others of the cluster are told: while agents are replaced, the former one
/// may still have it.
const BIND_GRACE: Duration = Duration::from_secs(10);

/// How often it is looked whether the programs still hang where they were attached.
const VERIFICATION: Duration = Duration::from_secs(2);
/// Every how many times direct listeners are looked at, even where nothing is known to have changed.
const DIRECT_VERIFICATIONS: u32 = 15;

/// What follows the input.
pub(super) struct Control {
    pub(super) reconciler: Reconciler,
    pub(super) shared: Arc<AgentState>,
    pub(super) resolver: Resolver,
    pub(super) offloader: Option<Arc<Offloader>>,
    pub(super) sockmap: Arc<SockmapTier>,
    pub(super) direct: Option<DirectListeners>,
    pub(super) segment_size: Arc<SegmentSize>,
    /// Who is told what became of the manifests.
    pub(super) outcome: Option<PublicationSender>,
    /// What was loaded and put into force last.
    pub(super) in_force: Option<(Arc<Loaded>, Resolution)>,
}

impl Control {
    /// Puts into force what the source loads, keeps the programs where listeners are, and tries again what failed.
    pub(super) async fn follow(
        &mut self,
        mut loaded: watch::Receiver<Arc<Loaded>>,
        mut interfaces: Option<watch::Receiver<Vec<Interface>>>,
        mut routes: Option<watch::Receiver<u64>>,
    ) {
        let offloader = self.offloader.clone();
        let mut retry = tokio::time::interval(BIND_RETRY);
        let (mut retries, mut verifications) = (0_u32, 0_u32);
        let mut told_failures = 0;
        let mut verification = tokio::time::interval(VERIFICATION);
        verification.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = loaded.changed() => {
                    if changed.is_err() {
                        tracing::error!("BUG: the configuration source has stopped: the agent exits, so that another one is started; please report it");
                        return;
                    }
                    let started = Instant::now();
                    let loaded = Arc::clone(&loaded.borrow_and_update());
                    if self.update_endpoints(&loaded, started).await {
                        self.update_direct();
                        continue;
                    }
                    self.note_addresses(interfaces.as_ref());
                    self.resolve(loaded).await;
                    // Before ports open, so that the first SYN is counted.
                    self.attach(interfaces.as_mut());
                    self.put_into_force(started).await;
                }
                () = changed(interfaces.as_mut()) => {
                    self.attach(interfaces.as_mut());
                    self.reconciler.retry(true);
                    let loaded = self.in_force.as_ref().map(|(loaded, _)| Arc::clone(loaded));
                    if self.note_addresses(interfaces.as_ref()) && let Some(loaded) = loaded {
                        let started = Instant::now();
                        self.resolve(loaded).await;
                        self.put_into_force(started).await;
                    }
                }
                () = changed(routes.as_mut()) => {
                    // First, so that those that are opened by the old ones are all there.
                    self.update_direct();
                    if let Some(offloader) = &offloader {
                        offloader.pairs.routes_changed();
                    }
                    continue;
                }
                () = path_wanted(offloader.as_deref()) => {
                    self.attach(interfaces.as_mut());
                    // Pairs that could not go there may now.
                    if let Some(offloader) = &offloader {
                        offloader.pairs.routes_changed();
                    }
                }
                // Before anything was loaded, nothing would be wanted.
                _ = verification.tick(), if self.in_force.is_some() => {
                    self.attach(interfaces.as_mut());
                    verifications = verifications.wrapping_add(1);
                    // Now and then whatever is known: what was found of a path holds for some minutes.
                    let is_due = verifications.is_multiple_of(DIRECT_VERIFICATIONS);
                    if self.direct.as_ref().is_some_and(|direct| is_due || !direct.is_settled(&self.shared)) {
                        self.update_direct();
                    }
                    continue;
                }
                _ = retry.tick() => {
                    retries = retries.wrapping_add(1);
                    let looks_for_addresses = interfaces.is_none() || retries.is_multiple_of(ADDRESS_RETRIES);
                    let lasting = self.lasting_failures().len();
                    let is_new = std::mem::replace(&mut told_failures, lasting) != lasting;
                    if !self.reconciler.retry(looks_for_addresses) && !is_new {
                        continue;
                    }
                }
            }
            self.update_direct();
            self.report();
        }
    }

    /// Has the programs serve direct listeners as is in force, and tells which of them they cannot.
    fn update_direct(&mut self) {
        let Some(direct) = &mut self.direct else { return };
        let told = direct.update(&self.shared);
        let refused =
            told.iter().filter_map(|(key, told)| Some((*key, told.as_ref().err()?.clone()))).collect();
        let mut report = self.shared.report();
        report.direct = told.iter().map(|(key, told)| (*key, *told == Ok(true))).collect();
        if report.refused_direct != refused {
            report.refused_direct = refused;
            drop(report);
            self.report();
        }
    }

    /// Puts into force what was loaded if nothing but endpoints has changed, at the cost of these; tells whether it did.
    async fn update_endpoints(&mut self, loaded: &Arc<Loaded>, started: Instant) -> bool {
        let Some((before, Resolution { resolved, problems })) = &mut self.in_force else { return false };
        let Change::Endpoints(services) = before.manifests.change_to(&loaded.manifests) else { return false };
        let ops = self.resolver.update_endpoints(resolved, loaded, &services);
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

    /// Notes the node's addresses, by which endpoints may lead back to listeners; tells whether they are others than before.
    fn note_addresses(&mut self, interfaces: Option<&watch::Receiver<Vec<Interface>>>) -> bool {
        interfaces.is_some_and(|interfaces| self.resolver.set_addresses(node_addresses(&interfaces.borrow())))
    }

    async fn resolve(&mut self, loaded: Arc<Loaded>) {
        let (resolver, input) = (self.resolver.clone(), Arc::clone(&loaded));
        // Thousands of routes take a while: health checks are answered meanwhile.
        match panics::survived(move || resolver.resolve(&input)).await {
            Ok(mut resolution) => {
                if let Some((_, before)) = &self.in_force {
                    resolution.resolved.table.share(&before.resolved.table);
                }
                self.in_force = Some((loaded, resolution));
            }
            Err(error) => {
                tracing::error!(
                    %error,
                    "BUG: the agent cannot process the manifests: the former configuration stays in force until they change; please report it with the manifests"
                );
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

    /// Attaches the programs to the interfaces that hold addresses of listeners.
    fn attach(&self, interfaces: Option<&mut watch::Receiver<Vec<Interface>>>) {
        let Some(interfaces) = interfaces else { return };
        let interfaces = interfaces.borrow_and_update().clone();
        if self.offloader.is_some() {
            self.segment_size.set_mtu(smallest_mtu(&interfaces));
        }
        let table = self.in_force.as_ref().map(|(_, resolution)| &resolution.resolved.table);
        let bound = table.into_iter().flat_map(|table| table.listeners.keys()).map(|key| key.address);
        let bound = bound.collect();
        let mut in_force = self.shared.in_force();
        let Some(datapath) = &mut in_force.datapath else { return };
        for problem in datapath.attach(&interfaces, &bound) {
            match problem {
                AttachProblem::Xdp { .. } => {
                    tracing::warn!(%problem, "no program hangs at XDP of an interface");
                }
                AttachProblem::XdpForwarding(_) => tracing::warn!(%problem, "TC sends on what XDP does not"),
                _ => {
                    tracing::warn!(%problem, "cannot attach the eBPF programs to an interface: its packets are not counted, and its connections are forwarded in userspace");
                }
            }
        }
        let attachments = datapath.attachments();
        drop(in_force);
        self.shared.report().datapath.interfaces = attachments
            .into_iter()
            .map(|one| view::InterfaceView {
                name: one.interface,
                attachment: one.kind.as_str().to_owned(),
                xdp: one.xdp.map(|mode| mode.as_str().to_owned()),
            })
            .collect();
    }

    /// Publishes statuses and problems, and logs the problems that are new.
    fn report(&self) {
        let Some((_, resolution)) = &self.in_force else { return };
        let failures = self.shared.in_force().bind_failures();
        let mut statuses = Arc::clone(&resolution.resolved.statuses);
        // With thousands of routes, a copy is worth to be spared.
        if !failures.is_empty() {
            status::apply_bind_failures(Arc::make_mut(&mut statuses), &failures);
        }
        self.publish(resolution);
        let mut problems: Vec<_> = failures.iter().map(|failure| failure.problem(&statuses)).collect();
        problems.extend(self.shared.missing_tiers().problems(&resolution.resolved.table.listeners));
        let mut report = self.shared.report();
        report.set_input(resolution.problems.clone());
        report.set_node_problems(problems);
        report.statuses = statuses;
    }

    /// The listeners whose address this node does not have, and those that have been without their port for longer than while agents
    /// are replaced: another agent gives up a port, but no address.
    fn lasting_failures(&self) -> Vec<BindFailure> {
        let mut failures = self.shared.in_force().bind_failures();
        failures.retain(|failure| failure.address_missing || failure.since.elapsed() >= BIND_GRACE);
        failures
    }

    /// Tells what became of the manifests, if that is new.
    fn publish(&self, resolution: &Resolution) {
        let (Some(PublicationSender { node, sender }), Some((loaded, _))) = (&self.outcome, &self.in_force)
        else {
            return;
        };
        let statuses = &resolution.resolved.statuses;
        let report = NodeReport::new(node, statuses, &self.lasting_failures());
        sender.send_if_modified(|before| {
            let is_new = !Arc::ptr_eq(&before.loaded, loaded)
                || before.report != report
                || before.statuses != *statuses;
            if is_new {
                let (loaded, statuses) = (Arc::clone(loaded), Arc::clone(statuses));
                *before = Arc::new(Publication { loaded, statuses, report });
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
async fn path_wanted(offloader: Option<&Offloader>) {
    match offloader {
        Some(offloader) => offloader.flows.paths().changed().await,
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
