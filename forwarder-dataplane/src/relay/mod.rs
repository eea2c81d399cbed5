//! Moves the bytes of a connected pair in userspace, in both directions, with half-close.
//!
//! Each [`Direction`] reads into a buffer that its worker shares among all connections and writes at once, so an idle
//! connection holds neither buffer nor pipe; only what the other side does not take is kept. Once a direction carries
//! bulk data, and the connection's [`Tier`] allows it, the bytes go through a pipe with `splice(2)` instead and never
//! enter userspace.

mod closing;
mod copy;
mod pipe;
mod receive;

use std::io;
use std::task::{Context, Poll, ready};

use rustix::net::Shutdown;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;

pub(crate) use self::closing::{deliver_on_close, reset_on_close};
use self::copy::Stash;
use self::pipe::LoadedPipe;
pub use self::pipe::PipePool;
pub(crate) use self::receive::prepare;

/// How many times a direction reads before it lets other connections of the worker run.
const ROUNDS_PER_POLL: u32 = 16;
/// The first read of a direction asks for this many bytes; the amount doubles with each read that fills it.
const FIRST_READ: usize = 16 << 10;
/// The most that one read asks for, and so the most that one stalled direction keeps in memory.
const LARGEST_READ: usize = 256 << 10;
/// A direction is bulk, and spliced, after a read of this many bytes.
const BULK_READ: usize = 64 << 10;
/// A spliced direction is no longer bulk after this many transfers in a row of less than [`FIRST_READ`] bytes.
const SMALL_SPLICES: u8 = 8;

/// How the bytes of a connection are moved.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// `splice(2)` for bulk data, read and write for the rest.
    Splice,
    /// Read and write only.
    Copy,
    /// Packets translated and redirected by the kernel.
    Tc,
    /// What one socket receives sent by the other, by the kernel.
    Sockmap,
    /// As `tc`, from the client's SYN on: no socket of the node takes part.
    Direct,
}

impl Tier {
    /// Every tier, in the order of its discriminant.
    pub const ALL: [Self; 5] = [Self::Splice, Self::Copy, Self::Tc, Self::Sockmap, Self::Direct];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Splice => "splice",
            Self::Copy => "copy",
            Self::Tc => "tc",
            Self::Sockmap => "sockmap",
            Self::Direct => "direct",
        }
    }
}

/// Why bytes were moved by a slower tier than the one that was wanted.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fallback {
    /// The kernel refused `splice(2)` on these sockets.
    SpliceRefused,
    /// No pipe could be made: no file descriptor left, or the limit on pipe memory reached.
    NoPipe,
    /// The worker's pipes are all in use by connections whose receivers have stalled.
    PipesInUse,
}

impl Fallback {
    /// Every reason, in the order of its discriminant.
    pub const ALL: [Self; 3] = [Self::SpliceRefused, Self::NoPipe, Self::PipesInUse];

    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SpliceRefused => "splice_refused",
            Self::NoPipe => "no_pipe",
            Self::PipesInUse => "pipes_in_use",
        }
    }
}

/// What a worker's connections share: a buffer to read into, and pipes.
#[derive(Debug)]
pub struct RelayScratch {
    scratch: Box<[u8]>,
    pipes: PipePool,
}

impl Default for RelayScratch {
    fn default() -> Self {
        Self { scratch: vec![0; LARGEST_READ].into_boxed_slice(), pipes: PipePool::default() }
    }
}

/// What one poll moved and met, for the counters.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moved {
    /// Bytes written by each tier, indexed as [`Tier::ALL`].
    pub bytes: [u64; Tier::ALL.len()],
    /// A fallback that happened.
    pub fallback: Option<Fallback>,
}

impl Moved {
    /// What a tier has written.
    pub(crate) fn by(tier: Tier, bytes: u64) -> Self {
        let mut moved = Self::default();
        moved.bytes[tier as usize] = bytes;
        moved
    }
}

/// Which of the two sockets failed, and how. A reset by the peer is an outcome, not an error of ours.
#[derive(Debug)]
pub enum Fault {
    /// The socket that was read from.
    Source(io::Error),
    /// The socket that was written to.
    Destination(io::Error),
}

