//! Offloaded connections that end by themselves, by their agent or by an operator, and what they use meanwhile.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::kernel::{AT_ONCE, at_once, is_ready, standing};
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::{Agent, Forwarding, Manifests, Topology, peer, serialise, wait_for, wait_until};
use nix::errno::Errno;
use socket2::{Domain, Socket, Type};

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(10);
/// How connections are told apart on both sides: by the first byte.
type Mark = u8;

/// A server that echoes until the connection ends, and tells then how it did, by the mark: the first byte. An end of the
/// client is not passed on: what comes after it is told.
fn marked() -> (impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static, Receiver<(Mark, End)>) {
    let (sender, ends) = mpsc::channel();
    let handle = move |mut stream: &TcpStream| {
        let mut mark = None;
        let mut buffer = [0; 1024];
        let end = loop {
            match client::read(stream, &mut buffer) {
                Ok(0) => match wait_for(WAIT, || stream.take_error().ok().flatten()) {
                    Some(_) => break End::Reset,
                    None => break End::Fin,
                },
                Ok(size) => {
                    mark.get_or_insert(buffer[0]);
                    stream.write_all(&buffer[..size])?;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => break End::Reset,
                Err(error) => {
                    println!("the endpoint of connection {mark:?} gives up: {error}");
                    break End::Open;
                }
            }
        };
        sender.send((mark.unwrap_or_default(), end)).map_err(io::Error::other)
    };
    (handle, ends)
}

/// Connections whose first byte is their number, offloaded.
fn marked_connections(forwarding: &Forwarding, count: Mark) -> Vec<TcpStream> {
    let streams: Vec<TcpStream> = (0..count).map(|_| forwarding.connect().expect("it works")).collect();
    for (mark, stream) in (0..count).zip(&streams) {
        client::ping(stream, &[mark]).expect("it works");
    }
    forwarding.offload(&streams);
    streams
}

/// Runs `forwarder conns reset` for one connection in the node's namespace.
fn reset(forwarding: &Forwarding, stream: &TcpStream) -> String {
    let downstream = stream.local_addr().expect("it works").to_string();
    let mut command = forwarding.agent.command(&["conns", "reset", "--downstream", &downstream]);
    forwarding.topology.node.stdout(&mut command).expect("it works")
}

#[test]
fn an_idle_connection_is_reset_at_both_ends_in_time() {
    if !is_ready() {
        return;
    }
    thread::scope(|scope| {
        scope.spawn(|| check_timeout("--idle-timeout", "idle_timeout"));
        scope.spawn(|| check_timeout(HALF_CLOSED, "half_closed_timeout"));
    });
}

const HALF_CLOSED: &str = "--half-closed-timeout";

fn check_timeout(setting: &str, reason: &str) {
    let (handle, ends) = marked();
    let forwarding = Forwarding::start(&at_once(&[setting, "2s"]), handle).expect("it works");
    let stream = marked_connections(&forwarding, 1).remove(0);
    // What moves is not idle.
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(2_500) {
        client::ping(&stream, b"still here").expect("it works");
        thread::park_timeout(Duration::from_millis(100));
    }
    let last = Instant::now();
    if setting == HALF_CLOSED {
        stream.shutdown(Shutdown::Write).expect("it works");
    }
    assert_eq!(client::end(&stream, WAIT).expect("it works"), End::Reset, "{setting}");
    let took = last.elapsed();
    assert_eq!(ends.recv_timeout(Duration::from_secs(1)).expect("it works"), (0, End::Reset), "{setting}");
    assert!(
        took > Duration::from_millis(1_700) && took < Duration::from_secs(4),
        "{setting}: reset {took:?} after the last byte"
    );
    forwarding.agent.wait_ended(reason, 1);
    forwarding.agent.wait_empty();
}

#[test]
fn an_operator_resets_just_the_connection_that_is_named() {
    if !is_ready() {
        return;
    }
    let (handle, ends) = marked();
    let mut forwarding = Forwarding::start(&AT_ONCE, handle).expect("it works");
    let streams = marked_connections(&forwarding, 5);
    let check = |forwarding: &Forwarding, reset_mark: Mark, rest: &[Mark]| {
        let stream = &streams[usize::from(reset_mark)];
        assert_eq!(reset(forwarding, stream), "reset 1 connection\n");
        assert_eq!(client::end(stream, WAIT).expect("it works"), End::Reset);
        assert_eq!(ends.recv_timeout(WAIT).expect("it works"), (reset_mark, End::Reset));
        for mark in rest {
            client::ping(&streams[usize::from(*mark)], b"untouched").unwrap_or_else(|error| {
                let standing = standing(&forwarding.agent, &forwarding.topology);
                panic!(
                    "connection {mark} does not live on: {error}; heard of: {:?}\n{standing}",
                    ends.try_recv()
                )
            });
        }
        assert!(ends.recv_timeout(peer::QUIET).is_err(), "another one was reset too");
    };
    check(&forwarding, 1, &[0, 2, 3, 4]);
    forwarding.agent.wait_ended("reset_by_operator", 1);

    forwarding.agent.kill().expect("it works");
    check(&forwarding, 3, &[0, 2, 4]);
    let mut list = forwarding.agent.command(&["conns", "--output", "json"]);
    let list = forwarding.topology.node.stdout(&mut list).expect("it works");
    for (mark, stream) in streams.iter().enumerate() {
        let is_listed = list.contains(&format!("\"{}\"", stream.local_addr().expect("it works")));
        assert_eq!(is_listed, [0, 2, 4].contains(&mark), "connection {mark}: {list}");
    }

    forwarding.succeed(&AT_ONCE).expect("it works");
    assert_eq!(forwarding.agent.metric("forwarder_pairs_inherited_total"), 3);
    check(&forwarding, 0, &[2, 4]);
}

#[test]
fn the_end_of_a_dead_client_is_told_to_the_endpoint() {
    if !is_ready() {
        return;
    }
    // Its host is mute, or gone, and the node's interface with it.
    let deaths: [&[&str]; 2] = [&["link", "set", "eth0", "down"], &["link", "del", "eth0"]];
    thread::scope(|scope| {
        for death in deaths {
            scope.spawn(move || {
                let (handle, ends) = marked();
                let forwarding =
                    Forwarding::start(&at_once(&["--keepalive", "1s"]), handle).expect("it works");
                let _stream = marked_connections(&forwarding, 1).remove(0);
                // One that lives answers.
                assert!(ends.recv_timeout(Duration::from_secs(3)).is_err(), "a live client was given up");
                forwarding.topology.client.ip(death).expect("it works");
                let died = Instant::now();
                let end = ends.recv_timeout(Duration::from_secs(20)).expect("the endpoint is told");
                println!("{death:?}: told after {:?}", died.elapsed());
                assert_eq!(end, (0, End::Reset), "{death:?}");
                forwarding.agent.wait_empty();
            });
        }
    });
}

#[test]
fn connections_beyond_the_maps_room_are_carried_all_the_same() {
    const ROOM: usize = 4;
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&at_once(&["--max-pairs", "4"]), peer::echo).expect("it works");
    let streams: Vec<TcpStream> = (0..12).map(|_| forwarding.connect().expect("it works")).collect();
    let ping_all =
        || streams.iter().for_each(|stream| client::ping(stream, b"all the same").expect("it works"));
    let agent = &forwarding.agent;
    // A way on which nothing has moved since a handover began proves nothing: it does not end before.
    wait_until("as many as there is room for are offloaded", WAIT, || {
        ping_all();
        agent.offloaded().len() == ROOM && usize::try_from(agent.pairs()) == Ok(ROOM)
    });
    wait_until("the reason is counted", WAIT, || agent.fallbacks("map_full") >= 8);
    for _ in 0..3 {
        ping_all();
    }
    assert_eq!(agent.offloaded().len(), ROOM);
    let connections = agent.connections("").expect("it works");
    assert_eq!(connections.iter().filter(|one| one["tier"] == "splice").count(), 8, "{connections:?}");

    drop(streams);
    agent.wait_empty();
    drop(forwarding.connect_offloaded(ROOM));
    agent.wait_empty();
}

