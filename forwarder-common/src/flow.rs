//! Flows: pairs of connections that the kernel forwards by itself, as they stand in the maps.
//!
//! A pair has two directions. Each stands in [`FLOWS`] under the tuple that its packets have when they arrive, with all
//! that is needed to turn them into packets of the other leg: written by the agent, in place where it changes
//! ([`crate::update`]); programs write its state alone, where the pair is over. What changes with each packet stands in
//! [`PAIRS`]: created by the agent, written by the programs, each direction of it only for packets of its own direction. So nobody
//! ever undoes what another wrote.
//!
//! The programs take packets for those of a flow only while its pair stands in [`PAIRS`]: creating that one entry turns both
//! directions on at the same moment. [`STATE_OVER`] turns them off, one right after the other; the entries are removed
//! later, in the order of [`STATE_HANDOVER`] to [`STATE_OVER`] no state ever goes back.
//!
//! [`FLOWS`]: crate::layout::FLOWS
//! [`PAIRS`]: crate::layout::PAIRS

use core::mem::{align_of, offset_of, size_of};
use core::net::IpAddr;

use crate::packet::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, Segment};
use crate::translate::{self, is_before};
use crate::tuple::{AddressBytes, FourTuple};

mod note;

/// Entries that [`PAIRS`](crate::layout::PAIRS) holds unless the agent says otherwise; [`FLOWS`](crate::layout::FLOWS) holds twice as many.
pub const PAIRS_CAPACITY: u32 = 262_144;

/// How many pairs there may be at most.
pub const MOST_PAIRS: u32 = 4_000_000;

/// The priority (`SO_PRIORITY`) of packets that the agent sends in the name of pairs, which the egress programs let pass. It is
/// nobody else's, and unlike a mark it has no say in routing.
pub const AGENT_PRIORITY: u32 = 0x6677_6401;
/// The priority of those among them that the agent has handed to the interface itself, and that have no neighbour's address
/// yet: the egress program hands them to the neighbour that the pair's packets go to.
pub const AGENT_LINK_PRIORITY: u32 = 0x6677_6402;

/// [`Flow::state`]: packets are translated and redirected, while the local sockets still deliver what they had received
/// before: they see the acknowledgements of it.
pub const STATE_HANDOVER: u32 = 1;
/// [`Flow::state`]: the local sockets have nothing left to do and see nothing more.
pub const STATE_OFFLOADED: u32 = 2;
/// [`Flow::state`]: the agent has ended the pair: whoever sends something of it is told so by a reset.
pub const STATE_RESET: u32 = 3;
/// [`Flow::state`]: nothing of the pair is forwarded any more, and its packets are the local stack's, as if it stood nowhere. Its
/// entries wait for their removal.
pub const STATE_OVER: u32 = 4;

/// [`Flow::direction`]: from downstream (the client) to upstream (the endpoint).
pub const DIRECTION_REQUEST: u32 = 0;
/// [`Flow::direction`]: from upstream to downstream.
pub const DIRECTION_RESPONSE: u32 = 1;

/// [`Flow::flags`]: only the leg that packets come from uses explicit congestion notification, so they leave without the
/// marks that nobody would answer (RFC 3168).
pub const FLOW_CLEAR_ECN: u16 = 1;
/// [`Flow::flags`]: the end of this direction reached a local socket before the handover; the agent's other socket passes
/// it on.
pub const FLOW_ENDED: u16 = 2;
/// [`Flow::flags`]: the same of the other direction.
pub const FLOW_REVERSE_ENDED: u16 = 4;
/// [`Flow::flags`]: both legs use timestamps.
pub const FLOW_TIMESTAMPS: u16 = 8;

/// [`Flow::flags`]: the stack sends the packets on, as a router, once they have been translated, instead of being redirected.
pub const FLOW_BY_STACK: u16 = 16;

/// [`Flow::flags`]: of a [direct](crate::direct) connection whose handshake is not done.
pub const FLOW_OPENING: u16 = 32;

