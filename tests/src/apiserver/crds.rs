//! The CRDs of Gateway API.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::api::Api;
use super::apply::{Head, documents};
use super::assets;
use crate::wait::wait_for;

/// The releases that setup installs.
pub const RELEASES: [&str; 6] = ["v1.0.0", "v1.1.0", "v1.2.1", "v1.4.1", "v1.5.1", "v1.6.1"];
const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
/// How long the server may take to serve, or to stop serving, the kinds of a release.
const DEADLINE: Duration = Duration::from_secs(30);

/// Which kinds and fields a release brings.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Channel {
    /// Those that stay.
    Standard,
    /// All of them.
    Experimental,
}

impl Channel {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Standard, Self::Experimental];

    fn name(self) -> &'static str {
        match self {
            Self::Standard => "standard",
            Self::Experimental => "experimental",
        }
    }
}

/// The files of a release, such as `v1.4.1`.
pub fn crds(version: &str, channel: Channel) -> Result<Vec<PathBuf>> {
    let folder = assets::gateway_api()?.join(version).join(channel.name());
    let entries = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    // The policies that forbid older CRDs come last, and go first.
    files.sort();
    files.sort_by_key(|file| file.to_string_lossy().contains("_vap_"));
    Ok(files)
}

/// What the name of a file of a release ends in: `tcproutes`.
fn plural(file: &Path) -> &str {
    let stem = file.file_stem().and_then(OsStr::to_str).unwrap_or_default();
    stem.split_once('_').map_or(stem, |(_, plural)| plural)
}

impl Api {
    /// Installs the CRDs of a release and waits until all of them are served. Those of another release are replaced.
    pub fn install_crds(&self, version: &str, channel: Channel) -> Result<()> {
        self.install_crds_of(version, channel, |_| true)
    }

    /// The same for some kinds only, which `is_wanted` is asked for by their plurals.
    pub fn install_crds_of(
        &self,
        version: &str,
        channel: Channel,
        is_wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let mut objects = Vec::new();
        for file in crds(version, channel)?.iter().filter(|file| is_wanted(plural(file))) {
            let applied = self.apply(&fs::read_to_string(file)?);
            objects.extend(applied.with_context(|| file.display().to_string())?);
        }
        let is_crd =
            |object: &&Value| object.get("kind").and_then(Value::as_str) == Some("CustomResourceDefinition");
        objects.iter().filter(is_crd).try_for_each(|crd| self.wait_until_served(crd))
    }

    /// Deletes what a release brought, with all objects of its kinds, and waits until it is gone.
    pub fn delete_crds(&self, version: &str, channel: Channel) -> Result<()> {
        let mut paths = Vec::new();
        for file in crds(version, channel)?.into_iter().rev() {
            for document in documents(&fs::read_to_string(&file)?) {
                let path = self.path_of(&Head::parse(document)?)?;
                self.delete(&path)?;
                paths.push(path);
            }
        }
        paths.iter().try_for_each(|path| self.wait_until_gone(path, DEADLINE))
    }

    /// Deletes one CRD, such as `tcproutes.gateway.networking.k8s.io`, with all objects of its kind.
    pub fn delete_crd(&self, name: &str) -> Result<()> {
        let path = format!("{CRDS}/{name}");
        self.delete(&path)?;
        self.wait_until_gone(&path, DEADLINE)
    }

    /// Has the CRDs of Gateway API say that they are of another release, one after another.
    pub fn set_release(&self, release: &str) -> Result<()> {
        let changes =
            json!({"metadata": {"annotations": {"gateway.networking.k8s.io/bundle-version": release}}});
        for crd in self.list(CRDS)? {
            let name = crd.pointer("/metadata/name").and_then(Value::as_str).unwrap_or_default();
            if name.ends_with(".gateway.networking.k8s.io") {
                self.patch(&format!("{CRDS}/{name}"), &changes)?;
            }
        }
        Ok(())
    }

    /// Waits until every version that a CRD says to serve can be asked for, which is when it is established.
    fn wait_until_served(&self, crd: &Value) -> Result<()> {
        let text = |pointer: &str| crd.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let (group, plural) = (text("/spec/group"), text("/spec/names/plural"));
        let versions = crd.pointer("/spec/versions").and_then(Value::as_array).into_iter().flatten();
        let served = versions.filter(|version| version.get("served").and_then(Value::as_bool) == Some(true));
        for version in served.filter_map(|version| version.get("name")?.as_str()) {
            let path = format!("/apis/{group}/{version}/{plural}?limit=1");
            wait_for(DEADLINE, || self.get(&path).ok())
                .with_context(|| format!("{path} is not served within {DEADLINE:?}"))?;
        }
        Ok(())
    }
}
