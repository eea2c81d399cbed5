//! Layouts of the maps of tier `sockmap`, where the kernel hands what one socket receives to another one.
//!
//! Nothing of it outlives the agent, which has the sockets, so that nothing is pinned. Integers are in host byte order.

use core::mem::{offset_of, size_of};

/// The program: the verdict on what a socket has received.
pub const PROGRAM_VERDICT: &str = "fwd_sk_verdict";

/// Sock hash of a socket's cookie to the other socket of its pair. No program hangs on it: sockets stand here before they
/// stand in [`SOURCES`], so that no verdict lacks the socket that it redirects to.
pub const TARGETS: &str = "sockmap_targets";
/// Sock hash of a socket's cookie to that socket. What these receive passes through the program.
pub const SOURCES: &str = "sockmap_sources";
/// Hash of a socket's cookie (`u64`) to the [`Stream`] that it receives. Made by the agent, written by the program.
pub const STREAMS: &str = "sockmap_streams";
/// Hash of a socket's cookie (`u64`) to the [`Credit`] of its stream. Written by the agent.
pub const CREDITS: &str = "sockmap_credits";
/// Ring buffer of [`Notice`]: what the agent should look at.
pub const NOTICES: &str = "sockmap_notices";
/// Per-CPU array of how many segments (`u64`) met with each [`SockVerdict`], indexed by its number.
pub const SOCK_VERDICTS: &str = "sockmap_verdict";

/// Names of the program's globals that the agent sets: where the fields of `struct tcp_sock` stand in this kernel.
pub const OFFSET_GLOBALS: [&str; 3] = ["COPIED_SEQ", "WRITE_SEQ", "SND_UNA"];
/// The fields of `struct tcp_sock` that stand there, in the same order.
pub const OFFSET_FIELDS: [&str; 3] = ["copied_seq", "write_seq", "snd_una"];

/// Entries that each map of sockets and streams holds, unless the agent says so.
pub const STREAMS_CAPACITY: u32 = 131_072;
/// Bytes of [`NOTICES`]: a power of two and of pages.
pub const NOTICES_SIZE: u32 = 256 << 10;

/// [`Stream::state`]: there was no verdict yet.
pub const STREAM_NEW: u32 = 0;
/// [`Stream::state`]: what arrives is redirected.
pub const STREAM_REDIRECTED: u32 = 1;
/// [`Stream::state`]: what arrives is redirected, but more is held than should be: the agent is to hold the sender back.
pub const STREAM_FULL: u32 = 2;
/// [`Stream::state`]: what arrives is left to the agent until everything before it has been delivered.
pub const STREAM_PASSED: u32 = 3;
/// [`Stream::state`]: the numbers of a segment contradict each other. Bytes are missing: the pair has to be reset.
pub const STREAM_BROKEN: u32 = 4;

/// Value of [`STREAMS`]: what one socket of a pair receives, for the other one.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Stream {
    /// The cookie of the other socket.
    pub peer: u64,
    /// Bytes that were redirected to it.
    pub redirected: u64,
    /// Bytes that were left to the agent, which relays them.
    pub passed: u64,
    /// The number of the listener.
    pub listener_id: u32,
    /// [`STREAM_NEW`], [`STREAM_REDIRECTED`], [`STREAM_FULL`], [`STREAM_PASSED`] or [`STREAM_BROKEN`].
    pub state: u32,
    /// The sequence number of the next byte.
    pub next_sequence: u32,
    /// The sequence number of the other socket's first byte that comes from here.
    pub target_sequence: u32,
    /// Bytes that the other socket's peer had not acknowledged at the last verdict.
    pub held: u32,
    /// Bytes that arrived again and were cut off.
    pub repeated: u32,
}

impl Stream {
    /// How many bytes are held for the other socket's peer, given how many the agent has relayed, and the number of the
    /// first byte that the peer has not acknowledged.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "modulo 2^32")]
    pub const fn held(&self, relayed: u64, unacknowledged: u32) -> u32 {
        held(self.target_sequence, self.redirected.wrapping_add(relayed) as u32, unacknowledged)
    }
}

/// Value of [`CREDITS`]: how much the program may redirect.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Credit {
    /// Bytes that were left to the agent and have been written to the other socket.
    pub relayed: u64,
    /// How many bytes may be held for the other socket's peer.
    pub credit: u32,
    /// From how many on the sender is to be held back.
    pub full: u32,
    /// A notice is sent each time that so many bytes have been redirected, as a power of two; 0 is never.
    pub notice_shift: u32,
    /// Zero.
    pub pad: u32,
}

