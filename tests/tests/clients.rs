//! Which clients listeners let in.

use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_common::packet::{LinkLayer, parse};
use forwarder_common::tuple::address_bytes;
use forwarder_tests::client::{self, End};
use forwarder_tests::direct::is_direct;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER, LISTENER_PORT};
use forwarder_tests::kernel::{entries, is_ready};
use forwarder_tests::netns::near;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{
    Agent, AgentCommand, Forwarding, Manifests, NetNs, Topology, patient, peer, require_root, wait_until,
};
use socket2::{Domain, Protocol, Socket, Type};

const WAIT: Duration = Duration::from_secs(20);
/// For how long a client tries that is not let in: a SYN and one more.
const ATTEMPT: Duration = Duration::from_millis(1500);

/// May load no programs.
const UNPRIVILEGED: [&str; 4] = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// The addresses of the client of a network, and others that it is given here.
fn sources(family: Family) -> [IpAddr; 2] {
    match family {
        Family::V4 => [2, 3].map(|last| Ipv4Addr::new(10, 0, 1, last).into()),
        Family::V6 => [2, 3].map(|last| Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, last).into()),
    }
}

fn network() -> Topology {
    let topology = Topology::new().expect("a network");
    topology.client.ip(&["address", "add", "10.0.1.3/24", "dev", "eth0"]).expect("an address");
    topology.client.ip(&["address", "add", "fd00:1::3/64", "dev", "eth0", "nodad"]).expect("an address");
    topology
}

/// Connects from an address.
fn connect(netns: &NetNs, source: IpAddr, address: SocketAddr, wait: Duration) -> io::Result<TcpStream> {
    netns.run(|| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
        socket.connect_timeout(&address.into(), wait)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(patient(WAIT)))?;
        Ok(stream)
    })
}

#[track_caller]
fn check_let_in(netns: &NetNs, source: IpAddr, address: SocketAddr) -> TcpStream {
    let connected = connect(netns, source, address, patient(WAIT));
    let echo = connected.as_ref().map(|stream| client::ping(stream, b"echo"));
    assert!(matches!(echo, Ok(Ok(()))), "from {source}: {echo:?}");
    connected.expect("a connection, as was just seen")
}

/// Checks that a client hears nothing, and that this is because the programs of the agent drop its SYN.
#[track_caller]
fn check_dropped(agent: &Agent, netns: &NetNs, source: IpAddr, address: SocketAddr) {
    let before = agent.verdicts("client_denied");
    check_silence(netns, source, address);
    assert!(
        agent.verdicts("client_denied") > before,
        "{source} hears nothing, and not because it is refused"
    );
}

#[track_caller]
fn check_silence(netns: &NetNs, source: IpAddr, address: SocketAddr) {
    let refused = connect(netns, source, address, ATTEMPT).map_err(|error| error.kind());
    assert_eq!(refused.err(), Some(io::ErrorKind::TimedOut), "from {source}");
}

/// Waits until a program hangs at XDP of the interface towards the client.
#[track_caller]
fn wait_at_xdp(agent: &Agent) {
    wait_until("a program hangs at XDP", WAIT, || {
        let state = agent.state().expect("a state");
        let all = state["datapath"]["interfaces"].as_array().cloned().unwrap_or_default();
        all.iter().any(|one| one["name"] == near(1) && one["xdp"] == "drop")
    });
}

/// What interfaces have received, as a packet socket sees it: after XDP, and before TC.
struct Tap(Socket);

impl Tap {
    fn open(netns: &NetNs) -> Self {
        /// `ETH_P_ALL` (`linux/if_ether.h`).
        const ALL: u16 = 0x0003;
        netns.run(|| {
            let protocol = Protocol::from(i32::from(ALL.to_be()));
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).expect("a packet socket");
            socket.set_nonblocking(true).expect("a socket that does not wait");
            Self(socket)
        })
    }

    /// How many SYNs of a client have come since this was asked.
    fn syns_from(&self, source: IpAddr) -> usize {
        let mut frame = [0; 2048];
        let frames =
            std::iter::from_fn(|| (&self.0).read(&mut frame).ok().map(|length| frame[..length].to_vec()));
        let is_syn = |frame: &Vec<u8>| {
            let segment = parse(&frame[..], LinkLayer::Ethernet);
            segment.is_ok_and(|it| it.is_attempt() && it.tuple.source == address_bytes(source))
        };
        frames.filter(is_syn).count()
    }
}

