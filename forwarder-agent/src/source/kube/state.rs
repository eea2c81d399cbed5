//! The last known state, kept on the node: a restarted agent goes on with it while the API server is away.
//!
//! It is a file of manifests, one document a line in JSON, which `forwarder explain` and `forwarder validate` read too.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::sleep;

use super::kinds;
use crate::manifests::{GATEWAY_GROUP, Kind, Manifests, ObjectRef};
use crate::panics;
use crate::source::loaded::Loaded;
use crate::source::manifest::Manifest;

/// The file in the folder.
const FILE: &str = "last-known.yaml";
/// How long after a change it is written: what changes often is written once.
const DELAY: Duration = Duration::from_secs(2);
/// How soon after the last time: with 100,000 endpoints it is tens of megabytes.
const INTERVAL: Duration = Duration::from_mins(1);
/// What stands between two documents.
const SEPARATOR: &str = "---";

/// A kept state that cannot be used, or that cannot be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum StateError {
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path}: line {line} is no object that the agent has written: {source}; remove the file")]
    Parse {
        path: PathBuf,
        line: usize,
        #[source]
        source: serde_json::Error,
    },
    #[error("reading the kept state panicked: {0}")]
    Panic(tokio::task::JoinError),
    #[error(
        "cannot write {path}: {source}; the next agent has nothing to start with while the API server is away"
    )]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Writes the state down some time after it has changed, until nobody sets it any more. A disk that hangs holds up
/// nothing else.
pub(super) async fn keep(directory: PathBuf, mut state: watch::Receiver<Option<Arc<Loaded>>>) {
    let mut has_failed = false;
    while state.changed().await.is_ok() {
        sleep(DELAY).await;
        let Some(loaded) = state.borrow_and_update().clone() else { continue };
        let to = directory.clone();
        match panics::survived(move || write(&to, &loaded.manifests)).await {
            Ok(Ok(())) => has_failed = false,
            Ok(Err(error)) => {
                if !std::mem::replace(&mut has_failed, true) {
                    tracing::warn!(%error, "the state is not kept; trying again");
                }
                state.mark_changed();
            }
            Err(error) => tracing::error!(%error, "writing the state panicked"),
        }
        sleep(INTERVAL).await;
    }
}

/// Reads the state that a former agent has kept; `None` if there is none.
pub(super) async fn read(directory: &Path) -> Result<Option<Loaded>, StateError> {
    let path = directory.join(FILE);
    panics::survived(move || read_file(&path)).await.unwrap_or_else(|error| Err(StateError::Panic(error)))
}

fn read_file(path: &Path) -> Result<Option<Loaded>, StateError> {
    let failed = |source| StateError::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut loaded = Loaded::default();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(failed)?;
        if line.is_empty() || line == SEPARATOR || line.starts_with('#') {
            continue;
        }
        let (id, manifest) = parse(&line).map_err(|source| StateError::Parse {
            path: path.to_owned(),
            line: index + 1,
            source,
        })?;
        loaded.manifests.put(&id, &manifest);
    }
    Ok(Some(loaded))
}

fn write(directory: &Path, manifests: &Manifests) -> Result<(), StateError> {
    let path = directory.join(FILE);
    let write = || {
        fs::create_dir_all(directory)?;
        let new = directory.join(format!("{FILE}.new"));
        let file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        let mut file = BufWriter::new(file);
        writeln!(file, "# The last known state of the forwarder: written by the agent, for its successor.")?;
        write_all(&mut file, manifests)?;
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        // What is there is whole at every moment.
        fs::rename(&new, &path)
    };
    write().map_err(|source| StateError::Write { path: path.clone(), source })
}

