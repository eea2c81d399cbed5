//! The CRDs of Gateway API come, change and go while an agent runs.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use forwarder_tests::apiserver::{Channel, require_kubernetes};
use forwarder_tests::client::{End, connect, end_of_new, ping, read_line};
use forwarder_tests::cluster::{DEADLINE, GATEWAY_API, condition, has_condition};
use forwarder_tests::databases::{PORTS, SERVERS};
use forwarder_tests::{Agent, Cluster, Databases, require_root, wait_until};
use serde_json::{Value, json};

/// How long a connection is looked at that should end at once.
const SHORTLY: Duration = Duration::from_millis(500);
const CLASS: &str = "v1/gatewayclasses/forwarder";
const ORDERS: &str = "v1/namespaces/databases/tcproutes/orders";
const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";
const ROUTES_CRD: &str =
    "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/tcproutes.gateway.networking.k8s.io";

fn can_run() -> bool {
    require_root() && require_kubernetes()
}

/// How often both databases were asked, on a connection that stays and on new ones, before `work` was done. All of
/// them must have answered.
fn under_traffic(databases: &Databases, work: impl FnOnce()) -> u64 {
    let is_done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| converse(databases, &is_done));
        // A failure has to end the traffic too.
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        is_done.store(true, Ordering::Relaxed);
        let rounds = traffic.join().expect("no panic");
        worked.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        rounds.expect("every connection is served")
    })
}

fn converse(databases: &Databases, is_done: &AtomicBool) -> Result<u64> {
    let topology = &databases.cluster.topology;
    let mut rounds = 0;
    let open = PORTS.map(|(port, _)| connect(&topology.client, topology.node_address(port)));
    for (stream, server) in open.iter().zip(SERVERS) {
        let stream = stream.as_ref().expect("an open connection");
        ensure!(read_line(stream)? == server, "another server answers");
    }
    while !is_done.load(Ordering::Relaxed) {
        for stream in &open {
            let stream = stream.as_ref().expect("an open connection");
            ping(stream, b"still there?").with_context(|| format!("the open connection, round {rounds}"))?;
        }
        let answers = databases.answers().with_context(|| format!("a new connection, round {rounds}"))?;
        ensure!(answers == SERVERS, "{answers:?} answer");
        rounds += 1;
    }
    Ok(rounds)
}

fn served(agent: &Agent, kind: &str, version: &str) -> bool {
    let labels = [("kind", kind), ("version", version)];
    agent.metrics().is_ok_and(|metrics| metrics.sum("forwarder_kube_kind_served", &labels) == 1)
}

/// What the agent says of kinds as a whole, as `TCPRoute`.
fn missing_kinds(agent: &Agent) -> Vec<String> {
    let state = agent.state().expect("a state");
    let problems = state["problems"].as_array().expect("problems");
    let missing = problems.iter().filter(|problem| {
        problem["reason"] == "UnsupportedKind"
            && problem["message"].as_str().is_some_and(|it| it.contains("install the CRDs"))
    });
    missing.filter_map(|problem| problem["field"].as_str().map(str::to_owned)).collect()
}

fn wait_served(databases: &Databases) {
    wait_until("both databases are served", DEADLINE, || {
        databases.answers().is_ok_and(|answers| answers == SERVERS)
    });
}

fn wait_without_routes(databases: &Databases) {
    let topology = &databases.cluster.topology;
    for (port, name) in PORTS {
        wait_until(&format!("{name} has no route"), DEADLINE, || {
            let end = end_of_new(&topology.client, topology.node_address(port), SHORTLY);
            matches!(end, Ok(End::Reset))
        });
    }
}

fn wait_closed(databases: &Databases) {
    wait_until("the listeners close, for the Gateway is gone", DEADLINE, || {
        databases.listening().iter().all(Vec::is_empty)
    });
}

/// The class and the routes say that they are of release v1.6.1, and a change of a route arrives.
fn assert_up_to_date(databases: &Databases, agent: &Agent) {
    let cluster = &databases.cluster;
    let said = "True/SupportedVersion the CRDs of the Gateway API are of release v1.6.1";
    let is_said = |class: &Value| {
        condition(&class["status"]["conditions"], "SupportedVersion").as_deref() == Some(said)
    };
    cluster.wait_object(CLASS, is_said).expect("a class of the new release");
    let backend = json!([{"backendRefs": [{"name": "users-db", "port": 3306}]}]);
    let path = format!("{GATEWAY_API}/{ORDERS}");
    cluster.api.patch(&path, &json!({"spec": {"rules": backend}})).expect("a changed route");
    wait_until("the change of the route arrives", DEADLINE, || {
        databases.answers().is_ok_and(|answers| answers == [SERVERS[1]; 2])
    });
    let is_seen = |route: &Value| {
        let conditions = &route["status"]["parents"][0]["conditions"];
        has_condition(conditions, "Accepted", "True/Accepted")
            && conditions[0]["observedGeneration"] == route["metadata"]["generation"]
    };
    let route = cluster.wait_object(ORDERS, is_seen).expect("a route with a status");
    assert_eq!(route["metadata"]["generation"], 2, "the upgrade does not change routes");
    let failed = [("result", "failed")];
    let metrics = agent.metrics().expect("metrics");
    assert_eq!(metrics.sum("forwarder_kube_status_writes_total", &failed), 0, "{}", agent.log());
}

