//! Tier `sockmap`: what it refuses and says, what it bounds, and how its connections end.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::agent::binary;
use forwarder_tests::client::{self, End};
use forwarder_tests::fixture::LISTENER;
use forwarder_tests::swarm::raise_descriptor_limit;
use forwarder_tests::{
    Agent, AgentCommand, Forwarding, NetNs, peer, process, random, require_root, serialise, wait_until,
};
use serde_json::Value;
use socket2::SockRef;

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(20);
const AT_ONCE: [&str; 4] = ["--datapath", "sockmap", "--offload-after", "0B"];

fn at_once<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&AT_ONCE[..], more].concat()
}

/// The clients of the connections that are listed at a tier.
fn at_tier(agent: &Agent, tier: &str) -> BTreeSet<SocketAddr> {
    let connections = agent.connections("").expect("a list");
    let chosen = connections.iter().filter(|one| one["tier"] == tier);
    chosen.filter_map(|one| one["downstream"].as_str()?.parse().ok()).collect()
}

#[track_caller]
fn wait_at_tier(agent: &Agent, tier: &str, count: usize) {
    wait_until(&format!("{count} connections are at tier {tier}"), WAIT, || {
        at_tier(agent, tier).len() == count
    });
}

/// Runs the command line in the node's namespace.
fn forwarder(forwarding: &Forwarding, arguments: &[&str]) -> String {
    let mut command = forwarding.agent.command(arguments);
    forwarding.topology.node.stdout(&mut command).expect("it works")
}

/// A server that echoes until the connection ends, and tells then how it did.
fn watched() -> (impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static, Receiver<End>) {
    let (sender, ends) = mpsc::channel();
    let handle = move |stream: &TcpStream| {
        let end = peer::echo_to_end(stream)?;
        sender.send(end).map_err(io::Error::other)
    };
    (handle, ends)
}

#[test]
fn what_the_kernel_joins_is_listed_counted_and_shown_by_bpftool() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).unwrap();
    let agent = &forwarding.agent;
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"hello").unwrap();
    wait_at_tier(agent, "sockmap", 1);
    for _ in 0..100 {
        client::ping(&stream, &[7; 1000]).unwrap();
    }
    let listed = &agent.connections("").unwrap()[0];
    assert_eq!((&listed["state"], &listed["listener"]), (&"offloaded".into(), &LISTENER.into()), "{listed}");
    assert_eq!((&listed["receivedBytes"], &listed["sentBytes"]), (&100_005.into(), &100_005.into()));
    let sum =
        |name: &str, tier| agent.metrics().unwrap().sum(name, &[("listener", LISTENER), ("tier", tier)]);
    wait_until("what was redirected is counted", WAIT, || {
        sum("forwarder_received_bytes_total", "sockmap") >= 100_000
            && sum("forwarder_sent_bytes_total", "sockmap") >= 100_000
    });
    let verdicts =
        |name: &str| agent.metrics().unwrap().sum("forwarder_sockmap_verdicts_total", &[("verdict", name)]);
    assert!(verdicts("redirected") >= 200);
    assert_eq!((verdicts("broken"), verdicts("target_missing")), (0, 0));

    let mut command = Command::new("bpftool");
    command.args(["-j", "map", "dump", "name", "sockmap_streams"]);
    let dump: Value = serde_json::from_str(&process::stdout(&mut command).unwrap()).unwrap();
    let text = dump.to_string();
    for field in ["peer", "listener_id", "redirected", "passed", "held", "state"] {
        assert!(text.contains(&format!("\"{field}\"")), "{field}: {text}");
    }
}

