//! Opening the ways into the admin endpoint, for as long as it takes: the agent forwards meanwhile.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use tokio::net::{TcpListener, UnixListener};

use super::socket::{self, SocketError, SocketFile};
use crate::settings::GroupName;
use crate::state::{AdminHealth, By};
use forwarder_runtime::error::one_line;

/// How long to wait between two attempts.
const AGAIN: Duration = Duration::from_secs(1);

/// A way into the admin endpoint that could not be opened.
#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("cannot open the admin endpoint on {address}: {source}; {remedy}")]
    Tcp {
        address: SocketAddr,
        #[source]
        source: io::Error,
        remedy: &'static str,
    },
    #[error("cannot open the admin endpoint's socket {path}: {source}")]
    Socket {
        path: PathBuf,
        #[source]
        source: SocketError,
    },
}

/// Listens on an address, as soon as that can be.
pub(super) async fn tcp(address: SocketAddr, health: &AdminHealth) -> TcpListener {
    let mut attempts = Attempts { by: By::Tcp, place: address.to_string(), told: None };
    loop {
        let source = match TcpListener::bind(address).await {
            Ok(listener) => {
                attempts.succeeded(health);
                return listener;
            }
            Err(source) => source,
        };
        let remedy = match Errno::from_io_error(&source) {
            Some(Errno::ADDRINUSE) => {
                "end the process that has the port (`ss -ltnp`), or choose another with --admin"
            }
            Some(Errno::ADDRNOTAVAIL) => {
                "give the node this address, or choose another with --admin, or `off`"
            }
            _ => "choose another with --admin, or `off`",
        };
        attempts.failed(&OpenError::Tcp { address, source, remedy }).await;
    }
}

/// Listens on a socket, as soon as that can be.
pub(super) async fn socket(
    path: &Path,
    group: Option<&GroupName>,
    health: &AdminHealth,
) -> (UnixListener, SocketFile) {
    let mut attempts = Attempts { by: By::Socket, place: path.display().to_string(), told: None };
    loop {
        let source = match try_socket(path.to_owned(), group.cloned()).await {
            Ok(opened) => {
                attempts.succeeded(health);
                return opened;
            }
            Err(source) => source,
        };
        attempts.failed(&OpenError::Socket { path: path.to_owned(), source }).await;
    }
}

async fn try_socket(
    path: PathBuf,
    group: Option<GroupName>,
) -> Result<(UnixListener, SocketFile), SocketError> {
    let failed = {
        let path = path.clone();
        move |source| SocketError::Kernel { attempt: "watch the socket", path, source }
    };
    // Names of groups may have to be asked for.
    let opened = tokio::task::spawn_blocking(move || socket::open_at(&path, group.as_ref())).await;
    let (listener, file) = match opened {
        Ok(opened) => opened?,
        Err(error) => return Err(failed(io::Error::other(error))),
    };
    match listener.set_nonblocking(true).and_then(|()| UnixListener::from_std(listener)) {
        Ok(listener) => Ok((listener, file)),
        Err(source) => Err(failed(source)),
    }
}

/// Attempts to open a way in, of which the log is told why they fail: once for each reason.
struct Attempts {
    by: By,
    place: String,
    told: Option<String>,
}

impl Attempts {
    fn succeeded(&self, health: &AdminHealth) {
        health.set_up(self.by);
        if self.told.is_some() {
            tracing::info!(by = self.by.as_str(), "the admin endpoint now listens on {}", self.place);
        }
    }

    /// Waits until it is time for another one.
    async fn failed(&mut self, error: &OpenError) {
        let text = one_line(error);
        if self.told.as_ref() != Some(&text) {
            tracing::warn!(
                by = self.by.as_str(),
                "{text}. The agent forwards without it, and tries again every second"
            );
            self.told = Some(text);
        }
        tokio::time::sleep(AGAIN).await;
    }
}