/// The databases, served by an agent with the CRDs of a release.
fn served_by(release: &str, channel: Channel) -> (Databases, Agent) {
    let databases = Databases::stand_ins(Cluster::start(release, channel).expect("a cluster"));
    let databases = databases.expect("servers");
    let version = if release == "v1.6.1" { "v1" } else { "v1alpha2" };
    databases.declare_gateway().expect("class and Gateway");
    databases.declare_routes(version).expect("routes");
    let agent = databases.cluster.start_agent(&databases.cluster.node(), &[]).expect("an agent");
    agent.wait_ready().expect("a ready agent");
    wait_served(&databases);
    assert!(served(&agent, "TCPRoute", version));
    (databases, agent)
}

/// Upgrades, and waits until the agent reads the routes as `v1`; all is served meanwhile, by the same sockets.
fn upgrade(databases: &Databases, agent: &Agent, channel: Channel) {
    let sockets = databases.listening();
    let rounds = under_traffic(databases, || {
        databases.cluster.api.install_crds("v1.6.1", channel).expect("the new CRDs");
        wait_until("the routes are read as v1", DEADLINE, || served(agent, "TCPRoute", "v1"));
        wait_until("nothing is missing", DEADLINE, || missing_kinds(agent).is_empty());
    });
    assert!(rounds > 10, "{rounds} rounds");
    assert_eq!(databases.listening(), sockets);
}

#[test]
fn an_upgrade_within_the_experimental_channel_and_then_to_standard_is_not_noticed() {
    if !can_run() {
        return;
    }
    let (databases, agent) = served_by("v1.5.1", Channel::Experimental);
    let api = &databases.cluster.api;
    upgrade(&databases, &agent, Channel::Experimental);
    let crd = api.get(ROUTES_CRD).unwrap();
    assert_eq!(crd["status"]["storedVersions"], json!(["v1alpha2", "v1"]));
    // What a careful operator does before v1alpha2 goes: all objects are written anew, so that v1 is all that is stored.
    for (_, name) in PORTS {
        let path = format!("{GATEWAY_API}/v1/namespaces/databases/tcproutes/{name}");
        api.replace(&path, &api.get(&path).unwrap()).unwrap();
    }
    api.patch(&format!("{ROUTES_CRD}/status"), &json!({"status": {"storedVersions": ["v1"]}})).unwrap();
    upgrade(&databases, &agent, Channel::Standard);
    assert_eq!(api.find(&format!("{GATEWAY_API}/v1alpha2/tcproutes")).unwrap(), None);
    assert_up_to_date(&databases, &agent);
}

#[test]
fn an_upgrade_to_the_standard_channel_that_serves_routes_in_another_version_is_not_noticed() {
    if !can_run() {
        return;
    }
    let (databases, agent) = served_by("v1.5.1", Channel::Experimental);
    upgrade(&databases, &agent, Channel::Standard);
    assert_eq!(databases.cluster.api.find(&format!("{GATEWAY_API}/v1alpha2/tcproutes")).unwrap(), None);
    assert_up_to_date(&databases, &agent);
}

#[test]
fn crds_that_are_missing_at_first_are_waited_for_one_by_one() {
    if !can_run() {
        return;
    }
    let databases = Databases::stand_ins(Cluster::without_crds().unwrap()).unwrap();
    let (cluster, api) = (&databases.cluster, &databases.cluster.api);
    let agent = cluster.start_agent(&cluster.node(), &[]).unwrap();
    agent.wait_ready().unwrap();
    let mut missing = missing_kinds(&agent);
    missing.sort();
    assert_eq!(missing, ["Gateway", "GatewayClass", "ListenerSet", "ReferenceGrant", "TCPRoute"]);

    api.install_crds_of("v1.6.1", Channel::Standard, |plural| plural != "tcproutes").unwrap();
    databases.declare_gateway().unwrap();
    wait_until("only TCPRoute is missing", DEADLINE, || missing_kinds(&agent) == ["TCPRoute"]);
    wait_until("the Gateway's ports are open", DEADLINE, || {
        databases.listening().iter().all(|sockets| !sockets.is_empty())
    });
    let sockets = databases.listening();
    let topology = &cluster.topology;
    for (port, _) in PORTS {
        let end = end_of_new(&topology.client, topology.node_address(port), DEADLINE);
        assert_eq!(end.unwrap(), End::Reset);
    }

    api.install_crds_of("v1.6.1", Channel::Standard, |plural| plural == "tcproutes").unwrap();
    databases.declare_routes("v1").unwrap();
    wait_served(&databases);
    assert_eq!(missing_kinds(&agent), [""; 0]);
    assert_eq!(databases.listening(), sockets);
    assert_up_to_date(&databases, &agent);
}