/// [`DirectionState::flags`]: the sender has reset the connection, and has sent nothing else since.
pub const SENDER_RESET: u8 = 1;
/// [`DirectionState::flags`]: the sender wants to open a new connection on the tuple of this one, which it has forgotten.
pub const SENDER_SYN: u8 = 2;
/// [`DirectionState::flags`]: a reset that the receiver would not believe came in the sender's name: the agent is to ask the sender, who
/// has sent nothing else since.
pub const SENDER_CHALLENGE: u8 = 4;
/// [`Pair::offloaded`] of a [direct](crate::direct) connection whose endpoint has refused ([`SENDER_RESET`]), or has not answered: another one is asked in its
/// place, by another connection.
pub const REPLACED: u64 = u64::MAX;

/// The neighbour that packets are handed to: `struct bpf_redir_neigh`, as `bpf_redirect_neigh` takes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct NextHop {
    /// The family of the address: `AF_INET` (2) or `AF_INET6` (10). A gateway to an IPv4 host may have either (RFC 8950).
    pub family: u32,
    /// The address, in network byte order; one of IPv4 stands in the first four bytes.
    pub address: AddressBytes,
}

impl NextHop {
    /// That of an address. One of IPv4 that is mapped into IPv6 is taken for one of IPv4.
    #[must_use]
    pub const fn new(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => {
                let [a, b, c, d] = v4.octets();
                Self { family: 2, address: [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] }
            }
            IpAddr::V6(v6) => Self { family: 10, address: v6.octets() },
        }
    }
}

/// Value of [`FLOWS`](crate::layout::FLOWS): one direction of a pair. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Flow {
    /// The tuple that the packets get: that of the other leg.
    pub out: FourTuple,
    /// The index of the interface that they leave by.
    pub interface: u32,
    /// The neighbour that they are handed to there: the receiver, or the gateway towards it.
    pub next_hop: NextHop,
    /// The largest packet that may leave, in bytes from the IP header on; 0 where there is no limit.
    pub mtu: u32,
    /// When `clock` was read: `CLOCK_MONOTONIC` in nanoseconds, as `bpf_ktime_get_ns` tells it.
    pub clock_time: u64,
    /// The timestamp clock of the agent's socket on the outgoing leg (RFC 7323, milliseconds) at `clock_time`.
    pub clock: u32,
    /// The pair's number: key of [`PAIRS`](crate::layout::PAIRS), or of a [direct](crate::direct) connection.
    pub pair: u32,
    /// [`DIRECTION_REQUEST`] or [`DIRECTION_RESPONSE`].
    pub direction: u32,
    /// [`STATE_HANDOVER`], [`STATE_OFFLOADED`], [`STATE_RESET`] or [`STATE_OVER`].
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
    /// [`FLOW_CLEAR_ECN`], [`FLOW_ENDED`], [`FLOW_REVERSE_ENDED`], [`FLOW_TIMESTAMPS`], [`FLOW_BY_STACK`], [`FLOW_OPENING`].
    pub flags: u16,
    /// How far the agent's socket on the outgoing leg has acknowledged, in the receiver's own numbers: as the handover begins, and once
    /// nothing reaches it any more. In [`STATE_HANDOVER`] nothing less is acknowledged: what has been promised is on its way, and who
    /// has been acknowledged more takes the packet for an old one, and heeds nothing else of it either (`tcp_ack`).
    pub acknowledged: u32,
    /// The index of the interface that packets to the sender leave by, and its own are expected by.
    pub arrival: u32,
    /// The TTL or hop limit that packets leave with: that of the node's own packets.
    pub hop_limit: u8,
    /// The window scale that the receiver announced, 0 to 14.
    pub receiver_scale: u8,
    /// Zero.
    pub pad: [u8; 2],
}

