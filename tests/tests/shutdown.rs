//! What an agent leaves on the node when it ends, for whom, and for how long.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use forwarder_tests::apiserver::require_kubernetes;
use forwarder_tests::attach::is_by_clsact;
use forwarder_tests::client::End;
use forwarder_tests::cluster::{INSTANCE, daemon_set};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::LISTENER_PORT;
use forwarder_tests::kernel::{at_once, dump, is_ready};
use forwarder_tests::peer::Server;
use forwarder_tests::served::Served;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{
    AgentCommand, Forwarding, NetNs, Topology, client, patient, peer, process, require_root, wait_for,
    wait_until,
};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

const WAIT: Duration = Duration::from_secs(10);
/// What takes less has not waited for a SYN to be sent again, which happens after a second.
const AT_ONCE_MEANS: Duration = Duration::from_millis(900);
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// Has the agent leave, and waits for its end.
#[track_caller]
fn terminate(forwarding: &mut Forwarding) {
    forwarding.agent.terminate().expect("it works");
    let status = forwarding.agent.wait(WAIT).expect("nothing holds the agent");
    assert_eq!(status.code(), Some(0), "{status}\n{}", forwarding.agent.log());
}

/// Connects in a family and has a byte echoed; how long it took.
fn reach(forwarding: &Forwarding, family: Family) -> io::Result<Duration> {
    let started = Instant::now();
    let stream = client::connect(&forwarding.topology.client, forwarding.address_of(family))?;
    client::ping(&stream, b"x")?;
    Ok(started.elapsed())
}

/// Fails unless connections of both families are served at once.
#[track_caller]
fn assert_served_at_once(forwarding: &Forwarding, by: &str) {
    for family in FAMILIES {
        let took = reach(forwarding, family);
        let is_at_once = took.as_ref().is_ok_and(|took| *took < patient(AT_ONCE_MEANS));
        assert!(is_at_once, "{by}, {family:?}: {took:?}");
    }
}

/// The addresses that a socket for both families listens on.
const BOTH_FAMILIES: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

/// Another program on the listener's port.
fn take_port(forwarding: &Forwarding, address: IpAddr) -> Result<Server> {
    Server::start(&forwarding.topology.node, SocketAddr::new(address, LISTENER_PORT), peer::echo)
}

/// Whom a roll-back starts, or whoever else gets the port, does not wait for an agent that will not come.
#[test]
fn another_program_on_the_port_is_served_at_once_after_sigterm() {
    if !require_root() {
        return;
    }
    for hold in [&["--hold", "8s"][..], &[]] {
        let mut forwarding = Forwarding::start(&at_once(hold), peer::echo).expect("it works");
        terminate(&mut forwarding);
        assert!(forwarding.agent.pin_dir().exists(), "nothing is left that could hold anybody");
        let _server = take_port(&forwarding, Ipv4Addr::UNSPECIFIED.into()).expect("the port is free");
        let took = reach(&forwarding, Family::V4).expect("the other program serves");
        assert!(took < patient(AT_ONCE_MEANS), "{hold:?}: after {took:?}");
        // Where it does not listen, clients wait for the agent's successor as before.
        let held = forwarding.topology.client.run(|| {
            let address = forwarding.address_of(Family::V6);
            TcpStream::connect_timeout(&address, Duration::from_secs(2)).expect_err("nobody listens")
        });
        assert_eq!(held.kind(), io::ErrorKind::TimedOut, "{hold:?}: {held}");
    }
}

#[test]
fn an_agent_with_a_pin_directory_of_its_own_is_served_at_once_after_another_ones_sigterm() {
    if !require_root() {
        return;
    }
    let arguments = at_once(&["--hold", "60s"]);
    let mut forwarding = Forwarding::start(&arguments, peer::echo).expect("it works");
    terminate(&mut forwarding);
    let former = std::mem::replace(
        &mut forwarding.agent,
        AgentCommand::new(&arguments)
            .start(&forwarding.topology.node, &forwarding.manifests.path())
            .expect("it works"),
    );
    assert_ne!(former.pin_dir(), forwarding.agent.pin_dir());
    assert_served_at_once(&forwarding, "an agent with a pin directory of its own");
}

