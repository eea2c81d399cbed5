//! As many connections in the kernel as it may forward: who asks the agent does not wait until it has looked at all of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use aya::Pod;
use aya::maps::{HashMap, Map, MapData};
use forwarder_common::flow::{DIRECTION_REQUEST, Flow, PAIRS_CAPACITY, Pair};
use forwarder_common::layout::{FLOWS, PAIRS};
use forwarder_common::tuple::FourTuple;
use forwarder_tests::fixture::ENDPOINT_PORT;
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::swarm::{Swarm, raise_descriptor_limit};
use forwarder_tests::wait::patient;
use forwarder_tests::{Agent, AgentCommand, Forwarding, client, http, peer, process, wait_until};

/// How many requests are timed.
const SAMPLES: usize = 30;
/// Nobody is behind most of the pairs: nothing is sent to their ends.
const QUIET: [&str; 2] = ["--keepalive", "0"];
/// How many pairs there are, if not as many as by default.
const COUNT: &str = "FORWARDER_TEST_PAIRS";
/// How many of them have ends, if not [`FEW`]: each takes two descriptors of this process.
const REAL: &str = "FORWARDER_TEST_REAL";
const FEW: usize = 50;
/// To how many endpoints they lead, about, and from which ports.
const PORTS: u32 = 25_000;
const FIRST_PORT: u32 = 1024;
/// How many of the clients have addresses of one network of 256.
const NETWORK: &str = "198.0.1.0/24";
/// How much sooner than a list of all connections everything else is answered, at the least.
const SOONER: u32 = 4;
/// What the agent may take for each of them, in bytes.
const MEMORY: u64 = 150;
/// Which part of one CPU looking after them may take, in percent; on a machine where others run too.
const SHARE: f64 = 7.0;
/// For how long that is observed for each so many of them.
const OBSERVED: Duration = Duration::from_secs(10);
const WAIT: Duration = Duration::from_mins(1);

type Pinned<K, V> = HashMap<MapData, K, V>;

fn open<K: Pod, V: Pod>(folder: &Path, name: &str) -> Pinned<K, V> {
    let data = MapData::from_pin(folder.join(name)).expect("a pinned map");
    Map::HashMap(data).try_into().expect("a hash map of these")
}

/// How many pairs there are to be.
fn count() -> u32 {
    std::env::var(COUNT).map_or(PAIRS_CAPACITY, |text| text.parse().expect("a number of pairs"))
}

/// How many of them are to have ends.
fn real() -> usize {
    std::env::var(REAL).map_or(FEW, |text| text.parse().expect("a number of connections"))
}

/// Fills the maps up to `count` with copies of a pair that stands in them: of other clients, at other endpoints.
fn fill(pins: &Path, count: u32) {
    let mut flows = open::<FourTuple, Flow>(pins, FLOWS);
    let mut pairs = open::<u32, Pair>(pins, PAIRS);
    let all: Vec<(FourTuple, Flow)> = flows.iter().collect::<Result<_, _>>().expect("flows");
    let of_direction = |wanted: u32| {
        *all.iter().find(|(_, flow)| flow.direction == wanted).expect("a flow of each direction")
    };
    let (request, response) = (of_direction(DIRECTION_REQUEST), of_direction(1 - DIRECTION_REQUEST));
    let number = request.1.pair;
    let state = pairs.get(&number, 0).expect("a pair");
    let last = pairs.keys().map(|number| number.expect("a key")).max().expect("a pair");
    for copy in 1..=count - u32::try_from(pairs.keys().count()).expect("few") {
        let number = last.wrapping_add(copy);
        let with_host = |mut address: [u8; 16], first: u8, number: u32| {
            let [_, a, b, c] = number.to_be_bytes();
            address[12..].copy_from_slice(&[first, a, b, c]);
            address
        };
        let client = with_host(request.0.source, 198, copy);
        let endpoint = with_host(request.0.source, 199, copy / PORTS);
        let port = u16::try_from(FIRST_PORT + copy % PORTS).expect("a port");
        let (mut key, mut flow) = request;
        key.source = client;
        (flow.out.destination, flow.out.source_port) = (endpoint, port);
        flow.pair = number;
        flows.insert(key, flow, 0).expect("a place for a flow");
        let (mut key, mut flow) = response;
        (key.source, key.destination_port) = (endpoint, port);
        flow.out.destination = client;
        flow.pair = number;
        flows.insert(key, flow, 0).expect("a place for a flow");
        pairs.insert(number, state, 0).expect("a place for a pair");
    }
}

/// The folder of the version in a pin directory.
fn version(agent: &Agent) -> PathBuf {
    let mut folders =
        fs::read_dir(agent.pin_dir()).expect("pins").map(|entry| entry.expect("an entry").path());
    folders.find(|path| path.join(FLOWS).exists()).expect("the maps")
}

/// How long the answers to a request take: the middle one, and the longest.
fn time(agent: &Agent, path: &str) -> (Duration, Duration) {
    let mut taken: Vec<Duration> = (0..SAMPLES)
        .map(|_| {
            let start = Instant::now();
            let response = agent.get(path).expect("an answer");
            assert_eq!(response.status, 200, "{path}: {}", response.body);
            start.elapsed()
        })
        .collect();
    taken.sort();
    (taken[SAMPLES / 2], taken[SAMPLES - 1])
}

/// What the agent has of the node's memory, in bytes.
fn memory(agent: &Agent) -> u64 {
    agent.rss_kib().expect("its memory") * 1024
}

