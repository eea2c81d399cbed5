//! The connections of an agent, as operators list and reset them, and what is cleaned up after agents that were killed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::Result;
use forwarder_tests::agent::binary;
use forwarder_tests::client::{self, End};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::{
    Agent, BackendRef, Forwarding, Manifests, NetNs, Topology, http, require_root, skip, wait_for, wait_until,
};
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(10);
/// The port of the second listener.
const SECOND_PORT: u16 = 9002;
/// How connections are told apart on both sides: by the first byte.
type Mark = u8;

/// Two listeners, `a` and `b`, each with an endpoint on a host of its own, and what the endpoints see.
struct Two {
    agent: Agent,
    topology: Topology,
    /// The mark of a connection, and how it ended at the endpoint.
    ends: Receiver<(Mark, End)>,
    _servers: [Server; 2],
    _manifests: Manifests,
}

impl Two {
    fn start(arguments: &[&str]) -> Result<Self> {
        let topology = Topology::new()?;
        let endpoints = [topology.backend1_address(ENDPOINT_PORT), topology.backend2_address(ENDPOINT_PORT)];
        let manifests = Manifests::forward(LISTENER_PORT, &endpoints[..1])?;
        manifests.gateway(&[("a", LISTENER_PORT), ("b", SECOND_PORT)])?;
        manifests.route("b", &[BackendRef { service: "b", weight: 1 }])?;
        manifests.service("b", &endpoints[1..])?;
        let (sender, ends) = mpsc::channel();
        let servers = [
            Server::start(&topology.backend1, endpoints[0], marked(sender.clone()))?,
            Server::start(&topology.backend2, endpoints[1], marked(sender))?,
        ];
        let agent = Agent::start(&topology.node, &manifests.path(), arguments)?;
        Ok(Self { agent, topology, ends, _servers: servers, _manifests: manifests })
    }

    /// A connection whose mark the endpoint has seen.
    fn connect(&self, port: u16, mark: Mark) -> TcpStream {
        let stream =
            client::connect(&self.topology.client, self.topology.node_address(port)).expect("connect");
        client::ping(&stream, &[mark]).expect("an echo");
        stream
    }

    fn conns(&self, arguments: &[&str]) -> Output {
        conns(&self.agent, &self.topology.node, arguments)
    }

    /// The downstream addresses that are listed.
    fn listed(&self) -> Vec<SocketAddr> {
        let connections = self.agent.connections("").expect("a list");
        let mut listed: Vec<_> = connections.iter().map(|one| address(one, "downstream")).collect();
        listed.sort_unstable();
        listed
    }

    fn reset_by_operator(&self, listener: &str) -> i64 {
        let labels = [("listener", listener), ("end", "reset_by_operator")];
        self.agent.metrics().expect("metrics").sum("forwarder_connections_ended_total", &labels)
    }
}

/// Echoes one byte, the connection's mark, and then tells how it ends. An end of the client is not passed on.
fn marked(ends: Sender<(Mark, End)>) -> impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static {
    move |mut stream| {
        let mut mark = [0];
        stream.read_exact(&mut mark)?;
        stream.write_all(&mark)?;
        let mut end = client::end(stream, WAIT)?;
        if end == End::Fin && wait_for(WAIT, || stream.take_error().ok().flatten()).is_some() {
            end = End::Reset;
        }
        ends.send((mark[0], end)).map_err(io::Error::other)
    }
}

/// Runs `forwarder conns` for an agent in its namespace.
fn conns(agent: &Agent, netns: &NetNs, arguments: &[&str]) -> Output {
    run(netns, &mut agent.command(&[&["conns"], arguments].concat()))
}

/// Runs it without an agent.
fn forwarder(netns: &NetNs, arguments: &[&str]) -> Output {
    run(netns, Command::new("timeout").arg("60").arg(binary()).args(arguments))
}

