//! Whatever comes, well-formed or not.

use std::sync::Arc;

use forwarder_gateway::manifests::{Gateway, ListenerSet, TcpRoute};
use forwarder_gateway::resolve::resolve;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{check_invariants, load, parse, settings, texts};

/// A creation time or none: of the latter kind are objects in files.
fn any_metadata(names: &[&'static str]) -> impl Strategy<Value = Value> + use<> {
    let created = proptest::option::of(texts(&["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]));
    let annotation = texts(&["", "1m", "a=1m", "x=0", "0, b=2s", ",", "=", "a=b=c"]);
    (texts(names), texts(&["app", "db"]), created, annotation).prop_map(|(name, namespace, created, text)| {
        let annotations = json!({"forwarder.dev/idle-timeout": text});
        json!({
            "name": name, "namespace": namespace, "creationTimestamp": created, "generation": 1,
            "annotations": annotations,
        })
    })
}

fn any_listeners() -> impl Strategy<Value = Vec<Value>> {
    let port = proptest::sample::select(vec![-1_i64, 0, 1, 2, 3, 70_000]);
    let protocol = texts(&["TCP", "TCP", "TCP", "TCP", "UDP", "HTTP", ""]);
    let allowed = proptest::sample::select(vec![
        Value::Null,
        json!({"namespaces": {"from": "All"}}),
        json!({"namespaces": {"from": "Selector", "selector": {"matchLabels": {"a": "b"}}}}),
        json!({"kinds": [{"kind": "UDPRoute"}]}),
    ]);
    let listener = (texts(&["a", "b", "c"]), port, protocol, allowed).prop_map(|(name, port, protocol, allowed)| {
        json!({"name": name, "port": port, "protocol": protocol, "allowedRoutes": allowed})
    });
    vec(listener, 0..4)
}

fn any_gateway() -> impl Strategy<Value = Value> {
    let addresses = vec(texts(&["10.0.0.1", "10.0.0.2", "::", "", "x"]), 0..3);
    let allowed = proptest::sample::select(vec![
        Value::Null,
        json!({"namespaces": {"from": "All"}}),
        json!({"namespaces": {"from": "Same"}}),
        json!({"namespaces": {"from": "Selector", "selector": {"matchLabels": {"a": "b"}}}}),
        json!({"namespaces": {"from": "Selector"}}),
    ]);
    (any_metadata(&["g1", "g2", "g3", "g4"]), addresses, any_listeners(), allowed).prop_map(
        |(metadata, addresses, listeners, allowed)| {
            let addresses: Vec<Value> = addresses.into_iter().map(|value| json!({"value": value})).collect();
            let spec = json!({
                "gatewayClassName": "tcp", "addresses": addresses, "listeners": listeners,
                "allowedListeners": allowed,
            });
            json!({"metadata": metadata, "spec": spec})
        },
    )
}

fn any_listener_set() -> impl Strategy<Value = Value> {
    let parent = (texts(&["g1", "g2", "g3", "g4", "g5"]), proptest::option::of(texts(&["app", "db"])));
    (any_metadata(&["g1", "g2", "s1", "s2"]), parent, any_listeners()).prop_map(
        |(metadata, (name, namespace), listeners)| {
            let parent = json!({"name": name, "namespace": namespace});
            json!({"metadata": metadata, "spec": {"parentRef": parent, "listeners": listeners}})
        },
    )
}

fn any_route() -> impl Strategy<Value = Value> {
    let section = proptest::option::of(texts(&["a", "b", "x"]));
    let port = proptest::option::of(0..4_i64);
    let namespace = || proptest::option::of(texts(&["app", "db"]));
    let kind = proptest::option::of(texts(&["Gateway", "ListenerSet"]));
    let name = texts(&["g1", "g2", "g3", "g4", "g5", "s1", "s2"]);
    let parent = (kind, name, namespace(), section, port).prop_map(|(kind, name, namespace, section, port)| {
        json!({"kind": kind, "name": name, "namespace": namespace, "sectionName": section, "port": port})
    });
    let weight = proptest::option::of(proptest::sample::select(vec![-1, 0, 7, i64::MAX]));
    let port = proptest::option::of(proptest::sample::select(vec![0_i64, 1, 2, 70_000]));
    let backend = (texts(&["s1", "s2", "s3"]), namespace(), port, weight).prop_map(
        |(name, namespace, port, weight)| {
            json!({"name": name, "namespace": namespace, "port": port, "weight": weight})
        },
    );
    let rules = vec(vec(backend, 0..3), 0..3);
    (any_metadata(&["r1", "r2", "r3", "r4", "r5"]), vec(parent, 0..4), rules).prop_map(
        |(metadata, parents, rules)| {
            let rules: Vec<Value> =
                rules.into_iter().map(|backends| json!({"backendRefs": backends})).collect();
            json!({"metadata": metadata, "spec": {"parentRefs": parents, "rules": rules}})
        },
    )
}

proptest! {
    /// Whatever comes, well-formed or not, resolving ends, and what it says of itself is consistent.
    #[test]
    fn anything_resolves_consistently(
        gateways in vec(any_gateway(), 0..6),
        sets in vec(any_listener_set(), 0..5),
        routes in vec(any_route(), 0..8),
    ) {
        let mut manifests = load(include_str!("anything.yaml"));
        for gateway in gateways {
            let gateway: Arc<Gateway> = parse(gateway);
            manifests.gateways.insert(gateway.metadata.namespaced_name(), gateway);
        }
        for set in sets {
            let set: Arc<ListenerSet> = parse(set);
            manifests.listener_sets.insert(set.metadata.namespaced_name(), set);
        }
        for route in routes {
            let route: Arc<TcpRoute> = parse(route);
            manifests.tcp_routes.insert(route.metadata.namespaced_name(), route);
        }
        check_invariants(&manifests, &resolve(&manifests, &settings()));
    }
}
