//! Applying manifests.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;
use serde_json::Value;

use super::api::Api;
use crate::wait::wait_for;

/// Who the fields that are applied belong to.
const MANAGER: &str = "forwarder-tests";
/// How long it may take until a kind whose CRD has just been created can be found.
const DISCOVERY: Duration = Duration::from_secs(10);

/// What says which object a document is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Head {
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) metadata: Metadata,
}

#[derive(Debug, Deserialize)]
pub(super) struct Metadata {
    pub(super) name: String,
    namespace: Option<String>,
}

impl Api {
    /// Applies every object of `manifests` (YAML documents, or JSON) on the server's side, in their order. Returns them
    /// as stored. Objects without a namespace go to `default`.
    pub fn apply(&self, manifests: &str) -> Result<Vec<Value>> {
        documents(manifests).into_iter().map(|document| self.apply_one(document)).collect()
    }

    fn apply_one(&self, document: &str) -> Result<Value> {
        let path = self.path_of(&Head::parse(document)?)?;
        let path = format!("{path}?fieldManager={MANAGER}&force=true");
        self.request("PATCH", &path, Some(("application/apply-patch+yaml", document)))
    }

    /// Deletes every object of `manifests`, in their order; those that are gone already are left alone.
    pub fn delete_all(&self, manifests: &str) -> Result<()> {
        for document in documents(manifests) {
            let path = self.path_of(&Head::parse(document)?)?;
            if self.find(&path)?.is_some() {
                self.delete(&path)?;
            }
        }
        Ok(())
    }

    /// Where the server has the object.
    pub(super) fn path_of(&self, head: &Head) -> Result<String> {
        let group = match head.api_version.as_str() {
            "v1" => "/api/v1".to_owned(),
            other => format!("/apis/{other}"),
        };
        let resource = wait_for(DISCOVERY, || resource(&self.get(&group).ok()?, &head.kind));
        let resource =
            resource.with_context(|| format!("the server knows no {} {}", head.api_version, head.kind))?;
        let name = &head.metadata.name;
        Ok(if resource.namespaced {
            let namespace = head.metadata.namespace.as_deref().unwrap_or("default");
            format!("{group}/namespaces/{namespace}/{}/{name}", resource.name)
        } else {
            format!("{group}/{}/{name}", resource.name)
        })
    }
}

impl Head {
    pub(super) fn parse(document: &str) -> Result<Self> {
        // The specification of a CRD is long, and mostly comes last.
        let start = document.split("\nspec:").next().unwrap_or_default();
        serde_saphyr::from_str(start)
            .or_else(|_| serde_saphyr::from_str(document))
            .context("a manifest without apiVersion, kind or metadata.name")
    }
}

struct Resource {
    name: String,
    namespaced: bool,
}

fn resource(discovery: &Value, kind: &str) -> Option<Resource> {
    discovery.get("resources")?.as_array()?.iter().find_map(|resource| {
        let name = resource.get("name")?.as_str()?;
        let is_it = resource.get("kind")?.as_str()? == kind && !name.contains('/');
        let namespaced = resource.get("namespaced")?.as_bool()?;
        is_it.then(|| Resource { name: name.to_owned(), namespaced })
    })
}

/// The documents of a YAML stream that say something.
pub(super) fn documents(manifests: &str) -> Vec<&str> {
    let says_something = |document: &&str| {
        document
            .lines()
            .any(|line| !line.trim().is_empty() && !line.starts_with('#') && !line.starts_with("---"))
    };
    manifests.split("\n---").filter(says_something).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_told_apart() {
        let stream = "# licence\n---\nkind: A\n---\n# nothing\n--- \nkind: B\ntext: a---b\n";
        assert_eq!(documents(stream), ["\nkind: A", " \nkind: B\ntext: a---b\n"]);
        assert_eq!(documents("{\"kind\": \"A\"}"), ["{\"kind\": \"A\"}"]);
    }

    #[test]
    fn the_head_says_which_object_it_is() {
        let head =
            Head::parse("apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {x: [1]}\n").unwrap();
        assert_eq!((head.api_version.as_str(), head.kind.as_str()), ("v1", "Service"));
        let head = Head::parse("apiVersion: v1\nspec: {}\nkind: Pod\nmetadata: {name: b}\n").unwrap();
        assert_eq!(head.metadata.name, "b");
        assert!(Head::parse("kind: Service\n").is_err());
    }
}
