//! The local port of a connection to an endpoint: one that neither a socket nor an offloaded pair uses.
#![expect(unsafe_code, reason = "an option of sockets that no crate offers")]

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd as _;

use rustix::io::Errno;
use socket2::Socket;

use super::{ConnectSettings, open};
use forwarder_kernel::flows::FlowTable;
use forwarder_kernel::flows::ports::Free;

/// How many gaps between the ports of pairs are tried for one connection: sockets may use what lies there.
const GAPS: usize = 256;
/// How many of the agent's own ports are tried. Where most of them are in use, the kernel finds another one sooner.
const OWN_PORTS: usize = 3;
/// `IP_LOCAL_PORT_RANGE` (`linux/in.h`), since Linux 6.3.
const IP_LOCAL_PORT_RANGE: libc::c_int = 51;

/// A socket that has sent its SYN.
pub(super) struct Connecting {
    pub(super) socket: Socket,
    /// Whether the connection may be offloaded, and comes from a port that the kernel gives to other processes of the node too.
    pub(super) shares_port: bool,
}

/// Sends a SYN from addresses and ports that no offloaded pair uses.
///
/// # Errors
/// `EADDRNOTAVAIL` where no port is free, or what else the kernel said.
pub(super) fn start_connecting(
    endpoint: SocketAddr,
    settings: &ConnectSettings,
    turn: usize,
) -> io::Result<Connecting> {
    let source = settings.source(endpoint, turn);
    let by_kernel = |shares_port| {
        let socket = open(endpoint, settings)?;
        bind(&socket, source)?;
        start(&socket, endpoint)?;
        Ok(Connecting { socket, shares_port })
    };
    let Some(flows) = &settings.flows else { return by_kernel(false) };
    let search = |number: usize| {
        let random = RandomState::new().hash_one((turn, number));
        Search { endpoint, source, settings, flows, random }
    };
    if let Some(own) = settings.ports.own() {
        for number in 0..OWN_PORTS {
            let found = search(number).among(&own, 1, |socket, free, _| {
                let port = *free.start();
                bind_port(socket, endpoint, source, port).map(|()| port..=port)
            });
            match found {
                Ok(Some(socket)) => return Ok(Connecting { socket, shares_port: false }),
                Ok(None) => {}
                // Somebody does not let the agent have them.
                Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::ACCESS | Errno::PERM)) => {
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    if flows.count() == 0 {
        return by_kernel(true);
    }
    let range = settings.ports.of_kernel();
    let found = search(0).among(&range, GAPS, |socket, free, is_all| {
        if is_all {
            return bind(socket, source).map(|()| range.clone());
        }
        restrict(socket, endpoint, source, free)
    })?;
    let socket = found.ok_or(Errno::ADDRNOTAVAIL)?;
    Ok(Connecting { socket, shares_port: true })
}

/// What a local port is looked for.
struct Search<'a> {
    endpoint: SocketAddr,
    source: Option<IpAddr>,
    settings: &'a ConnectSettings,
    flows: &'a FlowTable,
    /// Where in a range to begin.
    random: u64,
}

impl Search<'_> {
    /// A socket that connects from a port in `range`, after so many attempts at most; `None` where none is free. `take` has a socket
    /// use some of the next ports that no pair does, tells which of them it may have got, and is told whether no pair leads to the endpoint.
    fn among(
        &self,
        range: &RangeInclusive<u16>,
        most: usize,
        take: impl Fn(&Socket, &RangeInclusive<u16>, bool) -> io::Result<RangeInclusive<u16>>,
    ) -> io::Result<Option<Socket>> {
        let Self { endpoint, source, settings, flows, random } = *self;
        let (low, high) = (*range.start(), *range.end());
        let middle = u16::try_from(random % (u64::from(high - low) + 1)).map_or(low, |random| low + random);
        let mut attempts = 0;
        // From somewhere within the range to its end, and then what lies before.
        for mut rest in [middle..=high, low..=middle] {
            while attempts < most && !rest.is_empty() {
                attempts += 1;
                let (free, is_all) = match flows.ports().find(endpoint, source, &rest) {
                    Free::All => (rest.clone(), true),
                    Free::Gap(gap) => (gap, false),
                    Free::Nothing => break,
                };
                let socket = open(endpoint, settings)?;
                let taken = match take(&socket, &free, is_all) {
                    Ok(taken) => taken,
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRINUSE) => {
                        rest = after(*free.start(), &rest);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let is_taken = || match flows.ports().find(endpoint, source, &taken) {
                    // The kernel had more than one to choose from.
                    _ if taken.start() < taken.end() => is_taken(flows, &socket, endpoint),
                    free => Ok(free == Free::Nothing),
                };
                match start(&socket, endpoint) {
                    Ok(()) if !is_taken()? => return Ok(Some(socket)),
                    // A pair was joined on it meanwhile: the egress program has stopped the SYN.
                    Ok(()) => {}
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::ADDRNOTAVAIL) => {}
                    Err(error) => return Err(error),
                }
                rest = after(*taken.end(), &rest);
            }
        }
        Ok(None)
    }
}

