//! The last known state, kept on the node for the next agent: it goes on with it while the API server is away, and with the last
//! good version of each object whose file has since been spoilt.
//!
//! It is a file of manifests, one document a line in JSON, which `forwarder explain` and `forwarder validate` read too. Where the
//! objects came from files, comments say which.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{self, Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::loaded::Loaded;
use super::locations::{Lines, Place};
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{GATEWAY_GROUP, Kind, ObjectRef};
use forwarder_runtime::panics;

/// The version of the comments in a state of files.
const VERSION: u32 = 1;
/// What stands between two documents.
const SEPARATOR: &str = "---";
/// What the comment with the [`Head`] begins with.
const HEAD: &str = "# state ";
/// What the comment with an [`Origin`] begins with.
const ORIGIN: &str = "# from ";
/// Between two writes there is at least so many times what the last one took.
const REST: u32 = 20;

/// A kept state that cannot be used, or that cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file has a line that no agent wrote.
    #[error("{path}: line {line} is nothing that the agent has written: {source}; remove the file")]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The file was written by another version of the agent.
    #[error("{path} is a state of another version of the forwarder: it is replaced")]
    Version {
        /// The file.
        path: PathBuf,
    },
    /// The file belongs to other manifests.
    #[error(
        "{path} is the state of other manifests, {manifests}: it is replaced; give each agent a --state-dir of its own"
    )]
    OtherManifests {
        /// The file.
        path: PathBuf,
        /// The manifests that it is of.
        manifests: PathBuf,
    },
    /// What the file has in it made the reader panic.
    #[error("reading the kept state panicked: {0}")]
    Panic(tokio::task::JoinError),
    /// The file cannot be written.
    #[error("cannot write {path}: {source}; the next agent has nothing to start with {when}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
        /// When the next agent would miss it, in words.
        when: &'static str,
    },
}

/// Where a state is kept, and what of.
#[derive(Clone, Debug)]
pub enum StateFile {
    /// In this folder, of a Kubernetes API.
    OfCluster(PathBuf),
    /// In `folder`, of the file or folder `manifests`.
    OfFiles {
        /// Where it is kept.
        folder: PathBuf,
        /// What it is of.
        manifests: PathBuf,
    },
}

/// What a state of files is of.
#[derive(Deserialize, Serialize)]
struct Head {
    version: u32,
    /// The absolute path of the manifests.
    manifests: Name,
}

/// Where an object came from.
#[derive(Deserialize, Serialize)]
struct Origin {
    /// The file, below the path of the manifests; empty where it is that itself.
    file: Name,
    line: u32,
}

/// A path: text, unless it is none.
#[derive(Deserialize, Serialize)]
#[serde(untagged)]
enum Name {
    Text(PathBuf),
    Bytes(std::ffi::OsString),
}

impl Name {
    fn of(path: &Path) -> Self {
        match path.to_str() {
            Some(_) => Self::Text(path.to_owned()),
            None => Self::Bytes(path.as_os_str().to_owned()),
        }
    }

    fn path(self) -> PathBuf {
        match self {
            Self::Text(path) => path,
            Self::Bytes(bytes) => bytes.into(),
        }
    }
}

/// Writes the state down whenever its objects have changed, until nobody sets it any more. A disk that hangs holds up
/// nothing else.
///
/// With `spares_former`, a state without objects is not written in place of one that was refused: it may be this agent that is wrong.
pub async fn keep(file: StateFile, spares_former: bool, mut state: watch::Receiver<Option<Arc<Loaded>>>) {
    let (delay, interval) = file.pace();
    let mut has_failed = false;
    let mut written: Option<Arc<Loaded>> = None;
    while state.changed().await.is_ok() {
        sleep(delay).await;
        let Some(loaded) = state.borrow_and_update().clone() else { continue };
        let is_spared = spares_former && written.is_none() && loaded.manifests.each().next().is_none();
        if is_spared || written.as_ref().is_some_and(|written| written.has_same_objects(&loaded)) {
            continue;
        }
        let (to, objects, started) = (file.clone(), Arc::clone(&loaded), Instant::now());
        match panics::survived(move || to.write(&objects)).await {
            Ok(Ok(())) => {
                if std::mem::take(&mut has_failed) {
                    tracing::info!(state = %file.path().display(), "the kept state is written again");
                }
                written = Some(loaded);
            }
            Ok(Err(error)) => {
                if !std::mem::replace(&mut has_failed, true) {
                    tracing::warn!(%error, "cannot write the kept state: the next agent may start with an older one, or none; trying again");
                }
                state.mark_changed();
            }
            Err(error) => {
                tracing::error!(%error, "BUG: writing the kept state panicked: the next agent may start with an older one; please report it");
            }
        }
        sleep(interval.max(started.elapsed() * REST)).await;
    }
}