/// The port is free as soon as the agent has closed its sockets, however long its connections take.
#[test]
fn another_program_is_served_at_once_while_the_agent_still_drains() {
    if !require_root() {
        return;
    }
    let arguments = at_once(&["--max-pairs", "1", "--drain-timeout", "60s"]);
    let mut forwarding = Forwarding::start(&arguments, peer::echo).expect("it works");
    // One that the kernel forwards, and one for which it has no room.
    let _offloaded = forwarding.connect_offloaded(1);
    let session = forwarding.connect().expect("it works");
    client::ping(&session, b"before").expect("it works");
    forwarding.agent.terminate().expect("it works");
    let _server =
        wait_for(WAIT, || take_port(&forwarding, BOTH_FAMILIES).ok()).expect("the port becomes free");
    // Longer than what the agent writes now and then could stay away.
    let end = Instant::now() + Duration::from_secs(1);
    // The port may be taken a moment before the agent knows that its last socket is closed.
    wait_until("the other program is served", WAIT, || reach(&forwarding, Family::V4).is_ok());
    while Instant::now() < end {
        assert_served_at_once(&forwarding, "during the drain");
    }
    client::ping(&session, b"during the drain").expect("it works");
    assert!(forwarding.agent.is_running(), "{}", forwarding.agent.log());
}

#[test]
fn without_a_successor_a_new_connection_waits_for_the_hold_and_is_refused_then() {
    if !require_root() {
        return;
    }
    for family in FAMILIES {
        let mut forwarding = Forwarding::start(&at_once(&["--hold", "2s"]), peer::echo).expect("it works");
        terminate(&mut forwarding);
        let ended = Instant::now();
        let error = reach(&forwarding, family).expect_err("nobody listens");
        let took = ended.elapsed();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{family:?}: {error}");
        let expected = Duration::from_millis(1500)..patient(Duration::from_secs(6));
        assert!(expected.contains(&took), "{family:?}: refused after {took:?}");
    }
}

/// Connects from a port of the client's.
fn connect_from(host: &NetNs, port: u16, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
    host.run(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
        socket.connect_timeout(&to.into(), timeout)?;
        Ok(socket.into())
    })
}

/// What the agent had answered, and the client not heard, is not refused for its sake either: the request outlives the
/// socket that listened, for a second at least.
#[test]
fn a_connection_whose_handshake_was_cut_by_the_agents_end_is_the_next_ones() {
    const PORT: u16 = 40_001;
    if !require_root() || !require_program("nft") {
        return;
    }
    for end in [terminate, |forwarding: &mut Forwarding| forwarding.agent.kill().expect("it runs")] {
        let mut forwarding = Forwarding::start(&at_once(&[]), peer::echo).expect("it works");
        let (host, address) = (forwarding.topology.client.clone(), forwarding.address());
        let nft = |rules: &str| {
            host.run(|| process::stdout(Command::new("nft").arg(rules))).expect("it works");
        };
        nft("add table ip deaf; \
             add chain ip deaf input { type filter hook input priority 0; }; \
             add rule ip deaf input tcp sport 9001 drop");
        let unheard = connect_from(&host, PORT, address, Duration::from_millis(50));
        assert_eq!(unheard.expect_err("it hears nothing").kind(), io::ErrorKind::TimedOut);
        end(&mut forwarding);
        nft("delete table ip deaf");
        let (sender, connected) = mpsc::channel();
        let connecting = thread::spawn(move || {
            sender.send(connect_from(&host, PORT, address, patient(WAIT))).expect("somebody waits");
        });
        let early = connected.recv_timeout(Duration::from_millis(500));
        assert!(early.is_err(), "nobody listens: {early:?}");
        forwarding.succeed(&at_once(&[])).expect("it works");
        let stream = connected.recv_timeout(patient(WAIT)).expect("it ends").expect("held back, not refused");
        client::ping(&stream, b"at last").expect("it works");
        connecting.join().expect("it works");
    }
}

