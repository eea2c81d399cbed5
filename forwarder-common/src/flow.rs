//! Flows: pairs of connections that the kernel forwards by itself, as they stand in the maps.
//!
//! A pair has two directions. Each stands in [`FLOWS`] under the tuple that its packets have when they arrive, with all
//! that is needed to turn them into packets of the other leg: written by the agent alone, and never changed but for
//! its state. What changes with each packet stands in [`PAIRS`]: created by the agent with zeros, written by the programs.
//! So neither ever undoes what the other wrote.

use core::mem::{align_of, offset_of, size_of};

use crate::layout::AddressBytes;

/// Hash of [`FlowKey`] to [`Flow`]: both directions of every pair.
pub const FLOWS: &str = "flows";
/// Hash of a pair's number (`u32`) to [`Pair`].
pub const PAIRS: &str = "pairs";

/// Entries that [`PAIRS`] holds; [`FLOWS`] holds twice as many.
pub const PAIRS_CAPACITY: u32 = 65_536;

/// [`Flow::state`]: packets are translated and redirected, while the local sockets still deliver what they had received
/// before: they see the acknowledgements of it.
pub const STATE_TAIL: u32 = 1;
/// [`Flow::state`]: the local sockets have nothing left to do and see nothing more.
pub const STATE_SPLICED: u32 = 2;

/// [`Flow::direction`]: from downstream (the client) to upstream (the endpoint).
pub const DIRECTION_REQUEST: u32 = 0;
/// [`Flow::direction`]: from upstream to downstream.
pub const DIRECTION_RESPONSE: u32 = 1;

/// [`Half::flags`]: the sender has ended its direction; [`Half::fin_end`] is set.
pub const HALF_FIN: u32 = 1;
/// [`Half::flags`]: the sender has reset the connection.
pub const HALF_RESET: u32 = 2;

/// Key of [`FLOWS`]: the addresses and ports of a packet. 36 bytes without padding.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct FlowKey {
    /// Where it comes from, in network byte order.
    pub source: AddressBytes,
    /// Where it is sent to, in network byte order.
    pub destination: AddressBytes,
    /// The port that it comes from, in host byte order.
    pub source_port: u16,
    /// The port that it is sent to, in host byte order.
    pub destination_port: u16,
}

impl FlowKey {
    /// The addresses as 32-bit words in the byte order of the packet: four of the source, four of the destination. Of an
    /// IPv4 address all but the last are the same in every key.
    #[inline(always)]
    pub const fn address_words(&self) -> &[u32; 8] {
        #[expect(unsafe_code, reason = "the programs sum up words")]
        // SAFETY: the two arrays begin the structure, side by side, and are as large; the structure is aligned to 4
        // bytes; any bits make an integer.
        unsafe {
            &*(&raw const *self).cast()
        }
    }

    /// The tuple of the packets that go the other way on the same leg.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
        }
    }
}

/// Value of [`FLOWS`]: one direction of a pair. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Flow {
    /// The tuple that the packets get: that of the other leg.
    pub out: FlowKey,
    /// The index of the interface that they leave by.
    pub interface: u32,
    /// When `clock` was read: `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` tells it.
    pub clock_time: u64,
    /// The timestamp clock of the agent's socket on the outgoing leg (RFC 7323, milliseconds) at `clock_time`.
    pub clock: u32,
    /// The pair's number: key of [`PAIRS`].
    pub pair: u32,
    /// [`DIRECTION_REQUEST`] or [`DIRECTION_RESPONSE`].
    pub direction: u32,
    /// [`STATE_TAIL`] or [`STATE_SPLICED`].
    pub state: u32,
    /// What is added to sequence numbers, modulo 2^32.
    pub sequence_shift: u32,
    /// What is added to acknowledgement numbers and to the edges of SACK blocks, modulo 2^32: minus the
    /// `sequence_shift` of the other direction.
    pub acknowledgement_shift: u32,
    /// The window scale that the sender announced (RFC 7323), 0 to 14.
    pub source_scale: u8,
    /// The window scale that the agent announced to the receiver, 0 to 14.
    pub target_scale: u8,
    /// Zero.
    pub pad: [u8; 6],
}

/// What the programs know of one direction of a pair.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Half {
    /// Packets redirected; a super-packet of GSO or GRO counts once.
    pub packets: u64,
    /// Bytes of payload redirected, retransmitted ones included.
    pub bytes: u64,
    /// When the last packet came: `CLOCK_MONOTONIC` in nanoseconds; 0 before the first.
    pub last_seen: u64,
    /// What is added to the sender's timestamps, modulo 2^32, once `timestamp_known` is 1.
    pub timestamp_shift: u32,
    /// Whether `timestamp_shift` has been learnt from a packet: 0 or 1.
    pub timestamp_known: u32,
    /// The end of the last packet in the sender's own sequence numbers.
    pub sequence_end: u32,
    /// What the sender has acknowledged last, in the numbers that it sees.
    pub acknowledged: u32,
    /// The sequence number after the sender's FIN, in the sender's own numbers, if [`HALF_FIN`] is set.
    pub fin_end: u32,
    /// [`HALF_FIN`], [`HALF_RESET`].
    pub flags: u32,
}

/// Value of [`PAIRS`]: what the programs know of a pair. The agent creates it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pair {
    /// The number of the listener that accepted the pair's connection.
    pub listener_id: u32,
    /// Zero.
    pub pad: u32,
    /// When the pair was promoted: `CLOCK_MONOTONIC` in nanoseconds.
    pub promoted: u64,
    /// From the client to the endpoint.
    pub request: Half,
    /// From the endpoint to the client.
    pub response: Half,
}

const _: () = {
    assert!(size_of::<FlowKey>() == 36 && align_of::<FlowKey>() == 4);
    assert!(offset_of!(FlowKey, destination) == 16);
    assert!(offset_of!(FlowKey, source_port) == 32);
    assert!(offset_of!(FlowKey, destination_port) == 34);

    assert!(size_of::<Flow>() == 80 && align_of::<Flow>() == 8);
    assert!(offset_of!(Flow, interface) == 36);
    assert!(offset_of!(Flow, clock_time) == 40);
    assert!(offset_of!(Flow, clock) == 48);
    assert!(offset_of!(Flow, pair) == 52);
    assert!(offset_of!(Flow, direction) == 56);
    assert!(offset_of!(Flow, state) == 60);
    assert!(offset_of!(Flow, sequence_shift) == 64);
    assert!(offset_of!(Flow, acknowledgement_shift) == 68);
    assert!(offset_of!(Flow, source_scale) == 72);
    assert!(offset_of!(Flow, target_scale) == 73);
    assert!(offset_of!(Flow, pad) == 74);

    assert!(size_of::<Half>() == 48 && align_of::<Half>() == 8);
    assert!(offset_of!(Half, timestamp_shift) == 24);
    assert!(offset_of!(Half, flags) == 44);

    assert!(size_of::<Pair>() == 112 && align_of::<Pair>() == 8);
    assert!(offset_of!(Pair, promoted) == 8);
    assert!(offset_of!(Pair, request) == 16);
    assert!(offset_of!(Pair, response) == 64);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    use super::{Flow, FlowKey, Pair};

    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the sizes asserted above equal
    // the sums of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for FlowKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pair {}
}
