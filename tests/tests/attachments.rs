//! Where the programs hang: beside those of another installation, and again where somebody has removed them.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use forwarder_tests::agent::binary;
use forwarder_tests::attach::is_by_clsact;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::peer::Server;
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{
    Agent, AgentCommand, BackendRef, Forwarding, Manifests, Topology, client, peer, process, serialise,
    wait_until,
};

static HEAVY: Mutex<()> = Mutex::new(());
/// A deadline for what a lost packet may delay.
const LONG: Duration = Duration::from_secs(25);
/// How many connections each installation has.
const FLOWS: usize = 5;
/// The admin interface of the second installation.
const OTHER_ADMIN: &str = "127.0.0.1:9903";
/// How often programs were attached again.
const RESTORED: &str = "forwarder_attachments_restored_total";

/// An agent of an installation of its own, and connections that it has taken into the kernel.
struct Installation {
    agent: Agent,
    manifests: Manifests,
    address: SocketAddr,
    traffic: Traffic,
}

impl Installation {
    fn start(topology: &Topology, command: &AgentCommand, port: u16) -> Self {
        let manifests =
            Manifests::forward(port, &[topology.backend1_address(ENDPOINT_PORT)]).expect("manifests");
        let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
        let address = topology.node_address(port);
        let streams: Vec<TcpStream> =
            (0..FLOWS).map(|_| client::connect(&topology.client, address).expect("a connection")).collect();
        agent.offload(&streams);
        let traffic = Traffic::start(streams);
        traffic.wait_progress(LONG);
        Self { agent, manifests, address, traffic }
    }

    /// Starts an agent on the pins of the present one, which has ended.
    fn succeed(&mut self, topology: &Topology) {
        let command = AgentCommand::new(&AT_ONCE).succeeding(&self.agent);
        self.agent = command.start(&topology.node, &self.manifests.path()).expect("an agent");
    }

    /// Checks that all its connections are in the kernel, and go on.
    #[track_caller]
    fn check(&self, topology: &Topology) {
        self.traffic.wait_progress(LONG);
        self.agent.wait_pairs(FLOWS);
        let stream = client::connect(&topology.client, self.address).expect("a connection");
        client::ping(&stream, b"one more").expect("an echo");
        self.agent.offload(&[stream]);
    }
}

#[test]
fn an_installation_that_comes_and_goes_leaves_the_other_alone() {
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let topology = Topology::new().expect("a network");
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let _server = Server::start(&topology.backend1, endpoint, peer::echo).expect("a server");
    let command = AgentCommand::new(&AT_ONCE);
    let mut one = Installation::start(&topology, &command, LISTENER_PORT);
    let other = Installation::start(&topology, &command.admin(OTHER_ADMIN), LISTENER_PORT + 1);
    let alone = hanging(&topology, &[&one.agent, &other.agent], "veth1") / 2;
    assert!(alone > 0, "nothing hangs there");
    one.check(&topology);

    one.agent.kill().expect("it runs");
    other.check(&topology);
    one.succeed(&topology);
    one.check(&topology);
    other.check(&topology);

    one.agent.terminate().expect("it runs");
    assert!(one.agent.wait(LONG).is_some(), "{}", one.agent.log());
    other.check(&topology);
    one.succeed(&topology);
    one.check(&topology);
    other.check(&topology);
    assert_eq!(
        hanging(&topology, &[&one.agent, &other.agent], "veth1"),
        2 * alone,
        "each has its programs once"
    );

    one.agent.kill().expect("it runs");
    let mut command = Command::new(binary());
    command.args(["cleanup", "--yes", "--pin-dir"]).arg(one.agent.pin_dir());
    topology.node.stdout(&mut command).expect("cleanup");
    assert_eq!(
        hanging(&topology, &[&one.agent, &other.agent], "veth1"),
        alone,
        "those of the other one are left"
    );
    other.check(&topology);
    assert_eq!(
        other.agent.metric(RESTORED),
        0,
        "nothing of the other one was ever removed:\n{}",
        other.agent.log()
    );
    println!("{} bytes each way", other.traffic.finish().expect("whole transfers"));
}

/// How many programs of these agents hang on both sides of an interface of the node: the filters that are there, or the
/// links that are pinned.
fn hanging(topology: &Topology, agents: &[&Agent], interface: &str) -> usize {
    if is_by_clsact() {
        let count = |side| {
            let filters = tc(topology, &["filter", "show", "dev", interface, side]);
            filters.lines().filter(|line| line.contains("direct-action")).count()
        };
        return count("ingress") + count("egress");
    }
    let index = index(topology, interface);
    let pins = agents.iter().flat_map(|agent| ["ingress", "egress"].map(|side| pin(agent, &index, side)));
    pins.flatten().count()
}

/// The index of an interface of the node.
fn index(topology: &Topology, interface: &str) -> String {
    let mut command = Command::new("ip");
    let text = topology.node.stdout(command.args(["-o", "link", "show", "dev", interface])).expect("ip");
    text.split_once(':').expect("an index").0.to_owned()
}

fn tc(topology: &Topology, arguments: &[&str]) -> String {
    let mut command = Command::new("tc");
    topology.node.stdout(command.args(arguments)).expect("tc")
}

/// Where the link of a side of an interface is pinned, if it is.
fn pin(agent: &Agent, index: &str, side: &str) -> Option<PathBuf> {
    let mut versions = fs::read_dir(agent.pin_dir()).into_iter().flatten().flatten();
    versions.find_map(|version| {
        let pin = version.path().join("links").join(format!("{index}_{side}"));
        pin.exists().then_some(pin)
    })
}