#[test]
fn crds_that_are_deleted_take_their_objects_away_and_may_come_again() {
    if !can_run() {
        return;
    }
    let (databases, mut agent) = served_by("v1.6.1", Channel::Standard);
    let (cluster, api) = (&databases.cluster, &databases.cluster.api);
    let (sockets, topology) = (databases.listening(), &cluster.topology);
    let open = connect(&topology.client, topology.node_address(PORTS[0].0)).unwrap();
    assert_eq!(read_line(&open).unwrap(), SERVERS[0]);

    api.delete_crd("tcproutes.gateway.networking.k8s.io").unwrap();
    wait_without_routes(&databases);
    wait_until("TCPRoute is missing", DEADLINE, || missing_kinds(&agent) == ["TCPRoute"]);
    assert_eq!(databases.listening(), sockets, "the Gateway is there still");
    ping(&open, b"removed routes keep their connections").unwrap();

    api.install_crds_of("v1.6.1", Channel::Standard, |plural| plural == "tcproutes").unwrap();
    api.delete_crds("v1.6.1", Channel::Standard).unwrap();
    wait_closed(&databases);
    wait_until("everything is missing", DEADLINE, || missing_kinds(&agent).len() == 5);
    assert!(agent.is_running());
    assert_eq!(agent.ready().unwrap().status, 200);
    ping(&open, b"removed listeners too").unwrap();

    api.install_crds("v1.6.1", Channel::Experimental).unwrap();
    databases.declare_gateway().unwrap();
    databases.declare_routes("v1").unwrap();
    wait_served(&databases);
    assert_up_to_date(&databases, &agent);
}

#[test]
fn a_crd_whose_objects_take_long_to_delete_leaves_none_in_force() {
    if !can_run() {
        return;
    }
    let (databases, _agent) = served_by("v1.6.1", Channel::Standard);
    let api = &databases.cluster.api;
    let rules = json!([{"backendRefs": [{"name": "orders-db", "port": 3306}]}]);
    let spec = json!({"parentRefs": [{"name": "elsewhere"}], "rules": rules});
    for index in 0..300 {
        let route = json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "TCPRoute",
            "metadata": {"name": format!("a-{index}")}, "spec": spec,
        });
        api.create(&format!("{GATEWAY_API}/v1/namespaces/databases/tcproutes"), &route).unwrap();
    }
    api.delete_crd("tcproutes.gateway.networking.k8s.io").unwrap();
    wait_without_routes(&databases);
}

#[test]
fn a_class_is_let_go_when_crds_are_deleted_in_the_order_of_their_names() {
    if !can_run() {
        return;
    }
    let (databases, _agent) = served_by("v1.6.1", Channel::Standard);
    let (cluster, api) = (&databases.cluster, &databases.cluster.api);
    cluster.wait_object(CLASS, |class| class["metadata"]["finalizers"][0].is_string()).unwrap();
    let crds = ["gatewayclasses", "gateways", "listenersets", "tcproutes"]
        .map(|plural| format!("{CRDS}/{plural}.gateway.networking.k8s.io"));
    for crd in &crds {
        api.delete(crd).unwrap();
    }
    wait_closed(&databases);
    for crd in &crds {
        api.wait_until_gone(crd, DEADLINE).unwrap();
    }
}

#[test]
fn crds_that_are_deleted_while_nobody_watches_take_their_objects_away() {
    if !can_run() {
        return;
    }
    let (mut databases, agent) = served_by("v1.6.1", Channel::Standard);
    let id = agent.id().to_string();
    let signal = |name: &str| Command::new("kill").args([name, &id]).status().unwrap();
    signal("-STOP");
    // The watches end here, so that the deletions after it are told by none.
    databases.cluster.server.restart().unwrap();
    databases.cluster.api.delete_crd("tcproutes.gateway.networking.k8s.io").unwrap();
    signal("-CONT");
    wait_until("TCPRoute is missing", DEADLINE, || missing_kinds(&agent) == ["TCPRoute"]);
    wait_without_routes(&databases);
}
