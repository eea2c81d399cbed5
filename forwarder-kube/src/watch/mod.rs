//! Objects of a Kubernetes API, followed by watches.
//!
//! Which version of each kind of the Gateway API is read follows from what the API server serves, asked again whenever a
//! CRD changes or a watch finds its resource gone; a kind that is not served is said so, and waited for without holding
//! up the others. The flow: a `reflector` for each kind tells of its objects, the `store` makes one set of manifests of
//! them, and `watch` publishes that once it is quiet, at first when every kind has been read.

mod asks;
mod connect;
pub mod daemon_set;
#[cfg(test)]
pub(crate) mod fake;
mod kinds;
mod nodes;
mod object;
mod records;
mod reflector;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use k8s_openapi::api::coordination::v1::Lease;
use kube::Client;
use kube::core::{DynamicObject, PartialObjectMeta, Resource};
use kube::discovery::ApiResource;
use kube::runtime::watcher::Event;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep_until};

use self::asks::{Asking, Asks, answer_of, ask};
use self::reflector::{Message, News, Scope};
use self::store::Store;
use crate::KubeSettings;
use forwarder_gateway::manifests::{GATEWAY_GROUP, Kind};
use forwarder_runtime::lock::lock;
use forwarder_source::Loaded;
pub use forwarder_source::state::{self, StateFile};

pub use self::connect::{ConnectError, connect};
pub use self::kinds::{CORE_KINDS, GATEWAY_KINDS, Served, discover, resource};
pub(crate) use self::nodes::NodesLease;
pub use self::records::{ObservedObject, ObservedObjects};
pub(crate) use self::reflector::{WATCH_SECONDS, events};

/// For so long it must be quiet before changes are published, and so long may that be put off.
const QUIET: Duration = Duration::from_millis(50);
const PATIENCE: Duration = Duration::from_millis(100);
/// How long the API server may take, at first, before the last known state is published in place of what it says.
const STATE_AFTER: Duration = Duration::from_secs(3);
/// A watch that goes on says nothing where nothing changes: its failure is over if it has not come again for so long.
const FAILURE: Duration = Duration::from_secs(30);
/// How long a kind may be refused, once the API server answers, before the others are published without it.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// The annotation of a CRD that tells the release of the Gateway API.
const BUNDLE_VERSION: &str = "gateway.networking.k8s.io/bundle-version";

/// How the reading goes, for the metrics.
#[derive(Debug, Default)]
pub struct KubeHealth {
    /// Failed requests, by kind.
    failures: BTreeMap<Kind, AtomicU64>,
    /// Whether what is in force is the state that a former agent has kept.
    is_stale: AtomicBool,
    /// What the API server serves.
    served: Mutex<Arc<Served>>,
}

impl KubeHealth {
    fn new() -> Self {
        let kinds = GATEWAY_KINDS.into_iter().chain(CORE_KINDS);
        Self { failures: kinds.map(|kind| (kind, AtomicU64::new(0))).collect(), ..Self::default() }
    }

    /// Failed requests, by kind.
    pub fn failures(&self) -> impl Iterator<Item = (Kind, u64)> {
        self.failures.iter().map(|(kind, count)| (*kind, count.load(Ordering::Relaxed)))
    }

    /// The kinds of the Gateway API, with the version in which each is read; `None` where it is not served.
    pub fn served(&self) -> impl Iterator<Item = (Kind, Option<String>)> {
        let served = Arc::clone(&lock(&self.served));
        GATEWAY_KINDS.into_iter().map(move |kind| (kind, served.get(&kind).map(|it| it.version.clone())))
    }

    /// Whether what is in force is the state that a former agent has kept, for the API server has not answered yet.
    pub fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::Relaxed)
    }
}

/// What the API server holds, followed.
#[derive(Debug)]
pub struct KubeSource {
    /// The manifests.
    pub loaded: watch::Receiver<Arc<Loaded>>,
    /// The objects that carry a status.
    pub records: watch::Receiver<ObservedObjects>,
    /// How the reading goes.
    pub health: Arc<KubeHealth>,
}

