//! Offloaded connections outlive their agent, however it ends, and the next one looks after them.

use std::env;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::attach::is_by_clsact;
use forwarder_tests::client::{self, End};
use forwarder_tests::fixture::LISTENER;
use forwarder_tests::kernel::{AT_ONCE, at_once, is_ready};
use forwarder_tests::traffic::Traffic;
use forwarder_tests::{Forwarding, peer, process, require_root, serialise, wait_until};
use serde_json::Value;

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(10);
/// A deadline for what a lost packet may delay.
const LONG: Duration = Duration::from_secs(25);

/// How many transfers go on when the next agent starts: as many as `FORWARDER_TEST_FLOWS` says.
fn flows() -> usize {
    env::var("FORWARDER_TEST_FLOWS").map_or(100, |count| count.parse().expect("a number of transfers"))
}

#[test]
fn transfers_end_whole_without_an_agent() {
    const FLOWS: usize = 100;
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let traffic = Traffic::start(forwarding.connect_offloaded(FLOWS));
    traffic.wait_progress(LONG);
    forwarding.agent.kill().expect("it works");
    for _ in 0..3 {
        traffic.wait_progress(LONG);
    }
    println!("{} bytes each way", traffic.finish().expect("it works"));

    // What has ended meanwhile, nobody has removed: the next agent does.
    forwarding.succeed(&AT_ONCE).expect("it works");
    forwarding.agent.wait_empty();
}

#[test]
fn a_new_agent_takes_over_what_a_killed_one_has_left() {
    let count = flows();
    let flows = i64::try_from(count).expect("a count");
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let streams = forwarding.connect_offloaded(count);
    let mut clients: Vec<_> = streams.iter().map(|stream| stream.local_addr().expect("it works")).collect();
    clients.sort_unstable();
    let traffic = Traffic::start(streams);
    traffic.wait_progress(LONG);
    forwarding.agent.kill().expect("it works");
    traffic.wait_progress(LONG);
    forwarding.succeed(&AT_ONCE).expect("it works");
    let agent = &forwarding.agent;
    assert_eq!(agent.metric("forwarder_pairs_inherited_total"), flows, "{}", agent.log());
    wait_until("all are listed with their listener", WAIT, || {
        let connections = agent.connections(&format!("?listener={LISTENER}")).expect("it works");
        let mut listed: Vec<_> = connections
            .iter()
            .filter(|one| one["tier"] == "tc" && one["backend"] == "default/a:3306")
            .map(|one| one["downstream"].as_str().expect("it works").parse::<SocketAddr>().expect("it works"))
            .collect();
        listed.sort_unstable();
        listed == clients
    });
    assert_eq!(agent.active().expect("it works"), flows);
    let received = || {
        let metrics = agent.metrics().expect("it works");
        metrics.sum("forwarder_received_bytes_total", &[("listener", LISTENER), ("tier", "tc")])
    };
    let before = received();
    traffic.wait_progress(LONG);
    wait_until("bytes are counted", WAIT, || received() > before);

    traffic.finish().expect("it works");
    wait_until("their ends are counted", WAIT, || agent.ended("finished") == flows);
    assert_eq!(agent.active().expect("it works"), 0);
    agent.wait_empty();

    // And it is an agent like any other.
    drop(forwarding.connect_offloaded(1));
    forwarding.agent.wait_empty();
}

/// Connects again and again until told to stop; how long the longest attempt took, and how many there were.
fn connect_always(forwarding: &Forwarding, stop: &AtomicBool) -> Result<(Duration, usize), io::Error> {
    let address = forwarding.address();
    forwarding.topology.client.run(|| {
        let (mut longest, mut count) = (Duration::ZERO, 0);
        while !stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            let stream = TcpStream::connect_timeout(&address, LONG)?;
            stream.set_read_timeout(Some(LONG))?;
            client::ping(&stream, b"one of many")?;
            longest = longest.max(started.elapsed());
            count += 1;
        }
        Ok((longest, count))
    })
}

#[test]
fn an_upgrade_loses_and_refuses_no_connection() {
    const BUSY: usize = 100;
    const IDLE: usize = 100;
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let arguments = ["--datapath", "tc", "--drain-timeout", "60s"];
    let mut forwarding = Forwarding::start(&arguments, peer::echo).expect("it works");
    let connect =
        |count| -> Vec<TcpStream> { (0..count).map(|_| forwarding.connect().expect("it works")).collect() };
    let traffic = Traffic::start(connect(BUSY));
    traffic.wait_progress(LONG);
    // Some of these have not even been noticed when the agent is asked to leave.
    let idle = connect(IDLE);
    let stop = AtomicBool::new(false);
    let mut successor = None;
    let attempts: Vec<_> = thread::scope(|scope| {
        let connecting: Vec<_> = (0..4).map(|_| scope.spawn(|| connect_always(&forwarding, &stop))).collect();
        let accepted = forwarding.server.accepted();
        wait_until("connections are made", WAIT, || forwarding.server.accepted() > accepted + 20);
        let started = Instant::now();
        let id = rustix::process::Pid::from_raw(forwarding.agent.id().try_into().expect("it works"))
            .expect("it works");
        rustix::process::kill_process(id, rustix::process::Signal::TERM).expect("it works");
        wait_until("the agent has left", Duration::from_secs(20), || {
            // It is a zombie until its owner asks.
            let status = fs::read_to_string(format!("/proc/{}/stat", forwarding.agent.id()));
            status.map_or(true, |status| status.contains(") Z "))
        });
        println!("left after {:?}", started.elapsed());
        let command = forwarder_tests::AgentCommand::new(&arguments).succeeding(&forwarding.agent);
        successor =
            Some(command.start(&forwarding.topology.node, &forwarding.manifests.path()).expect("it works"));
        let accepted = forwarding.server.accepted();
        wait_until("connections are made again", LONG, || forwarding.server.accepted() > accepted + 20);
        stop.store(true, Ordering::Relaxed);
        connecting.into_iter().map(|thread| thread.join().expect("it works")).collect()
    });
    let log = forwarding.agent.log();
    for attempt in attempts {
        let (longest, count) =
            attempt.unwrap_or_else(|error| panic!("a new connection failed: {error}\n{log}"));
        println!("{count} connections, the slowest in {longest:?}");
        assert!(longest < WAIT, "{longest:?}");
    }
    forwarding.agent = successor.expect("it works");
    traffic.wait_progress(LONG);
    for (number, stream) in idle.iter().enumerate() {
        if let Err(error) = client::ping(stream, b"after the upgrade") {
            panic!("idle connection {number}: {error}\n{log}");
        }
    }
    println!("{} bytes each way", traffic.finish().expect("it works"));
    drop(idle);
    forwarding.agent.wait_empty();
}

