//! Who has written what, by the server's audit log.

use serde_json::Value;

/// Metadata of each request that writes, once it is answered.
pub(super) const POLICY: &str = "\
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: None
  verbs: [get, list, watch]
- level: Metadata
";

/// A request that writes, or tried to.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Write {
    /// Who, such as `system:serviceaccount:default:forwarder`.
    pub user: String,
    /// How: `create`, `update`, `patch`, `delete` or `deletecollection`.
    pub verb: String,
    /// What, such as `gateways` or `gateways/status`.
    pub resource: String,
    /// Where; empty for objects of the cluster.
    pub namespace: String,
    /// The name of the object; empty if the server makes it up.
    pub name: String,
    /// The status code of the answer.
    pub code: u16,
}

/// The writes in a log. A last line that is not complete yet is left out.
pub(super) fn parse(log: &str) -> Vec<Write> {
    log.lines().filter_map(|line| write(&serde_json::from_str(line).ok()?)).collect()
}

fn write(event: &Value) -> Option<Write> {
    let text = |pointer: &str| event.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned();
    let (resource, part) = (text("/objectRef/resource"), text("/objectRef/subresource"));
    Some(Write {
        user: text("/user/username"),
        verb: event.get("verb")?.as_str()?.to_owned(),
        resource: if part.is_empty() { resource } else { format!("{resource}/{part}") },
        namespace: text("/objectRef/namespace"),
        name: text("/objectRef/name"),
        code: event.pointer("/responseStatus/code")?.as_u64()?.try_into().ok()?,
    })
}
