//! Tier `direct`: connections that no socket of the node takes part in.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::direct::{DIRECT, is_direct, listed, start, switch, wait_direct, wait_empty};
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER, LISTENER_PORT};
use forwarder_tests::kernel::is_ready;
use forwarder_tests::peer::{self, Server};
use forwarder_tests::shape::stage::Family;
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::{AgentCommand, BackendRef, Forwarding, Manifests, Topology, wait_until};
use rustix::io::Errno;
use socket2::{Domain, SockRef, Socket, Type};

const WAIT: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(1);
const GRACE: Duration = Duration::from_millis(300);
/// Keeps the endpoint from answering.
const SILENT: &str =
    "table ip silent { chain input { type filter hook input priority 0 ; tcp dport 5000 drop ; } ; }";

/// How a connection ends, told by what it reads next.
fn end(stream: &TcpStream) -> End {
    client::end(stream, WAIT).expect("an end")
}

#[test]
fn a_connection_has_no_socket_on_the_node_and_is_listed_and_counted() {
    if !is_ready() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        let command = AgentCommand::new(&DIRECT);
        let forwarding = Forwarding::serve(Topology::new().unwrap(), family, &command, peer::echo).unwrap();
        let Forwarding { agent, topology, .. } = &forwarding;
        wait_direct(agent);
        let address = forwarding.address_of(family);
        let stream = client::connect(&topology.client, address).unwrap();
        client::ping(&stream, &[7; 10_000]).unwrap();

        let sockets =
            topology.node.stdout(Command::new("ss").args(["-tnH", "state", "established"])).unwrap();
        assert!(!sockets.contains(&format!(":{LISTENER_PORT}")), "{sockets}");
        assert!(!sockets.contains(&format!(":{ENDPOINT_PORT}")), "{sockets}");
        wait_until("the bytes are counted", WAIT, || {
            let metrics = agent.metrics().unwrap();
            metrics.sum("forwarder_received_bytes_total", &[("tier", "direct")]) == 10_000
                && metrics.sum("forwarder_sent_bytes_total", &[("tier", "direct")]) == 10_000
        });
        assert_eq!(agent.metric("forwarder_connections_total"), 1);
        assert_eq!(agent.metric("forwarder_backend_connections_total"), 1);
        assert_eq!(agent.metric("forwarder_ingress_syns_total"), 1);
        let connections = listed(agent, "direct");
        let [one] = &connections[..] else { panic!("{connections:?}") };
        assert_eq!(one["state"], "offloaded");
        assert_eq!(one["downstream"], stream.local_addr().unwrap().to_string());
        assert_eq!(one["listener"], LISTENER);
        assert_eq!(one["backend"], "default/a:3306");

        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(end(&stream), End::Fin);
        agent.wait_ended("finished", 1);
        wait_empty(agent);
    }
}

#[test]
fn ends_and_resets_of_either_end_reach_the_other() {
    if !is_ready() {
        return;
    }
    let forwarding = start(&[]);
    // The client resets.
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"x").unwrap();
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    drop(stream);
    forwarding.agent.wait_ended("downstream_reset", 1);
    // The operator does.
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"x").unwrap();
    wait_until("it is listed", WAIT, || listed(&forwarding.agent, "direct").len() == 1);
    let reset = forwarding.agent.command(&["conns", "reset", "--all"]).output().unwrap();
    assert!(reset.status.success(), "{reset:?}");
    assert_eq!(end(&stream), End::Reset);
    forwarding.agent.wait_ended("reset_by_operator", 1);
    wait_empty(&forwarding.agent);
    // What is ended is not taken for a new one until it is gone.
    assert_eq!(forwarding.agent.metric("forwarder_connections_total"), 2);
}

#[test]
fn an_endpoint_that_refuses_is_told_to_the_client_and_counted() {
    if !is_ready() {
        return;
    }
    let topology = Topology::new().unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[topology.backend1_address(ENDPOINT_PORT)]).unwrap();
    let agent = AgentCommand::new(&DIRECT).start(&topology.node, &manifests.path()).unwrap();
    wait_direct(&agent);
    let refused = client::connect(&topology.client, topology.node_address(LISTENER_PORT)).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    agent.wait_ended("connect_failed", 1);
    let metrics = agent.metrics().unwrap();
    assert_eq!(metrics.sum("forwarder_backend_connect_failures_total", &[("reason", "refused")]), 1);
    wait_empty(&agent);
}

