//! One object of any kind, and its place among all.

use std::sync::Arc;

use crate::manifests::{
    EndpointSlice, Gateway, GatewayClass, ListenerSet, Manifests, Namespace, NamespacedName, ObjectRef,
    ReferenceGrant, Service, TcpRoute,
};

/// An object of any kind that is read.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Manifest {
    GatewayClass(Arc<GatewayClass>),
    Gateway(Arc<Gateway>),
    ListenerSet(Arc<ListenerSet>),
    TcpRoute(Arc<TcpRoute>),
    ReferenceGrant(Arc<ReferenceGrant>),
    Namespace(Arc<Namespace>),
    Service(Arc<Service>),
    EndpointSlice(Arc<EndpointSlice>),
}

impl Manifests {
    /// Adds an object, or replaces the one of its name.
    pub(super) fn put(&mut self, id: &ObjectRef, manifest: &Manifest) {
        match manifest {
            Manifest::GatewayClass(object) => {
                self.gateway_classes.insert(id.name.clone(), Arc::clone(object));
            }
            Manifest::Gateway(object) => {
                self.gateways.insert(name(id), Arc::clone(object));
            }
            Manifest::ListenerSet(object) => {
                self.listener_sets.insert(name(id), Arc::clone(object));
            }
            Manifest::TcpRoute(object) => {
                self.tcp_routes.insert(name(id), Arc::clone(object));
            }
            Manifest::ReferenceGrant(object) => {
                self.reference_grants.insert(name(id), Arc::clone(object));
            }
            Manifest::Namespace(object) => {
                self.namespaces.insert(id.name.clone(), Arc::clone(object));
            }
            Manifest::Service(object) => {
                self.services.insert(name(id), Arc::clone(object));
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
    pub(super) fn take(&mut self, id: &ObjectRef, manifest: &Manifest) {
        match manifest {
            Manifest::GatewayClass(_) => drop(self.gateway_classes.remove(&id.name)),
            Manifest::Gateway(_) => drop(self.gateways.remove(&name(id))),
            Manifest::ListenerSet(_) => drop(self.listener_sets.remove(&name(id))),
            Manifest::TcpRoute(_) => drop(self.tcp_routes.remove(&name(id))),
            Manifest::ReferenceGrant(_) => drop(self.reference_grants.remove(&name(id))),
            Manifest::Namespace(_) => drop(self.namespaces.remove(&id.name)),
            Manifest::Service(_) => drop(self.services.remove(&name(id))),
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

fn name(id: &ObjectRef) -> NamespacedName {
    NamespacedName::new(&id.namespace, &id.name)
}

fn service(id: &ObjectRef, slice: &EndpointSlice) -> Option<NamespacedName> {
    Some(NamespacedName::new(&id.namespace, slice.service_name()?))
}
