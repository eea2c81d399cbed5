//! Many conversations through an agent, some at once, each checked at both ends.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use socket2::{Domain, Socket, Type};

use super::play::{PATIENCE, Role, play};
use super::{Kind, Shape};
use crate::agent::Agent;
use crate::datapath::Datapath;
use crate::manifests::{BackendRef, Manifests};
use crate::netns::Topology;
use crate::peer::Server;
use crate::wait::{patient, wait_for};

/// The receive buffer of a slow reader, in bytes.
const SMALL_BUFFER: usize = 16 * 1024;
/// After how many failures a run is given up: each may take as long as the patience of both ends.
const TOO_MANY: usize = 40;
/// The same where conversations follow one another.
const TOO_FEW_LEFT: usize = 3;
/// How many connections of the agent are shown with a failure.
const LISTED: usize = 60;
/// The ports that clients connect from: few, so that each is used again and again.
const CLIENT_PORTS: &str = "20000 23999";
/// Where packets are lost, three SYNs in a row now and then are.
const CONNECT_TIMEOUT: &str = "20s";
/// The stack of a client's thread.
const STACK: usize = 256 * 1024;

/// A listener with its endpoint: who speaks first there, and how the server's sockets are set up.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Door {
    /// The client tells the server the seed.
    ClientFirst,
    /// The server tells the client the seed.
    ServerFirst,
    /// As the first, but the server has small receive buffers.
    SlowServer,
}

impl Door {
    const ALL: [Self; 3] = [Self::ClientFirst, Self::ServerFirst, Self::SlowServer];

    fn of(kind: Kind) -> Self {
        match kind {
            Kind::ServerFirst => Self::ServerFirst,
            Kind::SlowServer => Self::SlowServer,
            Kind::ClientFirst
            | Kind::PingPong
            | Kind::Upload
            | Kind::Download
            | Kind::BothWays
            | Kind::ClientEndsFirst
            | Kind::ServerEndsFirst
            | Kind::ClientResets
            | Kind::ServerResets
            | Kind::SlowClient
            | Kind::IdleThenBusy
            | Kind::Pauses => Self::ClientFirst,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::ClientFirst => "client-first",
            Self::ServerFirst => "server-first",
            Self::SlowServer => "slow-server",
        }
    }

    fn listener_port(self) -> u16 {
        match self {
            Self::ClientFirst => 9001,
            Self::ServerFirst => 9002,
            Self::SlowServer => 9003,
        }
    }

    fn endpoint_port(self) -> u16 {
        match self {
            Self::ClientFirst => 5000,
            Self::ServerFirst => 5001,
            Self::SlowServer => 5002,
        }
    }
}

/// The family of both legs.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Whether tier `tc` is to forward bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Offload {
    /// It fails the test if it does not.
    Expected,
    /// It may refuse what does not fit together.
    Optional,
}

/// A conversation that went wrong.
#[derive(Clone, Debug)]
pub struct Failure {
    /// The seed of its shape.
    pub seed: u64,
    /// What it is about.
    pub kind: Kind,
    /// When it began, after the start of the run.
    pub began: Duration,
    /// How long it took.
    pub took: Duration,
    /// What the agent listed when it had failed.
    pub listed: Vec<String>,
    /// The client's port, if it got one.
    pub port: Option<u16>,
    /// What the client says.
    pub client: String,
    /// What the server says.
    pub server: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { seed, kind, began, took, listed, port, client, server } = self;
        let (began, took) = (began.as_secs_f64(), took.as_secs_f64());
        write!(
            formatter,
            "seed {seed} ({kind:?}), client port {port:?}, began at {began:.3} s, took {took:.3} s\
             \n    client: {client}\n    server: {server}\n    the agent lists:"
        )?;
        listed.iter().try_for_each(|one| write!(formatter, "\n        {one}"))
    }
}

/// An agent between clients and servers that converse.
#[derive(Debug)]
pub struct Stage {
    /// The agent.
    pub agent: Agent,
    /// The network.
    pub topology: Topology,
    datapath: Datapath,
    family: Family,
    board: Arc<Board>,
    _servers: Vec<Server>,
    _manifests: Manifests,
}

