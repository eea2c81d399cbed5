//! What an agent is told of the Kubernetes API, and of itself in it.

use std::path::PathBuf;

/// The settings of an agent that reads a Kubernetes API, complete.
#[derive(Clone, Debug)]
pub struct KubeSettings {
    /// The kubeconfig file; without one, that of the environment, or the service account of the Pod.
    pub kubeconfig: Option<PathBuf>,
    /// The namespaces whose objects are read; empty means all.
    pub watch_namespaces: Vec<String>,
    /// The folder in which the last known state is kept for the next agent.
    pub state_dir: Option<PathBuf>,
    /// The name of this node.
    pub node_name: String,
    /// The name of the agent's Pod, if it runs in one.
    pub pod_name: Option<String>,
    /// The namespace of the agent's Pod; `None` is that of the client's configuration.
    pub pod_namespace: Option<String>,
    /// The label selector of the agents' Pods.
    pub pod_selector: String,
}

/// The label by which agents' Pods are found by default.
pub const POD_SELECTOR: &str = "app.kubernetes.io/name=forwarder";

#[cfg(test)]
impl KubeSettings {
    /// Those of an agent on its own, on no host in particular.
    pub(crate) fn alone() -> Self {
        Self {
            kubeconfig: None,
            watch_namespaces: Vec::new(),
            state_dir: None,
            node_name: "host".to_owned(),
            pod_name: None,
            pod_namespace: None,
            pod_selector: POD_SELECTOR.to_owned(),
        }
    }
}
