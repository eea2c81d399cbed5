//! What becomes of open connections when their listener, route or endpoint is removed: of those, and of no others.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::peer::Server;
use forwarder_tests::{
    Agent, AgentCommand, BackendRef, Forwarding, Manifests, Topology, cases, peer, require_root, wait_until,
};

const WAIT: Duration = Duration::from_secs(10);
/// How soon a reset is due, on a busy machine.
const SOON: Duration = Duration::from_secs(3);
const DRAIN: Duration = Duration::from_secs(4);
/// How long what should live is watched.
const WATCH: Duration = Duration::from_millis(1500);

/// How connections are told apart at the endpoints: by what they say first.
type Mark = u8;

/// Listener `a` on 9001 leads to endpoints one and two, and `b` on 9002 to endpoint one too.
struct World {
    agent: Agent,
    /// The mark of each connection that has ended, and how, at the endpoint.
    ends: Receiver<(Mark, End)>,
    endpoints: [SocketAddr; 2],
    manifests: Manifests,
    topology: Topology,
    arguments: Vec<&'static str>,
    _servers: [Server; 2],
}

/// An open connection.
struct Session {
    mark: Mark,
    stream: TcpStream,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Tier {
    Tc,
    Splice,
}

const TIERS: [Tier; 2] = [Tier::Tc, Tier::Splice];

/// What is removed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum What {
    /// Endpoint one of listener `a`.
    Endpoint,
    /// The route of listener `a`.
    Route,
    /// Listener `a`.
    Listener,
}

/// Names itself, echoes, and tells how the connection ends.
fn named(
    name: &'static str,
    ends: Sender<(Mark, End)>,
) -> impl Fn(&TcpStream) -> io::Result<()> + Send + Sync {
    move |mut stream| {
        stream.write_all(name.as_bytes())?;
        let mut mark = [0];
        stream.read_exact(&mut mark)?;
        stream.write_all(&mark)?;
        let end = peer::echo_to_end(stream)?;
        ends.send((mark[0], end)).map_err(io::Error::other)
    }
}

impl World {
    fn start(tier: Tier, more: &[&'static str]) -> Self {
        let topology = Topology::new().expect("it works");
        let endpoints = [topology.backend1_address(5000), topology.backend2_address(5000)];
        let (sender, ends) = mpsc::channel();
        let servers = [
            Server::start(&topology.backend1, endpoints[0], named("one\n", sender.clone()))
                .expect("it works"),
            Server::start(&topology.backend2, endpoints[1], named("two\n", sender)).expect("it works"),
        ];
        let manifests = Manifests::forward(9001, &endpoints).expect("it works");
        manifests.gateway(&[("a", 9001), ("b", 9002)]).expect("it works");
        manifests.route("b", &[BackendRef { service: "b", weight: 1 }]).expect("it works");
        manifests.service("b", &endpoints[..1]).expect("it works");
        let datapath = match tier {
            Tier::Tc => AT_ONCE.to_vec(),
            Tier::Splice => vec!["--datapath", "splice"],
        };
        let arguments = [&datapath, more].concat();
        let agent = Agent::start(&topology.node, &manifests.path(), &arguments).expect("it works");
        Self { agent, ends, endpoints, manifests, topology, arguments, _servers: servers }
    }

    /// A connection to the endpoint of that name.
    fn connect(&self, port: u16, name: &str, mark: Mark) -> Session {
        loop {
            let stream =
                client::connect(&self.topology.client, self.topology.node_address(port)).expect("it works");
            if client::read_line(&stream).expect("it works") == name {
                client::ping(&stream, &[mark]).expect("it works");
                return Session { mark, stream };
            }
            client::reset(stream).expect("it works");
        }
    }

    /// Waits until connections have reached the tier that is tested.
    fn settle(&self, sessions: &[&Session], tier: Tier) {
        if tier == Tier::Tc {
            let locals: Vec<SocketAddr> =
                sessions.iter().map(|session| session.stream.local_addr().expect("it works")).collect();
            wait_until("all are offloaded", WAIT, || {
                for session in sessions {
                    session.ping();
                }
                let connections = self.agent.connections("").expect("it works");
                let offloaded = connections.iter().filter(|one| one["state"] == "offloaded");
                let offloaded: Vec<SocketAddr> =
                    offloaded.filter_map(|one| one["downstream"].as_str()?.parse().ok()).collect();
                locals.iter().all(|local| offloaded.contains(local))
            });
        }
        while self.ends.try_recv().is_ok() {}
    }

    /// Waits until nothing is known of connections that a test has closed itself.
    fn wait_ended(&self, left: i64) {
        wait_until("what was closed has ended", WAIT, || self.agent.active().expect("it works") <= left);
        while self.ends.try_recv().is_ok() {}
    }

    fn remove(&self, what: What) {
        match what {
            What::Endpoint => self.manifests.service("a", &self.endpoints[1..]).expect("it works"),
            What::Route => self.manifests.remove("route-a").expect("it works"),
            What::Listener => self.manifests.gateway(&[("b", 9002)]).expect("it works"),
        }
    }

    fn restore(&self) {
        self.manifests.gateway(&[("a", 9001), ("b", 9002)]).expect("it works");
        self.manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).expect("it works");
        self.manifests.service("a", &self.endpoints).expect("it works");
        self.agent.wait_bound("default/gw/a");
        self.agent.wait_endpoints("default/gw/a", &self.endpoints);
    }

