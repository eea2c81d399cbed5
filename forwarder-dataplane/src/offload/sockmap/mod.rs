//! Tier `sockmap`: pairs whose sockets the kernel joins, so that what one receives the other sends.
//!
//! The sockets stay the agent's. They stand in an epoll set of their own, which is not woken by what the kernel redirects,
//! and one thread looks after them: it relays what the program leaves to it where a receiver is slow, passes ends and resets
//! on, counts, and ends what has stalled.

mod direction;
mod entry;
mod memory;
mod pair;
mod self_test;
mod view;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use forwarder_common::sockmap::{NOTICE_BROKEN, NOTICE_BUSY, NOTICE_FULL, NOTICE_PASSED};
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use slab::Slab;

use self::entry::Entry;
use self::memory::Memory;
use self::pair::{NotJoined, PairStep, SockPair};
use crate::counters::End;
use crate::record::Record;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::sockmap::{Sockmap, check_kernel};
use forwarder_runtime::lock::lock;

pub use self::self_test::{SelfTestError, self_test};

/// How often every pair is looked at.
const PERIOD: Duration = Duration::from_millis(250);
/// Where there are many, how much longer than looking at them takes the thread waits before the next time.
const MOST_WORK: u32 = 40;
/// The priority of the thread (`nice`).
const NICE: i32 = -10;
/// The most that is relayed at once.
const SCRATCH: usize = 256 << 10;
/// Events that one wait yields at most.
const EVENTS: usize = 256;
/// How many streams a probe needs.
const PROBED_STREAMS: u32 = 64;
/// What stands in the events of the two descriptors that are no sockets.
const WAKE: u64 = u64::MAX;
const NOTICES: u64 = u64::MAX - 1;

/// How tier `sockmap` is set up.
#[derive(Clone, Copy, Debug)]
pub struct SockmapSettings {
    /// Whether a kernel will do that is not known to be right.
    pub unsafe_kernel: bool,
    /// What its pairs may hold in memory, in bytes.
    pub memory: u64,
    /// How many pairs there may be.
    pub pairs: u32,
    /// Whose counters they are counted in.
    pub slot: usize,
    /// How long a peer may say nothing to what waits for its answer; `None` leaves it to the kernel.
    pub patience: Option<Duration>,
}

/// The pairs of the tier, or why there are none; empty until a listener wants it.
pub type SockmapCell = Arc<OnceLock<Result<Arc<SockmapPairs>, FallbackReason>>>;

/// The pairs of tier `sockmap`.
pub struct SockmapPairs {
    sockmap: Arc<Sockmap>,
    memory: Arc<Memory>,
    settings: SockmapSettings,
    epoll: OwnedFd,
    wake: OwnedFd,
    table: Mutex<Table>,
    incoming: Mutex<Vec<Entry>>,
    count: AtomicUsize,
    leaves: AtomicBool,
    stops: AtomicBool,
    stalled: AtomicU64,
}

#[derive(Default)]
struct Table {
    entries: Slab<Entry>,
    /// The entry and side of each socket, by its cookie.
    sides: HashMap<u64, (usize, usize)>,
    /// Entries of which something is to be looked for that no event tells of.
    waiting: Vec<usize>,
}

