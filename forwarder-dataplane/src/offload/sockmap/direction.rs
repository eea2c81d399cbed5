//! One direction of a pair whose sockets the kernel joins: what it leaves to the agent, and the end of the stream.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use forwarder_common::sockmap::STREAM_BROKEN;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::memory::{Reservation, Size};
use forwarder_kernel::sockmap::Sockmap;
use forwarder_kernel::tcp::tcp_info::{CLOSE, Info, has_ended, unacknowledged};

/// How often a consistent answer is tried for: acknowledgements may arrive between two system calls.
const ATTEMPTS: usize = 64;
/// How many times a direction reads before others may.
const ROUNDS: u32 = 16;

/// What arrives on one socket of a pair and leaves on the other.
#[derive(Debug)]
pub(super) struct Direction {
    /// The cookie of the socket that receives.
    pub(super) cookie: u64,
    /// Whether the kernel redirects what that socket receives. Otherwise all of it is relayed.
    pub(super) is_redirected: bool,
    pub(super) size: Size,
    pub(super) reservation: Reservation,
    /// Bytes that had been received and relayed before the pair was joined.
    start_received: u64,
    /// Bytes that had been written to the other socket by then, by the kernel's count.
    start_written: u64,
    /// Bytes that were left to the agent and have been written since.
    relayed: u64,
    /// What the program was last told.
    told: (u64, Size),
    /// How many bytes the kernel had redirected when it was last looked.
    redirected: u64,
    /// What was read and not yet written.
    stash: Vec<u8>,
    phase: Phase,
    /// The kernel leaves bytes to the agent.
    is_passing: bool,
    /// How fast the sender may be.
    pace: Pace,
    /// The other socket takes nothing at the moment.
    is_blocked: bool,
}

/// How fast a sender may be.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Pace {
    /// As fast as its window lets it.
    Free,
    /// A segment at a time.
    Throttled,
    /// Hardly that.
    Stopped,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Open,
    /// The socket that receives has seen the end of the stream.
    Ending,
    /// The end has been passed on.
    Done,
}

/// Why a direction cannot go on.
#[derive(Debug)]
pub(super) enum Fault {
    /// The socket that receives has failed.
    Source,
    /// The socket that sends has failed.
    Target,
    /// Bytes are missing.
    Lost,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Stepped {
    /// How many bytes were relayed.
    pub(super) relayed: u64,
    /// Something is to be looked for again, of which no event tells.
    pub(super) is_waiting: bool,
    /// How far the receiver has come, where that is what is waited for.
    pub(super) acknowledged: u64,
}

/// How a direction stands, by what the kernel has received and written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Progress {
    /// Bytes that were received and have not been written to the other socket.
    pub(crate) missing: u64,
    /// Bytes that were written there and have not been acknowledged.
    pub(crate) unacknowledged: u32,
}

impl Direction {
    /// A direction of which `received` bytes have been received and relayed, between sockets that are not joined yet.
    pub(super) fn new(
        cookie: u64,
        received: u64,
        target: BorrowedFd<'_>,
        size: Size,
        reservation: Reservation,
    ) -> io::Result<Self> {
        Ok(Self {
            cookie,
            is_redirected: false,
            size,
            reservation,
            start_received: received,
            start_written: written(target)?,
            relayed: 0,
            told: (0, size),
            redirected: 0,
            stash: Vec::new(),
            phase: Phase::Open,
            is_passing: false,
            pace: Pace::Free,
            is_blocked: false,
        })
    }

    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Whether the socket that receives is to be watched for bytes.
    pub(super) fn wants_read(&self) -> bool {
        self.phase == Phase::Open
            && self.stash.is_empty()
            && !self.is_blocked
            && (self.is_passing || !self.is_redirected)
    }

    /// Whether the kernel has left bytes to the agent, or the sender is to go on at some time.
    pub(super) fn has_work(&self) -> bool {
        self.is_redirected && (self.is_passing || self.pace != Pace::Free)
    }

    /// Whether the other one is to be watched for room.
    pub(super) fn wants_write(&self) -> bool {
        self.is_blocked
    }

    /// The kernel leaves bytes to the agent.
    pub(super) fn passes(&mut self) {
        self.is_passing = true;
    }

    /// Too much is held: the sender is to wait.
    pub(super) fn throttle(&mut self, source: BorrowedFd<'_>) {
        self.slow_down(source, Pace::Throttled, Size::throttle);
    }

