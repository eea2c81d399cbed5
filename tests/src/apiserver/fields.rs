//! The fields that objects may have: those of every release of Gateway API, in either channel, and of the API server.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::api::Api;
use super::crds::{Channel, RELEASES, crds};

/// The kinds of Gateway API that the forwarder reads.
const GATEWAY_KINDS: [&str; 5] = ["Gateway", "GatewayClass", "ListenerSet", "ReferenceGrant", "TCPRoute"];
/// The kinds of the API server that it reads, with the document and the name of their schema.
const CORE_KINDS: [(&str, &str, &str); 3] = [
    ("EndpointSlice", "/openapi/v3/apis/discovery.k8s.io/v1", "io.k8s.api.discovery.v1.EndpointSlice"),
    ("Namespace", "/openapi/v3/api/v1", "io.k8s.api.core.v1.Namespace"),
    ("Service", "/openapi/v3/api/v1", "io.k8s.api.core.v1.Service"),
];
const METADATA: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
/// What only versions have that no API server serves any more: discovery.k8s.io/v1beta1, until Kubernetes 1.25.
const FORMER: [&str; 1] = ["EndpointSlice endpoints[].topology{}"];

/// The lines of the agent's table of fields: a kind, and a path in it.
///
/// `[]` stands for the items of a list, `{}` for the values of a map with keys of anybody's choice, and `*` for whatever may follow. A
/// kind without a path is one that is not read.
pub fn table(api: &Api) -> Result<BTreeSet<String>> {
    let mut table: BTreeSet<String> = FORMER.iter().map(|&line| line.to_owned()).collect();
    let core = api.get("/openapi/v3/api/v1")?;
    let metadata = Schema { value: schema(&core, METADATA)?, document: &core };
    let object = |kind: &str, schema: Schema<'_>, table: &mut BTreeSet<String>| {
        for (name, value) in schema.value["properties"].as_object().into_iter().flatten() {
            match name.as_str() {
                // Nobody writes it by hand.
                "status" => drop(table.insert(format!("{kind} status*"))),
                // The same for all kinds; a CRD does not repeat it.
                "metadata" => metadata.paths(&format!("{kind} metadata"), table),
                _ => schema.of(value).paths(&format!("{kind} {name}"), table),
            }
        }
    };
    for (kind, document, name) in CORE_KINDS {
        let document = api.get(document)?;
        object(kind, Schema { value: schema(&document, name)?, document: &document }, &mut table);
    }
    for (release, channel) in
        RELEASES.iter().flat_map(|release| Channel::ALL.map(|channel| (release, channel)))
    {
        for file in crds(release, channel)? {
            let text = fs::read_to_string(&file)?;
            let documents: Vec<Value> =
                serde_saphyr::from_multiple(&text).with_context(|| file.display().to_string())?;
            for crd in documents.iter().filter(|one| one["kind"] == "CustomResourceDefinition") {
                let kind = crd["spec"]["names"]["kind"].as_str().context("a CRD without a kind")?;
                if !GATEWAY_KINDS.contains(&kind) {
                    table.insert(kind.to_owned());
                    continue;
                }
                for version in crd["spec"]["versions"].as_array().into_iter().flatten() {
                    let value = &version["schema"]["openAPIV3Schema"];
                    object(kind, Schema { value, document: &Value::Null }, &mut table);
                }
            }
        }
    }
    Ok(table)
}

fn schema<'d>(document: &'d Value, name: &str) -> Result<&'d Value> {
    document["components"]["schemas"].get(name).with_context(|| format!("no schema {name}"))
}

/// A schema, and the document that its references are to.
#[derive(Clone, Copy)]
struct Schema<'d> {
    value: &'d Value,
    document: &'d Value,
}

impl<'d> Schema<'d> {
    fn of(self, value: &'d Value) -> Self {
        Self { value, document: self.document }
    }

    /// Adds the paths from `path` on.
    fn paths(self, path: &str, table: &mut BTreeSet<String>) {
        let reference =
            [&self.value["$ref"], &self.value["allOf"][0]["$ref"]].into_iter().find_map(Value::as_str);
        if let Some(pointer) = reference.and_then(|reference| reference.strip_prefix('#')) {
            return match self.document.pointer(pointer) {
                Some(value) => self.of(value).paths(path, table),
                None => drop(table.insert(format!("{path}*"))),
            };
        }
        let is_free = self.value["x-kubernetes-preserve-unknown-fields"] == true;
        match (self.value["type"].as_str(), self.value["properties"].as_object()) {
            (_, Some(properties)) => {
                properties
                    .iter()
                    .for_each(|(name, value)| self.of(value).paths(&format!("{path}.{name}"), table));
                if is_free {
                    table.insert(format!("{path}*"));
                }
            }
            (Some("array"), None) => self.of(&self.value["items"]).paths(&format!("{path}[]"), table),
            (Some("object"), None) if self.value["additionalProperties"].is_object() => {
                self.of(&self.value["additionalProperties"]).paths(&format!("{path}{{}}"), table);
            }
            (Some("object") | None, None)
                if self.value["x-kubernetes-int-or-string"] != true && self.value["oneOf"].is_null() =>
            {
                table.insert(format!("{path}*"));
            }
            _ => drop(table.insert(path.to_owned())),
        }
    }
}
