//! At which addresses the agents of this installation listen: those of their Pods, in one Lease that the agent that writes statuses
//! keeps. An endpoint at such an address may be another node's listener.
//!
//! The reports of the agents say the same, but each agent would have to follow those of all others: a new listener on 500 nodes would
//! be told 250,000 times.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::coordination::v1::Lease;
use kube::core::{PartialObjectMeta, Resource};
use kube::runtime::watcher;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::reflector::{WATCH_SECONDS, events};

/// The annotation with the addresses, separated by spaces. Annotations may have 256 KiB, which is room for some 6,000 nodes with an IPv6
/// address each.
const ANNOTATION: &str = "forwarder.dev/node-addresses";

/// The Lease with the addresses.
#[derive(Clone, Debug)]
pub struct NodesLease {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl NodesLease {
    /// The Lease as it is to be: these addresses and nothing else, for a server-side apply.
    pub(crate) fn object(&self, addresses: &BTreeSet<IpAddr>) -> Value {
        let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": { "name": self.name, "annotations": { ANNOTATION: addresses.join(" ") } },
        })
    }

    /// What happens to the Lease.
    pub(super) fn follow(self, client: Client) -> mpsc::Receiver<Event<PartialObjectMeta<Lease>>> {
        let leases = Api::namespaced(client, &self.namespace);
        let config =
            watcher::Config::default().timeout(WATCH_SECONDS).fields(&format!("metadata.name={}", self.name));
        events("the Lease with the nodes' addresses", move || watcher(leases.clone(), config.clone()))
    }
}

/// The addresses in the Lease, where an event has it. It may be deleted: the agents are where they were.
pub(super) fn addresses(event: &Event<PartialObjectMeta<Lease>>) -> Option<BTreeSet<IpAddr>> {
    let (Event::InitApply(lease) | Event::Apply(lease)) = event else { return None };
    let text = lease.meta().annotations.as_ref()?.get(ANNOTATION)?;
    Some(text.split(' ').filter_map(|address| address.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let lease = NodesLease { namespace: "ns".to_owned(), name: "nodes".to_owned() };
        for addresses in [&[][..], &["192.0.2.1"], &["192.0.2.1", "2001:db8::1"]] {
            let addresses: BTreeSet<IpAddr> = addresses.iter().map(|it| it.parse().unwrap()).collect();
            let object = serde_json::from_value(lease.object(&addresses)).unwrap();
            assert_eq!(super::addresses(&Event::Apply(object)), Some(addresses));
        }
    }
}
