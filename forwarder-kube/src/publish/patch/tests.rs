use serde_json::json;

use super::*;
use forwarder_gateway::manifests::NamespacedName;
use forwarder_gateway::model::ListenerParent;

const OURS: &str = "forwarder.dev/tcp";
const NOW: &str = "2026-11-25T12:00:00Z";
const BEFORE: &str = "2026-11-01T00:00:00Z";

fn record(status: &Value) -> ObservedObject {
    ObservedObject {
        resource_version: "7".to_owned(),
        generation: 2,
        status: (!status.is_null()).then(|| status.to_string().into()),
        ..ObservedObject::default()
    }
}

fn accepted(generation: i64) -> Condition {
    Condition::holds(names::ACCEPTED, names::ACCEPTED, "serves mysql", generation)
}

fn reference(name: &str) -> ParentRef {
    ParentRef { name: name.to_owned(), section_name: Some("mysql".to_owned()), ..ParentRef::default() }
}

fn route_patch(status: &Value, parents: &[(ParentRef, &[Condition])]) -> Option<Patch> {
    patch_of(status, parents, false)
}

fn patch_of(status: &Value, parents: &[(ParentRef, &[Condition])], is_superseded: bool) -> Option<Patch> {
    let of_parent = |(_, conditions): &(ParentRef, &[Condition])| RouteParentStatus {
        parent_ref: 0,
        parent: ListenerParent::Gateway(NamespacedName::default()),
        section_name: None,
        port: None,
        is_superseded,
        conditions: conditions.to_vec(),
    };
    let statuses: Vec<RouteParentStatus> = parents.iter().map(of_parent).collect();
    let references = parents.iter().map(|(reference, _)| reference);
    let parents: Vec<Parent<'_>> =
        references.zip(&statuses).map(|(reference, status)| Parent { reference, status }).collect();
    patch(&record(status), Wanted::Route { controller: OURS, parents: &parents }, NOW)
}

fn condition(type_: &str, status: &str, since: &str) -> Value {
    json!({
        "type": type_, "status": status, "reason": type_, "message": "serves mysql",
        "observedGeneration": 2, "lastTransitionTime": since,
    })
}

fn foreign_parent(name: &str) -> Value {
    json!({
        "controllerName": "other.example/controller",
        "parentRef": { "name": name, "somethingNew": true },
        "conditions": [condition("Accepted", "False", BEFORE)],
        "unknown": { "field": [1, 2] },
    })
}

fn our_parent(name: &str, since: &str) -> Value {
    json!({
        "controllerName": OURS,
        "parentRef": { "name": name, "sectionName": "mysql" },
        "conditions": [condition("Accepted", "True", since)],
    })
}

#[test]
fn the_first_status_of_a_route_is_written_with_its_version() {
    let conditions = [accepted(2)];
    let patch = route_patch(&Value::Null, &[(reference("a"), &conditions)]).unwrap();
    assert_eq!(
        patch.body,
        json!({ "metadata": { "resourceVersion": "7" }, "status": { "parents": [our_parent("a", NOW)] } })
    );
    assert_eq!(patch.warnings, []);
}

#[test]
fn what_stands_there_already_is_not_written() {
    let conditions = [accepted(2)];
    let parents = [(reference("a"), &conditions[..])];
    let status = json!({ "parents": [our_parent("a", BEFORE)] });
    assert_eq!(route_patch(&status, &parents), None);
    // Nor is nothing, where nothing is.
    assert_eq!(route_patch(&Value::Null, &[]), None);
    assert_eq!(route_patch(&json!({ "parents": [] }), &[]), None);
}

#[test]
fn a_written_status_needs_no_second_write() {
    let conditions = [accepted(2), Condition::fails(names::RESOLVED_REFS, "BackendNotFound", "no a/b", 2)];
    let parents = [(reference("a"), &conditions[..]), (reference("b"), &conditions[..])];
    let status = json!({ "parents": [foreign_parent("a"), our_parent("gone", BEFORE)] });
    let patch = route_patch(&status, &parents).unwrap();
    assert_eq!(route_patch(&patch.body["status"], &parents), None);
}

