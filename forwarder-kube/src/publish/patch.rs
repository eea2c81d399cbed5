//! What has to be written of a status: pure, from what stands there and what is to stand there.
//!
//! A patch is a JSON merge patch of the status as a whole lists, with the version of the object that it was made from,
//! so that the API server refuses it if anybody was faster. What others have written is kept as it is, in its place:
//! conditions of other types, and the `parents` of other controllers. A condition's `lastTransitionTime` moves when its
//! `status` does, and where nothing but that would differ nothing is written. The patch of what is there already is none.

use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::watch::ObservedObject;
use forwarder_gateway::manifests::{Kind, ParentRef};
use forwarder_gateway::problem::Reason;
use forwarder_gateway::status::{
    Condition, ConditionStatus, GatewayClassStatus, GatewayStatus, ListenerSetStatus, ListenerStatus,
    RouteParentStatus, names,
};

/// The condition types that are ours on the objects that are ours.
const OUR_TYPES: [&str; 6] = [
    names::ACCEPTED,
    names::PROGRAMMED,
    names::RESOLVED_REFS,
    names::CONFLICTED,
    names::PARTIALLY_INVALID,
    names::SUPPORTED_VERSION,
];

/// How many parents a route's status may have.
const MOST_PARENTS: usize = 32;

/// The status that an object is to have.
#[derive(Clone, Copy, Debug, Hash)]
pub(super) enum Wanted<'a> {
    GatewayClass {
        status: &'a GatewayClassStatus,
        /// The features that are served, sorted; `None` where the cluster's CRDs have no place for them.
        features: Option<&'a [&'a str]>,
    },
    Gateway(&'a GatewayStatus),
    ListenerSet(&'a ListenerSetStatus),
    Route {
        controller: &'a str,
        /// Each parent that is ours.
        parents: &'a [Parent<'a>],
    },
}

/// A parent of a route.
#[derive(Clone, Debug, Hash)]
pub(super) struct Parent<'a> {
    /// Its reference, as it stands in the route's spec.
    pub(super) reference: &'a ParentRef,
    pub(super) status: &'a RouteParentStatus,
}

/// What has to be written.
#[derive(Debug, PartialEq)]
pub(super) struct Patch {
    /// The merge patch.
    pub(super) body: Value,
    /// The conditions that turn bad by it, for people to be told.
    pub(super) warnings: Vec<Warning>,
}

/// A condition that has turned bad.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Warning {
    pub(super) reason: String,
    pub(super) message: String,
}

/// What has to be written, at `now` (RFC 3339). `None` if nothing, or if the object's status was made from a later
/// generation than ours: then we have something old before us, and will see.
pub(super) fn patch(record: &ObservedObject, wanted: Wanted<'_>, now: &str) -> Option<Patch> {
    let current: Value =
        record.status.as_deref().and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let mut merge = Merge { now, warnings: Vec::new(), is_outdated: false };
    let mut status = Map::new();
    match wanted {
        Wanted::GatewayClass { status: wanted, features } => {
            status.insert("conditions".into(), merge.conditions(&current["conditions"], &wanted.conditions));
            if let Some(features) = features {
                let features = features.iter().map(|name| json!({ "name": name })).collect();
                status.insert("supportedFeatures".into(), Value::Array(features));
            }
        }
        Wanted::Gateway(wanted) => {
            status.insert("addresses".into(), value(&wanted.addresses));
            status.insert("conditions".into(), merge.conditions(&current["conditions"], &wanted.conditions));
            status.insert("listeners".into(), merge.listeners(&current["listeners"], &wanted.listeners));
            if let Some(count) = wanted.attached_listener_sets {
                status.insert("attachedListenerSets".into(), count.into());
            }
        }
        Wanted::ListenerSet(wanted) => {
            status.insert("conditions".into(), merge.conditions(&current["conditions"], &wanted.conditions));
            status.insert("listeners".into(), merge.listeners(&current["listeners"], &wanted.listeners));
        }
        Wanted::Route { controller, parents } => {
            status.insert("parents".into(), merge.parents(&current["parents"], controller, parents));
        }
    }
    let is_there = status.iter().all(|(field, wanted)| match &current[field.as_str()] {
        Value::Null => matches!(wanted, Value::Array(items) if items.is_empty()),
        current => current == wanted,
    });
    let body = json!({ "metadata": { "resourceVersion": record.resource_version }, "status": status });
    (!is_there && !merge.is_outdated).then_some(Patch { body, warnings: merge.warnings })
}

/// The finalizer that keeps a GatewayClass as long as a Gateway uses it.
const FINALIZER: &str = "gateway-exists-finalizer.gateway.networking.k8s.io";

/// What has to be written so that a GatewayClass has the finalizer while it is used, and not any longer.
pub(super) fn finalizer_patch(record: &ObservedObject, is_used: bool) -> Option<Value> {
    let has_it = record.finalizers.iter().any(|finalizer| finalizer == FINALIZER);
    // None can be added to what is being deleted.
    if has_it == is_used || (is_used && record.is_terminating) {
        return None;
    }
    let mut finalizers: Vec<&str> =
        record.finalizers.iter().map(String::as_str).filter(|finalizer| *finalizer != FINALIZER).collect();
    if is_used {
        finalizers.push(FINALIZER);
    }
    Some(json!({ "metadata": { "resourceVersion": record.resource_version, "finalizers": finalizers } }))
}

/// The state of [`patch`].
struct Merge<'a> {
    now: &'a str,
    warnings: Vec<Warning>,
    is_outdated: bool,
}

