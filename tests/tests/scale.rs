//! Many connections at once, and more of them than there are descriptors.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER, LISTENER_PORT};
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::{
    Agent, AgentCommand, BackendRef, Manifests, Topology, client, require_root, serialise, wait_until,
};

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(30);

#[test]
fn five_thousand_connections_all_pass_data_and_all_end() {
    const CONNECTIONS: usize = 5000;
    const THREADS: usize = 4;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let limit = raise_descriptor_limit().unwrap();
    assert!(limit > 2 * CONNECTIONS as u64 + 500, "this test opens two sockets for each connection: {limit}");
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Swarm::start(&topology.backend1, endpoint).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let before = agent.rss_kib().unwrap();
    let start = Instant::now();
    let address = topology.node_address(LISTENER_PORT);
    let streams: Vec<TcpStream> = thread::scope(|scope| {
        let connect = || {
            let attempt = |_| client::connect(&topology.client, address).expect("connect");
            (0..CONNECTIONS / THREADS).map(attempt).collect::<Vec<_>>()
        };
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(connect)).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    println!("{CONNECTIONS} connections in {:?}", start.elapsed());
    wait_until("all are active", WAIT, || agent.active().unwrap() == i64::try_from(CONNECTIONS).unwrap());
    for round in 0..2 {
        for (number, mut stream) in streams.iter().enumerate() {
            stream.write_all(format!("{round} {number:>8}").as_bytes()).unwrap();
        }
        for (number, mut stream) in streams.iter().enumerate() {
            let mut answer = [0; 10];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(answer.as_slice(), format!("{round} {number:>8}").as_bytes());
        }
    }
    let growth = agent.rss_kib().unwrap().saturating_sub(before);
    println!(
        "the agent grew by {growth} KiB: {} bytes for each connection",
        growth * 1024 / CONNECTIONS as u64
    );
    drop(streams);
    wait_until("no connection is active", WAIT, || agent.active().unwrap() == 0);
}

#[test]
fn more_clients_than_descriptors_are_served_once_others_leave() {
    const CLIENTS: usize = 400;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    raise_descriptor_limit().unwrap();
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Swarm::start(&topology.backend1, endpoint).unwrap();
    let command = AgentCommand::new(&[]).wrapped(&["prlimit", "--nofile=256:256"]);
    let mut agent = command.start(&topology.node, &manifests.path()).unwrap();
    let address = topology.node_address(LISTENER_PORT);

    let mut waiting: VecDeque<TcpStream> = VecDeque::new();
    let mut refused = 0;
    for _ in 0..CLIENTS {
        let mut stream = client::connect(&topology.client, address).unwrap();
        // A connection that the agent has reset already cannot be written to.
        match stream.write_all(b"x") {
            Ok(()) => {
                stream.set_nonblocking(true).unwrap();
                waiting.push_back(stream);
            }
            Err(_) => refused += 1,
        }
    }
    // Every client gets an answer, or at least a reset, when those who have got theirs leave.
    let mut answered = 0;
    wait_until("every client got an answer or a reset", WAIT, || {
        for _ in 0..waiting.len() {
            let mut stream = waiting.pop_front().expect("counted above");
            match stream.read(&mut [0]) {
                Ok(1) => answered += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => waiting.push_back(stream),
                Ok(_) | Err(_) => refused += 1,
            }
        }
        waiting.is_empty()
    });
    println!("{answered} of {CLIENTS} answered, {refused} reset");
    assert!(answered >= 50, "{answered} of {CLIENTS} answered");
    assert!(agent.is_running());
    wait_until("the agent recovers", WAIT, || agent.active().is_ok_and(|active| active == 0));
    for _ in 0..50 {
        client::ping(&client::connect(&topology.client, address).unwrap(), b"after").unwrap();
    }
    // It slept or waited through the shortage instead of spinning.
    assert!(agent.log().lines().count() < 5 * CLIENTS, "the shortage flooded the log");
}

/// Listeners stop where connections, and the agent itself, would have no descriptors left, and go on when others leave.
#[test]
fn listeners_leave_descriptors_to_connections_and_to_the_agent() {
    const LIMIT: &str = "--nofile=1024:1024";
    // Of 768 descriptors that are not the agent's own, listeners may have three quarters.
    const SHARE: usize = 576;
    const GATEWAYS: u16 = 13;
    const OF_EACH: u16 = 50;
    const CONNECTIONS: usize = 90;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::new().unwrap();
    manifests.service("a", &[endpoint]).unwrap();
    let port = |gateway: u16, index: u16| 20_000 + gateway * OF_EACH + index;
    for gateway in 0..GATEWAYS {
        // A route is that of the listener of its name: only the first one of each Gateway has one.
        let names: Vec<String> =
            (0..OF_EACH).map(|index| format!("r{}", gateway + index * GATEWAYS)).collect();
        let listeners: Vec<_> =
            (0..).zip(&names).map(|(index, name)| (&**name, port(gateway, index))).collect();
        let name = format!("gw{gateway}");
        manifests.gateway_on(&name, None, &listeners).unwrap();
        let backend = BackendRef { service: "a", weight: 1 };
        manifests.route_to(&name, &format!("r{gateway}"), &[backend]).unwrap();
    }
    let _server = Swarm::start(&topology.backend1, endpoint).unwrap();
    let command = AgentCommand::new(&["--workers", "1"]).wrapped(&["prlimit", LIMIT]);
    let agent = command.spawn(&topology.node, &manifests.path()).unwrap();
    let bound = || {
        agent.state().map(|state| {
            state["listeners"].as_array().unwrap().iter().filter(|it| it["bound"] == true).count()
        })
    };
    wait_until("listeners have their share", WAIT, || bound().is_ok_and(|bound| bound == SHARE));
    let ready = agent.ready().unwrap();
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("the agent may have 1024 files open"), "{}", ready.body);

    let address = topology.node_address(port(0, 0));
    let streams: Vec<TcpStream> =
        (0..CONNECTIONS).map(|_| client::connect(&topology.client, address).unwrap()).collect();
    for stream in &streams {
        client::ping(stream, b"x").unwrap();
    }
    assert_eq!(agent.active().unwrap(), i64::try_from(CONNECTIONS).unwrap());

    manifests.remove("gateway-gw1").unwrap();
    manifests.remove("gateway-gw2").unwrap();
    let all = usize::from(OF_EACH * (GATEWAYS - 2));
    wait_until("the others are bound", WAIT, || bound().is_ok_and(|bound| bound == all));
    assert_eq!(agent.ready().unwrap().status, 200);
}

