//! Tells a Kubernetes API what became of its objects.
//!
//! Every agent reports in a Lease of its own what it has bound (`reports`). One of them, which holds another Lease
//! (`leader`), puts these reports together with what the manifests resolve to, and writes the statuses
//! (`writer`): what has to be written is computed by `patch`. It also tells all agents at which addresses the others
//! listen (`node_addresses`). All agents resolve the same manifests to the same
//! statuses, so that it does not matter which one it is, nor whether for a moment it is two.

mod events;
mod leader;
mod node_addresses;
mod patch;
mod reports;
mod writer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use kube::Client;
use tokio::sync::watch;

use crate::KubeSettings;
use crate::watch::{NodesLease, ObservedObjects};
use forwarder_gateway::manifests::Kind;
use forwarder_gateway::status::Statuses;
use forwarder_gateway::status::nodes::NodeReport;
use forwarder_source::Loaded;

/// The field manager of everything that is written.
const FIELD_MANAGER: &str = "forwarder";
/// How long after the last change a Lease is written again: somebody may have deleted it. To write the same is no change.
const AGAIN: Duration = Duration::from_mins(5);
/// How long to wait after a Lease could not be written.
const RETRY: Duration = Duration::from_secs(2);

/// What an agent makes of the manifests.
#[derive(Debug, Default)]
pub struct Publication {
    /// The manifests.
    pub loaded: Arc<Loaded>,
    /// Their statuses, on the assumption that every listener can be bound.
    pub statuses: Arc<Statuses>,
    /// What this node has bound.
    pub report: NodeReport,
}

/// Who publishes.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The controller, as in every GatewayClass of ours.
    pub(crate) controller: String,
    /// The namespace of the Leases and of the agents' Pods.
    pub namespace: String,
    /// The node.
    pub(crate) node: String,
    /// The Pod, if the agent runs in one.
    pub(crate) pod: Option<String>,
    /// The label selector of the agents' Pods.
    pub(crate) pod_selector: String,
}

impl Identity {
    /// That of the agent with these settings; what they do not say, the client's configuration does.
    pub fn new(settings: &KubeSettings, controller: &str, client: &Client) -> Self {
        Self {
            controller: controller.to_owned(),
            namespace: settings
                .pod_namespace
                .clone()
                .unwrap_or_else(|| client.default_namespace().to_owned()),
            node: settings.node_name.clone(),
            pod: settings.pod_name.clone(),
            pod_selector: settings.pod_selector.clone(),
        }
    }

    /// The controller's name as it can stand in names of objects and in labels.
    fn installation(&self) -> String {
        let is_fit = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit();
        let fit = |letter: char| {
            if is_fit(letter.to_ascii_lowercase()) { letter.to_ascii_lowercase() } else { '-' }
        };
        let name: String = self.controller.chars().map(fit).take(50).collect();
        name.trim_matches('-').to_owned()
    }

    /// The Lease with the addresses of the nodes; outside a Pod there is no other node.
    pub fn nodes_lease(&self) -> Option<NodesLease> {
        self.pod.as_ref()?;
        let name = format!("forwarder-{}-nodes", self.installation());
        Some(NodesLease { namespace: self.namespace.clone(), name })
    }

    /// The name by which the agent holds the Lease of who writes.
    fn holder(&self) -> String {
        self.pod.clone().unwrap_or_else(|| format!("{}-{}", self.node, std::process::id()))
    }
}

/// How the publishing goes, for the metrics.
#[derive(Debug, Default)]
pub struct PublishHealth {
    is_leader: AtomicBool,
    writes: BTreeMap<(Kind, WriteResult), AtomicU64>,
}

/// What became of an attempt to write.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum WriteResult {
    /// Written.
    Written,
    /// Somebody was faster: it is looked at again.
    Conflict,
    /// The API server refused it, or did not answer.
    Failed,
}

impl WriteResult {
    /// The result as a label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Written => "written",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
        }
    }
}

impl PublishHealth {
    fn new() -> Self {
        let results = [WriteResult::Written, WriteResult::Conflict, WriteResult::Failed];
        let all = patch::KINDS.into_iter().flat_map(|kind| results.map(|result| (kind, result)));
        Self { writes: all.map(|key| (key, AtomicU64::new(0))).collect(), ..Self::default() }
    }

    /// Whether this agent writes the statuses.
    pub fn is_leader(&self) -> bool {
        self.is_leader.load(Ordering::Relaxed)
    }

    /// The attempts to write so far.
    pub fn writes(&self) -> impl Iterator<Item = (Kind, WriteResult, u64)> {
        self.writes.iter().map(|((kind, result), count)| (*kind, *result, count.load(Ordering::Relaxed)))
    }

    fn count(&self, kind: Kind, result: WriteResult) {
        if let Some(count) = self.writes.get(&(kind, result)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Publishes `outcome` whenever it changes, until nobody sets it any more.
pub fn start(
    client: Client,
    identity: Identity,
    outcome: watch::Receiver<Arc<Publication>>,
    records: watch::Receiver<ObservedObjects>,
) -> Arc<PublishHealth> {
    let health = Arc::new(PublishHealth::new());
    let identity = Arc::new(identity);
    tokio::spawn(reports::write_own(client.clone(), Arc::clone(&identity), outcome.clone()));
    let is_leader = leader::elect(client.clone(), Arc::clone(&identity));
    let writer = writer::Writer::new(client, identity, Arc::clone(&health));
    tokio::spawn(writer.run(is_leader, outcome, records));
    health
}
