//! The admin endpoint on a host with other users: what they may do there, and that forwarding does not depend on it.

use std::fs::{self, Permissions};
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};
use std::time::Duration;

use forwarder_tests::agent::{ADMIN, DEADLINE, binary};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::metrics::Metrics;
use forwarder_tests::peer::Server;
use forwarder_tests::{
    Agent, AgentCommand, Forwarding, Manifests, NetNs, Topology, client, http, patient, peer, require_root,
    wait_for, wait_until,
};
use tempfile::TempDir;

/// A user and a group without privileges.
const NOBODY: u32 = 65534;
/// How many files an agent may have open that is crowded.
const FILES: usize = 256;
/// How many connections somebody holds to it.
const CROWD: usize = 300;
/// How long the agent waits for a request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

const RESET: &str = "POST /v1/connections/reset HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{\"all\": true}";

fn admin() -> SocketAddr {
    ADMIN.parse().expect("an address")
}

/// A folder that everybody may enter.
fn public_folder() -> TempDir {
    let folder = TempDir::with_prefix("forwarder-admin-").expect("a folder");
    fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).expect("it is ours");
    folder
}

/// Has a user without privileges send a request to what socat names so.
fn as_nobody(netns: &NetNs, address: &str, request: &str) -> Output {
    let mut file = tempfile::tempfile().expect("a file");
    file.write_all(request.as_bytes()).expect("a file");
    io::Seek::rewind(&mut file).expect("a file");
    let mut command = Command::new("socat");
    command.args(["-t5", "-", &format!("{address},shut-none")]);
    netns.output(command.stdin(file).uid(NOBODY).gid(NOBODY)).expect("run socat")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Whether a way into the admin endpoint is open, as the agent shows it to those who come by its socket.
fn is_up(agent: &Agent, by: &str) -> bool {
    let shown = http::get_by(agent.admin_socket(), "/metrics").expect("metrics");
    Metrics::parse(&shown.body).sum("forwarder_admin_up", &[("by", by)]) == 1
}

#[test]
fn a_user_without_privileges_reads_and_changes_nothing() {
    if !require_root() || !require_program("socat") {
        return;
    }
    let folder = public_folder();
    let socket = folder.path().join("admin.sock");
    let forwarding =
        Forwarding::start_with(&AgentCommand::default().admin_socket(&socket), peer::echo).unwrap();
    let node = &forwarding.topology.node;
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"before").unwrap();
    let (by_tcp, by_socket) = (format!("TCP:{ADMIN}"), format!("UNIX-CONNECT:{}", socket.display()));

    let answer = text(&as_nobody(node, &by_tcp, "GET /healthz HTTP/1.0\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.0 200 "), "{answer}");
    let answer = text(&as_nobody(node, &by_tcp, RESET));
    assert!(answer.starts_with("HTTP/1.0 403 "), "{answer}");
    assert!(answer.contains(&*socket.to_string_lossy()), "{answer}");
    let switch = http::post(node, admin(), "/v1/datapath", r#"{"tc": false}"#).unwrap();
    assert_eq!(switch.status, 403, "{}", switch.body);
    let answer = text(&as_nobody(node, &by_socket, RESET));
    assert!(answer.contains("Permission denied"), "{answer}");
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
    client::ping(&stream, b"after").unwrap();

    // Who may open the socket may reset.
    let reset = forwarding.agent.post("/v1/connections/reset", r#"{"all": true}"#).unwrap();
    assert_eq!((reset.status, reset.body.as_str()), (200, r#"{"reset":1}"#));
}

#[test]
fn a_group_may_be_let_use_the_socket() {
    if !require_root() || !require_program("socat") {
        return;
    }
    let folder = public_folder();
    let socket = folder.path().join("inner/admin.sock");
    let command = AgentCommand::new(&["--admin-socket-group", "65534"]).admin_socket(&socket);
    let forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
    let found = fs::metadata(&socket).unwrap();
    assert_eq!((found.mode() & 0o777, found.uid(), found.gid()), (0o660, 0, NOBODY));
    let address = format!("UNIX-CONNECT:{}", socket.display());
    let answer = text(&as_nobody(&forwarding.topology.node, &address, RESET));
    assert!(answer.starts_with("HTTP/1.0 200 ") && answer.ends_with(r#"{"reset":0}"#), "{answer}");
}

#[test]
fn a_page_in_a_browser_reads_nothing() {
    if !require_root() {
        return;
    }
    let forwarding =
        Forwarding::start(&["--admin-hosts", "metrics.example.com,node.example.com"], peer::echo).unwrap();
    let ask = |host: &str| {
        let request = format!("GET /v1/state HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        http::by_tcp(&forwarding.topology.node, admin(), &request).unwrap()
    };
    for host in ["attacker.example", "attacker.example:9902", "127.0.0.1.attacker.example", ""] {
        let answer = ask(host);
        assert_eq!(answer.status, 421, "{host}: {}", answer.body);
        assert!(answer.body.contains("--admin-hosts"), "{}", answer.body);
    }
    for host in ["127.0.0.1:9902", "10.0.1.1", "[::1]:9902", "localhost:1", "node.example.com:9902"] {
        assert_eq!(ask(host).status, 200, "{host}");
    }
}

/// Connections whose clients have sent half a request each.
fn crowd(netns: &NetNs) -> Vec<TcpStream> {
    let half = |mut stream: TcpStream| {
        // The agent may have closed it already.
        let _ = stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Half: ");
        stream
    };
    netns.run(|| (0..CROWD).map(|_| half(TcpStream::connect(admin()).expect("it connects"))).collect())
}

#[test]
fn nobody_keeps_others_out_by_holding_connections() {
    if !require_root() {
        return;
    }
    let command = AgentCommand::default().wrapped(&["prlimit", &format!("--nofile={FILES}")]);
    let forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
    let (agent, node) = (&forwarding.agent, &forwarding.topology.node);
    let idle = agent.descriptors().unwrap();
    let held = crowd(node);
    let by_socket: Vec<UnixStream> =
        (0..CROWD).map(|_| UnixStream::connect(agent.admin_socket()).unwrap()).collect();

    assert_eq!(agent.get("/healthz").unwrap().status, 200);
    assert_eq!(http::get_by(agent.admin_socket(), "/healthz").unwrap().status, 200);
    assert_eq!(agent.post("/v1/datapath", "{}").unwrap().status, 200);
    wait_until("the endpoint has given most of them up", DEADLINE, || {
        agent.descriptors().unwrap() <= idle + FILES / 8
    });
    let streams: Vec<TcpStream> = (0..20).map(|_| forwarding.connect().unwrap()).collect();
    for stream in &streams {
        client::ping(stream, b"data").unwrap();
    }
    assert!(agent.log().contains("its maximum of connections"), "{}", agent.log());
    assert!(!agent.log().contains("cannot accept connections for a moment"), "{}", agent.log());
    drop((held, by_socket));
}

#[test]
fn a_client_that_does_not_go_on_is_given_up() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    let connect = || forwarding.topology.node.connect(admin()).unwrap();
    let (silent, mut half, mut idle) = (connect(), connect(), connect());
    half.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n").unwrap();
    idle.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    for stream in [&silent, &half, &idle] {
        stream.set_read_timeout(Some(patient(HEAD_TIMEOUT * 2))).unwrap();
        let mut answer = String::new();
        let ended = io::Read::read_to_string(&mut { stream }, &mut answer);
        let is_over = match &ended {
            Ok(_) => true,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        assert!(is_over, "{ended:?}: {answer}");
    }
}

#[test]
fn a_taken_port_does_not_keep_the_agent_from_forwarding() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let _server = Server::start(&topology.backend1, endpoint, peer::echo).unwrap();
    let squatter = topology.node.bind(admin()).unwrap();
    let agent = AgentCommand::default().spawn(&topology.node, &manifests.path()).unwrap();
    let address = topology.node_address(LISTENER_PORT);
    let stream = wait_for(DEADLINE, || client::connect(&topology.client, address).ok()).expect("it listens");
    client::ping(&stream, b"without an admin port").unwrap();
    assert!(!is_up(&agent, "tcp") && is_up(&agent, "socket"));
    let complaint = format!("cannot open the admin endpoint on {ADMIN}");
    assert!(agent.log().contains(&complaint), "{}", agent.log());

    drop(squatter);
    wait_until("the port is had", DEADLINE, || {
        agent.get("/healthz").is_ok_and(|answer| answer.status == 200)
    });
    assert!(is_up(&agent, "tcp"));
    assert_eq!(agent.log().matches(&complaint).count(), 1, "{}", agent.log());
    assert!(agent.log().contains(&format!("the admin endpoint now listens on {ADMIN}")), "{}", agent.log());
}

#[test]
fn a_socket_is_taken_from_the_dead_and_not_from_the_living() {
    if !require_root() {
        return;
    }
    let folder = public_folder();
    let socket = folder.path().join("admin.sock");
    drop(UnixListener::bind(&socket).unwrap());
    let command = AgentCommand::default().admin_socket(&socket);
    let mut one = Forwarding::start_with(&command, peer::echo).unwrap();
    let inode = || fs::symlink_metadata(&socket).map(|found| found.ino()).ok();
    let of_one = inode();

    // Namespaces share the file system.
    let mut other = Forwarding::start_with(&command, peer::echo).unwrap();
    let complaint = "another agent that is running has it";
    wait_until("the other one says so", DEADLINE, || other.agent.log().contains(complaint));
    let up = |forwarding: &Forwarding| {
        let metrics = forwarding.agent.metrics().unwrap();
        metrics.sum("forwarder_admin_up", &[("by", "socket")])
    };
    assert_eq!((inode(), up(&one), up(&other)), (of_one, 1, 0));
    let stream = other.connect().unwrap();
    client::ping(&stream, b"forwards").unwrap();

    one.agent.kill().unwrap();
    wait_until("the other one has it", DEADLINE, || up(&other) == 1);
    let reset = http::post_by(&socket, "/v1/connections/reset", r#"{"all": true}"#).unwrap();
    assert_eq!(reset.body, r#"{"reset":1}"#);

    // It is removed by whose it is.
    let elsewhere = folder.path().join("moved.sock");
    fs::rename(&socket, &elsewhere).unwrap();
    let _somebody_elses = UnixListener::bind(&socket).unwrap();
    let of_somebody = inode();
    other.agent.terminate().unwrap();
    assert!(other.agent.wait(DEADLINE).is_some(), "it does not end");
    assert_eq!(inode(), of_somebody);
}

#[test]
fn nothing_is_left_of_the_socket_of_an_agent_that_ends() {
    if !require_root() {
        return;
    }
    let folder = public_folder();
    let command = AgentCommand::default().admin_socket(&folder.path().join("made/admin.sock"));
    let mut forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
    forwarding.agent.terminate().unwrap();
    assert!(forwarding.agent.wait(DEADLINE).is_some(), "it does not end");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// Runs the command line as a root that may not open what is others'.
fn without_privileges(agent: &Agent, netns: &NetNs, arguments: &[&str]) -> Output {
    let own = agent.command(arguments);
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-all", "--inh-caps=-all"]).arg(own.get_program()).args(own.get_args());
    command.envs(own.get_envs().filter_map(|(name, value)| Some((name, value?))));
    netns.output(&mut command).expect("run setpriv")
}

#[test]
fn commands_say_which_way_is_closed_to_them() {
    if !require_root() || !require_program("setpriv") {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    let (agent, node) = (&forwarding.agent, &forwarding.topology.node);
    let socket = agent.admin_socket().to_str().unwrap().to_owned();
    let run = |arguments: &[&str]| node.output(&mut agent.command(arguments)).expect("it runs");

    let refused = run(&["conns", "reset", "--all", "--admin", ADMIN]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused).contains("403") && text(&refused).contains(&socket), "{}", text(&refused));
    let refused = run(&["datapath", "off", "tc", "--admin", ADMIN]);
    assert!(text(&refused).contains("403") && text(&refused).contains(&socket), "{}", text(&refused));
    let reset = run(&["conns", "reset", "--all"]);
    assert_eq!(text(&reset), "reset 0 connections: none matches all=true\n");

    // Somebody else's: by TCP one may look all the same.
    chown(&socket, Some(NOBODY), None).unwrap();
    let denied = without_privileges(agent, node, &["conns", "reset", "--all"]);
    assert_eq!(denied.status.code(), Some(2), "{}", text(&denied));
    for words in [&*socket, "Permission denied", "you are neither root nor in the group"] {
        assert!(text(&denied).contains(words), "no {words} in: {}", text(&denied));
    }
    assert_eq!(text(&without_privileges(agent, node, &["conns"])), "0 connections\n");
    let asked = without_privileges(agent, node, &["conns", "--admin-socket", &socket]);
    assert_eq!(asked.status.code(), Some(2), "{}", text(&asked));
}

#[test]
fn without_an_agent_commands_say_where_they_asked() {
    if !require_root() {
        return;
    }
    let netns = NetNs::new().unwrap();
    for arguments in [&["conns"][..], &["conns", "reset", "--all"]] {
        // Nor has a dead one left anything there.
        let mut command = Command::new(binary());
        command.env("FORWARDER_ADMIN", ADMIN).env("FORWARDER_ADMIN_SOCKET", "/nowhere/admin.sock");
        let output = netns.output(command.args(arguments).args(["--pin-dir", "/nowhere"])).unwrap();
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        let message = format!(
            "no agent answers at /nowhere/admin.sock (No such file or directory (os error 2)), nor at {ADMIN} (Connection \
             refused (os error 111)): start it, or name it with --admin-socket or --admin"
        );
        assert!(text(&output).contains(&message), "{}", text(&output));
        assert!(output.stdout.is_empty(), "{}", text(&output));
    }
}