/// Waits until so many networks stand in the map: rules that no listener has are removed.
#[track_caller]
fn wait_rules(agent: &Agent, count: usize) {
    wait_until("rules without a listener are removed", WAIT, || {
        entries(agent.pin_dir(), "client_rules").is_ok_and(|found| found == count)
    });
}

/// Writes the Gateway with a value of the annotation.
fn annotate(forwarding: &Forwarding, value: &str) {
    let gateway = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: gw, annotations: {{forwarder.dev/client-cidrs: \"{value}\"}}}}\n\
         spec:\n  gatewayClassName: forwarder\n  listeners:\n\
         \x20 - {{name: a, port: {LISTENER_PORT}, protocol: TCP}}\n"
    );
    forwarding.manifests.write("gateway-gw", &gateway).expect("a writable folder");
}

/// What is in force of the annotation and the setting together.
#[track_caller]
fn wait_in_force(forwarding: &Forwarding, expected: &[&str]) {
    wait_until("the rules are in force", WAIT, || {
        let listener = forwarding.agent.listener(LISTENER).expect("a state").expect("a listener");
        let rules = listener["clientCidrs"].as_array().cloned().unwrap_or_default();
        rules.iter().filter_map(|rule| rule.as_str()).collect::<Vec<_>>() == expected
    });
}

#[test]
fn syns_of_clients_that_are_not_let_in_are_dropped_and_counted() {
    if !is_ready() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for datapath in ["splice", "tc", "direct"] {
            let (network, [refused, let_in]) = (network(), sources(family));
            // The network around both, but for one of them.
            let rules = match family {
                Family::V4 => format!("!10.0.1.0/24,{let_in}"),
                Family::V6 => format!("!fd00:1::/64,{let_in}"),
            };
            let command = AgentCommand::new(&["--datapath", datapath, "--client-cidrs", &rules]);
            let forwarding = Forwarding::serve(network, family, &command, peer::echo).expect("an agent");
            let (agent, netns) = (&forwarding.agent, &forwarding.topology.client);
            wait_until("the tier is in force", WAIT, || datapath != "direct" || is_direct(agent));
            let address = forwarding.address_of(family);
            check_dropped(agent, netns, refused, address);
            assert_eq!(agent.metric("forwarder_ingress_denied_total"), agent.verdicts("client_denied"));
            assert_eq!(agent.metric("forwarder_connections_total"), 0);
            drop(check_let_in(netns, let_in, address));
            wait_until("the connection is counted", WAIT, || {
                agent.metric("forwarder_connections_total") == 1
            });
            // What the rules say of one family is nothing to the other.
            let other = match family {
                Family::V4 => Family::V6,
                Family::V6 => Family::V4,
            };
            let other_address = forwarding.address_of(other);
            connect(netns, sources(other)[0], other_address, patient(WAIT))
                .expect("the other family is let in");
        }
    }
}

#[test]
fn rules_change_for_new_connections_and_an_annotation_refuses_more_only() {
    if !is_ready() {
        return;
    }
    for datapath in ["tc", "direct"] {
        let [one, other] = sources(Family::V4);
        let rule = format!("!{other}/32");
        let command = AgentCommand::new(&["--datapath", datapath, "--client-cidrs", &rule]);
        let forwarding = Forwarding::serve(network(), Family::V4, &command, peer::echo).expect("an agent");
        let (agent, netns) = (&forwarding.agent, &forwarding.topology.client);
        let address = forwarding.address();
        wait_until("the tier is in force", WAIT, || datapath != "direct" || is_direct(agent));
        let before = check_let_in(netns, one, address);
        wait_rules(agent, 1);
        check_dropped(agent, netns, other, address);

        // The annotation cannot let in whom the agent's setting refuses.
        annotate(&forwarding, "!0.0.0.0/0 10.0.1.3, b=!10.0.0.0/8");
        wait_in_force(&forwarding, &["!0.0.0.0/0", "!10.0.1.3/32"]);
        check_dropped(agent, netns, one, address);
        check_dropped(agent, netns, other, address);
        client::ping(&before, b"a connection from before goes on").expect("an echo");
        wait_rules(agent, 2);

        annotate(&forwarding, "!10.9.0.0/16");
        wait_in_force(&forwarding, &["!10.0.1.3/32", "!10.9.0.0/16"]);
        check_let_in(netns, one, address);
        check_dropped(agent, netns, other, address);
        wait_rules(agent, 2);
        let unread = agent.state().expect("a state")["problems"].to_string();
        assert!(!unread.contains("client-cidrs"), "{unread}");

        // What can be read of it holds.
        annotate(&forwarding, "!10.0.1.2 !10.0.0.300");
        wait_in_force(&forwarding, &["!10.0.1.2/32", "!10.0.1.3/32"]);
        check_dropped(agent, netns, one, address);
        let told = agent.state().expect("a state")["problems"].to_string();
        assert!(told.contains("10.0.0.300"), "{told}");
    }
}

