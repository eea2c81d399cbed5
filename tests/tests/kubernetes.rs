//! The case that the forwarder was made for, in a cluster: two databases behind one Gateway, and the second is served too.

use std::thread;

use forwarder_tests::apiserver::{Channel, require_kubernetes};
use forwarder_tests::cluster::{condition, has_condition};
use forwarder_tests::database::{Database, require_program};
use forwarder_tests::mariadb::query;
use forwarder_tests::{Cluster, require_root};
use serde_json::Value;

/// The examples, with the servers that the `StatefulSets` would run.
struct Databases {
    cluster: Cluster,
    _servers: [Database; 2],
}

impl Databases {
    fn start(cluster: Cluster) -> Self {
        let topology = &cluster.topology;
        let endpoints = [topology.backend1_address(3306), topology.backend2_address(3306)];
        let servers = thread::scope(|scope| {
            let one = scope.spawn(|| Database::mariadb(&topology.backend1, endpoints[0], 101));
            let two = scope.spawn(|| Database::mariadb(&topology.backend2, endpoints[1], 202));
            [one, two].map(|server| server.join().expect("no panic").expect("a server"))
        });
        cluster.api.create_namespace("databases").expect("a namespace");
        cluster.apply_examples(&["gatewayclass.yaml", "gateway.yaml", "databases.yaml"]).expect("examples");
        for (service, endpoint) in ["orders-db", "users-db"].into_iter().zip(endpoints) {
            cluster.create_slice("databases", service, "mysql", &[endpoint]).expect("a slice");
        }
        Self { cluster, _servers: servers }
    }

    /// Which servers answer at the two ports of the Gateway.
    fn servers(&self) -> [String; 2] {
        let topology = &self.cluster.topology;
        [3306, 3307].map(|port| {
            query(&topology.client, topology.node_address(port), "SELECT @@server_id").expect("an answer")
        })
    }
}

fn is_programmed(gateway: &Value) -> bool {
    has_condition(&gateway["status"]["conditions"], "Programmed", "True/Programmed")
}

#[test]
fn two_databases_behind_one_gateway_are_both_served_and_said_so() {
    if !require_root() || !require_kubernetes() || !require_program("mariadbd") {
        return;
    }
    let databases = Databases::start(Cluster::start("v1.6.1", Channel::Standard).unwrap());
    let cluster = &databases.cluster;
    cluster.apply_examples(&["routes-v1.yaml"]).unwrap();
    let agent = cluster.start_agent(&cluster.node(), &[]).unwrap();
    agent.wait_ready().unwrap();
    assert_eq!(databases.servers(), ["101", "202"]);

    let gateway = cluster.wait_object("v1/namespaces/databases/gateways/databases", is_programmed).unwrap();
    let status = &gateway["status"];
    assert_eq!(condition(&status["conditions"], "Accepted").as_deref(), Some("True/Accepted"));
    assert_eq!(condition(&status["conditions"], "Programmed").as_deref(), Some("True/Programmed 1/1 nodes"));
    assert_eq!(status["addresses"][0]["value"], "10.0.1.1");
    let attached = |index: usize| status["listeners"][index]["attachedRoutes"].as_i64();
    assert_eq!([attached(0), attached(1)], [Some(1), Some(1)]);
    for name in ["orders", "users"] {
        let path = format!("v1/namespaces/databases/tcproutes/{name}");
        let route = cluster.wait_object(&path, |route| route["status"]["parents"][0].is_object()).unwrap();
        let parent = &route["status"]["parents"][0];
        assert_eq!(parent["controllerName"], "forwarder.dev/tcp");
        assert_eq!(parent["parentRef"], route["spec"]["parentRefs"][0]);
        let accepted = condition(&parent["conditions"], "Accepted").unwrap();
        assert_eq!(accepted, format!("True/Accepted serves {name}"));
        assert_eq!(condition(&parent["conditions"], "ResolvedRefs").as_deref(), Some("True/ResolvedRefs"));
        assert_eq!(parent["conditions"][0]["observedGeneration"], route["metadata"]["generation"]);
    }
    let is_done = |class: &Value| {
        has_condition(&class["status"]["conditions"], "SupportedVersion", "True/SupportedVersion")
            && class["metadata"]["finalizers"][0] == "gateway-exists-finalizer.gateway.networking.k8s.io"
    };
    cluster.wait_object("v1/gatewayclasses/forwarder", is_done).unwrap();
}
