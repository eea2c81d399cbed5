//! A pair of connections that the kernel forwards.

use std::net::SocketAddr;

use forwarder_common::flow::{FLOW_ENDED, FLOW_REVERSE_ENDED, Flow, STATE_OFFLOADED, STATE_RESET};
use forwarder_common::tuple::{FourTuple, address_bytes, address_of};

/// A pair that the kernel forwards: its number and its two directions, from the client first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JoinedPair {
    /// Its number: key of the map of pairs.
    pub number: u32,
    /// The tuples of its packets as they arrive, and where they go.
    pub flows: [(FourTuple, Flow); 2],
}

/// What tells a pair from all others: its number, and the tuples of its packets as they arrive, from the client first.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PairKey {
    /// Its number.
    pub number: u32,
    /// The tuples.
    pub tuples: [FourTuple; 2],
}

impl PairKey {
    /// That of the pair between `(client, address)` and `(endpoint, local)`: the ends, and the addresses of this node that they
    /// speak to.
    pub fn new(
        number: u32,
        downstream: (SocketAddr, SocketAddr),
        upstream: (SocketAddr, SocketAddr),
    ) -> Self {
        let tuples = [downstream, upstream].map(|(end, own)| key_of(end, own));
        Self { number, tuples }
    }

    /// The client, and the node's address that it has connected to.
    pub fn downstream(&self) -> (SocketAddr, SocketAddr) {
        ends(&self.tuples[0])
    }

    /// The endpoint, and the node's address that it was connected from.
    pub fn upstream(&self) -> (SocketAddr, SocketAddr) {
        ends(&self.tuples[1])
    }

    /// What is removed at its end.
    pub(super) fn condemned(&self) -> Condemned {
        Condemned::Pair(self.number, self.tuples)
    }
}

impl JoinedPair {
    /// What tells it from all others.
    pub fn key(&self) -> PairKey {
        PairKey { number: self.number, tuples: self.flows.map(|(key, _)| key) }
    }

    /// The client, and the node's address that it has connected to.
    pub fn downstream(&self) -> (SocketAddr, SocketAddr) {
        self.key().downstream()
    }

    /// The endpoint, and the node's address that it was connected from.
    pub fn upstream(&self) -> (SocketAddr, SocketAddr) {
        self.key().upstream()
    }

    /// Its directions once they have come to a last state.
    pub(super) fn in_state(&self, state: u32) -> [(FourTuple, Flow); 2] {
        self.flows.map(|(key, flow)| (key, Flow { state, ..flow }))
    }

    /// Whether the agent has ended it.
    pub fn is_ended(&self) -> bool {
        self.flows.iter().any(|(_, flow)| flow.state == STATE_RESET)
    }

    /// Whether the sockets have nothing more to do with it.
    pub fn is_offloaded(&self) -> bool {
        self.flows.iter().all(|(_, flow)| flow.state == STATE_OFFLOADED)
    }

    /// Whether an end of it reached a local socket before the handover: then no FIN of it is seen.
    pub fn has_early_end(&self) -> bool {
        self.flows.iter().any(|(_, flow)| is_early_end(flow.flags))
    }
}

pub(super) const fn is_early_end(flags: u16) -> bool {
    flags & (FLOW_ENDED | FLOW_REVERSE_ENDED) != 0
}

/// What is to be removed from the maps. All of it is [`STATE_OVER`](forwarder_common::flow::STATE_OVER), or of no effect by itself.
#[derive(Clone, Copy, Debug)]
pub enum Condemned {
    /// A pair with its number and the tuples of its directions.
    Pair(u32, [FourTuple; 2]),
    /// The same without what is known of it.
    Flows(u32, [FourTuple; 2]),
    /// What is known of a pair that has no directions.
    State(u32),
}

/// Where packets of a tuple come from, and where they are sent to.
pub(super) fn ends(key: &FourTuple) -> (SocketAddr, SocketAddr) {
    (
        SocketAddr::new(address_of(key.source), key.source_port),
        SocketAddr::new(address_of(key.destination), key.destination_port),
    )
}

/// The tuple of packets from `source` to `destination`.
pub(super) fn key_of(source: SocketAddr, destination: SocketAddr) -> FourTuple {
    FourTuple {
        source: address_bytes(source.ip()),
        destination: address_bytes(destination.ip()),
        source_port: source.port(),
        destination_port: destination.port(),
    }
}
