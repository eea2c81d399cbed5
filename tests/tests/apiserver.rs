//! The Kubernetes API that other tests talk to: what they conclude is only worth as much.

use std::time::{Duration, Instant};

use anyhow::Result;
use forwarder_tests::apiserver::{
    ADMIN, ApiError, Channel, Endpoint, Options, Pod, RELEASES, User, require_kubernetes,
};
use forwarder_tests::{Api, ApiServer, Topology, require_root};
use serde_json::{Value, json};

const WAIT: Duration = Duration::from_secs(20);
const GATEWAY_API: &str = "/apis/gateway.networking.k8s.io";
const GATEWAY: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/default/gateways/gw";

/// The version of TCPRoute that a release serves in a channel.
fn tcp_route_version(release: &str, channel: Channel) -> Option<&'static str> {
    match (release, channel) {
        ("v1.6.1", _) => Some("v1"),
        (_, Channel::Experimental) => Some("v1alpha2"),
        (_, Channel::Standard) => None,
    }
}

/// Creates a Gateway, and a TCPRoute in the version that is served, if one is.
fn create_gateway_and_route(api: &Api, version: Option<&str>) -> Result<()> {
    let listeners = json!([{"name": "a", "port": 9001, "protocol": "TCP"}]);
    let gateway = json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "Gateway",
        "metadata": {"name": "gw"},
        "spec": {"gatewayClassName": "forwarder", "listeners": listeners},
    });
    api.create(&format!("{GATEWAY_API}/v1/namespaces/default/gateways"), &gateway)?;
    let Some(version) = version else {
        assert_eq!(api.find(&format!("{GATEWAY_API}/v1alpha2/tcproutes"))?, None);
        return Ok(());
    };
    let route = format!(
        "apiVersion: gateway.networking.k8s.io/{version}\nkind: TCPRoute\nmetadata:\n  name: a\nspec:\n  \
         parentRefs: [{{name: gw}}]\n  rules:\n  - backendRefs: [{{name: db, port: 3306}}]\n"
    );
    api.apply(&route).map(drop)
}

#[test]
fn every_release_of_gateway_api_is_served() {
    if !require_kubernetes() {
        return;
    }
    let start = Instant::now();
    let mut server = ApiServer::start().unwrap();
    println!("started in {:?}", start.elapsed());
    let api = server.api().unwrap();
    for release in RELEASES {
        for channel in Channel::ALL {
            let start = Instant::now();
            api.install_crds(release, channel).unwrap();
            create_gateway_and_route(&api, tcp_route_version(release, channel)).unwrap();
            println!("{release} {channel:?} in {:?}", start.elapsed());
            if (release, channel) != ("v1.6.1", Channel::Experimental) {
                api.delete_crds(release, channel).unwrap();
                assert!(api.find(GATEWAY).unwrap().is_none());
            }
        }
    }
    let before = api.get(GATEWAY).unwrap();
    server.stop();
    api.get(GATEWAY).unwrap_err();
    let start = Instant::now();
    server.restart().unwrap();
    println!("restarted in {:?}", start.elapsed());
    let after = api.wait_for(GATEWAY, WAIT, |gateway| gateway["metadata"]["uid"].is_string()).unwrap();
    assert_eq!(before["metadata"]["uid"], after["metadata"]["uid"]);
    let routes = api.list(&format!("{GATEWAY_API}/v1/tcproutes")).unwrap();
    assert_eq!(routes.len(), 1);
    let text = server.kubectl(ADMIN, &["get", "gateways", "--all-namespaces", "--output=name"]).unwrap();
    assert_eq!(text.trim(), "gateway.gateway.networking.k8s.io/gw");
}

