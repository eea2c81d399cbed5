//! New connections, one after another, for as long as a test likes.

use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::client;
use crate::netns::NetNs;
use crate::wait::wait_until;

/// How long connecting may take, and waiting for the name.
const TIMEOUT: Duration = Duration::from_secs(10);
/// How many failures are told.
const SHOWN_FAILURES: usize = 10;

/// Threads that connect to a server which names itself, read its name, and close.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    threads: Vec<JoinHandle<Made>>,
}

/// What became of the connections.
#[derive(Debug, Default)]
pub struct Made {
    /// How many each server answered, by its name.
    pub answers: BTreeMap<String, u64>,
    /// The longest time from the attempt to the name.
    pub slowest: Duration,
    failures: Vec<String>,
}

impl Load {
    /// Starts `threads`, each of which waits for `pause` after a connection.
    pub fn start(netns: &NetNs, address: SocketAddr, threads: usize, pause: Duration) -> Self {
        let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let start = |_| {
            let (netns, stop, count) = (netns.clone(), Arc::clone(&stop), Arc::clone(&count));
            thread::spawn(move || netns.run(|| connect_until(address, pause, &stop, &count)))
        };
        let threads = (0..threads).map(start).collect();
        Self { stop, count, threads }
    }

    /// How many connections have been attempted.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until so many more have been attempted.
    #[track_caller]
    pub fn wait_more(&self, count: u64, deadline: Duration) {
        let want = self.count() + count;
        wait_until("new connections are made", deadline, || self.count() >= want);
    }

    /// Ends; fails if a connection has failed.
    pub fn finish(mut self) -> Result<Made> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Made::default();
        for thread in self.threads.drain(..) {
            let made = thread.join().expect("the thread does not panic");
            all.slowest = all.slowest.max(made.slowest);
            all.failures.extend(made.failures);
            made.answers.into_iter().for_each(|(name, count)| *all.answers.entry(name).or_default() += count);
        }
        let (failed, count) = (all.failures.len(), self.count());
        all.failures.truncate(SHOWN_FAILURES);
        ensure!(failed == 0, "{failed} of {count} new connections failed: {:#?}", all.failures);
        Ok(all)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn connect_until(address: SocketAddr, pause: Duration, stop: &AtomicBool, count: &AtomicU64) -> Made {
    let mut made = Made::default();
    let start = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let attempt = Instant::now();
        match identity(address) {
            Ok(name) => *made.answers.entry(name).or_default() += 1,
            Err(error) => {
                made.failures.push(format!("{:?} after the start: {error}", attempt.duration_since(start)));
            }
        }
        made.slowest = made.slowest.max(attempt.elapsed());
        count.fetch_add(1, Ordering::Relaxed);
        thread::park_timeout(pause);
    }
    made
}

/// As [`client::identity`], on the thread that it is called on: there are many.
fn identity(address: SocketAddr) -> io::Result<String> {
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    client::read_line(&stream)
}
