//! Joins the two connections of a pair, so that the kernel forwards their packets by itself.
//!
//! What joins them is in [`flows`](crate::flows); when, the data plane decides.

use std::net::SocketAddr;

use forwarder_common::flow::{
    DIRECTION_REQUEST, DIRECTION_RESPONSE, DirectionState, FLOW_CLEAR_ECN, FLOW_TIMESTAMPS, Flow, NextHop,
    Pair, STATE_HANDOVER,
};
use forwarder_common::tuple::FourTuple;
use forwarder_common::tuple::address_bytes;

use crate::fallback_reason::FallbackReason;
use crate::net::egress_path::Via;
use crate::tcp::leg::Leg;

/// Bytes that the timestamps take from each segment's payload (RFC 7323, appendix A).
const TIMESTAMPS_LENGTH: u32 = 12;

/// The fewest units of the other leg's window scale that a window is to have.
const LEAST_UNITS: u32 = 4;

/// Where the packets of a joined pair go, and under which number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Placement {
    /// The way to the client.
    pub downstream: Hop,
    /// The way to the endpoint.
    pub upstream: Hop,
    /// The pair's number.
    pub pair: u32,
}

/// Where packets leave the node.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Hop {
    /// The index of the interface.
    pub interface: u32,
    /// The neighbour that they are handed to there.
    pub next_hop: NextHop,
    /// The largest that may, as [`Flow::mtu`].
    pub mtu: u32,
    /// Who sends them.
    pub via: Via,
    /// The TTL or hop limit that they leave with, as [`Flow::hop_limit`].
    pub hop_limit: u8,
}

/// What stands in the maps for a joined pair.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Joint {
    /// The two directions, from the client first.
    pub flows: [(FourTuple, Flow); 2],
    /// What is known of them at first.
    pub pair: Pair,
}

/// Computes what joins two legs, in state handover.
///
/// What differs between the legs is the same from the first byte on that has a counterpart: from there on the agent has written to
/// one leg what it read from the other, byte for byte, and the legs may be read at any moment.
///
/// # Errors
/// Why packets of one leg would not be understood on the other.
pub fn join(downstream: &Leg, upstream: &Leg, placement: Placement) -> Result<Joint, FallbackReason> {
    if downstream.peer.is_ipv4() != upstream.peer.is_ipv4() {
        return Err(FallbackReason::Families);
    }
    let (down, up) = (downstream.options, upstream.options);
    if down.timestamps != up.timestamps {
        return Err(FallbackReason::Timestamps);
    }
    if down.selective != up.selective {
        return Err(FallbackReason::SelectiveAcknowledgements);
    }
    if !fits(downstream, upstream) || !fits(upstream, downstream) {
        return Err(FallbackReason::SegmentSizes);
    }
    if !tells_windows(downstream, upstream) || !tells_windows(upstream, downstream) {
        return Err(FallbackReason::WindowScale);
    }
    let now = downstream.clock_time.max(upstream.clock_time);
    Ok(Joint {
        flows: [
            direction(downstream, upstream, DIRECTION_REQUEST, placement),
            direction(upstream, downstream, DIRECTION_RESPONSE, placement),
        ],
        pair: Pair {
            opened: now,
            offloaded: now,
            request: seen_of(downstream, now),
            response: seen_of(upstream, now),
        },
    })
}

/// Whether the largest segments that the peer of `from` may send fit into packets on `to`.
const fn fits(from: &Leg, to: &Leg) -> bool {
    let options = if from.options.timestamps { TIMESTAMPS_LENGTH } else { 0 };
    from.advertised_segment.saturating_sub(options) <= to.segment
}

/// Whether the windows that the peer of `from` announces are large enough for the units of `to`: they are rounded down to them,
/// so that a smaller one would never let anything pass, and this takes a quarter off at most.
const fn tells_windows(from: &Leg, to: &Leg) -> bool {
    to.own_scale <= from.peer_scale || from.send_window >> to.own_scale >= LEAST_UNITS
}

