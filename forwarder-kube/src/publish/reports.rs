//! What each agent has bound, told to the one that writes statuses: a Lease for each Pod, with the report in an
//! annotation. Leases, for an agent that could write to Pods could change what runs in them; they belong to the Pods,
//! and are deleted with them.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::core::{PartialObjectMeta, Resource};
use kube::runtime::watcher;
use kube::runtime::watcher::Event;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::node_addresses::NodeAddresses;
use super::{AGAIN, FIELD_MANAGER, Identity, Publication, RETRY};
use crate::watch::{WATCH_SECONDS, at, events};
use forwarder_gateway::status::nodes::{Node, NodeReport};
use forwarder_runtime::error::one_line;

/// The label of the Leases with reports: the installation.
const LABEL: &str = "forwarder.dev/report-of";
/// The annotation with the report.
const ANNOTATION: &str = "forwarder.dev/report";
/// How long changes are gathered before they are reported.
const DEBOUNCE: Duration = Duration::from_millis(100);

/// Reports what this agent has bound whenever it changes.
pub(super) async fn write_own(
    client: Client,
    identity: Arc<Identity>,
    mut outcome: watch::Receiver<Arc<Publication>>,
) {
    let Some(pod) = &identity.pod else { return };
    let leases = Api::<Lease>::namespaced(client.clone(), &identity.namespace);
    let pods = Api::<PartialObjectMeta<Pod>>::namespaced(client, &identity.namespace);
    let mut owner = None;
    let mut written = None;
    let mut has_failed = false;
    loop {
        match timeout(AGAIN, outcome.changed()).await {
            Ok(Ok(())) => sleep(DEBOUNCE).await,
            Ok(Err(_)) => return,
            // Somebody may have deleted the Lease, or its Pod may not have been there yet. To write the same is no change.
            Err(_) => written = None,
        }
        while !outcome.borrow().report.node.is_empty() {
            let report = outcome.borrow_and_update().report.clone();
            if written.as_ref() == Some(&report) {
                break;
            }
            if owner.is_none() {
                owner = pods.get(pod).await.ok().and_then(|pod| pod.meta().uid.clone());
            }
            let lease = lease(&identity, pod, owner.as_deref(), &report);
            let params = PatchParams::apply(FIELD_MANAGER).force();
            match leases.patch(pod, &params, &Patch::Apply(&lease)).await {
                Ok(_) => {
                    written = Some(report);
                    has_failed = false;
                }
                Err(error) => {
                    if !std::mem::replace(&mut has_failed, true) {
                        tracing::warn!(
                            error = one_line(&error),
                            "cannot report which listeners this node has bound: their statuses may be out of date; trying again"
                        );
                    }
                    sleep(RETRY).await;
                }
            }
        }
    }
}

fn lease(identity: &Identity, pod: &str, owner: Option<&str>, report: &NodeReport) -> serde_json::Value {
    let owners: Vec<_> = owner
        .map(|uid| json!({ "apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid }))
        .into_iter()
        .collect();
    json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {
            "name": pod,
            "labels": { LABEL: identity.installation() },
            "annotations": { ANNOTATION: serde_json::to_string(report).unwrap_or_default() },
            "ownerReferences": owners,
        },
        "spec": { "holderIdentity": identity.node },
    })
}

/// The nodes on which an agent runs or should, with their reports: what the one that writes statuses follows. It writes down for the
/// others at which addresses these agents listen.
pub(super) async fn follow(client: Client, identity: Arc<Identity>, nodes: watch::Sender<Option<Vec<Node>>>) {
    let Some(lease) = identity.nodes_lease() else { return };
    let mut addresses = NodeAddresses::new(client.clone(), lease);
    let selector = watcher::Config::default().timeout(WATCH_SECONDS).labels(&identity.pod_selector);
    let pods = Api::<Pod>::namespaced(client.clone(), &identity.namespace);
    let mut pods = events("Pods of agents", move || watcher(pods.clone(), selector.clone()));
    let selector = watcher::Config::default()
        .timeout(WATCH_SECONDS)
        .labels(&format!("{LABEL}={}", identity.installation()));
    let leases = Api::<PartialObjectMeta<Lease>>::namespaced(client, &identity.namespace);
    let mut leases = events("Leases of agents", move || watcher(leases.clone(), selector.clone()));
    let (mut agents, mut reports) = (Followed::new(agent), Followed::new(report));
    loop {
        tokio::select! {
            Some(event) = pods.recv() => agents.take_in(event),
            Some(event) = leases.recv() => reports.take_in(event),
            () = at(addresses.due()) => {
                addresses.write().await;
                continue;
            }
            () = nodes.closed() => return,
        }
        if !(agents.is_complete && reports.is_complete) {
            continue;
        }
        addresses.set(agents.known.values().flat_map(|agent| agent.pod_addresses.iter().copied()).collect());
        let of_agent = |(pod, agent): (&String, &Agent)| Node {
            name: agent.node.clone(),
            addresses: agent.addresses.clone(),
            report: reports.known.get(pod).cloned(),
        };
        let mut all: Vec<Node> = agents.known.iter().map(of_agent).collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        nodes.send_if_modified(|before| {
            let is_new = before.as_ref() != Some(&all);
            *before = Some(all);
            is_new
        });
    }
}

/// A Pod in which an agent runs or is about to.
struct Agent {
    node: String,
    /// The node's own.
    addresses: Vec<IpAddr>,
    /// Where the agent listens: the node's own as well, in the host's network.
    pod_addresses: Vec<IpAddr>,
}

fn agent(pod: &Pod) -> Option<Agent> {
    let status = pod.status.as_ref();
    let has_ended =
        status.and_then(|it| it.phase.as_deref()).is_some_and(|it| it == "Succeeded" || it == "Failed");
    if has_ended || pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let node = pod.spec.as_ref()?.node_name.clone()?;
    let several = status.and_then(|it| it.host_ips.as_ref()).into_iter().flatten().map(|it| it.ip.as_str());
    let one = status.and_then(|it| it.host_ip.as_deref());
    let mut addresses: Vec<IpAddr> = several.chain(one).filter_map(|text| text.parse().ok()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    let of_pod = status.and_then(|it| it.pod_ips.as_ref()).into_iter().flatten();
    let pod_addresses = of_pod.filter_map(|it| it.ip.parse().ok()).collect();
    Some(Agent { node, addresses, pod_addresses })
}

fn report(lease: &PartialObjectMeta<Lease>) -> Option<NodeReport> {
    let text = lease.meta().annotations.as_ref()?.get(ANNOTATION)?;
    serde_json::from_str(text).ok()
}

/// What a watch has told, by name.
struct Followed<K, V> {
    read: fn(&K) -> Option<V>,
    known: BTreeMap<String, V>,
    listed: HashMap<String, V>,
    is_complete: bool,
}

impl<K: Resource, V> Followed<K, V> {
    fn new(read: fn(&K) -> Option<V>) -> Self {
        Self { read, known: BTreeMap::new(), listed: HashMap::new(), is_complete: false }
    }

    fn take_in(&mut self, event: Event<K>) {
        let name = |object: &K| object.meta().name.clone().unwrap_or_default();
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                self.listed.extend((self.read)(&object).map(|read| (name(&object), read)));
            }
            Event::InitDone => {
                self.known = self.listed.drain().collect();
                self.is_complete = true;
            }
            Event::Apply(object) => match (self.read)(&object) {
                Some(read) => drop(self.known.insert(name(&object), read)),
                None => drop(self.known.remove(&name(&object))),
            },
            Event::Delete(object) => drop(self.known.remove(&name(&object))),
        }
    }
}
