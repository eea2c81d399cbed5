//! Every release of Gateway API in every channel, with the two databases behind one Gateway.

use std::time::Duration;

use forwarder_tests::apiserver::{Channel, RELEASES, require_kubernetes};
use forwarder_tests::client::{End, end_of_new};
use forwarder_tests::cluster::{DEADLINE, condition, has_condition};
use forwarder_tests::database::require_program;
use forwarder_tests::databases::{PORTS, SERVERS};
use forwarder_tests::{Agent, Cluster, Databases, require_root, wait_for, wait_until};
use serde_json::{Value, json};

/// For so long nothing is written, once everything is.
const QUIET: Duration = Duration::from_secs(3);
const CLASS: &str = "v1/gatewayclasses/forwarder";
const GATEWAY: &str = "v1/namespaces/databases/gateways/databases";
/// What the agent serves, as conformance names it.
const FEATURES: [&str; 5] =
    ["Gateway", "GatewayStaticAddresses", "ListenerSet", "ReferenceGrant", "TCPRoute"];

/// A release in a channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Case {
    release: &'static str,
    channel: Channel,
}

impl Case {
    /// The version of TCPRoute that is served, if one is.
    fn routes(self) -> Option<&'static str> {
        match (self.release, self.channel) {
            ("v1.6.1", _) => Some("v1"),
            (_, Channel::Experimental) => Some("v1alpha2"),
            (_, Channel::Standard) => None,
        }
    }

    /// The kinds that the agent would read and the release does not have.
    fn missing(self) -> Vec<&'static str> {
        let has_listener_sets = ["v1.5.1", "v1.6.1"].contains(&self.release);
        let listener_sets = (!has_listener_sets).then_some("ListenerSet");
        let routes = self.routes().is_none().then_some("TCPRoute");
        listener_sets.into_iter().chain(routes).collect()
    }

    /// The features, where a GatewayClass has room for them in every channel. v1.0 and v1.1 have them as strings.
    fn features(self) -> Value {
        match self.release {
            "v1.0.0" | "v1.1.0" | "v1.2.1" => Value::Null,
            _ => FEATURES.iter().map(|name| json!({"name": name})).collect(),
        }
    }

    fn assert_served(self, databases: &Databases, agent: &Agent) {
        databases.declare_gateway().expect("class and Gateway");
        if let Some(version) = self.routes() {
            databases.declare_routes(version).expect("routes");
        }
        self.assert_kinds(agent);
        self.assert_class(&databases.cluster);
        self.assert_gateway(&databases.cluster);
        if let Some(version) = self.routes() {
            assert_routes(&databases.cluster, version);
            wait_until("both databases are served", DEADLINE, || {
                databases.answers().is_ok_and(|answers| answers == SERVERS)
            });
        } else {
            assert_open_without_routes(databases);
        }
        assert_eq!(agent.ready().expect("an answer").status, 200);
        assert_no_more_writes(agent);
        assert_eq!(status_writes(agent, "failed"), 0, "{}", agent.log());
    }

    fn assert_kinds(self, agent: &Agent) {
        let version = self.routes();
        let labels = [("kind", "TCPRoute"), ("version", version.unwrap_or_default())];
        wait_until("TCPRoute is read in the version that is served", DEADLINE, || {
            let metrics = agent.metrics().expect("metrics");
            let served = |labels: &[_]| metrics.sum("forwarder_kube_kind_served", labels);
            let is_found = i64::from(version.is_some());
            (served(&labels), served(&labels[..1])) == (is_found, is_found)
        });
        wait_until(&format!("{:?} is said to be missing", self.missing()), DEADLINE, || {
            missing_kinds(agent) == self.missing()
        });
    }

    fn assert_class(self, cluster: &Cluster) {
        let said =
            format!("True/SupportedVersion the CRDs of the Gateway API are of release {}", self.release);
        let class = cluster.wait_object(CLASS, |class| {
            condition(&class["status"]["conditions"], "SupportedVersion").as_ref() == Some(&said)
                && class["metadata"]["finalizers"][0].is_string()
        });
        let class = class.expect("a class with a status");
        assert_eq!(condition(&class["status"]["conditions"], "Accepted").as_deref(), Some("True/Accepted"));
        assert_eq!(class["status"]["supportedFeatures"], self.features());
    }

    fn assert_gateway(self, cluster: &Cluster) {
        let attached = i64::from(self.routes().is_some());
        let gateway = cluster.wait_object(GATEWAY, |gateway| {
            let status = &gateway["status"];
            let programmed = condition(&status["conditions"], "Programmed");
            programmed.as_deref() == Some("True/Programmed 1/1 nodes")
                && (0..2).all(|index| status["listeners"][index]["attachedRoutes"] == attached)
        });
        let gateway = gateway.expect("a Gateway with a status");
        let kinds = json!([{"group": "gateway.networking.k8s.io", "kind": "TCPRoute"}]);
        for (index, (_, name)) in PORTS.into_iter().enumerate() {
            let listener = &gateway["status"]["listeners"][index];
            assert_eq!(listener["name"], name);
            assert_eq!(listener["supportedKinds"], kinds, "{name}");
            assert!(has_condition(&listener["conditions"], "Accepted", "True/Accepted"), "{listener}");
            assert!(has_condition(&listener["conditions"], "Programmed", "True/Programmed"), "{listener}");
        }
    }
}

fn assert_routes(cluster: &Cluster, version: &str) {
    for (_, name) in PORTS {
        let path = format!("{version}/namespaces/databases/tcproutes/{name}");
        let route = cluster.wait_object(&path, |route| {
            let conditions = &route["status"]["parents"][0]["conditions"];
            condition(conditions, "Accepted") == Some(format!("True/Accepted serves {name}"))
        });
        let conditions = &route.expect("a route with a status")["status"]["parents"][0]["conditions"];
        assert_eq!(condition(conditions, "ResolvedRefs").as_deref(), Some("True/ResolvedRefs"));
    }
}

