//! The API server goes away, falls silent or forgets, and connections do not notice.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use forwarder_tests::apiserver::{Api, ApiError, Channel, require_kubernetes};
use forwarder_tests::client::{self, End};
use forwarder_tests::cluster::{Cluster, GATEWAY_API, has_condition};
use forwarder_tests::database::require_program;
use forwarder_tests::served::{LISTENER, PORT, ROUTES, Served};
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{AgentCommand, Load, NetNs, Topology, peer, require_root, wait_until};
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(20);
/// An agent that has waited for long asks again only some seconds later, at random.
const AGAIN: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(4);

fn is_ready() -> bool {
    require_root() && require_kubernetes()
}

/// Connections of both sorts: one that carries data all the time, and new ones.
struct Clients {
    traffic: Traffic,
    load: Load,
}

impl Clients {
    fn start(served: &Served) -> Self {
        let traffic = Traffic::start(vec![served.session().expect("a session")]);
        let load = Load::start(served.client(), served.address(PORT), 1, PAUSE);
        Self { traffic, load }
    }

    /// Watches both for some time, in which they go on.
    fn watch(&self, duration: Duration) {
        let start = Instant::now();
        while start.elapsed() < duration {
            self.traffic.wait_progress(WAIT);
            self.load.wait_more(10, WAIT);
            thread::park_timeout(Duration::from_millis(100));
        }
    }

    /// No connection has failed.
    fn finish(self) {
        let made = self.load.finish().expect("new connections");
        let bytes = self.traffic.finish().expect("the connection that carries data");
        println!("{:?}, the slowest in {:?}; {bytes} bytes both ways", made.answers, made.slowest);
    }
}

fn is_stale(served: &Served) -> bool {
    served.agent.metric("forwarder_kube_state_stale") == 1
}

fn is_accepted(route: &Value) -> bool {
    has_condition(&route["status"]["parents"][0]["conditions"], "Accepted", "True/Accepted")
}

/// Changes an endpoint, then a listener and a route, and tells how long each took to be seen.
fn change_everything(served: &Served) {
    let start = Instant::now();
    served.set_endpoints(&[served.two.address()]).expect("a change");
    served.wait_identity(PORT, "two", AGAIN);
    println!("the new endpoint was used {:?} after it was asked for", start.elapsed());
    served.cluster.set_listeners("gw", &[("a", PORT), ("b", 9002)]).expect("a change");
    served.cluster.create_route("b", "gw", ("default", "a")).expect("a route");
    served.wait_identity(9002, "two", AGAIN);
    println!("the new listener was served at {:?}", start.elapsed());
    let route = "v1/namespaces/default/tcproutes/b";
    served.cluster.api.wait_for(&format!("{GATEWAY_API}/{route}"), AGAIN, is_accepted).expect("a status");
    println!("the new route had its status at {:?}", start.elapsed());
}

#[test]
fn a_minute_without_the_api_server_disturbs_nobody_and_is_made_up_for() {
    if !is_ready() {
        return;
    }
    let mut served = Served::start(&[]).unwrap();
    let clients = Clients::start(&served);
    let sockets = served.node.netns.listening_inodes(PORT);
    assert!(!sockets.is_empty());
    served.cluster.server.stop();
    served.cluster.api.get("/readyz").unwrap_err();
    clients.watch(Duration::from_mins(1));
    assert!(served.agent.is_running());
    assert_eq!(served.agent.ready().unwrap().status, 200);
    assert!(!is_stale(&served), "what was read from the API server is no former agent's state");
    served.cluster.server.restart().unwrap();
    change_everything(&served);
    clients.watch(Duration::from_secs(1));
    clients.finish();
    assert_eq!(served.node.netns.listening_inodes(PORT), sockets, "the listener was bound again");
}

#[test]
fn a_silent_api_server_disturbs_nobody_and_is_made_up_for() {
    if !is_ready() {
        return;
    }
    let mut served = Served::start(&[]).unwrap();
    let clients = Clients::start(&served);
    let sockets = served.node.netns.listening_inodes(PORT);
    served.cluster.server.pause().unwrap();
    clients.watch(Duration::from_secs(10));
    assert_eq!(served.agent.ready().unwrap().status, 200);
    served.cluster.server.resume().unwrap();
    change_everything(&served);
    clients.finish();
    assert_eq!(served.node.netns.listening_inodes(PORT), sockets, "the listener was bound again");
}