/// Follows the objects of an API server, and the Lease that tells of the installation's nodes, if there are any but this one.
pub fn watch(client: Client, settings: &KubeSettings, nodes: Option<NodesLease>) -> KubeSource {
    let (loaded_sender, loaded) = watch::channel(Arc::default());
    let (records_sender, records) = watch::channel(ObservedObjects::default());
    let (kept, to_keep) = watch::channel(None);
    let health = Arc::new(KubeHealth::new());
    let follower = Follower {
        nodes: nodes.map(|lease| lease.follow(client.clone())),
        client,
        namespaces: settings.watch_namespaces.clone(),
        state: settings.state_dir.clone().map(StateFile::OfCluster),
        store: Store::default(),
        watches: BTreeMap::new(),
        served: None,
        next_epoch: 0,
        messages: mpsc::channel(1024),
        loaded: loaded_sender,
        records: records_sender,
        health: Arc::clone(&health),
        kept,
        knows_release: false,
        gives_up: false,
        is_published: false,
    };
    if let Some(file) = &follower.state {
        tokio::spawn(state::keep(file.clone(), false, to_keep));
    }
    tokio::spawn(follower.run());
    KubeSource { loaded, records, health }
}

/// The state of [`watch()`].
struct Follower {
    client: Client,
    /// What happens to the Lease with the addresses of the nodes.
    nodes: Option<mpsc::Receiver<Event<PartialObjectMeta<Lease>>>>,
    namespaces: Vec<String>,
    state: Option<StateFile>,
    store: Store,
    /// The watch of each scope, and what it reads.
    watches: BTreeMap<Scope, (ApiResource, AbortHandle)>,
    /// What the API server serves, once it has said so.
    served: Option<Arc<Served>>,
    next_epoch: u64,
    messages: (mpsc::Sender<Message>, mpsc::Receiver<Message>),
    loaded: watch::Sender<Arc<Loaded>>,
    records: watch::Sender<ObservedObjects>,
    health: Arc<KubeHealth>,
    /// What is to be kept for the next agent.
    kept: watch::Sender<Option<Arc<Loaded>>>,
    /// Whether the CRDs have been listed, so that their release is known.
    knows_release: bool,
    /// Whether kinds that are refused are not waited for any more.
    gives_up: bool,
    is_published: bool,
}

/// When what was told is published.
#[derive(Clone, Copy)]
struct Due {
    first: Instant,
    at: Instant,
}

impl Due {
    fn after_change(due: Option<Self>) -> Self {
        let now = Instant::now();
        let first = due.map_or(now, |due| due.first);
        Self { first, at: (now + QUIET).min(first + PATIENCE) }
    }
}

impl Follower {
    async fn run(mut self) {
        for kind in CORE_KINDS {
            self.follow(kind, &resource(kind, "v1"));
        }
        let mut crds = reflector::crds(self.client.clone());
        let mut named = BTreeSet::new();
        let mut due: Option<Due> = None;
        let mut asks = Asks::new();
        let mut asking: Option<Asking> = None;
        let mut failures = tokio::time::interval(FAILURE / 3);
        let state_at = Instant::now() + STATE_AFTER;
        let mut state_is_due = true;
        let mut give_up_at: Option<Instant> = None;
        loop {
            tokio::select! {
                Some(message) = self.messages.1.recv() => {
                    if let News::Failed(failure) = &message.news {
                        self.note_failure(message.scope.kind, failure);
                        if failure.code == Some(404) {
                            asks.soon();
                        }
                    }
                    if self.store.take_in(message) {
                        due = Some(Due::after_change(due));
                    }
                }
                Some(event) = crds.recv() => {
                    if self.crd_changed(event, &mut named) {
                        asks.soon();
                        due = Some(Due::after_change(due));
                    }
                }
                event = next(&mut self.nodes) => {
                    if let Some(addresses) = nodes::addresses(&event)
                        && self.store.set_node_addresses(addresses)
                    {
                        due = Some(Due::after_change(due));
                    }
                }
                // The watches are listened to while this is answered.
                () = sleep_until(asks.next), if asking.is_none() => {
                    asking = Some(ask(self.client.clone()).boxed());
                }
                answer = answer_of(&mut asking), if asking.is_some() => {
                    asking = None;
                    asks.answered(answer.is_ok());
                    match answer {
                        Ok(served) => {
                            let first = Instant::now() + REFUSED_FOR;
                            give_up_at.get_or_insert(first);
                            let has_removed = self.remove_kinds(&served);
                            if self.serve(served) || has_removed {
                                due = Some(Due::after_change(due));
                            }
                        }
                        Err(error) => tracing::warn!(
                            error,
                            "cannot ask the Kubernetes API which kinds it serves; asking again"
                        ),
                    }
                }
                () = sleep_until(state_at), if state_is_due => {
                    state_is_due = false;
                    self.publish_kept_state().await;
                }
                () = at(give_up_at), if give_up_at.is_some() && !self.gives_up => {
                    self.gives_up = true;
                    due = Some(Due::after_change(due));
                }
                () = at(due.map(|due| due.at)), if due.is_some() => {
                    due = None;
                    state_is_due &= !self.publish();
                }
                _ = failures.tick() => {
                    if self.store.forgive(FAILURE) {
                        due = Some(Due::after_change(due));
                    }
                }
                () = self.loaded.closed() => return self.stop(),
            }
        }
    }

