//! Joins the two connections of a pair, so that the kernel forwards their packets by itself.
//!
//! So far this is the reading and the arithmetic of it: connections are not promoted yet.

pub mod leg;

use std::net::SocketAddr;

use forwarder_common::flow::{DIRECTION_REQUEST, DIRECTION_RESPONSE, Flow, FlowKey};
use forwarder_common::layout::address_bytes;

pub use self::leg::{Leg, LegOptions};

/// Why two legs cannot be joined.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Refusal {
    /// One is IPv4, the other IPv6.
    Families,
    /// One uses timestamps, the other does not.
    Timestamps,
    /// One uses selective acknowledgements, the other does not.
    SelectiveAcknowledgements,
    /// One uses explicit congestion notification, the other does not.
    CongestionMarks,
}

impl Refusal {
    /// Its name in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Families => "families_differ",
            Self::Timestamps => "timestamps_differ",
            Self::SelectiveAcknowledgements => "sack_differs",
            Self::CongestionMarks => "ecn_differs",
        }
    }
}

/// Where the packets of a joined pair go, and under which number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Placement {
    /// The index of the interface towards the client.
    pub downstream_interface: u32,
    /// The index of the interface towards the endpoint.
    pub upstream_interface: u32,
    /// The pair's number.
    pub pair: u32,
    /// [`STATE_TAIL`](forwarder_common::flow::STATE_TAIL) or
    /// [`STATE_SPLICED`](forwarder_common::flow::STATE_SPLICED).
    pub state: u32,
}

/// The two directions of a pair, from the client first.
///
/// What differs between the legs is the same from the first byte on: the agent has written to one leg what it read from
/// the other, byte for byte, so that the first bytes correspond, and the legs may be read at any moment.
///
/// # Errors
/// Why packets of one leg would not be understood on the other.
pub fn join(downstream: &Leg, upstream: &Leg, placement: Placement) -> Result<[(FlowKey, Flow); 2], Refusal> {
    if downstream.peer.is_ipv4() != upstream.peer.is_ipv4() {
        return Err(Refusal::Families);
    }
    let (down, up) = (downstream.options, upstream.options);
    if down.timestamps != up.timestamps {
        return Err(Refusal::Timestamps);
    }
    if down.selective != up.selective {
        return Err(Refusal::SelectiveAcknowledgements);
    }
    if down.congestion_marks != up.congestion_marks {
        return Err(Refusal::CongestionMarks);
    }
    Ok([
        direction(downstream, upstream, DIRECTION_REQUEST, placement.upstream_interface, placement),
        direction(upstream, downstream, DIRECTION_RESPONSE, placement.downstream_interface, placement),
    ])
}

/// What arrives on `from` and leaves on `to`.
fn direction(from: &Leg, to: &Leg, direction: u32, interface: u32, placement: Placement) -> (FlowKey, Flow) {
    let flow = Flow {
        out: tuple(to.local, to.peer),
        interface,
        clock_time: to.clock_time,
        clock: to.clock,
        pair: placement.pair,
        direction,
        state: placement.state,
        sequence_shift: to.first_sent.wrapping_sub(from.first_received),
        acknowledgement_shift: to.first_received.wrapping_sub(from.first_sent),
        source_scale: from.peer_scale,
        target_scale: to.own_scale,
        pad: [0; 6],
    };
    (tuple(from.peer, from.local), flow)
}

fn tuple(source: SocketAddr, destination: SocketAddr) -> FlowKey {
    FlowKey {
        source: address_bytes(source.ip()),
        destination: address_bytes(destination.ip()),
        source_port: source.port(),
        destination_port: destination.port(),
    }
}

#[cfg(test)]
mod tests {
    use forwarder_common::flow::STATE_TAIL;

    use super::*;

    const PLACEMENT: Placement =
        Placement { downstream_interface: 3, upstream_interface: 4, pair: 7, state: STATE_TAIL };

    fn leg(local: &str, peer: &str, first_sent: u32, first_received: u32) -> Leg {
        Leg {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
            first_sent,
            first_received,
            peer_scale: 7,
            own_scale: 9,
            options: LegOptions { timestamps: true, selective: true, congestion_marks: false },
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
        let [(request_key, request), (response_key, response)] =
            join(&downstream, &upstream, PLACEMENT).unwrap();
        assert_eq!(request.out.reversed(), response_key);
        assert_eq!(response.out.reversed(), request_key);
        assert_eq!(request.sequence_shift, 0x20);
        assert_eq!(request.sequence_shift.wrapping_add(response.acknowledgement_shift), 0);
        assert_eq!(response.sequence_shift.wrapping_add(request.acknowledgement_shift), 0);
        assert_eq!((request.interface, response.interface), (4, 3));
        assert_eq!((request.clock, response.clock), (upstream.clock, downstream.clock));
    }

    #[test]
    fn legs_that_do_not_understand_each_other_are_refused() {
        let check = |change: fn(&mut Leg), expected: Refusal| {
            let (downstream, mut upstream) = legs();
            change(&mut upstream);
            assert_eq!(join(&downstream, &upstream, PLACEMENT), Err(expected));
        };
        check(|leg| leg.peer = "[2001:db8::1]:1".parse().unwrap(), Refusal::Families);
        check(|leg| leg.options.timestamps = false, Refusal::Timestamps);
        check(|leg| leg.options.selective = false, Refusal::SelectiveAcknowledgements);
        check(|leg| leg.options.congestion_marks = true, Refusal::CongestionMarks);
    }
}