#[test]
fn an_agent_replaced_while_the_api_server_is_away_goes_on_with_the_kept_state() {
    if !is_ready() {
        return;
    }
    let mut served = Served::start(&[]).unwrap();
    served.wait_kept("10.0.2.2").unwrap();
    let clients = Clients::start(&served);
    served.agent.wait_pairs(1);
    served.cluster.server.stop();
    clients.watch(Duration::from_secs(1));
    let start = Instant::now();
    served.agent.terminate().unwrap();
    let status = served.agent.wait(WAIT).expect("the agent leaves without the API server");
    println!("left after {:?}: {status}", start.elapsed());
    served.succeed().unwrap();
    served.agent.wait_ready().unwrap();
    println!("ready again after {:?}", start.elapsed());
    assert!(is_stale(&served));
    clients.watch(Duration::from_secs(1));
    served.cluster.server.restart().unwrap();
    wait_until("the state is the API server's again", AGAIN, || !is_stale(&served));
    change_everything(&served);
    clients.finish();
}

#[test]
fn an_agent_after_a_crash_starts_from_the_kept_state_and_learns_what_has_changed() {
    if !is_ready() {
        return;
    }
    let mut served = Served::start(&[]).unwrap();
    served.cluster.set_listeners("gw", &[("a", PORT), ("old", 9003)]).unwrap();
    served.cluster.create_route("old", "gw", ("default", "a")).unwrap();
    served.wait_identity(9003, "one", WAIT);
    served.wait_kept(r#""name":"old""#).unwrap();
    let traffic = Traffic::start(vec![served.session().unwrap()]);
    served.agent.wait_pairs(1);
    served.agent.kill().unwrap();
    served.set_endpoints(&[served.two.address()]).unwrap();
    served.cluster.set_listeners("gw", &[("a", PORT), ("new", 9004)]).unwrap();
    served.cluster.create_route("new", "gw", ("default", "a")).unwrap();
    served.cluster.api.delete(&format!("{ROUTES}/old")).unwrap();
    served.cluster.server.stop();

    let start = Instant::now();
    served.succeed().unwrap();
    served.agent.wait_ready().unwrap();
    println!("ready after {:?}", start.elapsed());
    assert!(is_stale(&served));
    assert_eq!([PORT, 9003].map(|port| served.identity(port).unwrap()), ["one", "one"]);
    let sockets = served.node.netns.listening_inodes(PORT);
    let load = Load::start(served.client(), served.address(PORT), 1, PAUSE);
    served.cluster.server.restart().unwrap();
    let start = Instant::now();
    served.wait_identity(PORT, "two", AGAIN);
    served.wait_identity(9004, "two", AGAIN);
    wait_until("the old listener is closed", WAIT, || served.node.netns.listening_inodes(9003).is_empty());
    println!("what has changed is in force {:?} after the API server is back", start.elapsed());
    assert!(!is_stale(&served));
    assert_eq!(served.node.netns.listening_inodes(PORT), sockets, "the listener was bound again");
    traffic.wait_progress(WAIT);
    load.finish().unwrap();
    traffic.finish().unwrap();
}

#[test]
fn an_agent_without_a_kept_state_waits_for_the_api_server_and_says_so() {
    if !is_ready() {
        return;
    }
    let mut served = Served::start(&[]).unwrap();
    served.agent.interrupt().unwrap();
    served.agent.wait(WAIT).expect("it ends");
    served.node.state_dir.set_file_name("another");
    served.cluster.server.stop();
    served.agent = served.cluster.run_agent(&served.node, &AgentCommand::new(&[])).unwrap();
    wait_until("it has looked for a state", WAIT, || served.agent.log().contains("no state was kept"));
    let ready = served.agent.ready().unwrap();
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("the Kubernetes API has not been read yet"), "{}", ready.body);
    assert!(served.agent.log().contains("cannot ask the Kubernetes API"), "{}", served.agent.log());
    assert!(served.agent.is_running());
    assert!(!is_stale(&served));
    assert!(served.node.netns.listening_inodes(PORT).is_empty());
    served.cluster.server.restart().unwrap();
    wait_until("it is ready", AGAIN, || served.agent.ready().is_ok_and(|ready| ready.status == 200));
    assert_eq!(served.identity(PORT).unwrap(), "one");
}

/// Drops what a host sends to a port, until it is dropped itself.
struct Cut<'a>(&'a NetNs);

