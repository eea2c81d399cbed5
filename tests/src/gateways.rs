//! Objects of the Gateway API in a [`Cluster`], what their statuses say, and who wrote them.

use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::apiserver::{ApiError, Write};
use crate::chart::NAMESPACE;
use crate::cluster::{Cluster, DEADLINE, GATEWAY_API, has_condition};
use crate::wait::wait_for;

/// How long nothing must have been told for a cluster to have settled.
const SETTLED: Duration = Duration::from_secs(3);

/// Where a GatewayClass is.
pub fn class(name: &str) -> String {
    format!("v1/gatewayclasses/{name}")
}

/// Where a Gateway is.
pub fn gateway(namespace: &str, name: &str) -> String {
    format!("v1/namespaces/{namespace}/gateways/{name}")
}

/// Where a ListenerSet is.
pub fn listener_set(namespace: &str, name: &str) -> String {
    format!("v1/namespaces/{namespace}/listenersets/{name}")
}

/// Where a TCPRoute is.
pub fn route(namespace: &str, name: &str) -> String {
    format!("v1/namespaces/{namespace}/tcproutes/{name}")
}

/// TCP listeners, as a spec has them.
pub fn listeners(listeners: &[(&str, u16)]) -> Value {
    let listener = |(name, port): &(&str, u16)| json!({ "name": name, "port": port, "protocol": "TCP" });
    listeners.iter().map(listener).collect()
}

/// The spec of a Gateway of class `forwarder`.
pub fn gateway_spec(of: &[(&str, u16)]) -> Value {
    json!({ "gatewayClassName": "forwarder", "listeners": listeners(of) })
}

/// The spec of a TCPRoute to the only port of a Service.
pub fn route_spec(parents: &Value, service: &str) -> Value {
    json!({ "parentRefs": parents, "rules": [{ "backendRefs": [{ "name": service, "port": 3306 }] }] })
}

/// Whether the Programmed condition of an object begins like this: `True/Programmed 3/3 nodes`.
pub fn is_programmed(object: &Value, start: &str) -> bool {
    has_condition(&object["status"]["conditions"], "Programmed", start)
}

/// A listener's status, by its name.
pub fn listener<'a>(object: &'a Value, name: &str) -> &'a Value {
    let listeners = object["status"]["listeners"].as_array();
    listeners.and_then(|all| all.iter().find(|it| it["name"] == name)).unwrap_or(&Value::Null)
}

/// The entry of a controller in the status of a TCPRoute.
pub fn parent<'a>(route: &'a Value, controller: &str) -> &'a Value {
    let parents = route["status"]["parents"].as_array();
    parents.and_then(|all| all.iter().find(|it| it["controllerName"] == controller)).unwrap_or(&Value::Null)
}

/// Whether every condition of an object's own status is about its present generation, and there are some.
pub fn is_current(object: &Value) -> bool {
    let generation = &object["metadata"]["generation"];
    let conditions = object["status"]["conditions"].as_array().filter(|all| !all.is_empty());
    conditions.is_some_and(|all| all.iter().all(|it| it["observedGeneration"] == *generation))
}

impl Cluster {
    /// The class `forwarder`, and a namespace.
    pub fn create_basics(&self, namespace: &str) -> Result<()> {
        self.api.create_namespace(namespace)?;
        self.apply_examples(&["gatewayclass.yaml"])
    }

    /// Makes an object of the Gateway API.
    pub fn create_object(&self, path: &str, spec: &Value) -> Result<Value> {
        let (collection, name) = path.rsplit_once('/').context("a path without a name")?;
        let kind = match collection.rsplit('/').next() {
            Some("gatewayclasses") => "GatewayClass",
            Some("gateways") => "Gateway",
            Some("listenersets") => "ListenerSet",
            Some("tcproutes") => "TCPRoute",
            _ => bail!("{path} is of no kind that is known here"),
        };
        let object = json!({
            "apiVersion": "gateway.networking.k8s.io/v1",
            "kind": kind,
            "metadata": { "name": name },
            "spec": spec,
        });
        self.api.create(&format!("{GATEWAY_API}/{collection}"), &object)
    }

    /// Reads an object of the Gateway API.
    pub fn object(&self, path: &str) -> Result<Value> {
        self.api.get(&format!("{GATEWAY_API}/{path}"))
    }

    /// Merges changes into the object, such as `{"spec": {...}}`.
    pub fn change(&self, path: &str, changes: &Value) -> Result<Value> {
        self.api.patch(&format!("{GATEWAY_API}/{path}"), changes)
    }

    /// Merges changes into the object's status.
    pub fn change_status(&self, path: &str, status: &Value) -> Result<Value> {
        self.api.patch(&format!("{GATEWAY_API}/{path}/status"), &json!({ "status": status }))
    }

    /// Edits the object's status as a controller would that loses nothing of what others write meanwhile.
    pub fn edit_status(&self, path: &str, edit: impl Fn(&mut Value)) -> Result<Value> {
        loop {
            let mut object = self.object(path)?;
            edit(object.get_mut("status").context("an object without status")?);
            match self.api.replace(&format!("{GATEWAY_API}/{path}/status"), &object) {
                Err(error) if ApiError::code_of(&error) == Some(409) => {}
                result => return result,
            }
        }
    }

    /// Deletes an object of the Gateway API.
    pub fn delete_object(&self, path: &str) -> Result<()> {
        self.api.delete(&format!("{GATEWAY_API}/{path}"))
    }

    /// What agents have written so far, or tried to.
    pub fn agent_writes(&self) -> Result<Vec<Write>> {
        let user = format!("system:serviceaccount:{NAMESPACE}:forwarder");
        let mut writes = self.server.audit_writes()?;
        writes.retain(|write| write.user == user);
        Ok(writes)
    }

    /// The same without Leases: what is told to others than agents.
    pub fn published(&self) -> Result<Vec<Write>> {
        let mut writes = self.agent_writes()?;
        writes.retain(|write| write.resource != "leases");
        Ok(writes)
    }

    /// Waits until nothing has been told for a while.
    pub fn wait_settled(&self) -> Result<()> {
        let settled = wait_for(DEADLINE, || {
            let before = self.published().ok()?;
            thread::sleep(SETTLED);
            (self.published().ok()? == before).then_some(())
        });
        settled.with_context(|| format!("agents still write after {DEADLINE:?}: {:#?}", self.published()))
    }
}
