//! How much memory the kernel may hold for pairs of tier `sockmap`, and what each of their directions may have of it.
//!
//! Nothing holds back a sender whose bytes the kernel redirects, but what is written here: what a direction may hold at most
//! is reserved when a pair is joined, and where nothing is left to reserve, connections stay in userspace.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forwarder_common::sockmap::Credit;
use rustix::net::sockopt;

use forwarder_kernel::tcp::tcp_info::{self, Info};

/// The smallest and the largest window, and how many bytes of it are for each microsecond of the round trip: at so many
/// the peer of a socket sends 16 Gb/s.
const SMALLEST_WINDOW: u32 = 512 << 10;
const LARGEST_WINDOW: u32 = 4 << 20;
const BYTES_PER_MICROSECOND: u32 = 2_000;
/// The least window that the kernel clamps to (`tcp_set_window_clamp`).
const LEAST_WINDOW: u32 = 1_152;
/// How much the kernel makes of what is asked for as `SO_RCVBUF`.
const DOUBLED: u64 = 2;
/// How much larger the buffer of a socket that sends is than what it is to hold.
const ROOM: usize = 4;

/// What a direction may hold.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(crate) enum Size {
    /// For small messages.
    Small,
    /// For bulk data.
    Medium,
    /// For bulk data that goes on.
    Large,
}

impl Size {
    /// How many bytes may be held for the peer of the socket that sends.
    const fn credit(self) -> u32 {
        match self {
            Self::Small => 64 << 10,
            Self::Medium => 4 << 20,
            Self::Large => 32 << 20,
        }
    }

    /// From how many on the sender is held back. What it may send ahead, and what it sends until the agent runs, is to fit
    /// between this and the credit: what the kernel leaves to the agent is slow. And what is held then is to last until the
    /// sender has found its pace again.
    pub(crate) const fn full(self) -> u32 {
        self.credit() / 2
    }

    /// How many bytes the peer of `source` may send ahead. As few as its round trip allows: they come in before it slows down.
    fn window(self, source: BorrowedFd<'_>) -> io::Result<u32> {
        let most = self.most_window();
        let round_trip = Info::read(source.as_raw_fd())?.round_trip;
        Ok(round_trip.saturating_mul(BYTES_PER_MICROSECOND).clamp(SMALLEST_WINDOW.min(most), most))
    }

    const fn most_window(self) -> u32 {
        match self {
            Self::Small => 32 << 10,
            Self::Medium => SMALLEST_WINDOW,
            Self::Large => LARGEST_WINDOW,
        }
    }

    /// Bytes that a direction can hold at most: what is held for the one peer, and what the receive buffer takes of what the
    /// other has sent ahead.
    pub(crate) const fn bytes(self, buffer: Buffer) -> u64 {
        self.credit() as u64 + buffer.0
    }

    /// The receive buffer that a direction gets. It is never made smaller: what the kernel has offered the peer it may send,
    /// and where there is no room for it, it would be lost.
    pub(crate) fn buffer(self, source: BorrowedFd<'_>) -> io::Result<Buffer> {
        let present = sockopt::socket_recv_buffer_size(source)? as u64;
        let wanted = match self {
            Self::Small => 0,
            Self::Medium | Self::Large => DOUBLED * u64::from(self.window(source)?),
        };
        Ok(Buffer(present.max(wanted)))
    }

    /// What a direction gets that is busy with this.
    pub(crate) const fn next(self) -> Self {
        match self {
            Self::Small => Self::Medium,
            Self::Medium | Self::Large => Self::Large,
        }
    }

    /// What the program is told of it, given how many bytes the agent has relayed.
    pub(crate) const fn credits(self, relayed: u64) -> Credit {
        let notice_shift = match self {
            Self::Small => 20,
            Self::Medium => 26,
            Self::Large => 0,
        };
        Credit { relayed, credit: self.credit(), full: self.full(), notice_shift, pad: 0 }
    }

