//! However an agent ends, no cut stream looks whole; and its own bugs end it, instead of living on in it.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use forwarder_tests::agent::stepped_binary;
use forwarder_tests::client::{self, End};
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER, LISTENER_PORT};
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::swarm::raise_descriptor_limit;
use forwarder_tests::{
    Agent, AgentCommand, Forwarding, Manifests, Topology, peer, require_root, serialise, wait_until,
};
use rustix::process::Signal;
use socket2::SockRef;
use tempfile::TempDir;

static HEAVY: Mutex<()> = Mutex::new(());
const WAIT: Duration = Duration::from_secs(10);
/// On how many of the connections the endpoint has sent more than its client has read.
const FULL: usize = 20;

/// How many connections are cut: as many as `FORWARDER_TEST_CUT` says.
fn count() -> usize {
    env::var("FORWARDER_TEST_CUT").map_or(1_000, |count| count.parse().expect("a number of connections"))
}

/// Opens connections through an agent with `arguments`, ends the agent, and asserts that each is reset at both ends.
fn cut(arguments: &[&str], end: impl FnOnce(&mut Agent)) {
    let _guard = serialise(&HEAVY);
    raise_descriptor_limit().expect("it works");
    let topology = Topology::new().expect("it works");
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let listener = topology.backend1.bind(endpoint).expect("it works");
    SockRef::from(&listener).set_read_timeout(Some(WAIT)).expect("it works");
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("it works");
    let mut agent = Agent::start(&topology.node, &manifests.path(), arguments).expect("it works");
    let address = topology.node_address(LISTENER_PORT);
    let connect = || {
        let mut client = TcpStream::connect(address).expect("it works");
        client.write_all(b"x").expect("it works");
        let (mut endpoint, _) = listener.accept().expect("it works");
        endpoint.set_read_timeout(Some(WAIT)).expect("it works");
        endpoint.read_exact(&mut [0]).expect("it works");
        (client, endpoint)
    };
    let (clients, endpoints): (Vec<_>, Vec<_>) =
        topology.client.run(|| (0..count()).map(|_| connect()).unzip());
    for mut endpoint in endpoints.iter().take(FULL) {
        endpoint.set_nonblocking(true).expect("it works");
        let full = loop {
            if let Err(error) = endpoint.write(&[7; 4096]) {
                break error;
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        endpoint.set_nonblocking(false).expect("it works");
    }
    end(&mut agent);
    for (side, streams) in [("client", clients), ("endpoint", endpoints)] {
        let ends: Vec<_> = streams.iter().map(|stream| client::end(stream, WAIT).expect("an end")).collect();
        let count = |end: End| ends.iter().filter(|one| **one == end).count();
        let counts = [End::Reset, End::Fin, End::Open].map(count);
        println!("{side}: {counts:?} reset, ended and open");
        assert_eq!(counts, [ends.len(), 0, 0], "{arguments:?}, {side}: reset, ended and open");
    }
}

#[test]
fn a_killed_agent_resets_what_it_has_in_userspace() {
    if !require_root() {
        return;
    }
    for datapath in ["splice", "copy", "sockmap"] {
        cut(&["--datapath", datapath], |agent| agent.kill().expect("it works"));
    }
}

#[test]
fn a_second_signal_resets_whatever_is_open() {
    if !require_root() {
        return;
    }
    for datapath in ["splice", "sockmap"] {
        cut(&["--datapath", datapath, "--workers", "1", "--drain-timeout", "60s"], |agent| {
            agent.terminate().expect("it works");
            wait_until("it drains", WAIT, || agent.log().contains("draining"));
            agent.terminate().expect("it works");
            let status = agent.wait(WAIT).expect("the second signal does not wait");
            assert_eq!(status.code(), Some(0), "{status}");
        });
    }
}

/// An agent that panics at a step where a file in the folder says so.
fn start_panicking(folder: &Path) -> Forwarding {
    let variable = format!("FORWARDER_FAILPOINTS={}", folder.display());
    let command = AgentCommand::new(&AT_ONCE).with_binary(stepped_binary()).wrapped(&["env", &variable]);
    Forwarding::start_with(&command, peer::echo).expect("it works")
}

#[test]
fn a_panic_ends_the_agent_and_not_what_the_kernel_forwards() {
    if !is_ready() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let mut forwarding = start_panicking(folder.path());
    let offloaded = forwarding.connect_offloaded(3);
    File::create(folder.path().join("join.begin.panic")).expect("a writable folder");
    let cut = forwarding.connect().expect("it works");
    let status = forwarding.agent.wait(WAIT).expect("a panic ends the agent");
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}: {}", forwarding.agent.log());
    assert_eq!(client::end(&cut, WAIT).expect("an end"), End::Reset);
    let log = forwarding.agent.log();
    assert!(
        log.contains("BUG: a thread has panicked") && log.contains("told to panic at join.begin"),
        "{log}"
    );
    for stream in &offloaded {
        client::ping(stream, b"as if nothing had happened").expect("it lives on");
    }
    forwarding.succeed(&AT_ONCE).expect("it works");
    assert_eq!(forwarding.agent.metric("forwarder_pairs_inherited_total"), 3);
}

#[test]
fn manifests_that_make_the_agent_panic_take_nothing_away() {
    if !require_root() {
        return;
    }
    let folder = TempDir::new().expect("a folder");
    let forwarding = start_panicking(folder.path());
    let (first, second) = (forwarding.server.address(), forwarding.topology.backend2_address(ENDPOINT_PORT));
    let panics = folder.path().join("source.load.panic");
    File::create(&panics).expect("a writable folder");
    forwarding.manifests.service("a", &[second]).expect("it works");
    wait_until("it says so", WAIT, || {
        forwarding.agent.log().contains("BUG: the agent cannot read the manifests")
    });
    assert_eq!(forwarding.agent.endpoints(LISTENER), [first]);
    client::ping(&forwarding.connect().expect("it works"), b"as before").expect("an echo");
    fs::remove_file(&panics).expect("it is there");
    forwarding.agent.wait_endpoints(LISTENER, &[second]);
}

#[test]
fn a_hangup_has_the_manifests_read_and_ends_nothing() {
    if !require_root() {
        return;
    }
    let mut forwarding = Forwarding::start(&["--datapath", "splice"], peer::echo).expect("it works");
    let stream = forwarding.connect().expect("it works");
    for time in 1..=2 {
        forwarding.agent.hang_up().expect("it works");
        wait_until("it says so", WAIT, || {
            forwarding.agent.log().matches("SIGHUP: reading the manifests again").count() == time
        });
    }
    client::ping(&stream, b"still here").expect("an echo");
    client::ping(&forwarding.connect().expect("it works"), b"new").expect("an echo");
    assert!(forwarding.agent.is_running());
}
