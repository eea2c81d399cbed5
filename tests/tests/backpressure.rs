//! A slow reader slows its sender and fills no memory.

use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::{Forwarding, peer, random, require_root, serialise, wait_for};

static HEAVY: Mutex<()> = Mutex::new(());
const DATAPATHS: [&str; 2] = ["splice", "copy"];
const TOTAL: u64 = 200 << 20;
/// More than the kernel's socket buffers hold on the way, less than all of the data.
const IN_FLIGHT: u64 = 100 << 20;
const RSS_GROWTH_KIB: u64 = 16 * 1024;
const WAIT: Duration = Duration::from_mins(1);

/// Counts what is written.
struct Counting<'a> {
    stream: &'a TcpStream,
    written: &'a AtomicU64,
}

impl Write for Counting<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let size = self.stream.write(data)?;
        self.written.fetch_add(size as u64, Ordering::Relaxed);
        Ok(size)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Waits until the count stands still for a while, and returns it.
fn stalled(count: &AtomicU64) -> u64 {
    let mut last = (count.load(Ordering::Relaxed), Instant::now());
    let stalled = wait_for(WAIT, || {
        let now = count.load(Ordering::Relaxed);
        if now != last.0 {
            last = (now, Instant::now());
        }
        (now > 0 && last.1.elapsed() > Duration::from_secs(1)).then_some(now)
    });
    stalled.expect("the sender stops while nobody reads")
}

#[test]
fn a_server_that_does_not_read_stops_the_client() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in DATAPATHS {
        let (go, gate) = mpsc::channel::<()>();
        let (sender, received) = mpsc::channel();
        let gate = Mutex::new(gate);
        let forwarding = Forwarding::start(&["--datapath", datapath], move |mut stream| {
            let waited = gate.lock().expect("one connection only").recv_timeout(WAIT);
            waited.map_err(io::Error::other)?;
            sender.send(random::receive_to_end(&mut stream)?).map_err(io::Error::other)
        })
        .unwrap();
        let stream = forwarding.connect().unwrap();
        let before = forwarding.agent.rss_kib().unwrap();
        let written = AtomicU64::new(0);
        thread::scope(|scope| {
            let client = scope.spawn(|| {
                let digest = random::send(&mut Counting { stream: &stream, written: &written }, 1, TOTAL)?;
                stream.shutdown(Shutdown::Write)?;
                io::Result::Ok(digest)
            });
            let sent = stalled(&written);
            let growth = forwarding.agent.rss_kib().unwrap().saturating_sub(before);
            println!("{datapath}: the client stopped after {sent} bytes; the agent grew by {growth} KiB");
            go.send(()).unwrap();
            let (digest, length) = received.recv_timeout(WAIT).unwrap();
            assert_eq!(length, TOTAL, "{datapath}");
            assert_eq!(client.join().unwrap().unwrap(), digest, "{datapath}");
            assert!(sent < IN_FLIGHT, "{datapath}: {sent} bytes went in while nobody read");
            assert!(growth < RSS_GROWTH_KIB, "{datapath}: the agent grew by {growth} KiB");
        });
    }
}

#[test]
fn a_client_that_does_not_read_stops_the_server() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in DATAPATHS {
        static WRITTEN: AtomicU64 = AtomicU64::new(0);
        WRITTEN.store(0, Ordering::Relaxed);
        let forwarding = Forwarding::start(&["--datapath", datapath], |stream| {
            random::send(&mut Counting { stream, written: &WRITTEN }, 2, TOTAL)?;
            stream.shutdown(Shutdown::Write)
        })
        .unwrap();
        let before = forwarding.agent.rss_kib().unwrap();
        let mut stream = forwarding.connect().unwrap();
        let sent = stalled(&WRITTEN);
        let growth = forwarding.agent.rss_kib().unwrap().saturating_sub(before);
        println!("{datapath}: the server stopped after {sent} bytes; the agent grew by {growth} KiB");
        let received = random::receive_to_end(&mut stream).unwrap();
        assert_eq!(received, (random::digest(2, TOTAL), TOTAL), "{datapath}");
        assert!(sent < IN_FLIGHT, "{datapath}: {sent} bytes went in while nobody read");
        assert!(growth < RSS_GROWTH_KIB, "{datapath}: the agent grew by {growth} KiB");
    }
}

#[test]
fn a_stalled_connection_does_not_slow_others() {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    // One worker serves all: nothing but the relay itself can keep them apart.
    let forwarding = Forwarding::start(&["--workers", "1"], |stream| {
        if WRITTEN.load(Ordering::Relaxed) == 0 {
            return random::send(&mut Counting { stream, written: &WRITTEN }, 3, TOTAL).map(drop);
        }
        peer::echo(stream)
    })
    .unwrap();
    let blocked = forwarding.connect().unwrap();
    stalled(&WRITTEN);
    let stream = forwarding.connect().unwrap();
    let start = Instant::now();
    for _ in 0..100 {
        forwarder_tests::client::ping(&stream, b"through").unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "100 messages took {:?}", start.elapsed());
    drop(blocked);
}
