//! The forwarder beside `HAProxy` on the same node in one run, so that the machine's mood affects both alike.
//!
//! Only a loose ratio is asserted; the ratios are printed.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::agent::binary;
use forwarder_tests::client::{self, TIMEOUT};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{ENDPOINT_PORT, Forwarding, LISTENER_PORT};
use forwarder_tests::peer::Server;
use forwarder_tests::process::Process;
use forwarder_tests::{Agent, Manifests, NetNs, Topology, require_root, serialise, wait_until};

static HEAVY: Mutex<()> = Mutex::new(());
const HAPROXY_PORT: u16 = 9101;
const ROUNDS: usize = 5;
/// What is told as a fault. Throughput is twice `HAProxy`'s and connections are as many as its (docs/benchmarks.md), but on a machine on which a system
/// call costs several times as much, 0.84 of its connections were measured, where another one had 1.05 with the same programs.
const LEAST_RATIO: f64 = 0.75;

/// Both in front of one endpoint.
struct Contest {
    _agent: Agent,
    _haproxy: Process,
    _manifests: Manifests,
    topology: Topology,
}

impl Contest {
    fn start() -> Self {
        let topology = Topology::new().expect("a network");
        let endpoint = topology.backend1_address(ENDPOINT_PORT);
        let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).expect("a folder");
        let agent = Agent::start(&topology.node, &manifests.path(), &[]).expect("an agent");
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let configuration = format!(
            "global\n  nbthread {threads}\n  maxconn 2000\n\
             defaults\n  mode tcp\n  option splice-auto\n\
             \x20 timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n\
             listen contest\n  bind :{HAPROXY_PORT}\n  server endpoint {endpoint}\n"
        );
        let file: PathBuf = manifests.beside("haproxy.cfg");
        fs::write(&file, configuration).expect("a writable folder");
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(&file);
        let log = manifests.beside("haproxy.log");
        let haproxy = Process::start(&topology.node, &mut command, &log).expect("start haproxy");
        wait_until("haproxy listens", TIMEOUT, || !topology.node.listening_inodes(HAPROXY_PORT).is_empty());
        Self { _agent: agent, _haproxy: haproxy, _manifests: manifests, topology }
    }

    /// Measures both in turn and compares them.
    ///
    /// Whatever else the machine does slows a measurement and never speeds one up. Two ratios are formed, each robust
    /// against it in its own way: the median over rounds, whose two halves are measured close to each other, and that
    /// of the best measurements. Only if both are low is the forwarder slow.
    fn compare(&self, what: &str, measure: impl Fn(&NetNs, SocketAddr) -> f64) {
        let client = &self.topology.client;
        let ours = || measure(client, self.topology.node_address(LISTENER_PORT));
        let theirs = || measure(client, self.topology.node_address(HAPROXY_PORT));
        // The first of each warms up.
        ours();
        theirs();
        let rounds: Vec<(f64, f64)> = (0..ROUNDS)
            .map(|round| {
                if round % 2 == 0 {
                    (ours(), theirs())
                } else {
                    let theirs = theirs();
                    (ours(), theirs)
                }
            })
            .collect();
        let mut ratios: Vec<f64> = rounds.iter().map(|(ours, theirs)| ours / theirs).collect();
        ratios.sort_by(f64::total_cmp);
        let median = ratios[ROUNDS / 2];
        let best = |values: &mut dyn Iterator<Item = f64>| values.fold(0.0, f64::max);
        let ours = best(&mut rounds.iter().map(|round| round.0));
        let theirs = best(&mut rounds.iter().map(|round| round.1));
        println!("{what}: forwarder and haproxy: {rounds:.0?}");
        println!("{what}: ratio {median:.2} (median), {:.2} (best: {ours:.0} to {theirs:.0})", ours / theirs);
        if binary().components().any(|component| component.as_os_str() == "debug") {
            println!("not asserted: a debug build");
            return;
        }
        assert!(median.max(ours / theirs) >= LEAST_RATIO, "{what}: {median:.2} of haproxy's");
    }
}