impl Stage {
    /// Starts servers on the first host of backends, and an agent.
    pub fn start(topology: Topology, datapath: Datapath, family: Family) -> Result<Self> {
        let board = Arc::new(Board::default());
        let manifests = Manifests::new()?;
        manifests.gateway(&Door::ALL.map(|door| (door.name(), door.listener_port())))?;
        let mut servers = Vec::new();
        for door in Door::ALL {
            let endpoint = match family {
                Family::V4 => topology.backend1_address(door.endpoint_port()),
                Family::V6 => topology.backend1_address_v6(door.endpoint_port()),
            };
            manifests.route(door.name(), &[BackendRef { service: door.name(), weight: 1 }])?;
            manifests.service(door.name(), &[endpoint])?;
            let listener = topology
                .backend1
                .run(|| listen(endpoint, door))
                .with_context(|| format!("listen on {endpoint}"))?;
            let board = Arc::clone(&board);
            servers.push(Server::on(listener, move |stream| {
                serve(stream, door, &board);
                Ok(())
            })?);
        }
        topology.client.sysctl("ipv4/ip_local_port_range", CLIENT_PORTS)?;
        // Also those of connections that the client has ended first.
        topology.client.sysctl("ipv4/tcp_tw_reuse", "1")?;
        let command = datapath.agent().environment("FORWARDER_CONNECT_TIMEOUT", CONNECT_TIMEOUT);
        let agent = command.start(&topology.node, &manifests.path())?;
        datapath.wait_ready(&agent);
        Ok(Self { agent, topology, datapath, family, board, _servers: servers, _manifests: manifests })
    }

    /// Where clients reach a door.
    pub fn address(&self, door: Door) -> SocketAddr {
        match self.family {
            Family::V4 => self.topology.node_address(door.listener_port()),
            Family::V6 => self.topology.node_address_v6(door.listener_port()),
        }
    }

    /// Performs the conversations of `seeds`, `at_once` of them at a time, and says what failed.
    pub fn run_many(&self, seeds: impl IntoIterator<Item = u64>, at_once: usize) -> Vec<Failure> {
        self.run_shapes(seeds.into_iter().map(Shape::of).collect(), at_once)
    }

    /// Performs conversations, `at_once` of them at a time, and says what failed. Their seeds differ.
    pub fn run_shapes(&self, shapes: Vec<Shape>, at_once: usize) -> Vec<Failure> {
        let start = Instant::now();
        let next = AtomicUsize::new(0);
        let given_up = AtomicBool::new(false);
        let failures = Mutex::new(Vec::new());
        let slowest = Mutex::new(BTreeMap::new());
        let work = || {
            while let Some(shape) = shapes.get(next.fetch_add(1, Ordering::Relaxed)) {
                if given_up.load(Ordering::Relaxed) {
                    return;
                }
                let (took, failure) = self.perform(shape, None, start);
                let mut slowest = lock(&slowest);
                let of_kind = slowest.entry(shape.kind).or_insert((took, shape.seed));
                *of_kind = (*of_kind).max((took, shape.seed));
                drop(slowest);
                if let Some(failure) = failure {
                    let mut failures = lock(&failures);
                    failures.push(failure);
                    given_up.store(failures.len() >= TOO_MANY, Ordering::Relaxed);
                }
            }
        };
        // Threads start in the namespace of the one that starts them.
        self.topology.client.run(|| {
            thread::scope(|scope| {
                for _ in 0..at_once {
                    thread::Builder::new()
                        .stack_size(STACK)
                        .spawn_scoped(scope, work)
                        .expect("start a thread for a client");
                }
            });
        });
        let failures = failures.into_inner().unwrap_or_else(PoisonError::into_inner);
        println!(
            "{}: {} conversations, {} failed, {:.1} s; the slowest of each kind, and its seed: {:?}",
            self.datapath,
            next.into_inner().min(shapes.len()),
            failures.len(),
            start.elapsed().as_secs_f64(),
            lock(&slowest)
        );
        failures
    }