/// What is known of one direction of a pair: the agent writes what it knows as the handover begins, the programs keep it
/// current. Written only for packets of this direction.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct DirectionState {
    /// Packets redirected; a super-packet of GSO or GRO counts once.
    pub packets: u64,
    /// Bytes of payload that the sender has sent since the connection was opened, each counted once, whoever passed it on.
    pub bytes: u64,
    /// Bytes of payload redirected that had been seen before: retransmitted ones.
    pub repeated: u64,
    /// When the last packet came that the receiver takes: `CLOCK_MONOTONIC` in nanoseconds; before the first, when the handover began.
    pub last_seen: u64,
    /// What [`Self::fin_end`] tells: 0, or `1 << 32` and that number. One word, because packets of one direction may be on two
    /// CPUs at once: whoever sees that there is a FIN must see which number it has.
    pub fin: u64,
    /// What is added to the sender's timestamps, modulo 2^32, once `timestamp_known` is 1.
    pub timestamp_shift: u32,
    /// The least that any packet would have been shifted by in [`STATE_HANDOVER`]: that one had waited least between its sender's
    /// clock and the node's, which is how far the two clocks are apart.
    pub timestamp_least: u32,
    /// The right edge of the window that the sender has announced, the farthest so far: the first number of the opposite
    /// direction that it does not take yet, in the numbers that it sees.
    pub edge: u32,
    /// The sequence number after the last byte or FIN that the sender has sent, in its own numbers.
    pub sequence_end: u32,
    /// What the sender has acknowledged, in the numbers that it sees.
    pub acknowledged: u32,
    /// The window of the packet that was `acknowledged` with, as it lay in it, unscaled.
    pub window: u16,
    /// [`SENDER_RESET`], [`SENDER_SYN`], [`SENDER_CHALLENGE`].
    pub flags: u8,
    /// Whether `timestamp_shift` has been learnt from a packet: 0 or 1.
    pub timestamp_known: u8,
}

/// What of a segment is noted in its [`DirectionState`].
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Its sequence number.
    pub sequence: u32,
    /// Its acknowledgement number.
    pub acknowledgement: u32,
    /// Bytes of its payload.
    pub payload: u32,
    /// Its window as it lies in it.
    pub window: u16,
    /// Its flags, as `packet` names them.
    pub flags: u8,
    /// When it came: `CLOCK_MONOTONIC` in nanoseconds.
    pub time: u64,
}

/// [`DirectionState::fin`]: there is one.
const FIN_SEEN: u64 = 1 << 32;

impl DirectionState {
    /// The sequence number after the sender's FIN, in the sender's own numbers, if it has ended its direction.
    #[inline(always)]
    #[must_use]
    pub const fn fin_end(&self) -> Option<u32> {
        #[expect(clippy::cast_possible_truncation, reason = "the number is the lower half")]
        if self.fin & FIN_SEEN == 0 { None } else { Some(self.fin as u32) }
    }

    /// Notes the sender's FIN, after which its next number is `end`.
    #[inline(always)]
    pub const fn set_fin_end(&mut self, end: u32) {
        self.fin = FIN_SEEN | end as u64;
    }

    /// Notes by how much the timestamp of a packet of this direction is shifted so that it tells the node's clock.
    #[inline(always)]
    pub const fn learn_clock(&mut self, shift: u32) {
        if self.timestamp_known == 0 {
            self.timestamp_shift = shift;
            self.timestamp_least = shift;
            self.timestamp_known = 1;
        } else if is_before(self.timestamp_shift, shift) {
            // The largest one stays for good, so that time never goes back.
            self.timestamp_shift = shift;
        } else if is_before(shift, self.timestamp_least) {
            self.timestamp_least = shift;
        }
    }

    /// What is taken from timestamps of this direction that the other one echoes, once its clock is known.
    ///
    /// In [`STATE_HANDOVER`] each packet tells the node's clock, however long it has waited. What it told its sender is then known
    /// only to within that time, and must not be taken for older than it is: the echo of what was sent again would look like
    /// one of the first time (RFC 3522), and what is lost would not be sent again.
    #[inline(always)]
    #[must_use]
    pub const fn echo_shift(&self, state: u32) -> Option<u32> {
        if self.timestamp_known == 0 {
            None
        } else if state == STATE_HANDOVER {
            Some(self.timestamp_least)
        } else {
            Some(self.timestamp_shift)
        }
    }

    /// The right edge of the window that the sender has announced last, with its window scale, in the numbers that it sees. Before
    /// [`Self::edge`] where it has taken back what it announced, since it has no memory (`tcp_select_window`): it means it.
    #[inline(always)]
    const fn latest_edge(&self, scale: u8) -> u32 {
        // Masked for the verifier, which knows nothing of the agent's checks.
        self.acknowledged.wrapping_add((self.window as u32) << (scale & 15))
    }

    /// Whether the end of this direction has been acknowledged by `other`, the opposite direction, where acknowledgement
    /// numbers of the opposite direction become those of this one by adding `shift`.
    #[inline(always)]
    const fn is_finished(&self, other: &Self, shift: u32) -> bool {
        match self.fin_end() {
            Some(end) => !is_before(other.acknowledged.wrapping_add(shift), end),
            None => false,
        }
    }
}

