//! One object of any kind, and its place among all.

use std::sync::Arc;

use super::{
    EndpointSlice, Gateway, GatewayClass, Kind, Listener, ListenerSet, Manifests, Namespace, NamespacedName,
    ObjectRef, ReferenceGrant, Service, TcpRoute,
};

/// An object of any kind that is read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Manifest {
    /// A GatewayClass.
    GatewayClass(Arc<GatewayClass>),
    /// A Gateway.
    Gateway(Arc<Gateway>),
    /// A ListenerSet.
    ListenerSet(Arc<ListenerSet>),
    /// A TCPRoute.
    TcpRoute(Arc<TcpRoute>),
    /// A ReferenceGrant.
    ReferenceGrant(Arc<ReferenceGrant>),
    /// A Namespace.
    Namespace(Arc<Namespace>),
    /// A Service.
    Service(Arc<Service>),
    /// An EndpointSlice.
    EndpointSlice(Arc<EndpointSlice>),
}

impl Manifest {
    /// The listeners of a Gateway or ListenerSet.
    pub fn listeners(&self) -> Option<&Vec<Listener>> {
        match self {
            Self::Gateway(object) => Some(&object.spec.listeners),
            Self::ListenerSet(object) => Some(&object.spec.listeners),
            Self::GatewayClass(_)
            | Self::TcpRoute(_)
            | Self::ReferenceGrant(_)
            | Self::Namespace(_)
            | Self::Service(_)
            | Self::EndpointSlice(_) => None,
        }
    }

    /// As [`Self::listeners`], of a copy where somebody else has the object too.
    pub fn listeners_mut(&mut self) -> Option<&mut Vec<Listener>> {
        match self {
            Self::Gateway(object) => Some(&mut Arc::make_mut(object).spec.listeners),
            Self::ListenerSet(object) => Some(&mut Arc::make_mut(object).spec.listeners),
            Self::GatewayClass(_)
            | Self::TcpRoute(_)
            | Self::ReferenceGrant(_)
            | Self::Namespace(_)
            | Self::Service(_)
            | Self::EndpointSlice(_) => None,
        }
    }
}

impl Manifests {
    /// Each object and its name.
    pub fn each(&self) -> impl Iterator<Item = (ObjectRef, Manifest)> {
        let of = |kind, name: &NamespacedName, manifest| (ObjectRef::new(kind, name), manifest);
        let classes = self.gateway_classes.iter().map(|(name, object)| {
            (ObjectRef::cluster(Kind::GatewayClass, name), Manifest::GatewayClass(Arc::clone(object)))
        });
        let gateways = self.gateways.iter();
        let gateways =
            gateways.map(move |(name, it)| of(Kind::Gateway, name, Manifest::Gateway(Arc::clone(it))));
        let sets = self.listener_sets.iter();
        let sets =
            sets.map(move |(name, it)| of(Kind::ListenerSet, name, Manifest::ListenerSet(Arc::clone(it))));
        let routes = self.tcp_routes.iter();
        let routes =
            routes.map(move |(name, it)| of(Kind::TcpRoute, name, Manifest::TcpRoute(Arc::clone(it))));
        let grants = self
            .reference_grants
            .iter()
            .map(move |(name, it)| of(Kind::ReferenceGrant, name, Manifest::ReferenceGrant(Arc::clone(it))));
        let namespaces = self.namespaces.iter().map(|(name, object)| {
            (ObjectRef::cluster(Kind::Namespace, name), Manifest::Namespace(Arc::clone(object)))
        });
        let services = self.services.iter();
        let services =
            services.map(move |(name, it)| of(Kind::Service, name, Manifest::Service(Arc::clone(it))));
        let slices = self.endpoint_slices.iter().flat_map(|(service, slices)| {
            slices.iter().map(|(name, it)| (NamespacedName::new(&service.namespace, name), it))
        });
        let slices = slices
            .map(move |(name, it)| of(Kind::EndpointSlice, &name, Manifest::EndpointSlice(Arc::clone(it))));
        let gateway_api = classes.chain(gateways).chain(sets).chain(routes).chain(grants);
        gateway_api.chain(namespaces).chain(services).chain(slices)
    }

    /// Adds an object, or replaces the one of its name.
    pub fn put(&mut self, id: &ObjectRef, manifest: &Manifest) {
        match manifest {
            Manifest::GatewayClass(object) => {
                self.gateway_classes.insert(id.name.clone(), Arc::clone(object));
            }
            Manifest::Gateway(object) => {
                self.gateways.insert(id.namespaced_name(), Arc::clone(object));
            }
            Manifest::ListenerSet(object) => {
                self.listener_sets.insert(id.namespaced_name(), Arc::clone(object));
            }
            Manifest::TcpRoute(object) => {
                self.tcp_routes.insert(id.namespaced_name(), Arc::clone(object));
            }
            Manifest::ReferenceGrant(object) => {
                self.reference_grants.insert(id.namespaced_name(), Arc::clone(object));
            }
            Manifest::Namespace(object) => {
                self.namespaces.insert(id.name.clone(), Arc::clone(object));
            }
            Manifest::Service(object) => {
                self.services.insert(id.namespaced_name(), Arc::clone(object));
            }
            Manifest::EndpointSlice(object) => {
                // One without the label has a warning that says that it is ignored.
                if let Some(service) = service(id, object) {
                    let slices = self.endpoint_slices.entry(service).or_default();
                    slices.insert(id.name.clone(), Arc::clone(object));
                }
            }
        }
    }

    /// Takes an object away.
    pub fn take(&mut self, id: &ObjectRef, manifest: &Manifest) {
        match manifest {
            Manifest::GatewayClass(_) => drop(self.gateway_classes.remove(&id.name)),
            Manifest::Gateway(_) => drop(self.gateways.remove(&id.namespaced_name())),
            Manifest::ListenerSet(_) => drop(self.listener_sets.remove(&id.namespaced_name())),
            Manifest::TcpRoute(_) => drop(self.tcp_routes.remove(&id.namespaced_name())),
            Manifest::ReferenceGrant(_) => drop(self.reference_grants.remove(&id.namespaced_name())),
            Manifest::Namespace(_) => drop(self.namespaces.remove(&id.name)),
            Manifest::Service(_) => drop(self.services.remove(&id.namespaced_name())),
            Manifest::EndpointSlice(object) => {
                let Some(service) = service(id, object) else { return };
                let Some(slices) = self.endpoint_slices.get_mut(&service) else { return };
                slices.remove(&id.name);
                if slices.is_empty() {
                    self.endpoint_slices.remove(&service);
                }
            }
        }
    }
}

fn service(id: &ObjectRef, slice: &EndpointSlice) -> Option<NamespacedName> {
    Some(NamespacedName::new(&id.namespace, slice.service_name()?))
}
