//! What a source has read.

use std::sync::Arc;

use super::locations::Locations;
use forwarder_gateway::manifests::Manifests;
use forwarder_gateway::problem::Problem;

/// What a source has read: the objects, what is wrong with them, and where they stand.
///
/// Cloning takes no time, and what has not changed is shared with the load before: to compare the two costs what differs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Loaded {
    /// The objects in force.
    pub manifests: Manifests,
    /// What is wrong, in the order of the files.
    pub problems: Arc<[Problem]>,
    /// The lines of the objects' fields.
    pub locations: Locations,
}

impl Loaded {
    /// Whether the objects in force are the same, at the same places, whatever is wrong.
    pub(super) fn has_same_objects(&self, other: &Self) -> bool {
        self.manifests == other.manifests && self.locations == other.locations
    }
}