#[derive(Debug, Default)]
enum Pending {
    #[default]
    Nothing,
    Bytes(Stash),
    Pipe(LoadedPipe),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Phase {
    Open,
    /// The source has ended; what is pending still goes out.
    Ending,
    /// The end has been passed on.
    Done,
}

/// One direction of a connected pair.
#[derive(Debug)]
pub struct Direction {
    pending: Pending,
    phase: Phase,
    splicing: bool,
    may_splice: bool,
    small_splices: u8,
    read_size: usize,
    holds: Holds,
}

/// What a direction does not do for the time being.
#[derive(Clone, Copy, Debug, Default)]
struct Holds {
    /// It does not pass the end of the source on.
    end: bool,
    /// It reads nothing.
    reads: bool,
}

impl Direction {
    /// A direction that has moved nothing yet.
    pub fn new(tier: Tier) -> Self {
        Self {
            pending: Pending::Nothing,
            phase: Phase::Open,
            splicing: false,
            may_splice: tier != Tier::Copy,
            small_splices: 0,
            read_size: FIRST_READ,
            holds: Holds::default(),
        }
    }

    /// Whether nothing more is read, while what was read is passed on.
    pub fn hold_reads(&mut self, holds: bool) {
        self.holds.reads = holds;
    }

    /// Has the bytes read and written from now on, and no longer spliced.
    pub fn copy_only(&mut self) {
        self.may_splice = false;
        self.splicing = false;
    }

    /// Whether the end of the source is kept back instead of being passed on.
    pub fn hold_end(&mut self, holds: bool) {
        self.holds.end = holds;
    }

    /// Whether the end of the source would be kept back.
    pub fn holds_end(&self) -> bool {
        self.holds.end
    }

    /// Whether the end of the source has been read, and everything before it been passed on.
    pub fn is_at_end(&self) -> bool {
        self.phase == Phase::Ending && self.is_empty()
    }

    /// Whether the end of the source has been passed on.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Whether the source has not ended.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Whether nothing is pending.
    pub fn is_empty(&self) -> bool {
        matches!(self.pending, Pending::Nothing)
    }

    /// Whether the source is being read, so that its reset would be noticed at once.
    pub fn is_reading(&self) -> bool {
        self.phase == Phase::Open && matches!(self.pending, Pending::Nothing)
    }

    /// Moves what can be moved from `source` to `destination`; ready once the end of `source` has been passed on.
    ///
    /// Bytes leave in the order in which they came: nothing is read while something is pending.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        source: &TcpStream,
        destination: &TcpStream,
        scratch: &mut RelayScratch,
        moved: &mut Moved,
    ) -> Poll<Result<(), Fault>> {
        if self.phase == Phase::Done {
            return Poll::Ready(Ok(()));
        }
        let mut rounds = ROUNDS_PER_POLL;
        loop {
            ready!(self.poll_flush(cx, destination, scratch, moved))?;
            if self.phase == Phase::Ending {
                if self.holds.end {
                    return Poll::Pending;
                }
                // The peer may have closed or reset meanwhile: then there is nobody left to tell.
                match rustix::net::shutdown(destination, Shutdown::Write) {
                    Ok(()) | Err(rustix::io::Errno::NOTCONN) => {}
                    Err(errno) => return Poll::Ready(Err(Fault::Destination(errno.into()))),
                }
                self.phase = Phase::Done;
                return Poll::Ready(Ok(()));
            }
            if self.holds.reads {
                return Poll::Pending;
            }
            if rounds == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            rounds -= 1;
            ready!(source.poll_read_ready(cx)).map_err(Fault::Source)?;
            if self.splicing {
                self.fill_pipe(source, scratch, moved)?;
            } else {
                self.copy(source, destination, scratch, moved)?;
            }
        }
    }