fn write_all(out: &mut impl Write, manifests: &Manifests) -> io::Result<()> {
    manifests.gateway_classes.values().try_for_each(|object| line(out, Kind::GatewayClass, object))?;
    manifests.gateways.values().try_for_each(|object| line(out, Kind::Gateway, object))?;
    manifests.listener_sets.values().try_for_each(|object| line(out, Kind::ListenerSet, object))?;
    manifests.tcp_routes.values().try_for_each(|object| line(out, Kind::TcpRoute, object))?;
    manifests.reference_grants.values().try_for_each(|object| line(out, Kind::ReferenceGrant, object))?;
    manifests.namespaces.values().try_for_each(|object| line(out, Kind::Namespace, object))?;
    manifests.services.values().try_for_each(|object| line(out, Kind::Service, object))?;
    let mut slices = manifests.endpoint_slices.values().flat_map(|slices| slices.values());
    slices.try_for_each(|object| line(out, Kind::EndpointSlice, object))
}

/// An object with what the types of [`crate::manifests`] leave out.
#[derive(Serialize)]
struct Document<'a, T> {
    #[serde(rename = "apiVersion")]
    api_version: &'a str,
    kind: Kind,
    #[serde(flatten)]
    object: &'a T,
}

#[derive(Deserialize)]
struct Head {
    kind: String,
    metadata: Name,
}

#[derive(Deserialize)]
struct Name {
    name: String,
    #[serde(default)]
    namespace: String,
}

fn line(out: &mut impl Write, kind: Kind, object: &impl Serialize) -> io::Result<()> {
    // The version in which every release so far that serves the kind can be read again.
    let api_version = kinds::resource(kind, "v1").api_version;
    writeln!(out, "{SEPARATOR}")?;
    serde_json::to_writer(&mut *out, &Document { api_version: &api_version, kind, object })?;
    writeln!(out)
}

fn parse(line: &str) -> serde_json::Result<(ObjectRef, Manifest)> {
    let Head { kind, metadata: Name { name, namespace } } = serde_json::from_str(line)?;
    let manifest = match kind.as_str() {
        "GatewayClass" => Manifest::GatewayClass(from(line)?),
        "Gateway" => Manifest::Gateway(from(line)?),
        "ListenerSet" => Manifest::ListenerSet(from(line)?),
        "TCPRoute" => Manifest::TcpRoute(from(line)?),
        "ReferenceGrant" => Manifest::ReferenceGrant(from(line)?),
        "Namespace" => Manifest::Namespace(from(line)?),
        "Service" => Manifest::Service(from(line)?),
        "EndpointSlice" => Manifest::EndpointSlice(from(line)?),
        other => {
            let message = format!("kind {other} is neither of the core nor of {GATEWAY_GROUP}");
            return Err(serde::de::Error::custom(message));
        }
    };
    Ok((ObjectRef { kind, namespace, name }, manifest))
}

fn from<T: serde::de::DeserializeOwned>(line: &str) -> serde_json::Result<Arc<T>> {
    serde_json::from_str(line).map(Arc::new)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::FileSource;

    const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/quickstart");

    #[test]
    fn what_is_written_is_read_again_and_by_the_other_commands_too() {
        let directory = tempfile::tempdir().unwrap();
        let manifests = FileSource::new(QUICKSTART).load().manifests;
        assert!(!manifests.tcp_routes.is_empty());
        write(directory.path(), &manifests).unwrap();
        let path = directory.path().join(FILE);
        assert_eq!(read_file(&path).unwrap().unwrap().manifests, manifests);
        let loaded = FileSource::new(&path).load();
        assert_eq!(loaded.problems.to_vec(), []);
        assert_eq!(loaded.manifests, manifests);
    }

    #[test]
    fn no_file_is_no_state_and_a_broken_one_is_an_error_with_its_line() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(FILE);
        assert!(read_file(&path).unwrap().is_none());
        fs::write(&path, "# comment\n---\n{\"kind\": \"Gateway\"}\n").unwrap();
        let error = read_file(&path).unwrap_err().to_string();
        assert!(error.contains("line 3"), "{error}");
    }
}