/// The part of a range that lies behind a port.
#[expect(clippy::reversed_empty_ranges, reason = "nothing may lie there")]
fn after(port: u16, range: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    port.checked_add(1).map_or(1..=0, |next| next..=*range.end())
}

fn start(socket: &Socket, endpoint: SocketAddr) -> io::Result<()> {
    match socket.connect(&endpoint.into()) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INPROGRESS) => Ok(()),
        result => result,
    }
}

fn is_taken(flows: &FlowTable, socket: &Socket, endpoint: SocketAddr) -> io::Result<bool> {
    Ok(socket.local_addr()?.as_socket().is_some_and(|local| flows.is_taken(local, endpoint)))
}

/// Has a socket connect from an address, if that is not the kernel's choice.
fn bind(socket: &Socket, source: Option<IpAddr>) -> io::Result<()> {
    let Some(source) = source else { return Ok(()) };
    // The port is chosen at connect, by the whole 4-tuple, instead of being taken for every destination at bind.
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
    socket.bind(&SocketAddr::new(source, 0).into())
}

/// Has a socket connect from one of some ports; tells from which it may.
fn restrict(
    socket: &Socket,
    endpoint: SocketAddr,
    source: Option<IpAddr>,
    ports: &RangeInclusive<u16>,
) -> io::Result<RangeInclusive<u16>> {
    match set_range(socket, ports) {
        Ok(()) => bind(socket, source).map(|()| ports.clone()),
        Err(error) if Errno::from_io_error(&error) == Some(Errno::NOPROTOOPT) => {
            let first = *ports.start();
            bind_port(socket, endpoint, source, first).map(|()| first..=first)
        }
        Err(error) => Err(error),
    }
}

/// Has the kernel choose among these ports at connect, by the whole 4-tuple, and leave out those that are reserved.
fn set_range(socket: &Socket, ports: &RangeInclusive<u16>) -> io::Result<()> {
    let value = u32::from(*ports.end()) << 16 | u32::from(*ports.start());
    let length = libc::socklen_t::try_from(size_of_val(&value)).map_err(io::Error::other)?;
    // SAFETY: the pointer is to an integer of the length given; the descriptor is open as long as the socket is borrowed.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            IP_LOCAL_PORT_RANGE,
            (&raw const value).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The same for one port: one of the agent's own, or any on kernels before 6.3. Refused with `EADDRINUSE` where another socket has it, to any
/// endpoint.
fn bind_port(socket: &Socket, endpoint: SocketAddr, source: Option<IpAddr>, port: u16) -> io::Result<()> {
    let any = match endpoint {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(source.unwrap_or(any), port).into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn connect(endpoint: SocketAddr, restrict: impl Fn(&Socket) -> io::Result<()>) -> io::Result<Socket> {
        let socket = open(endpoint, &ConnectSettings::default())?;
        restrict(&socket)?;
        start(&socket, endpoint)?;
        Ok(socket)
    }

    fn port(socket: &Socket) -> u16 {
        socket.local_addr().unwrap().as_socket().unwrap().port()
    }

    /// A port that was free a moment ago.
    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn a_socket_connects_from_the_ports_that_it_is_given() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let endpoint = listener.local_addr().unwrap();
            let given = free_port();
            let restricted = || connect(endpoint, |socket| set_range(socket, &(given..=given)));
            let first = match restricted() {
                Ok(first) => first,
                Err(error) if Errno::from_io_error(&error) == Some(Errno::NOPROTOOPT) => return,
                Err(error) => panic!("from {given} to {endpoint}: {error}"),
            };
            assert_eq!(port(&first), given);
            let second = restricted().unwrap_err();
            assert_eq!(Errno::from_io_error(&second), Some(Errno::ADDRNOTAVAIL));
        }
    }

    #[test]
    fn a_port_is_bound_where_the_kernel_takes_no_range() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = listener.local_addr().unwrap();
        let given = free_port();
        let bound = connect(endpoint, |socket| bind_port(socket, endpoint, None, given)).unwrap();
        assert_eq!(port(&bound), given);
        let socket = open(endpoint, &ConnectSettings::default()).unwrap();
        let own = bind_port(&socket, endpoint, None, endpoint.port());
        assert_eq!(Errno::from_io_error(&own.unwrap_err()), Some(Errno::ADDRINUSE), "it is the listener's");
    }
}
