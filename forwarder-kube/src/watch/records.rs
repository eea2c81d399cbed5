//! What the API server holds of the objects that carry a status of ours: for who writes it.

use std::sync::Arc;

use imbl::OrdMap;

use super::kinds::Served;
use forwarder_gateway::manifests::{Kind, ObjectRef};

/// One object as it stands in the API server.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct ObservedObject {
    /// Its unique id: another object of the same name has another.
    pub uid: String,
    /// Its version, without which nothing is written: who has seen an older one must look again.
    pub resource_version: String,
    /// The generation of its spec.
    pub generation: i64,
    /// What keeps it from being deleted.
    pub finalizers: Vec<String>,
    /// Whether it is being deleted.
    pub is_terminating: bool,
    /// Its status, as JSON: kept as text, for thousands of them are rarely looked at.
    pub status: Option<Box<str>>,
}

/// Every GatewayClass, Gateway, ListenerSet and TCPRoute as it stands in the API server. Cloning takes no time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ObservedObjects {
    /// The objects.
    pub objects: OrdMap<ObjectRef, Arc<ObservedObject>>,
    /// In which version each kind is served.
    pub served: Arc<Served>,
}

/// Whether objects of the kind carry a status of ours.
pub(super) fn has_status(kind: Kind) -> bool {
    match kind {
        Kind::GatewayClass | Kind::Gateway | Kind::ListenerSet | Kind::TcpRoute => true,
        Kind::ReferenceGrant | Kind::Namespace | Kind::Service | Kind::EndpointSlice => false,
    }
}
