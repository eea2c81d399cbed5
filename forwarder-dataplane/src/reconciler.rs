//! Applies plans: binds and unbinds listeners, routes them, and writes the datapath's maps. What fails is kept as an
//! error of its listener and tried again; everything else goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::io::Errno;

use crate::counters::PerWorker;
use crate::listener::failure::{Failure, Occasion};
use crate::listener::occupied::{ListeningSocket, listening_sockets};
use crate::listener::{self, BoundListener, ListenSettings, RouteSnapshot};
use crate::removal::{Removals, Removed};
use crate::upstream::Upstream;
use crate::upstream::balancer::Balancer;
use crate::worker::Workers;
use forwarder_gateway::model::{BackendKey, Listener, ListenerKey, ListenerName, RouteTable, Target};
use forwarder_gateway::plan::{self, Op};
use forwarder_gateway::status::BindFailure;
use forwarder_kernel::listener_maps::ListenerMaps;
use forwarder_kernel::maps::{BackendEntry, ListenerId, ListenerState};
use forwarder_runtime::lock::lock;

/// What is in force, readable at any time by the admin endpoint.
pub type SharedInForce = Arc<Mutex<InForce>>;

/// What is in force.
pub struct InForce {
    /// The table that was applied last.
    pub table: RouteTable,
    /// The socket of each listener of the table, or why there is none.
    pub sockets: BTreeMap<ListenerKey, SocketState>,
    /// The backends of the table.
    pub upstreams: BTreeMap<BackendKey, Arc<Upstream>>,
    /// The kernel's view, where there is one.
    pub datapath: Option<Box<dyn ListenerMaps>>,
    users: BTreeMap<BackendKey, BTreeSet<ListenerKey>>,
    next_id: u32,
}

/// The sockets of a listener.
#[derive(Debug)]
pub enum SocketState {
    /// Bound and accepting.
    Bound(Arc<BoundListener>),
    /// Not bound: nobody is served, and it is tried again.
    Failed(Failure),
}

impl InForce {
    /// Nothing yet.
    pub fn new(datapath: Option<Box<dyn ListenerMaps>>) -> Self {
        Self {
            table: RouteTable::default(),
            sockets: BTreeMap::new(),
            upstreams: BTreeMap::new(),
            datapath,
            users: BTreeMap::new(),
            next_id: 1,
        }
    }

    /// The listeners that are not bound, for statuses.
    pub fn bind_failures(&self) -> Vec<BindFailure> {
        self.sockets
            .iter()
            .filter_map(|(key, state)| match state {
                SocketState::Bound(_) => None,
                SocketState::Failed(failure) => Some(BindFailure {
                    listener: self.table.listeners.get(key)?.name.clone(),
                    key: *key,
                    message: failure.message(*key),
                    address_missing: failure.errno() == Some(Errno::ADDRNOTAVAIL),
                    since: failure.since,
                }),
            })
            .collect()
    }

    fn serving(&self, listener: &Arc<Listener>) -> RouteSnapshot {
        let backends = listener.route.iter().flat_map(|route| &route.backends);
        RouteSnapshot {
            listener: Arc::clone(listener),
            balancer: Balancer::new(backends.clone().map(|backend| backend.weight)),
            upstreams: backends
                .map(|backend| match &backend.target {
                    Target::Service(key) => self.upstreams.get(key).cloned(),
                    Target::Invalid { .. } => None,
                })
                .collect(),
        }
    }

    /// Writes a listener's endpoints for the kernel.
    fn write_backends(&mut self, key: ListenerKey) {
        let Some(SocketState::Bound(bound)) = self.sockets.get(&key) else { return };
        let id = bound.id;
        let serving = bound.serving.load_full();
        let backends = serving.listener.route.iter().flat_map(|route| &route.backends);
        let entries = backends
            .zip(&serving.upstreams)
            .filter_map(|(backend, upstream)| Some((backend.weight, upstream.as_ref()?)))
            .flat_map(|(weight, upstream)| {
                let endpoints = Arc::clone(upstream.endpoints.load().eligible());
                let entry = move |address: &_| BackendEntry { address: *address, weight };
                endpoints.iter().map(entry).collect::<Vec<_>>()
            })
            .collect();
        self.with_datapath(|datapath| datapath.set_backends(id, entries));
    }

    /// A failure of the maps takes counters away, never traffic: it is logged.
    fn with_datapath(
        &mut self,
        operation: impl FnOnce(&mut dyn ListenerMaps) -> Result<(), forwarder_kernel::maps::DatapathError>,
    ) {
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = operation(datapath.as_mut())
        {
            tracing::warn!(%error, "cannot write a listener to the BPF maps: its packets are not counted; traffic is not affected");
        }
    }