/// Connects from a given port, as soon as the kernel lets it be used again.
fn connect_from(forwarding: &Forwarding, port: u16) -> TcpStream {
    let connect = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from(([10, 0, 1, 2], port)).into())?;
        socket.connect_timeout(&forwarding.address().into(), WAIT)?;
        io::Result::Ok(TcpStream::from(socket))
    };
    let connected = wait_for(WAIT, || match forwarding.topology.client.run(connect) {
        Err(error) if Errno::from_raw(error.raw_os_error().unwrap_or_default()) == Errno::EADDRNOTAVAIL => {
            None
        }
        connected => Some(connected),
    });
    let stream = connected.expect("the port is free again").expect("connect");
    stream.set_read_timeout(Some(WAIT)).expect("it works");
    stream
}

#[test]
fn a_clients_port_may_be_used_again_at_once() {
    const TIMES: u64 = 100;
    const HASTY: u64 = 5;
    if !is_ready() {
        return;
    }
    // The server ends first, so that the client's port is free as soon as it has ended too.
    let forwarding = Forwarding::start(&AT_ONCE, |mut stream| {
        let mut request = [0; 16];
        loop {
            stream.read_exact(&mut request)?;
            stream.write_all(&request)?;
            if request[0] == b'!' {
                return stream
                    .shutdown(Shutdown::Write)
                    .and_then(|()| client::read(stream, &mut [0]).map(drop));
            }
        }
    })
    .expect("it works");
    // Where the end comes before the handover is complete, the new SYN has to come twice.
    for (times, waits) in [(TIMES, true), (HASTY, false)] {
        for number in 0..times {
            let stream = connect_from(&forwarding, 30_000);
            let talk = |message| {
                client::ping(&stream, format!("{message}{number:08}").as_bytes())
                    .unwrap_or_else(|error| panic!("connection {number} (waits: {waits}): {error}"));
            };
            talk("message ");
            if waits {
                wait_until("it is offloaded", WAIT, || {
                    talk("message ");
                    let connections = forwarding.agent.connections("").expect("it works");
                    connections.iter().any(|one| one["state"] == "offloaded")
                });
            }
            talk("!goodbye");
            assert_eq!(client::read(&stream, &mut [0]).expect("it works"), 0, "the server's end arrives");
        }
    }
    forwarding.agent.wait_empty();
    forwarding.agent.wait_ended("finished", i64::try_from(TIMES + HASTY).expect("it works"));
}