/// What is known of the direction that comes from a leg's peer.
fn seen_of(from: &Leg, now: u64) -> DirectionState {
    DirectionState {
        packets: 0,
        bytes: from.received,
        repeated: 0,
        last_seen: now,
        fin: 0,
        timestamp_shift: 0,
        timestamp_least: 0,
        edge: from.next_sent.wrapping_sub(from.unacknowledged).wrapping_add(from.send_window),
        sequence_end: from.next_received,
        acknowledged: from.next_sent.wrapping_sub(from.unacknowledged),
        window: u16::try_from(from.send_window >> from.peer_scale).unwrap_or(u16::MAX),
        flags: 0,
        timestamp_known: 0,
    }
}

/// What arrives on `from` and leaves on `to`.
fn direction(from: &Leg, to: &Leg, direction: u32, placement: Placement) -> (FourTuple, Flow) {
    let Placement { downstream, upstream, pair } = placement;
    let (arrival, hop) =
        if direction == DIRECTION_REQUEST { (downstream, upstream) } else { (upstream, downstream) };
    let clear_ecn = from.options.congestion_marks && !to.options.congestion_marks;
    let flow = Flow {
        out: tuple(to.local, to.peer),
        interface: hop.interface,
        next_hop: hop.next_hop,
        mtu: hop.mtu,
        clock_time: to.clock_time,
        clock: to.clock,
        pair,
        direction,
        state: STATE_HANDOVER,
        sequence_shift: to.first_sent.wrapping_sub(from.first_received),
        acknowledgement_shift: to.first_received.wrapping_sub(from.first_sent),
        source_scale: from.peer_scale,
        target_scale: to.own_scale,
        flags: if clear_ecn { FLOW_CLEAR_ECN } else { 0 }
            | if from.options.timestamps { FLOW_TIMESTAMPS } else { 0 }
            | hop.via.flag(),
        acknowledged: to.next_received,
        arrival: arrival.interface,
        hop_limit: hop.hop_limit,
        receiver_scale: to.peer_scale,
        pad: [0; 2],
    };
    (tuple(from.peer, from.local), flow)
}