    /// Gives the sockets of a direction their buffers.
    ///
    /// That of the one that sends is never full: the kernel tries only after a tick to write to a full one. What is held
    /// there, the credit bounds.
    ///
    /// # Errors
    /// The kernel refuses: `CAP_NET_ADMIN` is missing.
    pub(crate) fn apply(
        self,
        source: BorrowedFd<'_>,
        target: BorrowedFd<'_>,
        buffer: Buffer,
    ) -> io::Result<()> {
        sockopt::set_socket_send_buffer_size_force(target, ROOM * self.credit() as usize)?;
        let asked = usize::try_from(buffer.0 / DOUBLED).unwrap_or(usize::MAX);
        sockopt::set_socket_recv_buffer_size_force(source, asked)?;
        self.open(source)
    }

    /// Has the peer of a socket send as much as it may.
    pub(crate) fn open(self, source: BorrowedFd<'_>) -> io::Result<()> {
        self.clamp(source, self.window(source)?)?;
        // Tells it so at once, where an acknowledgement is due that would wait for more.
        tcp_info::set(source.as_raw_fd(), libc::TCP_QUICKACK, 1)
    }

    /// Has the peer of a socket send one segment at a time: the kernel is in no hurry to acknowledge it, and the peer waits
    /// for that, and need not probe.
    pub(crate) fn throttle(self, source: BorrowedFd<'_>) -> io::Result<()> {
        let segment = Info::read(source.as_raw_fd())?.advertised_segment;
        self.clamp(source, segment)
    }

    /// Has the peer of a socket that is held back wait until it may go on: what it sends is not acknowledged as soon as it is
    /// read, and, where that is possible, it is not told of room.
    pub(crate) fn stop(self, source: BorrowedFd<'_>) -> io::Result<()> {
        let info = Info::read(source.as_raw_fd())?;
        // Where even that, which the kernel rounds up, is a segment's: a peer that is offered less waits for a timer of its
        // own.
        if LEAST_WINDOW.next_multiple_of(1 << (info.scales >> 4)) >= info.advertised_segment {
            self.clamp(source, LEAST_WINDOW)?;
        }
        tcp_info::set(source.as_raw_fd(), libc::TCP_QUICKACK, 0)
    }

    fn clamp(self, source: BorrowedFd<'_>, window: u32) -> io::Result<()> {
        let window = window.min(self.most_window());
        tcp_info::set(source.as_raw_fd(), libc::TCP_WINDOW_CLAMP, window.cast_signed())
    }
}

/// The size of a receive buffer, by the kernel's count: bytes, and what it needs besides them.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Buffer(u64);

/// The memory of all pairs together.
#[derive(Debug)]
pub(crate) struct Memory {
    limit: u64,
    reserved: AtomicU64,
}

impl Memory {
    /// Of which nothing is reserved.
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self { limit, reserved: AtomicU64::new(0) })
    }

    /// How many bytes are reserved.
    pub(crate) fn reserved(&self) -> u64 {
        self.reserved.load(Ordering::Relaxed)
    }

    /// Reserves bytes for a direction of a new pair: it leaves a quarter to those that grow.
    pub(crate) fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        self.reserve_up_to(self.limit - self.limit / 4, bytes)
    }

    /// Reserves bytes for one that grows.
    pub(crate) fn reserve_more(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        self.reserve_up_to(self.limit, bytes)
    }

    fn reserve_up_to(self: &Arc<Self>, limit: u64, bytes: u64) -> Option<Reservation> {
        let take = |reserved: u64| reserved.checked_add(bytes).filter(|sum| *sum <= limit);
        self.reserved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).ok()?;
        Some(Reservation { memory: Arc::clone(self), bytes })
    }
}

/// Bytes that are reserved until it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Reservation {
    /// Gives back what exceeds `bytes`.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.bytes -= surplus;
        self.memory.reserved.fetch_sub(surplus, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.reserved.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_reserved_than_there_is() {
        let memory = Memory::new(100);
        let mut first = memory.reserve(60).unwrap();
        assert!(memory.reserve(16).is_none());
        let second = memory.reserve_more(40).unwrap();
        assert_eq!(memory.reserved(), 100);
        assert!(memory.reserve_more(1).is_none());
        first.shrink(70);
        first.shrink(10);
        assert_eq!(memory.reserved(), 50);
        drop(first);
        assert_eq!(memory.reserved(), 40);
        assert!(memory.reserve(u64::MAX).is_none());
        drop(second);
        assert_eq!(memory.reserved(), 0);
    }
}
