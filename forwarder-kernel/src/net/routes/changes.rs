//! When routes may have changed.

use std::io;
use std::time::Duration;

use rtnetlink::MulticastGroup;
use rtnetlink::sys::Socket;
use rtnetlink::sys::protocols::NETLINK_ROUTE;
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use super::RouteError;

/// How long to gather changes before they are announced: changes come in bursts.
const SETTLE: Duration = Duration::from_millis(50);

/// Whose messages tell of changes.
const GROUPS: [MulticastGroup; 8] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv6Rule,
    // Routes that name a next-hop object change with it, and need not say so (`nexthop_compat_mode`).
    MulticastGroup::Nexthop,
];

/// A number that rises whenever routes, rules, links or addresses have changed: what [`Routes::egress`] has told before
/// may then be wrong. A path MTU that the kernel learns from ICMP is no such change.
///
/// The future, to be spawned, ends when the socket fails or all receivers are gone. Needs a tokio runtime.
///
/// # Errors
/// The kernel refuses.
///
/// [`Routes::egress`]: super::Routes::egress
pub fn watch()
-> Result<(watch::Receiver<u64>, impl Future<Output = Result<(), RouteError>> + Send + 'static), RouteError> {
    let socket = open().map_err(|source| RouteError::Socket { source })?;
    let (sender, receiver) = watch::channel(0_u64);
    let follow = async move {
        let failed = |source| RouteError::Watch { source };
        loop {
            tokio::select! {
                // Before the messages are taken: what comes later makes the socket ready again.
                ready = socket.readable() => ready.map_err(failed)?.clear_ready(),
                () = sender.closed() => return Ok(()),
            }
            if !take_messages(socket.get_ref()).map_err(failed)? {
                continue;
            }
            tokio::time::sleep(SETTLE).await;
            take_messages(socket.get_ref()).map_err(failed)?;
            sender.send_modify(|generation| *generation = generation.wrapping_add(1));
        }
    };
    Ok((receiver, follow))
}

/// A socket of its own instead of a connection of `rtnetlink`: that loses messages that it cannot decode, such as those
/// on next hops, and decodes the others, of which a routing daemon may cause many, for nothing.
fn open() -> io::Result<AsyncFd<Socket>> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.set_non_blocking(true)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group as u32)?;
    }
    #[expect(
        deprecated,
        reason = "its successor is unsafe; the socket owns its one descriptor, so both are sound"
    )]
    AsyncFd::with_interest(socket, Interest::READABLE)
}

/// Takes all messages that are there; whether there were any.
fn take_messages(socket: &Socket) -> io::Result<bool> {
    let mut any = false;
    loop {
        // That there is one says enough: its bytes are dropped.
        match socket.recv(&mut [0; 1].as_mut_slice(), 0) {
            Ok(_) => any = true,
            Err(error) => match Errno::from_io_error(&error) {
                // Some were lost, which says as much.
                Some(Errno::NOBUFS) => any = true,
                Some(Errno::INTR) => {}
                Some(Errno::AGAIN) => return Ok(any),
                _ => return Err(error),
            },
        }
    }
}
