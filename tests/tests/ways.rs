//! What offloaded connections do when the ways that their packets take change, vanish or swallow.

use std::io::{self, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{AT_ONCE, at_once, is_ready};
use forwarder_tests::{Forwarding, Topology, peer, process, wait_until};

const WAIT: Duration = Duration::from_secs(10);
/// A deadline for what a lost packet may delay.
const LONG: Duration = Duration::from_secs(25);

#[test]
fn an_interface_that_comes_back_is_used_again() {
    if !is_ready() {
        return;
    }
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let old = forwarding.connect_offloaded(1).remove(0);
    for round in 0..2 {
        // What is sent again just when the interface is back, before the agent knows, meets the stack, which resets it.
        wait_until("nothing waits for an acknowledgement", WAIT, || {
            let host = &forwarding.topology.backend1;
            let sockets = host.stdout(Command::new("ss").args(["-tinH", "state", "established"]));
            !sockets.expect("it works").contains("unacked:")
        });
        forwarding.topology.remove_backend1_link().expect("it works");
        forwarding.topology.restore_backend1_link().expect("it works");
        wait_until("connections are offloaded again", LONG, || {
            assert!(forwarding.agent.is_running());
            forwarding.connect().is_ok_and(|stream| {
                let offloaded = |stream: &TcpStream| {
                    forwarding.agent.offloaded().contains(&stream.local_addr().expect("a connected socket"))
                };
                let alive = client::ping(&stream, b"anew").is_ok();
                alive
                    && forwarder_tests::wait_for(Duration::from_secs(1), || {
                        (client::ping(&stream, b"more").is_ok() && offloaded(&stream)).then_some(())
                    })
                    .is_some()
            })
        });
        client::ping(&old, b"the one from before").unwrap_or_else(|error| panic!("round {round}: {error}"));
    }
    drop(old);
    forwarding.agent.wait_empty();
}

#[test]
fn the_clients_of_an_endpoint_that_is_gone_are_told() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&at_once(&["--keepalive", "1s"]), peer::echo).expect("it works");
    let streams = forwarding.connect_offloaded(3);
    let died = Instant::now();
    forwarding.topology.remove_backend1_link().expect("it works");
    for stream in &streams {
        assert_eq!(client::end(stream, LONG).expect("it works"), End::Reset);
    }
    println!("told after {:?}", died.elapsed());
    assert!(died.elapsed() < Duration::from_secs(15), "{:?}", died.elapsed());
    forwarding.agent.wait_empty();
    assert_eq!(forwarding.agent.active().expect("it works"), 0);
}

/// Has the first host of backends drop what the node redirects, but not what the node says itself, which its firewall sees
/// and marks.
fn swallow(forwarding: &Forwarding) {
    let marks = "add table ip marks\n\
        add chain ip marks leaving { type filter hook postrouting priority 0; }\n\
        add rule ip marks leaving ip dscp set af11\n";
    let drops = "add table ip swallow\n\
        add chain ip swallow arriving { type filter hook prerouting priority -300; }\n\
        add rule ip swallow arriving meta l4proto tcp ip dscp != af11 drop\n";
    let Topology { node, backend1, .. } = &forwarding.topology;
    for (host, rules) in [(node, marks), (backend1, drops)] {
        let folder = tempfile::tempdir().expect("it works");
        let path = folder.path().join("rules");
        std::fs::write(&path, rules).expect("it works");
        let mut nft = Command::new("nft");
        host.run(|| process::stdout(nft.arg("-f").arg(&path))).expect("it works");
    }
}

/// Writes to a connection, and pauses once in between.
struct Pausing<'a, F: Fn()> {
    stream: &'a TcpStream,
    /// How many bytes are left to be written before the pause.
    left: usize,
    pause: F,
}

impl<F: Fn()> Write for Pausing<'_, F> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let limit = if self.left == 0 { data.len() } else { self.left.min(data.len()) };
        let size = self.stream.write(&data[..limit])?;
        if self.left > 0 {
            self.left -= size;
            if self.left == 0 {
                (self.pause)();
            }
        }
        Ok(size)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