#[test]
fn users_may_do_what_they_are_granted_from_every_namespace() {
    if !require_kubernetes() || !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let address = topology.backend1_address_v6(0).ip();
    let options =
        Options { users: vec![User::new("reader")], ..Options::in_namespace(&topology.backend1, address) };
    let mut server = ApiServer::start_with(options).unwrap();
    let admin = server.api().unwrap();
    assert!(topology.node.connect(server.address()).is_ok());

    let pods = "/api/v1/namespaces/apps/pods";
    admin.create_namespace("apps").unwrap();
    let reader = server.api_as("reader").unwrap();
    assert_eq!(ApiError::code_of(&reader.list(pods).unwrap_err()), Some(403));
    admin.create_service_account("apps", "agent").unwrap();
    let token = admin.service_account_token("apps", "agent").unwrap();
    let agent = server.api_with(&token).unwrap();
    let rules = json!([{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "create"]}]);
    for (user, api) in [("reader", &reader), ("system:serviceaccount:apps:agent", &agent)] {
        admin.grant(user, &rules).unwrap();
        api.wait_for(pods, WAIT, |list| list["items"].as_array().is_some_and(Vec::is_empty)).unwrap();
        let error = api.create_service("apps", "db", &[]).unwrap_err();
        assert_eq!(ApiError::code_of(&error), Some(403), "{error:#}");
    }
    let refused = server.audit_writes().unwrap();
    let refused: Vec<&str> =
        refused.iter().filter(|write| write.code == 403).map(|write| write.user.as_str()).collect();
    assert_eq!(refused, ["reader", "system:serviceaccount:apps:agent"]);

    server.add_user(User::new("late")).unwrap();
    let late = server.api_as("late").unwrap();
    assert_eq!(ApiError::code_of(&late.list(pods).unwrap_err()), Some(403));
    let error = server.api_with("wrong").unwrap().get("/api").unwrap_err();
    assert_eq!(ApiError::code_of(&error), Some(401), "{error:#}");
    // A token outlives the server that made it.
    agent.list(pods).unwrap();
}

#[test]
fn what_controllers_would_make_is_made() {
    if !require_kubernetes() {
        return;
    }
    let mut server = ApiServer::start().unwrap();
    let api = server.api().unwrap();
    let pod = Pod {
        name: "db-0".to_owned(),
        labels: vec![("app".to_owned(), "db".to_owned())],
        node: "node1".to_owned(),
        phase: "Running".to_owned(),
        ready: true,
        daemon_set: None,
        host_ip: Some([10, 0, 1, 1].into()),
        pod_ip: Some([10, 0, 2, 2].into()),
    };
    let made = api.create_pod("default", &pod).unwrap();
    assert_eq!(made["status"]["podIPs"], json!([{"ip": "10.0.2.2"}]));
    assert_eq!(api.list("/api/v1/pods?labelSelector=app%3Ddb").unwrap().len(), 1);
    let service = api.create_service("default", "db", &[("mysql", 3306, json!("mysql"))]).unwrap();
    assert!(service["spec"]["clusterIP"].as_str().unwrap().starts_with("10.96."));
    let ports = [("mysql", 3306)];
    api.create_endpoint_slice("default", "db-1", "db", &ports, &[]).unwrap();
    let endpoint = Endpoint::ready([10, 0, 2, 2].into());
    let slice = api.replace_endpoint_slice("default", "db-1", "db", &ports, &[endpoint]).unwrap();
    assert_eq!(slice["endpoints"][0]["addresses"], json!(["10.0.2.2"]));

    let path = "/api/v1/namespaces/default/services/db";
    api.patch(path, &json!({"metadata": {"labels": {"a": "b"}}})).unwrap();
    let writes = server.audit_writes().unwrap();
    let ours: Vec<(&str, &str)> = writes
        .iter()
        .filter(|write| write.user == ADMIN)
        .map(|write| (write.verb.as_str(), write.resource.as_str()))
        .collect();
    let expected = [
        ("create", "pods"),
        ("patch", "pods/status"),
        ("create", "services"),
        ("create", "endpointslices"),
        ("update", "endpointslices"),
        ("patch", "services"),
    ];
    assert_eq!(ours, expected);

    server.pause().unwrap();
    server.resume().unwrap();
    api.delete(path).unwrap();
    api.wait_until_gone(path, WAIT).unwrap();
    assert_eq!(api.find(path).unwrap(), None::<Value>);
}