#[test]
fn connections_go_on_and_are_made_while_no_agent_runs() {
    if !is_ready() {
        return;
    }
    let mut forwarding = start(&[]);
    let before = forwarding.connect().unwrap();
    client::ping(&before, b"before").unwrap();
    forwarding.agent.kill().unwrap();
    client::ping(&before, b"still").unwrap();
    let between = forwarding.connect().unwrap();
    client::ping(&between, b"between").unwrap();
    // Who has no agent to ask reads the maps.
    let pins = forwarding.agent.pin_dir().to_owned();
    let without = forwarding
        .topology
        .node
        .stdout(
            Command::new(forwarder_tests::agent::binary())
                .args(["conns", "--output", "json", "--pin-dir"])
                .arg(&pins),
        )
        .unwrap();
    assert_eq!(without.matches("\"tier\": \"direct\"").count(), 2, "{without}");

    forwarding.succeed(&DIRECT).unwrap();
    wait_direct(&forwarding.agent);
    for stream in [&before, &between] {
        client::ping(stream, b"after").unwrap();
    }
    wait_until("both are listed", WAIT, || listed(&forwarding.agent, "direct").len() == 2);
    let after = forwarding.connect().unwrap();
    client::ping(&after, b"new").unwrap();
    wait_until("all are listed", WAIT, || listed(&forwarding.agent, "direct").len() == 3);
    drop((before, between, after));
    wait_empty(&forwarding.agent);
}

#[test]
fn room_of_what_ended_while_no_agent_ran_is_given_back_once() {
    const ROOM: usize = 16;
    if !is_ready() {
        return;
    }
    let arguments = [&DIRECT[..], &["--max-direct", "16", "--offload-after", "1GiB,1h"]].concat();
    let mut forwarding = start(&arguments[2..]);
    forwarding.agent.kill().unwrap();
    for _ in 0..ROOM / 2 {
        let stream = forwarding.connect().unwrap();
        client::ping(&stream, b"x").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(end(&stream), End::Fin);
    }
    // So long ago that the next agent has nothing to wait for.
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(2_500) {
        thread::park_timeout(Duration::from_millis(100));
    }
    forwarding.succeed(&arguments).unwrap();
    wait_direct(&forwarding.agent);
    wait_empty(&forwarding.agent);
    wait_until("all of the room is there", LONG, || {
        thread::park_timeout(GRACE);
        let streams: Vec<_> = (0..ROOM * 2).map(|_| forwarding.connect().unwrap()).collect();
        // Two connections in one slot would not both answer.
        for stream in &streams {
            client::ping(stream, b"x").unwrap();
        }
        wait_until("all are listed", WAIT, || {
            forwarding.agent.connections("").is_ok_and(|all| all.len() == ROOM * 2)
        });
        let direct = listed(&forwarding.agent, "direct").len();
        drop(streams);
        wait_empty(&forwarding.agent);
        direct == ROOM
    });
}

#[test]
fn shares_are_those_of_the_weights() {
    const CONNECTIONS: usize = 5_000;
    if !is_ready() {
        return;
    }
    raise_descriptor_limit().unwrap();
    let topology = Topology::new().unwrap();
    let endpoints = [topology.backend1_address(ENDPOINT_PORT), topology.backend2_address(ENDPOINT_PORT)];
    let servers = [
        Server::start(&topology.backend1, endpoints[0], peer::echo).unwrap(),
        Server::start(&topology.backend2, endpoints[1], peer::echo).unwrap(),
    ];
    let manifests = Manifests::forward(LISTENER_PORT, &endpoints[..1]).unwrap();
    manifests.service("b", &endpoints[1..]).unwrap();
    let shares = [BackendRef { service: "a", weight: 70 }, BackendRef { service: "b", weight: 30 }];
    manifests.route("a", &shares).unwrap();
    let agent = AgentCommand::new(&DIRECT).start(&topology.node, &manifests.path()).unwrap();
    wait_direct(&agent);
    let address = topology.node_address(LISTENER_PORT);
    for _ in 0..CONNECTIONS {
        let stream = client::connect(&topology.client, address).unwrap();
        client::ping(&stream, b"x").unwrap();
        SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
    }
    let [first, second] = servers.each_ref().map(Server::accepted);
    println!("{first} and {second} of {CONNECTIONS}");
    assert_eq!(first + second, CONNECTIONS);
    assert!(first.abs_diff(CONNECTIONS * 70 / 100) <= CONNECTIONS * 2 / 100, "{first}");
}

