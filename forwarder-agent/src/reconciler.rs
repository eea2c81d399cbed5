//! Applies plans: binds and unbinds listeners, routes them, and writes the datapath's maps. What fails is kept as an
//! error of its listener and tried again; everything else goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::io::Errno;

use crate::balancer::Balancer;
use crate::counters::PerWorker;
use crate::datapath::{BackendEntry, Datapath, ListenerId, ListenerState};
use crate::listener::{self, BoundListener, Serving};
use crate::model::{BackendKey, Listener, ListenerKey, RouteTable, Target};
use crate::plan::{self, Op};
use crate::status::BindFailure;
use crate::upstream::Upstream;
use crate::worker::Workers;

/// What is in force, readable at any time by the admin endpoint.
pub type Shared = Arc<Mutex<InForce>>;

/// What is in force.
pub struct InForce {
    /// The table that was applied last.
    pub table: RouteTable,
    /// The socket of each listener of the table, or why there is none.
    pub sockets: BTreeMap<ListenerKey, SocketState>,
    /// The backends of the table.
    pub upstreams: BTreeMap<BackendKey, Arc<Upstream>>,
    /// The kernel's view, where there is one.
    pub datapath: Option<Box<dyn Datapath>>,
    users: BTreeMap<BackendKey, BTreeSet<ListenerKey>>,
    next_id: u32,
}

/// The sockets of a listener.
#[derive(Debug)]
pub enum SocketState {
    /// Bound and accepting.
    Bound(Arc<BoundListener>),
    /// Not bound: nobody is served, and it is tried again.
    Failed(io::Error),
}