    fn slow_down(
        &mut self,
        source: BorrowedFd<'_>,
        pace: Pace,
        slow_down: impl FnOnce(Size, BorrowedFd<'_>) -> io::Result<()>,
    ) {
        if self.pace < pace {
            self.pace = pace;
            if let Err(error) = slow_down(self.size, source) {
                tracing::debug!(%error, "cannot shrink the window of a sender");
            }
        }
    }

    fn resume(&mut self, source: BorrowedFd<'_>) {
        self.is_passing = false;
        if std::mem::replace(&mut self.pace, Pace::Free) != Pace::Free
            && let Err(error) = self.size.open(source)
        {
            tracing::warn!(%error, "cannot open the window of a sender again: the connection stays slow");
        }
    }

    /// Lets the sender go on where no more is held than may be.
    fn resume_if_drained(
        &mut self,
        sockmap: &Sockmap,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        stepped: &mut Stepped,
    ) -> Result<(), Fault> {
        let stream = sockmap.stream(self.cookie).ok_or(Fault::Lost)?;
        let acknowledged = acknowledged(target).map_err(|_| Fault::Target)?;
        let all = self.start_written + stream.redirected + self.relayed;
        if all.saturating_sub(acknowledged) <= u64::from(self.size.full()) {
            self.resume(source);
        } else {
            stepped.is_waiting = true;
            stepped.acknowledged = acknowledged;
        }
        Ok(())
    }

    /// The end of the stream has arrived; what came before it may still be on its way.
    pub(super) fn ends(&mut self) {
        if self.phase == Phase::Open {
            self.phase = Phase::Ending;
        }
    }

    /// Gives it another size.
    pub(super) fn resize(&mut self, sockmap: &Sockmap, size: Size) {
        self.size = size;
        self.pace = Pace::Free;
        self.tell(sockmap);
    }

    /// Whether more has been redirected than when this was last asked.
    pub(super) fn has_moved(&mut self, redirected: u64) -> bool {
        std::mem::replace(&mut self.redirected, redirected) != redirected
    }

    /// How many bytes the agent has relayed.
    pub(super) fn relayed(&self) -> u64 {
        self.relayed
    }

    /// Relays what the kernel leaves, and passes the end on once everything before it has been written.
    pub(super) fn step(
        &mut self,
        sockmap: &Sockmap,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        scratch: &mut [u8],
    ) -> Result<Stepped, Fault> {
        let mut stepped = Stepped::default();
        if self.phase == Phase::Done {
            return Ok(stepped);
        }
        let before = self.relayed;
        let relayed = self.relay(sockmap, source, target, scratch, &mut stepped);
        stepped.relayed = self.relayed - before;
        relayed?;
        if self.phase == Phase::Ending {
            let progress = self.progress(sockmap, source, target)?;
            if progress.missing > 0 {
                stepped.is_waiting |= !self.is_blocked;
            } else {
                match shutdown(target, Shutdown::Write) {
                    Ok(()) | Err(Errno::NOTCONN) => self.phase = Phase::Done,
                    Err(_) => return Err(Fault::Target),
                }
            }
        }
        Ok(stepped)
    }

    fn relay(
        &mut self,
        sockmap: &Sockmap,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        scratch: &mut [u8],
        stepped: &mut Stepped,
    ) -> Result<(), Fault> {
        if self.pace != Pace::Free && !self.is_passing {
            self.resume_if_drained(sockmap, source, target, stepped)?;
        }
        let is_wanted = !self.is_redirected || self.is_passing || self.phase == Phase::Ending;
        if !is_wanted {
            return Ok(());
        }
        for _ in 0..ROUNDS {
            if !self.flush(target)? {
                if self.is_redirected {
                    self.tell(sockmap);
                }
                return Ok(());
            }
            if self.is_redirected {
                // First the program is told, and then it is seen what it has left: it does the reverse, so that one of the
                // two sees the other.
                self.tell(sockmap);
                let stream = sockmap.stream(self.cookie).ok_or(Fault::Lost)?;
                if stream.state == STREAM_BROKEN {
                    return Err(Fault::Lost);
                }
                if stream.passed == self.relayed {
                    self.resume(source);
                    return Ok(());
                }
                self.is_passing = true;
                // Otherwise what was left would never all have been relayed.
                self.slow_down(source, Pace::Stopped, Size::stop);
                // What was redirected comes before what was left.
                // Where it is more, that is seen the next time.
                let (written, _) = written_at_least(target).map_err(|_| Fault::Target)?;
                let written = written.saturating_sub(self.start_written);
                let held = unacknowledged(target.as_raw_fd()).map_err(|_| Fault::Target)?;
                if written != stream.redirected + self.relayed || held > self.size.full() {
                    stepped.is_waiting = true;
                    return Ok(());
                }
            }
            match recv(source, &mut *scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => {
                    self.ends();
                    return Ok(());
                }
                Ok((read, _)) => {
                    self.stash.extend_from_slice(scratch.get(..read).unwrap_or_default());
                    self.flush(target)?;
                }
                Err(Errno::AGAIN) => {
                    // It may still be queued behind what waits for this socket.
                    stepped.is_waiting |= self.is_redirected;
                    return Ok(());
                }
                Err(Errno::INTR) => {}
                Err(_) => return Err(Fault::Source),
            }
        }
        stepped.is_waiting = true;
        Ok(())
    }

    /// Writes what was read; whether nothing of it is left.
    fn flush(&mut self, target: BorrowedFd<'_>) -> Result<bool, Fault> {
        let mut written = 0;
        self.is_blocked = false;
        while let Some(rest) = self.stash.get(written..).filter(|rest| !rest.is_empty()) {
            match send(target, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => written += sent,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.is_blocked = true;
                    break;
                }
                Err(_) => return Err(Fault::Target),
            }
        }
        self.relayed += written as u64;
        self.stash.drain(..written);
        if self.stash.is_empty() {
            // An idle pair holds no buffer.
            self.stash = Vec::new();
        }
        Ok(!self.is_blocked)
    }

