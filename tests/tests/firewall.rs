//! Nodes whose firewall drops what connection tracking takes for invalid, as those of firewalld and of Kubernetes do. Of
//! offloaded connections, it has seen the beginnings alone.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::shape::stage::Family;
use forwarder_tests::traffic::Traffic;
use forwarder_tests::wire::{self, Trouble};
use forwarder_tests::{AgentCommand, Forwarding, Topology, peer, wait_for, wait_until};

/// How soon both ends have to know that an operator has reset their connection.
const SOON: Duration = Duration::from_secs(1);
const WAIT: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_secs(25);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];
/// What makes the endpoint read no more.
const STALL: u8 = b'!';

/// The chains in which the node drops what is invalid.
type Chains = &'static [&'static str];

const HOST: Chains = &["input", "output"];

fn can_run() -> bool {
    is_ready() && require_program("nft")
}

/// Has the node drop what connection tracking takes for invalid.
fn drop_invalid(topology: &Topology, chains: Chains) {
    let mut rules = "add table inet firewall\n".to_owned();
    for chain in chains {
        writeln!(rules, "add chain inet firewall {chain} {{ type filter hook {chain} priority 0; }}")
            .expect("a string grows");
        writeln!(rules, "add rule inet firewall {chain} ct state invalid counter drop")
            .expect("a string grows");
    }
    topology.node.stdout(Command::new("nft").arg(rules)).expect("rules");
}

/// How many packets the node has dropped in a chain.
fn dropped(topology: &Topology, chain: &str) -> u64 {
    let rules = topology.node.stdout(Command::new("nft").args(["list", "chain", "inet", "firewall", chain]));
    let rules = rules.expect("a chain");
    let (_, rest) = rules.split_once("counter packets ").expect("a counter");
    rest.split(' ').next().and_then(|count| count.parse().ok()).expect("a number")
}

fn start<F>(topology: Topology, family: Family, arguments: &[&str], handle: F) -> Forwarding
where
    F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let command = AgentCommand::new(arguments);
    Forwarding::serve(topology, family, &command, handle).expect("an agent between two hosts")
}

fn address(forwarding: &Forwarding, family: Family) -> SocketAddr {
    forwarding.address_of(family)
}

fn connect(forwarding: &Forwarding, family: Family, count: usize) -> Vec<TcpStream> {
    let connect =
        |_| client::connect(&forwarding.topology.client, address(forwarding, family)).expect("connect");
    (0..count).map(connect).collect()
}

/// A server that echoes until the connection ends, or until it is to stall, and tells how it ended.
fn told() -> (impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static, Receiver<End>) {
    let (sender, ends) = mpsc::channel();
    let handle = move |stream: &TcpStream| sender.send(serve(stream)).map_err(io::Error::other);
    (handle, ends)
}

fn serve(mut stream: &TcpStream) -> End {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let echoed = client::read(stream, &mut buffer).and_then(|size| match &buffer[..size] {
            [] => Ok(Some(End::Fin)),
            [STALL, ..] => {
                let error = wait_for(LONG, || stream.take_error().ok().flatten());
                Ok(Some(if error.is_some() { End::Reset } else { End::Open }))
            }
            bytes => stream.write_all(bytes).map(|()| None),
        });
        match echoed {
            Ok(None) => {}
            Ok(Some(end)) => return end,
            Err(error) if is_reset(&error) => return End::Reset,
            Err(_) => return End::Open,
        }
    }
}

/// Whether a socket says that its peer has reset the connection; to who writes after that it says that there is none.
fn is_reset(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
}

/// Runs `forwarder conns reset` for one connection in the node's namespace; tells when it had ended.
fn reset(forwarding: &Forwarding, downstream: SocketAddr) -> Instant {
    let mut command = forwarding.agent.command(&["conns", "reset", "--downstream", &downstream.to_string()]);
    let told = forwarding.topology.node.stdout(&mut command).expect("it is reset");
    assert_eq!(told, "reset 1 connection\n");
    Instant::now()
}

/// What the ends of a connection do when it is reset.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Doing {
    /// Nothing, after 24 MiB each way.
    Nothing,
    /// The client has sent more than the endpoint takes.
    Stalling,
    /// Both send.
    Talking,
}

