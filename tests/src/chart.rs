//! The manifests by which a cluster runs the agent: the Helm chart, rendered, and those for kustomize.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::netns::skip;
use crate::process::stdout;

/// The release and the namespace that the manifests for kustomize are made with.
pub const RELEASE: &str = "forwarder";
/// See [`RELEASE`].
pub const NAMESPACE: &str = "forwarder-system";
/// A version of Kubernetes that the chart is for: a helm that was built without one believes in an old one.
const KUBE_VERSION: &str = "1.33.0";

/// What makes every template render.
pub const MONITORED: [&str; 4] = [
    "--set=admin.address=0.0.0.0",
    "--set=serviceMonitor.enabled=true",
    "--set=prometheusRule.enabled=true",
    "--set=grafanaDashboard.enabled=true",
];

/// The top of the workspace.
pub fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The folder of the chart.
pub fn chart() -> PathBuf {
    workspace().join("deploy/helm/forwarder")
}

/// A tool for clusters: from the folder that `FORWARDER_TEST_KUBE_ASSETS` names, or from the search path. If it is not
/// there, says that the test is skipped, or fails it where `FORWARDER_TEST_KUBE_ASSETS` says that it is.
pub fn tool(name: &str) -> Option<PathBuf> {
    let assets =
        env::var_os("FORWARDER_TEST_KUBE_ASSETS").filter(|value| !value.is_empty()).map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = assets.iter().cloned().chain(env::split_paths(&path));
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        assert!(assets.is_none(), "there is no {name} in {assets:?}");
        skip(&format!("{name} is not installed"));
    }
    found
}

/// Renders the chart with further arguments of `helm template`, such as `--set` and `NAME=VALUE`.
///
/// # Errors
/// The values are refused, or the templates fail with them.
pub fn render<A: AsRef<OsStr>>(helm: &Path, arguments: &[A]) -> Result<String> {
    let mut command = Command::new(helm);
    command.args(["template", RELEASE]).arg(chart()).args(["--namespace", NAMESPACE]);
    command.args(["--kube-version", KUBE_VERSION]).args(arguments);
    stdout(&mut command)
}

/// What the chart makes of its defaults, without what only Helm cares about: the manifests for kustomize.
///
/// # Errors
/// See [`render`].
pub fn plain(helm: &Path) -> Result<String> {
    let is_of_helm = |line: &str| {
        let line = line.trim_start();
        line.starts_with("helm.sh/chart:")
            || line.starts_with("app.kubernetes.io/managed-by:")
            || line.starts_with("# Source:")
    };
    let rendered = render::<&str>(helm, &[])?;
    let lines = rendered.trim_start_matches("---\n").lines().filter(|line| !is_of_helm(line));
    Ok(lines.flat_map(|line| [line, "\n"]).collect())
}

/// The objects of a YAML text.
///
/// # Errors
/// It is no YAML.
pub fn objects(text: &str) -> Result<Vec<Value>> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(text).context("manifests that are no YAML")?;
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

/// The only object of a kind among others.
#[track_caller]
pub fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<&Value> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "objects of kind {kind}");
    found[0]
}

/// The agent's container in the `DaemonSet` among the objects.
#[track_caller]
pub fn container(objects: &[Value]) -> &Value {
    let containers = &only(objects, "DaemonSet")["spec"]["template"]["spec"]["containers"];
    assert_eq!(containers[0]["name"], "forwarder");
    &containers[0]
}