    /// Tells the program how much has been relayed.
    fn tell(&mut self, sockmap: &Sockmap) {
        let told = (self.relayed, self.size);
        if std::mem::replace(&mut self.told, told) != told
            && let Err(error) = sockmap.set_credit(self.cookie, self.size.credits(self.relayed))
        {
            tracing::warn!(%error, "the eBPF program does not redirect all bytes of a connection: the agent copies them, more slowly");
        }
    }

    /// What has been received and not been passed on, and what of that has not been acknowledged.
    pub(super) fn progress(
        &self,
        sockmap: &Sockmap,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
    ) -> Result<Progress, Fault> {
        // First what was written: what is received meanwhile may only add to what is missing.
        let (written, _) = written_at_least(target).map_err(|_| Fault::Target)?;
        let written = written.saturating_sub(self.start_written);
        let info = Info::read(source.as_raw_fd()).map_err(|_| Fault::Source)?;
        let received = self.received(sockmap, &info)?;
        Ok(Progress {
            missing: received.saturating_sub(written),
            unacknowledged: unacknowledged(target.as_raw_fd()).map_err(|_| Fault::Target)?,
        })
    }

    /// How many bytes have been received since the pair was joined, or read before and not relayed.
    fn received(&self, sockmap: &Sockmap, info: &Info) -> Result<u64, Fault> {
        let received = info.received.saturating_sub(self.start_received);
        if info.state != CLOSE {
            return Ok(received.saturating_sub(u64::from(has_ended(info.state))));
        }
        if !self.is_redirected {
            // As below: all of it has been read.
            let read = self.relayed + self.stash.len() as u64;
            return if received == read + 1 { Ok(read) } else { Err(Fault::Source) };
        }
        // By both ends, of which that of the stream counts as a byte, or by a reset, which does not: the program has seen
        // every byte.
        let stream = sockmap.stream(self.cookie).ok_or(Fault::Lost)?;
        let evaluated = stream.redirected + stream.passed;
        if received == evaluated + 1 { Ok(evaluated) } else { Err(Fault::Source) }
    }
}

/// How many bytes that were written to a socket have been acknowledged, from some beginning on.
fn acknowledged(socket: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(Info::read(socket.as_raw_fd())?.acknowledged)
}

/// How many bytes have been written to a socket, from some beginning on.
///
/// # Errors
/// The socket cannot be asked, or its peer acknowledges too fast for it (`WouldBlock`).
fn written(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let (written, is_exact) = written_at_least(socket)?;
    if is_exact { Ok(written) } else { Err(io::ErrorKind::WouldBlock.into()) }
}

/// How many at least, and whether no more. What is acknowledged between two questions is left out.
fn written_at_least(socket: BorrowedFd<'_>) -> io::Result<(u64, bool)> {
    let fd = socket.as_raw_fd();
    let mut most = 0;
    for _ in 0..ATTEMPTS {
        let before = Info::read(fd)?.acknowledged;
        let written = before + u64::from(unacknowledged(fd)?);
        if Info::read(fd)?.acknowledged == before {
            return Ok((written, true));
        }
        most = written.max(most);
    }
    Ok((most, false))
}