fn check_reset(family: Family, chains: Chains, doing: Doing, has_agent: bool) {
    const MIB: usize = 1 << 20;
    let case = format!("{family:?}, {chains:?}, {doing:?}, agent: {has_agent}");
    let (handle, ends) = told();
    let topology = Topology::new().expect("a network");
    drop_invalid(&topology, chains);
    let mut forwarding = start(topology, family, &at_once(&[]), handle);
    let stream = connect(&forwarding, family, 1).remove(0);
    forwarding.offload(std::slice::from_ref(&stream));
    let block = vec![7; 64 << 10];
    for _ in 0..24 * MIB / block.len() {
        client::ping(&stream, &block).expect("an echo");
    }
    if !has_agent {
        forwarding.agent.kill().expect("it ends");
    }
    let downstream = stream.local_addr().expect("a socket");
    let end = thread::scope(|scope| {
        let client = scope.spawn(|| match doing {
            Doing::Nothing => client::end(&stream, WAIT).expect("an end"),
            Doing::Stalling => {
                let mut writer = &stream;
                writer.write_all(&[STALL]).expect("it is sent");
                let error = loop {
                    if let Err(error) = writer.write_all(&block) {
                        break error;
                    }
                };
                assert!(is_reset(&error), "{case}: {error}");
                End::Reset
            }
            Doing::Talking => loop {
                if let Err(error) = client::ping(&stream, &block) {
                    assert!(is_reset(&error), "{case}: {error}");
                    break End::Reset;
                }
            },
        });
        if doing == Doing::Stalling {
            wait_until("the endpoint takes no more", WAIT, || {
                // It closes its window, or has no memory left before that, which counts as another thing (`tcp_select_window`).
                ["TCPToZeroWindowAdv", "TCPRcvQDrop", "RcvPruned"]
                    .iter()
                    .any(|name| forwarding.topology.backend1.counter(name).expect("a counter") > 0)
            });
        }
        let at = reset(&forwarding, downstream);
        let end = client.join().expect("a client");
        println!("{case}: the client knows after {:?}", at.elapsed());
        assert!(at.elapsed() < SOON, "{case}: the client knows after {:?}", at.elapsed());
        assert_eq!(ends.recv_timeout(SOON), Ok(End::Reset), "{case}: the endpoint");
        end
    });
    assert_eq!(end, End::Reset, "{case}: the client");
    if has_agent {
        forwarding.agent.wait_empty();
    }
}

fn check_resets(family: Family) {
    for chains in [&[], HOST] {
        for doing in [Doing::Nothing, Doing::Stalling, Doing::Talking] {
            check_reset(family, chains, doing, true);
        }
    }
    check_reset(family, HOST, Doing::Nothing, false);
}

#[test]
fn both_ends_know_of_a_reset_by_an_operator_over_ipv4() {
    if can_run() {
        check_resets(Family::V4);
    }
}

#[test]
fn both_ends_know_of_a_reset_by_an_operator_over_ipv6() {
    if can_run() {
        check_resets(Family::V6);
    }
}

#[test]
fn probes_find_out_who_lives() {
    if !can_run() {
        return;
    }
    thread::scope(|scope| {
        for family in FAMILIES {
            scope.spawn(move || {
                let (handle, ends) = told();
                let topology = Topology::new().expect("a network");
                drop_invalid(&topology, HOST);
                let forwarding = start(topology, family, &at_once(&["--keepalive", "1s"]), handle);
                let stream = connect(&forwarding, family, 1).remove(0);
                forwarding.offload(std::slice::from_ref(&stream));
                // Six probes, a second apart, find out who is dead.
                assert!(ends.recv_timeout(WAIT).is_err(), "{family:?}: a live connection was ended");
                client::ping(&stream, b"still here").expect("an echo");
                forwarding.topology.client.ip(&["link", "set", "eth0", "down"]).expect("a dead client");
                assert_eq!(ends.recv_timeout(LONG), Ok(End::Reset), "{family:?}: the endpoint is told");
                forwarding.agent.wait_empty();
            });
        }
    });
}

#[test]
fn what_was_lost_of_the_remainder_arrives_though_more_was_sent_past_it() {
    const COUNT: usize = 16;
    if !can_run() {
        return;
    }
    for family in FAMILIES {
        let (topology, wires) = wire::wired(25).expect("a network");
        drop_invalid(&topology, HOST);
        let trouble = Trouble { lost: 300, held: 300, hold: Duration::from_millis(5), ..Trouble::default() };
        for wire in &wires {
            wire.set(trouble);
        }
        let arguments = ["--datapath", "tc", "--offload-after", "128KiB"];
        let forwarding = start(topology, family, &arguments, peer::echo);
        let agent = &forwarding.agent;
        let traffic = Traffic::start(connect(&forwarding, family, COUNT));
        let started = Instant::now();
        wait_until("all are offloaded", LONG, || {
            let connections = agent.connections("").expect("a list");
            connections.iter().filter(|one| one["state"] == "offloaded").count() == COUNT
        });
        println!("{family:?}: all are offloaded after {:?}", started.elapsed());
        // Not one acknowledgement for the node's sockets.
        assert_eq!(dropped(&forwarding.topology, "input"), 0, "{family:?}");
        traffic.wait_progress(LONG);
        traffic.finish().expect("every byte");
    }
}

#[test]
fn the_stack_sends_on_what_goes_beyond_every_window_that_is_known() {
    const COUNT: usize = 4;
    if !can_run() {
        return;
    }
    for family in FAMILIES {
        let topology = Topology::new().expect("a network");
        topology.node.sysctl("ipv4/conf/all/accept_local", "1").expect("a variable");
        for device in ["all", "veth1", "veth2"] {
            topology.node.sysctl(&format!("ipv4/conf/{device}/rp_filter"), "0").expect("a variable");
        }
        drop_invalid(&topology, &["input", "forward", "output"]);
        let arguments = at_once(&["--egress", "stack", "--keepalive", "1s"]);
        let forwarding = start(topology, family, &arguments, peer::echo);
        let streams = connect(&forwarding, family, COUNT);
        forwarding.offload(&streams);
        let block = vec![7; 64 << 10];
        thread::scope(|scope| {
            for stream in &streams {
                let carry = || (0..256).try_for_each(|_| client::ping(stream, &block));
                scope.spawn(move || carry().unwrap_or_else(|error| panic!("{family:?}: {error}")));
            }
        });
        assert_eq!(forwarding.agent.offloaded().len(), COUNT, "{family:?}");
    }
}