/// Why tier `sockmap` does not work.
#[derive(Debug, thiserror::Error)]
pub enum SockmapPairsError {
    /// The program cannot be had.
    #[error(transparent)]
    Sockmap(#[from] forwarder_kernel::sockmap::SockmapError),
    /// The kernel does not do what it should.
    #[error("the self-test has failed: {0}")]
    SelfTest(#[from] SelfTestError),
    /// There is no epoll set or thread to be had.
    #[error("cannot look after pairs: {0}")]
    Start(#[from] io::Error),
}

impl SockmapPairs {
    /// Loads the program, tests whether the kernel does what it should, and starts the thread that looks after pairs. It ends
    /// after [`Self::stop`].
    ///
    /// # Errors
    /// Why the tier does not work here.
    pub fn start(settings: SockmapSettings) -> Result<(Arc<Self>, JoinHandle<()>), SockmapPairsError> {
        if !settings.unsafe_kernel {
            check_kernel()?;
        }
        let sockmap = Arc::new(Sockmap::load(settings.pairs.saturating_mul(2))?);
        let started = Instant::now();
        self_test(&sockmap)?;
        tracing::info!(
            duration_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            "tier sockmap has passed its self-test"
        );
        let pairs = Arc::new(Self::new(sockmap, settings)?);
        let body = Arc::clone(&pairs);
        let thread = thread::Builder::new().name("sockmap".to_owned()).spawn(move || body.run())?;
        Ok((pairs, thread))
    }

    fn new(sockmap: Arc<Sockmap>, settings: SockmapSettings) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, EventData::new_u64(WAKE), EventFlags::IN | EventFlags::ET)?;
        sockmap.with_notices(|fd| epoll::add(&epoll, fd, EventData::new_u64(NOTICES), EventFlags::IN))?;
        Ok(Self {
            memory: Memory::new(settings.memory),
            sockmap,
            settings,
            epoll,
            wake,
            table: Mutex::default(),
            incoming: Mutex::default(),
            count: AtomicUsize::new(0),
            leaves: AtomicBool::new(false),
            stops: AtomicBool::new(false),
            stalled: AtomicU64::new(0),
        })
    }

    /// Joins two sockets, of which `moved` bytes have been relayed from the client and from the endpoint, all that was read.
    pub(crate) fn join(
        &self,
        downstream: impl AsFd,
        upstream: impl AsFd,
        moved: [u64; 2],
        listener_id: u32,
    ) -> Result<SockPair, NotJoined> {
        let sockets = [downstream.as_fd(), upstream.as_fd()];
        SockPair::join(&self.sockmap, &self.memory, sockets, moved, listener_id)
    }

    /// Looks after a joined pair from now on.
    pub(crate) fn add(&self, pair: SockPair, mut record: Record) {
        // Only one thread may add to one counter.
        record.slot = self.settings.slot;
        let entry = Entry::new(pair, record);
        self.count.fetch_add(1, Ordering::Relaxed);
        lock(&self.incoming).push(entry);
        self.wake();
    }

    /// Takes no more pairs: the agent shuts down, and its sockets go with it.
    pub fn leave(&self) {
        self.leaves.store(true, Ordering::Relaxed);
    }

    /// Whether no more pairs are taken: the agent shuts down, or nobody looks after them.
    pub fn is_leaving(&self) -> bool {
        self.leaves.load(Ordering::Relaxed)
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// How many bytes of memory are reserved for them.
    pub fn reserved_memory(&self) -> u64 {
        self.memory.reserved()
    }

    /// How many pairs were reset since bytes were missing.
    pub fn stalled(&self) -> u64 {
        self.stalled.load(Ordering::Relaxed)
    }

    /// The maps and the program.
    pub fn sockmap(&self) -> &Sockmap {
        &self.sockmap
    }

    /// Has the thread end soon, and every pair with it.
    pub fn stop(&self) {
        self.stops.store(true, Ordering::Relaxed);
        self.wake();
    }

    fn wake(&self) {
        // It fails only where the thread is woken already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn run(&self) {
        // It has little to do, but where it comes late, senders fill memory.
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "cannot raise the priority of the thread of tier sockmap");
        }
        let mut scratch = vec![0; SCRATCH].into_boxed_slice();
        let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
        let mut next_sweep = Instant::now() + PERIOD;
        while !self.stops.load(Ordering::Relaxed) {
            let until = self.table().next_check().map_or(next_sweep, |check| check.min(next_sweep));
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok();
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot wait for the sockets of tier sockmap: its connections are neither counted nor timed out");
                    break;
                }
            }
            let mut table = self.table();
            // Before a slot that has become free is given to another pair.
            self.take_events(&mut table, &events, &mut scratch);
            self.take_incoming(&mut table, &mut scratch);
            self.take_notices(&mut table, &mut scratch);
            self.check(&mut table, &mut scratch);
            let started = Instant::now();
            if started >= next_sweep {
                self.sweep(&mut table, &mut scratch);
                next_sweep = Instant::now() + (started.elapsed() * MOST_WORK).max(PERIOD);
            }
        }
        self.leave();
        self.end_all(End::Drained);
    }

    fn take_incoming(&self, table: &mut Table, scratch: &mut [u8]) {
        for entry in std::mem::take(&mut *lock(&self.incoming)) {
            let cookies = entry.pair.cookies();
            let slot = table.entries.insert(entry);
            for (side, cookie) in cookies.into_iter().enumerate() {
                table.sides.insert(cookie, (slot, side));
            }
            let watched = (0..2).try_for_each(|side| {
                let Some(entry) = table.entries.get_mut(slot) else { return Ok(()) };
                entry.watched[side] = entry.pair.interest(side);
                let data = EventData::new_u64(data_of(slot, side));
                epoll::add(&self.epoll, entry.pair.socket(side), data, entry.watched[side])
            });
            match watched {
                // A notice may have come before the entry.
                Ok(()) => self.step_if_noticed(table, slot, scratch),
                Err(error) => {
                    tracing::warn!(%error, "cannot watch a connection of tier sockmap: it is reset");
                    self.end(table, slot, End::Lost);
                }
            }
        }
    }

    fn take_events(&self, table: &mut Table, events: &[Event], scratch: &mut [u8]) {
        for event in events {
            let (data, flags) = (event.data.u64(), event.flags);
            if matches!(data, WAKE | NOTICES) {
                continue;
            }
            let (slot, side) = slot_of(data);
            let Some(entry) = table.entries.get_mut(slot) else { continue };
            match entry.pair.met(side, flags) {
                Some(end) => self.end(table, slot, end),
                None => self.step(table, slot, scratch),
            }
        }
    }

    fn take_notices(&self, table: &mut Table, scratch: &mut [u8]) {
        while let Some(notice) = self.sockmap.next_notice() {
            let Some((slot, side)) = table.sides.get(&notice.cookie).copied() else { continue };
            let Some(entry) = table.entries.get_mut(slot) else { continue };
            match notice.kind {
                NOTICE_PASSED => {
                    entry.pair.passes(side);
                    self.step(table, slot, scratch);
                }
                NOTICE_BUSY => _ = entry.pair.grow(side),
                // A direction that outruns its receiver is one of bulk data.
                NOTICE_FULL if !entry.pair.grow(side) => {
                    entry.pair.throttle(side);
                    self.step(table, slot, scratch);
                }
                NOTICE_BROKEN => self.break_off(table, slot),
                _ => {}
            }
        }
    }

    /// Looks for what no event tells of.
    fn check(&self, table: &mut Table, scratch: &mut [u8]) {
        let now = Instant::now();
        for slot in std::mem::take(&mut table.waiting) {
            let Some((due, _)) = table.entries.get(slot).and_then(|entry| entry.check) else { continue };
            if due <= now {
                self.step(table, slot, scratch);
            } else {
                table.waiting.push(slot);
            }
        }
    }

    /// Relays and passes on what there is, and has the pair looked at again when that is needed.
    fn step(&self, table: &mut Table, slot: usize, scratch: &mut [u8]) {
        let Some(entry) = table.entries.get_mut(slot) else { return };
        let was_waiting = entry.check.is_some();
        match entry.step(scratch) {
            Err(End::Lost) => return self.break_off(table, slot),
            Err(end) => return self.end(table, slot, end),
            Ok(PairStep { is_finished: true, .. }) => return self.end(table, slot, End::Finished),
            Ok(_) => {}
        }
        let is_waiting = entry.check.is_some();
        for side in 0..2 {
            let interest = entry.pair.interest(side);
            if interest == entry.watched[side] {
                continue;
            }
            entry.watched[side] = interest;
            let data = EventData::new_u64(data_of(slot, side));
            if let Err(error) = epoll::modify(&self.epoll, entry.pair.socket(side), data, interest) {
                tracing::warn!(%error, "cannot watch a connection of tier sockmap: it is reset");
                return self.end(table, slot, End::Lost);
            }
        }
        if is_waiting && !(was_waiting && table.waiting.contains(&slot)) {
            table.waiting.push(slot);
        }
    }

    fn step_if_noticed(&self, table: &mut Table, slot: usize, scratch: &mut [u8]) {
        if table.entries.get_mut(slot).is_some_and(|entry| entry.pair.look_for_notices()) {
            self.step(table, slot, scratch);
        }
    }

    /// Looks at every pair.
    fn sweep(&self, table: &mut Table, scratch: &mut [u8]) {
        let slots: Vec<usize> = table.entries.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            let Some(entry) = table.entries.get_mut(slot) else { continue };
            if entry.record.is_removed() {
                self.end(table, slot, End::Removed);
                continue;
            }
            match entry.look(self.settings.patience) {
                None => self.step_if_noticed(table, slot, scratch),
                Some(End::Lost) => self.break_off(table, slot),
                Some(end) => self.end(table, slot, end),
            }
        }
    }

    /// Ends a pair of which bytes are missing.
    fn break_off(&self, table: &mut Table, slot: usize) {
        if let Some(entry) = table.entries.get(slot) {
            self.stalled.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(
                listener = %entry.record.serving.listener.name,
                downstream.addr = %entry.record.downstream,
                "bytes of a connection at tier sockmap do not arrive: it is reset"
            );
        }
        self.end(table, slot, End::Lost);
    }

    /// Ends a pair: closes its sockets, with a reset unless both directions have ended.
    fn end(&self, table: &mut Table, slot: usize, end: End) {
        let Some(mut entry) = table.entries.try_remove(slot) else { return };
        for cookie in entry.pair.cookies() {
            table.sides.remove(&cookie);
        }
        for side in 0..2 {
            // The worker may still hold the socket too: closed here alone, it would go on to tell of its end, in the name of
            // the next pair in this slot. One that was never added is not there.
            let _ = epoll::delete(&self.epoll, entry.pair.socket(side));
        }
        entry.count();
        entry.record.end = end;
        if end == End::Finished {
            entry.pair.finish();
        }
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    fn end_all(&self, end: End) {
        let mut table = self.table();
        self.take_incoming(&mut table, &mut [0; 4096]);
        let slots: Vec<usize> = table.entries.iter().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.end(&mut table, slot, end);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Table {
    fn next_check(&self) -> Option<Instant> {
        let checks = self.waiting.iter().filter_map(|slot| self.entries.get(*slot)?.check);
        checks.map(|(due, _)| due).min()
    }
}

/// Tries everything that tier `sockmap` needs, without leaving anything behind; with `unsafe_kernel`, on any kernel.
///
/// # Errors
/// What does not work, and why.
pub fn probe(unsafe_kernel: bool) -> Result<String, String> {
    if !unsafe_kernel {
        check_kernel().map_err(|error| error.to_string())?;
    }
    let sockmap = Arc::new(Sockmap::load(PROBED_STREAMS).map_err(|error| error.to_string())?);
    let started = Instant::now();
    self_test(&sockmap).map_err(|error| format!("the self-test has failed: {error}"))?;
    Ok(format!("joined by a sockmap; the self-test passed in {} ms", started.elapsed().as_millis()))
}

/// What stands in the events of a socket.
fn data_of(slot: usize, side: usize) -> u64 {
    (slot as u64) << 1 | side as u64
}

fn slot_of(data: u64) -> (usize, usize) {
    ((data >> 1) as usize, (data & 1) as usize)
}
