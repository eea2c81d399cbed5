//! The kind ListenerSet, and what a Gateway says of ListenerSets (GEP-1713, Gateway API 1.5).

use serde::{Deserialize, Serialize};

use super::{GATEWAY_GROUP, Listener, NamespacedName};
use crate::object::Object;

/// A ListenerSet: listeners that are added to a Gateway by others than its owner.
pub type ListenerSet = Object<ListenerSetSpec>;

/// The spec of a ListenerSet.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListenerSetSpec {
    /// The Gateway that the listeners are added to.
    pub parent_ref: GatewayRef,
    /// The listeners.
    #[serde(serialize_with = "super::gateway::without_refused")]
    pub listeners: Vec<Listener>,
}

/// A reference to a Gateway.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct GatewayRef {
    /// The group; absent means that of the Gateway API.
    pub group: Option<String>,
    /// The kind; absent means Gateway.
    pub kind: Option<String>,
    /// The namespace; absent means that of the object that refers.
    pub namespace: Option<String>,
    /// The name.
    pub name: String,
}

impl GatewayRef {
    /// The group, or its default.
    pub fn group(&self) -> &str {
        self.group.as_deref().unwrap_or(GATEWAY_GROUP)
    }

    /// The kind, or its default.
    pub fn kind(&self) -> &str {
        self.kind.as_deref().unwrap_or("Gateway")
    }

    /// The Gateway's name, if it refers to a Gateway at all; `own_namespace` is that of the object that refers.
    pub fn gateway(&self, own_namespace: &str) -> Option<NamespacedName> {
        let is_gateway = self.group() == GATEWAY_GROUP && self.kind() == "Gateway";
        let namespace = self.namespace.as_deref().filter(|namespace| !namespace.is_empty());
        is_gateway.then(|| NamespacedName::new(namespace.unwrap_or(own_namespace), &self.name))
    }
}
