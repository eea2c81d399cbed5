//! Where the manifests come from, and where their statuses go.

use std::sync::{Arc, OnceLock};

use tokio::sync::{Notify, watch};

use crate::resolver::Resolver;
use crate::settings::{Settings, SourceSettings};
use crate::state::ClusterHealth;
use forwarder_kube::publish::{self, Identity, Publication};
use forwarder_kube::watch::daemon_set::{self, OwnDaemonSet};
use forwarder_kube::watch::{self as kube_watch, ConnectError};
use forwarder_source::Loaded;

/// The source, opened.
pub(super) struct Input {
    /// What is read.
    pub(super) loaded: watch::Receiver<Arc<Loaded>>,
    /// What resolves it.
    pub(super) resolver: Resolver,
    /// Who is told what became of it; nobody where files are read.
    pub(super) outcome: Option<PublicationSender>,
    /// How the reading and the telling go.
    pub(super) health: Option<ClusterHealth>,
    /// The `DaemonSet` of the agent's Pod, once it is found.
    pub(super) daemon_set: Arc<OnceLock<OwnDaemonSet>>,
    /// Has everything read again; nobody listens where an API server tells every change.
    pub(super) again: Option<Arc<Notify>>,
}

/// Tells what became of the manifests.
pub(super) struct PublicationSender {
    pub(super) node: String,
    pub(super) sender: watch::Sender<Arc<Publication>>,
}

/// Opens the source.
///
/// # Errors
/// There is no configuration of the Kubernetes API, or none that can be used.
pub(super) async fn open(settings: &Settings) -> Result<Input, ConnectError> {
    let resolver = Resolver::of_agent(settings);
    match &settings.source {
        SourceSettings::Files { path, state_dir } => {
            let (updates, loaded) = watch::channel(Arc::default());
            let again = Arc::<Notify>::default();
            tokio::spawn(forwarder_source::watch(
                path.clone(),
                state_dir.clone(),
                updates,
                Arc::clone(&again),
            ));
            tracing::info!(manifests = %path.display(), "following files");
            Ok(Input {
                loaded,
                resolver,
                outcome: None,
                health: None,
                daemon_set: Arc::default(),
                again: Some(again),
            })
        }
        SourceSettings::Kube(kube) => {
            let client = kube_watch::connect(kube.kubeconfig.as_deref()).await?;
            let identity = Identity::new(kube, &settings.controller_name, &client);
            tracing::info!(
                node = kube.node_name,
                pod = kube.pod_name,
                namespaces = ?kube.watch_namespaces,
                "following the Kubernetes API"
            );
            let source = kube_watch::watch(client.clone(), kube, identity.nodes_lease());
            let daemon_set = match &kube.pod_name {
                Some(pod) => daemon_set::find(client.clone(), identity.namespace.clone(), pod.clone()),
                None => Arc::default(),
            };
            let (sender, outcome) = watch::channel(Arc::default());
            let publish = publish::start(client, identity, outcome, source.records);
            Ok(Input {
                loaded: source.loaded,
                resolver,
                outcome: Some(PublicationSender { node: kube.node_name.clone(), sender }),
                health: Some(ClusterHealth { source: source.health, publish }),
                daemon_set,
                again: None,
            })
        }
    }
}