/// [`Notice::kind`]: bytes are left to the agent.
pub const NOTICE_PASSED: u32 = 0;
/// [`Notice::kind`]: the stream is busy.
pub const NOTICE_BUSY: u32 = 1;
/// [`Notice::kind`]: the stream is broken.
pub const NOTICE_BROKEN: u32 = 2;
/// [`Notice::kind`]: the sender is to be held back.
pub const NOTICE_FULL: u32 = 3;

/// An element of [`NOTICES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Notice {
    /// The cookie of the socket.
    pub cookie: u64,
    /// [`NOTICE_PASSED`], [`NOTICE_BUSY`], [`NOTICE_BROKEN`] or [`NOTICE_FULL`].
    pub kind: u32,
    /// Zero.
    pub pad: u32,
}

/// What became of a segment that a socket of a pair has received, and why.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum SockVerdict {
    /// Handed to the other socket.
    Redirected = 0,
    /// Left to the agent: too much is held for the other socket's peer.
    Passed = 1,
    /// Only the end of the stream: the agent passes it on when everything before it has been delivered.
    End = 2,
    /// All of it had arrived before.
    Repeated = 3,
    /// Of a socket without stream: left to whoever reads it.
    StreamMissing = 4,
    /// The other socket is gone: dropped, since nobody is left to have it.
    TargetMissing = 5,
    /// Of a stream that is broken, or is now: its numbers are not those of its bytes, or the kernel did not let it be cut.
    Broken = 6,
}

impl SockVerdict {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 7] = [
        Self::Redirected,
        Self::Passed,
        Self::End,
        Self::Repeated,
        Self::StreamMissing,
        Self::TargetMissing,
        Self::Broken,
    ];

    /// How many there are.
    pub const COUNT: u32 = 7;

    /// Its place in [`SOCK_VERDICTS`].
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }

    /// Its name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Redirected => "redirected",
            Self::Passed => "passed",
            Self::End => "end",
            Self::Repeated => "repeated",
            Self::StreamMissing => "stream_missing",
            Self::TargetMissing => "target_missing",
            Self::Broken => "broken",
        }
    }
}

/// How many bytes at the beginning of a segment have arrived before, given its first number and the next one that is
/// awaited; `None` where bytes are missing between.
#[inline(always)]
pub const fn repeated(sequence: u32, next: u32) -> Option<u32> {
    let before = next.wrapping_sub(sequence);
    if before > u32::MAX / 2 { None } else { Some(before) }
}

/// How many bytes are not acknowledged, where all before `unacknowledged` are, of those that begin at `first` and are
/// `bytes` in all (modulo 2^32).
#[inline(always)]
pub const fn held(first: u32, bytes: u32, unacknowledged: u32) -> u32 {
    let held = first.wrapping_add(bytes).wrapping_sub(unacknowledged);
    // What the agent has just written it counts afterwards.
    if held > u32::MAX / 2 { 0 } else { held }
}

const _: () = {
    assert!(size_of::<Stream>() == 48);
    assert!(offset_of!(Stream, listener_id) == 24);
    assert!(offset_of!(Stream, repeated) == 44);
    assert!(size_of::<Credit>() == 24);
    assert!(offset_of!(Credit, pad) == 20);
    assert!(size_of::<Notice>() == 16);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    use super::{Credit, Stream};

    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the sizes asserted above equal
    // the sums of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for Stream {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Credit {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_arrived_before_is_told_across_the_wrap() {
        assert_eq!(repeated(100, 100), Some(0));
        assert_eq!(repeated(95, 100), Some(5));
        assert_eq!(repeated(u32::MAX - 1, 3), Some(5));
        assert_eq!(repeated(101, 100), None);
        assert_eq!(repeated(2, u32::MAX), None);
    }

    #[test]
    fn what_is_held_is_what_was_not_acknowledged() {
        assert_eq!(held(1000, 50, 1000), 50);
        assert_eq!(held(1000, 50, 1050), 0);
        assert_eq!(held(u32::MAX - 9, 30, 5), 15);
        assert_eq!(held(1000, 50, 1060), 0);
    }

    #[test]
    fn verdicts_stand_at_their_numbers_and_names_fit_the_kernel() {
        for (index, verdict) in SockVerdict::ALL.into_iter().enumerate() {
            assert_eq!(verdict.index() as usize, index);
        }
        assert_eq!(SockVerdict::ALL.len(), SockVerdict::COUNT as usize);
        for name in [TARGETS, SOURCES, STREAMS, CREDITS, NOTICES, SOCK_VERDICTS, PROGRAM_VERDICT] {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