impl StateFile {
    /// How long after a change it is written, and how soon after the last time.
    ///
    /// An API server changes often, and is asked again soon; with 100,000 endpoints a state is tens of megabytes. A file is spoilt by
    /// the change that comes next.
    fn pace(&self) -> (Duration, Duration) {
        match self {
            Self::OfCluster(_) => (Duration::from_secs(2), Duration::from_mins(1)),
            Self::OfFiles { .. } => (Duration::ZERO, Duration::from_secs(1)),
        }
    }

    fn folder(&self) -> &Path {
        match self {
            Self::OfCluster(folder) | Self::OfFiles { folder, .. } => folder,
        }
    }

    /// The file.
    pub fn path(&self) -> PathBuf {
        self.folder().join(match self {
            Self::OfCluster(_) => "last-known.yaml",
            Self::OfFiles { .. } => "last-good.yaml",
        })
    }

    /// Reads the state that a former agent has kept; `None` if there is none.
    pub async fn read(&self) -> Result<Option<Loaded>, StateError> {
        let file = self.clone();
        panics::survived(move || file.read_now()).await.unwrap_or_else(|error| Err(StateError::Panic(error)))
    }

    fn read_now(&self) -> Result<Option<Loaded>, StateError> {
        let path = self.path();
        let failed = |source| StateError::Read { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let mut loaded = Loaded::default();
        let mut head = None;
        let mut place = None;
        for (index, line) in BufReader::new(file).lines().enumerate() {
            let line = line.map_err(failed)?;
            let invalid = |source| StateError::Parse { path: path.clone(), line: index + 1, source };
            if let Some(text) = line.strip_prefix(HEAD) {
                head = Some(serde_json::from_str::<Head>(text).map_err(invalid)?);
            } else if let Some(text) = line.strip_prefix(ORIGIN) {
                place = self.place(serde_json::from_str(text).map_err(invalid)?);
            } else if !(line.is_empty() || line == SEPARATOR || line.starts_with('#')) {
                let (id, manifest) = parse(&line).map_err(invalid)?;
                loaded.manifests.put(&id, &manifest);
                if let Some(place) = place.take() {
                    loaded.locations.insert(id, Arc::new(place));
                }
            }
        }
        self.refuse(head).map_or(Ok(Some(loaded)), Err)
    }

    /// Why a state with this head is not ours.
    fn refuse(&self, head: Option<Head>) -> Option<StateError> {
        let Self::OfFiles { manifests, .. } = self else { return None };
        match head {
            Some(Head { version: VERSION, manifests: of }) => {
                let of = of.path();
                (of != absolute(manifests))
                    .then(|| StateError::OtherManifests { path: self.path(), manifests: of })
            }
            Some(_) | None => Some(StateError::Version { path: self.path() }),
        }
    }

    fn place(&self, origin: Origin) -> Option<Place> {
        let Self::OfFiles { manifests, .. } = self else { return None };
        let inner = origin.file.path();
        // To join nothing would add a slash.
        let file = if inner.as_os_str().is_empty() { manifests.clone() } else { manifests.join(inner) };
        Some(Place { file: Arc::new(file), lines: Lines::at(origin.line) })
    }

    fn write(&self, loaded: &Loaded) -> Result<(), StateError> {
        let path = self.path();
        let write = || {
            fs::create_dir_all(self.folder())?;
            let new = path.with_extension("yaml.new");
            let file =
                fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            let mut file = BufWriter::new(file);
            self.write_all(&mut file, loaded)?;
            file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
            // What is there is whole at every moment.
            fs::rename(&new, &path)?;
            File::open(self.folder())?.sync_all()
        };
        let when = match self {
            Self::OfCluster(_) => "while the API server is away",
            Self::OfFiles { .. } => "where a manifest has an error",
        };
        write().map_err(|source| StateError::Write { path: path.clone(), source, when })
    }

    fn write_all(&self, out: &mut impl Write, loaded: &Loaded) -> io::Result<()> {
        writeln!(out, "# The last known state of the forwarder: written by the agent, for its successor.")?;
        if let Self::OfFiles { manifests, .. } = self {
            let manifests = Name::of(&absolute(manifests));
            comment(out, HEAD, &Head { version: VERSION, manifests })?;
        }
        for (id, manifest) in loaded.manifests.each() {
            writeln!(out, "{SEPARATOR}")?;
            if let Self::OfFiles { manifests, .. } = self
                && let Some(location) = loaded.locations.lookup(&id, "")
            {
                let file = location.file.strip_prefix(manifests).unwrap_or(&location.file);
                comment(out, ORIGIN, &Origin { file: Name::of(file), line: location.line })?;
            }
            document(out, &manifest)?;
        }
        Ok(())
    }
}

/// The path by which another agent names the same, wherever it is started.
fn absolute(path: &Path) -> PathBuf {
    path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn comment(out: &mut impl Write, what: &str, value: &impl Serialize) -> io::Result<()> {
    write!(out, "{what}")?;
    serde_json::to_writer(&mut *out, value)?;
    writeln!(out)
}

fn document(out: &mut impl Write, manifest: &Manifest) -> io::Result<()> {
    match manifest {
        Manifest::GatewayClass(object) => line(out, Kind::GatewayClass, object),
        Manifest::Gateway(object) => line(out, Kind::Gateway, object),
        Manifest::ListenerSet(object) => line(out, Kind::ListenerSet, object),
        Manifest::TcpRoute(object) => line(out, Kind::TcpRoute, object),
        Manifest::ReferenceGrant(object) => line(out, Kind::ReferenceGrant, object),
        Manifest::Namespace(object) => line(out, Kind::Namespace, object),
        Manifest::Service(object) => line(out, Kind::Service, object),
        Manifest::EndpointSlice(object) => line(out, Kind::EndpointSlice, object),
    }
}

/// An object with what the types of [`forwarder_gateway::manifests`] leave out.
#[derive(Serialize)]
struct Document<'a, T> {
    #[serde(rename = "apiVersion")]
    api_version: &'a str,
    kind: Kind,
    #[serde(flatten)]
    object: &'a T,
}

#[derive(Deserialize)]
struct DocumentHead {
    kind: String,
    metadata: MetadataHead,
}

#[derive(Deserialize)]
struct MetadataHead {
    name: String,
    #[serde(default)]
    namespace: String,
}

fn line(out: &mut impl Write, kind: Kind, object: &impl Serialize) -> io::Result<()> {
    let api_version = api_version(kind);
    serde_json::to_writer(&mut *out, &Document { api_version: &api_version, kind, object })?;
    writeln!(out)
}

/// The version in which every release so far that serves the kind can be read again.
fn api_version(kind: Kind) -> String {
    match kind {
        Kind::Namespace | Kind::Service => "v1".to_owned(),
        Kind::EndpointSlice => "discovery.k8s.io/v1".to_owned(),
        Kind::GatewayClass | Kind::Gateway | Kind::ListenerSet | Kind::TcpRoute | Kind::ReferenceGrant => {
            format!("{GATEWAY_GROUP}/v1")
        }
    }
}

fn parse(line: &str) -> serde_json::Result<(ObjectRef, Manifest)> {
    let DocumentHead { kind, metadata: MetadataHead { name, namespace } } = serde_json::from_str(line)?;
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
mod tests;