/// The programs that use the maps of a pin directory: their numbers and names. They are there while they hang somewhere, are
/// pinned, or their agent runs.
fn programs_of(pin_dir: &Path) -> Vec<(u64, String)> {
    let list = |arguments: &[&str], pin: Option<&Path>| {
        let mut command = Command::new("bpftool");
        let listed = process::stdout(command.arg("-j").args(arguments).args(pin)).ok()?;
        serde_json::from_str::<Value>(&listed).ok()
    };
    // What is no map is a program.
    let maps: Vec<Value> = files(pin_dir)
        .iter()
        .filter_map(|pin| list(&["map", "show", "pinned"], Some(pin)).map(|map| map["id"].clone()))
        .collect();
    let programs = list(&["prog", "show"], None).expect("bpftool");
    let uses = |program: &&Value| {
        program["map_ids"].as_array().is_some_and(|ids| ids.iter().any(|id| maps.contains(id)))
    };
    let ours = programs.as_array().expect("a list").iter().filter(uses);
    ours.map(|program| {
        let name = program["name"].as_str().expect("a name").to_owned();
        (program["id"].as_u64().expect("a number"), name)
    })
    .collect()
}

/// Fails unless one of the programs counts what arrives.
#[track_caller]
fn assert_classifies(programs: &[(u64, String)]) {
    assert!(programs.iter().any(|(_, name)| name == "fwd_ingress_eth"), "{programs:?}");
}

/// How many filters hang on the node's interfaces.
fn filters(topology: &Topology) -> usize {
    let shown = |interface: &str, side: &str| {
        let mut command = Command::new("tc");
        let shown = topology.node.stdout(command.args(["filter", "show", "dev", interface, side]));
        shown.expect("tc").lines().filter(|line| line.contains("direct-action")).count()
    };
    let interfaces = ["lo", "veth1", "veth2", "veth3"];
    interfaces.iter().map(|interface| shown(interface, "ingress") + shown(interface, "egress")).sum()
}

/// The files under a folder, or none if there is no folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

/// Fails unless nothing of the agent is left: no program, and so no link, no filter, no pin, no folder.
#[track_caller]
fn assert_nothing_left(forwarding: &Forwarding, programs: &[(u64, String)], when: &str) {
    let pin_dir = forwarding.agent.pin_dir();
    assert!(!pin_dir.exists(), "{when}: {:?}\n{}", files(pin_dir), forwarding.agent.log());
    assert_eq!(filters(&forwarding.topology), 0, "{when}");
    for (id, name) in programs {
        wait_until(&format!("{when}: program {name} is gone"), WAIT, || {
            process::stdout(Command::new("bpftool").args(["prog", "show", "id", &id.to_string()])).is_err()
        });
    }
}

#[test]
fn nothing_is_left_of_an_agent_whom_nobody_has_to_wait_for() {
    if !is_ready() {
        return;
    }
    let arguments = at_once(&["--hold", "0"]);
    for (when, arguments, signal) in [
        ("--hold 0", &arguments[..], "TERM"),
        ("SIGINT", &at_once(&[])[..], "INT"),
        ("--hold 0, a connection has just ended", &arguments[..], "TERM"),
    ] {
        let mut forwarding = Forwarding::start(arguments, peer::echo).expect("it works");
        if when.ends_with("ended") {
            // It stands in the maps for a while, for what is sent again.
            drop(forwarding.connect_offloaded(1));
        }
        let programs = programs_of(forwarding.agent.pin_dir());
        assert_classifies(&programs);
        assert!(filters(&forwarding.topology) > 0 || !is_by_clsact(), "{when}: no filter is seen");
        if signal == "INT" {
            forwarding.agent.interrupt().expect("it works");
        } else {
            forwarding.agent.terminate().expect("it works");
        }
        let status = forwarding.agent.wait(WAIT).expect("nothing holds the agent");
        assert_eq!(status.code(), Some(0), "{when}: {status}");
        assert_nothing_left(&forwarding, &programs, when);
        let error = forwarding.connect().expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{when}");
    }
}

