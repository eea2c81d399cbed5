//! Networks in which the test decides what becomes of packets.
//!
//! A [`Wire`] joins two namespaces by a TAP device in each, and carries every frame itself, so that it can lose, repeat,
//! hold back and swallow them. Its frames are no larger than the MTU and their checksums are complete, as on a real wire
//! and unlike between veths. [`lose_at_ingress`] is the cheap way to lose packets at a host.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cut::cut;
use crate::netns::{NetNs, Topology};
use crate::random::Random;
use crate::tap;

/// The longest that the wire waits for a frame before it looks whether it is to stop.
const STOP_INTERVAL: Duration = Duration::from_millis(20);
/// How many frames of one direction are held at most. What comes then goes on at once.
const HELD: usize = 512;
/// Longer than any frame.
const LONGEST: usize = 65_536 + 64;
/// What stands before the packet in a frame: the addresses and the type.
const ETHERNET: usize = 14;
/// What shares of frames refer to.
const WHOLE: u64 = 10_000;

/// What a wire does to the frames of both directions. The default is nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Trouble {
    /// How many of 10,000 frames it loses.
    pub lost: u64,
    /// How many of 10,000 frames it delivers twice.
    pub repeated: u64,
    /// How many of 10,000 frames it holds while later ones go on.
    pub held: u64,
    /// The longest that a frame is held.
    pub hold: Duration,
    /// The longest packet, in bytes, that it carries; longer ones vanish.
    pub longest: Option<usize>,
    /// The longest packet, in bytes, that it carries whole; it cuts longer ones up, like a router that heeds no DF.
    pub whole: Option<usize>,
}

impl Trouble {
    /// Nothing comes through.
    pub const OUTAGE: Self =
        Self { lost: WHOLE, repeated: 0, held: 0, hold: Duration::ZERO, longest: None, whole: None };
}

/// What a wire has done so far, in frames.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Done {
    /// Frames that it carried or lost; of a packet that it cuts up, each fragment.
    pub seen: u64,
    /// Packets that it cut up.
    pub cut: u64,
    /// Lost, or too long.
    pub lost: u64,
    /// Delivered twice.
    pub repeated: u64,
    /// Held.
    pub held: u64,
}

#[derive(Debug, Default)]
struct Shared {
    trouble: Mutex<Trouble>,
    stop: AtomicBool,
    seen: AtomicU64,
    cut: AtomicU64,
    lost: AtomicU64,
    repeated: AtomicU64,
    held: AtomicU64,
}