    /// Has the kernel know which clients a listener lets in, and how often.
    fn write_clients(&mut self, key: ListenerKey, id: ListenerId, listener: &Listener) {
        let client_rate = listener.settings.client_rate.map_or(0, NonZeroU32::get);
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = datapath.set_clients(key, id, &listener.settings.client_cidrs, client_rate)
        {
            tracing::warn!(listener = %listener.name, %error, "cannot tell the BPF programs which clients the listener lets in, and how often: those that it refuses are accepted and reset, instead of being dropped, a new limit does not hold, and the listener is not direct; trying again");
        }
    }

    /// Tells where nothing limits how often a client may connect, if that is to be limited and was not before.
    fn warn_if_unlimited(&self, before: Option<&Listener>, listener: &Listener) {
        let client_rate = listener.settings.client_rate;
        if self.datapath.is_none()
            && client_rate.is_some()
            && before.map(|before| before.settings.client_rate) != Some(client_rate)
        {
            tracing::warn!(listener = %listener.name, client_rate, "no BPF program limits how often a client may connect to the listener; `forwarder probe` tells why there is none");
        }
    }

    /// What connections may rely on that an operation, which has not been performed yet, removes: by their listeners.
    fn removed_by(&self, op: &Op) -> Vec<(Arc<BoundListener>, Removed)> {
        let of = |key: &ListenerKey, removed: Removed| match self.sockets.get(key) {
            Some(SocketState::Bound(bound)) => Some((Arc::clone(bound), removed)),
            Some(SocketState::Failed(_)) | None => None,
        };
        match op {
            Op::RemoveListener(key) => of(key, Removed::Listener).into_iter().collect(),
            Op::SetEndpoints { backend, endpoints } => {
                let before = self.table.backends.get(backend).into_iter().flat_map(|before| before.iter());
                // They are sorted.
                let gone = before.filter(|one| endpoints.binary_search(one).is_err());
                let gone: Arc<[_]> = gone.copied().collect();
                let users = self.users.get(backend).filter(|_| !gone.is_empty()).into_iter().flatten();
                let removed = || Removed::Endpoints { backend: backend.clone(), gone: Arc::clone(&gone) };
                users.filter_map(|key| of(key, removed())).collect()
            }
            Op::UpdateListener { key, listener } => {
                let before = self.table.listeners.get(key).into_iter().flat_map(|it| backend_keys(it));
                let gone = before.filter(|before| !backend_keys(listener).any(|after| after == *before));
                let gone: Vec<_> = gone.cloned().collect();
                let removed = (!gone.is_empty()).then_some(Removed::Backends(gone));
                removed.and_then(|removed| of(key, removed)).into_iter().collect()
            }
            Op::AddListener { .. } | Op::RemoveBackend(_) => Vec::new(),
        }
    }

    fn set_users(&mut self, key: ListenerKey, old: Option<&Listener>, new: Option<&Listener>) {
        for backend in old.into_iter().flat_map(backend_keys) {
            if let Some(users) = self.users.get_mut(backend) {
                users.remove(&key);
                if users.is_empty() {
                    self.users.remove(backend);
                }
            }
        }
        for backend in new.into_iter().flat_map(backend_keys) {
            self.users.entry(backend.clone()).or_default().insert(key);
        }
    }
}

fn backend_keys(listener: &Listener) -> impl Iterator<Item = &BackendKey> {
    listener.route.iter().flat_map(|route| &route.backends).filter_map(|backend| match &backend.target {
        Target::Service(key) => Some(key),
        Target::Invalid { .. } => None,
    })
}

/// Logs how the endpoints of a backend change; both lists are sorted.
fn log_endpoints(backend: &BackendKey, before: &[SocketAddr], after: &[SocketAddr]) {
    let missing_in = |these: &[SocketAddr], others: &[SocketAddr]| {
        these.iter().filter(|one| others.binary_search(one).is_err()).count()
    };
    let (come, gone) = (missing_in(after, before), missing_in(before, after));
    tracing::info!(backend = %backend, come, gone, endpoints = after.len(), "the endpoints of a backend have changed");
}

/// Logs how the route of a listener changes.
fn log_route(before: Option<&Listener>, after: &Listener) {
    let route = |listener: &Listener| listener.route.as_ref().map(|route| route.name.clone());
    let listener = &after.name;
    match (before.and_then(route), route(after)) {
        (Some(route), None) => {
            tracing::warn!(%listener, former = %route, "no TCPRoute serves the listener any more: new connections are reset; the conditions of the route say why, if it is still there");
        }
        (None, Some(route)) => tracing::info!(%listener, %route, "a route now serves the listener"),
        (Some(former), Some(route)) if former != route => {
            tracing::info!(%listener, %route, %former, "another route now serves the listener");
        }
        (Some(route), Some(_)) if before.map(|before| &before.route) != Some(&after.route) => {
            tracing::info!(%listener, %route, "the backends of a listener's route have changed");
        }
        (Some(_), Some(_)) | (None, None) => {}
    }
}