fn tuple(source: SocketAddr, destination: SocketAddr) -> FourTuple {
    FourTuple {
        source: address_bytes(source.ip()),
        destination: address_bytes(destination.ip()),
        source_port: source.port(),
        destination_port: destination.port(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tcp::leg::LegOptions;

    const fn hop(interface: u32) -> Hop {
        let via = if interface == 3 { Via::Stack } else { Via::Redirect };
        Hop {
            interface,
            next_hop: NextHop { family: 2, address: [0; 16] },
            mtu: interface + 1500,
            via,
            hop_limit: 64,
        }
    }

    const PLACEMENT: Placement = Placement { downstream: hop(3), upstream: hop(4), pair: 7 };

    fn leg(local: &str, peer: &str, first_sent: u32, first_received: u32) -> Leg {
        Leg {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
            first_sent,
            first_received,
            next_sent: first_sent.wrapping_add(50),
            next_received: first_received.wrapping_add(70),
            received: 70,
            kept: 0,
            unacknowledged: 20,
            send_window: 65_536,
            peer_scale: 7,
            own_scale: 9,
            options: LegOptions { timestamps: true, selective: true, congestion_marks: false },
            segment: 1448,
            advertised_segment: 1460,
            clock: first_sent,
            clock_time: 5,
        }
    }

    fn legs() -> (Leg, Leg) {
        let downstream = leg("192.0.2.1:9001", "198.51.100.1:40000", 1_000, 0xffff_fff0);
        (downstream, leg("203.0.113.1:50000", "203.0.113.9:3306", 0x10, 0xffff_ff00))
    }

    #[test]
    fn each_direction_undoes_the_other() {
        let (downstream, upstream) = legs();
        let Joint { flows: [(request_key, request), (response_key, response)], pair } =
            join(&downstream, &upstream, PLACEMENT).unwrap();
        assert_eq!(request.out.reversed(), response_key);
        assert_eq!(response.out.reversed(), request_key);
        assert_eq!(request.sequence_shift, 0x20);
        assert_eq!(request.sequence_shift.wrapping_add(response.acknowledgement_shift), 0);
        assert_eq!(response.sequence_shift.wrapping_add(request.acknowledgement_shift), 0);
        assert_eq!((request.interface, response.interface), (4, 3));
        assert_eq!((request.arrival, response.arrival), (3, 4));
        assert_eq!((request.mtu, response.mtu), (1504, 1503));
        assert_eq!([request, response].map(|flow| Via::of(&flow)), [Via::Redirect, Via::Stack]);
        assert_eq!((request.clock, response.clock), (upstream.clock, downstream.clock));
        assert_eq!((pair.request.bytes, pair.request.sequence_end), (70, downstream.next_received));
        assert_eq!(pair.response.acknowledged, upstream.next_sent - 20);
        assert_eq!(pair.response.edge, upstream.next_sent - 20 + 65_536);
    }

    #[test]
    fn legs_that_do_not_understand_each_other_are_refused() {
        let check = |change: fn(&mut Leg), expected: FallbackReason| {
            let (downstream, mut upstream) = legs();
            change(&mut upstream);
            assert_eq!(join(&downstream, &upstream, PLACEMENT), Err(expected));
        };
        check(|leg| leg.peer = "[2001:db8::1]:1".parse().unwrap(), FallbackReason::Families);
        check(|leg| leg.options.timestamps = false, FallbackReason::Timestamps);
        check(|leg| leg.options.selective = false, FallbackReason::SelectiveAcknowledgements);
        check(|leg| leg.segment = 1400, FallbackReason::SegmentSizes);
        check(|leg| leg.advertised_segment = 8960, FallbackReason::SegmentSizes);
        check(|leg| (leg.peer_scale, leg.send_window) = (0, 4 * 512 - 1), FallbackReason::WindowScale);
    }

    #[test]
    fn a_small_window_is_told_by_a_scale_that_is_small_enough() {
        let (mut downstream, mut upstream) = legs();
        upstream.send_window = 2047;
        // The sender's own scale says it as well as its peer's.
        for (peer_scale, own_scale, is_told) in [(9, 9, true), (0, 9, false), (8, 9, false), (0, 0, true)] {
            (upstream.peer_scale, downstream.own_scale) = (peer_scale, own_scale);
            let joined = join(&downstream, &upstream, PLACEMENT);
            assert_eq!(
                joined.err(),
                (!is_told).then_some(FallbackReason::WindowScale),
                "{peer_scale} {own_scale}"
            );
        }
        // A client that has asked for few bytes behind a node with scale 14: nothing would ever be let through.
        (upstream.peer_scale, upstream.send_window, downstream.own_scale) = (0, 8192, 14);
        assert_eq!(join(&downstream, &upstream, PLACEMENT), Err(FallbackReason::WindowScale));
    }

    #[test]
    fn a_leg_of_smaller_packets_may_be_joined_where_the_other_asks_for_no_larger_ones() {
        let (mut downstream, mut upstream) = legs();
        (upstream.segment, upstream.advertised_segment) = (1348, 1360);
        assert_eq!(join(&downstream, &upstream, PLACEMENT), Err(FallbackReason::SegmentSizes));
        downstream.advertised_segment = 1360;
        join(&downstream, &upstream, PLACEMENT).unwrap();
    }

    #[test]
    fn marks_that_only_one_leg_answers_are_cleared_on_the_way_to_the_other() {
        let (mut downstream, mut upstream) = legs();
        let cleared = |downstream, upstream| {
            let joint = join(&downstream, &upstream, PLACEMENT).unwrap();
            joint.flows.map(|(_, flow)| flow.flags & FLOW_CLEAR_ECN != 0)
        };
        downstream.options.congestion_marks = true;
        assert_eq!(cleared(downstream, upstream), [true, false]);
        upstream.options.congestion_marks = true;
        assert_eq!(cleared(downstream, upstream), [false, false]);
    }
}