impl Merge<'_> {
    /// Ours in place of what we said before, foreign ones where they are.
    fn conditions(&mut self, current: &Value, ours: &[Condition]) -> Value {
        let mut left: Vec<&Condition> = ours.iter().collect();
        let mut merged = Vec::new();
        for condition in items(current) {
            let type_ = condition["type"].as_str().unwrap_or_default();
            if let Some(index) = left.iter().position(|wanted| wanted.type_ == type_) {
                merged.push(self.condition(Some(condition), left.remove(index)));
            } else if !OUR_TYPES.contains(&type_) {
                merged.push(condition.clone());
            }
        }
        merged.extend(left.into_iter().map(|wanted| self.condition(None, wanted)));
        Value::Array(merged)
    }

    fn condition(&mut self, current: Option<&Value>, wanted: &Condition) -> Value {
        let text = |field: &str| current.and_then(|it| it[field].as_str());
        let generation = current.and_then(|it| it["observedGeneration"].as_i64()).unwrap_or_default();
        self.is_outdated |= generation > wanted.observed_generation;
        let status = wanted.status.as_str();
        let since = text("lastTransitionTime").filter(|_| text("status") == Some(status));
        let is_new = (text("status"), text("reason")) != (Some(status), Some(wanted.reason));
        if is_new && is_bad(wanted) {
            self.warn(wanted.reason, &wanted.message);
        }
        json!({
            "type": wanted.type_,
            "status": status,
            "reason": wanted.reason,
            "message": wanted.message,
            "observedGeneration": wanted.observed_generation,
            "lastTransitionTime": since.unwrap_or(self.now),
        })
    }

    /// One entry for each listener of the spec, in its order, and no other.
    fn listeners(&mut self, current: &Value, wanted: &[ListenerStatus]) -> Value {
        let merged = wanted.iter().map(|listener| {
            let before = items(current).iter().find(|it| it["name"].as_str() == Some(&listener.name));
            let conditions = before.map_or(&Value::Null, |it| &it["conditions"]);
            json!({
                "name": listener.name,
                "supportedKinds": value(&listener.supported_kinds),
                "attachedRoutes": listener.attached_routes,
                "conditions": self.conditions(conditions, &listener.conditions),
            })
        });
        Value::Array(merged.collect())
    }

    /// Our parents in place of what we said of them before, those of others where they are.
    fn parents(&mut self, current: &Value, controller: &str, wanted: &[Parent<'_>]) -> Value {
        let mut left: Vec<&Parent<'_>> = wanted.iter().collect();
        let mut merged = Vec::new();
        for entry in items(current) {
            if entry["controllerName"].as_str() != Some(controller) {
                merged.push(entry.clone());
                continue;
            }
            let Ok(reference) = serde_json::from_value::<ParentRef>(entry["parentRef"].clone()) else {
                continue;
            };
            if let Some(index) = left.iter().position(|wanted| is_same(wanted.reference, &reference)) {
                merged.push(self.parent(&entry["conditions"], controller, left.remove(index)));
            }
        }
        for wanted in left {
            if merged.len() < MOST_PARENTS {
                merged.push(self.parent(&Value::Null, controller, wanted));
            }
        }
        Value::Array(merged)
    }

    fn parent(&mut self, current: &Value, controller: &str, wanted: &Parent<'_>) -> Value {
        let mut reference = value(wanted.reference);
        // As it stands in the spec: what is absent there stays absent.
        if let Some(fields) = reference.as_object_mut() {
            fields.retain(|_, field| !field.is_null());
        }
        self.warn_if_superseded(current, wanted.status);
        json!({
            "controllerName": controller,
            "parentRef": reference,
            "conditions": self.conditions(current, &wanted.status.conditions),
        })
    }

    /// A route that is superseded is accepted all the same, so that no condition turns bad by it.
    fn warn_if_superseded(&mut self, current: &Value, wanted: &RouteParentStatus) {
        let is_accepted = |condition: &&Condition| condition.type_ == names::ACCEPTED;
        let Some(accepted) = wanted.conditions.iter().find(is_accepted).filter(|_| wanted.is_superseded)
        else {
            return;
        };
        let is_known = items(current).iter().any(|it| {
            it["type"].as_str() == Some(names::ACCEPTED) && it["message"].as_str() == Some(&accepted.message)
        });
        if !is_known {
            self.warn(Reason::Superseded.as_str(), &accepted.message);
        }
    }

    fn warn(&mut self, reason: &str, message: &str) {
        let warning = Warning { reason: reason.to_owned(), message: message.to_owned() };
        if !self.warnings.contains(&warning) {
            self.warnings.push(warning);
        }
    }
}

/// Whether two references are the same once their defaults are filled in. An absent namespace is the route's own in both.
fn is_same(a: &ParentRef, b: &ParentRef) -> bool {
    let key = |it: &'_ ParentRef| (it.group().to_owned(), it.kind().to_owned());
    key(a) == key(b)
        && a.namespace == b.namespace
        && a.name == b.name
        && a.section_name == b.section_name
        && a.port == b.port
}

/// Whether a condition says that something is not as it was asked for.
fn is_bad(condition: &Condition) -> bool {
    let is_negative = [names::CONFLICTED, names::PARTIALLY_INVALID].contains(&condition.type_);
    match condition.status {
        ConditionStatus::True => is_negative,
        // What merely waits is no news.
        ConditionStatus::False => !is_negative && condition.reason != names::PENDING,
        ConditionStatus::Unknown => false,
    }
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).expect("statuses have nothing that JSON has not")
}

/// The kinds that carry a status of ours.
pub(super) const KINDS: [Kind; 4] = [Kind::GatewayClass, Kind::Gateway, Kind::ListenerSet, Kind::TcpRoute];

#[cfg(test)]
mod tests;