/// How long the thread that looks after pairs has run.
fn sweeping(agent: &Agent) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{}/task", agent.id())).expect("threads");
    let of_thread = |task: fs::DirEntry| {
        let read = |name| fs::read_to_string(task.path().join(name)).ok();
        let is_it = read("comm")?.trim() == "pairs";
        // The first number of `schedstat`: nanoseconds on a CPU.
        let ran = read("schedstat")?.split(' ').next()?.parse().ok()?;
        is_it.then_some(Duration::from_nanos(ran))
    };
    tasks.filter_map(Result::ok).find_map(of_thread).expect("the thread that looks after pairs")
}

#[test]
fn health_and_metrics_are_answered_while_the_kernel_forwards_all_it_may() {
    if !is_ready() {
        return;
    }
    let count = count();
    let most = count.to_string();
    let arguments = at_once(&[&QUIET[..], &["--max-pairs", &most]].concat());
    let forwarding = Forwarding::start(&arguments, peer::echo).expect("it works");
    let alone = ["/healthz", "/metrics"].map(|path| time(&forwarding.agent, path));
    raise_descriptor_limit().expect("a limit");
    let listener = forwarding.address();
    let Forwarding { mut agent, topology, manifests, server } = forwarding;
    // One that waits for as long as the maps are filled.
    drop(server);
    let server =
        Swarm::start(&topology.backend1, topology.backend1_address(ENDPOINT_PORT)).expect("a server");
    let connect = |_| client::connect(&topology.client, listener).expect("a connection");
    let streams: Vec<_> = (0..real()).map(connect).collect();
    agent.offload(&streams);
    let ping_all = || streams.iter().for_each(|stream| client::ping(stream, b"still").expect("an answer"));
    let memory_alone = memory(&agent);
    agent.kill().expect("it runs");
    fill(&version(&agent), count);

    let start = Instant::now();
    let command = AgentCommand::new(&arguments).succeeding(&agent);
    let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
    wait_until("all are taken over", WAIT, || agent.pairs() == i64::from(count));
    println!("all are taken over {:?} after the start", start.elapsed());
    ping_all();
    let standing = ["/healthz", "/metrics"].map(|path| time(&agent, path));
    let counted = || agent.metrics().expect("metrics").sum("forwarder_connections_total", &[]);
    wait_until("all are counted for their listener", WAIT, || counted() == i64::from(count));

    let share = |time: Duration| {
        let (before, start) = (sweeping(&agent), Instant::now());
        thread::sleep(time);
        100.0 * sweeping(&agent).saturating_sub(before).as_secs_f64() / start.elapsed().as_secs_f64()
    };
    // What the former agent has counted is not counted once more: each has moved a byte.
    assert!(agent.metric("forwarder_received_bytes_total") < i64::from(count));

    let observed = OBSERVED * count.div_ceil(PAIRS_CAPACITY);
    // At first, and whenever the network of the node changes, each looks for its path anew.
    let mut shares = Vec::new();
    wait_until("looking after them takes its share", observed * 5, || {
        ping_all();
        shares.push(share(observed));
        shares.last().is_some_and(|share| *share <= SHARE)
    });
    ping_all();
    let memory = (memory(&agent) - memory_alone) / u64::from(count);
    println!("looking after them takes {shares:.1?} % of a CPU, and {memory} bytes for each");
    assert!(memory <= MEMORY, "{memory} bytes for each pair");

    let start = Instant::now();
    let few = agent.get("/v1/connections?limit=10").expect("a list");
    assert_eq!(few.body.matches("\"tier\":\"tc\"").count(), 10);
    println!("a list of ten takes {:?}", start.elapsed());

    let is_done = AtomicBool::new(false);
    let (listed, busy) = thread::scope(|scope| {
        let list = scope.spawn(|| {
            let start = Instant::now();
            let mut lists = 0;
            while !is_done.load(Ordering::Relaxed) {
                let address = forwarder_tests::agent::ADMIN.parse().expect("an address");
                let path = "/v1/connections";
                let response =
                    http::get_within(&topology.node, address, path, patient(WAIT)).expect("a list");
                let listed = response.body.matches("\"tier\":\"tc\"").count();
                assert_eq!(u32::try_from(listed), Ok(count));
                lists += 1;
            }
            start.elapsed() / lists
        });
        let busy = ["/healthz", "/metrics"].map(|path| time(&agent, path));
        is_done.store(true, Ordering::Relaxed);
        (list.join().expect("lists"), busy)
    });
    for (index, what) in ["/healthz", "/metrics"].into_iter().enumerate() {
        println!(
            "{what} (middle, longest): alone {:?}, with {count} pairs {:?}, while they are listed {:?}",
            alone[index], standing[index], busy[index]
        );
        for (_, longest) in [standing[index], busy[index]] {
            assert!(longest * SOONER < listed, "{what} took {longest:?}, a list {listed:?}");
        }
    }
    println!("a list of all takes {listed:?}");

    let start = Instant::now();
    let mut command = agent.command(&["conns", "reset", "--downstream", NETWORK]);
    let reset = topology.node.run(|| process::stdout(&mut command)).expect("a report");
    println!("a reset of one network takes {:?}", start.elapsed());
    assert_eq!(reset, "reset 256 connections\n");
    ping_all();
    drop(server);
    agent_ends(agent);
}

/// It would say goodbye to all those ends that are not there.
fn agent_ends(mut agent: Agent) {
    agent.kill().expect("it runs");
}
