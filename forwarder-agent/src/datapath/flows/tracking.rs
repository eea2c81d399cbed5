//! What the node's connection tracking has to do with pairs.

use super::{FlowTable, JoinedPair};
use crate::promote::{Leg, Refusal, Way};

impl FlowTable {
    /// Whether a leg's packets have the addresses of its socket where the programs see them.
    pub(super) fn check_translation(&self, leg: &Leg) -> Result<(), Refusal> {
        let Some(conntrack) = &self.conntrack else { return Ok(()) };
        match conntrack.is_translated(leg.local, leg.peer) {
            Ok(false) => Ok(()),
            Ok(true) => Err(Refusal::Translated),
            Err(error) => {
                // A kernel that does not track connections translates none.
                tracing::debug!(%error, "connection tracking cannot be asked");
                Ok(())
            }
        }
    }

    /// Has connection tracking not take what the stack sends on for invalid: of each connection, it sees one direction alone,
    /// which goes beyond every window that it knows. The usual rule of firewalls would drop that.
    pub(super) fn keep_valid(&self, pair: &JoinedPair) {
        let Some(conntrack) = &self.conntrack else { return };
        if pair.flows.iter().all(|(_, flow)| Way::of(flow) != Way::Stack) {
            return;
        }
        for (peer, local) in [pair.downstream(), pair.upstream()] {
            if let Err(error) = conntrack.be_liberal(local, peer) {
                tracing::debug!(%error, %peer, "the node may take packets of a connection for invalid");
            }
        }
    }
}
