//! Floods of SYNs in the name of others: what programs answer with SYN cookies, and what becomes of clients meanwhile.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::direct::{is_direct, listed};
use forwarder_tests::fixture::Forwarding;
use forwarder_tests::forge::{self, Forged, SYN};
use forwarder_tests::kernel::{entries, is_ready};
use forwarder_tests::netns::near;
use forwarder_tests::sequence;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Topology, peer, release, wait_until};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

const WAIT: Duration = Duration::from_secs(20);

/// A network in which the node's sockets answer each SYN with a cookie, and so may programs.
fn network() -> Topology {
    let topology = Topology::new().expect("a network");
    topology.finish_checksums().expect("features");
    topology.node.sysctl("ipv4/tcp_syncookies", "2").expect("cookies");
    // Where answers to forged addresses go.
    topology.node.ip(&["route", "add", "10.99.0.0/16", "via", "10.0.1.2"]).expect("a route");
    topology.node.ip(&["route", "add", "fd00:99::/64", "via", "fd00:1::2"]).expect("a route");
    topology
}

/// One of the addresses that nobody has.
fn forged(family: Family, number: u16) -> SocketAddr {
    let address: IpAddr = match family {
        Family::V4 => {
            let [high, low] = number.to_be_bytes();
            Ipv4Addr::new(10, 99, high, low).into()
        }
        Family::V6 => Ipv6Addr::new(0xfd00, 0x99, 0, 0, 0, 0, 0, number).into(),
    };
    SocketAddr::new(address, 40_000)
}

/// SYNs from so many of these addresses.
fn send_forged(forwarding: &Forwarding, family: Family, numbers: impl Iterator<Item = u16>) {
    let segments = numbers.map(|number| {
        (forged(family, number), Forged { sequence: number.into(), acknowledgement: 0, flags: SYN })
    });
    let address = forwarding.address_of(family);
    forge::send_from_each(&forwarding.topology.client, address, segments).expect("SYNs");
}

/// SYNs that are sent from each CPU, so that none of them leaves more to sockets for a second.
fn use_up(forwarding: &Forwarding, family: Family) {
    let all = sched_getaffinity(None).expect("the CPUs of this thread");
    for cpu in (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)) {
        let mut one = CpuSet::new();
        one.set(cpu);
        sched_setaffinity(None, &one).expect("a CPU");
        send_forged(forwarding, family, 0..5);
    }
    sched_setaffinity(None, &all).expect("the CPUs");
}

/// An agent that leaves one SYN in a second to sockets.
fn start(family: Family, arguments: &[&str]) -> Forwarding {
    start_in(network(), family, &[&["--syn-cookies-above", "1"], arguments].concat())
}

fn start_in(topology: Topology, family: Family, arguments: &[&str]) -> Forwarding {
    let forwarding =
        Forwarding::serve(topology, family, &AgentCommand::new(arguments), peer::echo).expect("an agent");
    let has = |argument: &str| arguments.contains(&argument);
    wait_until("programs are at work", WAIT, || {
        (!has("native") || forwarding.agent.at_xdp("native") >= 3)
            && (!has("direct") || is_direct(&forwarding.agent))
    });
    // From now on the client knows its neighbour, and what it sends arrives at once.
    let nobody = SocketAddr::new(forwarding.address_of(family).ip(), 1);
    client::connect(&forwarding.topology.client, nobody).expect_err("nobody listens");
    forwarding
}

/// Whether the two ends of a connection have agreed on timestamps, of which a cookie of a program knows nothing.
fn has_timestamps(stream: &TcpStream) -> bool {
    sequence::has_timestamps(stream).expect("a connected socket")
}

/// The connections are whole ones, whoever has answered their SYN; and whoever has opened one is no flood.
#[test]
fn clients_whose_syn_a_program_answers_are_served() {
    const ATTEMPTS: usize = 10;
    if !is_ready() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for arguments in
            [&["--datapath", "tc"][..], &["--datapath", "splice"], &["--datapath", "tc", "--xdp", "native"]]
        {
            if arguments.contains(&"native") && !release::is_at_least(6, 3) {
                continue;
            }
            let is_told = (0..ATTEMPTS).any(|_| check_served(family, arguments));
            assert!(is_told, "{family:?} {arguments:?}: this machine is too slow");
        }
    }
}

/// Tells whether it was quick enough to say anything: after a second, one more SYN is left to sockets.
fn check_served(family: Family, arguments: &[&str]) -> bool {
    const SECOND: Duration = Duration::from_millis(850);
    let what = format!("{family:?} {arguments:?}");
    let forwarding = start(family, arguments);
    let Forwarding { agent, topology, .. } = &forwarding;
    let address = forwarding.address_of(family);
    let begun = Instant::now();
    use_up(&forwarding, family);
    let stream = client::connect(&topology.client, address).expect("a connection");
    if begun.elapsed() >= SECOND {
        println!("{what}: once more, after {:?}", begun.elapsed());
        return false;
    }
    assert!(!has_timestamps(&stream), "{what}");
    client::ping(&stream, &vec![7; 100_000]).expect("an echo");
    let before = agent.verdicts("cookie_sent");
    // Of ten SYNs of nobody, each CPU has left one to sockets, at TC and at XDP.
    assert!(before >= 4, "{what}: {before}");
    let other = client::connect(&topology.client, address).expect("a connection");
    assert!(has_timestamps(&other), "{what}: its address is known");
    assert_eq!(agent.verdicts("cookie_sent"), before, "{what}");
    client::ping(&other, &vec![7; 100_000]).expect("an echo");
    for stream in [stream, other] {
        stream.shutdown(std::net::Shutdown::Write).expect("an end");
        assert_eq!(client::end(&stream, WAIT).expect("an end"), End::Fin);
    }
    agent.wait_ended("finished", 2);
    let syns = agent.metric("forwarder_ingress_syns_total");
    assert!(syns >= 7, "{what}: {syns}");
    true
}