fn run(netns: &NetNs, command: &mut Command) -> Output {
    let output = netns.output(command).expect("run the binary");
    assert!(!stderr(&output).contains("panicked"), "{command:?}: {}", stderr(&output));
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn address(connection: &Value, field: &str) -> SocketAddr {
    connection[field].as_str().expect("a field that is there").parse().expect("an address with a port")
}

fn local(stream: &TcpStream) -> SocketAddr {
    stream.local_addr().expect("a connected socket")
}

fn sorted(streams: &[&TcpStream]) -> Vec<SocketAddr> {
    let mut addresses: Vec<_> = streams.iter().map(|stream| local(stream)).collect();
    addresses.sort_unstable();
    addresses
}

#[test]
fn connections_are_listed_with_addresses_bytes_and_states() {
    if !require_root() {
        return;
    }
    for (datapath, tier) in [("splice", "splice"), ("copy", "copy")] {
        let two = Two::start(&["--datapath", datapath]).unwrap();
        assert!(two.agent.connections("").unwrap().is_empty());
        let mut open = two.connect(LISTENER_PORT, 1);
        open.write_all(&[1; 999]).unwrap();
        let half_closed = two.connect(SECOND_PORT, 2);
        half_closed.shutdown(Shutdown::Write).unwrap();
        let find = |stream: &TcpStream| {
            let connections = two.agent.connections("").unwrap();
            connections.into_iter().find(|one| address(one, "downstream") == local(stream))
        };
        wait_until("bytes and the half-close are listed", WAIT, || {
            find(&open).is_some_and(|one| one["receivedBytes"] == 1000)
                && find(&half_closed).is_some_and(|one| one["state"] == "half-closed")
        });
        for (stream, mark, name, port, endpoint, state) in [
            (&open, 1000, "a", LISTENER_PORT, two.topology.backend1_address(ENDPOINT_PORT), "open"),
            (&half_closed, 1, "b", SECOND_PORT, two.topology.backend2_address(ENDPOINT_PORT), "half-closed"),
        ] {
            let one = find(stream).unwrap();
            assert_eq!(one["listener"], format!("default/gw/{name}"));
            assert_eq!(one["address"], format!("*:{port}"));
            assert_eq!(one["route"], format!("default/{name}"));
            assert_eq!(one["backend"], format!("default/{name}:3306"));
            assert_eq!(address(&one, "upstream"), endpoint);
            assert_eq!(one["tier"], tier, "{one}");
            assert_eq!(one["state"], state, "{one}");
            assert_eq!(one["receivedBytes"], mark, "{one}");
            assert_eq!(one["sentBytes"], 1, "{one}");
            assert!(one["idleMs"].as_u64() <= one["ageMs"].as_u64(), "{one}");
        }
        wait_until("the local address and the idle time are listed", WAIT, || {
            find(&open).is_some_and(|one| {
                one["idleMs"].as_u64().unwrap() >= 1000 && one.get("upstreamLocal").is_some()
            })
        });
        let local = address(&find(&open).unwrap(), "upstreamLocal");
        assert_eq!(local.ip().to_string(), "10.0.2.1");

        // Selectors of the query.
        for (query, expected) in [
            ("?listener=default/gw/a", vec![&open]),
            ("?upstream=10.0.3.2", vec![&half_closed]),
            ("?downstream=10.0.1.2&route=default/b", vec![&half_closed]),
            ("?idleLongerThan=1h", vec![]),
            ("?idleLongerThan=900ms&backend=default/a:3306", vec![&open]),
        ] {
            let listed: Vec<_> =
                two.agent.connections(query).unwrap().iter().map(|one| address(one, "downstream")).collect();
            assert_eq!(listed, sorted(&expected), "{query}");
        }
        assert_eq!(two.agent.connections("?limit=1").unwrap().len(), 1);
        let refused = two.agent.get("/v1/connections?upstream=db").unwrap();
        assert_eq!(refused.status, 400, "{}", refused.body);
        assert!(refused.body.contains("`db` is neither an IP address"), "{}", refused.body);

        drop((open, half_closed));
    }
}

#[test]
fn connections_are_printed_as_a_table_and_as_json() {
    if !require_root() {
        return;
    }
    let two = Two::start(&[]).unwrap();
    let none = two.conns(&[]);
    assert_eq!((none.status.code(), stdout(&none).as_str()), (Some(0), "0 connections\n"));
    let streams = [two.connect(SECOND_PORT, 1), two.connect(LISTENER_PORT, 2), two.connect(LISTENER_PORT, 3)];
    let mut first = &streams[1];
    first.write_all(&[0; 2047]).unwrap();
    wait_until("bytes are counted", WAIT, || {
        let query = format!("?downstream={}", local(first));
        two.agent.connections(&query).unwrap()[0]["receivedBytes"] == 2048
    });

    let output = two.conns(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let header =
        ["LISTENER", "DOWNSTREAM", "UPSTREAM", "BACKEND", "TIER", "STATE", "RECEIVED", "SENT", "AGE", "IDLE"];
    assert_eq!(lines[0], header, "{text}");
    // By listener, the oldest first.
    for (line, (listener, stream)) in
        lines[1..4].iter().zip([("a", &streams[1]), ("a", &streams[2]), ("b", &streams[0])])
    {
        assert_eq!(line[0], format!("default/gw/{listener}"), "{text}");
        assert_eq!(line[1], local(stream).to_string(), "{text}");
        assert_eq!(line[4..6], ["splice", "open"], "{text}");
    }
    assert_eq!(lines[1][6..10], ["2.0", "KiB", "1", "B"], "{text}");
    let summary = text.lines().last().unwrap();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(summary.starts_with("3 connections; by tier: 3 splice; by state: 3 open"), "{text}");

    let wide = stdout(&two.conns(&["--output", "wide", "--listener", "default/gw/b"]));
    for word in ["ADDRESS", "ROUTE", "LOCAL", "REASON", "*:9002", "default/b", "1 connection;"] {
        assert!(wide.contains(word), "no {word} in: {wide}");
    }
    let limited = stdout(&two.conns(&["--limit", "1"]));
    assert!(limited.contains("3 connections (1 shown)"), "{limited}");

    let json: Value = serde_json::from_slice(&two.conns(&["--output", "json"]).stdout).unwrap();
    assert_eq!(json["connections"].as_array().unwrap().len(), 3);
    assert_eq!(json["totals"]["tiers"]["splice"], 3);
    assert_eq!(json["totals"]["states"]["open"], 3);
}

#[test]
fn exactly_the_chosen_connections_are_reset_on_both_sides() {
    if !require_root() {
        return;
    }
    for datapath in ["splice", "copy"] {
        let two = Two::start(&["--datapath", datapath]).unwrap();
        let streams: BTreeMap<Mark, TcpStream> = [(1, LISTENER_PORT), (2, LISTENER_PORT), (3, LISTENER_PORT)]
            .into_iter()
            .chain([(4, SECOND_PORT), (5, SECOND_PORT)])
            .map(|(mark, port)| (mark, two.connect(port, mark)))
            .collect();
        // A direction that has ended hears of it too.
        streams[&5].shutdown(Shutdown::Write).unwrap();
        let mut left: Vec<Mark> = streams.keys().copied().collect();
        let second = local(&streams[&2]).to_string();
        for (selector, reset, answer) in [
            (["--downstream", second.as_str()], vec![2], "reset 1 connection\n"),
            (["--listener", "default/gw/b"], vec![4, 5], "reset 2 connections\n"),
            (["--upstream", "10.0.2.2:5000"], vec![1, 3], "reset 2 connections\n"),
        ] {
            let output = two.conns(&[&["reset"][..], &selector].concat());
            assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
            assert_eq!(stdout(&output), answer, "{selector:?}");
            for mark in &reset {
                assert_eq!(client::end(&streams[mark], WAIT).unwrap(), End::Reset, "{selector:?}: {mark}");
            }
            let mut ended: Vec<_> = reset.iter().map(|_| two.ends.recv_timeout(WAIT).unwrap()).collect();
            ended.sort_unstable_by_key(|(mark, _)| *mark);
            let expected: Vec<_> = reset.iter().map(|mark| (*mark, End::Reset)).collect();
            assert_eq!(ended, expected, "{datapath} {selector:?}");
            left.retain(|mark| !reset.contains(mark));
            let survivors: Vec<_> = left.iter().map(|mark| &streams[mark]).collect();
            wait_until("the others are listed", WAIT, || two.listed() == sorted(&survivors));
            for survivor in survivors {
                assert_eq!(client::end(survivor, peer::QUIET).unwrap(), End::Open, "{selector:?}");
            }
        }
        assert!(two.ends.try_recv().is_err());
        assert_eq!(two.reset_by_operator("default/gw/a"), 3);
        assert_eq!(two.reset_by_operator("default/gw/b"), 2);
        assert_eq!(two.agent.active().unwrap(), 0);
    }
}

#[test]
fn a_connection_that_still_connects_is_listed_and_reset_at_once() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&["--connect-timeout", "1h"], peer::echo).unwrap();
    // A host that never answers: its frames go nowhere.
    let silent = ["neighbour", "add", "10.0.2.99", "lladdr", "02:00:00:00:00:01", "dev", "veth2"];
    forwarding.topology.node.ip(&silent).unwrap();
    let endpoint: SocketAddr = "10.0.2.99:5000".parse().unwrap();
    forwarding.manifests.service("a", &[endpoint]).unwrap();
    forwarding.agent.wait_endpoints("default/gw/a", &[endpoint]);
    let stream = forwarding.connect().unwrap();
    let listed = wait_for(WAIT, || forwarding.agent.connections("").unwrap().pop()).unwrap();
    assert_eq!(listed["state"], "connecting", "{listed}");
    assert!(listed.get("upstream").is_none(), "{listed}");
    let reset = ["reset", "--downstream", "10.0.1.2"];
    let output = conns(&forwarding.agent, &forwarding.topology.node, &reset);
    assert_eq!(stdout(&output), "reset 1 connection\n");
    assert_eq!(client::end(&stream, WAIT).unwrap(), End::Reset);
    wait_until("it is over", WAIT, || forwarding.agent.active().unwrap() == 0);
}

