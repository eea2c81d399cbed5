//! Writes the statuses, while this agent is the one that does.
//!
//! Whatever changes, every object is evaluated anew; what is as it was is told by a digest, without looking at it. At most
//! one write of an object is under way. What the API server refuses is tried again later and later; where somebody was
//! faster, or the object is not seen yet as it was written, the watch will tell.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use kube::api::{Patch, PatchParams};
use kube::core::DynamicObject;
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::events::Events;
use super::patch::{KINDS, Parent, Wanted, Warning, finalizer_patch, patch};
use super::{FIELD_MANAGER, Identity, Publication, PublishHealth, WriteResult, reports};
use crate::watch::{ObservedObject, ObservedObjects, Served};
use forwarder_gateway::manifests::{ApiRelease, Kind, Manifests, ObjectRef};
use forwarder_gateway::status::nodes::{Node, apply_nodes};
use forwarder_gateway::status::{Condition, Statuses};
use forwarder_runtime::error::one_line;

/// How long changes are gathered before the objects are evaluated: the reports of other nodes come in meanwhile.
const DEBOUNCE: Duration = Duration::from_millis(150);
/// How many writes may be under way.
const AT_ONCE: usize = 8;
/// How many may be made up before the first of them is over.
const QUEUE: usize = 512;
/// How soon an object may be written again.
const INTERVAL: Duration = Duration::from_millis(500);
/// How long to wait after a failure, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(1));
/// The features of the Gateway API that are served, sorted.
const FEATURES: [&str; 5] =
    ["Gateway", "GatewayStaticAddresses", "ListenerSet", "ReferenceGrant", "TCPRoute"];

/// What writes.
pub(super) struct Writer {
    client: Client,
    identity: Arc<Identity>,
    health: Arc<PublishHealth>,
    events: Events,
    /// Whether it was said that this agent is not among those that count.
    is_uncounted: bool,
    objects: HashMap<ObjectRef, Progress>,
}

/// How far an object is.
#[derive(Debug, Default)]
struct Progress {
    /// The version of the object and the digest of what is wanted, where nothing was to do.
    evaluated: Option<(String, u64)>,
    /// The same where the status was written. A field that the cluster's CRD does not know is dropped there: what came
    /// back is all there is to have.
    written: Option<(String, u64)>,
    /// The version that a write was made from: until another is seen, there is nothing to evaluate.
    stale: Option<String>,
    is_writing: bool,
    /// Whether it was passed over because of that, so that it has to be looked at once the write is over.
    is_passed_over: bool,
    /// Not before.
    not_before: Option<Instant>,
    failures: u32,
}

impl Progress {
    /// Looks at the same version again in a while; yields when.
    fn retry_soon(&mut self) -> Instant {
        let at = Instant::now() + RETRY.0;
        self.stale = None;
        self.not_before = Some(at);
        at
    }
}

/// A write that is to be made, or has come to an end.
struct Write<T> {
    id: ObjectRef,
    /// The object as it was when the write was made up.
    record: Arc<ObservedObject>,
    digest: u64,
    /// Whether it is the status.
    is_status: bool,
    warnings: Vec<Warning>,
    /// What to write, or the version of the object that was written.
    what: T,
}

/// What to write.
enum Body {
    Status(Value),
    Finalizers(Value),
}

type Writes = FuturesUnordered<BoxFuture<'static, Write<Result<Option<String>, kube::Error>>>>;

impl Writer {
    pub(super) fn new(client: Client, identity: Arc<Identity>, health: Arc<PublishHealth>) -> Self {
        let events = Events::new(client.clone(), &identity);
        Self { client, identity, health, events, is_uncounted: false, objects: HashMap::new() }
    }

    /// Writes whenever it is this agent's turn, until nobody sets the outcome any more.
    pub(super) async fn run(
        mut self,
        mut is_leader: watch::Receiver<bool>,
        mut outcome: watch::Receiver<Arc<Publication>>,
        mut records: watch::Receiver<ObservedObjects>,
    ) {
        loop {
            while !*is_leader.borrow_and_update() {
                tokio::select! {
                    changed = is_leader.changed() => if changed.is_err() { return },
                    () = closed(&mut outcome) => return,
                }
            }
            self.health.is_leader.store(true, Ordering::Relaxed);
            self.objects.clear();
            let go_on = self.lead(&mut is_leader, &mut outcome, &mut records).await;
            self.health.is_leader.store(false, Ordering::Relaxed);
            if !go_on {
                return;
            }
        }
    }

