//! The Gateway API and core objects that the forwarder reads, in the few fields that it uses.
//!
//! The types are lenient on purpose: enumerations are strings and numbers are wide, so that one unexpected value never
//! hides an object from the agent. [`check`] then reports what a CRD's schema and CEL rules would have refused. One type
//! serves every version that a kind ever had (`v1alpha2`, `v1beta1`, `v1`): the versions differ only in name.

pub mod check;
mod core;
mod gateway;
mod listener_set;
mod manifest;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use imbl::OrdMap;
use imbl::ordmap::DiffItem;

use crate::problem::Location;

pub use self::core::{
    Endpoint, EndpointConditions, EndpointPort, EndpointSlice, Namespace, SERVICE_NAME_LABEL, Service,
    ServicePort, ServiceSpec,
};
pub use self::gateway::{
    AllowedListeners, AllowedRoutes, BackendRef, Gateway, GatewayAddress, GatewayClass, GatewayClassSpec,
    GatewayInfrastructure, GatewaySpec, LabelSelector, LabelSelectorRequirement, Listener,
    ListenerNamespaces, ParametersRef, ParentRef, ReferenceGrant, ReferenceGrantFrom, ReferenceGrantSpec,
    ReferenceGrantTo, RouteGroupKind, RouteNamespaces, TcpRoute, TcpRouteRule, TcpRouteSpec,
};
pub use self::listener_set::{GatewayRef, ListenerSet, ListenerSetSpec};
pub use self::manifest::Manifest;
pub use crate::object::{Kind, Metadata, NamespacedName, Object, ObjectRef};

/// The group of the Gateway API.
pub const GATEWAY_GROUP: &str = "gateway.networking.k8s.io";

/// EndpointSlices by their name.
pub type EndpointSlices = OrdMap<String, Arc<EndpointSlice>>;

/// Every object that the forwarder knows at one moment, by kind and name.
///
/// The maps are persistent: cloning takes no time, and a set that was made from another by a few changes shares all the
/// rest with it. So a source publishes a whole set for each change, and who compares two sets pays for what differs.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Manifests {
    /// Each GatewayClass by name (they have no namespace).
    pub gateway_classes: OrdMap<String, Arc<GatewayClass>>,
    /// Gateways.
    pub gateways: OrdMap<NamespacedName, Arc<Gateway>>,
    /// ListenerSets.
    pub listener_sets: OrdMap<NamespacedName, Arc<ListenerSet>>,
    /// Each TCPRoute.
    pub tcp_routes: OrdMap<NamespacedName, Arc<TcpRoute>>,
    /// Each ReferenceGrant.
    pub reference_grants: OrdMap<NamespacedName, Arc<ReferenceGrant>>,
    /// Namespaces by name. In file mode a namespace that nobody declared exists all the same, without labels.
    pub namespaces: OrdMap<String, Arc<Namespace>>,
    /// Services.
    pub services: OrdMap<NamespacedName, Arc<Service>>,
    /// EndpointSlices by the Service that they belong to (label `kubernetes.io/service-name`), then by their own name.
    /// There is no entry for a Service without any.
    pub endpoint_slices: OrdMap<NamespacedName, EndpointSlices>,
    /// The objects that are asked for and not in force in any version, for their files have errors: what refers to them need not be told
    /// that they are missing. Empty in a cluster.
    pub refused: OrdMap<ObjectRef, Refused>,
    /// At which addresses the agents of this installation listen; none where there is no cluster.
    pub node_addresses: Arc<BTreeSet<IpAddr>>,
    /// Where documents and files are of which nothing can be read: what seems to be missing may stand there. Empty in a cluster.
    pub unread: Arc<[Location]>,
    /// The release of the Gateway API that the objects were validated by.
    pub api_release: ApiRelease,
}

/// An object that is refused.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refused {
    /// Where its first error is.
    pub location: Location,
    /// What it refers to, as far as that can be read: the parents of a TCPRoute, the Service of an EndpointSlice.
    pub refers_to: Vec<ObjectRef>,
}

/// Which release of the Gateway API's CRDs a cluster has.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum ApiRelease {
    /// There is no cluster: the manifests come from files.
    #[default]
    NotInstalled,
    /// The CRDs do not tell, or are not there.
    Unknown,
    /// The annotation `gateway.networking.k8s.io/bundle-version` of the CRDs, such as `v1.6.1`: more than one while they
    /// are replaced, or where they were put together by hand.
    Installed(BTreeSet<String>),
}

impl Manifests {
    /// Why an object that is referred to is missing, if an error that is told elsewhere may be the cause.
    pub(crate) fn why_missing(&self, object: &ObjectRef) -> Option<String> {
        match (self.refused.get(object), self.unread.first()) {
            (Some(Refused { location, .. }), _) => Some(format!("{object} is refused ({location})")),
            (None, Some(location)) => {
                Some(format!("there is no {object}, unless it stands in what cannot be read ({location})"))
            }
            (None, None) => None,
        }
    }

    /// The refused objects of a kind that refer to an object.
    pub(crate) fn refused_that_refer_to(
        &self,
        kind: Kind,
        object: &ObjectRef,
    ) -> impl Iterator<Item = (&ObjectRef, &Refused)> {
        let refused = self.refused.iter();
        refused.filter(move |(id, refused)| id.kind == kind.as_str() && refused.refers_to.contains(object))
    }

    /// What differs in `new`.
    pub fn change_to(&self, new: &Self) -> Change {
        let Self {
            gateway_classes,
            gateways,
            listener_sets,
            tcp_routes,
            reference_grants,
            namespaces,
            services,
            endpoint_slices,
            refused,
            node_addresses,
            unread,
            api_release,
        } = self;
        let is_same_otherwise = *gateway_classes == new.gateway_classes
            && *gateways == new.gateways
            && *listener_sets == new.listener_sets
            && *tcp_routes == new.tcp_routes
            && *reference_grants == new.reference_grants
            && *namespaces == new.namespaces
            && *services == new.services
            && *refused == new.refused
            && *node_addresses == new.node_addresses
            && *unread == new.unread
            && *api_release == new.api_release;
        if !is_same_otherwise {
            return Change::Any;
        }
        let differing = endpoint_slices.diff(&new.endpoint_slices).map(|difference| match difference {
            DiffItem::Add(service, _)
            | DiffItem::Remove(service, _)
            | DiffItem::Update { new: (service, _), .. } => service.clone(),
        });
        Change::Endpoints(differing.collect())
    }
}

impl ApiRelease {
    /// Whether every CRD is of this release or a later one.
    pub fn is_at_least(&self, major: u32, minor: u32) -> bool {
        match self {
            Self::NotInstalled | Self::Unknown => false,
            Self::Installed(releases) => {
                releases.iter().all(|release| version(release).is_some_and(|it| it >= (major, minor)))
            }
        }
    }
}

/// The first two numbers of a version such as `v1.6.1` or `1.6.0-rc.1`.
pub(crate) fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.trim_start_matches('v').split(['.', '-', '+']).map(str::parse::<u32>);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// What differs between two sets of manifests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Change {
    /// At most the EndpointSlices of these Services.
    Endpoints(BTreeSet<NamespacedName>),
    /// Something else, perhaps besides.
    Any,
}

#[cfg(test)]
mod tests;