/// Without programs, the agent looks at who is accepted.
#[test]
fn clients_that_are_not_let_in_are_reset_where_no_program_is() {
    if !require_root() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let [refused, let_in] = sources(family);
        let bits = if refused.is_ipv4() { 32 } else { 128 };
        let rules = format!("!{refused}/{bits}");
        let arguments = ["--datapath", "splice", "--client-cidrs", &rules];
        let command = AgentCommand::new(&arguments).wrapped(&UNPRIVILEGED);
        let forwarding = Forwarding::serve(network(), family, &command, peer::echo).expect("an agent");
        let netns = &forwarding.topology.client;
        let address = forwarding.address_of(family);
        // The kernel accepts it; the reset may come before that is known here.
        match connect(netns, refused, address, patient(WAIT)) {
            Ok(stream) => assert_eq!(client::end(&stream, WAIT).expect("an end"), End::Reset),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
        }
        forwarding.agent.wait_ended("client_denied", 1);
        check_let_in(netns, let_in, address);
    }
}

/// Direct connections are made while no agent runs: not for these clients. The next agent's rules take the place of the former's.
#[test]
fn rules_hold_while_no_agent_runs_and_the_next_one_takes_over() {
    if !is_ready() {
        return;
    }
    let [refused, let_in] = sources(Family::V4);
    let rule = format!("!{refused}/32");
    let arguments = ["--datapath", "direct", "--client-cidrs", &rule];
    let command = AgentCommand::new(&arguments);
    let mut forwarding = Forwarding::serve(network(), Family::V4, &command, peer::echo).expect("an agent");
    let netns = forwarding.topology.client.clone();
    let address = forwarding.address();
    wait_until("the listener is direct", WAIT, || is_direct(&forwarding.agent));
    forwarding.agent.kill().expect("kill");
    check_silence(&netns, refused, address);
    check_let_in(&netns, let_in, address);

    forwarding.succeed(&arguments).expect("the next agent");
    wait_rules(&forwarding.agent, 1);
    check_dropped(&forwarding.agent, &netns, refused, address);
    check_let_in(&netns, let_in, address);
}

/// Where a program hangs at XDP, it drops them before the kernel has made packets of them.
#[test]
fn syns_are_dropped_at_xdp_and_all_else_goes_on() {
    if !is_ready() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for datapath in ["tc", "direct"] {
            let [refused, let_in] = sources(family);
            let rule = format!("!{refused}/{}", if refused.is_ipv4() { 32 } else { 128 });
            let arguments = ["--client-cidrs", &rule, "--xdp", "drop", "--datapath", datapath];
            let command = AgentCommand::new(&arguments);
            let mut forwarding =
                Forwarding::serve(network(), family, &command, peer::echo).expect("an agent");
            let (netns, node) = (forwarding.topology.client.clone(), forwarding.topology.node.clone());
            let address = forwarding.address_of(family);
            let agent = &forwarding.agent;
            wait_at_xdp(agent);
            wait_until("the tier is in force", WAIT, || datapath != "direct" || is_direct(agent));
            assert!(agent.metric("forwarder_xdp_interfaces") >= 1);
            // It sees what has passed XDP, and not what TC does with that.
            let tap = Tap::open(&node);
            check_dropped(agent, &netns, refused, address);
            assert_eq!(agent.metric("forwarder_ingress_denied_total"), agent.verdicts("client_denied"));
            assert_eq!(tap.syns_from(refused), 0, "a SYN has passed XDP");
            let stream = check_let_in(&netns, let_in, address);
            client::ping(&stream, &vec![7; 300_000]).expect("an echo of many segments");
            assert!(tap.syns_from(let_in) >= 1, "the tap sees nothing");
            assert!(agent.verdicts("redirected") + agent.verdicts("counted") >= 1);

            // It ends with the agent.
            forwarding.agent.kill().expect("kill");
            let shown = node.stdout(Command::new("ip").args(["-d", "link", "show", &near(1)])).expect("ip");
            assert!(!shown.contains("xdp"), "a program is left: {shown}");
        }
    }
}