    /// Writes as long as this agent leads. Yields false if the agent ends.
    async fn lead(
        &mut self,
        is_leader: &mut watch::Receiver<bool>,
        outcome: &mut watch::Receiver<Arc<Publication>>,
        records: &mut watch::Receiver<ObservedObjects>,
    ) -> bool {
        let (sender, mut nodes) = watch::channel(None);
        match self.identity.pod {
            Some(_) => {
                let follow = reports::follow(self.client.clone(), Arc::clone(&self.identity), sender);
                drop(tokio::spawn(follow));
            }
            None => drop(sender.send_replace(Some(Vec::new()))),
        }
        let mut writes = Writes::new();
        let mut queue = VecDeque::new();
        // At once, for nobody has looked at what has changed since the last one led.
        let mut due = Some(Instant::now());
        let soon = |due: Option<Instant>| {
            let soon = Instant::now() + DEBOUNCE;
            Some(due.map_or(soon, |due| due.min(soon)))
        };
        loop {
            tokio::select! {
                changed = is_leader.changed() => {
                    if changed.is_err() || !*is_leader.borrow_and_update() {
                        // What is under way ends as it may: it carries the version that it was made from.
                        return changed.is_ok();
                    }
                }
                changed = outcome.changed() => {
                    if changed.is_err() {
                        return false;
                    }
                    due = soon(due);
                }
                Ok(()) = records.changed() => due = soon(due),
                Ok(()) = nodes.changed() => due = soon(due),
                Some(written) = writes.next() => {
                    let again = self.settle(written, &records.borrow().served);
                    due = [due, again].into_iter().flatten().min();
                }
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    let outcome = Arc::clone(&outcome.borrow_and_update());
                    let records = records.borrow_and_update().clone();
                    let nodes = nodes.borrow_and_update().clone();
                    due = nodes.and_then(|nodes| self.evaluate(&outcome, &records, nodes, &mut queue));
                }
            }
            while writes.len() < AT_ONCE
                && let Some(write) = queue.pop_front()
            {
                self.start(write, &records.borrow().served, &mut writes);
            }
        }
    }

    /// Looks at every object, and puts into the queue what has to be written. Yields when to look again, if that is
    /// known.
    fn evaluate(
        &mut self,
        outcome: &Publication,
        records: &ObservedObjects,
        nodes: Vec<Node>,
        queue: &mut VecDeque<Write<Body>>,
    ) -> Option<Instant> {
        // Nothing has been resolved yet, or only what a former agent has kept.
        if outcome.loaded.manifests.api_release == ApiRelease::NotInstalled {
            return None;
        }
        // What nodes say concerns these alone: routes may be thousands, and stay where they are.
        let mut statuses = Statuses {
            gateways: outcome.statuses.gateways.clone(),
            listener_sets: outcome.statuses.listener_sets.clone(),
            ..Statuses::default()
        };
        let nodes = self.with_own(nodes, outcome);
        apply_nodes(&mut statuses, &nodes);
        let identity = Arc::clone(&self.identity);
        let manifests = &outcome.loaded.manifests;
        let used_classes: BTreeSet<&str> =
            manifests.gateways.values().map(|it| it.spec.gateway_class_name.as_str()).collect();
        let now = Instant::now();
        let time = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let mut again: Option<Instant> = None;
        self.objects.retain(|id, progress| progress.is_writing || records.objects.contains_key(id));
        for (id, record) in &records.objects {
            if queue.len() >= QUEUE {
                return Some(now + DEBOUNCE);
            }
            let mut parents = Vec::new();
            let wanted = wanted(
                &identity.controller,
                id,
                record,
                (&statuses, &outcome.statuses),
                manifests,
                &mut parents,
            );
            let Some(wanted) = wanted else { continue };
            let is_used = used_classes.contains(id.name.as_str());
            let digest = digest(&(wanted, is_used));
            let progress = self.objects.entry(id.clone()).or_default();
            let version = &record.resource_version;
            let is_evaluated =
                progress.evaluated.as_ref().is_some_and(|it| (&it.0, it.1) == (version, digest));
            progress.is_passed_over |= progress.is_writing && !is_evaluated;
            if progress.is_writing || is_evaluated || progress.stale.as_ref() == Some(version) {
                continue;
            }
            if let Some(at) = progress.not_before.filter(|at| *at > now) {
                again = Some(again.map_or(at, |again| again.min(at)));
                continue;
            }
            let status = if progress.written.as_ref().is_some_and(|it| (&it.0, it.1) == (version, digest)) {
                None
            } else {
                patch(record, wanted, &time)
            };
            let (what, warnings) = if let Some(patch) = status {
                (Body::Status(patch.body), patch.warnings)
            } else if let Some(body) = finalizers(record, wanted, is_used) {
                (Body::Finalizers(body), Vec::new())
            } else {
                progress.evaluated = Some((version.clone(), digest));
                continue;
            };
            progress.is_writing = true;
            let is_status = matches!(what, Body::Status(_));
            queue.push_back(Write {
                id: id.clone(),
                record: Arc::clone(record),
                digest,
                is_status,
                warnings,
                what,
            });
        }
        again
    }

    /// The nodes, of which this one says what it knows itself. Outside a Pod there is no other.
    fn with_own(&mut self, mut nodes: Vec<Node>, outcome: &Publication) -> Vec<Node> {
        let own = Node {
            name: self.identity.node.clone(),
            addresses: Vec::new(),
            report: Some(outcome.report.clone()),
        };
        match nodes.iter_mut().find(|node| node.name == own.name) {
            Some(node) => node.report = own.report,
            None if self.identity.pod.is_none() => nodes.push(own),
            None => {
                if !std::mem::replace(&mut self.is_uncounted, true) {
                    tracing::warn!(
                        selector = self.identity.pod_selector,
                        pod = self.identity.pod,
                        "--pod-selector does not match the labels of this agent's own Pod: statuses leave this node out; traffic is not affected"
                    );
                }
            }
        }
        nodes
    }

    fn start(&self, write: Write<Body>, served: &Served, writes: &mut Writes) {
        let Write { id, record, digest, is_status, warnings, what } = write;
        let resource = served.values().find(|resource| resource.kind == id.kind);
        let api: Option<Api<DynamicObject>> = resource.map(|resource| match id.namespace.as_str() {
            "" => Api::all_with(self.client.clone(), resource),
            namespace => Api::namespaced_with(self.client.clone(), namespace, resource),
        });
        let params = PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
        writes.push(Box::pin(async move {
            let what = match (api, what) {
                (None, _) => Ok(None),
                (Some(api), Body::Status(body)) => api
                    .patch_status(&id.name, &params, &Patch::Merge(body))
                    .await
                    .map(|it| it.resource_version()),
                (Some(api), Body::Finalizers(body)) => {
                    api.patch(&id.name, &params, &Patch::Merge(body)).await.map(|it| it.resource_version())
                }
            };
            Write { id, record, digest, is_status, warnings, what }
        }));
    }

    /// Takes in what became of a write. Yields when to try again, if so.
    fn settle(
        &mut self,
        write: Write<Result<Option<String>, kube::Error>>,
        served: &Served,
    ) -> Option<Instant> {
        let Write { id, record, digest, is_status, warnings, what } = write;
        let kind = KINDS.into_iter().find(|kind| kind.as_str() == id.kind)?;
        let progress = self.objects.entry(id.clone()).or_default();
        progress.is_writing = false;
        let is_passed_over = std::mem::take(&mut progress.is_passed_over);
        progress.stale = Some(record.resource_version.clone());
        let error = match what {
            // The kind is not served any more: whatever comes next is told by the watches.
            Ok(None) => return Some(progress.retry_soon()),
            Ok(version) => {
                let next = Instant::now() + INTERVAL;
                progress.failures = 0;
                progress.not_before = Some(next);
                // What was written and is as it was before is told by no watch.
                let is_same = version.as_ref() == Some(&record.resource_version);
                progress.stale = Some(record.resource_version.clone()).filter(|_| !is_same);
                if is_status {
                    progress.written = version.map(|version| (version, digest));
                }
                self.health.count(kind, WriteResult::Written);
                tracing::debug!(object = %id, "status written");
                self.events.tell(&id, &record, warnings, served);
                return (is_same || is_passed_over).then_some(next);
            }
            Err(error) => error,
        };
        match &error {
            kube::Error::Api(status) if status.code == 409 => {
                self.health.count(kind, WriteResult::Conflict);
                tracing::debug!(object = %id, "another agent changed the status meanwhile: reading it again");
                return is_passed_over.then(Instant::now);
            }
            // It is gone, or it is served in another version now: the watches will tell.
            kube::Error::Api(status) if status.code == 404 => return Some(progress.retry_soon()),
            _ => {}
        }
        self.health.count(kind, WriteResult::Failed);
        progress.stale = None;
        let delay = RETRY.0.saturating_mul(1 << progress.failures.min(6)).min(RETRY.1);
        progress.failures += 1;
        progress.not_before = Some(Instant::now() + delay);
        let consequence = if is_status {
            "cannot write the status, which may be out of date meanwhile; traffic is not affected"
        } else {
            "cannot write the finalizer that keeps the class while Gateways use it; statuses and traffic are not affected; agents need \
             to patch the class (`gatewayClass.otherNames` of the chart)"
        };
        tracing::warn!(
            object = %id,
            error = one_line(&error),
            delay = %humantime::format_duration(delay),
            "{consequence}; trying again"
        );
        progress.not_before
    }
}

