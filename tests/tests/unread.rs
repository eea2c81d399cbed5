//! One end sends and does not read, while the other sends too: what the first one sends arrives all the same, and once it
//! reads, so does what it was sent.

use std::env;
use std::io::{self, Read as _, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::kernel::standing;
use forwarder_tests::random::{self, Random};
use forwarder_tests::{Datapath, Forwarding, require_root, serialise, wait_for};

static HEAVY: Mutex<()> = Mutex::new(());

/// How many connections there are of each kind unless `FORWARDER_TEST_UNREAD` says so.
const CONNECTIONS: u64 = 300;
const AT_ONCE: usize = 32;
/// How many bytes the end that does not read sends: more than fit into the first windows.
const SENT: u64 = 300_000;
/// How long they may take, while the other direction stands still.
const HEARD: Duration = Duration::from_secs(6);
/// How long the rest may take once it is read.
const READ: Duration = Duration::from_secs(10);

/// When connections are offloaded: as they are by default, and before they have a window to speak of.
const OFFLOADS: [&[&str]; 2] = [&[], &["--offload-after", "1KiB,5ms"]];

/// The end that does not read.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Mute {
    Endpoint,
    Client,
}

/// Sends small pieces with pauses.
struct Paced<'a>(&'a TcpStream, Random);

impl Write for Paced<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let Self(stream, random) = self;
        thread::sleep(Duration::from_micros(random.below(2000)));
        stream.write(&data[..data.len().min(8192)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How many bytes the end that reads sends.
fn amount(seed: u64) -> u64 {
    50_000 + Random::new(seed).below(350_000)
}

/// The end that does not read until the other one has `heard` all that it sends.
fn be_mute(mut stream: &TcpStream, seed: u64, heard: &AtomicBool) -> Result<()> {
    random::send(&mut Paced(stream, Random::new(seed)), seed, SENT).context("send without reading")?;
    wait_for(HEARD, || heard.load(Ordering::Relaxed).then_some(())).context("the other end heard nothing")?;
    stream.set_read_timeout(Some(READ))?;
    let received = random::receive(&mut stream, amount(seed)).context("read at last")?;
    ensure!(received == random::digest(!seed, amount(seed)), "bytes changed");
    stream.write_all(b"!").context("answer")
}

/// The end that sends and reads at once.
fn speak(mut stream: &TcpStream, seed: u64, heard: &AtomicBool) -> Result<()> {
    thread::scope(|scope| {
        let mut writer = stream;
        let sender = scope.spawn(move || {
            // So that the handover comes amid what both send.
            thread::sleep(Duration::from_micros(Random::new(!seed).below(10_000)));
            random::send(&mut writer, !seed, amount(seed))
        });
        stream.set_read_timeout(Some(HEARD))?;
        let received = random::receive(&mut stream, SENT).context("stood still")?;
        heard.store(true, Ordering::Relaxed);
        ensure!(received == random::digest(seed, SENT), "bytes changed");
        sender.join().expect("the sender does not panic").context("send")?;
        let mut answer = [0];
        stream.set_read_timeout(Some(READ))?;
        stream.read_exact(&mut answer).context("what was sent did not arrive once it was read")?;
        Ok(())
    })
}

/// Plays an end of the connection that has a seed.
fn play(stream: &TcpStream, mute: bool, seed: u64, heard: &AtomicBool) -> Result<()> {
    if mute { be_mute(stream, seed, heard) } else { speak(stream, seed, heard) }
}

/// Plays `count` connections; what went wrong with each that did not go well.
fn converse(datapath: Datapath, offload: &[&str], mute: Mute, count: u64) -> Vec<String> {
    let heard: Arc<Vec<AtomicBool>> = Arc::new((0..count).map(|_| AtomicBool::new(false)).collect());
    let index = |seed: u64| usize::try_from(seed).expect("a small number");
    let failures = Arc::new(Mutex::new(Vec::new()));
    let fail = |failures: &Mutex<Vec<String>>, who: &str, seed: u64, outcome: Result<()>| {
        if let Err(error) = outcome {
            failures.lock().expect("nobody panics").push(format!("seed {seed}, {who}: {error:#}"));
        }
    };
    let serve = {
        let (heard, failures) = (Arc::clone(&heard), Arc::clone(&failures));
        move |mut stream: &TcpStream| {
            let mut seed = [0; 8];
            stream.read_exact(&mut seed)?;
            let seed = u64::from_le_bytes(seed);
            fail(
                &failures,
                "endpoint",
                seed,
                play(stream, mute == Mute::Endpoint, seed, &heard[index(seed)]),
            );
            Ok(())
        }
    };
    let agent = datapath.agent_with(offload);
    let forwarding = Forwarding::start_with(&agent, serve).expect("an agent and an endpoint");
    datapath.wait_ready(&forwarding.agent);
    let (next, slowest, shown) = (AtomicU64::new(0), Mutex::new(Duration::ZERO), Once::new());
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        return;
                    }
                    let started = Instant::now();
                    let outcome = forwarding.connect().map_err(anyhow::Error::from).and_then(|stream| {
                        (&stream).write_all(&seed.to_le_bytes())?;
                        let outcome = play(&stream, mute == Mute::Client, seed, &heard[index(seed)]);
                        if outcome.is_err() {
                            // While both ends are there still.
                            shown.call_once(|| {
                                println!("{}", standing(&forwarding.agent, &forwarding.topology));
                            });
                        }
                        outcome
                    });
                    fail(&failures, "client", seed, outcome);
                    let mut slowest = slowest.lock().expect("nobody panics");
                    *slowest = started.elapsed().max(*slowest);
                }
            });
        }
    });
    let slowest = *slowest.lock().expect("nobody panics");
    println!(
        "{datapath} {offload:?}: {count} connections, the {mute:?} does not read, slowest {slowest:.2?}"
    );
    assert!(
        !datapath.is_by_kernel() || datapath.forwarded(&forwarding.agent).expect("metrics") > 0,
        "nothing was offloaded"
    );
    // Where an endpoint fails its client does, which waits for its answer.
    failures.lock().expect("nobody panics").clone()
}

#[test]
fn who_does_not_read_is_heard() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let count = env::var("FORWARDER_TEST_UNREAD").ok();
    let count = count.map_or(CONNECTIONS, |count| count.parse().expect("a number of connections"));
    let mut failures = Vec::new();
    for datapath in Datapath::chosen() {
        let offloads = if datapath.is_by_kernel() { &OFFLOADS[..] } else { &OFFLOADS[..1] };
        for offload in offloads {
            for mute in [Mute::Endpoint, Mute::Client] {
                let found = converse(datapath, offload, mute, count);
                failures
                    .extend(found.into_iter().map(|one| format!("{datapath} {offload:?} {mute:?}: {one}")));
            }
        }
    }
    assert!(failures.is_empty(), "{} ends did not go well:\n{}", failures.len(), failures.join("\n"));
}