#[test]
fn a_new_connection_waits_for_the_next_agent() {
    if !require_root() {
        return;
    }
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    forwarding.agent.kill().expect("it works");
    let (client, address) = (forwarding.topology.client.clone(), forwarding.address());
    let (sender, connected) = mpsc::channel();
    let waiting = thread::spawn(move || sender.send(client::connect(&client, address)).expect("it works"));
    let early = connected.recv_timeout(Duration::from_secs(1));
    assert!(early.is_err(), "nobody listens: {early:?}");
    forwarding.succeed(&AT_ONCE).expect("it works");
    let stream = connected.recv_timeout(WAIT).expect("it works").expect("held back, not refused");
    client::ping(&stream, b"at last").expect("it works");
    waiting.join().expect("it works");
}

#[test]
fn new_connections_are_held_back_for_no_longer_than_said() {
    if !require_root() {
        return;
    }
    for (hold, earliest, latest) in [
        ("0", Duration::ZERO, Duration::from_millis(500)),
        ("2s", Duration::from_millis(1500), Duration::from_secs(6)),
    ] {
        let mut forwarding = Forwarding::start(&at_once(&["--hold", hold]), peer::echo).expect("it works");
        let killed = Instant::now();
        forwarding.agent.kill().expect("it works");
        let error = forwarding.connect().expect_err("nobody listens");
        let took = killed.elapsed();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "--hold {hold}: {error}");
        assert!(took >= earliest && took < latest, "--hold {hold}: refused after {took:?}");
    }
}

/// The files under a folder, or none if there is no folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

/// What is pinned by which programs hang on interfaces, and these programs: what bpftool calls them, and their numbers.
fn hanging(forwarding: &Forwarding) -> Vec<[String; 2]> {
    let pins = files(forwarding.agent.pin_dir());
    let pins = pins.iter().filter(|path| path.parent().is_some_and(|folder| folder.ends_with("links")));
    let kind = if is_by_clsact() { "prog" } else { "link" };
    pins.flat_map(|path| {
        let text = process::stdout(Command::new("bpftool").args(["-j", kind, "show", "pinned"]).arg(path));
        let pinned: Value = serde_json::from_str(&text.expect("bpftool")).expect("JSON");
        let numbers = [(kind, &pinned["id"]), ("prog", &pinned["prog_id"])];
        numbers.map(|(kind, id)| [kind.to_owned(), id.to_string()])
    })
    .filter(|[_, id]| id != "null")
    .collect()
}

#[test]
fn an_interrupted_agent_resets_its_connections_and_leaves_nothing() {
    const FLOWS: usize = 10;
    if !is_ready() {
        return;
    }
    let (sender, ends) = mpsc::channel();
    let mut forwarding = Forwarding::start(&AT_ONCE, move |stream| {
        let end = match peer::echo(stream) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => End::Reset,
            Err(_) => End::Open,
            Ok(()) => End::Fin,
        };
        sender.send(end).map_err(io::Error::other)
    })
    .expect("it works");
    let mut streams = forwarding.connect_offloaded(FLOWS);
    let hanging = hanging(&forwarding);
    assert!(!hanging.is_empty(), "no program hangs anywhere");
    // One that the agent has just offloaded, too.
    streams.extend(forwarding.connect_offloaded(1));
    forwarding.agent.interrupt().expect("it works");
    for stream in &streams {
        assert_eq!(client::end(stream, WAIT).expect("it works"), End::Reset);
    }
    for number in 0..=FLOWS {
        assert_eq!(ends.recv_timeout(WAIT).ok(), Some(End::Reset), "endpoint {number}");
    }
    let status = forwarding.agent.wait(WAIT).expect("nothing holds the agent");
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(!forwarding.agent.pin_dir().exists(), "{:?}", files(forwarding.agent.pin_dir()));
    for [kind, id] in hanging {
        wait_until(&format!("{kind} {id} is gone"), WAIT, || {
            process::stdout(Command::new("bpftool").args([&kind, "show", "id", &id])).is_err()
        });
    }
    assert_eq!(forwarding.connect().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}
