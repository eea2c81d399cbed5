//! What every Kubernetes object has: a kind, a name, metadata.

use std::collections::BTreeMap;
use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// A kind of object that the forwarder reads.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub enum Kind {
    /// `gateway.networking.k8s.io` GatewayClass, cluster-scoped.
    GatewayClass,
    /// `gateway.networking.k8s.io` Gateway.
    Gateway,
    /// `gateway.networking.k8s.io` ListenerSet, from release 1.5 of the Gateway API on.
    ListenerSet,
    /// `gateway.networking.k8s.io` TCPRoute.
    #[serde(rename = "TCPRoute")]
    TcpRoute,
    /// `gateway.networking.k8s.io` ReferenceGrant.
    ReferenceGrant,
    /// Core Namespace, cluster-scoped.
    Namespace,
    /// Core Service.
    Service,
    /// `discovery.k8s.io` EndpointSlice.
    EndpointSlice,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::GatewayClass,
        Self::Gateway,
        Self::ListenerSet,
        Self::TcpRoute,
        Self::ReferenceGrant,
        Self::Namespace,
        Self::Service,
        Self::EndpointSlice,
    ];

    /// The kind's name in manifests.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::GatewayClass => "GatewayClass",
            Self::Gateway => "Gateway",
            Self::ListenerSet => "ListenerSet",
            Self::TcpRoute => "TCPRoute",
            Self::ReferenceGrant => "ReferenceGrant",
            Self::Namespace => "Namespace",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
        }
    }

    /// Whether objects of the kind have no namespace.
    pub fn is_cluster_scoped(self) -> bool {
        match self {
            Self::GatewayClass | Self::Namespace => true,
            Self::Gateway
            | Self::ListenerSet
            | Self::TcpRoute
            | Self::ReferenceGrant
            | Self::Service
            | Self::EndpointSlice => false,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The name of a namespaced object.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct NamespacedName {
    /// The namespace.
    pub namespace: String,
    /// The name in it.
    pub name: String,
}

impl NamespacedName {
    /// The name `namespace/name`.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Plain(&self.namespace), Plain(&self.name))
    }
}

/// Which object: kind, namespace (empty for cluster-scoped kinds) and name.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ObjectRef {
    /// The kind's name; a string, for problems name kinds that the forwarder does not read as well.
    pub kind: String,
    /// The namespace; empty for cluster-scoped kinds.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// The name.
    pub name: String,
}

impl ObjectRef {
    /// A reference to a namespaced object.
    pub fn new(kind: Kind, name: &NamespacedName) -> Self {
        Self { kind: kind.as_str().to_owned(), namespace: name.namespace.clone(), name: name.name.clone() }
    }

    /// The name of a namespaced object.
    pub fn namespaced_name(&self) -> NamespacedName {
        NamespacedName::new(&self.namespace, &self.name)
    }

    /// A reference to a cluster-scoped object.
    pub fn cluster(kind: Kind, name: impl Into<String>) -> Self {
        Self { kind: kind.as_str().to_owned(), namespace: String::new(), name: name.into() }
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, name) = (Plain(&self.kind), Plain(&self.name));
        match self.namespace.as_str() {
            "" => write!(f, "{kind} {name}"),
            namespace => write!(f, "{kind} {}/{name}", Plain(namespace)),
        }
    }
}

/// A text whose control characters are escaped: whatever stands in a file, a terminal only shows it.
pub struct Plain<'a>(pub &'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some((index, control)) = rest.char_indices().find(|(_, letter)| letter.is_control()) {
            let (before, from) = rest.split_at(index);
            write!(f, "{before}{}", control.escape_default())?;
            rest = from.get(control.len_utf8()..).unwrap_or_default();
        }
        f.write_str(rest)
    }
}

/// The metadata that the forwarder uses (`metav1.ObjectMeta`).
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Metadata {
    /// The name.
    pub name: String,
    /// The namespace; the source fills in `default` for a namespaced object without one.
    pub namespace: String,
    /// The generation of the spec, copied into conditions as `observedGeneration`; 0 in files.
    pub generation: i64,
    /// When the object was created: the oldest wins a conflict. Absent in files, where the name decides.
    pub creation_timestamp: Option<Timestamp>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations: where a Gateway or ListenerSet carries the forwarder's own settings.
    pub annotations: BTreeMap<String, String>,
}

impl Metadata {
    /// The namespaced name.
    pub fn namespaced_name(&self) -> NamespacedName {
        NamespacedName::new(&self.namespace, &self.name)
    }

    /// The key by which the oldest object comes first: creation time, then namespace and name. An object without a
    /// creation time counts as younger than all that have one.
    pub fn age_key(&self) -> (bool, Option<Timestamp>, NamespacedName) {
        (self.creation_timestamp.is_none(), self.creation_timestamp, self.namespaced_name())
    }
}

/// An object with metadata and a spec.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Object<S> {
    /// Metadata.
    pub metadata: Metadata,
    /// The desired state.
    pub spec: S,
}