#[test]
fn who_finds_no_room_is_accepted_and_room_is_given_back() {
    const ROOM: usize = 16;
    if !is_ready() {
        return;
    }
    let forwarding = start(&["--max-direct", "16", "--offload-after", "1GiB,1h"]);
    for _ in 0..3 {
        wait_until("there is room", LONG, || {
            // What has ended is room again after a grace period of the kernel, which nobody sees.
            thread::park_timeout(GRACE);
            let streams: Vec<_> = (0..ROOM + 4).map(|_| forwarding.connect().unwrap()).collect();
            for stream in &streams {
                client::ping(stream, b"x").unwrap();
            }
            wait_until("all are listed", WAIT, || {
                forwarding.agent.connections("").is_ok_and(|all| all.len() == ROOM + 4)
            });
            let direct = listed(&forwarding.agent, "direct").len();
            drop(streams);
            wait_empty(&forwarding.agent);
            assert!(direct <= ROOM, "{direct}");
            direct == ROOM
        });
    }
    assert!(forwarding.agent.verdicts("direct_refused") >= 12);
}

#[test]
fn half_open_connections_take_no_more_than_their_part() {
    if !is_ready() {
        return;
    }
    // Of 64 places, or ports: one half of those that are said is for direct connections.
    for room in [["--max-direct", "64"], ["--source-ports", "20000-20127"]] {
        let topology = Topology::new().unwrap();
        let endpoints = [topology.backend1_address(ENDPOINT_PORT)];
        let manifests = Manifests::forward(LISTENER_PORT, &endpoints).unwrap();
        let command = AgentCommand::new(&[&DIRECT[..], &room, &["--connect-timeout", "1s"]].concat());
        let agent = command.start(&topology.node, &manifests.path()).unwrap();
        wait_direct(&agent);
        // An endpoint that is silent.
        topology.backend1.stdout(Command::new("nft").arg(SILENT)).unwrap();
        let address = topology.node_address(LISTENER_PORT);
        let attempts: Vec<_> =
            (0..40).map(|_| topology.client.run(|| begin_connect(address)).unwrap()).collect();
        // The others are the socket's, whose agent resets them once it finds that nobody answers.
        wait_until("they are counted", WAIT, || agent.verdicts("direct_refused") >= 20);
        // How many there are is counted anew a few times a second: a few more may slip in then.
        wait_until("a quarter is listed", WAIT, || {
            let connecting =
                listed(&agent, "direct").iter().filter(|one| one["state"] == "connecting").count();
            (16..=20).contains(&connecting)
        });
        // They do not keep others from being served once the endpoint answers.
        topology.backend1.stdout(Command::new("nft").args(["delete", "table", "ip", "silent"])).unwrap();
        let _server = Server::start(&topology.backend1, endpoints[0], peer::echo).unwrap();
        let stream = client::connect(&topology.client, address).unwrap();
        client::ping(&stream, b"x").unwrap();
        drop(attempts);
    }
}

/// A socket that has sent its SYN.
fn begin_connect(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    match socket.connect(&address.into()) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::INPROGRESS) => Ok(socket),
        result => result.map(|()| socket),
    }
}