    /// Performs conversations and fails the test if one fails, or if the tier that is asked for carried nothing.
    #[track_caller]
    pub fn check(&self, seeds: impl IntoIterator<Item = u64>, at_once: usize) {
        self.check_shapes(seeds.into_iter().map(Shape::of).collect(), at_once, Offload::Expected);
    }

    /// The same for shapes of the caller's choice.
    #[track_caller]
    pub fn check_shapes(&self, shapes: Vec<Shape>, at_once: usize, offload: Offload) {
        self.evaluate(&self.run_shapes(shapes, at_once), offload);
    }

    /// Performs conversations one after another, all from the same port of the client.
    #[track_caller]
    pub fn check_port(&self, port: u16, shapes: &[Shape]) {
        let start = Instant::now();
        let failures = self.topology.client.run(|| {
            let mut failures = Vec::new();
            for shape in shapes {
                failures.extend(self.perform(shape, Some(port), start).1);
                if failures.len() >= TOO_FEW_LEFT {
                    break;
                }
            }
            failures
        });
        println!("{}: {} conversations, {:.1?}", self.datapath, shapes.len(), start.elapsed());
        self.evaluate(&failures, Offload::Expected);
    }

    #[track_caller]
    fn evaluate(&self, failures: &[Failure], offload: Offload) {
        let forwarded = self.datapath.forwarded(&self.agent);
        let told: Vec<String> = failures.iter().map(ToString::to_string).collect();
        assert!(told.is_empty(), "{}: {} failed:\n{}", self.datapath, told.len(), told.join("\n"));
        let by_kernel = forwarded.expect("metrics of the agent");
        if offload == Offload::Expected && self.datapath.is_by_kernel() {
            assert!(by_kernel > 0, "the kernel forwarded nothing");
        }
    }

    /// Performs one conversation of a run that began at `start`; says how long it took, and whether it failed.
    fn perform(&self, wanted: &Shape, port: Option<u16>, start: Instant) -> (Duration, Option<Failure>) {
        let began = start.elapsed();
        let mut stream = None;
        let (shape, result) = match self.open(wanted, port, &mut stream) {
            Ok((stream, shape)) => {
                let result = play(stream, &shape, Role::Client);
                (shape, result)
            }
            Err(error) => (wanted.clone(), Err(error)),
        };
        let port = stream.as_ref().and_then(|stream| stream.local_addr().ok()).map(|address| address.port());
        // Now the other end hears of the end, or of the reset.
        drop(stream);
        let client = result.map_or_else(|error| format!("{error:#}"), |()| String::new());
        let Shape { seed, kind, .. } = shape;
        let server = self.board.outcome(seed);
        lock(&self.board.known).remove(&seed);
        let took = start.elapsed().saturating_sub(began);
        if client.is_empty() && server.is_empty() {
            return (took, None);
        }
        let or_well = |words: String| if words.is_empty() { "all is well".to_owned() } else { words };
        let (client, server) = (or_well(client), or_well(server));
        (took, Some(Failure { seed, kind, began, took, listed: self.listed(), port, client, server }))
    }

    /// The connections that the agent lists, the oldest ones, or why it does not.
    fn listed(&self) -> Vec<String> {
        match self.agent.connections(&format!("?limit={LISTED}")) {
            Ok(connections) => connections.iter().map(ToString::to_string).collect(),
            Err(error) => vec![format!("{error:#}")],
        }
    }

    /// Connects, and agrees with the server on a shape: the wanted one unless the server speaks first.
    fn open<'a>(
        &self,
        wanted: &Shape,
        port: Option<u16>,
        stream: &'a mut Option<TcpStream>,
    ) -> Result<(&'a TcpStream, Shape)> {
        let door = Door::of(wanted.kind);
        let is_first = door != Door::ServerFirst;
        if is_first {
            lock(&self.board.known).insert(wanted.seed, wanted.clone());
        } else {
            lock(&self.board.to_start).push_back(wanted.clone());
        }
        let mut connected: &TcpStream =
            stream.insert(connect(self.address(door), wanted.kind, port).context("connect")?);
        if is_first {
            connected.write_all(&wanted.seed.to_le_bytes()).context("send the seed")?;
            return Ok((connected, wanted.clone()));
        }
        let mut seed = [0; 8];
        connected.set_read_timeout(Some(patient(PATIENCE)))?;
        connected.read_exact(&mut seed).context("receive the seed")?;
        let shape = self.board.known(u64::from_le_bytes(seed));
        Ok((connected, shape.context("the server's first bytes are no seed")?))
    }
}