    /// Publishes what is known, once that is everything, or everything that the API server will tell.
    fn publish(&mut self) -> bool {
        // Soon after its start, an API server knows its CRDs, and serves them some moments later.
        let is_served = |kind: &Kind| self.served.as_ref().is_some_and(|served| served.contains_key(kind));
        let is_known = self.knows_release
            && GATEWAY_KINDS.iter().all(|kind| is_served(kind) || !self.store.has_crd(*kind));
        let is_complete = self.store.is_complete(self.gives_up) && (is_known || self.gives_up);
        if self.served.is_none() || !(self.is_published || is_complete) {
            return false;
        }
        if !self.is_published {
            tracing::info!(
                served = served_versions(self.served.as_deref()),
                "the Kubernetes API has been read"
            );
        }
        self.is_published = true;
        self.health.is_stale.store(false, Ordering::Relaxed);
        // First what is written to, so that who is told of new manifests finds their objects.
        let records = self.store.records();
        self.records.send_if_modified(|current| {
            let is_new = *current != records;
            if is_new {
                *current = records;
            }
            is_new
        });
        let loaded = self.store.loaded();
        self.loaded.send_if_modified(|current| {
            let is_new = **current != loaded;
            if is_new {
                *current = Arc::new(loaded);
            }
            is_new
        });
        if is_known && self.store.is_complete(false) {
            self.kept.send_replace(Some(Arc::clone(&self.loaded.borrow())));
        }
        true
    }

    /// Removes the objects of kinds that are neither served nor have a CRD. That a kind is not served says nothing by
    /// itself: so it is for a moment when an API server starts. Yields whether there was one.
    fn remove_kinds(&mut self, served: &Served) -> bool {
        let store = &mut self.store;
        let is_gone = |kind: &Kind| !served.contains_key(kind) && !store.has_crd(*kind);
        let gone: Vec<Kind> = GATEWAY_KINDS.into_iter().filter(is_gone).collect();
        self.knows_release && gone.into_iter().filter(|kind| store.remove_kind(*kind)).count() > 0
    }

    /// Publishes what a former agent has kept, while the API server does not answer.
    async fn publish_kept_state(&self) {
        let Some(file) = &self.state else { return };
        if self.is_published {
            return;
        }
        match file.read().await {
            Ok(Some(loaded)) => {
                tracing::warn!(
                    path = %file.path().display(),
                    "the Kubernetes API does not answer: the last known state is put into force"
                );
                self.health.is_stale.store(true, Ordering::Relaxed);
                self.loaded.send_replace(Arc::new(loaded));
            }
            Ok(None) => tracing::warn!(
                "the Kubernetes API does not answer, and no state was kept: nothing is served until it does"
            ),
            Err(error) => tracing::error!(
                %error,
                "the kept state cannot be used: nothing is served until the Kubernetes API answers"
            ),
        }
    }

