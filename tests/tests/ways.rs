//! What offloaded connections do when the ways that their packets take change, vanish or swallow.

use std::io::{self, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use forwarder_tests::agent::stepped_binary;
use forwarder_tests::client::{self, End};
use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{AT_ONCE, at_once, is_ready};
use forwarder_tests::netns::NetNs;
use forwarder_tests::{AgentCommand, Forwarding, Topology, peer, process, wait_until};

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

/// Has a host drop what the node redirects, but not what the node says itself, which its firewall sees and marks.
fn swallow(forwarding: &Forwarding, receiver: &NetNs) {
    let marks = "add table ip marks\n\
        add chain ip marks leaving { type filter hook postrouting priority 0; }\n\
        add rule ip marks leaving ip dscp set af11\n";
    let drops = "add table ip swallow\n\
        add chain ip swallow arriving { type filter hook prerouting priority -300; }\n\
        add rule ip swallow arriving meta l4proto tcp ip dscp != af11 drop\n";
    for (host, rules) in [(&forwarding.topology.node, marks), (receiver, drops)] {
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
        swallow(&forwarding, &forwarding.topology.backend1);
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
    swallow(&forwarding, &forwarding.topology.backend1);
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

/// How often who only sends does so, and how much.
const TICK: Duration = Duration::from_millis(20);
const DROP: [u8; 100] = [7; 100];

/// Sends a little again and again, until the other end is gone.
fn drip(mut stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    while stream.write_all(&DROP).is_ok() {
        std::thread::sleep(TICK);
    }
    Ok(())
}

/// Reads what a stream brings, so many bytes or to its end; tells how many those were.
fn read_up_to(stream: &TcpStream, most: usize) -> usize {
    let (mut data, mut received) = ([0; 4096], 0);
    stream.set_read_timeout(Some(LONG)).expect("it works");
    while received < most {
        match client::read(stream, &mut data) {
            Ok(0) | Err(_) => break,
            Ok(size) => received += size,
        }
    }
    received
}

/// Where nothing but acknowledgements goes by a way that swallows them, their receiver goes on for a while all the same.
#[test]
fn a_way_that_swallows_acknowledgements_is_found_out() {
    /// What comes before the sender has to wait for an acknowledgement, and much more.
    const MUCH: usize = 500 * DROP.len();
    if !is_ready() || !require_program("nft") {
        return;
    }
    let receive = |stream: &TcpStream| {
        read_up_to(stream, usize::MAX);
        Ok(())
    };
    for is_download in [true, false] {
        let forwarding = if is_download {
            Forwarding::start(&AT_ONCE, drip)
        } else {
            Forwarding::start(&AT_ONCE, receive)
        };
        let forwarding = forwarding.expect("it works");
        let Topology { client, backend1, .. } = &forwarding.topology;
        swallow(&forwarding, if is_download { backend1 } else { client });
        let agent = &forwarding.agent;
        let transfer = || {
            let stream = forwarding.connect().expect("it works");
            if is_download {
                return read_up_to(&stream, MUCH);
            }
            stream.set_write_timeout(Some(LONG)).expect("it works");
            let mut sent = 0;
            while sent < MUCH && (&stream).write_all(&DROP).is_ok() {
                sent += DROP.len();
                std::thread::sleep(TICK);
            }
            sent
        };
        let started = Instant::now();
        transfer();
        println!("download {is_download}: the first was ended after {:?}", started.elapsed());
        agent.wait_ended("lost", 1);
        // Whoever comes next does not go that way.
        assert_eq!(transfer(), MUCH, "download {is_download}\n{}", agent.log());
        assert!(agent.fallbacks("path_broken") >= 1, "download {is_download}");
        wait_until("all have ended", WAIT, || agent.active().expect("it works") == 0);
        agent.wait_empty();
    }
}

/// What is sent one way only proves its path too.
#[test]
fn a_transfer_that_nobody_answers_is_offloaded() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, drip).expect("it works");
    let stream = forwarding.connect().expect("it works");
    let reader = stream.try_clone().expect("it works");
    let reading = std::thread::spawn(move || read_up_to(&reader, usize::MAX));
    forwarding.agent.wait_pairs(1);
    wait_until("its path is proven", WAIT, || forwarding.agent.offloaded().len() == 1);
    stream.shutdown(std::net::Shutdown::Both).expect("it works");
    assert!(reading.join().expect("it works") > 0);
    forwarding.agent.wait_empty();
}

/// An end that has heard of the other what the sockets have not could go on with nobody.
#[test]
fn a_way_that_works_again_just_as_a_connection_is_taken_back_ends_it() {
    const STEP: &str = "take_back.begin";
    if !is_ready() || !require_program("nft") {
        return;
    }
    let folder = tempfile::tempdir().expect("it works");
    let [stop, reached] = ["stop", "reached"].map(|what| folder.path().join(format!("{STEP}.{what}")));
    std::fs::write(&stop, "").expect("it works");
    let variable = format!("FORWARDER_FAILPOINTS={}", folder.path().display());
    let arguments = ["--datapath", "tc", "--offload-after", "300ms"];
    let command = AgentCommand::new(&arguments).with_binary(stepped_binary()).wrapped(&["env", &variable]);
    let forwarding = Forwarding::start_with(&command, peer::echo).expect("it works");
    let backend = &forwarding.topology.backend1;
    swallow(&forwarding, backend);
    let agent = &forwarding.agent;
    let stream = forwarding.connect().expect("it works");
    client::ping(&stream, b"before").expect("it works");
    wait_until("it is offloaded", WAIT, || agent.metric("forwarder_offloads_total") == 1);
    (&stream).write_all(b"swallowed").expect("it works");
    wait_until("it is to be taken back", WAIT, || reached.exists());
    let mut nft = Command::new("nft");
    backend.run(|| process::stdout(nft.args(["delete", "table", "ip", "swallow"]))).expect("it works");
    // Sent again, it arrives, and is answered.
    let mut answer = [0; 9];
    stream.set_read_timeout(Some(LONG)).expect("it works");
    io::Read::read_exact(&mut (&stream), &mut answer).expect("it works");
    assert_eq!(&answer, b"swallowed");
    std::fs::remove_file(&stop).expect("it works");
    assert_eq!(client::end(&stream, WAIT).expect("it works"), End::Reset, "{}", agent.log());
    agent.wait_ended("lost", 1);
    agent.wait_empty();
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