/// What clients and servers tell each other beside their conversations.
#[derive(Debug, Default)]
struct Board {
    /// Shapes in use, by seed.
    known: Mutex<HashMap<u64, Shape>>,
    /// Conversations for which clients call on a server that speaks first.
    to_start: Mutex<VecDeque<Shape>>,
    /// What servers say of conversations that are over: nothing if all is well.
    outcomes: Mutex<HashMap<u64, String>>,
    changed: Condvar,
}

impl Board {
    fn known(&self, seed: u64) -> Option<Shape> {
        lock(&self.known).get(&seed).cloned()
    }

    fn tell(&self, seed: u64, outcome: String) {
        lock(&self.outcomes).insert(seed, outcome);
        self.changed.notify_all();
    }

    /// Waits for what the server says.
    fn outcome(&self, seed: u64) -> String {
        let outcomes = lock(&self.outcomes);
        let waits = |outcomes: &mut HashMap<u64, String>| !outcomes.contains_key(&seed);
        let waited = self.changed.wait_timeout_while(outcomes, patient(PATIENCE), waits);
        let (mut outcomes, _) = waited.unwrap_or_else(PoisonError::into_inner);
        outcomes.remove(&seed).unwrap_or_else(|| format!("nothing, for {PATIENCE:?} after the client's end"))
    }
}

/// Serves one connection and tells the board.
fn serve(mut stream: &TcpStream, door: Door, board: &Board) {
    let shape = if door == Door::ServerFirst {
        let Some(shape) = lock(&board.to_start).pop_front() else {
            return;
        };
        lock(&board.known).insert(shape.seed, shape.clone());
        if let Err(error) = stream.write_all(&shape.seed.to_le_bytes()) {
            board.tell(shape.seed, format!("send the seed: {error}"));
            return;
        }
        shape
    } else {
        let mut seed = [0; 8];
        // Without a seed there is nobody to tell; the client hears nothing of the server, and says so.
        let Ok(()) = stream.read_exact(&mut seed) else {
            return;
        };
        let Some(shape) = board.known(u64::from_le_bytes(seed)) else {
            return;
        };
        shape
    };
    let outcome = play(stream, &shape, Role::Server);
    board.tell(shape.seed, outcome.map_or_else(|error| format!("{error:#}"), |()| String::new()));
}

fn listen(address: SocketAddr, door: Door) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if door == Door::SlowServer {
        // What is accepted inherits it.
        socket.set_recv_buffer_size(SMALL_BUFFER)?;
    }
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(1024)?;
    Ok(socket.into())
}

fn connect(address: SocketAddr, kind: Kind, port: Option<u16>) -> io::Result<TcpStream> {
    let attempt = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        if kind == Kind::SlowClient {
            // Before the handshake, or the first window would be a large one.
            socket.set_recv_buffer_size(SMALL_BUFFER)?;
        }
        if let Some(port) = port {
            let any: IpAddr =
                if address.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            socket.set_reuse_address(true)?;
            socket.bind(&SocketAddr::new(any, port).into())?;
        }
        socket.connect_timeout(&address.into(), patient(PATIENCE))?;
        Ok(socket.into())
    };
    // The client's own last connection from the port may not be gone yet: the other end has to acknowledge its end.
    let is_busy = |error: &io::Error| error.kind() == io::ErrorKind::AddrNotAvailable;
    let connected = wait_for(PATIENCE, || {
        let connected = attempt();
        (!connected.as_ref().is_err_and(is_busy)).then_some(connected)
    });
    connected.unwrap_or_else(|| Err(io::ErrorKind::AddrNotAvailable.into()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
