//! At which addresses agents listen, written down for all of them.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Patch, PatchParams};
use kube::{Api, Client};
use tokio::time::Instant;

use super::{AGAIN, FIELD_MANAGER, RETRY};
use crate::watch::NodesLease;
use forwarder_runtime::error::one_line;

/// How long changes are gathered. In a roll-out a Pod that goes is followed by the next on the same node.
const NODE_CAME: Duration = Duration::from_secs(1);
const NODE_GONE: Duration = Duration::from_mins(2);

/// What is to be written, and what has been.
pub(super) struct NodeAddresses {
    leases: Api<Lease>,
    lease: NodesLease,
    current: BTreeSet<IpAddr>,
    written: BTreeSet<IpAddr>,
    /// When to write, once something is known.
    due: Option<Instant>,
    has_failed: bool,
}

impl NodeAddresses {
    pub(super) fn new(client: Client, lease: NodesLease) -> Self {
        let leases = Api::namespaced(client, &lease.namespace);
        let (current, written) = (BTreeSet::new(), BTreeSet::new());
        Self { leases, lease, current, written, due: None, has_failed: false }
    }

    /// Takes down what is to be written.
    pub(super) fn set(&mut self, addresses: BTreeSet<IpAddr>) {
        if addresses == self.current {
            return;
        }
        self.current = addresses;
        let delay = if self.written.is_superset(&self.current) { NODE_GONE } else { NODE_CAME };
        let at = Instant::now() + delay;
        self.due = Some(self.due.map_or(at, |due| due.min(at)));
    }

    /// When it is time to write.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Writes.
    pub(super) async fn write(&mut self) {
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let object = self.lease.object(&self.current);
        let result = self.leases.patch(&self.lease.name, &params, &Patch::Apply(&object)).await;
        let has_failed = result.is_err();
        if let Err(error) = result
            && !self.has_failed
        {
            tracing::warn!(
                lease = self.lease.name,
                error = one_line(&error),
                "cannot write the addresses of the agents to their Lease: meanwhile an endpoint at a listener of a new node (a loop) is not refused; trying again"
            );
        }
        if !has_failed {
            self.written.clone_from(&self.current);
        }
        self.due = Some(Instant::now() + if has_failed { RETRY } else { AGAIN });
        self.has_failed = has_failed;
    }
}