#[test]
fn a_client_that_a_socket_has_answered_is_not_answered_by_an_endpoint_too() {
    if !is_ready() {
        return;
    }
    let forwarding = start(&[]);
    let Forwarding { agent, topology, .. } = &forwarding;
    switch(agent, "off");
    wait_until("the listener accepts", WAIT, || !is_direct(agent));
    // The answer of the listener's socket is lost.
    let deaf = "table ip deaf { chain input { type filter hook input priority 0 ; tcp flags & (syn | ack) == syn | ack drop ; } ; }";
    topology.client.stdout(Command::new("nft").arg(deaf)).unwrap();
    let socket = topology.client.run(|| begin_connect(forwarding.address())).unwrap();
    wait_until("the socket has answered", WAIT, || {
        let half_open = topology.node.stdout(Command::new("ss").args(["-tnH", "state", "syn-recv"]));
        half_open.is_ok_and(|sockets| sockets.contains(&format!(":{LISTENER_PORT}")))
    });
    switch(agent, "on");
    wait_direct(agent);
    topology.client.stdout(Command::new("nft").args(["delete", "table", "ip", "deaf"])).unwrap();
    wait_until("the client is connected", WAIT, || {
        assert!(socket.take_error().unwrap().is_none());
        socket.peer_addr().is_ok()
    });
    socket.set_nonblocking(false).unwrap();
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(WAIT)).unwrap();
    client::ping(&stream, &[5; 1_000]).unwrap();
}

#[test]
fn a_client_that_begins_anew_is_followed() {
    const PORT: u16 = 40_001;
    if !is_ready() {
        return;
    }
    let forwarding = start(&[]);
    let Forwarding { agent, topology, .. } = &forwarding;
    topology.backend1.stdout(Command::new("nft").arg(SILENT)).unwrap();
    let connect = || {
        topology.client.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.set_reuse_address(true)?;
            socket.set_nonblocking(true)?;
            socket.bind(&SocketAddr::from(([10, 0, 1, 2], PORT)).into())?;
            let _ = socket.connect(&forwarding.address().into());
            io::Result::Ok(socket)
        })
    };
    let abandoned = connect().unwrap();
    wait_until("it is listed", WAIT, || listed(agent, "direct").len() == 1);
    drop(abandoned);
    // From the same port, with another number.
    let socket = connect().unwrap();
    topology.backend1.stdout(Command::new("nft").args(["delete", "table", "ip", "silent"])).unwrap();
    wait_until("it is connected", WAIT, || socket.peer_addr().is_ok());
    socket.set_nonblocking(false).unwrap();
    client::ping(&TcpStream::from(socket.try_clone().unwrap()), b"x").unwrap();
    wait_until("its handshake is done", WAIT, || {
        listed(agent, "direct").iter().any(|one| one["state"] == "offloaded")
    });
}

#[test]
fn an_idle_connection_is_asked_and_a_dead_end_is_found() {
    if !is_ready() {
        return;
    }
    let forwarding = start(&["--keepalive", "1s"]);
    let Forwarding { agent, topology, .. } = &forwarding;
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"x").unwrap();
    wait_until("it is listed", WAIT, || listed(agent, "direct").len() == 1);
    // Both ends answer for much longer than a dead one is waited for.
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(9) {
        assert_eq!(listed(agent, "direct").len(), 1);
        thread::park_timeout(Duration::from_millis(200));
    }
    client::ping(&stream, b"y").unwrap();
    topology.client.ip(&["link", "set", "dev", "eth0", "down"]).unwrap();
    agent.wait_ended("downstream_reset", 1);
    wait_until("the endpoint knows", WAIT, || {
        let sockets = topology.backend1.stdout(Command::new("ss").args(["-tnH", "state", "established"]));
        sockets.is_ok_and(|sockets| sockets.is_empty())
    });
}

#[test]
fn a_listener_that_cannot_be_direct_says_why_and_is_served() {
    if !is_ready() {
        return;
    }
    let topology = Topology::new().unwrap();
    // On the node itself: its packets come through no interface.
    let endpoint = topology.node_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Server::start(&topology.node, endpoint, peer::echo).unwrap();
    let agent = AgentCommand::new(&DIRECT).start(&topology.node, &manifests.path()).unwrap();
    wait_until("the reason is told", WAIT, || {
        let problems = agent.state().unwrap()["problems"].to_string();
        problems.contains("TierUnavailable") && problems.contains("same_host")
    });
    assert!(!is_direct(&agent));
    let stream = client::connect(&topology.client, topology.node_address(LISTENER_PORT)).unwrap();
    client::ping(&stream, b"x").unwrap();
    assert_eq!(listed(&agent, "direct").len(), 0);
}

