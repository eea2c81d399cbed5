//! The arithmetic that turns a TCP segment of one leg of a pair into the segment of the other leg: pure, so that the same
//! code runs in the kernel and in tests.
//!
//! Two sockets of the agent have each chosen an initial sequence number, a window scale and a timestamp clock. Between
//! the two legs these differ by amounts that stay the same for the life of the pair, however many bytes have passed:
//! so each packet can be translated by itself, in any order, retransmitted or not.

use crate::packet::PROTOCOL_TCP;

/// How many steps an [`OptionsWalk`] takes at most. A header has room for 40 options of one byte; real ones have a few.
pub const MAX_OPTIONS: usize = 16;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_WINDOW_SCALE: u8 = 3;
const OPTION_SACK: u8 = 5;
const OPTION_TIMESTAMP: u8 = 8;
/// The length of the timestamp option (RFC 7323, 3.2).
const TIMESTAMP_LENGTH: u32 = 10;
/// The length of the window scale option (RFC 7323, 2.2), and the largest scale that counts (2.3).
const WINDOW_SCALE_LENGTH: u32 = 3;
const MAX_SCALE: u32 = 14;
/// The length of one block of the SACK option (RFC 2018, 3).
const SACK_BLOCK_LENGTH: u32 = 8;
/// The most SACK blocks that a header has room for.
pub const MAX_SACK_BLOCKS: u32 = 4;
/// Bytes of the TCP header before the options.
const FIXED_HEADER: u32 = 20;

/// The window on the other leg: what `raw` means under the scale of its sender, expressed under the scale that its
/// receiver knows, as much of it as fits. Neither scale may exceed 14 (RFC 7323, 2.3). Not for SYN segments, whose window
/// is never scaled.
///
/// It rounds down: a window may look smaller by less than one unit, never larger.
#[inline(always)]
#[must_use]
pub const fn window(raw: u16, source_scale: u8, target_scale: u8) -> u16 {
    // Masked for the verifier, which knows nothing of the agent's checks.
    let bytes = (raw as u32) << (source_scale & 15);
    let scaled = bytes >> (target_scale & 15);
    #[expect(clippy::cast_possible_truncation, reason = "compared just before")]
    if scaled > u16::MAX as u32 { u16::MAX } else { scaled as u16 }
}

/// The window that leaves the receiver of an acknowledgement the same room when `missing` bytes more are acknowledged to it
/// than the sender of `window` has received, under `scale`.
#[inline(always)]
#[must_use]
pub const fn window_without(window: u16, missing: u32, scale: u8) -> u16 {
    let bytes = (window as u32) << (scale & 15);
    #[expect(clippy::cast_possible_truncation, reason = "not more than the window was")]
    {
        (bytes.saturating_sub(missing) >> (scale & 15)) as u16
    }
}

/// One tick of the timestamp clock (`TCP_TS_HZ`), in nanoseconds.
pub const NANOSECONDS_PER_TICK: u64 = 1_000_000;

/// The timestamp clock of a socket of the agent at `now`, where it stood at `clock` at `clock_time`: nanoseconds of
/// `CLOCK_MONOTONIC`. It ticks once a millisecond (`TCP_TS_HZ`).
#[inline(always)]
#[must_use]
pub const fn clock_at(clock: u32, clock_time: u64, now: u64) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the clock wraps")]
    let ticks = (now.wrapping_sub(clock_time) / NANOSECONDS_PER_TICK) as u32;
    clock.wrapping_add(ticks)
}

/// The timestamps of the segment on the other leg.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Timestamps {
    /// `TSval`: the sender's clock.
    pub value: u32,
    /// `TSecr`: the receiver's clock, echoed.
    pub echo: u32,
}

