//! Objects that controllers and nodes would make.

use std::net::IpAddr;

use anyhow::Result;
use serde_json::{Value, json};

use super::api::Api;

/// A pod as its node reports it.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Vec<(String, String)>,
    /// The name of its node.
    pub node: String,
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    pub phase: String,
    /// Whether it is ready.
    pub ready: bool,
    /// The address of the node.
    pub host_ip: Option<IpAddr>,
    /// The address of the pod.
    pub pod_ip: Option<IpAddr>,
    /// The `DaemonSet` that it belongs to.
    pub daemon_set: Option<Value>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Whether it is ready.
    pub ready: bool,
    /// The node that it runs on.
    pub node: Option<String>,
}

impl Endpoint {
    /// One that is ready.
    pub fn ready(address: IpAddr) -> Self {
        Self { address, ready: true, node: None }
    }
}

impl Api {
    /// Makes a namespace; `default` is there already.
    pub fn create_namespace(&self, name: &str) -> Result<Value> {
        self.create("/api/v1/namespaces", &json!({"metadata": {"name": name}}))
    }

    /// Makes a service account. Without controllers, not even `default` is there.
    pub fn create_service_account(&self, namespace: &str, name: &str) -> Result<Value> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts");
        self.create(&path, &json!({"metadata": {"name": name}}))
    }

    /// A token of a service account, good for an hour.
    pub fn service_account_token(&self, namespace: &str, name: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token");
        let request = self.create(&path, &json!({"spec": {"expirationSeconds": 3600}}))?;
        let token = request.pointer("/status/token").and_then(Value::as_str);
        Ok(token.unwrap_or_default().to_owned())
    }

    /// Lets a user, such as `system:serviceaccount:NAMESPACE:NAME`, do what `rules` of a `ClusterRole` say, everywhere.
    pub fn grant(&self, user: &str, rules: &Value) -> Result<()> {
        const RBAC: &str = "rbac.authorization.k8s.io";
        let metadata = json!({"name": user});
        let path = |resource: &str| format!("/apis/{RBAC}/v1/{resource}");
        self.create(&path("clusterroles"), &json!({"metadata": metadata, "rules": rules}))?;
        let binding = json!({
            "metadata": metadata,
            "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": user},
            "subjects": [{"apiGroup": RBAC, "kind": "User", "name": user}],
        });
        self.create(&path("clusterrolebindings"), &binding).map(drop)
    }

    /// Makes a pod and reports its status.
    pub fn create_pod(&self, namespace: &str, pod: &Pod) -> Result<Value> {
        let labels: Value = pod.labels.iter().cloned().collect();
        let path = format!("/api/v1/namespaces/{namespace}/pods");
        let spec = json!({"nodeName": pod.node, "containers": [{"name": "main", "image": "none"}]});
        let owner = pod.daemon_set.as_ref().map(|owner| {
            let metadata = &owner["metadata"];
            json!([{"apiVersion": "apps/v1", "kind": "DaemonSet", "name": metadata["name"], "uid": metadata["uid"]}])
        });
        let metadata = json!({"name": pod.name, "labels": labels, "ownerReferences": owner});
        self.create(&path, &json!({"metadata": metadata, "spec": spec}))?;
        self.report_pod(namespace, pod)
    }

    /// Reports the status of a pod anew.
    pub fn report_pod(&self, namespace: &str, pod: &Pod) -> Result<Value> {
        let ips = |address: Option<IpAddr>| match address {
            Some(address) => json!([{"ip": address}]),
            None => Value::Null,
        };
        let ready = if pod.ready { "True" } else { "False" };
        let status = json!({
            "phase": pod.phase,
            "conditions": [{"type": "Ready", "status": ready}],
            "hostIP": pod.host_ip,
            "hostIPs": ips(pod.host_ip),
            "podIP": pod.pod_ip,
            "podIPs": ips(pod.pod_ip),
        });
        let path = format!("/api/v1/namespaces/{namespace}/pods/{}/status", pod.name);
        self.patch(&path, &json!({"status": status}))
    }

    /// Makes a Service with ports: name, port, and the name or number of the target's.
    pub fn create_service(&self, namespace: &str, name: &str, ports: &[(&str, u16, Value)]) -> Result<Value> {
        let path = format!("/api/v1/namespaces/{namespace}/services");
        self.create(&path, &service(name, ports))
    }

    /// Makes a slice of the endpoints of a service, all of one address family, with ports by the service's names.
    pub fn create_endpoint_slice(
        &self,
        namespace: &str,
        name: &str,
        service: &str,
        ports: &[(&str, u16)],
        endpoints: &[Endpoint],
    ) -> Result<Value> {
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices");
        self.create(&path, &endpoint_slice(name, service, ports, endpoints))
    }

    /// Replaces a slice.
    pub fn replace_endpoint_slice(
        &self,
        namespace: &str,
        name: &str,
        service: &str,
        ports: &[(&str, u16)],
        endpoints: &[Endpoint],
    ) -> Result<Value> {
        let path = format!("/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices/{name}");
        self.replace(&path, &endpoint_slice(name, service, ports, endpoints))
    }
}

/// A Service with ports: name, port, and the name or number of the target's.
pub fn service(name: &str, ports: &[(&str, u16, Value)]) -> Value {
    let ports: Vec<Value> = ports
        .iter()
        .map(|(name, port, target)| json!({"name": name, "port": port, "targetPort": target}))
        .collect();
    json!({"metadata": {"name": name}, "spec": {"ports": ports}})
}

/// A slice of the endpoints of a service, all of one address family, with ports by the service's names.
pub fn endpoint_slice(name: &str, service: &str, ports: &[(&str, u16)], endpoints: &[Endpoint]) -> Value {
    let is_v6 = endpoints.first().is_some_and(|endpoint| endpoint.address.is_ipv6());
    let ports: Vec<Value> = ports.iter().map(|(name, port)| json!({"name": name, "port": port})).collect();
    let endpoints: Vec<Value> = endpoints
        .iter()
        .map(|endpoint| {
            json!({
                "addresses": [endpoint.address],
                "conditions": {"ready": endpoint.ready},
                "nodeName": endpoint.node,
            })
        })
        .collect();
    json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": if is_v6 { "IPv6" } else { "IPv4" },
        "ports": ports,
        "endpoints": endpoints,
    })
}