#[test]
fn a_self_test_that_fails_leaves_connections_at_splice_and_says_so() {
    if !require_root() {
        return;
    }
    let command = AgentCommand::new(&AT_ONCE).environment("FORWARDER_FAIL_SOCKMAP_SELF_TEST", "1");
    let forwarding = Forwarding::start_with(&command, peer::transfer).unwrap();
    let agent = &forwarding.agent;
    client::transfer(&forwarding.connect().unwrap(), 1, 500_000, 500_000).unwrap();
    assert!(agent.fallbacks("self_test_failed") > 0);
    assert!(agent.log().contains("the self-test has failed"), "{}", agent.log());
    let listed = forwarder(&forwarding, &["datapath"]);
    let row = listed.lines().find(|line| line.starts_with("sockmap")).unwrap();
    assert!(row.contains("unavailable") && row.contains("self-test"), "{listed}");
    let mut probe = Command::new(binary());
    probe.arg("probe").env("FORWARDER_FAIL_SOCKMAP_SELF_TEST", "1");
    let probed = forwarding.topology.node.stdout(&mut probe).unwrap();
    let row = probed.lines().find(|line| line.starts_with("tier sockmap")).unwrap();
    assert!(row.contains(" no ") && row.contains("self-test"), "{probed}");
}

#[test]
fn without_capabilities_connections_stay_at_splice() {
    if !require_root() {
        return;
    }
    let command = AgentCommand::new(&AT_ONCE).wrapped(&["setpriv", "--bounding-set=-all", "--inh-caps=-all"]);
    let forwarding = Forwarding::start_with(&command, peer::transfer).unwrap();
    client::transfer(&forwarding.connect().unwrap(), 1, 500_000, 500_000).unwrap();
    assert!(forwarding.agent.fallbacks("no_programs") > 0);
    assert_eq!(forwarding.agent.log().matches("tier sockmap does not work").count(), 1);
}

#[test]
fn an_operator_switches_the_tier_off_and_on() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).unwrap();
    let agent = &forwarding.agent;
    let joined = forwarding.connect().unwrap();
    client::ping(&joined, b"1").unwrap();
    wait_at_tier(agent, "sockmap", 1);
    assert!(forwarder(&forwarding, &["datapath", "off", "sockmap"]).contains("off"));
    let relayed = forwarding.connect().unwrap();
    client::ping(&relayed, b"2").unwrap();
    wait_until("the second is refused", WAIT, || agent.fallbacks("switched_off") > 0);
    // What was joined stays so, and goes on.
    client::ping(&joined, b"3").unwrap();
    client::ping(&relayed, b"4").unwrap();
    assert_eq!(at_tier(agent, "sockmap"), BTreeSet::from([joined.local_addr().unwrap()]));
    let reason =
        agent.connections("").unwrap().iter().find_map(|one| one["reason"].as_str().map(str::to_owned));
    assert_eq!(reason.as_deref(), Some("switched_off"));
    assert!(!forwarder(&forwarding, &["datapath", "on", "sockmap"]).contains("off"));
    // It is tried again once more has moved, or after a while.
    wait_until("both are joined", WAIT, || {
        client::ping(&relayed, &[5; 1000]).unwrap();
        at_tier(agent, "sockmap").len() == 2
    });
}

#[test]
fn what_there_is_no_room_for_stays_at_splice() {
    if !require_root() {
        return;
    }
    for (limit, reason) in [("--max-pairs=2", "map_full"), ("--sockmap-memory=1100KiB", "memory_full")] {
        let forwarding = Forwarding::start(&at_once(&[limit]), peer::echo).unwrap();
        let agent = &forwarding.agent;
        let mut streams: Vec<_> = (0..5).map(|_| forwarding.connect().unwrap()).collect();
        let ping = |streams: &[TcpStream]| {
            for stream in streams {
                client::ping(stream, b"hello").unwrap();
            }
        };
        ping(&streams);
        wait_at_tier(agent, "sockmap", 2);
        wait_until(reason, WAIT, || agent.fallbacks(reason) >= 3);
        ping(&streams);
        // Room that is left is used.
        let joined = at_tier(agent, "sockmap");
        streams.retain(|stream| !joined.contains(&stream.local_addr().unwrap()));
        wait_until("two others are joined", WAIT, || {
            ping(&streams);
            let others = at_tier(agent, "sockmap");
            // Those that have just been closed may be listed still.
            others.len() == 2 && others.is_disjoint(&joined)
        });
    }
}