impl Timestamps {
    /// The same timestamps on the other leg.
    ///
    /// `shift` is what is added to this direction's clock, `reverse_shift` what is added to the other direction's. While
    /// the latter is not known, the echo is 0, which a receiver takes for none (`tcp_ack_update_rtt`).
    #[inline(always)]
    #[must_use]
    pub const fn translated(self, shift: u32, reverse_shift: Option<u32>) -> Self {
        Self {
            value: self.value.wrapping_add(shift),
            echo: match reverse_shift {
                Some(reverse) => self.echo.wrapping_sub(reverse),
                None => 0,
            },
        }
    }
}

/// Whether sequence number `a` comes before `b`, modulo 2^32.
#[inline(always)]
#[must_use]
pub const fn is_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) > i32::MAX as u32 + 1
}

/// Where the options that have to be translated stand, in bytes from the TCP header's first; 0 for one that is not there.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Options {
    /// The timestamps: `TSval` and `TSecr`, 8 bytes.
    pub timestamps: u32,
    /// The first edge of the first SACK block.
    pub sack: u32,
    /// How many SACK blocks there are, up to [`MAX_SACK_BLOCKS`].
    pub sack_blocks: u32,
    /// One more than the window scale of a SYN (RFC 7323, 2.2), at most 15.
    pub scale: u32,
}

/// Why the options of a segment cannot be translated.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum OptionsError {
    /// One is longer than the header, shorter than it must be, or cannot be read.
    Malformed,
    /// There are more than are walked.
    TooMany,
}

/// A walk over the options of a segment.
///
/// Its state is a value of its own, so that a program can keep it where the verifier does not follow it: each step then
/// looks like the one before, where else their number of ways through the options multiplies.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OptionsWalk {
    /// What was found so far.
    pub found: Options,
    /// Where the next option stands.
    pub offset: u32,
}

impl OptionsWalk {
    /// The beginning.
    #[inline(always)]
    #[must_use]
    pub const fn new() -> Self {
        Self { found: Options { timestamps: 0, sack: 0, sack_blocks: 0, scale: 0 }, offset: FIXED_HEADER }
    }

    /// Looks at one option; whether it was the last one. `read` yields the bytes of the TCP header, which has
    /// `header_length`, by their place in it.
    ///
    /// # Errors
    /// They cannot be understood: such a segment must not be translated in part.
    #[inline(always)]
    pub fn step(
        &mut self,
        header_length: u32,
        mut read: impl FnMut(u32) -> Option<u8>,
    ) -> Result<bool, OptionsError> {
        // No header is longer; told once more for the verifier.
        let offset = self.offset & 63;
        if offset >= header_length {
            return Ok(true);
        }
        let kind = read(offset).ok_or(OptionsError::Malformed)?;
        if kind == OPTION_END {
            return Ok(true);
        }
        if kind == OPTION_NOP {
            self.offset = offset + 1;
            return Ok(self.offset >= header_length);
        }
        let length = u32::from(read(offset + 1).ok_or(OptionsError::Malformed)?);
        if length < 2 || offset + length > header_length {
            return Err(OptionsError::Malformed);
        }
        if kind == OPTION_TIMESTAMP {
            if length != TIMESTAMP_LENGTH {
                return Err(OptionsError::Malformed);
            }
            self.found.timestamps = offset + 2;
        } else if kind == OPTION_SACK {
            let blocks = (length - 2) / SACK_BLOCK_LENGTH;
            if blocks * SACK_BLOCK_LENGTH + 2 != length || blocks > MAX_SACK_BLOCKS {
                return Err(OptionsError::Malformed);
            }
            self.found.sack = offset + 2;
            self.found.sack_blocks = blocks;
        } else if kind == OPTION_WINDOW_SCALE && length == WINDOW_SCALE_LENGTH {
            let scale = u32::from(read(offset + 2).ok_or(OptionsError::Malformed)?);
            self.found.scale = if scale > MAX_SCALE { MAX_SCALE + 1 } else { scale + 1 };
        }
        self.offset = offset + length;
        Ok(self.offset >= header_length)
    }
}