    /// Follows what the API server serves. Yields whether that is something else than before.
    fn serve(&mut self, served: Served) -> bool {
        if self.served.as_deref() == Some(&served) {
            return false;
        }
        let served = Arc::new(served);
        for kind in GATEWAY_KINDS {
            match served.get(&kind) {
                Some(resource) => self.follow(kind, resource),
                None => self.unfollow(kind),
            }
        }
        tracing::info!(served = served_versions(Some(&served)), "versions of the Gateway API chosen");
        self.store.set_served(&served);
        *lock(&self.health.served) = Arc::clone(&served);
        self.served = Some(served);
        true
    }

    fn follow(&mut self, kind: Kind, resource: &ApiResource) {
        let namespaces: Vec<Option<String>> = match self.namespaces.as_slice() {
            namespaces if namespaces.is_empty() || kind.is_cluster_scoped() => vec![None],
            namespaces => namespaces.iter().cloned().map(Some).collect(),
        };
        for namespace in namespaces {
            let scope = Scope { kind, namespace };
            if self.watches.get(&scope).is_some_and(|(before, _)| before == resource) {
                continue;
            }
            self.next_epoch += 1;
            self.store.begin(scope.clone(), self.next_epoch);
            let watch = reflector::reflect(
                self.client.clone(),
                scope.clone(),
                resource.clone(),
                self.next_epoch,
                self.messages.0.clone(),
            );
            let task = tokio::spawn(watch).abort_handle();
            if let Some((_, before)) = self.watches.insert(scope, (resource.clone(), task)) {
                before.abort();
            }
        }
    }

    fn unfollow(&mut self, kind: Kind) {
        let store = &mut self.store;
        self.watches.retain(|scope, (_, task)| {
            if scope.kind == kind {
                task.abort();
                store.end(scope);
            }
            scope.kind != kind
        });
    }

    /// Yields whether a CRD of the Gateway API has changed.
    fn crd_changed(
        &mut self,
        event: Event<PartialObjectMeta<DynamicObject>>,
        named: &mut BTreeSet<String>,
    ) -> bool {
        let crd = |object: &PartialObjectMeta<DynamicObject>| {
            let name = object.meta().name.clone()?;
            name.split_once('.').is_some_and(|(_, group)| group == GATEWAY_GROUP).then_some(name)
        };
        match event {
            Event::Init => {
                named.clear();
                false
            }
            Event::InitApply(object) | Event::Apply(object) => {
                let Some(name) = crd(&object) else { return false };
                let release =
                    object.meta().annotations.as_ref().and_then(|it| it.get(BUNDLE_VERSION)).cloned();
                self.store.set_release(&name, release);
                named.insert(name);
                true
            }
            Event::Delete(object) => {
                let Some(name) = crd(&object) else { return false };
                self.store.forget_release(&name);
                named.remove(&name);
                true
            }
            Event::InitDone => {
                self.store.retain_releases(named);
                self.knows_release = true;
                true
            }
        }
    }

    fn note_failure(&self, kind: Kind, failure: &reflector::WatchFailure) {
        if let Some(count) = self.health.failures.get(&kind) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        match failure.code {
            // What was remembered is too old, which happens in every cluster: everything is listed again.
            Some(410) => tracing::debug!(%kind, error = failure.message, "a watch starts over"),
            _ => {
                tracing::warn!(%kind, error = failure.message, "a watch of the Kubernetes API failed: what was read before stays in force; trying again");
            }
        }
    }

    fn stop(self) {
        for (_, task) in self.watches.into_values() {
            task.abort();
        }
    }
}

/// Waits until a time; for ever if there is none.
pub(crate) async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The next event; waits for ever if nothing is followed.
async fn next<T>(events: &mut Option<mpsc::Receiver<T>>) -> T {
    if let Some(events) = events
        && let Some(event) = events.recv().await
    {
        return event;
    }
    std::future::pending().await
}

fn served_versions(served: Option<&Served>) -> String {
    let versions = GATEWAY_KINDS.into_iter().map(|kind| {
        let version = served.and_then(|it| it.get(&kind)).map_or("not served", |it| it.version.as_str());
        format!("{kind} {version}")
    });
    versions.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