/// Somebody else's program is left alone, and TC drops; when it has gone, its place is taken.
#[test]
fn a_program_of_somebody_else_at_xdp_is_left_alone() {
    if !is_ready() {
        return;
    }
    let [refused, let_in] = sources(Family::V4);
    let rule = format!("!{refused}/32");
    let command = AgentCommand::new(&["--client-cidrs", &rule, "--xdp", "drop"]);
    let forwarding = Forwarding::serve(network(), Family::V4, &command, peer::echo).expect("an agent");
    wait_at_xdp(&forwarding.agent);
    let (node, netns) = (&forwarding.topology.node, &forwarding.topology.client);
    let manifests =
        Manifests::forward(LISTENER_PORT + 1, &[forwarding.topology.backend1_address(ENDPOINT_PORT)])
            .expect("manifests");
    let second = AgentCommand::new(&["--client-cidrs", &rule, "--xdp", "drop"])
        .admin("127.0.0.1:9903")
        .start(node, &manifests.path())
        .expect("an agent");
    wait_until("it is told", WAIT, || {
        second.log().contains("another program hangs there, and is left alone")
    });
    let address = forwarding.topology.node_address(LISTENER_PORT + 1);
    check_dropped(&second, netns, refused, address);
    check_let_in(netns, let_in, address);
    assert_eq!(second.metric("forwarder_xdp_interfaces"), 0);

    drop(forwarding.agent);
    wait_at_xdp(&second);
    check_dropped(&second, netns, refused, address);
}

/// It may open so many at once, and so many in each second after, however many others do.
#[test]
fn a_client_opens_no_more_connections_in_a_second_than_it_may() {
    const RATE: usize = 5;
    const ATTEMPTS: usize = 20;
    if !is_ready() {
        return;
    }
    for (family, datapath) in
        [(Family::V4, "tc"), (Family::V6, "tc"), (Family::V4, "direct"), (Family::V4, "splice")]
    {
        let [one, other] = sources(family);
        let arguments = ["--datapath", datapath, "--client-rate", &RATE.to_string()];
        let command = AgentCommand::new(&arguments);
        let forwarding = Forwarding::serve(network(), family, &command, peer::echo).expect("an agent");
        let (agent, netns) = (&forwarding.agent, &forwarding.topology.client);
        wait_until("the tier is in force", WAIT, || datapath != "direct" || is_direct(agent));
        let address = forwarding.address_of(family);
        let begun = Instant::now();
        let opened = thread::scope(|scope| {
            let attempt = || connect(netns, one, address, ATTEMPT).is_ok();
            let attempts: Vec<_> = (0..ATTEMPTS).map(|_| scope.spawn(attempt)).collect();
            attempts.into_iter().filter_map(|attempt| attempt.join().ok()).filter(|opened| *opened).count()
        });
        let seconds = usize::try_from(begun.elapsed().as_secs()).expect("a short time") + 1;
        assert!(opened >= RATE, "{family:?}, {datapath}: {opened}");
        assert!(opened <= RATE * (seconds + 1), "{family:?}, {datapath}: {opened} in {seconds} s");
        assert!(agent.verdicts("client_limited") >= 1, "{family:?}, {datapath}");
        assert_eq!(agent.metric("forwarder_ingress_limited_total"), agent.verdicts("client_limited"));
        // Another client is not concerned, unless it is of the same /64.
        if family == Family::V4 {
            let before = agent.verdicts("client_limited");
            check_let_in(netns, other, address);
            assert_eq!(agent.verdicts("client_limited"), before);
        }
    }
}