#[test]
fn an_empty_or_bad_selector_is_refused_and_one_that_matches_nothing_says_so() {
    if !require_root() {
        return;
    }
    let two = Two::start(&[]).unwrap();
    let stream = two.connect(LISTENER_PORT, 1);
    let output = two.conns(&["reset"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("--all"), "{}", stderr(&output));
    for (body, words) in [
        ("{}", "it is empty"),
        (r#"{"all": false}"#, "it is empty"),
        (r#"{"lisener": "default/gw/a"}"#, "unknown field `lisener`"),
        (r#"{"downstream": "client"}"#, "`client` is neither an IP address"),
        (r#"{"idleLongerThan": "soon"}"#, "`soon` is not a duration"),
        ("all", "the selector cannot be used"),
    ] {
        let response = two.agent.post("/v1/connections/reset", body).unwrap();
        assert_eq!(response.status, 400, "{body}: {}", response.body);
        assert!(response.body.contains(words), "{body}: {}", response.body);
    }
    let request = "POST /v1/connections/reset HTTP/1.0\r\nContent-Type: text/plain\r\nContent-Length: 13";
    let request = format!("{request}\r\n\r\n{{\"all\": true}}");
    let answer = http::by_socket(two.agent.admin_socket(), &request).unwrap();
    assert_eq!(answer.status, 415, "{}", answer.body);
    // `list` flags before `reset` would otherwise be lost.
    let output = two.conns(&["--listener", "default/gw/a", "reset", "--all"]);
    assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
    for arguments in [&["--listener", "default/gw/none"][..], &["reset", "--listener", "default/gw/none"]] {
        let output = two.conns(arguments);
        let there = "no such listener, default/gw/none: there are default/gw/a, default/gw/b";
        assert!(output.status.code() == Some(1) && stderr(&output).contains(there), "{}", stderr(&output));
    }
    let output = two.conns(&["reset", "--listener", "default/gw/b"]);
    assert_eq!(stdout(&output), "reset 0 connections: none matches listener=default/gw/b\n");
    assert_eq!(two.listed(), sorted(&[&stream]));

    let response = two.agent.post("/v1/connections/reset", r#"{"all": true}"#).unwrap();
    assert_eq!((response.status, response.body.as_str()), (200, r#"{"reset":1}"#));
    assert_eq!(client::end(&stream, WAIT).unwrap(), End::Reset);
}

#[test]
fn two_thousand_connections_are_listed_and_reset_in_no_time() {
    const CONNECTIONS: usize = 2000;
    const DEADLINE: Duration = Duration::from_secs(5);
    if !require_root() {
        return;
    }
    raise_descriptor_limit().unwrap();
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Swarm::start(&topology.backend1, endpoint).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &["--datapath", "splice"]).unwrap();
    let address = topology.node_address(LISTENER_PORT);
    let streams: Vec<TcpStream> = topology.client.run(|| {
        (0..CONNECTIONS).map(|_| TcpStream::connect_timeout(&address, WAIT).expect("connect")).collect()
    });
    let open = |agent: &Agent| {
        let connections = agent.connections("").unwrap();
        connections.iter().filter(|one| one["state"] == "open").count()
    };
    wait_until("all are open", WAIT, || open(&agent) == CONNECTIONS);

    for output in ["table", "json"] {
        let start = Instant::now();
        let listed = conns(&agent, &topology.node, &["--output", output]);
        let took = start.elapsed();
        println!("{CONNECTIONS} connections as {output} in {took:?}");
        assert!(took < DEADLINE, "{output}: {took:?}");
        let text = stdout(&listed);
        if output == "table" {
            assert_eq!(text.lines().count(), CONNECTIONS + 2);
        } else {
            let json: Value = serde_json::from_str(&text).unwrap();
            let mut listed: Vec<String> = json["connections"]
                .as_array()
                .unwrap()
                .iter()
                .map(|one| one["downstream"].to_string())
                .collect();
            listed.sort_unstable();
            listed.dedup();
            assert_eq!(listed.len(), CONNECTIONS);
        }
    }
    let start = Instant::now();
    let reset = conns(&agent, &topology.node, &["reset", "--all"]);
    println!("and reset in {:?}", start.elapsed());
    assert_eq!(stdout(&reset), format!("reset {CONNECTIONS} connections\n"));
    wait_until("none is left", DEADLINE, || agent.active().unwrap() == 0);
    drop(streams);
}

/// Every file and folder below `folder`.
fn everything(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.flat_map(|path| [everything(&path), vec![path]].concat()).collect()
}

#[test]
fn cleanup_removes_what_a_killed_agent_left_and_nothing_of_one_that_runs() {
    if !require_root() || !require_program("bpftool") {
        return;
    }
    let mut forwarding = Forwarding::start(&[], peer::echo).unwrap();
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    if !pin_dir.exists() {
        return skip(&format!("no eBPF programs: {}", forwarding.agent.state().unwrap()["datapath"]));
    }
    let node = forwarding.topology.node.clone();
    let cleanup = |yes: &[&str]| {
        forwarder(&node, &[&["cleanup", "--pin-dir", pin_dir.to_str().unwrap()], yes].concat())
    };
    let before = everything(&pin_dir);
    assert!(!before.is_empty());
    for yes in [&["--yes"][..], &[]] {
        let output = cleanup(yes);
        assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
        assert!(
            stderr(&output).contains("an agent is running with the pin directory"),
            "{}",
            stderr(&output)
        );
    }
    assert_eq!(everything(&pin_dir), before);

    forwarding.agent.kill().unwrap();
    // What an agent of another version could have left, in folders.
    let inner = pin_dir.join("v0/links");
    fs::create_dir_all(&inner).unwrap();
    let map = before.iter().find(|path| path.ends_with("listeners")).expect("a map");
    let mut pin = Command::new("bpftool");
    pin.args(["map", "pin", "pinned"]).arg(map).arg(inner.join("eth0"));
    forwarder_tests::process::stdout(&mut pin).unwrap();
    let before = everything(&pin_dir);

    let output = cleanup(&[]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    for path in &before {
        assert!(text.contains(&format!("{}\n", path.display())), "no {} in: {text}", path.display());
    }
    assert!(text.contains("run again with --yes"), "{text}");
    assert_eq!(everything(&pin_dir), before);

    let output = cleanup(&["--yes"]);
    let text = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(text.lines().filter(|line| line.starts_with("removed ")).count(), before.len(), "{text}");
    assert!(!pin_dir.exists(), "{:?}", everything(&pin_dir));

    let output = cleanup(&["--yes"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(stdout(&output).starts_with("nothing is left behind"), "{}", stdout(&output));
    assert!(!pin_dir.exists());
}

#[test]
fn cleanup_refuses_a_folder_on_another_file_system() {
    if !require_root() {
        return;
    }
    let netns = NetNs::new().unwrap();
    let output = forwarder(&netns, &["cleanup", "--pin-dir", "/tmp", "--yes"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("not on a BPF file system"), "{}", stderr(&output));
}
