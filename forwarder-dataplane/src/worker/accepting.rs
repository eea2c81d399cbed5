//! How a worker accepts connections.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Worker;
use crate::descriptors::is_exhaustion;
use crate::listener::BoundListener;

/// How many connections a worker accepts before it lets the ones that it has run.
const ACCEPT_BATCH: usize = 32;
/// The first and the longest pause of accepting when descriptors have run out.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(500));

/// Accepts on one listener until told to stop, and then what is left in the backlog.
pub(super) async fn accept(
    worker: Rc<Worker>,
    socket: TcpListener,
    listener: Arc<BoundListener>,
    mut stopped: oneshot::Receiver<oneshot::Sender<()>>,
) {
    let mut pause = ACCEPT_PAUSE.0;
    let mut batch = 0;
    let done = loop {
        let accepted = if let Some(reason) = worker.is_full() {
            Err(io::Error::other(reason))
        } else {
            tokio::select! {
                biased;
                done = &mut stopped => break done,
                accepted = socket.accept() => accepted,
            }
        };
        match accepted {
            Ok((downstream, peer)) => {
                pause = ACCEPT_PAUSE.0;
                worker.take(downstream, peer, &listener);
                batch += 1;
                if batch == ACCEPT_BATCH {
                    batch = 0;
                    tokio::task::yield_now().await;
                }
            }
            // The client gave up, or the network reported an earlier error of this one connection (accept(2)).
            Err(error) if worker.is_full().is_none() && !is_exhaustion(&error) => {}
            Err(error) => {
                worker.context.counters().accept_pauses.add(1);
                if pause == ACCEPT_PAUSE.0 {
                    tracing::warn!(
                        listener = %listener.key,
                        reason = %error,
                        "cannot accept connections for a moment: clients wait; raise the forwarder's limit on open files (LimitNOFILE, ulimit -n)"
                    );
                }
                tokio::select! {
                    done = &mut stopped => break done,
                    () = sleep(pause) => {}
                }
                pause = (pause * 2).min(ACCEPT_PAUSE.1);
            }
        }
    };
    // Clients whose handshake is done must not be reset by the close of the socket.
    let Ok(socket) = socket.into_std() else { return };
    accept_rest(&worker, &socket, &listener);
    drop(socket);
    // At the agent's end nobody waits.
    if let Ok(done) = done {
        let _ = done.send(());
    }
}

/// Accepts what waits in the backlog of a listener that stops.
fn accept_rest(worker: &Rc<Worker>, socket: &std::net::TcpListener, listener: &Arc<BoundListener>) {
    loop {
        match socket.accept() {
            Ok((downstream, peer)) => {
                let accepted =
                    downstream.set_nonblocking(true).and_then(|()| TcpStream::from_std(downstream));
                match accepted {
                    Ok(downstream) => worker.take(downstream, peer, listener),
                    Err(error) => {
                        tracing::warn!(%error, "cannot watch an accepted connection: it is reset");
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(
                    listener = %listener.key,
                    reason = %error,
                    "cannot accept the last connections in the backlog of a listener that stops: these clients are reset"
                );
                return;
            }
        }
    }
}

/// Whether the kernel tells, instead of a connection, what became of it (accept(2), "Error handling"): the next one may be well.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(
            Errno::CONNABORTED
                | Errno::INTR
                | Errno::PERM
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::OPNOTSUPP
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NONET
        )
    )
}
