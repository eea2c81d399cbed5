//! Attacks by somebody who is not on the path of a connection, and knows no more of it than its addresses and ports: none does
//! more to an offloaded connection than to one of the kernel's sockets, which is the control.

use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use forwarder_tests::client::{self, End};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::forge::{self, ACK, FIN, Forged, RST, SYN};
use forwarder_tests::kernel::{at_once, dump, is_ready};
use forwarder_tests::peer::Server;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Forwarding, Manifests, NetNs, Topology, peer, wait_until};

const WAIT: Duration = Duration::from_secs(10);
/// Longer than the agent waits before it tells the other end of a reset (2 s).
const TOLD: Duration = Duration::from_millis(3_500);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// A step that no window is smaller than, and how many of them go through all sequence numbers.
const STEP: u32 = 65_000;
const STEPS: u32 = 66_077;

/// Who forwards the connection that is attacked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum By {
    /// Two sockets: the control.
    Sockets,
    /// The programs, by redirection.
    Programs,
    /// The programs, by the node's stack.
    Stack,
    /// The programs, and a second agent looks after it.
    SecondAgent,
}

const ALL: [By; 4] = [By::Sockets, By::Programs, By::Stack, By::SecondAgent];

struct Attacked {
    forwarding: Forwarding,
    family: Family,
    stream: TcpStream,
}

/// A connection to an echo server, idle.
fn start(by: By, family: Family, more: &[&str]) -> Attacked {
    let topology = Topology::new().expect("a network");
    // What the stack needs to send packets on.
    topology.node.sysctl("ipv4/conf/all/accept_local", "1").expect("a variable");
    for device in ["all", "veth1", "veth2", "veth3"] {
        topology.node.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0").expect("a variable");
    }
    let endpoint = match family {
        Family::V4 => topology.backend1_address(ENDPOINT_PORT),
        Family::V6 => topology.backend1_address_v6(ENDPOINT_PORT),
    };
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("manifests");
    let server = Server::start(&topology.backend1, endpoint, peer::echo).expect("a server");
    let arguments = match by {
        By::Sockets => [&["--datapath", "splice"], more].concat(),
        By::Programs | By::SecondAgent => at_once(more),
        By::Stack => at_once(&[&["--egress", "stack"], more].concat()),
    };
    let agent = AgentCommand::new(&arguments).start(&topology.node, &manifests.path()).expect("an agent");
    let mut forwarding = Forwarding { agent, server, manifests, topology };
    let stream =
        client::connect(&forwarding.topology.client, listener(&forwarding, family)).expect("connect");
    client::ping(&stream, b"here").expect("an echo");
    if by != By::Sockets {
        forwarding.offload(std::slice::from_ref(&stream));
    }
    if by == By::SecondAgent {
        forwarding.agent.kill().expect("it ends");
        forwarding.succeed(&arguments).expect("another agent");
        forwarding.agent.wait_pairs(1);
    }
    let attacked = Attacked { forwarding, family, stream };
    // A worker notes it when a connection is no longer a short one.
    wait_until("its address is listed", WAIT, || attacked.view()["upstreamLocal"].is_string());
    attacked
}

fn listener(forwarding: &Forwarding, family: Family) -> SocketAddr {
    match family {
        Family::V4 => forwarding.topology.node_address(LISTENER_PORT),
        Family::V6 => forwarding.topology.node_address_v6(LISTENER_PORT),
    }
}

impl Attacked {
    fn view(&self) -> serde_json::Value {
        self.forwarding.agent.connections("").expect("a list").pop().expect("a connection")
    }

    /// From the client to the listener.
    fn downstream(&self) -> [SocketAddr; 2] {
        [self.stream.local_addr().expect("a connected socket"), listener(&self.forwarding, self.family)]
    }

    /// From the endpoint to the node.
    fn upstream(&self) -> [SocketAddr; 2] {
        let view = self.view();
        ["upstream", "upstreamLocal"]
            .map(|end| view[end].as_str().and_then(|text| text.parse().ok()).expect("an address"))
    }

    /// Sends in the client's name, from its network; and in the endpoint's.
    fn send(&self, segments: impl Iterator<Item = Forged> + Send + Clone) {
        let Topology { client, backend1, .. } = &self.forwarding.topology;
        forge::send(client, self.downstream(), segments.clone()).expect("sent");
        forge::send(backend1, self.upstream(), segments).expect("sent");
    }

    /// Checks that nothing happens for a while, and that the connection lives then.
    #[track_caller]
    fn check_alive(&self, what: &str) {
        let end = client::end(&self.stream, TOLD).expect("a socket");
        assert_eq!(end, End::Open, "{what}: {}", self.forwarding.agent.log());
        let echo = client::ping(&self.stream, b"still here");
        assert!(echo.is_ok(), "{what}: {echo:?}");
    }