#[test]
fn parents_of_other_controllers_stay_as_they_are_where_they_are() {
    let conditions = [accepted(2)];
    let status = json!({
        "parents": [foreign_parent("x"), our_parent("gone", BEFORE), our_parent("b", BEFORE), foreign_parent("y")],
    });
    let patch =
        route_patch(&status, &[(reference("a"), &conditions), (reference("b"), &conditions)]).unwrap();
    assert_eq!(
        patch.body["status"]["parents"],
        json!([foreign_parent("x"), our_parent("b", BEFORE), foreign_parent("y"), our_parent("a", NOW)])
    );
}

#[test]
fn ours_are_taken_away_when_the_route_has_left() {
    let status = json!({ "parents": [our_parent("a", BEFORE), foreign_parent("x")] });
    let patch = route_patch(&status, &[]).unwrap();
    assert_eq!(patch.body["status"]["parents"], json!([foreign_parent("x")]));
}

#[test]
fn the_time_of_a_condition_moves_with_its_status_alone() {
    let status = json!({ "parents": [our_parent("a", BEFORE)] });
    let said_otherwise = [Condition::holds(names::ACCEPTED, names::ACCEPTED, "superseded by b/c", 2)];
    let patch = route_patch(&status, &[(reference("a"), &said_otherwise)]).unwrap();
    let condition = &patch.body["status"]["parents"][0]["conditions"][0];
    assert_eq!(
        (&condition["lastTransitionTime"], &condition["message"]),
        (&json!(BEFORE), &json!("superseded by b/c"))
    );
    let refused = [Condition::fails(names::ACCEPTED, "NoMatchingParent", "no listener", 2)];
    let patch = route_patch(&status, &[(reference("a"), &refused)]).unwrap();
    assert_eq!(patch.body["status"]["parents"][0]["conditions"][0]["lastTransitionTime"], json!(NOW));
    let warning = Warning { reason: "NoMatchingParent".to_owned(), message: "no listener".to_owned() };
    assert_eq!(patch.warnings, [warning]);
}

#[test]
fn people_are_told_once_that_a_route_is_superseded() {
    let conditions = [Condition::holds(names::ACCEPTED, names::ACCEPTED, "superseded on mysql by b/c", 2)];
    let parents = [(reference("a"), &conditions[..])];
    let patch = patch_of(&Value::Null, &parents, true).unwrap();
    let warning =
        Warning { reason: "Superseded".to_owned(), message: "superseded on mysql by b/c".to_owned() };
    assert_eq!(patch.warnings, [warning]);
    // Another condition changes: this one has been told.
    let more = [conditions[0].clone(), Condition::holds(names::RESOLVED_REFS, names::RESOLVED_REFS, "", 2)];
    let patch = patch_of(&patch.body["status"], &[(reference("a"), &more)], true).unwrap();
    assert_eq!(patch.warnings, []);
}

#[test]
fn a_status_made_from_a_later_generation_is_left_alone() {
    let conditions = [accepted(1)];
    let status = json!({ "parents": [our_parent("a", BEFORE)] });
    assert_eq!(route_patch(&status, &[(reference("a"), &conditions)]), None);
}

#[test]
fn a_status_that_is_no_json_object_is_replaced() {
    let conditions = [accepted(2)];
    let parents = [(reference("a"), &conditions[..])];
    for status in [json!("text"), json!({ "parents": "text" }), json!({ "parents": [7, null] })] {
        let patch = route_patch(&status, &parents).unwrap();
        let written = patch.body["status"]["parents"].as_array().unwrap();
        assert!(written.contains(&our_parent("a", NOW)), "{status} {written:?}");
    }
}

#[test]
fn a_route_has_room_for_so_many_parents() {
    let conditions = [accepted(2)];
    let foreign: Vec<Value> = (0..31).map(|n| foreign_parent(&format!("x{n}"))).collect();
    let parents = [(reference("a"), &conditions[..]), (reference("b"), &conditions[..])];
    let patch = route_patch(&json!({ "parents": foreign }), &parents).unwrap();
    assert_eq!(patch.body["status"]["parents"].as_array().unwrap().len(), 32);
}