    /// Checks that a connection is reset at both ends.
    #[track_caller]
    fn assert_reset(&self, session: &Session, what: What) {
        assert_eq!(
            client::end(&session.stream, WAIT).expect("it works"),
            End::Reset,
            "{what:?}, at the client"
        );
        let end = self.ends.recv_timeout(WAIT).expect("the endpoint is told");
        assert_eq!(end, (session.mark, End::Reset), "{what:?}, at the endpoint");
        // The counters of a listener go with it.
        if what != What::Listener {
            wait_until("its end is counted", WAIT, || self.agent.ended("removed") > 0);
        }
    }
}

impl Session {
    #[track_caller]
    fn ping(&self) {
        client::ping(&self.stream, b"still here").expect("it works");
    }
}

/// Checks for a while that connections live.
#[track_caller]
fn watch(sessions: &[&Session], duration: Duration) {
    let started = Instant::now();
    while started.elapsed() < duration {
        for session in sessions {
            session.ping();
        }
        thread::park_timeout(Duration::from_millis(50));
    }
}

/// Removes one thing after the other, and checks what becomes of a connection that relied on it.
fn check_each(tier: Tier, policy: &'static str, check: impl Fn(&World, What, &Session, &[&Session])) {
    let world = World::start(tier, &["--on-removal", policy, "--removal-drain", "4s"]);
    for (mark, what) in (1..).zip([What::Endpoint, What::Route, What::Listener]) {
        let victim = world.connect(9001, "one", mark);
        // Its neighbours: on the other route to the same endpoint, and at the endpoint that stays.
        let mut neighbours = vec![world.connect(9002, "one", 10 + mark)];
        if what == What::Endpoint {
            neighbours.push(world.connect(9001, "two", 20 + mark));
        }
        let others: Vec<&Session> = neighbours.iter().collect();
        world.settle(&[&[&victim], &others[..]].concat(), tier);
        world.wait_ended(1 + i64::try_from(others.len()).expect("it works"));
        world.remove(what);
        check(&world, what, &victim, &others);
        for session in neighbours.into_iter().chain([victim]) {
            client::reset(session.stream).expect("it works");
        }
        world.restore();
        world.wait_ended(0);
    }
}

fn each_tier(check: impl Fn(Tier) + Sync) {
    if !is_ready() {
        return;
    }
    thread::scope(|scope| {
        for tier in TIERS {
            let check = &check;
            scope.spawn(move || check(tier));
        }
    });
}

#[test]
fn what_is_kept_lives_on() {
    each_tier(|tier| {
        check_each(tier, "keep", |_, _, victim, others| watch(&[&[victim], others].concat(), WATCH));
    });
}

#[test]
fn what_is_to_be_reset_is_reset_at_both_ends_at_once() {
    each_tier(|tier| {
        check_each(tier, "reset", |world, what, victim, others| {
            let started = Instant::now();
            world.assert_reset(victim, what);
            let took = started.elapsed();
            println!("{tier:?}, {what:?}: reset after {took:?}");
            assert!(took < SOON, "{tier:?}, {what:?}: reset after {took:?}");
            watch(others, WATCH);
            assert!(world.ends.try_recv().is_err(), "another one was reset too");
        });
    });
}

#[test]
fn what_is_drained_goes_on_for_a_while() {
    each_tier(|tier| {
        check_each(tier, "drain", |world, what, victim, others| {
            let started = Instant::now();
            watch(&[&[victim], others].concat(), DRAIN / 2);
            world.assert_reset(victim, what);
            let took = started.elapsed();
            println!("{tier:?}, {what:?}: reset after {took:?}");
            assert!(took > DRAIN * 3 / 4, "{tier:?}, {what:?}: reset after {took:?}");
            assert!(took < DRAIN + SOON, "{tier:?}, {what:?}: reset after {took:?}");
            watch(others, WATCH);
            assert!(world.ends.try_recv().is_err(), "another one was reset too");
        });
    });
}