/// Takes off an interface what an agent has attached to these sides.
fn remove(forwarding: &Forwarding, interface: &str, sides: &[&str]) {
    let topology = &forwarding.topology;
    if is_by_clsact() {
        match sides {
            [side] => drop(tc(topology, &["filter", "del", "dev", interface, side])),
            _ => drop(tc(topology, &["qdisc", "del", "dev", interface, "clsact"])),
        }
        return;
    }
    let index = index(topology, interface);
    for side in sides {
        let mut command = Command::new("bpftool");
        command.args(["link", "detach", "pinned"]).arg(pin(&forwarding.agent, &index, side).expect("a pin"));
        process::stdout(&mut command).expect("bpftool");
    }
}

#[track_caller]
fn wait_restored(agent: &Agent, count: i64) {
    wait_until("the programs hang there again", LONG, || agent.metric(RESTORED) == count);
    let log = agent.log();
    let told =
        log.lines().filter(|line| line.contains("WARN") && line.contains("another program had removed"));
    assert_eq!(i64::try_from(told.count()).ok(), Some(count), "{log}");
}

#[test]
fn programs_that_somebody_removes_come_back_and_transfers_go_on() {
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let idle = forwarding.connect_offloaded(FLOWS);
    let before =
        ["veth1", "veth2"].map(|interface| hanging(&forwarding.topology, &[&forwarding.agent], interface));

    // The egress program stays: what the stack would answer meanwhile does not leave.
    let traffic = Traffic::start(forwarding.connect_offloaded(FLOWS));
    traffic.wait_progress(LONG);
    for (count, interface) in (1..).zip(["veth1", "veth2"]) {
        remove(&forwarding, interface, &["ingress"]);
        wait_restored(&forwarding.agent, count);
        traffic.wait_progress(LONG);
    }
    assert!(forwarding.agent.log().contains("interface=\"veth2\""), "{}", forwarding.agent.log());
    println!("{} bytes each way", traffic.finish().expect("whole transfers"));

    // Everything: who does not send meanwhile notices nothing.
    remove(&forwarding, "veth1", &["ingress", "egress"]);
    wait_restored(&forwarding.agent, 3);
    for stream in &idle {
        client::ping(stream, b"still here").expect("an echo");
    }
    forwarding.agent.wait_pairs(FLOWS);
    let after =
        ["veth1", "veth2"].map(|interface| hanging(&forwarding.topology, &[&forwarding.agent], interface));
    assert_eq!(after, before);
}

/// How the answers of the first host of backends take another link than the requests.
const DETOURS: [[&str; 4]; 2] = [
    ["10.0.9.1/24", "10.0.9.2/24", "10.0.2.1/32", "10.0.9.1"],
    ["fd00:9::1/64", "fd00:9::2/64", "fd00:2::1/128", "fd00:9::1"],
];

/// Joins the node and the first host of backends a second time.
fn join_again(topology: &Topology) {
    let (node, host) = (&topology.node, &topology.backend1);
    let peer = ["peer", "name", "eth9", "netns", host.name()];
    node.ip(&[&["link", "add", "veth9", "type", "veth"][..], &peer].concat()).expect("a link");
    for (netns, device, side) in [(node, "veth9", 0), (host, "eth9", 1)] {
        for detour in DETOURS {
            let flags: &[&str] = if detour[side].contains(':') { &["nodad"] } else { &[] };
            let words = [&["address", "add", detour[side], "dev", device][..], flags].concat();
            netns.ip(&words).expect("an address");
        }
        netns.ip(&["link", "set", device, "up"]).expect("a link that is up");
        // What comes in by another interface than it would leave by is no mistake here.
        for name in ["all", "default", "veth2", "veth9", "eth0", "eth9"] {
            let _ = netns.sysctl(&format!("ipv4/conf/{name}/rp_filter"), "0");
        }
    }
}

/// Has its answers to the node take the second link.
fn answer_by_it(topology: &Topology) {
    for [_, _, node, gateway] in DETOURS {
        let words = ["route", "add", node, "via", gateway, "dev", "eth9"];
        topology.backend1.ip(&words).expect("a route");
    }
}

/// Connections whose answers come in by another interface than requests leave by, with a listener on one address: no address of
/// that interface is listened on. `is_proven` is whether others have gone by the usual way before.
fn check_detour(is_ipv6: bool, is_proven: bool) {
    let topology = Topology::new().expect("a network");
    join_again(&topology);
    let (address, endpoint) = if is_ipv6 {
        (topology.node_address_v6(LISTENER_PORT), topology.backend1_address_v6(ENDPOINT_PORT))
    } else {
        (topology.node_address(LISTENER_PORT), topology.backend1_address(ENDPOINT_PORT))
    };
    let manifests = Manifests::new().expect("a folder");
    manifests.gateway_on("gw", Some(address.ip()), &[("a", LISTENER_PORT)]).expect("a gateway");
    manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).expect("a route");
    manifests.service("a", &[endpoint]).expect("a service");
    let _server = Server::start(&topology.backend1, endpoint, peer::echo).expect("a server");
    let agent = Agent::start(&topology.node, &manifests.path(), &AT_ONCE).expect("an agent");
    let connect = || client::connect(&topology.client, address).expect("a connection");
    if is_proven {
        agent.offload(&[connect()]);
    }
    answer_by_it(&topology);
    let streams: Vec<TcpStream> = (0..FLOWS).map(|_| connect()).collect();
    agent.offload(&streams);
    let traffic = Traffic::start(streams);
    traffic.wait_progress(LONG);
    println!("{} bytes each way", traffic.finish().expect("whole transfers"));
}

#[test]
fn answers_may_come_in_by_another_interface() {
    if !is_ready() {
        return;
    }
    for is_ipv6 in [false, true] {
        for is_proven in [false, true] {
            println!("IPv6 {is_ipv6}, proven {is_proven}");
            check_detour(is_ipv6, is_proven);
        }
    }
}