    /// Writes what is pending; ready once nothing is.
    fn poll_flush(
        &mut self,
        cx: &mut Context<'_>,
        destination: &TcpStream,
        scratch: &mut RelayScratch,
        moved: &mut Moved,
    ) -> Poll<Result<(), Fault>> {
        loop {
            let (tier, written) = match &mut self.pending {
                Pending::Nothing => return Poll::Ready(Ok(())),
                Pending::Bytes(stash) => (Tier::Copy, stash.write_to(destination)),
                Pending::Pipe(pipe) => (Tier::Splice, pipe.drain_to(destination)),
            };
            match written {
                Ok(written) => moved.bytes[tier as usize] += written as u64,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(destination.poll_write_ready(cx)).map_err(Fault::Destination)?;
                    continue;
                }
                Err(error) => return Poll::Ready(Err(Fault::Destination(error))),
            }
            match std::mem::take(&mut self.pending) {
                Pending::Pipe(pipe) if pipe.is_empty() => scratch.pipes.put(pipe),
                Pending::Bytes(stash) if stash.is_empty() => {}
                unfinished => self.pending = unfinished,
            }
        }
    }

    /// Reads once into the shared buffer and writes at once; what does not go out is kept.
    fn copy(
        &mut self,
        source: &TcpStream,
        destination: &TcpStream,
        scratch: &mut RelayScratch,
        moved: &mut Moved,
    ) -> Result<(), Fault> {
        let wanted = self.read_size.min(scratch.scratch.len());
        let buffer = &mut scratch.scratch[..wanted];
        let read = match copy::read(source, buffer) {
            Ok(0) => {
                self.phase = Phase::Ending;
                return Ok(());
            }
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(Fault::Source(error)),
        };
        let data = &buffer[..read];
        let written = match copy::write(destination, data) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Err(Fault::Destination(error)),
        };
        moved.bytes[Tier::Copy as usize] += written as u64;
        if written < read {
            self.pending = Pending::Bytes(Stash::new(&data[written..]));
            // A slow receiver: smaller reads bound what is kept for it.
            self.read_size = (self.read_size / 2).max(FIRST_READ);
        } else if read == wanted {
            self.read_size = (self.read_size * 2).min(LARGEST_READ);
        }
        self.splicing = self.may_splice && read >= BULK_READ;
        Ok(())
    }

    /// Splices once from `source` into a pipe, which the next flush empties.
    fn fill_pipe(
        &mut self,
        source: &TcpStream,
        scratch: &mut RelayScratch,
        moved: &mut Moved,
    ) -> Result<(), Fault> {
        let pipe = match scratch.pipes.take() {
            Ok(pipe) => pipe,
            Err(reason) => {
                self.stop_splicing(reason, moved);
                return Ok(());
            }
        };
        match pipe.fill_from(source) {
            // What it is, a read tells.
            Ok((0, pipe)) => {
                scratch.pipes.put(pipe);
                self.splicing = false;
            }
            Ok((filled, pipe)) => {
                self.small_splices = if filled < FIRST_READ { self.small_splices + 1 } else { 0 };
                if self.small_splices == SMALL_SPLICES {
                    self.small_splices = 0;
                    self.splicing = false;
                }
                self.pending = Pending::Pipe(pipe);
            }
            Err((error, pipe)) => {
                scratch.pipes.put(pipe);
                match error.kind() {
                    io::ErrorKind::WouldBlock => {}
                    io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => {
                        self.may_splice = false;
                        self.stop_splicing(Fallback::SpliceRefused, moved);
                    }
                    _ => return Err(Fault::Source(error)),
                }
            }
        }
        Ok(())
    }

    fn stop_splicing(&mut self, reason: Fallback, moved: &mut Moved) {
        self.splicing = false;
        self.read_size = FIRST_READ;
        moved.fallback = Some(reason);
    }
}

/// Tries `splice(2)` from a TCP socket through a pipe to another one, on loopback; says what a pipe holds.
///
/// # Errors
/// What failed, and what the kernel said.
pub fn probe_splice() -> io::Result<String> {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn pair() -> io::Result<(TcpStream, TcpStream)> {
        let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
        let near = TcpStream::connect(listener.local_addr()?)?;
        Ok((near, listener.accept()?.0))
    }
    let ((mut client, downstream), (upstream, mut server)) = (pair()?, pair()?);
    server.set_read_timeout(Some(std::time::Duration::from_secs(1)))?;
    client.write_all(b"probe")?;
    let capacity = pipe::probe(&downstream, &upstream, 5)
        .map_err(|error| io::Error::new(error.kind(), format!("splice(2) failed: {error}")))?;
    let mut arrived = [0; 5];
    server.read_exact(&mut arrived)?;
    if &arrived == b"probe" {
        Ok(format!("splice(2) through pipes of {} KiB", capacity >> 10))
    } else {
        Err(io::Error::other("splice(2) changed the bytes"))
    }
}
