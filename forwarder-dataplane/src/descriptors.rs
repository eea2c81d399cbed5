//! How the file descriptors that the process may have are shared: some for what the agent itself needs, so that it is reached and reads
//! its input whatever happens, three quarters of the others at most for listening sockets, and what is left for connections.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors of the agent itself: maps, programs on interfaces, event loops, pipes, the admin endpoint, the API server.
const RESERVED: u64 = 512;
/// What a connection needs: a socket on each side.
const OF_CONNECTION: usize = 2;

/// The file descriptors that the process may have, and how many of them listen.
#[derive(Debug)]
pub struct Descriptors {
    limit: u64,
    /// Those that are not reserved.
    shared: usize,
    listening: AtomicUsize,
    /// How many accepted connections wait for the socket of their other side.
    waiting: AtomicUsize,
}

/// An accepted connection that waits for a descriptor, as long as this lives.
#[derive(Debug)]
pub struct Waiting<'a>(&'a Descriptors);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// There is no descriptor left to listen with.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "the agent may have {limit} files open, and its listeners have their share of them: raise the limit (ulimit -n, \
     LimitNOFILE=), or give it fewer --workers, of which each has a socket of every listener"
)]
pub struct Exhausted {
    limit: u64,
}

impl Descriptors {
    /// Where the process may have `limit` of them.
    pub fn new(limit: u64) -> Self {
        let shared = usize::try_from(limit.saturating_sub(RESERVED.min(limit / 4))).unwrap_or(usize::MAX);
        Self { limit, shared, listening: AtomicUsize::new(0), waiting: AtomicUsize::new(0) }
    }

    /// Raises the limit as far as this process may.
    pub fn raise() -> Self {
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
        if let Err(errno) = setrlimit(Resource::Nofile, raised) {
            tracing::warn!(%errno, "cannot raise the limit on open files: it stays as it is; raise LimitNOFILE or `ulimit -n`");
        }
        Self::new(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
    }

    /// How many the process may have.
    pub fn limit(&self) -> u64 {
        self.limit
    }

    /// How many connections there may be at once, at least one.
    pub fn max_connections(&self) -> usize {
        (self.shared.saturating_sub(self.listening.load(Ordering::Relaxed)) / OF_CONNECTION).max(1)
    }

    /// Notes that an accepted connection waits for a descriptor: until it has one, none is to be accepted, because its client would take it.
    pub fn wait(&self) -> Waiting<'_> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self)
    }

    /// How many accepted connections wait for one.
    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Takes descriptors for a listener's sockets. Only one thread takes them.
    ///
    /// # Errors
    /// Listeners have their share.
    pub fn take(&self, sockets: usize) -> Result<(), Exhausted> {
        let taken = self.listening.load(Ordering::Relaxed).saturating_add(sockets);
        if taken > self.shared / 4 * 3 {
            return Err(Exhausted { limit: self.limit });
        }
        self.listening.store(taken, Ordering::Relaxed);
        Ok(())
    }

    /// Gives back those of a listener that is closed, or was not opened.
    pub fn give_back(&self, sockets: usize) {
        self.listening.fetch_sub(sockets, Ordering::Relaxed);
    }
}

/// Whether a call failed because the process or the system has no more descriptors, or no memory for a socket.
pub(crate) fn is_exhaustion(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// As where nothing limits them.
impl Default for Descriptors {
    fn default() -> Self {
        Self::new(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_leave_some_for_connections_and_for_the_agent() {
        let descriptors = Descriptors::new(2_512);
        assert_eq!(descriptors.max_connections(), 1_000);
        descriptors.take(1_000).unwrap();
        assert_eq!(descriptors.max_connections(), 500);
        descriptors.take(500).unwrap();
        let error = descriptors.take(2).unwrap_err();
        assert!(error.to_string().contains("2512 files"), "{error}");
        assert_eq!(descriptors.max_connections(), 250);
        descriptors.give_back(500);
        descriptors.take(2).unwrap();
    }

    #[test]
    fn few_are_enough_to_do_something() {
        for limit in [0, 1, 16, 64] {
            assert!(Descriptors::new(limit).max_connections() >= 1, "{limit}");
        }
        Descriptors::new(64).take(1).unwrap();
        assert_eq!(Descriptors::new(u64::MAX).take(1_000_000), Ok(()));
    }
}