#[test]
fn what_a_swallowing_way_took_is_taken_back() {
    const SIZE: u64 = 3 << 20;
    /// So much comes before the handover, which an upload would else outrun.
    const FIRST: usize = 256 << 10;
    if !is_ready() || !require_program("nft") {
        return;
    }
    // At once, and in the middle of an upload.
    for offload_after in ["0B", "64KiB"] {
        let arguments = ["--datapath", "tc", "--offload-after", offload_after];
        let forwarding = Forwarding::start(&arguments, peer::digest).expect("it works");
        swallow(&forwarding);
        let agent = &forwarding.agent;
        let upload = |seed| {
            let mut stream = forwarding.connect().expect("it works");
            let pause = || {
                wait_until("a connection was offloaded", WAIT, || {
                    agent.metric("forwarder_offloads_total") > 0
                });
            };
            let mut pausing = Pausing { stream: &stream, left: FIRST, pause };
            let sent = forwarder_tests::random::send(&mut pausing, seed, SIZE).expect("it works");
            stream.shutdown(std::net::Shutdown::Write).expect("it works");
            let mut answer = String::new();
            io::Read::read_to_string(&mut stream, &mut answer).unwrap_or_else(|error| {
                panic!("{offload_after}: no answer: {error}\n{}", forwarding.agent.log())
            });
            assert_eq!(answer, format!("{} {SIZE}", forwarder_tests::random::hex(sent)), "{offload_after}");
        };
        let started = Instant::now();
        upload(1);
        println!("{offload_after}: the first took {:?}", started.elapsed());
        assert_eq!(agent.metric("forwarder_offloads_taken_back_total"), 1, "{offload_after}");
        let offloads = agent.metric("forwarder_offloads_total");
        for seed in 2..5 {
            upload(seed);
        }
        assert_eq!(agent.metric("forwarder_offloads_total"), offloads, "{offload_after}: tried again");
        assert!(agent.fallbacks("path_broken") >= 3, "{offload_after}");
        wait_until("all have ended", WAIT, || agent.active().expect("it works") == 0);
        agent.wait_empty();
    }
}

#[test]
fn a_conversation_on_a_swallowing_way_goes_on_in_userspace() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    let forwarding =
        Forwarding::start(&["--datapath", "tc", "--offload-after", "300ms"], peer::echo).expect("it works");
    swallow(&forwarding);
    let agent = &forwarding.agent;
    let talk = |stream: &TcpStream| {
        for number in 0..100 {
            client::ping(stream, format!("message {number}").as_bytes())
                .unwrap_or_else(|error| panic!("message {number}: {error}\n{}", agent.log()));
        }
    };
    let first = forwarding.connect().expect("it works");
    client::ping(&first, b"before").expect("it works");
    wait_until("it is offloaded", WAIT, || agent.metric("forwarder_offloads_total") == 1);
    talk(&first);
    assert_eq!(forwarding.agent.metric("forwarder_offloads_taken_back_total"), 1);
    let offloads = forwarding.agent.metric("forwarder_offloads_total");
    let second = forwarding.connect().expect("it works");
    client::ping(&second, b"before").expect("it works");
    wait_until("it is refused", WAIT, || agent.fallbacks("path_broken") >= 1);
    talk(&second);
    assert_eq!(forwarding.agent.metric("forwarder_offloads_total"), offloads);
    let connections = forwarding.agent.connections("").expect("it works");
    assert!(
        connections.len() == 2 && connections.iter().all(|one| one["tier"] == "splice"),
        "{connections:?}"
    );
}

/// The programs see packets before the node translates their addresses, and after it does.
#[test]
fn connections_that_the_node_translates_stay_in_userspace() {
    if !is_ready() || !require_program("nft") {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let (agent, node) = (&forwarding.agent, &forwarding.topology.node);
    let nft = |rules: &str| node.run(|| process::stdout(Command::new("nft").arg(rules))).expect("it works");
    nft("add table ip translate; \
         add chain ip translate arriving { type nat hook prerouting priority -100; }; \
         add chain ip translate leaving { type nat hook postrouting priority 100; }; \
         add rule ip translate arriving tcp dport 8080 redirect to :9001");
    let talk = |stream: &TcpStream| {
        for number in 0..50 {
            client::ping(stream, format!("message {number}").as_bytes())
                .unwrap_or_else(|error| panic!("message {number}: {error}\n{}", agent.log()));
        }
    };
    let address = forwarding.topology.node_address(8080);
    let redirected = client::connect(&forwarding.topology.client, address).expect("it works");
    talk(&redirected);
    wait_until("it is refused", WAIT, || agent.fallbacks("translated") == 1);
    // What is tracked, but not translated, is offloaded.
    let plain = forwarding.connect_offloaded(1).remove(0);
    nft("add rule ip translate leaving oifname veth2 masquerade random");
    let masqueraded = forwarding.connect().expect("it works");
    talk(&masqueraded);
    wait_until("it is refused too", WAIT, || agent.fallbacks("translated") == 2);
    [&redirected, &plain, &masqueraded].into_iter().for_each(talk);
    assert_eq!(agent.offloaded(), [plain.local_addr().expect("a connected socket")]);
}