/// The finalizers that an object is to have, where it has others.
fn finalizers(record: &ObservedObject, wanted: Wanted<'_>, is_used: bool) -> Option<Value> {
    match wanted {
        Wanted::GatewayClass { .. } => finalizer_patch(record, is_used),
        Wanted::Gateway(_) | Wanted::ListenerSet(_) | Wanted::Route { .. } => None,
    }
}

/// The status that an object is to have; `None` where it is not ours, or another version of it was looked at. What the
/// nodes have a say in is in the first of the statuses, the rest in the second.
fn wanted<'a>(
    controller: &'a str,
    id: &ObjectRef,
    record: &ObservedObject,
    (of_nodes, statuses): (&'a Statuses, &'a Statuses),
    manifests: &'a Manifests,
    parents: &'a mut Vec<Parent<'a>>,
) -> Option<Wanted<'a>> {
    let name = id.namespaced_name();
    let is_current = |conditions: &[Condition]| {
        conditions.iter().all(|condition| condition.observed_generation == record.generation)
    };
    match KINDS.into_iter().find(|kind| kind.as_str() == id.kind)? {
        Kind::GatewayClass => {
            let status = statuses.gateway_classes.get(&id.name)?;
            let features = has_features(&manifests.api_release).then_some(&FEATURES[..]);
            is_current(&status.conditions).then_some(Wanted::GatewayClass { status, features })
        }
        Kind::Gateway => {
            let status = of_nodes.gateways.get(&name)?;
            is_current(&status.conditions).then_some(Wanted::Gateway(status))
        }
        Kind::ListenerSet => {
            let status = of_nodes.listener_sets.get(&name)?;
            is_current(&status.conditions).then_some(Wanted::ListenerSet(status))
        }
        _ => {
            if let Some(status) = statuses.tcp_routes.get(&name) {
                let spec = &manifests.tcp_routes.get(&name)?.spec;
                for parent in &status.parents {
                    let reference = spec.parent_refs.get(parent.parent_ref)?;
                    if !is_current(&parent.conditions) {
                        return None;
                    }
                    parents.push(Parent { reference, status: parent });
                }
            } else if manifests.tcp_routes.get(&name)?.metadata.generation != record.generation {
                // It has been seen before it was resolved.
                return None;
            } else if !record.status.as_ref().is_some_and(|status| status.contains(controller)) {
                // Nothing of ours is there, nor is it to be.
                return None;
            }
            Some(Wanted::Route { controller, parents })
        }
    }
}

/// Whether GatewayClasses of this release have a place for features, as objects with a name, in every channel.
fn has_features(release: &ApiRelease) -> bool {
    release.is_at_least(1, 4)
}

fn digest(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// Waits until nobody sets the outcome any more.
async fn closed(outcome: &mut watch::Receiver<Arc<Publication>>) {
    while outcome.changed().await.is_ok() {}
}

#[cfg(test)]
mod progress_tests;
#[cfg(test)]
mod tests;
