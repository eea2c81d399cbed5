//! The Gateway API and core objects that the forwarder reads, in the few fields that it uses.
//!
//! The types are lenient on purpose: enumerations are strings and numbers are wide, so that one unexpected value never
//! hides an object from the agent. [`check`] then reports what a CRD's schema and CEL rules would have refused. One type
//! serves every version that a kind ever had (`v1alpha2`, `v1beta1`, `v1`): the versions differ only in name.

pub mod check;
mod core;
mod gateway;
mod object;

use std::collections::BTreeMap;
use std::sync::Arc;

pub use self::core::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice, Namespace, SERVICE_NAME_LABEL, Service,
    ServicePort, ServiceSpec,
};
pub use self::gateway::{
    AllowedRoutes, BackendRef, Gateway, GatewayAddress, GatewayClass, GatewayClassSpec,
    GatewayInfrastructure, GatewaySpec, LabelSelector, LabelSelectorRequirement, Listener, ParametersRef,
    ParentRef, ReferenceGrant, ReferenceGrantFrom, ReferenceGrantSpec, ReferenceGrantTo, RouteGroupKind,
    RouteNamespaces, TcpRoute, TcpRouteRule, TcpRouteSpec,
};
pub use self::object::{Kind, Metadata, NamespacedName, Object, ObjectRef};

/// The group of the Gateway API.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// Every object that the forwarder knows at one moment, by kind and name.
///
/// Cloning is cheap per object (they are shared), so that a source can publish a new set for each change.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifests {
    /// Each GatewayClass by name (they have no namespace).
    pub gateway_classes: BTreeMap<String, Arc<GatewayClass>>,
    /// Gateways.
    pub gateways: BTreeMap<NamespacedName, Arc<Gateway>>,
    /// Each TCPRoute.
    pub tcp_routes: BTreeMap<NamespacedName, Arc<TcpRoute>>,
    /// Each ReferenceGrant.
    pub reference_grants: BTreeMap<NamespacedName, Arc<ReferenceGrant>>,
    /// Namespaces by name. In file mode a namespace that nobody declared exists all the same, without labels.
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Services.
    pub services: BTreeMap<NamespacedName, Arc<Service>>,
    /// EndpointSlices by the Service that they belong to (label `kubernetes.io/service-name`), then by their own name.
    pub endpoint_slices: BTreeMap<NamespacedName, BTreeMap<String, Arc<EndpointSlice>>>,
}
