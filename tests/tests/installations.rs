//! Agents that serve a part of the cluster only: by the name of their controller, and by namespaces.

use forwarder_tests::apiserver::{Channel, require_kubernetes};
use forwarder_tests::client::{End, end_of_new};
use forwarder_tests::cluster::{CONTROLLER, DEADLINE, has_condition};
use forwarder_tests::gateways::{
    class, gateway, gateway_spec, is_current, is_programmed, parent, route, route_spec,
};
use forwarder_tests::{Agent, Cluster, require_root};
use serde_json::{Value, json};

/// The controller of the second installation.
const OTHER: &str = "other.example/tcp";

/// Two installations, each with an agent on a node of its own.
struct Two {
    _agents: [Agent; 2],
    cluster: Cluster,
}

impl Two {
    fn start() -> Self {
        let cluster = Cluster::start("v1.6.1", Channel::Standard).expect("a cluster");
        cluster.create_basics("apps").expect("a class and a namespace");
        let other = json!({ "controllerName": OTHER });
        cluster.create_object(&class("other"), &other).expect("a class");
        cluster.permit_class("other").expect("a permission");
        let [a, b, _] = cluster.nodes();
        let ours = cluster.start_agent(&a, &[]);
        let theirs = cluster.start_agent(&b.of_instance("other"), &["--controller-name", OTHER]);
        Self { _agents: [ours, theirs].map(|agent| agent.expect("an agent")), cluster }
    }

    /// Makes a Gateway of a class.
    fn create_gateway(&self, name: &str, class: &str, port: u16) {
        create_gateway(&self.cluster, ("apps", name), class, port);
    }

    fn wait(&self, path: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        self.cluster.wait_object(path, condition).expect("an object as expected")
    }

    /// Waits until a Gateway is programmed by one agent, on one node; yields its status.
    fn wait_programmed(&self, name: &str, address: &str) -> Value {
        let told = self.wait(&gateway("apps", name), |it| {
            is_programmed(it, "True/Programmed 1/1 nodes") && is_current(it)
        });
        assert_eq!(told["status"]["addresses"], json!([{ "type": "IPAddress", "value": address }]));
        told["status"].clone()
    }
}

fn create_gateway(cluster: &Cluster, (namespace, name): (&str, &str), class: &str, port: u16) {
    let mut spec = gateway_spec(&[("a", port)]);
    spec["gatewayClassName"] = class.into();
    spec["listeners"][0]["allowedRoutes"] = json!({ "namespaces": { "from": "All" } });
    cluster.create_object(&gateway(namespace, name), &spec).expect("a Gateway");
}

fn is_accepted_by(route: &Value, controller: &str) -> bool {
    has_condition(&parent(route, controller)["conditions"], "Accepted", "True/Accepted serves a")
}

#[test]
fn two_installations_leave_each_others_statuses_alone() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let two = Two::start();
    // The same port, for they are on different nodes.
    two.create_gateway("ours", "forwarder", 5000);
    two.create_gateway("theirs", "other", 5000);
    let parents = json!([{ "name": "ours" }, { "name": "theirs" }]);
    let path = route("apps", "both");
    two.cluster.create_object(&path, &route_spec(&parents, "none")).unwrap();
    let told = two.wait(&path, |it| [CONTROLLER, OTHER].iter().all(|name| is_accepted_by(it, name)));
    assert_eq!(told["status"]["parents"].as_array().map(Vec::len), Some(2), "{told:#}");
    for (controller, index) in [(CONTROLLER, 0), (OTHER, 1)] {
        assert_eq!(parent(&told, controller)["parentRef"], told["spec"]["parentRefs"][index]);
    }
    two.cluster.wait_settled().unwrap();
    let ours = two.wait_programmed("ours", "10.0.1.1");
    two.wait_programmed("theirs", "10.0.2.2");

    // Each takes away its own entry only.
    for (left, gone, name) in [(CONTROLLER, OTHER, "ours"), (OTHER, CONTROLLER, "theirs")] {
        two.cluster.change(&path, &json!({ "spec": { "parentRefs": [{ "name": name }] } })).unwrap();
        let told = two.wait(&path, |it| is_accepted_by(it, left) && parent(it, gone).is_null());
        assert_eq!(told["status"]["parents"].as_array().map(Vec::len), Some(1), "{told:#}");
    }
    two.cluster.wait_settled().unwrap();
    let mut expected = ours.clone();
    expected["listeners"][0]["attachedRoutes"] = 0.into();
    assert_eq!(two.wait_programmed("ours", "10.0.1.1"), expected);

    // A class is kept by the Gateways of its own, and let go by its own controller.
    for (name, of) in [("ours", "forwarder"), ("theirs", "other")] {
        let has_finalizer = |it: &Value| it["metadata"]["finalizers"].is_array();
        two.wait(&class(of), has_finalizer);
        two.cluster.delete_object(&gateway("apps", name)).unwrap();
        two.wait(&class(of), |it| !has_finalizer(it));
    }
}

#[test]
fn an_agent_for_some_namespaces_ignores_the_objects_of_others() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let cluster = Cluster::start("v1.6.1", Channel::Standard).unwrap();
    cluster.create_basics("watched").unwrap();
    for namespace in ["too", "ignored"] {
        cluster.api.create_namespace(namespace).unwrap();
    }
    let agent = cluster.start_agent(&cluster.node(), &["--watch-namespaces", "watched,too"]).unwrap();
    agent.wait_ready().unwrap();
    for (namespace, port) in [("ignored", 5000), ("watched", 5001), ("too", 5002)] {
        create_gateway(&cluster, (namespace, "gw"), "forwarder", port);
    }
    // From any namespace, as far as the Gateway is concerned.
    let parents = json!([{ "name": "gw", "namespace": "watched" }]);
    for namespace in ["ignored", "too"] {
        cluster.create_object(&route(namespace, "route"), &route_spec(&parents, "none")).unwrap();
    }
    cluster.wait_object(&route("too", "route"), |it| is_accepted_by(it, CONTROLLER)).unwrap();
    for namespace in ["watched", "too"] {
        let path = gateway(namespace, "gw");
        cluster.wait_object(&path, |it| is_programmed(it, "True/Programmed 1/1 nodes")).unwrap();
    }

    let ignored = cluster.object(&route("ignored", "route")).unwrap();
    assert!(ignored["status"].is_null(), "{ignored:#}");
    let ignored = cluster.object(&gateway("ignored", "gw")).unwrap();
    assert!(is_programmed(&ignored, "Unknown/Pending"), "{ignored:#}");
    let counts = |it: &Value| it["status"]["listeners"][0]["attachedRoutes"] == 1;
    cluster.wait_object(&gateway("watched", "gw"), counts).unwrap();
    let topology = &cluster.topology;
    assert!(topology.node.listening_inodes(5000).is_empty());
    assert!(!topology.node.listening_inodes(5001).is_empty());
    let end = end_of_new(&topology.client, topology.node_address(5000), DEADLINE).unwrap();
    assert_eq!(end, End::Reset);
    let writes = cluster.published().unwrap();
    assert!(writes.iter().all(|write| write.namespace != "ignored"), "{writes:#?}");
}
