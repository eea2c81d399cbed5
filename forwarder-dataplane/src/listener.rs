//! Binding a listener's sockets, and what its workers share.

pub mod failure;
pub mod occupied;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};

use crate::counters::{ListenerCounters, PerWorker};
use crate::descriptors::Descriptors;
use crate::relay;
use crate::removal::Removals;
use crate::upstream::balancer::Balancer;
use crate::upstream::segment_size::SegmentSize;
use crate::upstream::{Upstream, keepalive};
use forwarder_gateway::model::{BackendKey, BindAddress, Listener, ListenerKey};
use forwarder_kernel::maps::ListenerId;

/// The backlog that is asked for; the kernel clips it to `net.core.somaxconn`.
const BACKLOG: i32 = 65_535;

/// A listener that is bound: shared by the workers that accept on it and by its connections, which outlive it.
#[derive(Debug)]
pub struct BoundListener {
    /// Its number in the maps.
    pub id: ListenerId,
    /// Where it is bound.
    pub key: ListenerKey,
    /// What serves new connections; replaced when the route changes.
    pub serving: ArcSwap<RouteSnapshot>,
    /// What its connections may have relied on, and is gone.
    pub removals: Removals,
    /// What was counted.
    pub counters: PerWorker<ListenerCounters>,
    /// The turn of the next connection, for the [`Balancer`].
    pub turn: AtomicU64,
}

/// What serves the new connections of a listener.
#[derive(Debug)]
pub struct RouteSnapshot {
    /// The listener and its route.
    pub listener: Arc<Listener>,
    /// The choice among the route's backends.
    pub balancer: Balancer,
    /// For each backend of the route: where it leads, or `None` where it is invalid.
    pub upstreams: Vec<Option<Arc<Upstream>>>,
}

impl RouteSnapshot {
    /// Whether new connections may go to an endpoint: by `backend`, or by any where that is not known.
    pub(crate) fn leads_to(&self, backend: Option<&BackendKey>, endpoint: SocketAddr) -> bool {
        let upstreams = self.upstreams.iter().flatten();
        let mut meant = upstreams.filter(|upstream| backend.is_none_or(|backend| *backend == upstream.key));
        meant.any(|upstream| upstream.endpoints.load().has(endpoint))
    }
}

/// How listeners are bound: settings of the agent.
#[derive(Clone, Debug, Default)]
pub struct ListenSettings {
    /// Keepalive of accepted connections; `None` is off.
    pub keepalive: Option<Duration>,
    /// The segment size that sockets announce.
    pub segment_size: Arc<SegmentSize>,
    /// How long a port that another process had must have been free before it is taken.
    pub port_wait: Duration,
    /// What listening sockets have their share of.
    pub descriptors: Arc<Descriptors>,
}

/// Binds one socket for each worker (`SO_REUSEPORT`); [`listen`] opens the port.
///
/// The options that connections need are set here: on Linux an accepted socket inherits them.
///
/// # Errors
/// There are no descriptors for it ([`Exhausted`](crate::descriptors::Exhausted)), or what the kernel said, such as `EADDRINUSE` where another process holds the port, even one that set `SO_REUSEPORT`
/// itself, or `EADDRNOTAVAIL` where this node does not have the address.
pub fn bind(key: ListenerKey, workers: usize, settings: &ListenSettings) -> io::Result<Vec<Socket>> {
    let (address, first) = match bind_first(key.socket_address(), key.address) {
        // A node without IPv6.
        Err(error)
            if key.address == BindAddress::Any
                && Errno::from_io_error(&error) == Some(Errno::AFNOSUPPORT) =>
        {
            let address = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), key.port.get());
            (address, bind_first(address, key.address)?)
        }
        result => (key.socket_address(), result?),
    };
    let mut sockets = vec![first];
    for _ in 1..workers {
        let socket = open(address, key.address)?;
        socket.set_reuse_port(true)?;
        socket.bind(&address.into())?;
        sockets.push(socket);
    }
    for socket in &sockets {
        socket.set_tcp_nodelay(true)?;
        settings.segment_size.apply(socket)?;
        relay::prepare(socket)?;
        relay::reset_on_close(socket)?;
        if let Some(idle) = settings.keepalive {
            socket.set_tcp_keepalive(&keepalive(idle))?;
        }
    }
    Ok(sockets)
}

/// Has sockets of [`bind`] take connections.
///
/// # Errors
/// What the kernel said.
pub fn listen(sockets: Vec<Socket>) -> io::Result<Vec<std::net::TcpListener>> {
    for socket in &sockets {
        socket.listen(BACKLOG)?;
    }
    Ok(sockets.into_iter().map(Into::into).collect())
}

/// Binds the first socket without `SO_REUSEPORT`, so that the port is refused while anyone else holds it, and sets the
/// option afterwards, for the sockets of the other workers.
fn bind_first(address: SocketAddr, scope: BindAddress) -> io::Result<Socket> {
    let socket = open(address, scope)?;
    socket.bind(&address.into())?;
    socket.set_reuse_port(true)?;
    Ok(socket)
}

fn open(address: SocketAddr, scope: BindAddress) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    // Connections of a former agent in TIME_WAIT must not keep the port.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(scope != BindAddress::Any)?;
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, TcpListener};
    use std::num::NonZeroU16;

    use super::*;

    fn free_port() -> NonZeroU16 {
        let probe = TcpListener::bind("127.0.0.1:0").unwrap();
        NonZeroU16::new(probe.local_addr().unwrap().port()).unwrap()
    }

    #[test]
    fn a_port_of_another_process_is_refused_though_it_shares_it() {
        let port = free_port();
        let key = ListenerKey { address: BindAddress::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)), port };
        let other = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        other.set_reuse_port(true).unwrap();
        other.bind(&key.socket_address().into()).unwrap();
        other.listen(1).unwrap();
        let error = bind(key, 2, &ListenSettings::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop(other);
        assert_eq!(bind(key, 3, &ListenSettings::default()).unwrap().len(), 3);
    }

    #[test]
    fn two_agents_do_not_share_a_port() {
        let key = ListenerKey { address: BindAddress::Any, port: free_port() };
        let _first = listen(bind(key, 2, &ListenSettings::default()).unwrap()).unwrap();
        assert_eq!(bind(key, 2, &ListenSettings::default()).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn any_address_takes_both_families() {
        let key = ListenerKey { address: BindAddress::Any, port: free_port() };
        let _sockets = listen(bind(key, 1, &ListenSettings::default()).unwrap()).unwrap();
        for ip in ["127.0.0.1", "::1"] {
            let address = SocketAddr::new(ip.parse().unwrap(), key.port.get());
            std::net::TcpStream::connect_timeout(&address, Duration::from_secs(5)).unwrap();
        }
    }
}