impl<'a> Cut<'a> {
    fn new(netns: &'a NetNs, port: u16) -> Result<Self> {
        let rules = format!(
            "add table inet cut; add chain inet cut out {{ type filter hook output priority 0; }}; \
             add rule inet cut out tcp dport {port} drop"
        );
        netns.stdout(Command::new("nft").arg(rules))?;
        Ok(Self(netns))
    }
}

impl Drop for Cut<'_> {
    fn drop(&mut self) {
        self.0.stdout(Command::new("nft").arg("delete table inet cut")).expect("the table is there");
    }
}

/// Whether the API server cannot tell any more what has happened to routes since a version.
fn is_forgotten(api: &Api, version: &str) -> bool {
    let path = format!("{GATEWAY_API}/v1/tcproutes?watch=true&timeoutSeconds=1&resourceVersion={version}");
    match api.get(&path) {
        Ok(event) => event["type"] == "ERROR" && event["object"]["code"] == 410,
        Err(error) => ApiError::code_of(&error) == Some(410),
    }
}

/// Changes, deletes and makes objects, and has the API server forget how it came to that.
fn change_and_forget(served: &mut Served) {
    let version = served.cluster.api.get(&format!("{ROUTES}/b")).expect("a route");
    let version = version["metadata"]["resourceVersion"].as_str().expect("a version");
    let cluster = &mut served.cluster;
    let (one, two) = (served.one.address(), served.two.address());
    cluster.set_endpoints("default", "a", "tcp", &[one, two]).expect("a change");
    cluster.api.delete(&format!("{ROUTES}/b")).expect("a route");
    cluster.api.delete("/api/v1/namespaces/default/services/b").expect("a service");
    let slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
    cluster.api.delete(&format!("{slices}/b-1")).expect("a slice");
    cluster.create_route("c", "gw", ("default", "c")).expect("a route");
    cluster.create_backend("default", "c", &[two]).expect("a service");
    // What happens from its start on is all that it remembers.
    cluster.server.restart().expect("it starts again");
    wait_until("the API server has forgotten", WAIT, || is_forgotten(&cluster.api, version));
}

#[test]
fn an_agent_whose_watches_have_expired_ends_up_with_what_is_there() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    // An agent that does not share its network with the API server.
    let cluster = Cluster::start("v1.6.1", Channel::Standard).unwrap();
    let topology: Topology = cluster.topology.clone();
    let node = cluster.nodes()[1].clone();
    let mut served = Served::start_on(cluster, node, &["--log", "info,forwarder=debug"]).unwrap();
    served.cluster.create_backend("default", "b", &[served.two.address()]).unwrap();
    served.cluster.create_route("b", "gw", ("default", "b")).unwrap();
    served.cluster.set_listeners("gw", &[("a", PORT), ("b", 9002), ("c", 9003)]).unwrap();
    served.wait_identity(9002, "two", WAIT);
    let clients = Clients::start(&served);
    let sockets = || [PORT, 9002, 9003].map(|port| topology.backend1.listening_inodes(port));
    let before = sockets();

    served.cluster.server.stop();
    let cut = Cut::new(&topology.backend1, served.cluster.server.address().port()).unwrap();
    served.cluster.server.restart().unwrap();
    change_and_forget(&mut served);
    clients.watch(Duration::from_secs(1));
    assert_eq!(served.agent.endpoints(LISTENER), [served.one.address()], "the agent is cut off");
    assert_eq!(served.identity(9002).unwrap(), "two");
    assert!(!served.agent.log().contains("a watch starts over"));

    drop(cut);
    let start = Instant::now();
    served.wait_identity(9003, "two", AGAIN);
    let ends = |port| client::end_of_new(served.client(), served.address(port), peer::QUIET).unwrap();
    wait_until("the deleted route is not served", AGAIN, || ends(9002) == End::Reset);
    let both = [served.one.address(), served.two.address()];
    wait_until("all endpoints are used", AGAIN, || served.agent.endpoints(LISTENER) == both);
    println!("caught up {:?} after the cut", start.elapsed());
    assert!(served.agent.log().contains("a watch starts over"), "{}", served.agent.log());
    assert!(served.agent.endpoints("default/gw/b").is_empty());
    clients.watch(Duration::from_secs(1));
    clients.finish();
    assert_eq!(sockets(), before, "a listener was bound again");
}
