//! Finding the programs and CRDs that `cargo xtask setup --for test` installs.

use std::path::{Path, PathBuf};
use std::{env, fs};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// What installs them.
const REMEDY: &str = "run `cargo xtask setup --for test`";

/// Programs that belong to Kubernetes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Program {
    /// The store of the API server.
    Etcd,
    /// The API server.
    KubeApiserver,
    /// The client.
    Kubectl,
    /// Helm, for charts.
    Helm,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Etcd => "etcd",
            Self::KubeApiserver => "kube-apiserver",
            Self::Kubectl => "kubectl",
            Self::Helm => "helm",
        }
    }
}

/// Whether a Kubernetes API can be started. If not, says that the test is skipped, or fails it where `CI` is set.
pub fn require_kubernetes() -> bool {
    let programs = [Program::Etcd, Program::KubeApiserver, Program::Kubectl, Program::Helm].map(program);
    let missing = programs.into_iter().chain([gateway_api()]).find_map(Result::err);
    let Some(error) = missing else {
        return true;
    };
    assert!(env::var_os("CI").is_none(), "{error:#}, and CI forbids skipping");
    println!("skipped: {error:#}");
    false
}

/// Where a program is: in the folder `KUBEBUILDER_ASSETS`, or in ours.
pub fn program(program: Program) -> Result<PathBuf> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let folders = given.into_iter().chain(folder());
    let name = program.name();
    folders
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no {name}: {REMEDY}"))
}

/// The folder of the CRDs of Gateway API, by release and channel.
pub(super) fn gateway_api() -> Result<PathBuf> {
    let found = folder().map(|folder| folder.join("gateway-api")).filter(|folder| folder.is_dir());
    found.with_context(|| format!("no CRDs of Gateway API: {REMEDY}"))
}

/// The folder that setup has told of, or that it would use.
fn folder() -> Option<PathBuf> {
    let told = env::var_os("FORWARDER_TEST_KUBE_ASSETS").filter(|value| !value.is_empty());
    told.map(PathBuf::from).or_else(|| Some(tools_directory()?.join(format!("kubernetes-{}", key()?))))
}

/// As `workspace::tools_directory` of xtask has it.
fn tools_directory() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("FORWARDER_TOOLS").or_else(|| {
        let cache = variable("XDG_CACHE_HOME");
        cache.or_else(|| Some(variable("HOME")?.join(".cache"))).map(|cache| cache.join("forwarder-tools"))
    })
}

/// As `apiserver::assets` of xtask has it.
fn key() -> Option<String> {
    let mut hash = Sha256::new();
    for file in ["apiserver/go.mod", "apiserver/go.sum", "helm/go.mod", "helm/go.sum"] {
        hash.update(fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).ok()?);
    }
    let start = *hash.finalize().first_chunk()?;
    Some(format!("{:016x}", u64::from_be_bytes(start)))
}
