//! Connecting an endpoint of a backend, and another one when that fails.

pub mod balancer;
pub mod endpoints;
mod port;
mod port_range;
pub mod segment_size;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::io::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use crate::counters::{BackendCounters, ConnectFailure, PerWorker};
use crate::descriptors::{Descriptors, is_exhaustion};
use crate::relay;
use crate::upstream::endpoints::EndpointSet;
use crate::upstream::segment_size::SegmentSize;
use forwarder_gateway::model::{BackendKey, Endpoints};
use forwarder_kernel::flows::FlowTable;

use self::port::Connecting;
pub use self::port_range::LocalPorts;

/// How long to wait for a local port or a descriptor to become free before the next attempt.
const RESOURCE_BACKOFF: Duration = Duration::from_millis(50);

/// A backend in use: its endpoints of the moment, whose turn it is, and its counters. Shared by every listener whose
/// route refers to it; it lives on while connections use it.
#[derive(Debug)]
pub struct Upstream {
    /// Which Service port.
    pub key: BackendKey,
    /// Its endpoints, and those of them that take new connections.
    pub endpoints: ArcSwap<EndpointSet>,
    /// What was counted.
    pub counters: PerWorker<BackendCounters>,
    turn: AtomicUsize,
    /// Whether no endpoint could be connected the last time that one was wanted.
    is_down: AtomicBool,
}

impl Upstream {
    /// A backend that nothing was counted for yet.
    pub fn new(key: BackendKey, endpoints: &Endpoints, workers: usize) -> Self {
        Self {
            key,
            endpoints: ArcSwap::from_pointee(EndpointSet::new(endpoints)),
            counters: PerWorker::new(workers),
            turn: AtomicUsize::new(0),
            is_down: AtomicBool::new(false),
        }
    }

    /// Replaces the endpoints; what becomes of connections to former ones, their listeners decide. Those that were not eligible and
    /// are still there are not.
    pub fn set_endpoints(&self, endpoints: &Endpoints) {
        self.endpoints.rcu(|before| before.with_all(endpoints));
    }

    /// Notes that an endpoint was connected; logs it where none could be before.
    fn is_reached(&self, endpoint: SocketAddr) {
        if self.is_down.load(Ordering::Relaxed) && self.is_down.swap(false, Ordering::Relaxed) {
            tracing::info!(backend = %self.key, %endpoint, "an endpoint of the backend accepts connections again");
        }
    }

    /// Notes that no endpoint could be connected; logs it the first time.
    fn is_not_reached(&self, endpoint: SocketAddr, failure: ConnectFailure, error: &io::Error) {
        if failure == ConnectFailure::NoResources {
            tracing::warn!(
                backend = %self.key,
                reason = failure.as_str(),
                %error,
                "no socket could be had to connect the backend with: a client is reset; raise the forwarder's limit on open files (LimitNOFILE, ulimit -n)"
            );
            return;
        }
        if !self.is_down.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                backend = %self.key,
                %endpoint,
                reason = failure.as_str(),
                %error,
                "no endpoint of the backend accepts connections: its clients are reset until one does"
            );
        }
    }
}

/// How endpoints are connected: settings of the agent.
#[derive(Clone, Default)]
pub struct ConnectSettings {
    /// The flows of offloaded pairs: no connection may have the addresses and ports of one.
    pub flows: Option<Arc<FlowTable>>,
    /// The segment size that sockets announce.
    pub segment_size: Arc<SegmentSize>,
    /// Local addresses to connect from, in turn, so that more connections to one endpoint fit than there are local
    /// ports (some 32,000 by default); none leaves the choice to the kernel.
    pub source_addresses: Vec<IpAddr>,
    /// The local ports to connect from.
    pub ports: Arc<LocalPorts>,
    /// How many connections all workers together may hold: beyond it they wait in the backlog.
    pub descriptors: Arc<Descriptors>,
    /// Keepalive of both sides; `None` is off.
    pub keepalive: Option<Duration>,
}

impl ConnectSettings {
    /// The local address whose turn it is to connect an endpoint; `None` leaves the choice to the kernel.
    fn source(&self, endpoint: SocketAddr, turn: usize) -> Option<IpAddr> {
        let sources = self.source_addresses.iter().filter(|source| source.is_ipv4() == endpoint.is_ipv4());
        let count = sources.clone().count();
        sources.cycle().nth(turn % count.max(1)).copied()
    }
}

/// How many probes may go without an answer before a peer is taken for dead.
pub(crate) const PROBES: u32 = 6;

/// How long after the last probe the next one is sent, with keepalive after `idle`.
pub(crate) fn probe_interval(idle: Duration) -> Duration {
    (idle / PROBES).max(Duration::from_secs(1))
}

/// TCP keepalive that finds a dead peer in about twice `idle`.
pub fn keepalive(idle: Duration) -> TcpKeepalive {
    TcpKeepalive::new().with_time(idle).with_interval(probe_interval(idle)).with_retries(PROBES)
}