#[test]
fn an_endpoint_that_comes_back_is_not_drained_any_more() {
    each_tier(|tier| {
        let world = World::start(tier, &["--on-removal", "drain", "--removal-drain", "4s"]);
        let session = world.connect(9001, "one", 1);
        world.settle(&[&session], tier);
        for what in [What::Endpoint, What::Route] {
            world.remove(what);
            watch(&[&session], DRAIN / 4);
            world.restore();
            watch(&[&session], DRAIN + Duration::from_secs(1));
        }
        // The next removal counts again.
        world.remove(What::Endpoint);
        world.assert_reset(&session, What::Endpoint);
    });
}

#[test]
fn each_listener_has_its_own_policy_and_that_of_the_moment_counts() {
    if !require_root() {
        return;
    }
    let world = World::start(Tier::Splice, &["--on-removal", "reset"]);
    let gateway = |policy: &str| {
        let text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\n\
             kind: Gateway\n\
             metadata: {{name: gw, annotations: {{forwarder.dev/on-removal: \"{policy}\"}}}}\n\
             spec:\n  gatewayClassName: forwarder\n  listeners:\n\
             \x20 - {{name: a, port: 9001, protocol: TCP}}\n  - {{name: b, port: 9002, protocol: TCP}}\n"
        );
        let updates = || world.agent.metric("forwarder_configuration_updates_total");
        let before = updates();
        world.manifests.write("gateway-gw", &text).expect("it works");
        wait_until("the settings are in force", WAIT, || updates() > before);
    };
    gateway("reset, b=keep");
    let [first, second] = [world.connect(9001, "one", 1), world.connect(9002, "one", 2)];
    world.settle(&[], Tier::Splice);
    world.manifests.service("b", &world.endpoints[1..]).expect("it works");
    world.agent.wait_endpoints("default/gw/b", &world.endpoints[1..]);
    world.remove(What::Endpoint);
    world.assert_reset(&first, What::Endpoint);
    watch(&[&second], WATCH);

    // What was kept stays so, whatever is set and removed later.
    gateway("reset");
    let third = world.connect(9002, "two", 3);
    world.settle(&[], Tier::Splice);
    world.manifests.service("b", &[]).expect("it works");
    world.assert_reset(&third, What::Endpoint);
    watch(&[&second], WATCH);
}

#[test]
fn pairs_of_a_former_agent_are_ended_too() {
    if !is_ready() {
        return;
    }
    // What is removed, and whether no agent runs then.
    let all = [
        (What::Endpoint, false),
        (What::Listener, true),
        (What::Route, false),
        (What::Endpoint, true),
        (What::Listener, false),
        (What::Route, true),
    ];
    let mut world = World::start(Tier::Tc, &["--on-removal", "reset"]);
    for (mark, (what, is_dead)) in (1..).zip(cases(all)) {
        let sessions = [world.connect(9001, "one", mark), world.connect(9002, "one", 10 + mark)];
        world.settle(&sessions.each_ref(), Tier::Tc);
        world.wait_ended(2);
        world.agent.kill().expect("it works");
        if is_dead {
            world.remove(what);
        }
        let command = AgentCommand::new(&world.arguments).succeeding(&world.agent);
        world.agent = command.start(&world.topology.node, &world.manifests.path()).expect("it works");
        if !is_dead {
            wait_until("the pairs have their listeners", WAIT, || {
                let connections = world.agent.connections("").expect("it works");
                connections.iter().filter(|one| one["backend"].is_string()).count() == 2
            });
            watch(&sessions.each_ref(), WATCH);
            world.remove(what);
        }
        world.assert_reset(&sessions[0], what);
        watch(&[&sessions[1]], WATCH);
        drop(sessions);
        world.restore();
        world.wait_ended(0);
        world.agent.wait_empty();
    }
}

#[test]
fn pairs_outlive_the_last_listener() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let streams = forwarding.connect_offloaded(3);
    forwarding.manifests.remove("gateway-gw.yaml").expect("it works");
    wait_until("the listener is gone", WAIT, || {
        forwarding.agent.listener("default/gw/a").is_ok_and(|listener| listener.is_none())
    });
    let watched = Instant::now();
    while watched.elapsed() < WATCH {
        for stream in &streams {
            client::ping(stream, b"still there").expect("the kernel forwards it");
        }
    }
    assert_eq!(forwarding.agent.offloaded().len(), streams.len());
}
