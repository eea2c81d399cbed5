//! Core and discovery kinds: Namespace, Service, EndpointSlice.

use serde::{Deserialize, Serialize};

use crate::object::{Metadata, Object};

/// The label by which an EndpointSlice names its Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// A core/v1 Namespace: only its labels matter, to namespace selectors.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Namespace {
    /// Metadata.
    pub metadata: Metadata,
}

/// A core/v1 Service.
pub type Service = Object<ServiceSpec>;

/// What the forwarder reads of a Service's spec.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceSpec {
    /// `ClusterIP` (the default), `NodePort`, `LoadBalancer` or `ExternalName`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// `None`, as a text, for a headless Service, which may have no ports.
    #[serde(rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// The ports.
    pub ports: Vec<ServicePort>,
}

impl ServiceSpec {
    /// The type, or its default.
    pub fn type_(&self) -> &str {
        self.type_.as_deref().unwrap_or("ClusterIP")
    }

    /// Whether the Service has no address of its own.
    pub fn is_headless(&self) -> bool {
        self.cluster_ip.as_deref() == Some("None")
    }
}

/// One port of a Service.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServicePort {
    /// The port's name, by which EndpointSlices refer to it; may be absent where the Service has one port only.
    pub name: Option<String>,
    /// The Service's port: what a backendRef names.
    pub port: i64,
    /// `TCP` (the default), `UDP` or `SCTP`.
    pub protocol: Option<String>,
    /// A hint of the protocol on top.
    pub app_protocol: Option<String>,
}

impl ServicePort {
    /// The name; empty if absent.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// The protocol, or its default.
    pub fn protocol(&self) -> &str {
        self.protocol.as_deref().unwrap_or("TCP")
    }
}

/// A discovery.k8s.io EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EndpointSlice {
    /// Metadata; the label `kubernetes.io/service-name` names the Service.
    pub metadata: Metadata,
    /// `IPv4`, `IPv6` or `FQDN`.
    pub address_type: String,
    /// The endpoints.
    pub endpoints: Vec<Endpoint>,
    /// The target ports, by Service port name.
    pub ports: Vec<EndpointPort>,
}

impl EndpointSlice {
    /// The name of the Service that the slice belongs to, from its label.
    pub fn service_name(&self) -> Option<&str> {
        self.metadata.labels.get(SERVICE_NAME_LABEL).map(String::as_str).filter(|name| !name.is_empty())
    }
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Endpoint {
    /// Addresses: consumers use the first.
    pub addresses: Vec<String>,
    /// Whether it takes connections.
    pub conditions: EndpointConditions,
}

/// The conditions of an endpoint. Absent means: ready, serving as ready, not terminating.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct EndpointConditions {
    /// Takes new connections.
    pub ready: Option<bool>,
    /// Answers, even while terminating.
    pub serving: Option<bool>,
    /// Is being deleted.
    pub terminating: Option<bool>,
}

/// A target port of an EndpointSlice.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct EndpointPort {
    /// The name of the Service's port; absent equals empty.
    pub name: Option<String>,
    /// The target port; absent means every port, which the forwarder cannot serve.
    pub port: Option<i64>,
    /// `TCP` (the default), `UDP` or `SCTP`.
    pub protocol: Option<String>,
}

impl EndpointPort {
    /// The name; empty if absent.
    pub fn name(&self) -> &str {
        self.name.as_deref().unwrap_or_default()
    }

    /// The protocol, or its default.
    pub fn protocol(&self) -> &str {
        self.protocol.as_deref().unwrap_or("TCP")
    }
}