/// How long a peer may say nothing before it is taken for dead, at every tier, with keepalive after `idle`.
pub fn patience(idle: Duration) -> Duration {
    idle + probe_interval(idle) * PROBES
}

/// Connects an endpoint of `backend`: the one whose turn it is, or the next ones when that fails, each within
/// `connect_timeout`.
///
/// # Errors
/// The last failure, where no endpoint could be connected; `None` where there is no endpoint.
pub async fn connect(
    backend: &Upstream,
    settings: &ConnectSettings,
    connect_timeout: Duration,
    worker: usize,
) -> Result<(TcpStream, SocketAddr), Option<ConnectFailure>> {
    let endpoints = backend.endpoints.load_full();
    let turn = backend.turn.fetch_add(1, Ordering::Relaxed);
    let mut last = None;
    for (attempt, endpoint) in endpoints.candidates(turn).enumerate() {
        match connect_patiently(endpoint, settings, turn, connect_timeout).await {
            Ok((stream, shares_port)) => {
                backend.is_reached(endpoint);
                if shares_port {
                    backend.counters.of(worker).shared_ports.add(1);
                }
                return Ok((stream, endpoint));
            }
            Err(error) => {
                let failure = classify(&error);
                backend.counters.of(worker).failures[failure as usize].add(1);
                tracing::debug!(
                    backend = %backend.key,
                    endpoint = %endpoint,
                    attempt = attempt + 1,
                    error = %error,
                    "cannot connect to endpoint"
                );
                last = Some((failure, endpoint, error));
                // Another endpoint would need the same.
                if failure == ConnectFailure::NoResources {
                    break;
                }
                // The only endpoint is tried again once if it refused: it may just be restarting its listener.
                if endpoints.eligible().len() == 1 && failure != ConnectFailure::Refused {
                    break;
                }
            }
        }
    }
    let Some((failure, endpoint, error)) = last else { return Err(None) };
    backend.is_not_reached(endpoint, failure, &error);
    Err(Some(failure))
}

/// One attempt, which also tells whether it [`shares_port`](Connecting::shares_port); waits for a local port or a descriptor for as long as `connect_timeout` where none is free.
async fn connect_patiently(
    endpoint: SocketAddr,
    settings: &ConnectSettings,
    turn: usize,
    connect_timeout: Duration,
) -> io::Result<(TcpStream, bool)> {
    let deadline = Instant::now() + connect_timeout;
    let mut waiting = None;
    let Connecting { socket, shares_port } = loop {
        match port::start_connecting(endpoint, settings, turn) {
            Err(error) if is_of_this_node(&error) && Instant::now() + RESOURCE_BACKOFF < deadline => {
                // As long as there is no descriptor, nobody else is to be accepted.
                waiting = is_exhaustion(&error).then(|| settings.descriptors.wait());
                sleep(RESOURCE_BACKOFF).await;
            }
            result => break result?,
        }
    };
    drop(waiting);
    let stream = TcpStream::from_std(socket.into())?;
    timeout(connect_timeout, connected(&stream)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))?;
    Ok((stream, shares_port))
}

/// Waits until a socket that has sent its SYN is connected.
async fn connected(stream: &TcpStream) -> io::Result<()> {
    let ready = stream.ready(Interest::WRITABLE | Interest::ERROR).await?;
    if ready.is_error() || ready.is_write_closed() {
        return Err(stream.take_error()?.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()));
    }
    Ok(())
}

/// A socket that is to connect an endpoint.
fn open(endpoint: SocketAddr, settings: &ConnectSettings) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(endpoint), kind, Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    // The last ACK of the handshake waits for the client's first bytes, which often lie ready: see `send_ack`. A packet
    // less for each connection.
    socket.set_tcp_quickack(false)?;
    settings.segment_size.apply(&socket)?;
    relay::prepare(&socket)?;
    relay::reset_on_close(&socket)?;
    Ok(socket)
}

/// Sends the ACK that completes the handshake, where no data carried it: the endpoint may be the one to speak first.
pub fn send_ack(stream: &TcpStream) {
    // Fails only on a socket that is gone; then there is nobody to tell.
    let _ = SockRef::from(stream).set_tcp_quickack(true);
}

/// Whether an attempt failed for want of something that the end of another connection gives back, whatever the endpoint.
fn is_of_this_node(error: &io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::ADDRNOTAVAIL) || is_exhaustion(error)
}

fn classify(error: &io::Error) -> ConnectFailure {
    if error.kind() == io::ErrorKind::TimedOut {
        return ConnectFailure::TimedOut;
    }
    match Errno::from_io_error(error) {
        Some(Errno::CONNREFUSED | Errno::CONNRESET) => ConnectFailure::Refused,
        Some(Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::NETDOWN | Errno::HOSTDOWN) => {
            ConnectFailure::Unreachable
        }
        Some(Errno::ADDRNOTAVAIL) => ConnectFailure::NoLocalPort,
        _ if is_exhaustion(error) => ConnectFailure::NoResources,
        _ => ConnectFailure::Other,
    }
}
