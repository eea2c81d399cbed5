//! The `DaemonSet` that the agent's Pod belongs to. An agent that is told to end asks whether it still stands: if not, no other agent
//! comes, for which anything would have to be left in the kernel.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use kube::core::Resource;
use kube::{Api, Client};
use tokio::time::{sleep, timeout};

use forwarder_runtime::error::one_line;

/// How long the API server may take to answer an agent that ends, and how long to wait before it is asked again at the start.
const PATIENCE: Duration = Duration::from_secs(1);
const RETRY: Duration = Duration::from_secs(10);

/// A `DaemonSet` that the agent has seen, so that it may see it.
pub struct OwnDaemonSet {
    api: Api<DaemonSet>,
    name: String,
    uid: String,
}

/// Finds the `DaemonSet` of a Pod in the background; nothing is found where the Pod belongs to none, or the agent may not see it.
pub fn find(client: Client, namespace: String, pod: String) -> Arc<OnceLock<OwnDaemonSet>> {
    let found = Arc::new(OnceLock::new());
    let finder = Arc::clone(&found);
    tokio::spawn(async move {
        loop {
            match look(&client, &namespace, &pod).await {
                Ok(None) => return,
                Ok(Some(daemon_set)) => {
                    tracing::info!(
                        daemon_set = daemon_set.name,
                        "found this agent's DaemonSet: once it is removed, its agents leave nothing in the kernel"
                    );
                    return drop(finder.set(daemon_set));
                }
                Err(kube::Error::Api(status)) if status.code == 403 => {
                    return tracing::info!(
                        error = one_line(&status),
                        "cannot read this agent's DaemonSet: if it is removed, offloaded connections stay in the kernel until `forwarder cleanup`"
                    );
                }
                Err(_) => sleep(RETRY).await,
            }
        }
    });
    found
}

async fn look(client: &Client, namespace: &str, pod: &str) -> Result<Option<OwnDaemonSet>, kube::Error> {
    let pod = Api::<Pod>::namespaced(client.clone(), namespace).get_metadata(pod).await?;
    let mut owners = pod.meta().owner_references.iter().flatten();
    let Some(owner) = owners.find(|owner| owner.kind == DaemonSet::kind(&())) else {
        return Ok(None);
    };
    let api = Api::<DaemonSet>::namespaced(client.clone(), namespace);
    let seen = api.get_metadata_opt(&owner.name).await?;
    Ok(seen.map(|_| OwnDaemonSet { api, name: owner.name.clone(), uid: owner.uid.clone() }))
}

impl OwnDaemonSet {
    /// Whether it has been removed, and nothing has come in its place. An API server that does not answer has removed nothing.
    pub async fn is_removed(&self) -> bool {
        match timeout(PATIENCE, self.api.get_metadata_opt(&self.name)).await {
            Ok(Ok(None)) => true,
            // It goes after its Pods. One of another id has been made anew, and so will be its Pods.
            Ok(Ok(Some(found))) => {
                let meta = found.meta();
                meta.deletion_timestamp.is_some() && meta.uid.as_ref() == Some(&self.uid)
            }
            // What was permitted to the installation went with it.
            Ok(Err(kube::Error::Api(status))) => matches!(status.code, 401 | 403),
            Ok(Err(_)) | Err(_) => false,
        }
    }
}