/// Room for direct connections is left to clients that have their address, however many SYNs come in the name of others.
#[test]
fn clients_of_direct_listeners_find_room_in_a_flood() {
    /// A quarter of which may be half open, and as many of clients with an address.
    const ROOM: u16 = 64;
    if !is_ready() {
        return;
    }
    for (family, xdp) in [(Family::V4, "off"), (Family::V6, "off"), (Family::V4, "native")] {
        if xdp == "native" && !release::is_at_least(6, 3) {
            continue;
        }
        let room = ROOM.to_string();
        let forwarding = start(family, &["--datapath", "direct", "--max-direct", &room, "--xdp", xdp]);
        let Forwarding { agent, topology, .. } = &forwarding;
        let address = forwarding.address_of(family);
        let connect = || client::connect(&topology.client, address).expect("a connection");
        let half_open = || entries(agent.pin_dir(), "direct").expect("a map") / 2;
        send_forged(&forwarding, family, 0..ROOM);
        wait_until("no more may be half open", WAIT, || half_open() == usize::from(ROOM / 4));
        wait_until("programs answer others", WAIT, || {
            use_up(&forwarding, family);
            agent.verdicts("cookie_sent") > 0
        });
        let first = connect();
        client::ping(&first, b"echo").expect("an echo");
        assert_eq!(half_open(), usize::from(ROOM / 4), "{family:?} {xdp}: it is accepted");
        let others: Vec<_> = (0..5).map(|_| connect()).collect();
        for stream in &others {
            client::ping(stream, &[7; 10_000]).expect("an echo");
            assert!(has_timestamps(stream), "{family:?} {xdp}");
        }
        wait_until("those that came later are direct", WAIT, || {
            let direct = listed(agent, "direct").into_iter();
            direct.filter(|one| one["state"] == "offloaded").count() == others.len()
        });
        client::ping(&first, &[7; 10_000]).expect("an echo");
    }
}

/// The node's own switch holds for programs too, and so does the agent's.
#[test]
fn without_cookies_sockets_answer() {
    if !is_ready() {
        return;
    }
    for (cookies, above) in [("0", "1"), ("2", "0")] {
        let topology = network();
        topology.node.sysctl("ipv4/tcp_syncookies", cookies).expect("cookies");
        let forwarding = start_in(topology, Family::V4, &["--datapath", "tc", "--syn-cookies-above", above]);
        for _ in 0..5 {
            let stream = forwarding.connect().expect("a connection");
            client::ping(&stream, b"echo").expect("an echo");
            assert!(has_timestamps(&stream));
        }
        assert_eq!(forwarding.agent.verdicts("cookie_sent"), 0, "{cookies}, {above}");
    }
}

/// Of a SYN that has come by another way than answers go, only the stack knows what becomes.
#[test]
fn answers_that_go_another_way_are_the_stacks() {
    if !is_ready() {
        return;
    }
    let topology = network();
    topology.node.ip(&["route", "replace", "10.99.0.0/16", "dev", &near(2)]).expect("a route");
    let forwarding = start_in(topology, Family::V4, &["--datapath", "tc", "--syn-cookies-above", "1"]);
    send_forged(&forwarding, Family::V4, 0..20);
    wait_until("programs have seen them", WAIT, || {
        forwarding.agent.metric("forwarder_ingress_syns_total") >= 20
    });
    assert_eq!(forwarding.agent.verdicts("cookie_sent"), 0);
    forwarding.topology.node.ip(&["route", "replace", "10.99.0.0/16", "via", "10.0.1.2"]).expect("a route");
    wait_until("others are answered", WAIT, || {
        send_forged(&forwarding, Family::V4, 20..40);
        forwarding.agent.verdicts("cookie_sent") > 0
    });
}

/// As the node is by default: sockets make cookies once they have no room, and so do programs.
#[test]
fn clients_are_served_in_a_flood() {
    const FLOOD: Duration = Duration::from_secs(4);
    if !is_ready() {
        return;
    }
    for datapath in ["tc", "direct"] {
        let topology = network();
        topology.node.sysctl("ipv4/tcp_syncookies", "1").expect("cookies");
        topology.node.sysctl("core/somaxconn", "64").expect("a short queue");
        let arguments = ["--datapath", datapath, "--max-direct", "64", "--syn-cookies-above", "500"];
        let forwarding = start_in(topology, Family::V4, &arguments);
        let agent = &forwarding.agent;
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let begun = Instant::now();
                while begun.elapsed() < FLOOD {
                    send_forged(&forwarding, Family::V4, 0..1000);
                }
                is_over.store(true, Ordering::Relaxed);
            });
            wait_until("programs answer", WAIT, || agent.verdicts("cookie_sent") > 0);
            let mut served = 0;
            while !is_over.load(Ordering::Relaxed) {
                let stream = forwarding.connect().expect("a connection");
                client::ping(&stream, &[7; 10_000]).expect("an echo");
                served += 1;
            }
            println!("{datapath}: {served} served, {} answered", agent.verdicts("cookie_sent"));
            assert!(served > 0);
        });
    }
}
