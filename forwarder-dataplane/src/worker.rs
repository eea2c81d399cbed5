//! A worker: one thread, one event loop, its share of every listener's connections.
//!
//! Each worker accepts on sockets of its own (`SO_REUSEPORT`) and relays what it accepted without crossing to another
//! core. Only where the kernel's spreading left it with more connections than its neighbours does it hand a new one over.

mod accepting;
mod connections;
pub mod drain;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_utils::CachePadded;
use slab::Slab;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep};

use crate::connection::{self, Action, Connection};
use crate::counters::{End, PerWorker, WorkerCounters};
use crate::listener::BoundListener;
use crate::upstream;
use crate::view::{ConnectionView, Selector};
use crate::worker::drain::{DRAIN_SWEEP_PERIOD, SWEEP_PERIOD, left_of_drain};
use crate::worker_context::{WorkerContext, WorkerSettings};
use forwarder_kernel::maps::ListenerId;

pub use self::connections::{Answers, WorkerConnections};

/// The threads beside the workers that write counters: the one of pairs at TC, and the one of tier `sockmap`.
const OFFLOAD_THREADS: usize = 2;
/// For how long a worker lets its connections carry out what they are asked for last. Those that do not are reset by their sockets' close, but what
/// is joined in the kernel knows numbers that its sockets do not.
const LAST_ACTION: Duration = Duration::from_secs(2);

/// Something for a worker to do.
#[derive(Debug)]
enum Command {
    Listen { socket: std::net::TcpListener, listener: Arc<BoundListener> },
    Unlisten { id: ListenerId, done: oneshot::Sender<()> },
    StopListening { done: oneshot::Sender<()> },
    Adopt { socket: std::net::TcpStream, peer: SocketAddr, listener: Arc<BoundListener> },
    Offload,
    Drain { window: Duration, done: oneshot::Sender<()> },
    List { selector: Arc<Selector>, answer: oneshot::Sender<Vec<ConnectionView>> },
    Reset { selector: Arc<Selector>, answer: oneshot::Sender<usize> },
}

/// The workers of an agent.
#[derive(Debug)]
pub struct Workers {
    commands: Vec<mpsc::UnboundedSender<Command>>,
    threads: Vec<JoinHandle<()>>,
    /// What they counted.
    pub counters: Arc<PerWorker<WorkerCounters>>,
}

impl Workers {
    /// Starts `count` workers.
    ///
    /// # Errors
    /// A thread or an event loop could not be made.
    pub fn start(count: usize, settings: WorkerSettings) -> io::Result<Self> {
        let (commands, receivers): (Vec<_>, Vec<_>) =
            (0..count).map(|_| mpsc::unbounded_channel::<Command>()).unzip();
        let loads: Arc<[_]> = (0..count).map(|_| CachePadded::new(AtomicUsize::new(0))).collect();
        let counters = Arc::new(PerWorker::new(count + OFFLOAD_THREADS));
        let mut threads = Vec::new();
        for (index, receiver) in receivers.into_iter().enumerate() {
            let (settings, loads) = (settings.clone(), Arc::clone(&loads));
            // Weak, so that the workers end when the agent drops its senders.
            let peers = commands.iter().map(mpsc::UnboundedSender::downgrade).collect();
            let counters = Arc::clone(&counters);
            let (started, start) = std::sync::mpsc::channel();
            let body = move || {
                // An event loop stays on the thread that made it.
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build_local(tokio::runtime::LocalOptions::default());
                let runtime = match runtime {
                    Ok(runtime) => runtime,
                    Err(error) => return drop(started.send(Err(error))),
                };
                let _ = started.send(Ok(()));
                let context = WorkerContext::new(index, settings, counters);
                let worker = Rc::new(Worker { context, loads, peers, connections: RefCell::default() });
                runtime.block_on(command_loop(worker, receiver));
            };
            threads.push(std::thread::Builder::new().name(format!("worker-{index}")).spawn(body)?);
            start.recv().map_err(io::Error::other)??;
        }
        Ok(Self { commands, threads, counters })
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.commands.len()
    }

    /// How many write counters: the workers, and, in the last places, who looks after offloaded pairs of either tier.
    pub fn slots(&self) -> usize {
        self.commands.len() + OFFLOAD_THREADS
    }

    /// Starts to accept on `sockets`, one for each worker.
    pub fn listen(&self, sockets: Vec<std::net::TcpListener>, listener: &Arc<BoundListener>) {
        for (worker, socket) in self.commands.iter().zip(sockets) {
            // A worker ends only after its command channel has been closed.
            let _ = worker.send(Command::Listen { socket, listener: Arc::clone(listener) });
        }
    }

