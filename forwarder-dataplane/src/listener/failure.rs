//! Why a listener is not bound, and when to try again.

use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::occupied::ListeningSocket;
use forwarder_gateway::model::ListenerKey;

/// Why a listener is not bound: nobody is served, and it is tried again.
#[derive(Debug)]
pub struct Failure {
    /// What the kernel said.
    pub error: io::Error,
    /// When it was tried first.
    pub since: Instant,
    /// Since when nobody has been seen to listen on the port, where it was in use.
    free_since: Option<Instant>,
}

/// What is known of the node when a listener is to be bound again.
#[derive(Clone, Copy, Debug)]
pub struct Occasion<'a> {
    /// The node's addresses may be others than before.
    pub addresses_changed: bool,
    /// The sockets that listen.
    pub listening: &'a [ListeningSocket],
    /// How long a port that another process had must have been free.
    pub port_wait: Duration,
}

impl Failure {
    /// A failure of now; `former` is that of the last attempt.
    pub fn new(error: io::Error, former: Option<&Self>) -> Self {
        let since = former.map_or_else(Instant::now, |former| former.since);
        Self { error, since, free_since: former.and_then(|former| former.free_since) }
    }

    /// What the kernel said, if it was a number.
    pub fn errno(&self) -> Option<Errno> {
        Errno::from_io_error(&self.error)
    }

    /// Whether to try again now. A port that another process had is left alone for a while once it is free: a daemon that is being
    /// restarted would not find it again.
    pub fn is_due(&mut self, key: ListenerKey, occasion: Occasion<'_>) -> bool {
        match self.errno() {
            Some(Errno::ADDRNOTAVAIL) => occasion.addresses_changed,
            Some(Errno::ADDRINUSE) => {
                if occasion.listening.iter().any(|socket| socket.is_in_the_way_of(key)) {
                    self.free_since = None;
                    return false;
                }
                self.free_since.get_or_insert_with(Instant::now).elapsed() >= occasion.port_wait
            }
            _ => true,
        }
    }

    /// Why, in words, with the number that programs look for.
    pub fn message(&self, key: ListenerKey) -> String {
        let port = key.port;
        match self.errno() {
            Some(Errno::ADDRINUSE) => {
                format!(
                    "port {port} is held by another process (EADDRINUSE): choose another port, or stop that process"
                )
            }
            Some(Errno::ADDRNOTAVAIL) => {
                format!("this node does not have the address {} (EADDRNOTAVAIL)", key.address)
            }
            Some(Errno::ACCESS) => {
                format!("no permission to bind port {port} (EACCES): grant CAP_NET_BIND_SERVICE")
            }
            _ => format!("cannot listen on {key}: {}", self.error),
        }
    }
}
