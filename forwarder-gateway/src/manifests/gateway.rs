//! Gateway API kinds: GatewayClass, Gateway, TCPRoute, ReferenceGrant.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::GATEWAY_GROUP;
use crate::object::Object;
use crate::problem::Location;

/// A GatewayClass.
pub type GatewayClass = Object<GatewayClassSpec>;

/// The spec of a GatewayClass.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayClassSpec {
    /// Which controller serves Gateways of the class, such as `forwarder.dev/tcp`.
    pub controller_name: String,
    /// Configuration of the controller: none is supported.
    pub parameters_ref: Option<ParametersRef>,
}

/// A reference to a controller's own configuration.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ParametersRef {
    /// API group.
    pub group: String,
    /// Kind.
    pub kind: String,
    /// Name.
    pub name: String,
}

/// A Gateway.
pub type Gateway = Object<GatewaySpec>;

/// The spec of a Gateway.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewaySpec {
    /// The name of its GatewayClass.
    pub gateway_class_name: String,
    /// The addresses to listen on; none means all of the node.
    pub addresses: Vec<GatewayAddress>,
    /// The listeners.
    #[serde(serialize_with = "without_refused")]
    pub listeners: Vec<Listener>,
    /// Which ListenerSets may add listeners; absent means none.
    pub allowed_listeners: Option<AllowedListeners>,
    /// Settings of the infrastructure: only its parametersRef is looked at, and refused.
    pub infrastructure: Option<GatewayInfrastructure>,
}

/// `Gateway.spec.infrastructure`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewayInfrastructure {
    /// Configuration of the controller: none is supported.
    pub parameters_ref: Option<ParametersRef>,
}

/// An address that a Gateway asks for.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct GatewayAddress {
    /// `IPAddress` (the default), `Hostname`, or a domain-prefixed type.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// The address; may be absent from Gateway API 1.3 on, and then means any.
    pub value: Option<String>,
}

impl GatewayAddress {
    /// The type, or its default.
    pub fn type_(&self) -> &str {
        self.type_.as_deref().unwrap_or("IPAddress")
    }
}

/// A listener of a Gateway or ListenerSet.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Listener {
    /// Its name, unique in its Gateway or ListenerSet: what a parentRef's sectionName names.
    pub name: String,
    /// Its port; 1 to 65535.
    pub port: i64,
    /// `TCP` is served; `HTTP`, `HTTPS`, `TLS`, `UDP` and others are not.
    pub protocol: String,
    /// A hostname: not allowed on a TCP listener.
    pub hostname: Option<String>,
    /// TLS settings: not allowed on a TCP listener.
    pub tls: Option<serde_json::Value>,
    /// Which routes may attach.
    pub allowed_routes: Option<AllowedRoutes>,
    /// Where its file has an error: then it is not served, and nothing else of it counts. It stands among the others so that they
    /// keep their places. An API server refuses the whole object.
    #[serde(skip)]
    pub refused: Option<Location>,
}

/// Writes the listeners that are not refused.
pub(super) fn without_refused<S: Serializer>(listeners: &[Listener], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(listeners.iter().filter(|listener| listener.refused.is_none()))
}

/// Which routes may attach to a listener.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct AllowedRoutes {
    /// From which namespaces; absent means that of the listener's own object.
    pub namespaces: Option<RouteNamespaces>,
    /// Of which kinds; none means the protocol's default, which is TCPRoute for TCP.
    pub kinds: Vec<RouteGroupKind>,
}

/// Namespaces that routes may come from.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct RouteNamespaces {
    /// `Same` (the default), `All`, `Selector` or, for a `ListenerSet`, `None`.
    pub from: Option<String>,
    /// The selector, for `Selector`.
    pub selector: Option<LabelSelector>,
}

impl RouteNamespaces {
    /// From which namespaces, or the default.
    pub fn from(&self) -> &str {
        self.from.as_deref().unwrap_or("Same")
    }
}

/// A `metav1.LabelSelector`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels that must be equal.
    pub match_labels: BTreeMap<String, String>,
    /// Requirements that must all hold.
    pub match_expressions: Vec<LabelSelectorRequirement>,
}

