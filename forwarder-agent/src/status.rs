//! The statuses of the Gateway API as data: what a Kubernetes API server would be told, and what files are told too.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::manifests::NamespacedName;

/// The status of a condition.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
pub enum ConditionStatus {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Not yet known.
    Unknown,
}

/// A `metav1.Condition`, less its transition time, which belongs to the writer.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// The type, such as `Accepted`.
    #[serde(rename = "type")]
    pub type_: &'static str,
    /// Whether it holds.
    pub status: ConditionStatus,
    /// Why, as one word.
    pub reason: &'static str,
    /// Why, as a sentence; may be empty.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// The generation of the object that was looked at.
    pub observed_generation: i64,
}

/// The status of a GatewayClass.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct GatewayClassStatus {
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// The status of a Gateway.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct GatewayStatus {
    /// Its conditions.
    pub conditions: Vec<Condition>,
    /// One entry for each listener of the spec, in its order.
    pub listeners: Vec<ListenerStatus>,
}

/// The status of a Gateway's listener.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerStatus {
    /// The listener.
    pub name: String,
    /// The kinds of routes that it can serve.
    pub supported_kinds: Vec<SupportedKind>,
    /// How many routes are attached, superseded ones included.
    pub attached_routes: u32,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

/// A kind of routes that a listener can serve.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct SupportedKind {
    /// The group.
    pub group: &'static str,
    /// The kind.
    pub kind: &'static str,
}

/// The status of a TCPRoute: one entry for each of its parents that is a Gateway of ours.
#[derive(Clone, Debug, Default, Eq, PartialEq, Serialize)]
pub struct RouteStatus {
    /// The parents.
    pub parents: Vec<RouteParentStatus>,
}

/// The status of a TCPRoute at one parent.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RouteParentStatus {
    /// The index of the parentRef in the route's spec.
    #[serde(skip)]
    pub parent_ref: usize,
    /// The Gateway.
    #[serde(serialize_with = "display")]
    pub gateway: NamespacedName,
    /// The parentRef's sectionName.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub section_name: Option<String>,
    /// The parentRef's port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<i64>,
    /// Its conditions.
    pub conditions: Vec<Condition>,
}

fn display<S: serde::Serializer>(value: &impl std::fmt::Display, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

/// Every status.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Statuses {
    /// Of GatewayClasses of our controller.
    pub gateway_classes: BTreeMap<String, GatewayClassStatus>,
    /// Of Gateways of these classes.
    pub gateways: BTreeMap<NamespacedName, GatewayStatus>,
    /// Of TCPRoutes with a parent among these Gateways.
    pub tcp_routes: BTreeMap<NamespacedName, RouteStatus>,
}