#[test]
fn an_operator_switches_the_tier_off_and_on() {
    if !is_ready() {
        return;
    }
    let forwarding = start(&[]);
    let there = forwarding.connect().unwrap();
    client::ping(&there, b"x").unwrap();
    wait_until("it is listed", WAIT, || listed(&forwarding.agent, "direct").len() == 1);
    switch(&forwarding.agent, "off");
    wait_until("the listener accepts", WAIT, || !is_direct(&forwarding.agent));
    let accepted = forwarding.connect().unwrap();
    client::ping(&accepted, b"x").unwrap();
    client::ping(&there, b"still").unwrap();
    assert_eq!(listed(&forwarding.agent, "direct").len(), 1);
    switch(&forwarding.agent, "on");
    wait_direct(&forwarding.agent);
    let direct = forwarding.connect().unwrap();
    client::ping(&direct, b"x").unwrap();
    wait_until("it is listed", WAIT, || listed(&forwarding.agent, "direct").len() == 2);
}

#[test]
fn an_endpoint_that_is_removed_gets_no_new_connections_and_its_own_are_reset_if_settings_say_so() {
    if !is_ready() {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoints = [topology.backend1_address(ENDPOINT_PORT), topology.backend2_address(ENDPOINT_PORT)];
    let _servers = [
        Swarm::start(&topology.backend1, endpoints[0]).unwrap(),
        Swarm::start(&topology.backend2, endpoints[1]).unwrap(),
    ];
    let manifests = Manifests::forward(LISTENER_PORT, &endpoints).unwrap();
    let command = AgentCommand::new(&[&DIRECT[..], &["--on-removal", "reset"]].concat());
    let agent = command.start(&topology.node, &manifests.path()).unwrap();
    wait_direct(&agent);
    let address = topology.node_address(LISTENER_PORT);
    let connect = || {
        let stream = client::connect(&topology.client, address).unwrap();
        client::ping(&stream, b"x").unwrap();
        stream
    };
    let streams: Vec<_> = (0..4).map(|_| connect()).collect();
    let mut by_endpoint: BTreeMap<String, usize> = BTreeMap::new();
    wait_until("all are listed", WAIT, || listed(&agent, "direct").len() == 4);
    for one in listed(&agent, "direct") {
        *by_endpoint.entry(one["upstream"].to_string()).or_default() += 1;
    }
    assert_eq!(by_endpoint.values().copied().collect::<Vec<_>>(), [2, 2], "{by_endpoint:?}");
    manifests.service("a", &endpoints[..1]).unwrap();
    agent.wait_ended("removed", 2);
    let mut alive = 0;
    for mut stream in &streams {
        alive += usize::from(
            stream.write_all(b"y").is_ok() && client::read(stream, &mut [0]).is_ok_and(|read| read == 1),
        );
    }
    assert_eq!(alive, 2);
    for _ in 0..4 {
        drop(connect());
    }
}

/// A signal that a thread has to see to ends its `bpf(BPF_PROG_LOAD)` with `EAGAIN`: a debugger's or a freezer's stop, too.
#[test]
fn an_agent_that_is_stopped_for_moments_while_it_starts_has_the_tier_all_the_same() {
    // The gaps grow, so that some come while it loads, however slow the machine is.
    const STOPS: &str = "(for pause in 0.02 0.03 0.05 0.08 0.12 0.2 0.3 0.5 0.8; do sleep $pause; kill -STOP $$; kill -CONT $$; done) & exec \"$0\" \"$@\"";
    if !is_ready() {
        return;
    }
    let command = AgentCommand::new(&DIRECT).wrapped(&["sh", "-c", STOPS]);
    let forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
    wait_direct(&forwarding.agent);
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"hello").unwrap();
    wait_until("it is direct", WAIT, || listed(&forwarding.agent, "direct").len() == 1);
}