    /// Ends the connection, and checks that nothing is left of it.
    fn finish(self) {
        drop(self.stream);
        let agent = &self.forwarding.agent;
        wait_until("it has ended", WAIT, || agent.active().is_ok_and(|active| active == 0));
        agent.wait_ended("finished", 1);
    }

    /// The number that the endpoint expects next, in the client's terms: what only somebody on the path knows.
    fn expected(&self) -> u32 {
        let pairs = dump(self.forwarding.agent.pin_dir(), "pairs").expect("a dump");
        let number = &pairs[0]["formatted"]["value"]["request"]["sequence_end"];
        number.as_u64().and_then(|number| number.try_into().ok()).expect("a sequence number")
    }
}

fn reset(sequence: u32) -> Forged {
    Forged { sequence, acknowledgement: 0, flags: RST }
}

/// Runs a check against each way of forwarding, for both families, side by side.
fn each(ways: &[By], check: impl Fn(By, Family) + Sync) {
    if !is_ready() {
        return;
    }
    for by in ways {
        thread::scope(|scope| {
            for family in FAMILIES {
                let check = &check;
                scope.spawn(move || check(*by, family));
            }
        });
    }
}

#[test]
fn resets_of_all_windows_do_not_end_an_idle_connection() {
    each(&ALL, |by, family| {
        let attacked = start(by, family, &[]);
        // The very number is met once in 65,000 sweeps.
        attacked.send((0..STEPS).map(|step| reset(step.wrapping_mul(STEP))));
        attacked.check_alive(&format!("{by:?} {family:?}"));
        attacked.finish();
    });
}

#[test]
fn ends_of_all_windows_neither_end_an_active_connection_nor_count() {
    each(&ALL, |by, family| {
        let attacked = start(by, family, &["--half-closed-timeout", "2s"]);
        let (stop, moved) = (AtomicBool::new(false), AtomicU64::new(0));
        thread::scope(|scope| {
            let talking = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    client::ping(&attacked.stream, b"a query")
                        .map_err(|error| format!("{by:?} {family:?}: {error}"))?;
                    moved.fetch_add(7, Ordering::Relaxed);
                    thread::park_timeout(Duration::from_millis(20));
                }
                Ok::<_, String>(())
            });
            let fin = |step: u32| Forged {
                sequence: step.wrapping_mul(16_000_000),
                acknowledgement: 1 << 31,
                flags: FIN | ACK,
            };
            attacked.send((0..269).map(fin));
            let before = moved.load(Ordering::Relaxed);
            // Longer than one that looks half-closed would be given.
            wait_until("it goes on", WAIT, || {
                moved.load(Ordering::Relaxed) >= before + 7 * 150 || talking.is_finished()
            });
            stop.store(true, Ordering::Relaxed);
            talking.join().expect("no panic").expect("it lives");
        });
        let view = attacked.view();
        let state = if by == By::Sockets { "open" } else { "offloaded" };
        assert_eq!(view["state"], state, "{by:?} {family:?}: {view}");
        for bytes in ["receivedBytes", "sentBytes"] {
            let counted = view[bytes].as_u64().expect("a number");
            assert!(counted < moved.load(Ordering::Relaxed) + 4_096, "{by:?} {family:?}: {view}");
        }
        attacked.finish();
    });
}

#[test]
fn a_new_connection_that_is_none_is_asked_about_once() {
    each(&ALL, |by, family| {
        let attacked = start(by, family, &[]);
        let Topology { client, backend1, .. } = &attacked.forwarding.topology;
        // Of TCP alone: the hosts of a new network talk to their neighbours for some time.
        let arrived = || backend1.counter("InSegs").expect("a counter");
        let before = arrived();
        let syn = Forged { sequence: 77, acknowledgement: 0, flags: SYN };
        forge::send(client, attacked.downstream(), [syn]).expect("sent");
        let end = client::end(&attacked.stream, TOLD).expect("a socket");
        assert_eq!(end, End::Open, "{by:?} {family:?}");
        // One question, and an acknowledgement that the client's host has delayed.
        let count = arrived() - before;
        assert!(count <= 2, "{by:?} {family:?}: {count} segments");
        attacked.check_alive(&format!("{by:?} {family:?}"));
        attacked.finish();
    });
}