#[test]
fn one_streams_throughput_is_not_below_haproxys() {
    const SIZE: usize = 512 << 20;
    const BLOCK: usize = 256 << 10;
    if !require_root() || !require_program("haproxy") {
        return;
    }
    let _guard = serialise(&HEAVY);
    let contest = Contest::start();
    let topology = &contest.topology;
    let endpoint = topology.backend1_address(ENDPOINT_PORT);
    let _server = Server::start(&topology.backend1, endpoint, |mut stream| {
        let mut buffer = vec![0; BLOCK];
        let mut left = SIZE;
        while left > 0 {
            match client::read(stream, &mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                size => left -= size,
            }
        }
        stream.write_all(b".")
    })
    .unwrap();
    contest.compare("Mbit/s of one stream", |client, address| {
        let mut stream = client::connect(client, address).expect("connect");
        let block = vec![0; BLOCK];
        let start = Instant::now();
        for _ in 0..SIZE / BLOCK {
            stream.write_all(&block).expect("send");
        }
        stream.read_exact(&mut [0]).expect("the server's confirmation");
        8.0 * f64::from(u32::try_from(SIZE >> 20).expect("a small number")) / start.elapsed().as_secs_f64()
    });
}

#[test]
fn the_rate_of_short_connections_is_not_below_haproxys() {
    const ACCEPTORS: usize = 16;
    const CLIENTS: usize = 8;
    const TIME: Duration = Duration::from_millis(1500);
    if !require_root() || !require_program("haproxy") {
        return;
    }
    let _guard = serialise(&HEAVY);
    let contest = Contest::start();
    let topology = &contest.topology;
    let listener = topology.backend1.bind(topology.backend1_address(ENDPOINT_PORT)).unwrap();
    for _ in 0..ACCEPTORS {
        let listener = listener.try_clone().unwrap();
        // They end with the process: nobody waits for them.
        thread::spawn(move || answer(&listener));
    }
    contest.compare("connections per second", |client, address| {
        let start = Instant::now();
        let request = || {
            let mut connections = 0_u32;
            while start.elapsed() < TIME {
                one_request(address).expect("a connection");
                connections += 1;
            }
            connections
        };
        let connections: u32 = client.run(|| {
            thread::scope(|scope| {
                let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(request)).collect();
                clients.into_iter().map(|client| client.join().expect("a client does not panic")).sum()
            })
        });
        f64::from(connections) / start.elapsed().as_secs_f64()
    });
}

/// Answers one byte with one byte and closes first, so that no port of a client or proxy is left in `TIME_WAIT`.
fn answer(listener: &TcpListener) {
    while let Ok((mut stream, _)) = listener.accept() {
        let mut byte = [0];
        // What goes wrong here fails the client.
        let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
    }
}

fn one_request(address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    // The server's end comes before ours.
    match client::read(&stream, &mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::other("more than one byte")),
    }
}

#[test]
fn the_forwarder_adds_little_to_a_round_trip() {
    const MESSAGES: u32 = 2000;
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    let forwarding = Forwarding::start(&[], forwarder_tests::peer::echo).unwrap();
    let measure = |address| {
        let stream = client::connect(&forwarding.topology.client, address).unwrap();
        let start = Instant::now();
        for _ in 0..MESSAGES {
            client::ping(&stream, b"x").unwrap();
        }
        start.elapsed() / MESSAGES
    };
    let routed = measure(forwarding.topology.backend1_address(ENDPOINT_PORT));
    let forwarded = measure(forwarding.address());
    println!("one round trip: routed {routed:?}, forwarded {forwarded:?}");
    assert!(forwarded < routed + Duration::from_millis(2), "routed {routed:?}, forwarded {forwarded:?}");
}
