//! Changes in a cluster: how soon they are seen, and that nobody else notices.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::apiserver::require_kubernetes;
use forwarder_tests::client;
use forwarder_tests::cluster::condition;
use forwarder_tests::peer::{self, Server};
use forwarder_tests::served::{LISTENER, PORT, Served};
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{Load, require_root, serialise, wait_until};

/// They measure.
static ALONE: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(10);
const GRANT: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: routes, namespace: data}
spec:
  from: [{group: gateway.networking.k8s.io, kind: TCPRoute, namespace: default}]
  to: [{group: \"\", kind: Service}]
";

fn is_ready() -> bool {
    require_root() && require_kubernetes()
}

/// The greatest of the shortest share of some times.
fn percentile(times: &mut [Duration], share: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * share).div_ceil(100) - 1]
}

/// Waits until the route of listener `g` says this of its references.
fn wait_resolved(served: &Served, start: &str) {
    let is_said = |route: &serde_json::Value| {
        let said = condition(&route["status"]["parents"][0]["conditions"], "ResolvedRefs");
        said.is_some_and(|said| said.starts_with(start))
    };
    served.cluster.wait_object("v1/namespaces/default/tcproutes/g", is_said).expect("a status");
}

#[test]
fn a_removed_grant_resets_new_connections_within_a_second_until_it_is_back() {
    const ROUNDS: usize = 5;
    const SECOND: Duration = Duration::from_secs(1);
    if !is_ready() {
        return;
    }
    let _alone = serialise(&ALONE);
    let served = Served::start(&[]).unwrap();
    let api = &served.cluster.api;
    api.create_namespace("data").unwrap();
    served.cluster.create_backend("data", "db", &[served.two.address()]).unwrap();
    api.apply(GRANT).unwrap();
    served.cluster.create_route("g", "gw", ("data", "db")).unwrap();
    served.cluster.set_listeners("gw", &[("a", PORT), ("g", 9002)]).unwrap();
    served.wait_identity(9002, "two", WAIT);
    let other = Load::start(served.client(), served.address(PORT), 1, Duration::from_millis(5));
    let is_reset = || served.identity(9002).is_err();
    let (mut removed, mut restored) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        wait_resolved(&served, "True/ResolvedRefs");
        let session = client::connect(served.client(), served.address(9002)).unwrap();
        assert_eq!(client::read_line(&session).unwrap(), "two");
        api.delete_all(GRANT).unwrap();
        let start = Instant::now();
        wait_until("new connections are reset", WAIT, is_reset);
        removed.push(start.elapsed());
        let error = served.identity(9002).unwrap_err();
        let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        assert_eq!(kind, Some(std::io::ErrorKind::ConnectionReset), "{error:#}");
        assert!((0..20).all(|_| is_reset()), "every new connection is reset");
        client::ping(&session, b"still here").unwrap();
        wait_resolved(&served, "False/RefNotPermitted");
        api.apply(GRANT).unwrap();
        let start = Instant::now();
        served.wait_identity(9002, "two", WAIT);
        restored.push(start.elapsed());
    }
    println!("reset {removed:?} after the grant was removed, served {restored:?} after it was restored");
    assert!(removed.iter().all(|time| *time < SECOND), "{removed:?}");
    println!("the other listener: {:?}", other.finish().unwrap().answers);
}

#[test]
fn endpoints_replaced_a_hundred_times_under_load_fail_no_connection() {
    const ROLLS: u32 = 100;
    /// How many Pods there are at a time, and for how many rolls one that is not an endpoint any more still accepts.
    const PODS: usize = 3;
    const TERMINATING: usize = 2;
    if !is_ready() {
        return;
    }
    let _alone = serialise(&ALONE);
    let served = Served::start(&[]).unwrap();
    let topology = &served.cluster.topology;
    topology.add_numbered_addresses().unwrap();
    let pod = |number| {
        let address = topology.numbered_address(number, 5000);
        Server::start(&topology.backend1, address, peer::tell_address).unwrap()
    };
    let mut pods: VecDeque<Server> = (0..3).map(pod).collect();
    let mut endpoints: VecDeque<SocketAddr> = pods.iter().map(Server::address).collect();
    served.set_endpoints(endpoints.make_contiguous()).unwrap();
    served.agent.wait_endpoints(LISTENER, endpoints.make_contiguous());
    let sockets = served.node.netns.listening_inodes(PORT);
    let load = Load::start(served.client(), served.address(PORT), 2, Duration::from_millis(4));
    let mut sessions = Vec::new();
    let start = Instant::now();
    for roll in 0..ROLLS {
        if roll % 10 == 0 {
            sessions.push(served.session().unwrap());
        }
        let new = pod(u32::try_from(PODS).unwrap() + roll);
        endpoints.push_back(new.address());
        endpoints.pop_front();
        pods.push_back(new);
        served.set_endpoints(endpoints.make_contiguous()).unwrap();
        served.agent.wait_endpoints(LISTENER, endpoints.make_contiguous());
        // It takes no more connections, and those that it has go on.
        if pods.len() > PODS + TERMINATING {
            pods.pop_front();
        }
    }
    let took = start.elapsed();
    let count = load.count();
    for session in &sessions {
        client::ping(session, b"still here").unwrap();
    }
    let traffic = Traffic::start(sessions);
    traffic.wait_progress(WAIT);
    println!("{ROLLS} changes in {took:?}, {count} connections, {:.0} a second", {
        f64::from(u32::try_from(count).unwrap()) / took.as_secs_f64()
    });
    let made = load.finish().unwrap();
    traffic.finish().unwrap();
    println!("{} endpoints answered, the slowest in {:?}", made.answers.len(), made.slowest);
    assert!(made.answers.len() > usize::try_from(ROLLS).unwrap() / 2, "{:?}", made.answers);
    assert_eq!(served.node.netns.listening_inodes(PORT), sockets, "the listener was bound again");
}

#[test]
fn a_new_endpoint_is_used_within_a_second_of_its_slice() {
    const CHANGES: usize = 50;
    /// What was changed before has been dealt with.
    const APART: Duration = Duration::from_millis(200);
    if !is_ready() {
        return;
    }
    let _alone = serialise(&ALONE);
    let served = Served::start(&[]).unwrap();
    let servers = [(served.two.address(), "two"), (served.one.address(), "one")];
    let mut times = Vec::with_capacity(CHANGES);
    for (address, name) in servers.into_iter().cycle().take(CHANGES) {
        thread::park_timeout(APART);
        served.set_endpoints(&[address]).unwrap();
        let start = Instant::now();
        let end = start + WAIT;
        while served.identity(PORT).unwrap() != name {
            assert!(Instant::now() < end, "{address} is not used within {WAIT:?}");
        }
        times.push(start.elapsed());
    }
    let [half, most, all] = [50, 99, 100].map(|share| percentile(&mut times, share));
    println!("{CHANGES} changes of endpoints: p50 {half:?}, p99 {most:?}, max {all:?}");
    assert!(half < Duration::from_secs(1), "{times:?}");
}