impl Default for OptionsWalk {
    fn default() -> Self {
        Self::new()
    }
}

/// The change of a checksum by words of a packet that change: RFC 1624, over 32-bit words as
/// they lie in it: a sum in ones' complement is the same in either byte order (RFC 1071).
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ChecksumChange(u64);

impl ChecksumChange {
    /// None yet.
    pub const NONE: Self = Self(0);

    /// Adds that the word `old`, at an even place in the packet, becomes `new`.
    #[inline(always)]
    #[must_use]
    pub const fn and(self, old: u32, new: u32) -> Self {
        // Each addition is of less than 2^33, so that a packet's few words never overflow 64 bits.
        Self(self.0 + !old as u64 + new as u64)
    }

    /// Adds another change.
    #[inline(always)]
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        // Each is of a few words: see `and`.
        Self(self.0 + other.0)
    }

    /// Adds that the word `old`, `offset` bytes from the TCP header's first, becomes `new`.
    #[inline(always)]
    #[must_use]
    pub const fn and_at(self, offset: u32, old: u32, new: u32) -> Self {
        // Where a word begins between two halves of what is summed, its bytes count with the other weight.
        let turn = (offset & 1) * 8;
        self.and(old.rotate_left(turn), new.rotate_left(turn))
    }

    /// The change as `bpf_l4_csum_replace` wants it: a sum of 32 bits in ones' complement.
    #[inline(always)]
    #[must_use]
    pub const fn folded(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let twice = (once & 0xffff_ffff) + (once >> 32);
        #[expect(clippy::cast_possible_truncation, reason = "folded twice, it has 32 bits")]
        {
            twice as u32
        }
    }

    /// `checksum` after the change, as it lies in the packet, where it is the plain sum of the pseudo-header, which whoever
    /// sends the packet completes (`CHECKSUM_PARTIAL`).
    #[inline(always)]
    #[must_use]
    pub const fn added_to(self, checksum: u16) -> u16 {
        !self.applied_to(!checksum)
    }

    /// `checksum`, as it lies in the packet, after the change.
    #[inline(always)]
    #[must_use]
    pub const fn applied_to(self, checksum: u16) -> u16 {
        let sum = !checksum as u64 + self.folded() as u64;
        let once = (sum & 0xffff) + (sum >> 16 & 0xffff) + (sum >> 32);
        let twice = (once & 0xffff) + (once >> 16);
        let thrice = (twice & 0xffff) + (twice >> 16);
        #[expect(clippy::cast_possible_truncation, reason = "folded three times, it has 16 bits")]
        {
            !(thrice as u16)
        }
    }
}

/// Whether `checksum`, as it lies in the TCP header, is the plain sum of the pseudo-header (RFC 9293, 3.1; RFC 8200, 8.1), as the stack leaves it for a
/// device to complete (`CHECKSUM_PARTIAL`, `__tcp_v4_send_check`). `addresses` are both of the segment's, as in its
/// [tuple](crate::tuple::FourTuple::address_words): what maps IPv4 into IPv6 adds nothing in ones' complement. `length` is the segment's, in bytes with its header.
#[inline(always)]
#[must_use]
pub const fn is_pseudo_header_sum(checksum: u16, addresses: &[u32; 8], length: u32) -> bool {
    let mut sum = (length + PROTOCOL_TCP as u32).to_be() as u64;
    let mut word = 0;
    while word < addresses.len() {
        sum += addresses[word] as u64;
        word += 1;
    }
    let once = (sum & 0xffff_ffff) + (sum >> 32);
    let twice = (once & 0xffff) + (once >> 16);
    let thrice = (twice & 0xffff) + (twice >> 16);
    let fourth = (thrice & 0xffff) + (thrice >> 16);
    // Zero has two forms.
    fourth == checksum as u64 || fourth == 0xffff && checksum == 0
}

#[cfg(test)]
mod tests;