#[test]
fn connections_end_by_time_outs_by_operators_and_with_the_agent() {
    if !require_root() {
        return;
    }
    let (handle, ends) = watched();
    let mut forwarding =
        Forwarding::start(&at_once(&["--idle-timeout", "2s", "--drain-timeout", "1s"]), handle).unwrap();
    let connect = |forwarding: &Forwarding| {
        let stream = forwarding.connect().unwrap();
        client::ping(&stream, b"hello").unwrap();
        wait_at_tier(&forwarding.agent, "sockmap", 1);
        stream
    };
    let check = |stream: &TcpStream| {
        assert_eq!(client::end(stream, WAIT).unwrap(), End::Reset);
        assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Reset);
    };

    let started = Instant::now();
    check(&connect(&forwarding));
    assert!(started.elapsed() > Duration::from_millis(1_700), "{:?}", started.elapsed());
    forwarding.agent.wait_ended("idle_timeout", 1);

    let stream = connect(&forwarding);
    let address = stream.local_addr().unwrap().to_string();
    assert_eq!(forwarder(&forwarding, &["conns", "reset", "--downstream", &address]), "reset 1 connection\n");
    check(&stream);
    forwarding.agent.wait_ended("reset_by_operator", 1);

    let stream = connect(&forwarding);
    forwarding.agent.terminate().unwrap();
    check(&stream);
    assert!(forwarding.agent.wait(WAIT).unwrap().success());

    forwarding.succeed(&AT_ONCE).unwrap();
    let stream = connect(&forwarding);
    forwarding.agent.kill().unwrap();
    check(&stream);
}

#[test]
fn resets_and_ends_pass_through() {
    if !require_root() {
        return;
    }
    let (handle, ends) = watched();
    let forwarding = Forwarding::start(&AT_ONCE, handle).unwrap();
    let connect = || {
        let stream = forwarding.connect().unwrap();
        client::ping(&stream, b"hello").unwrap();
        wait_at_tier(&forwarding.agent, "sockmap", 1);
        stream
    };
    client::reset(connect()).unwrap();
    assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Reset);
    wait_at_tier(&forwarding.agent, "sockmap", 0);
    forwarding.agent.wait_ended("downstream_reset", 1);

    let mut stream = connect();
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last words");
    assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Fin);
    wait_until("it has ended well", WAIT, || forwarding.agent.ended("finished") == 1);
    assert_eq!(forwarding.agent.metric("forwarder_sockmap_reserved_bytes"), 0);
}

#[test]
fn a_client_that_uploads_before_it_reads_is_not_locked_out() {
    const EACH_WAY: u64 = 48 << 20;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    // What the server sends meanwhile fills every buffer on the way to the client.
    let (sender, received) = mpsc::channel();
    let forwarding = Forwarding::start(&AT_ONCE, move |stream| {
        let (mut reader, mut writer) = (stream, stream);
        thread::scope(|scope| {
            let sends = scope.spawn(move || {
                random::send(&mut writer, 2, EACH_WAY)?;
                writer.shutdown(Shutdown::Write)
            });
            sender.send(random::receive_to_end(&mut reader)?).map_err(io::Error::other)?;
            sends.join().expect("it does not panic")
        })
    })
    .unwrap();
    let mut stream = forwarding.connect().unwrap();
    let digest = random::send(&mut stream, 1, EACH_WAY).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(received.recv_timeout(WAIT).unwrap(), (digest, EACH_WAY));
    assert_eq!(random::receive_to_end(&mut stream).unwrap(), (random::digest(2, EACH_WAY), EACH_WAY));
    assert_eq!(forwarding.agent.metric("forwarder_sockmap_stalled_total"), 0);
}

