//! Settings of an agent that reads a Kubernetes API.

use std::path::PathBuf;

use clap::Args;
use forwarder_kube::{KubeSettings, POD_SELECTOR};
use serde::Deserialize;

use super::SettingsError;

/// Where the Kubernetes API is, and who this agent is in it.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct KubeOptions {
    /// Read the objects from a Kubernetes API (that of the Pod's service account or of the kubeconfig) instead of files
    #[arg(
        id = "kube",
        long = "kube",
        env = "FORWARDER_KUBE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_name = "BOOL"
    )]
    pub enabled: Option<bool>,

    /// Kubeconfig file [default: KUBECONFIG, ~/.kube/config, or the Pod's service account]
    #[arg(long, env = "FORWARDER_KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,

    /// Read the objects of these namespaces only [default: all]
    #[arg(long, env = "FORWARDER_WATCH_NAMESPACES", value_name = "NAMESPACE", value_delimiter = ',')]
    pub watch_namespaces: Vec<String>,

    /// As [`super::Options::state_dir`], which was below this key before it was for files too.
    #[arg(skip)]
    pub state_dir: Option<PathBuf>,

    /// Name of this node in statuses [default: the host's name]
    #[arg(long, env = "FORWARDER_NODE_NAME", value_name = "NAME")]
    pub node_name: Option<String>,

    /// Name of the agent's Pod [default: none: the agent reports for itself only]
    #[arg(long, env = "FORWARDER_POD_NAME", value_name = "NAME")]
    pub pod_name: Option<String>,

    /// Namespace of the agent's Pod. There the agents elect one of them to write statuses, and tell it which ports they have bound
    /// [default: that of the kubeconfig or the service account]
    #[arg(long, env = "FORWARDER_POD_NAMESPACE", value_name = "NAMESPACE")]
    pub pod_namespace: Option<String>,

    /// Label selector of the Pods of this installation [default: app.kubernetes.io/name=forwarder]
    #[arg(long, env = "FORWARDER_POD_SELECTOR", value_name = "SELECTOR")]
    pub pod_selector: Option<String>,
}

impl KubeOptions {
    /// What `self` sets, and what `other` sets where `self` does not.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            enabled: self.enabled.or(other.enabled),
            kubeconfig: self.kubeconfig.or(other.kubeconfig),
            watch_namespaces: if self.watch_namespaces.is_empty() {
                other.watch_namespaces
            } else {
                self.watch_namespaces
            },
            state_dir: self.state_dir.or(other.state_dir),
            node_name: self.node_name.or(other.node_name),
            pod_name: self.pod_name.or(other.pod_name),
            pod_namespace: self.pod_namespace.or(other.pod_namespace),
            pod_selector: self.pod_selector.or(other.pod_selector),
        }
    }

    /// The settings, with defaults for what is not set; `None` where the Kubernetes API is not to be read.
    ///
    /// # Errors
    /// A namespace that can be none.
    pub fn validate(self, state_dir: Option<PathBuf>) -> Result<Option<KubeSettings>, SettingsError> {
        if !self.enabled.unwrap_or_default() {
            return Ok(None);
        }
        let set = |text: Option<String>| text.filter(|text| !text.is_empty());
        let watch_namespaces: Vec<String> =
            self.watch_namespaces.iter().map(|it| it.trim().to_owned()).filter(|it| !it.is_empty()).collect();
        let is_label = |text: &String| {
            text.bytes().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit() || it == b'-')
        };
        if let Some(namespace) = watch_namespaces.iter().find(|it| !is_label(it)) {
            return Err(SettingsError::Value {
                setting: "watch-namespaces",
                value: format!("`{namespace}`"),
                remedy: "name namespaces, with commas between them",
            });
        }
        let host = || rustix::system::uname().nodename().to_string_lossy().into_owned();
        Ok(Some(KubeSettings {
            kubeconfig: self.kubeconfig,
            watch_namespaces,
            state_dir,
            node_name: set(self.node_name).unwrap_or_else(host),
            pod_name: set(self.pod_name),
            pod_namespace: set(self.pod_namespace),
            pod_selector: set(self.pod_selector).unwrap_or_else(|| POD_SELECTOR.to_owned()),
        }))
    }
}
