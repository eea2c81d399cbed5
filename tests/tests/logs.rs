//! What an operator reads at night: the log says what changed, once, and when it is well again; readiness says what is not served.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use forwarder_tests::client::{self, End};
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::{Agent, AgentCommand, BackendRef, Manifests, Topology, require_root, wait_until};

const WAIT: Duration = Duration::from_secs(10);
/// A level alone.
const LOG: &str = "debug";

/// An agent, what it reads, and its network.
struct Fixture {
    agent: Agent,
    manifests: Manifests,
    topology: Topology,
}

impl Fixture {
    /// A listener that leads to a port of the first host of backends, where nobody listens yet.
    fn start() -> Self {
        let topology = Topology::new().expect("a network");
        let endpoint = topology.backend1_address(ENDPOINT_PORT);
        let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
        let agent = Agent::start(&topology.node, &manifests.path(), &["--datapath", "splice", "--log", LOG])
            .expect("an agent");
        Self { agent, manifests, topology }
    }

    /// Waits until lines of the log with all of these words are as many as said.
    #[track_caller]
    fn wait_lines(&self, words: &[&str], count: usize) {
        let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
        wait_until(&format!("{count} lines with {words:?}"), WAIT, || {
            self.agent.log().lines().filter(has_all).count() == count
        });
    }
}

#[test]
fn a_backend_that_is_not_reached_is_told_once_and_so_is_that_it_is_again() {
    if !require_root() {
        return;
    }
    let fixture = Fixture::start();
    let address = fixture.topology.node_address(LISTENER_PORT);
    let (down, up) = (
        ["WARN", "no endpoint of the backend", "default/a:3306", "refused"],
        ["INFO", "an endpoint of the backend accepts connections again", "default/a:3306"],
    );
    for round in 1..=2 {
        for _ in 0..3 {
            assert_eq!(
                client::end_of_new(&fixture.topology.client, address, WAIT).expect("an end"),
                End::Reset
            );
        }
        fixture.wait_lines(&down, round);
        let endpoint = fixture.topology.backend1_address(ENDPOINT_PORT);
        let server =
            Server::start(&fixture.topology.backend1, endpoint, peer::identify("one")).expect("a server");
        for _ in 0..3 {
            assert_eq!(client::identity(&fixture.topology.client, address).expect("an answer"), "one");
        }
        fixture.wait_lines(&up, round);
        drop(server);
    }
}

#[test]
fn what_changes_is_told() {
    if !require_root() {
        return;
    }
    let fixture = Fixture::start();
    let Fixture { manifests, topology, .. } = &fixture;
    manifests
        .service("a", &[topology.backend1_address(ENDPOINT_PORT), topology.backend2_address(ENDPOINT_PORT)])
        .expect("a service");
    fixture.wait_lines(
        &["INFO", "the endpoints of a backend", "default/a:3306", "come=1", "gone=0", "endpoints=2"],
        1,
    );
    manifests.remove("route-a").expect("it is there");
    fixture.wait_lines(&["WARN", "no TCPRoute serves the listener any more", "default/gw/a", "default/a"], 1);
    fixture.wait_lines(&["WARN", "NoRoute"], 1);
    manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).expect("a route");
    fixture.wait_lines(&["INFO", "a route now serves the listener", "default/gw/a"], 1);
    fixture.wait_lines(&["INFO", "solved: ", "NoRoute"], 1);
    // The same at another line is nothing new.
    manifests
        .write("typo", "apiVersion: v1\nkind: Service\nmetadata: {name: t, lables: {}}\n")
        .expect("a file");
    fixture.wait_lines(&["ERROR", "did you mean labels?"], 1);
    manifests
        .write("typo", "# moved\napiVersion: v1\nkind: Service\nmetadata: {name: t, lables: {}}\n")
        .expect("a file");
    manifests
        .write("other", "apiVersion: v1\nkind: Namespace\nmetadata: {name: n, lables: {}}\n")
        .expect("a file");
    fixture.wait_lines(&["ERROR", "did you mean labels?"], 2);
    manifests.remove("typo").expect("it is there");
    fixture.wait_lines(&["INFO", "solved: ", "did you mean labels?", "Service default/t"], 1);
}

#[test]
fn an_agent_that_serves_nothing_of_what_it_should_is_not_ready() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().expect("a network");
    let manifests =
        Manifests::forward(LISTENER_PORT, &[topology.backend1_address(ENDPOINT_PORT)]).expect("manifests");
    let wrong = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: gw}\nspec: {gatewayclassName: forwarder}\n";
    manifests.write("gateway-gw", wrong).expect("a file");
    let command = AgentCommand::new(&["--datapath", "splice"]);
    let unready = |agent: &Agent, reason: &str| {
        wait_until(&format!("it is not ready: {reason}"), WAIT, || {
            agent.ready().is_ok_and(|ready| ready.status == 503 && ready.body.contains(reason))
        });
    };
    let agent = command.spawn(&topology.node, &manifests.path()).expect("an agent");
    unready(&agent, "did you mean gatewayClassName?");
    manifests.gateway(&[("a", LISTENER_PORT)]).expect("a gateway");
    agent.wait_ready().expect("it is ready");
    // What it serves already, it goes on to serve.
    manifests.write("gateway-gw", wrong).expect("a file");
    wait_until("the typo is seen", WAIT, || {
        agent.log().matches("did you mean gatewayClassName?").count() == 3
    });
    assert_eq!(agent.ready().expect("an answer").status, 200, "{}", agent.log());
    drop(agent);
    let agent = command.spawn(&topology.node, &manifests.beside("nothing-here")).expect("an agent");
    unready(&agent, "nothing is served: ");
}

/// What an endpoint knows of a connection leads to its client, and what libraries say to their authors hides nothing.
#[test]
fn the_address_that_an_endpoint_sees_leads_to_the_client() {
    if !require_root() {
        return;
    }
    let fixture = Fixture::start();
    let Fixture { agent, topology, .. } = &fixture;
    let tell_peer = |mut stream: &TcpStream| {
        writeln!(stream, "{}", stream.peer_addr()?)?;
        peer::echo(stream)
    };
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let _server = Server::start(&topology.backend1, endpoint, tell_peer).expect("a server");
    let seen = client::identity(&topology.client, topology.node_address(LISTENER_PORT)).expect("an answer");
    let (seen, client) = (format!("upstream.local={seen}"), "downstream.addr=10.");
    fixture.wait_lines(&["connection ended", &seen, client, "tier=\"splice\"", "end=\"finished\""], 1);
    assert!(!agent.log().contains(" aya_obj::"), "{}", agent.log());
}