/// One requirement of a [`LabelSelector`].
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct LabelSelectorRequirement {
    /// The label.
    pub key: String,
    /// `In`, `NotIn`, `Exists` or `DoesNotExist`.
    pub operator: String,
    /// The values, for `In` and `NotIn`.
    pub values: Vec<String>,
}

/// A group and kind of routes.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct RouteGroupKind {
    /// The group; absent means that of the Gateway API.
    pub group: Option<String>,
    /// The kind.
    pub kind: String,
}

impl RouteGroupKind {
    /// The group, or its default.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(GATEWAY_GROUP)
    }
}

/// A TCPRoute.
pub type TcpRoute = Object<TcpRouteSpec>;

/// The spec of a TCPRoute.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRouteSpec {
    /// The listeners that it wants to attach to.
    pub parent_refs: Vec<ParentRef>,
    /// The rules: one in v1, up to 16 in v1alpha2, of which only the first can carry traffic.
    pub rules: Vec<TcpRouteRule>,
}

/// A reference to a Gateway or ListenerSet, or to one or some of its listeners.
#[derive(Clone, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ParentRef {
    /// The group; absent means that of the Gateway API.
    pub group: Option<String>,
    /// `Gateway` (the default) or `ListenerSet`; others are not the forwarder's.
    pub kind: Option<String>,
    /// The namespace; absent means the route's own.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
    /// Only the listener of this name.
    pub section_name: Option<String>,
    /// Only the listeners on this port.
    pub port: Option<i64>,
}

impl ParentRef {
    /// The group, or its default.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(GATEWAY_GROUP)
    }

    /// The kind, or its default.
    pub fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or("Gateway")
    }

    /// Whether it refers to a Gateway.
    pub fn is_gateway(&self) -> bool {
        self.group() == GATEWAY_GROUP && self.kind() == "Gateway"
    }
}

/// One rule of a TCPRoute.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct TcpRouteRule {
    /// Its name.
    pub name: Option<String>,
    /// Where connections go.
    pub backend_refs: Vec<BackendRef>,
}

/// One weighted destination.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct BackendRef {
    /// The group; absent or empty means core.
    pub group: Option<String>,
    /// The kind; absent means Service.
    pub kind: Option<String>,
    /// The namespace; absent means the route's own.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
    /// The Service's port (not the target port).
    pub port: Option<i64>,
    /// Its share of new connections over the sum of weights, 0 to 1,000,000; absent means 1.
    pub weight: Option<i64>,
}

impl BackendRef {
    /// The group, or its default, which is core.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or_default()
    }

    /// The kind, or its default.
    pub fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or("Service")
    }

    /// The weight, or its default.
    pub fn weight(&self) -> i64 {
        self.weight.unwrap_or(1)
    }

    /// Whether it refers to a Service.
    pub fn is_service(&self) -> bool {
        self.group().is_empty() && self.kind() == "Service"
    }
}

/// A ReferenceGrant.
pub type ReferenceGrant = Object<ReferenceGrantSpec>;

/// The spec of a ReferenceGrant: any `from` may refer to any `to` in the grant's own namespace.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ReferenceGrantSpec {
    /// Who may refer.
    pub from: Vec<ReferenceGrantFrom>,
    /// To what.
    pub to: Vec<ReferenceGrantTo>,
}

/// Who may refer.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ReferenceGrantFrom {
    /// The group of the referrer.
    pub group: String,
    /// The kind of the referrer.
    pub kind: String,
    /// The namespace of the referrer.
    pub namespace: String,
}

/// To what may be referred.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ReferenceGrantTo {
    /// The group; empty means core.
    pub group: String,
    /// The kind.
    pub kind: String,
    /// The name; absent means all of the kind.
    pub name: Option<String>,
}

/// `Gateway.spec.allowedListeners`: which ListenerSets may add listeners to the Gateway.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct AllowedListeners {
    /// From which namespaces; absent means from none.
    pub namespaces: Option<ListenerNamespaces>,
}

/// Namespaces that ListenerSets may come from.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct ListenerNamespaces {
    /// `None` (the default), `Same`, `All` or `Selector`.
    pub from: Option<String>,
    /// The selector, for `Selector`.
    pub selector: Option<LabelSelector>,
}

impl ListenerNamespaces {
    /// From which namespaces, or the default.
    pub fn from(&self) -> &str {
        self.from.as_deref().unwrap_or("None")
    }
}