fn log_failure(key: ListenerKey, listener: &ListenerName, failure: &Failure) {
    let is_in_use = failure.errno() == Some(Errno::ADDRINUSE);
    let listening = if is_in_use { listening_sockets().unwrap_or_default() } else { Vec::new() };
    let holder =
        listening.iter().find(|socket| socket.is_in_the_way_of(key)).and_then(ListeningSocket::process);
    tracing::error!(
        %listener,
        address = %key,
        error = %failure.message(key),
        holder,
        "cannot listen: the listener's clients are refused; trying again until it works"
    );
}

/// The workers and what is in force.
pub struct Reconciler {
    workers: Workers,
    settings: ListenSettings,
    in_force: SharedInForce,
}

impl Reconciler {
    /// A reconciler with nothing in force.
    pub fn new(workers: Workers, settings: ListenSettings, in_force: SharedInForce) -> Self {
        Self { workers, settings, in_force }
    }

    /// The workers, for draining and stopping.
    pub fn into_workers(self) -> Workers {
        self.workers
    }

    fn lock(&self) -> MutexGuard<'_, InForce> {
        lock(&self.in_force)
    }

    /// Brings `want` into force. Listeners, routes and endpoints that do not change are not touched.
    pub async fn apply(&self, want: &RouteTable) {
        let ops = plan::plan(want, &self.lock().table);
        self.perform(ops).await;
    }

    /// Performs operations that a plan for the table in force would hold, in their order.
    pub async fn perform(&self, ops: Vec<Op>) {
        let mut removed = Vec::new();
        for op in ops {
            tracing::debug!(?op, "applying");
            removed.extend(self.lock().removed_by(&op));
            if let Op::RemoveListener(key) = &op {
                self.remove(*key).await;
            } else {
                self.apply_one(&op);
            }
            plan::apply(&mut self.lock().table, op);
        }
        // Noted when all is in force, so that settings count that came with it.
        for (listener, removed) in removed {
            tracing::debug!(listener = %listener.key, ?removed, "removed");
            listener.removals.note(removed, &listener.serving.load().listener.settings);
        }
    }

    fn apply_one(&self, op: &Op) {
        let mut in_force = self.lock();
        match op {
            // It waits for the workers: see `apply`.
            Op::RemoveListener(_) => {}
            Op::SetEndpoints { backend, endpoints } => {
                if let Some(upstream) = in_force.upstreams.get(backend) {
                    log_endpoints(backend, upstream.endpoints.load().all(), endpoints);
                    upstream.set_endpoints(endpoints);
                    for key in in_force.users.get(backend).cloned().unwrap_or_default() {
                        in_force.write_backends(key);
                    }
                } else {
                    let upstream = Upstream::new(backend.clone(), endpoints, self.workers.slots());
                    in_force.upstreams.insert(backend.clone(), Arc::new(upstream));
                }
            }
            Op::AddListener { key, listener } => {
                in_force.set_users(*key, None, Some(listener));
                self.bind(&mut in_force, *key, listener);
            }
            Op::UpdateListener { key, listener } => {
                let old = in_force.table.listeners.get(key).cloned();
                log_route(old.as_deref(), listener);
                in_force.set_users(*key, old.as_deref(), Some(listener));
                let serving = in_force.serving(listener);
                if let Some(SocketState::Bound(bound)) = in_force.sockets.get(key) {
                    bound.serving.store(Arc::new(serving));
                    let id = bound.id;
                    in_force.write_clients(*key, id, listener);
                    in_force.warn_if_unlimited(old.as_deref(), listener);
                    in_force.write_backends(*key);
                }
            }
            Op::RemoveBackend(backend) => {
                in_force.upstreams.remove(backend);
            }
        }
    }

    fn bind(&self, in_force: &mut InForce, key: ListenerKey, listener: &Arc<Listener>) {
        // A port that cannot be had is tried for ever: it costs no number, and nothing is written for it.
        let id = ListenerId(in_force.next_id);
        let (count, descriptors) = (self.workers.count(), &self.settings.descriptors);
        let taken = descriptors.take(count).map_err(io::Error::other);
        let opened = taken.and_then(|()| {
            listener::bind(key, count, &self.settings).inspect_err(|_| descriptors.give_back(count))
        });
        let opened = opened.and_then(|sockets| {
            // Known to the kernel before the port is open, so that the first SYN is counted.
            in_force.write_clients(key, id, listener);
            in_force.with_datapath(|datapath| datapath.set_listener(key, id, ListenerState::Ready));
            listener::listen(sockets).inspect_err(|_| {
                descriptors.give_back(count);
                in_force.with_datapath(|datapath| datapath.remove_listener(key, id));
            })
        });
        let state = match opened {
            Ok(sockets) => {
                in_force.next_id += 1;
                let bound = Arc::new(BoundListener {
                    id,
                    key,
                    serving: ArcSwap::from_pointee(in_force.serving(listener)),
                    removals: Removals::default(),
                    counters: PerWorker::new(self.workers.slots()),
                    turn: AtomicU64::new(0),
                });
                self.workers.listen(sockets, &bound);
                tracing::info!(listener = %listener.name, address = %key, "listening");
                in_force.warn_if_unlimited(None, listener);
                SocketState::Bound(bound)
            }
            Err(error) => {
                let former = match in_force.sockets.get(&key) {
                    Some(SocketState::Failed(former)) => Some(former),
                    Some(SocketState::Bound(_)) | None => None,
                };
                let failure = Failure::new(error, former);
                if former.is_none_or(|former| former.errno() != failure.errno()) {
                    log_failure(key, &listener.name, &failure);
                }
                SocketState::Failed(failure)
            }
        };
        in_force.sockets.insert(key, state);
        in_force.write_backends(key);
    }

    async fn remove(&self, key: ListenerKey) {
        let removed = {
            let mut in_force = self.lock();
            let old = in_force.table.listeners.get(&key).cloned();
            in_force.set_users(key, old.as_deref(), None);
            in_force.sockets.remove(&key)
        };
        if let Some(SocketState::Bound(bound)) = removed {
            self.workers.unlisten(bound.id).await;
            self.settings.descriptors.give_back(self.workers.count());
            self.lock().with_datapath(|datapath| datapath.remove_listener(key, bound.id));
            tracing::info!(listener = %bound.serving.load().listener.name, address = %key, "no longer listening");
        }
    }

    /// Tries again to bind what could not be bound, where the node lacks an address only if `addresses_changed`, and where another
    /// process had the port only once that has been free for long enough; tells whether anything changed.
    pub fn retry(&self, addresses_changed: bool) -> bool {
        let mut in_force = self.lock();
        let is_in_use = |state: &SocketState| matches!(state, SocketState::Failed(it) if it.errno() == Some(Errno::ADDRINUSE));
        let looks = in_force.sockets.values().any(is_in_use);
        // Where it cannot be seen who listens, the time alone counts.
        let listening = if looks { listening_sockets().unwrap_or_default() } else { Vec::new() };
        let occasion =
            Occasion { addresses_changed, listening: &listening, port_wait: self.settings.port_wait };
        let failed: Vec<_> = in_force
            .sockets
            .iter_mut()
            .filter_map(|(key, state)| match state {
                SocketState::Failed(failure) => failure.is_due(*key, occasion).then_some(*key),
                SocketState::Bound(_) => None,
            })
            .collect();
        let mut changed = false;
        for key in failed {
            if let Some(listener) = in_force.table.listeners.get(&key).cloned() {
                self.bind(&mut in_force, key, &listener);
                changed |= matches!(in_force.sockets.get(&key), Some(SocketState::Bound(_)));
            }
        }
        changed
    }

    /// Removes the listeners that a former agent had and this one has not.
    pub fn remove_former_listeners(&self) {
        self.lock().with_datapath(|datapath| datapath.remove_former_listeners());
    }

    /// Has every connection taken into the kernel that can be.
    pub fn offload_all(&self) {
        self.workers.offload_all();
    }

    /// Stops accepting on every listener, once what waits in its backlog has been accepted. Returns when the ports are free.
    pub async fn stop_listening(&self) {
        {
            let mut in_force = self.lock();
            let bound: Vec<_> = in_force
                .sockets
                .iter()
                .filter_map(|(key, state)| match state {
                    SocketState::Bound(bound) => Some((*key, bound.id)),
                    SocketState::Failed(_) => None,
                })
                .collect();
            for (key, id) in bound {
                in_force.with_datapath(|datapath| datapath.set_listener(key, id, ListenerState::Draining));
            }
        }
        self.workers.stop_listening().await;
    }

    /// Lets connections end, and resets the remainder towards the end of `window`.
    pub async fn drain(&self, window: Duration) {
        self.workers.drain(window).await;
    }
}

#[cfg(test)]
mod tests;
