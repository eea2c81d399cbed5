//! Pairs that the agent has ended: the programs reset whoever still sends something of them.

use std::path::Path;

use forwarder_common::ABI_VERSION;
use forwarder_common::flow::STATE_RESET;

use super::{FlowMaps, FlowTable, JoinedPair};
use crate::datapath::DatapathError;

impl JoinedPair {
    /// The same pair once the agent has ended it.
    fn ended(mut self) -> Self {
        for (_, flow) in &mut self.flows {
            flow.state = STATE_RESET;
        }
        self
    }

    /// Whether the agent has ended it.
    pub fn is_ended(&self) -> bool {
        self.flows.iter().any(|(_, flow)| flow.state == STATE_RESET)
    }
}

/// Has the kernel forward nothing more of pairs that a dead agent has pinned in a directory, and reset whoever still sends
/// something of them, until they are forgotten.
///
/// # Errors
/// The maps cannot be opened, or the kernel refuses.
pub fn end<'a>(pin_dir: &Path, pairs: impl IntoIterator<Item = &'a JoinedPair>) -> Result<(), DatapathError> {
    let mut maps = FlowMaps::open(&pin_dir.join(format!("v{ABI_VERSION}")))?;
    pairs.into_iter().try_for_each(|pair| maps.rewrite(&pair.ended()))
}

impl FlowTable {
    /// Has the kernel forward nothing of a pair any more, and reset whoever still sends something of it. Its addresses are
    /// nobody else's until it is removed: unless its client opens a new connection.
    ///
    /// # Errors
    /// The kernel refuses, or a program has forgotten the pair.
    pub fn end(&self, pair: &JoinedPair) -> Result<(), DatapathError> {
        self.rewrite(&pair.ended())
    }
}
