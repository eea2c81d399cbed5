//! Connections that carry data in both directions for as long as a test likes.

use std::io::{self, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::client;
use crate::random::{self, Random};
use crate::wait::wait_until;

/// How much is sent at a time, and how long after the last.
const BLOCK: usize = 8 << 10;
const PAUSE: Duration = Duration::from_millis(20);
/// How much more has to return before a connection counts as alive.
const PROGRESS: u64 = 4 * BLOCK as u64;
/// Many connections have two threads each.
const STACK: usize = 256 << 10;

/// Connections to an echo server, each of which sends and receives until it is told to end.
#[derive(Debug)]
pub struct Traffic {
    stop: Arc<AtomicBool>,
    received: Vec<Arc<AtomicU64>>,
    threads: Vec<JoinHandle<Result<u64>>>,
}

impl Traffic {
    /// Starts sending on each connection.
    pub fn start(streams: Vec<TcpStream>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut traffic = Self { stop, received: Vec::new(), threads: Vec::new() };
        for (seed, stream) in streams.into_iter().enumerate() {
            let (stop, received) = (Arc::clone(&traffic.stop), Arc::new(AtomicU64::new(0)));
            traffic.received.push(Arc::clone(&received));
            let carry = move || carry(&stream, seed as u64, &stop, &received);
            let thread = thread::Builder::new().stack_size(STACK).spawn(carry).expect("start a thread");
            traffic.threads.push(thread);
        }
        traffic
    }

    /// Waits until every connection has received a good deal more than it has now.
    #[track_caller]
    pub fn wait_progress(&self, deadline: Duration) {
        let count = || self.received.iter().map(|received| received.load(Ordering::Relaxed));
        let before: Vec<u64> = count().collect();
        wait_until("every connection goes on", deadline, || {
            count().zip(&before).all(|(now, before)| now >= before + PROGRESS)
        });
    }

    /// Ends every connection; fails with the first of them on which a byte was lost or changed. Tells how many bytes went
    /// each way.
    pub fn finish(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut total = 0;
        let mut failures = Vec::new();
        for (number, thread) in self.threads.drain(..).enumerate() {
            match thread.join().expect("the thread does not panic") {
                Ok(bytes) => total += bytes,
                Err(error) => failures.push(format!("connection {number}: {error:#}")),
            }
        }
        ensure!(failures.is_empty(), "{} failed: {failures:#?}", failures.len());
        Ok(total)
    }
}

impl Drop for Traffic {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Sends and receives on one connection; tells how many bytes returned.
fn carry(stream: &TcpStream, seed: u64, stop: &AtomicBool, received: &AtomicU64) -> Result<u64> {
    thread::scope(|scope| {
        let sender = thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, || send(stream, seed, stop))
            .expect("start a thread");
        let arrived = receive(stream, received);
        let sent = sender.join().expect("the sender does not panic").context("send")?;
        let arrived = arrived.context("receive")?;
        ensure!(
            sent == arrived,
            "{} bytes were sent with SHA-256 {}, {} returned with {}",
            sent.1,
            random::hex(sent.0),
            arrived.1,
            random::hex(arrived.0)
        );
        Ok(arrived.1)
    })
}

fn send(mut stream: &TcpStream, seed: u64, stop: &AtomicBool) -> io::Result<([u8; 32], u64)> {
    let (mut random, mut hash, mut length) = (Random::new(seed), Sha256::new(), 0);
    let mut block = vec![0; BLOCK];
    while !stop.load(Ordering::Relaxed) {
        random.fill(&mut block);
        hash.update(&block);
        stream.write_all(&block)?;
        length += block.len() as u64;
        thread::park_timeout(PAUSE);
    }
    stream.shutdown(Shutdown::Write)?;
    Ok((hash.finalize().into(), length))
}

fn receive(stream: &TcpStream, received: &AtomicU64) -> io::Result<([u8; 32], u64)> {
    let mut hash = Sha256::new();
    let mut block = vec![0; 2 * BLOCK];
    loop {
        match client::read(stream, &mut block)? {
            0 => return Ok((hash.finalize().into(), received.load(Ordering::Relaxed))),
            size => {
                hash.update(&block[..size]);
                received.fetch_add(size as u64, Ordering::Relaxed);
            }
        }
    }
}
