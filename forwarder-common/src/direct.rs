//! Direct connections: those that the ingress program makes at the client's SYN, without a socket of the node.
//!
//! The program chooses the endpoint and the local port, and writes what it needs of the connection into a slot: the same two
//! [`Flow`]s and the same [`Pair`] as of an offloaded connection, with shifts of nothing. From then on both kinds are one to the
//! programs and to the agent. Their numbers tell them apart: that of a direct one is [`DIRECT_NUMBER`] and its slot.
//!
//! - [`DIRECT`] leads from a tuple to a slot and a direction. Programs insert there, and have a client's tuple lead to another slot if
//!   another endpoint is asked; the agent removes. What a program finds may be out of date: it takes it for true only if the slot says
//!   the same.
//! - Slots are the elements of an array, which the agent maps into its memory. Programs get a free one out of [`DIRECT_FREE`]; the
//!   agent puts it back once a grace period has passed since nothing led to it any more. So what a program has found stays the
//!   same connection's for as long as it runs.
//! - [`DIRECT_STATES`] tells the agent which slots are in use, without a look at each of them.

use core::mem::{align_of, offset_of, size_of};

use crate::flow::{Flow, NextHop, Pair};
use crate::tuple::AddressBytes;

/// Hash of [`FourTuple`](crate::tuple::FourTuple), as packets arrive, to a [direct flow](direct_flow). Written by the programs; the agent removes.
pub const DIRECT: &str = "direct";
/// Array of [`DirectSlot`]. Written by the programs, and by the agent in place.
pub const DIRECT_SLOTS: &str = "direct_slots";
/// Array of when the connection of each slot was opened (`u64`, `CLOCK_MONOTONIC` in nanoseconds); [`STATE_FREE`] where there is none, and
/// [`STATE_CONDEMNED`] where it has ended and is just being removed. Set by the program once all of the slot is written; the rest is the agent's.
pub const DIRECT_STATES: &str = "direct_states";
/// Queue of the numbers (`u32`) of free slots, so that each rests for as long as it can. An agent's own: the next one fills another.
pub const DIRECT_FREE: &str = "direct_free";
/// Array of [`DirectTarget`]: the endpoints of direct listeners, those of one side by side.
pub const DIRECT_TARGETS: &str = "direct_targets";
/// Hash of an interface's index (`u32`) to a [`DirectLink`], of those that packets of direct connections may leave by towards clients.
pub const DIRECT_LINKS: &str = "direct_links";
/// Array of one [`DirectCounts`].
pub const DIRECT_COUNTS: &str = "direct_counts";

/// How many direct connections there may be at most.
pub const MOST_DIRECT: u32 = 4_000_000;
/// Entries that [`DIRECT_TARGETS`] holds, where there may be direct connections.
pub const DIRECT_TARGETS_CAPACITY: u32 = 16_384;
/// Entries that [`DIRECT_LINKS`] holds.
pub const DIRECT_LINKS_CAPACITY: u32 = 4_096;

/// [`DIRECT_STATES`]: there is no connection.
pub const STATE_FREE: u64 = 0;
/// [`DIRECT_STATES`]: there is none any more, and soon nothing leads there.
pub const STATE_CONDEMNED: u64 = u64::MAX;

/// The numbers of direct connections begin here; those of offloaded ones are smaller.
pub const DIRECT_NUMBER: u32 = 1 << 31;

/// [`DirectSlot::handshake`]: the client has asked, the endpoint has not answered.
pub const HANDSHAKE_ASKED: u32 = 1;
/// [`DirectSlot::handshake`]: the endpoint has answered.
pub const HANDSHAKE_ANSWERED: u32 = 2;
/// [`DirectSlot::handshake`]: the client has acknowledged that.
pub const HANDSHAKE_DONE: u32 = 3;

/// How many endpoints are asked at most for one client's SYN.
pub const MOST_ASKED: u8 = 3;

/// The value of [`DIRECT`] for a direction ([`Flow::direction`]) of the connection in a slot.
#[inline(always)]
#[must_use]
pub const fn direct_flow(slot: u32, direction: u32) -> u32 {
    slot << 1 | direction
}

/// One connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DirectSlot {
    /// Both directions, that from the client first. A flow's tuple is that which the other one's packets get, reversed.
    pub flows: [Flow; 2],
    /// What is known of them.
    pub pair: Pair,
    /// [`HANDSHAKE_ASKED`], [`HANDSHAKE_ANSWERED`] or [`HANDSHAKE_DONE`].
    pub handshake: u32,
    /// The sequence number of the client's SYN.
    pub first_sequence: u32,
    /// The window of the client's SYN.
    pub first_window: u16,
    /// One more than the window scale of the client's SYN; 0 where it has none.
    pub first_scale: u8,
    /// How many endpoints were asked before this one for the same client; [`MOST_ASKED`] where there is no other to ask.
    pub asked_before: u8,
    /// The sequence number of the SYN before, if the client has begun anew: or somebody has in its name.
    pub former_sequence: u32,
    /// The options of the client's SYN as they lie in it, to send it again.
    pub first_options: [u32; 10],
    /// How many bytes of them there are, a multiple of 4.
    pub first_options_length: u8,
    /// How often the endpoint has been told, since the client's SYN, that what it still has of this tuple is over.
    pub resets: u8,
    /// How many bytes of payload came with the client's SYN; the larger number, if it has begun anew.
    pub first_payload: u16,
    /// The endpoint ([`endpoint_hash`]) that was asked before this one; 0 if there was none.
    pub tried: u32,
}