/// Value of [`PAIRS`](crate::layout::PAIRS): what is known of a pair.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Pair {
    /// When the connection was accepted: `CLOCK_MONOTONIC` in nanoseconds.
    pub opened: u64,
    /// When its handover began, likewise; of a direct connection, when its handshake was done, 0 before; or [`REPLACED`].
    pub offloaded: u64,
    /// From the client to the endpoint.
    pub request: DirectionState,
    /// From the endpoint to the client.
    pub response: DirectionState,
}

impl Pair {
    /// Whether it is an attempt in whose place there is another one.
    #[inline(always)]
    #[must_use]
    pub const fn is_replaced(&self) -> bool {
        self.offloaded == REPLACED
    }
}

/// The numbers of a segment, in host byte order.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Numbers {
    /// The sequence number.
    pub sequence: u32,
    /// The acknowledgement number.
    pub acknowledgement: u32,
    /// The window, unscaled.
    pub window: u16,
}

impl Flow {
    /// Whether packets of `length`, in bytes from the IP header on, are too large to leave.
    #[inline(always)]
    #[must_use]
    pub const fn is_too_big(&self, length: u32) -> bool {
        self.mtu != 0 && length > self.mtu
    }

    /// The numbers of `segment` on the other leg: `forward` is what is known of this direction, and `reverse` of what its receiver has
    /// said. `is_bare` tells whether the segment carries no payload and is [accepted](DirectionState::accepts): a stranger's, whose number is
    /// a guess, must not be given one that its receiver takes.
    #[inline(always)]
    #[must_use]
    pub const fn numbers(
        &self,
        segment: &Segment,
        forward: &DirectionState,
        reverse: &DirectionState,
        is_bare: bool,
    ) -> Numbers {
        let mut sequence = segment.sequence.wrapping_add(self.sequence_shift);
        // A receiver drops what lies outside of its window, acknowledgement and all (RFC 9293, 3.10.7.4). What a bare
        // acknowledgement says is true at any number: it gets the nearest one that is taken. Its own may lie beyond, because local
        // sockets took more of its sender than the receiver has room for; or before, where the sender has not heard that a
        // window that it went beyond has moved (`tcp_acceptable_seq`), and neither end would ever hear the other again. A probe
        // is meant to be answered, and its number is the last that has been acknowledged: it stays.
        //
        // Once its sender has gone beyond the window, all get the number of the edge: a receiver takes no window from what
        // has a lower number than what it took one from before (`tcp_may_update_window`).
        if is_bare && segment.flags & (FLAG_SYN | FLAG_FIN | FLAG_RST) == 0 {
            let edge = reverse.latest_edge(self.receiver_scale);
            let sent = forward.sequence_end.wrapping_add(self.sequence_shift);
            let is_probe = sequence.wrapping_add(1) == reverse.acknowledged;
            if is_before(edge, sequence) || is_before(edge, sent) && !is_probe {
                sequence = edge;
            } else if is_before(sequence.wrapping_add(1), reverse.acknowledged) {
                sequence = reverse.acknowledged;
            }
        }
        let mut acknowledgement = segment.acknowledgement;
        // What the receiver has been told already and the sender still has to get from the local socket.
        let mut missing = 0;
        if segment.flags & FLAG_ACK != 0 {
            acknowledgement = acknowledgement.wrapping_add(self.acknowledgement_shift);
            if self.state == STATE_HANDOVER && is_before(acknowledgement, self.acknowledged) {
                missing = self.acknowledged.wrapping_sub(acknowledgement);
                acknowledgement = self.acknowledged;
            }
        }
        let window = if segment.flags & FLAG_SYN != 0 {
            segment.window
        } else {
            let window = translate::window(segment.window, self.source_scale, self.target_scale);
            translate::window_without(window, missing, self.target_scale)
        };
        Numbers { sequence, acknowledgement, window }
    }

    /// Whether both ends have ended their directions and know it of each other, `forward` being what is known of this direction,
    /// `reverse` of the other. An end that reached a local socket before the handover counts once that has delivered it.
    #[inline(always)]
    #[must_use]
    pub const fn has_ended(&self, forward: &DirectionState, reverse: &DirectionState) -> bool {
        self.are_finished(if self.state == STATE_OFFLOADED { self.flags } else { 0 }, forward, reverse)
    }