/// Only here does the sender know the very number.
#[test]
fn a_reset_with_the_very_number_ends_a_connection() {
    each(&ALL[1..], |by, family| {
        let attacked = start(by, family, &[]);
        let client = &attacked.forwarding.topology.client;
        forge::send(client, attacked.downstream(), [reset(attacked.expected())]).expect("sent");
        let end = client::end(&attacked.stream, WAIT).expect("a socket");
        assert_eq!(end, End::Reset, "{by:?} {family:?}");
        let agent = &attacked.forwarding.agent;
        // The client, who knows of nothing, may still acknowledge something, which the endpoint's host resets.
        let resets = || agent.ended("downstream_reset") + agent.ended("upstream_reset");
        wait_until("it is counted", WAIT, || resets() == 1);
    });
}

#[test]
fn what_comes_by_another_interface_is_taken_as_the_stack_would_take_it() {
    each(&ALL[1..], |by, family| {
        let attacked = start(by, family, &[]);
        let Topology { node, backend2, .. } = &attacked.forwarding.topology;
        node.sysctl("ipv4/conf/veth3/rp_filter", "1").expect("a variable");
        let inject = || {
            let exact = reset(attacked.expected());
            forge::send(backend2, attacked.downstream(), [exact]).expect("sent");
        };
        if family == Family::V4 {
            // The variable is read every few seconds: what is sent until then would be taken.
            let probe = Forged { sequence: attacked.expected().wrapping_add(1 << 30), ..reset(0) };
            wait_until("it is strict", WAIT, || {
                forge::send(backend2, attacked.downstream(), [probe]).expect("sent");
                attacked.forwarding.agent.verdicts("other_interface") > 0
            });
            let dropped = node.counter("IPReversePathFilter").expect("a counter");
            inject();
            attacked.check_alive(&format!("{by:?} {family:?}"));
            assert!(node.counter("IPReversePathFilter").expect("a counter") > dropped, "{by:?}");
            node.sysctl("ipv4/conf/veth3/rp_filter", "0").expect("a variable");
            let strict = || attacked.forwarding.agent.verdicts("other_interface");
            wait_until("it is strict no more", WAIT, || {
                let before = strict();
                forge::send(backend2, attacked.downstream(), [probe]).expect("sent");
                strict() == before
            });
        }
        inject();
        let end = client::end(&attacked.stream, WAIT).expect("a socket");
        assert_eq!(end, End::Reset, "{by:?} {family:?}");
    });
}

#[test]
fn a_rule_of_the_firewall_and_a_reset_ban_a_network() {
    if !require_program("nft") {
        return;
    }
    each(&ALL, |by, family| {
        let attacked = start(by, family, &[]);
        let (table, source, network) = match family {
            Family::V4 => ("ip", "ip saddr", "10.0.1.0/24"),
            Family::V6 => ("ip6", "ip6 saddr", "fd00:1::/64"),
        };
        let Topology { client, node, .. } = &attacked.forwarding.topology;
        nft(
            node,
            &format!(
                "add table {table} ban\n\
                 add chain {table} ban arriving {{ type filter hook prerouting priority -300; }}\n\
                 add rule {table} ban arriving {source} {network} tcp dport {LISTENER_PORT} counter drop\n\
                 add chain {table} ban passing {{ type filter hook forward priority 0; }}\n\
                 add rule {table} ban passing tcp dport {ENDPOINT_PORT} counter\n"
            ),
        );
        if by != By::Sockets {
            for _ in 0..50 {
                client::ping(&attacked.stream, b"a query").expect("an echo");
            }
            let counted = |chain| {
                let rules = node.stdout(Command::new("nft").args(["list", "chain", table, "ban", chain]));
                let rules = rules.expect("rules");
                let count = rules.split_once("counter packets ").and_then(|(_, rest)| rest.split(' ').next());
                count.and_then(|count| count.parse::<u64>().ok()).expect("a counter")
            };
            // No rule sees the client, and only what the stack sends on is seen at all: as the node's own.
            assert_eq!(counted("arriving"), 0, "{by:?} {family:?}");
            assert_eq!(counted("passing") >= 50, by == By::Stack, "{by:?} {family:?}");
        }
        let mut command = attacked.forwarding.agent.command(&["conns", "reset", "--downstream", network]);
        assert_eq!(node.stdout(&mut command).expect("it works"), "reset 1 connection\n", "{by:?} {family:?}");
        let end = client::end(&attacked.stream, WAIT).expect("a socket");
        assert_eq!(end, End::Reset, "{by:?} {family:?}");
        let address = listener(&attacked.forwarding, family);
        let again = client.run(|| TcpStream::connect_timeout(&address, Duration::from_secs(2)));
        assert!(again.is_err(), "{by:?} {family:?}");
    });
}

fn nft(netns: &NetNs, rules: &str) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("rules");
    std::fs::write(&path, rules).expect("rules");
    netns.stdout(Command::new("nft").arg("-f").arg(&path)).expect("nft");
}