/// An endpoint of a direct listener, and how its packets leave. Written by the agent, but for [`Self::turn`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DirectTarget {
    /// The endpoint's address, in network byte order.
    pub address: AddressBytes,
    /// The node's address to connect it from, in network byte order.
    pub source: AddressBytes,
    /// The endpoint's port, in host byte order.
    pub port: u16,
    /// The first of the local ports to connect from, and how many there are.
    pub first_port: u16,
    /// See there.
    pub ports: u32,
    /// The index of the interface that its packets leave by.
    pub interface: u32,
    /// The neighbour that they are handed to there.
    pub next_hop: NextHop,
    /// As [`Flow::mtu`].
    pub mtu: u32,
    /// As [`Flow::flags`].
    pub flags: u16,
    /// As [`Flow::hop_limit`].
    pub hop_limit: u8,
    /// Zero.
    pub pad: u8,
    /// Of the first of a listener's targets: how many connections have had their turn. Written by programs, which may lose a count.
    pub turn: u32,
    /// How many places farther, beginning anew after the last, another endpoint stands; 0 if the listener has no other.
    pub next_other: u32,
    /// The same of a third: one that is neither this nor that other.
    pub next_third: u32,
}

/// What tells an endpoint from nearly all others.
#[inline(always)]
#[must_use]
pub const fn endpoint_hash(address: &[u32; 4], port: u16) -> u32 {
    let [a, b, c, d] = *address;
    // Each is mixed before the next one comes: addresses often differ by little, in several words.
    let hash = mixed(mixed(mixed(mixed(0, a), b), c), d);
    mixed(hash, port as u32) | 1
}

#[inline(always)]
const fn mixed(hash: u32, word: u32) -> u32 {
    // By the golden ratio, as `hash_32` of the kernel.
    (hash.rotate_left(13) ^ word).wrapping_mul(0x61c8_8647)
}

/// How packets leave by an interface towards clients. One word, which programs read at once.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DirectLink {
    /// As [`Flow::mtu`].
    pub mtu: u32,
    /// As [`Flow::flags`].
    pub flags: u16,
    /// As [`Flow::hop_limit`], for IPv4 and for IPv6.
    pub hop_limits: [u8; 2],
}

/// What is counted of all direct connections.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DirectCounts {
    /// How many are between [`HANDSHAKE_ASKED`] and [`HANDSHAKE_DONE`]. Programs add and take off; the agent sets it right.
    pub half_open: u32,
    /// How many there may be of these.
    pub most_half_open: u32,
    /// Counts searches for a local port: each begins one farther than the one before, so that a port rests for long. Written by programs, which may lose a count.
    pub port_turn: u32,
    /// Zero.
    pub pad: u32,
}

const _: () = {
    assert!(size_of::<DirectSlot>() == 432 && align_of::<DirectSlot>() == 8);
    assert!(offset_of!(DirectSlot, pair) == 224);
    assert!(offset_of!(DirectSlot, handshake) == 368);
    assert!(offset_of!(DirectSlot, first_window) == 376);
    assert!(offset_of!(DirectSlot, former_sequence) == 380);
    assert!(offset_of!(DirectSlot, first_options_length) == 424);
    assert!(size_of::<DirectTarget>() == 84 && align_of::<DirectTarget>() == 4);
    assert!(offset_of!(DirectTarget, interface) == 40);
    assert!(offset_of!(DirectTarget, turn) == 72 && offset_of!(DirectTarget, next_other) == 76);
    assert!(size_of::<DirectLink>() == 8 && offset_of!(DirectLink, hop_limits) == 6);
    assert!(size_of::<DirectCounts>() == 16 && offset_of!(DirectCounts, port_turn) == 8);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    use super::{DirectCounts, DirectLink, DirectSlot, DirectTarget};

    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the sizes asserted above equal
    // the sums of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for DirectSlot {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectTarget {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectLink {}
    // SAFETY: as above.
    unsafe impl aya::Pod for DirectCounts {}
}

#[cfg(test)]
mod tests {
    use super::endpoint_hash;

    #[test]
    fn endpoints_that_differ_by_little_are_told_apart() {
        let address = |network: u32, host: u32| {
            [0xfd00_0010_u32.to_be(), (0x0244_0000 | network).to_be(), 0, host.to_be()]
        };
        let mut hashes: Vec<u32> = (0..64_u32)
            .flat_map(|network| (0..64).map(move |host| (network, host)))
            .flat_map(|(network, host)| [80, 443].map(|port| endpoint_hash(&address(network, host), port)))
            .collect();
        let count = hashes.len();
        hashes.sort_unstable();
        hashes.dedup();
        assert!(hashes.len() + 2 >= count, "{} of {count}", hashes.len());
        assert!(!hashes.contains(&0));
    }
}
