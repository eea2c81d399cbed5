//! Where the API server is, and how this agent proves who it is.

use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::{Client, Config};

/// An API server ends each watch before that: silence for longer means a dead connection.
const SILENCE: Duration = Duration::from_secs(95);

/// Why no client could be made.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// A kubeconfig cannot be used.
    #[error("cannot use kubeconfig {path}: {source}")]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: kube::config::KubeconfigError,
    },
    /// Neither the environment nor a service account says where the API server is.
    #[error(
        "no Kubernetes API is configured: run in a Pod with a service account, set KUBECONFIG, or give --kubeconfig ({0})"
    )]
    Infer(#[from] kube::config::InferConfigError),
    /// The configuration is there, and unusable.
    #[error("cannot make a client of the Kubernetes API: {0}")]
    Client(#[from] kube::Error),
}

/// A client of the API server. Nothing is asked of it yet.
///
/// # Errors
/// It is not said where the API server is, or how to authenticate.
pub async fn connect(kubeconfig: Option<&Path>) -> Result<Client, ConnectError> {
    let mut config = match kubeconfig {
        None => Config::infer().await?,
        Some(path) => {
            let read = async {
                let kubeconfig = kube::config::Kubeconfig::read_from(path)?;
                Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await
            };
            read.await.map_err(|source| ConnectError::Kubeconfig { path: path.to_owned(), source })?
        }
    };
    config.connect_timeout = Some(Duration::from_secs(5));
    config.read_timeout = Some(SILENCE);
    Ok(Client::try_from(config)?)
}