    /// Stops accepting on a listener, once what waits in its backlog has been accepted; this ends no connection. Returns
    /// when the port is free.
    pub async fn unlisten(&self, id: ListenerId) {
        self.everywhere(|done| Command::Unlisten { id, done }).await;
    }

    /// The same for every listener.
    pub async fn stop_listening(&self) {
        self.everywhere(|done| Command::StopListening { done }).await;
    }

    /// Has every connection taken into the kernel that can be.
    pub fn offload_all(&self) {
        for worker in &self.commands {
            let _ = worker.send(Command::Offload);
        }
    }

    /// Lets connections end for most of `window`, and resets the remainder spread over its last part.
    pub async fn drain(&self, window: Duration) {
        self.everywhere(|done| Command::Drain { window, done }).await;
    }

    /// Has every worker carry out a command, and waits until all have.
    async fn everywhere(&self, command: impl Fn(oneshot::Sender<()>) -> Command) {
        let mut waiting = Vec::new();
        for worker in &self.commands {
            let (done, finished) = oneshot::channel();
            let _ = worker.send(command(done));
            waiting.push(finished);
        }
        for finished in waiting {
            // A worker that has ended has nothing left to do.
            let _ = finished.await;
        }
    }

    /// Ends the workers at once; connections that are left are reset.
    pub fn stop(self) {
        drop(self.commands);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// The state of one worker, shared by the tasks on its thread.
struct Worker {
    context: WorkerContext,
    loads: Arc<[CachePadded<AtomicUsize>]>,
    peers: Vec<mpsc::WeakUnboundedSender<Command>>,
    connections: RefCell<Slab<Rc<Connection>>>,
}

impl Worker {
    fn load(&self) -> &AtomicUsize {
        self.loads.get(self.context.index()).expect("a load for each worker")
    }

    /// Why no connection is to be accepted now, if so: those that come wait in the backlog.
    fn is_full(&self) -> Option<&'static str> {
        let descriptors = &self.context.settings().connect.descriptors;
        if descriptors.waiting() > 0 {
            return Some("accepted connections wait for a socket to connect their backend with");
        }
        let relayed: usize = self.loads.iter().map(|load| load.load(Ordering::Relaxed)).sum();
        let joined =
            self.context.settings().sockmap.get().and_then(|pairs| Some(pairs.as_ref().ok()?.count()));
        (relayed + joined.unwrap_or_default() >= descriptors.max_connections())
            .then_some("as many connections are open as there are descriptors for")
    }

    /// The least busy other worker, where this one has clearly more connections.
    fn relief(&self) -> Option<usize> {
        let mine = self.load().load(Ordering::Relaxed);
        let (index, least) = self
            .loads
            .iter()
            .map(|load| load.load(Ordering::Relaxed))
            .enumerate()
            .min_by_key(|(_, load)| *load)?;
        (mine > least + least / 2).then_some(index)
    }

    /// Takes a connection that was accepted: serves it here, or hands it to the least busy worker.
    fn take(self: &Rc<Self>, downstream: TcpStream, peer: SocketAddr, listener: &Arc<BoundListener>) {
        if let Some(other) = self.relief()
            && let Some(sender) = self.peers.get(other).and_then(mpsc::WeakUnboundedSender::upgrade)
        {
            let Ok(socket) = downstream.into_std() else { return };
            let command = Command::Adopt { socket, peer, listener: Arc::clone(listener) };
            // Counted here, so that the next choice sees it.
            self.loads.get(other).expect("a load for each worker").fetch_add(1, Ordering::Relaxed);
            self.context.counters().handed_over.add(1);
            // A worker ends only when the agent does: the socket then closes with the command.
            let _ = sender.send(command);
        } else {
            self.load().fetch_add(1, Ordering::Relaxed);
            self.serve(downstream, peer, listener);
        }
    }

    /// Serves a connection that is counted in this worker's load.
    fn serve(self: &Rc<Self>, downstream: TcpStream, peer: SocketAddr, listener: &Arc<BoundListener>) {
        let connection =
            Rc::new(Connection::new(Arc::clone(listener), peer, self.context.index(), self.context.sweep()));
        let slot = self.connections.borrow_mut().insert(Rc::clone(&connection));
        let worker = Rc::clone(self);
        tokio::task::spawn_local(async move {
            connection::serve(&worker.context, downstream, connection).await;
            worker.connections.borrow_mut().remove(slot);
            worker.load().fetch_sub(1, Ordering::Relaxed);
        });
    }

    /// Has every connection taken into the kernel that can be, and those to come as soon as they can.
    fn offload_all(&self) {
        self.context.offload_all();
        for (_, connection) in self.connections.borrow().iter() {
            connection.offload_now();
        }
    }

    /// Gives every connection what is due to it.
    fn sweep_connections(&self) {
        let sweep = self.context.next_sweep();
        let patience = self.context.settings().connect.keepalive.map(upstream::patience);
        for (_, connection) in self.connections.borrow().iter() {
            if let Some(action) = connection.due(sweep, SWEEP_PERIOD, patience) {
                connection.ask_for(action);
            }
        }
    }
}

async fn command_loop(worker: Rc<Worker>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut accepting: HashMap<ListenerId, oneshot::Sender<oneshot::Sender<()>>> = HashMap::new();
    tokio::task::spawn_local(sweep_for_ever(Rc::clone(&worker)));
    while let Some(command) = commands.recv().await {
        match command {
            Command::Listen { socket, listener } => match TcpListener::from_std(socket) {
                Ok(socket) => {
                    let (stop, stopped) = oneshot::channel();
                    accepting.insert(listener.id, stop);
                    tokio::task::spawn_local(accepting::accept(
                        Rc::clone(&worker),
                        socket,
                        listener,
                        stopped,
                    ));
                }
                Err(error) => {
                    tracing::error!(listener = %listener.key, %error, "cannot watch a listener's socket: one worker does not accept on it");
                }
            },
            Command::Unlisten { id, done } => {
                if let Some(stop) = accepting.remove(&id) {
                    let _ = stop.send(done);
                }
            }
            Command::Adopt { socket, peer, listener } => match TcpStream::from_std(socket) {
                Ok(downstream) => worker.serve(downstream, peer, &listener),
                Err(error) => {
                    tracing::warn!(%error, "cannot watch a connection that another worker accepted: it is reset");
                    worker.load().fetch_sub(1, Ordering::Relaxed);
                }
            },
            Command::Offload => worker.offload_all(),
            Command::StopListening { done } => {
                let closed: Vec<_> = accepting.drain().map(|(_, stop)| closed(stop)).collect();
                tokio::task::spawn_local(async move {
                    for closed in closed {
                        // A listener that could not be watched has been closed before.
                        let _ = closed.await;
                    }
                    let _ = done.send(());
                });
            }
            Command::Drain { window, done } => {
                tokio::task::spawn_local(drain(Rc::clone(&worker), window, done));
            }
            Command::List { selector, answer } => {
                tokio::task::spawn_local(connections::list(Rc::clone(&worker), selector, answer));
            }
            Command::Reset { selector, answer } => {
                tokio::task::spawn_local(connections::reset(Rc::clone(&worker), selector, answer));
            }
        }
    }
    // The agent ends: what is left is reset.
    accepting.clear();
    for (_, connection) in worker.connections.borrow().iter() {
        connection.ask_for(Action::End(End::Drained));
    }
    let deadline = Instant::now() + LAST_ACTION;
    while !worker.connections.borrow().is_empty() && Instant::now() < deadline {
        tokio::task::yield_now().await;
    }
}

/// Has a listener's task stop; says when its socket is closed.
fn closed(stop: oneshot::Sender<oneshot::Sender<()>>) -> oneshot::Receiver<()> {
    let (done, closed) = oneshot::channel();
    let _ = stop.send(done);
    closed
}

async fn sweep_for_ever(worker: Rc<Worker>) {
    loop {
        sleep(SWEEP_PERIOD).await;
        worker.sweep_connections();
    }
}

/// Waits for connections to end, and ends the remainder one after the other in the last part of the window.
async fn drain(worker: Rc<Worker>, window: Duration, done: oneshot::Sender<()>) {
    let start = Instant::now();
    let mut remaining = None;
    loop {
        sleep(DRAIN_SWEEP_PERIOD.min(window)).await;
        let connections = worker.connections.borrow();
        if connections.is_empty() {
            break;
        }
        let Some(keep) = left_of_drain(start.elapsed(), window, &mut remaining, connections.len()) else {
            continue;
        };
        let surplus = connections.len().saturating_sub(keep);
        for (_, connection) in connections.iter().take(surplus) {
            connection.ask_for(Action::End(End::Drained));
        }
    }
    // The agent may have stopped waiting.
    let _ = done.send(());
}