#[test]
fn a_thousand_stalled_readers_hold_no_more_than_they_may() {
    const READERS: usize = 1000;
    const MEMORY: u64 = 256 << 20;
    const BUFFER: usize = 64 << 10;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    raise_descriptor_limit().unwrap();
    let accepted: Arc<Mutex<Vec<(u16, TcpStream)>>> = Arc::default();
    let held = Arc::clone(&accepted);
    let (release, released) = mpsc::channel::<()>();
    let released = Arc::new(Mutex::new(released));
    let forwarding = Forwarding::start(&AT_ONCE, move |mut stream| {
        // The client's port, so that something has moved; and nothing more is read.
        let mut port = [0; 2];
        stream.read_exact(&mut port)?;
        held.lock().unwrap().push((u16::from_be_bytes(port), stream.try_clone()?));
        let _ = released.lock().unwrap().recv();
        Ok(())
    })
    .unwrap();
    let agent = &forwarding.agent;
    let mut streams = Vec::new();
    for _ in 0..READERS {
        let mut stream = forwarding.connect().unwrap();
        SockRef::from(&stream).set_send_buffer_size(BUFFER).unwrap();
        stream.write_all(&stream.local_addr().unwrap().port().to_be_bytes()).unwrap();
        stream.set_nonblocking(true).unwrap();
        streams.push((stream, 2_u64));
    }
    wait_until("all readers have begun", WAIT, || accepted.lock().unwrap().len() == READERS);
    wait_until("as many are joined as there is memory for", WAIT, || {
        at_tier(agent, "sockmap").len() >= READERS / 3 && agent.fallbacks("memory_full") > 0
    });
    // As much as goes in, until nothing has for a while.
    let block = vec![1; 256 << 10];
    let mut last = Instant::now();
    while last.elapsed() < Duration::from_secs(2) {
        let mut progress = 0;
        for (stream, written) in &mut streams {
            while let Ok(size) = stream.write(&block) {
                *written += size as u64;
                progress += size;
            }
        }
        if progress > 0 {
            last = Instant::now();
        }
        thread::park_timeout(Duration::from_millis(10));
    }
    let joined = at_tier(agent, "sockmap");
    let ports: BTreeSet<u16> = joined.iter().map(SocketAddr::port).collect();
    // What the clients' kernel has got rid of, less what the server's has got.
    let waiting = unacknowledged(&forwarding.topology.client);
    let left = |(stream, written): &(TcpStream, u64)| {
        let client = stream.local_addr().unwrap();
        if joined.contains(&client) { written - waiting[&client] } else { 0 }
    };
    let left: u64 = streams.iter().map(left).sum();
    // Of the joined ones alone: the others hold something else.
    let unread = |stream: &TcpStream| rustix::io::ioctl_fionread(stream).unwrap();
    let arrived = |(port, stream): &(u16, TcpStream)| ports.contains(port).then(|| 2 + unread(stream));
    let arrived: u64 = accepted.lock().unwrap().iter().filter_map(arrived).sum();
    let sum = left.saturating_sub(arrived);
    let reserved = agent.metric("forwarder_sockmap_reserved_bytes");
    println!(
        "{} of {READERS} are joined; they hold {} KiB, and reserve {} KiB",
        joined.len(),
        sum >> 10,
        reserved >> 10
    );
    assert!(sum > MEMORY / 16, "the readers do not stall: {sum} bytes");
    assert!(sum <= MEMORY, "{sum} bytes are held");
    assert!(u64::try_from(reserved).unwrap() <= MEMORY, "{reserved} bytes are reserved");
    assert_eq!(agent.metric("forwarder_sockmap_stalled_total"), 0);
    drop(release);
}

/// Bytes that wait to be acknowledged, by the local address of each connection of `netns`.
fn unacknowledged(netns: &NetNs) -> BTreeMap<SocketAddr, u64> {
    let text = netns.stdout(Command::new("ss").args(["-Htn", "state", "established"])).expect("ss works");
    let row = |line: &str| {
        let mut columns = line.split_ascii_whitespace();
        let (waiting, local) = (columns.nth(1)?.parse().ok()?, columns.next()?.parse().ok()?);
        Some((local, waiting))
    };
    text.lines().filter_map(row).collect()
}