/// A wire between two namespaces, cut when dropped.
#[derive(Debug)]
pub struct Wire {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Wire {
    /// Joins two namespaces by a device in each. What becomes of a frame follows from `seed` and the frames before it.
    pub fn join(ends: [(&NetNs, &str); 2], seed: u64) -> Result<Self> {
        let [one, two] = ends.map(|(netns, name)| {
            netns.run(|| tap::open(name)).with_context(|| format!("make the TAP device {name}"))
        });
        let ends = [one?, two?];
        let shared = Arc::new(Shared::default());
        let carrier = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("wire".to_owned())
            .spawn(move || carry(&ends, &carrier, seed).expect("TAP devices stay while they are open"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// From now on, does this to the frames.
    pub fn set(&self, trouble: Trouble) {
        *self.shared.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// What it has done.
    pub fn done(&self) -> Done {
        let Shared { seen, cut, lost, repeated, held, .. } = &*self.shared;
        let [seen, cut, lost, repeated, held] =
            [seen, cut, lost, repeated, held].map(|counter| counter.load(Ordering::Relaxed));
        Done { seen, cut, lost, repeated, held }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been printed already.
            let _ = thread.join();
        }
    }
}

/// The usual network with wires to the client and to the first host of backends, in this order.
pub fn wired(seed: u64) -> Result<(Topology, [Wire; 2])> {
    let mut wires = Vec::new();
    let topology = Topology::joined(|node, near, host, far| {
        if wires.len() < 2 {
            wires.push(Wire::join([(node, near), (host, far)], seed + wires.len() as u64)?);
            Ok(())
        } else {
            node.ip(&["link", "add", near, "type", "veth", "peer", "name", far, "netns", host.name()])
        }
    })?;
    Ok((topology, wires.try_into().expect("there are three hosts")))
}

/// Loses so many of a thousand packets that arrive at a device. Between veths a packet may hold 64 KiB.
pub fn lose_at_ingress(netns: &NetNs, device: &str, of_thousand: u32) -> Result<()> {
    let rules = format!(
        "add table netdev lossy\n\
         add chain netdev lossy in {{ type filter hook ingress device \"{device}\" priority 0; }}\n\
         add rule netdev lossy in numgen random mod 1000 < {of_thousand} counter drop\n"
    );
    netns.stdout(Command::new("nft").arg(rules)).map(drop)
}

/// How many packets [`lose_at_ingress`] has lost.
pub fn lost_at_ingress(netns: &NetNs) -> Result<u64> {
    let rules = netns.stdout(Command::new("nft").args(["list", "chain", "netdev", "lossy", "in"]))?;
    let (_, rest) = rules.split_once("counter packets ").context("a rule without a counter")?;
    let number = rest.split_ascii_whitespace().next().context("a counter without a number")?;
    Ok(number.parse()?)
}

/// Carries frames until it is told to stop.
fn carry(ends: &[File; 2], shared: &Shared, seed: u64) -> io::Result<()> {
    let mut random = Random::new(seed);
    let mut held: [Held; 2] = Default::default();
    let mut buffer = vec![0; LONGEST];
    while !shared.stop.load(Ordering::Relaxed) {
        let now = Instant::now();
        let due = held.iter().filter_map(Held::due).min();
        let wait = due.map_or(STOP_INTERVAL, |due| due.saturating_duration_since(now).min(STOP_INTERVAL));
        let timeout = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
        let mut fds = [PollFd::new(&ends[0], PollFlags::IN), PollFd::new(&ends[1], PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let trouble = *shared.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        for (from, held) in held.iter_mut().enumerate() {
            let (mut source, mut destination) = (&ends[from], &ends[1 - from]);
            // A bounded number, so that one direction does not keep the other waiting.
            for _ in 0..64 {
                let size = match source.read(&mut buffer) {
                    Ok(size) => size,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error),
                };
                for frame in fragments(&buffer[..size], &trouble, shared) {
                    held.meet(&frame, &trouble, &mut random, shared, &mut destination);
                }
            }
            held.release(&mut destination);
        }
    }
    Ok(())
}

/// What becomes of a frame: itself, or the fragments of its packet.
fn fragments(frame: &[u8], trouble: &Trouble, shared: &Shared) -> Vec<Vec<u8>> {
    match trouble.whole {
        Some(whole) if frame.len() > whole + ETHERNET => {
            let identification = shared.cut.fetch_add(1, Ordering::Relaxed);
            cut(frame, whole, u32::try_from(identification).unwrap_or(0))
        }
        _ => vec![frame.to_vec()],
    }
}

/// The frames of one direction that are held, by when they go on and then by when they came.
#[derive(Default)]
struct Held {
    frames: BinaryHeap<Reverse<(Instant, u64, Vec<u8>)>>,
    came: u64,
}

impl Held {
    fn due(&self) -> Option<Instant> {
        self.frames.peek().map(|Reverse((due, ..))| *due)
    }

    /// Decides what becomes of a frame.
    fn meet(
        &mut self,
        frame: &[u8],
        trouble: &Trouble,
        random: &mut Random,
        shared: &Shared,
        destination: &mut &File,
    ) {
        let mut happens = |share| random.below(WHOLE) < share;
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        let (lost, repeated, is_held) =
            (happens(trouble.lost), happens(trouble.repeated), happens(trouble.held));
        count(&shared.seen);
        if lost || trouble.longest.is_some_and(|longest| frame.len() > longest + ETHERNET) {
            count(&shared.lost);
            return;
        }
        if repeated {
            count(&shared.repeated);
            deliver(frame, destination);
        }
        if is_held && self.frames.len() < HELD {
            count(&shared.held);
            self.came += 1;
            let most = u64::try_from(trouble.hold.as_micros()).unwrap_or(u64::MAX);
            let due = Instant::now() + Duration::from_micros(random.below(most.max(1)));
            self.frames.push(Reverse((due, self.came, frame.to_vec())));
        } else {
            deliver(frame, destination);
        }
    }

    /// Lets the frames go whose time has come.
    fn release(&mut self, destination: &mut &File) {
        let now = Instant::now();
        while self.due().is_some_and(|due| due <= now) {
            if let Some(Reverse((_, _, frame))) = self.frames.pop() {
                deliver(&frame, destination);
            }
        }
    }
}

fn deliver(frame: &[u8], destination: &mut &File) {
    // The device may be down while the network is being made or removed: the frame is lost, as on a wire.
    let _ = destination.write(frame);
}