impl InForce {
    /// Nothing yet.
    pub fn new(datapath: Option<Box<dyn Datapath>>) -> Self {
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
                SocketState::Failed(error) => Some(BindFailure {
                    listener: self.table.listeners.get(key)?.name.clone(),
                    key: *key,
                    message: bind_message(*key, error),
                    address_missing: Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL),
                }),
            })
            .collect()
    }

    fn serving(&self, listener: &Listener) -> Serving {
        let backends = listener.route.iter().flat_map(|route| &route.backends);
        Serving {
            listener: listener.clone(),
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
                let endpoints = upstream.endpoints.load_full();
                let entry = move |address: &_| BackendEntry { address: *address, weight };
                endpoints.iter().map(entry).collect::<Vec<_>>()
            })
            .collect();
        self.with_datapath(|datapath| datapath.set_backends(id, entries));
    }

    /// A failure of the maps takes counters away, never traffic: it is logged.
    fn with_datapath(
        &mut self,
        operation: impl FnOnce(&mut dyn Datapath) -> Result<(), crate::datapath::DatapathError>,
    ) {
        if let Some(datapath) = &mut self.datapath
            && let Err(error) = operation(datapath.as_mut())
        {
            tracing::warn!(%error, "the kernel's view of the listeners is incomplete; traffic is not affected");
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

/// Why a listener is not bound, in words, with the number that programs look for.
fn bind_message(key: ListenerKey, error: &io::Error) -> String {
    match Errno::from_io_error(error) {
        Some(Errno::ADDRINUSE) => {
            format!(
                "port {} is held by another process (EADDRINUSE): stop it, or choose another port",
                key.port
            )
        }
        Some(Errno::ADDRNOTAVAIL) => {
            format!("this node does not have the address {} (EADDRNOTAVAIL)", key.address)
        }
        Some(Errno::ACCESS) => {
            format!("no permission to bind port {} (EACCES): grant CAP_NET_BIND_SERVICE", key.port)
        }
        _ => format!("cannot bind {key}: {error}"),
    }
}

/// The workers and what is in force.
pub struct Reconciler {
    workers: Workers,
    keepalive: Option<Duration>,
    in_force: Shared,
}

impl Reconciler {
    /// A reconciler with nothing in force.
    pub fn new(workers: Workers, keepalive: Option<Duration>, in_force: Shared) -> Self {
        Self { workers, keepalive, in_force }
    }

    /// The workers, for draining and stopping.
    pub fn into_workers(self) -> Workers {
        self.workers
    }

    fn lock(&self) -> MutexGuard<'_, InForce> {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings `want` into force. Listeners, routes and endpoints that do not change are not touched.
    pub async fn apply(&self, want: &RouteTable) {
        let ops = plan::plan(want, &self.lock().table);
        for op in ops {
            tracing::debug!(?op, "applying");
            if let Op::RemoveListener(key) = &op {
                self.remove(*key).await;
            } else {
                self.apply_one(&op);
            }
            plan::apply(&mut self.lock().table, op);
        }
    }

    fn apply_one(&self, op: &Op) {
        let mut in_force = self.lock();
        match op {
            // It waits for the workers: see `apply`.
            Op::RemoveListener(_) => {}
            Op::SetEndpoints { backend, endpoints } => {
                if let Some(upstream) = in_force.upstreams.get(backend) {
                    upstream.set_endpoints(endpoints);
                    for key in in_force.users.get(backend).cloned().unwrap_or_default() {
                        in_force.write_backends(key);
                    }
                } else {
                    let upstream = Upstream::new(backend.clone(), endpoints, self.workers.count());
                    in_force.upstreams.insert(backend.clone(), Arc::new(upstream));
                }
            }
            Op::AddListener { key, listener } => {
                in_force.set_users(*key, None, Some(listener));
                self.bind(&mut in_force, *key, listener);
            }
            Op::UpdateListener { key, listener } => {
                let old = in_force.table.listeners.get(key).cloned();
                in_force.set_users(*key, old.as_ref(), Some(listener));
                let serving = in_force.serving(listener);
                if let Some(SocketState::Bound(bound)) = in_force.sockets.get(key) {
                    bound.serving.store(Arc::new(serving));
                    in_force.write_backends(*key);
                }
            }
            Op::RemoveBackend(backend) => {
                in_force.upstreams.remove(backend);
            }
        }
    }

    fn bind(&self, in_force: &mut InForce, key: ListenerKey, listener: &Listener) {
        let state = match listener::bind(key, self.workers.count(), self.keepalive) {
            Ok(sockets) => {
                let id = ListenerId(in_force.next_id);
                in_force.next_id += 1;
                let bound = Arc::new(BoundListener {
                    id,
                    key,
                    serving: ArcSwap::from_pointee(in_force.serving(listener)),
                    counters: PerWorker::new(self.workers.count()),
                    turn: AtomicU64::new(0),
                });
                self.workers.listen(sockets, &bound);
                in_force.with_datapath(|datapath| datapath.set_listener(key, id, ListenerState::Ready));
                tracing::info!(listener = %listener.name, address = %key, "listening");
                SocketState::Bound(bound)
            }
            Err(error) => {
                if !matches!(in_force.sockets.get(&key), Some(SocketState::Failed(former)) if former.raw_os_error() == error.raw_os_error())
                {
                    tracing::error!(
                        listener = %listener.name,
                        address = %key,
                        error = %bind_message(key, &error),
                        "cannot listen; trying again until it works"
                    );
                }
                SocketState::Failed(error)
            }
        };
        in_force.sockets.insert(key, state);
        in_force.write_backends(key);
    }

    async fn remove(&self, key: ListenerKey) {
        let removed = {
            let mut in_force = self.lock();
            let old = in_force.table.listeners.get(&key).cloned();
            in_force.set_users(key, old.as_ref(), None);
            in_force.sockets.remove(&key)
        };
        if let Some(SocketState::Bound(bound)) = removed {
            self.workers.unlisten(bound.id).await;
            self.lock().with_datapath(|datapath| datapath.remove_listener(key, bound.id));
            tracing::info!(listener = %bound.serving.load().listener.name, address = %key, "no longer listening");
        }
    }

    /// Tries again to bind what could not be bound; tells whether anything changed.
    pub fn retry(&self) -> bool {
        let mut in_force = self.lock();
        let failed: Vec<_> = in_force
            .sockets
            .iter()
            .filter(|(_, state)| matches!(state, SocketState::Failed(_)))
            .map(|(key, _)| *key)
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

    /// Stops accepting, lets connections end, and resets the remainder towards the end of `window`.
    pub async fn drain(&self, window: Duration) {
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
        self.workers.drain(window).await;
    }
}
