//! Hosts that vanish without a word, and hosts that only do not read: at every tier the former end a connection after the same
//! time, and the latter never.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::peer;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Forwarding, Topology, client, require_root, wait_until};

const WAIT: Duration = Duration::from_secs(20);
const TIERS: [&str; 4] = ["copy", "splice", "tc", "sockmap"];
/// With this, a peer may say nothing for [`PATIENCE`]: six probes follow, at least a second apart.
const KEEPALIVE: [&str; 2] = ["--keepalive", "2s"];
const PATIENCE: Duration = Duration::from_secs(8);
/// What timers and a slow machine may add.
const SLACK: Duration = Duration::from_secs(6);
/// More than all buffers on the way hold.
const MUCH: usize = 48 << 20;

fn start<F>(family: Family, tier: &str, handle: F) -> Forwarding
where
    F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let topology = Topology::new().expect("a network");
    let arguments = [&["--datapath", tier, "--offload-after", "0B"][..], &KEEPALIVE].concat();
    Forwarding::serve(topology, family, &AgentCommand::new(&arguments), handle)
        .expect("an agent between two hosts")
}

/// Connects, and waits until the connection is at the tier.
fn connect(forwarding: &Forwarding, family: Family, tier: &str) -> TcpStream {
    let stream =
        client::connect(&forwarding.topology.client, forwarding.address_of(family)).expect("connect");
    wait_until(&format!("the connection is at tier {tier}"), WAIT, || {
        client::ping(&stream, b"are you there?").expect("an echo");
        let connections = forwarding.agent.connections("").expect("a list");
        let is_there =
            |name: &str| connections.iter().any(|one| one["tier"] == name && one["state"] == "offloaded");
        !matches!(tier, "tc" | "sockmap") || is_there(tier)
    });
    stream
}

/// Runs a test at every tier and for both families at once: it waits most of the time.
fn each(test: impl Fn(Family, &'static str) + Sync) {
    if !require_root() {
        return;
    }
    thread::scope(|scope| {
        for family in [Family::V4, Family::V6] {
            for tier in TIERS {
                let test = &test;
                scope.spawn(move || test(family, tier));
            }
        }
    });
}

#[test]
fn who_writes_to_a_host_that_has_vanished_is_told_after_the_same_time_at_every_tier() {
    each(|family, tier| {
        let forwarding = start(family, tier, peer::echo);
        let mut stream = connect(&forwarding, family, tier);
        // It hears, but nothing that it says leaves it.
        for version in ["-4", "-6"] {
            let rule = [version, "rule", "add", "blackhole", "priority", "1"];
            forwarding.topology.backend1.ip(&rule).expect("a rule");
        }
        let vanished = Instant::now();
        stream.write_all(b"is anybody there?").expect("it goes into a buffer");
        stream.set_read_timeout(Some(PATIENCE + SLACK)).expect("an option");
        let told = client::read(&stream, &mut [0; 100]);
        let after = vanished.elapsed();
        println!("{tier}, {family:?}: {told:?} after {after:?}");
        let is_reset = told.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset);
        assert!(is_reset, "{tier}, {family:?}: {told:?} after {after:?}\n{}", forwarding.agent.log());
        assert!(after + Duration::from_secs(1) >= PATIENCE, "{tier}, {family:?}: {after:?} is too early");
        forwarding.agent.wait_ended("upstream_reset", 1);
    });
}

#[test]
fn who_only_does_not_read_for_long_keeps_its_connection() {
    each(|family, tier| {
        // After the first pings it does not read for longer than a vanished one would be given.
        let forwarding = start(family, tier, |mut stream| {
            let mut word = [0; 14];
            loop {
                stream.read_exact(&mut word)?;
                if &word == b"take your time" {
                    break;
                }
                stream.write_all(&word)?;
            }
            thread::sleep(PATIENCE + SLACK);
            let mut read = 0;
            let mut buffer = vec![0; 1 << 20];
            while read < MUCH {
                match client::read(stream, &mut buffer)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    more => read += more,
                }
            }
            stream.write_all(b"all of it")
        });
        let mut stream = connect(&forwarding, family, tier);
        stream.write_all(b"take your time").expect("sent");
        stream.set_write_timeout(Some(PATIENCE + SLACK + WAIT)).expect("an option");
        stream.set_read_timeout(Some(WAIT)).expect("an option");
        stream.write_all(&vec![7; MUCH]).unwrap_or_else(|error| {
            panic!("{tier}, {family:?}: {error}\n{}", forwarding.agent.log());
        });
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        assert_eq!(answer, "all of it", "{tier}, {family:?}");
    });
}