#[test]
fn clients_held_without_descriptors_do_not_burn_the_processor() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    raise_descriptor_limit().unwrap();
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Swarm::start(&topology.backend1, endpoint).unwrap();
    // Who waits for a descriptor does so for as long as a connect may take.
    let command = AgentCommand::new(&["--connect-timeout", "1m"]).wrapped(&["prlimit", "--nofile=256:256"]);
    let agent = command.start(&topology.node, &manifests.path()).unwrap();
    let address = topology.node_address(LISTENER_PORT);
    let streams: Vec<_> = (0..300).map(|_| client::connect(&topology.client, address).unwrap()).collect();
    let start = Instant::now();
    let before = processor_ticks(agent.id());
    // Two seconds in which nothing happens but the shortage.
    while start.elapsed() < Duration::from_secs(2) {
        thread::park_timeout(Duration::from_millis(100));
    }
    let ticks = processor_ticks(agent.id()) - before;
    assert!(ticks < 60, "{ticks} hundredths of a second in two seconds");
    // Nobody is turned away: who cannot be connected yet waits.
    let is_reset = |mut stream: &TcpStream| {
        stream.set_nonblocking(true).unwrap();
        !matches!(stream.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    };
    let reset = streams.iter().filter(|stream| is_reset(stream)).count();
    assert_eq!(reset, 0, "of {} clients", streams.len());

    // A change that cannot be read now must not look like a folder without listeners.
    let before = topology.node.listening_inodes(LISTENER_PORT);
    assert!(!before.is_empty());
    manifests.service("a", &[endpoint, topology.backend2_address(ENDPOINT_PORT)]).unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        assert_eq!(topology.node.listening_inodes(LISTENER_PORT), before);
        thread::park_timeout(Duration::from_millis(50));
    }
    drop(streams);
    agent.wait_endpoints(LISTENER, &[endpoint, topology.backend2_address(ENDPOINT_PORT)]);
}

/// The processor time of a process, in hundredths of a second (`USER_HZ`).
fn processor_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).expect("a running process");
    let (_, fields) = stat.rsplit_once(") ").expect("a name in parentheses");
    fields.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}