/// Nothing is written again and again.
fn assert_no_more_writes(agent: &Agent) {
    let before = status_writes(agent, "written");
    let more = wait_for(QUIET, || (status_writes(agent, "written") > before).then_some(()));
    assert_eq!(more, None, "a status was written though nothing had changed\n{}", agent.log());
}

/// The Gateway's ports are open, and who connects is reset.
fn assert_open_without_routes(databases: &Databases) {
    let topology = &databases.cluster.topology;
    for ((port, name), sockets) in PORTS.into_iter().zip(databases.listening()) {
        assert!(!sockets.is_empty(), "{name} is not bound");
        let end = end_of_new(&topology.client, topology.node_address(port), DEADLINE);
        assert_eq!(end.expect("an end"), End::Reset, "{name}");
    }
}

/// The kinds of which the agent says that the cluster does not serve them.
fn missing_kinds(agent: &Agent) -> Vec<String> {
    let state = agent.state().expect("a state");
    let problems = state["problems"].as_array().expect("problems");
    let missing = problems
        .iter()
        .filter(|problem| problem["severity"] == "warning" && problem["reason"] == "UnsupportedKind")
        .filter(|problem| {
            problem["message"].as_str().is_some_and(|it| it.contains("install the CRDs of the Gateway API"))
        });
    missing.filter_map(|problem| problem["field"].as_str().map(str::to_owned)).collect()
}

fn status_writes(agent: &Agent, result: &str) -> i64 {
    let metrics = agent.metrics().expect("metrics");
    assert!(metrics.has("forwarder_kube_status_writes_total"));
    metrics.sum("forwarder_kube_status_writes_total", &[("result", result)])
}

fn can_run() -> bool {
    require_root() && require_kubernetes() && require_program("mariadbd")
}

/// One agent, and one release of a channel after another, with nothing in between.
fn serve_every_release(channel: Channel) {
    let databases = Databases::mariadb(Cluster::without_crds().expect("a cluster")).expect("servers");
    let cluster = &databases.cluster;
    let mut agent = cluster.start_agent(&cluster.node(), &[]).expect("an agent");
    agent.wait_ready().expect("a ready agent");
    for release in RELEASES {
        let case = Case { release, channel };
        cluster.api.install_crds(release, channel).expect("CRDs");
        case.assert_served(&databases, &agent);
        // The API server takes five seconds more for a CRD that has objects.
        if let Some(version) = case.routes() {
            databases.withdraw_routes(version).expect("no routes");
        }
        databases.withdraw_gateway().expect("no Gateway");
        cluster.api.delete_crds(release, channel).expect("no CRDs");
        wait_until("the listeners close, for the Gateway is gone", DEADLINE, || {
            databases.listening().iter().all(Vec::is_empty)
        });
    }
    assert!(agent.is_running());
}

#[test]
fn one_agent_serves_every_release_of_the_standard_channel_with_or_without_routes() {
    if can_run() {
        serve_every_release(Channel::Standard);
    }
}

#[test]
fn one_agent_serves_every_release_of_the_experimental_channel() {
    if can_run() {
        serve_every_release(Channel::Experimental);
    }
}

#[test]
fn an_agent_that_starts_finds_an_old_release() {
    if !can_run() {
        return;
    }
    let case = Case { release: "v1.0.0", channel: Channel::Experimental };
    let cluster = Cluster::start(case.release, case.channel).unwrap();
    let databases = Databases::mariadb(cluster).unwrap();
    databases.declare_gateway().unwrap();
    databases.declare_routes("v1alpha2").unwrap();
    let cluster = &databases.cluster;
    let agent = cluster.start_agent(&cluster.node(), &[]).unwrap();
    agent.wait_ready().unwrap();
    assert_eq!(databases.answers().unwrap(), SERVERS);
    case.assert_served(&databases, &agent);
}

#[test]
fn an_unknown_release_is_said_so_and_served_all_the_same() {
    if !can_run() {
        return;
    }
    let case = Case { release: "v1.6.1", channel: Channel::Standard };
    let databases = Databases::stand_ins(Cluster::start(case.release, case.channel).unwrap()).unwrap();
    let cluster = &databases.cluster;
    let agent = cluster.start_agent(&cluster.node(), &[]).unwrap();
    case.assert_served(&databases, &agent);
    let sockets = databases.listening();

    cluster.api.set_release("v9.0.0").unwrap();
    let class = cluster.wait_object(CLASS, |class| {
        let condition = condition(&class["status"]["conditions"], "SupportedVersion");
        condition.is_some_and(|it| it.starts_with("False/UnsupportedVersion") && !it.contains("v1.6.1"))
    });
    let conditions = &class.unwrap()["status"]["conditions"];
    let said = condition(conditions, "SupportedVersion").unwrap();
    assert!(said.contains("release v9.0.0;") && said.contains("v1.0 to v1.6"), "{said}");
    assert_eq!(condition(conditions, "Accepted").as_deref(), Some("True/Accepted"));
    assert_eq!(databases.answers().unwrap(), SERVERS);
    let gateway = cluster.wait_object(GATEWAY, |_| true).unwrap();
    assert!(has_condition(&gateway["status"]["conditions"], "Programmed", "True/Programmed"), "{gateway}");

    cluster.api.set_release(case.release).unwrap();
    case.assert_served(&databases, &agent);
    assert_eq!(databases.listening(), sockets);
}