#[test]
fn nothing_is_left_of_an_agent_without_listeners() {
    if !is_ready() {
        return;
    }
    let mut forwarding = Forwarding::start(&at_once(&[]), peer::echo).expect("it works");
    let programs = programs_of(forwarding.agent.pin_dir());
    assert_classifies(&programs);
    forwarding.manifests.remove("gateway-gw").expect("it works");
    wait_until("the listener is gone", WAIT, || {
        forwarding.agent.state().is_ok_and(|state| state["listeners"].as_array().is_some_and(Vec::is_empty))
    });
    terminate(&mut forwarding);
    assert_nothing_left(&forwarding, &programs, "no listener");
}

/// How many packets met with a verdict, by the pinned map.
fn verdict(forwarding: &Forwarding, number: usize) -> u64 {
    let dump = dump(forwarding.agent.pin_dir(), "verdicts").expect("the map is pinned");
    let values = dump[number]["formatted"]["values"].as_array().expect("a value for each CPU").clone();
    values.iter().map(|value| value["value"].as_u64().expect("a number")).sum()
}

/// With SIGTERM what holds new connections back has to stay. After the time for which it does, it only counts.
#[test]
fn what_is_left_for_new_connections_only_counts_once_they_have_waited_long_enough() {
    const COUNTED: usize = 5;
    const HELD: usize = 18;
    if !is_ready() {
        return;
    }
    let wait = format!("{}s", patient(Duration::from_secs(2)).as_secs());
    let mut forwarding = Forwarding::start(&at_once(&["--hold", &wait]), peer::echo).expect("it works");
    terminate(&mut forwarding);
    assert_classifies(&programs_of(forwarding.agent.pin_dir()));
    let error = reach(&forwarding, Family::V4).expect_err("nobody listens");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{error}");
    let [counted, held] = [COUNTED, HELD].map(|number| verdict(&forwarding, number));
    assert!(held > 0, "nobody had to wait");
    for family in FAMILIES {
        let error = reach(&forwarding, family).expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{family:?}: {error}");
    }
    let _server = take_port(&forwarding, BOTH_FAMILIES).expect("the port is free");
    assert_served_at_once(&forwarding, "after the hold");
    assert!(verdict(&forwarding, COUNTED) > counted, "nothing is counted");
    assert_eq!(verdict(&forwarding, HELD), held, "somebody had to wait");
}

/// An upgrade deletes a Pod as well; its `DaemonSet` stays.
#[test]
fn after_the_removal_of_its_daemon_set_an_agent_leaves_nothing_in_the_kernel() {
    if !is_ready() || !require_kubernetes() {
        return;
    }
    for is_removed in [false, true] {
        let mut served = Served::start(&at_once(&["--drain-timeout", "1s"])).expect("an agent");
        wait_until("it knows its DaemonSet", WAIT, || {
            served.agent.log().contains("once it is removed, its agents leave nothing")
        });
        let session = served.session().expect("a connection");
        served.agent.offload(std::slice::from_ref(&session));
        if is_removed {
            served.cluster.api.delete(&daemon_set(INSTANCE)).expect("it works");
        }
        served.agent.terminate().expect("it works");
        let status = served.agent.wait(WAIT).expect("nothing holds the agent");
        assert_eq!(status.code(), Some(0), "{status}\n{}", served.agent.log());
        let is_left = served.agent.pin_dir().exists();
        assert_eq!(is_left, !is_removed, "{}", served.agent.log());
        let end = client::end(&session, Duration::from_secs(2)).expect("a socket");
        assert_eq!(end, if is_removed { End::Reset } else { End::Open }, "{}", served.agent.log());
    }
}