#[test]
fn twenty_thousand_connections_leave_nothing_behind() {
    const BATCH: usize = 200;
    const BATCHES: usize = 100;
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    raise_descriptor_limit().expect("it works");
    let topology = Topology::new().expect("it works");
    let endpoint = topology.backend1_address(5000);
    let manifests = Manifests::forward(9001, &[endpoint]).expect("it works");
    let _server = Swarm::start(&topology.backend1, endpoint).expect("it works");
    let agent = Agent::start(&topology.node, &manifests.path(), &AT_ONCE).expect("it works");
    let address = topology.node_address(9001);
    let batch = || {
        let offloads = || agent.metric("forwarder_offloads_total");
        let wanted = offloads() + i64::try_from(BATCH).expect("it works");
        let streams: Vec<TcpStream> =
            (0..BATCH).map(|_| TcpStream::connect(address).expect("it works")).collect();
        for stream in &streams {
            stream.set_read_timeout(Some(WAIT)).expect("it works");
            client::ping(stream, b"first").expect("it works");
        }
        wait_until("all are offloaded", WAIT, || offloads() == wanted);
        for stream in &streams {
            client::ping(stream, b"second").expect("it works");
        }
    };
    let run = |batches: usize| {
        topology.client.run(|| (0..batches).for_each(|_| batch()));
        agent.wait_empty();
        (agent.descriptors().expect("it works"), agent.rss_kib().expect("it works"))
    };
    // What is used once and kept for good: buffers as large as so many connections at such a rate take.
    let (descriptors, rss) = run(BATCHES / 2);
    let started = Instant::now();
    let (descriptors_after, rss_after) = run(BATCHES / 2);
    println!("{:?}; {rss} KiB, then {rss_after} KiB", started.elapsed());
    assert_eq!(agent.metric("forwarder_offloads_total"), i64::try_from(BATCH * BATCHES).expect("it works"));
    assert_eq!(agent.ended("finished"), agent.metric("forwarder_offloads_total"));
    assert!(descriptors_after <= descriptors + 8, "{descriptors} descriptors, then {descriptors_after}");
    // The allocator grows by steps of some MiB; a leak of a KiB for each connection would be more.
    assert!(rss_after < rss + (16 << 10), "{rss} KiB, then {rss_after} KiB");
    let sockets =
        topology.node.stdout(Command::new("ss").args(["-Htan", "state", "connected", "sport = :9001"]));
    assert_eq!(sockets.expect("it works"), "");
}