    /// Whether nothing more is to be forwarded but what is sent again: both ends have ended their directions and know it of
    /// each other, or one has reset the connection. `forward` is what is known of this direction, `reverse` of the other.
    #[inline(always)]
    #[must_use]
    pub const fn is_over(&self, forward: &DirectionState, reverse: &DirectionState) -> bool {
        (forward.flags | reverse.flags) & SENDER_RESET != 0 || self.are_finished(self.flags, forward, reverse)
    }

    /// Whether each direction has ended: by what the other end has acknowledged, or by [`FLOW_ENDED`] and
    /// [`FLOW_REVERSE_ENDED`] among the flags `passed_on`.
    #[inline(always)]
    const fn are_finished(&self, passed_on: u16, forward: &DirectionState, reverse: &DirectionState) -> bool {
        // What the receiver acknowledges becomes the sender's number by undoing what was added to that.
        let is_finished =
            passed_on & FLOW_ENDED != 0 || forward.is_finished(reverse, self.sequence_shift.wrapping_neg());
        let is_reverse_finished =
            passed_on & FLOW_REVERSE_ENDED != 0 || reverse.is_finished(forward, self.acknowledgement_shift);
        is_finished && is_reverse_finished
    }
}

impl Pair {
    /// Whether an end has ended its direction.
    #[must_use]
    pub const fn has_fin(&self) -> bool {
        self.request.fin_end().is_some() || self.response.fin_end().is_some()
    }

    /// [`Flow::is_over`], for either of the pair's two flows.
    #[must_use]
    pub const fn is_over(&self, flow: &Flow) -> bool {
        let (forward, reverse) = self.directions(flow);
        flow.is_over(forward, reverse)
    }

    /// [`Flow::has_ended`], for either of the pair's two flows.
    #[must_use]
    pub const fn has_ended(&self, flow: &Flow) -> bool {
        let (forward, reverse) = self.directions(flow);
        flow.has_ended(forward, reverse)
    }

    /// What is known of a flow's direction, and of the opposite one.
    #[inline(always)]
    #[must_use]
    pub const fn directions(&self, flow: &Flow) -> (&DirectionState, &DirectionState) {
        if flow.direction == DIRECTION_REQUEST {
            (&self.request, &self.response)
        } else {
            (&self.response, &self.request)
        }
    }
}

const _: () = {
    assert!(size_of::<Flow>() == 112 && align_of::<Flow>() == 8);
    assert!(offset_of!(Flow, interface) == 36);
    assert!(offset_of!(Flow, next_hop) == 40);
    assert!(offset_of!(Flow, mtu) == 60);
    assert!(offset_of!(Flow, clock_time) == 64);
    assert!(offset_of!(Flow, clock) == 72);
    assert!(offset_of!(Flow, pair) == 76);
    assert!(offset_of!(Flow, direction) == 80);
    assert!(offset_of!(Flow, state) == 84);
    assert!(offset_of!(Flow, sequence_shift) == 88);
    assert!(offset_of!(Flow, acknowledgement_shift) == 92);
    assert!(offset_of!(Flow, source_scale) == 96);
    assert!(offset_of!(Flow, target_scale) == 97);
    assert!(offset_of!(Flow, flags) == 98);
    assert!(offset_of!(Flow, acknowledged) == 100);
    assert!(offset_of!(Flow, arrival) == 104);
    assert!(offset_of!(Flow, hop_limit) == 108);
    assert!(size_of::<NextHop>() == 20 && offset_of!(NextHop, address) == 4);

    assert!(size_of::<DirectionState>() == 64 && align_of::<DirectionState>() == 8);
    assert!(offset_of!(DirectionState, fin) == 32);
    assert!(offset_of!(DirectionState, edge) == 48);
    assert!(offset_of!(DirectionState, timestamp_known) == 63);

    assert!(size_of::<Pair>() == 144 && align_of::<Pair>() == 8);
    assert!(offset_of!(Pair, offloaded) == 8);
    assert!(offset_of!(Pair, request) == 16);
    assert!(offset_of!(Pair, response) == 80);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    use super::{Flow, Pair};

    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the sizes asserted above equal
    // the sums of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for Flow {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Pair {}
}

#[cfg(test)]
mod tests;