fn gateway(listeners: &[&str]) -> GatewayStatus {
    let listener = |name: &&str| ListenerStatus {
        name: (*name).to_owned(),
        conditions: vec![accepted(2)],
        ..ListenerStatus::default()
    };
    GatewayStatus {
        conditions: vec![accepted(2)],
        listeners: listeners.iter().map(listener).collect(),
        ..GatewayStatus::default()
    }
}

#[test]
fn foreign_conditions_of_a_gateway_stay_and_its_former_ones_go() {
    let status = json!({
        "addresses": [{ "type": "IPAddress", "value": "10.0.0.9" }],
        "conditions": [
            condition("example.com/Audited", "True", BEFORE),
            condition("Conflicted", "True", BEFORE),
            { "type": "Accepted", "status": "Unknown", "reason": "Pending", "message": "Waiting",
              "lastTransitionTime": "1970-01-01T00:00:00Z" },
        ],
        "listeners": [
            { "name": "gone", "attachedRoutes": 1, "supportedKinds": [], "conditions": [] },
            { "name": "mysql", "attachedRoutes": 1, "supportedKinds": [],
              "conditions": [condition("example.com/Audited", "True", BEFORE)] },
        ],
        "somethingElse": 7,
    });
    let wanted = gateway(&["mysql", "new"]);
    let patch = patch(&record(&status), Wanted::Gateway(&wanted), NOW).unwrap();
    let status = &patch.body["status"];
    assert_eq!(
        status["conditions"],
        json!([condition("example.com/Audited", "True", BEFORE), condition("Accepted", "True", NOW)])
    );
    assert_eq!(status["addresses"], json!([]));
    let listeners = status["listeners"].as_array().unwrap();
    assert_eq!(listeners.iter().map(|it| it["name"].as_str().unwrap()).collect::<Vec<_>>(), ["mysql", "new"]);
    assert_eq!(
        listeners[0]["conditions"],
        json!([condition("example.com/Audited", "True", BEFORE), condition("Accepted", "True", NOW)])
    );
    // It is required by the CRDs of releases before 1.5.
    assert_eq!(listeners[1]["supportedKinds"], json!([]));
    assert_eq!(super::patch(&record(status), Wanted::Gateway(&wanted), NOW), None);
}

#[test]
fn features_are_written_where_there_is_a_place_for_them() {
    let class = GatewayClassStatus { conditions: vec![accepted(2)] };
    let wanted = Wanted::GatewayClass { status: &class, features: Some(&["Gateway", "TCPRoute"]) };
    let patch = patch(&record(&Value::Null), wanted, NOW).unwrap();
    assert_eq!(
        patch.body["status"]["supportedFeatures"],
        json!([{ "name": "Gateway" }, { "name": "TCPRoute" }])
    );
    let wanted = Wanted::GatewayClass { status: &class, features: None };
    let patch = super::patch(&record(&Value::Null), wanted, NOW).unwrap();
    assert_eq!(patch.body["status"].get("supportedFeatures"), None);
}

#[test]
fn a_class_has_the_finalizer_while_it_is_used() {
    let with = |finalizers: &[&str], is_terminating| ObservedObject {
        resource_version: "7".to_owned(),
        finalizers: finalizers.iter().map(|it| (*it).to_owned()).collect(),
        is_terminating,
        ..ObservedObject::default()
    };
    let finalizers = |patch: Option<Value>| patch.map(|it| it["metadata"]["finalizers"].clone());
    assert_eq!(finalizers(finalizer_patch(&with(&["a"], false), true)), Some(json!(["a", FINALIZER])));
    assert_eq!(finalizers(finalizer_patch(&with(&["a", FINALIZER], true), false)), Some(json!(["a"])));
    assert_eq!(finalizer_patch(&with(&[FINALIZER], false), true), None);
    assert_eq!(finalizer_patch(&with(&[], false), false), None);
    // The API server refuses a new one on what is being deleted.
    assert_eq!(finalizer_patch(&with(&["a"], true), true), None);
}
