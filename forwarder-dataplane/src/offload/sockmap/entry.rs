//! A pair as the thread sees it that looks after it: its record, its time-outs, and whether its bytes arrive.

use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;

use super::memory::Size;
use super::pair::{PairStep, SockPair};
use crate::counters::End;
use crate::record::Record;
use crate::relay::{Moved, Tier};
use forwarder_kernel::tcp::tcp_info::Silence;

/// How often what no event tells of is looked for: at first, and at last.
const SOON: Duration = Duration::from_millis(1);
const LATER: Duration = Duration::from_millis(50);
/// How long nothing may move before it is asked whether bytes are missing.
const STALLED: Duration = Duration::from_secs(5);
/// How long the same bytes may be missing then. A socket that has nothing left to send takes what is written to it at once; but the
/// kernel's worker that writes it was seen to be 12 s late on a node with far too much to do, for all pairs at once.
const GIVEN_UP: Duration = Duration::from_secs(30);
/// How long a direction of bulk data may be quiet before it gets small buffers.
const QUIET: Duration = Duration::from_secs(5);

/// How often it is looked in the time that a peer may say nothing whether it does.
const LOOKS: u32 = 16;

/// A pair that is looked after.
pub(super) struct Entry {
    pub(super) pair: SockPair,
    pub(super) record: Record,
    /// What each socket is watched for.
    pub(super) watched: [EventFlags; 2],
    /// How many redirected bytes of each direction have been counted.
    pub(super) counted: [u64; 2],
    /// When a byte last moved, and when one of each direction that was redirected did.
    pub(super) active: Instant,
    moved: [Instant; 2],
    /// When something is to be looked for, and how long after the last time.
    pub(super) check: Option<(Instant, Duration)>,
    /// How far the receivers had come then.
    acknowledged: [u64; 2],
    /// How many bytes had been acknowledged when that was last asked, since bytes have last moved.
    delivered: Option<[u64; 2]>,
    /// What was found when it was last asked whether bytes are missing.
    asked: Option<Asked>,
    /// When it was last looked whether its peers answer, and since when each does not.
    looked: Instant,
    silences: [Silence; 2],
}

struct Asked {
    at: Instant,
    /// Nothing is on its way.
    is_clean: bool,
    /// Bytes on their way to a socket that has nothing left to send.
    missing: [u64; 2],
}

impl Entry {
    /// A pair that has just been joined.
    pub(super) fn new(pair: SockPair, record: Record) -> Self {
        let now = Instant::now();
        Self {
            pair,
            record,
            watched: [EventFlags::empty(); 2],
            counted: [0; 2],
            active: now,
            moved: [now; 2],
            check: None,
            acknowledged: [0; 2],
            delivered: None,
            asked: None,
            looked: now,
            silences: <[Silence; 2]>::default(),
        }
    }

    /// Relays and passes on what there is, and sets when that is to be tried again.
    pub(super) fn step(&mut self, scratch: &mut [u8]) -> Result<PairStep, End> {
        let step = self.pair.step(scratch)?;
        let relayed = step.relayed.map(|bytes| {
            let mut moved = Moved::default();
            moved.bytes[Tier::Copy as usize] = bytes;
            moved
        });
        let now = Instant::now();
        if step.relayed != [0; 2] {
            self.active = now;
            self.record.count(relayed[0], relayed[1]);
        }
        self.check = step.is_waiting.then(|| {
            let wait = match self.check {
                Some((_, wait)) if step.relayed == [0; 2] && step.acknowledged == self.acknowledged => {
                    (wait * 2).min(LATER)
                }
                _ => SOON,
            };
            (now + wait, wait)
        });
        self.acknowledged = step.acknowledged;
        Ok(step)
    }

    /// Counts what the kernel has redirected; `None` where bytes are missing.
    pub(super) fn count(&mut self) -> Option<()> {
        let redirected = self.pair.redirected()?;
        if redirected != self.counted {
            let now = Instant::now();
            let mut moved = [Moved::default(); 2];
            for side in 0..2 {
                let bytes = redirected[side].saturating_sub(self.counted[side]);
                moved[side].bytes[Tier::Sockmap as usize] = bytes;
                if bytes > 0 {
                    self.moved[side] = now;
                }
            }
            self.counted = redirected;
            self.active = now;
            self.delivered = None;
            self.record.count(moved[0], moved[1]);
        }
        Some(())
    }

    /// Counts, and says how the pair ends if it has been idle for too long or bytes are missing.
    pub(super) fn look(&mut self, patience: Option<Duration>) -> Option<End> {
        if self.count().is_none() {
            return Some(End::Lost);
        }
        if let Some(patience) = patience
            && self.looked.elapsed() >= patience / LOOKS
        {
            self.looked = Instant::now();
            if let Some(end) = self.pair.silent(&mut self.silences, patience) {
                return Some(end);
            }
        }
        let settings = &self.record.serving.listener.settings;
        let idle = self.active.elapsed();
        let over = |timeout: Option<Duration>| timeout.is_some_and(|timeout| idle >= timeout);
        let end = if self.pair.is_half_closed() && over(settings.half_closed_timeout) {
            Some(End::HalfClosedTimeout)
        } else {
            over(settings.idle_timeout).then_some(End::IdleTimeout)
        };
        if end.is_some() {
            // What is held for a slow receiver moves too.
            let delivered = self.pair.acknowledged();
            match self.delivered.replace(delivered) {
                // It is told by the next look.
                None => return None,
                Some(before) if before == delivered => return end,
                Some(_) => self.active = Instant::now(),
            }
        }
        if idle < STALLED {
            self.asked = None;
            return None;
        }
        if self.asked.as_ref().is_some_and(|asked| asked.is_clean || asked.at.elapsed() < GIVEN_UP) {
            return None;
        }
        let progress = match self.pair.progress() {
            Ok(progress) => progress,
            Err(end) => return Some(end),
        };
        // What waits behind a socket that still has something to send waits for its peer.
        let missing = progress.map(|one| if one.unacknowledged == 0 { one.missing } else { 0 });
        let is_lost = self.asked.as_ref().is_some_and(|asked| {
            asked.missing.iter().zip(missing).any(|(before, missing)| missing > 0 && missing == *before)
        });
        if is_lost {
            return Some(End::Lost);
        }
        let is_clean = progress.iter().all(|one| one.missing == 0);
        self.asked = Some(Asked { at: Instant::now(), is_clean, missing });
        for (side, one) in progress.into_iter().enumerate() {
            let is_quiet = one.missing == 0 && one.unacknowledged == 0;
            if is_quiet && self.pair.size(side) != Size::Small && self.moved[side].elapsed() >= QUIET {
                self.pair.resize(side, Size::Small);
            }
        }
        None
    }
}
