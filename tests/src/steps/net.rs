//! The network of a lane.

use super::Side;
use crate::netns::{NetNs, Topology};
use crate::wire::Wire;

/// The hosts and wires of the two ends.
pub(super) struct Net {
    pub(super) topology: Topology,
    pub(super) wires: [Wire; 2],
}

impl Net {
    pub(super) fn wire(&self, side: Side) -> &Wire {
        match side {
            Side::Client => &self.wires[0],
            Side::Endpoint => &self.wires[1],
        }
    }

    pub(super) fn host(&self, side: Side) -> &NetNs {
        match side {
            Side::Client => &self.topology.client,
            Side::Endpoint => &self.topology.backend1,
        }
    }
}
