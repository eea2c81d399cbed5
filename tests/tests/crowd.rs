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
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::wait::patient;
use forwarder_tests::{Agent, AgentCommand, Forwarding, http, peer, wait_until};

/// How many requests are timed.
const SAMPLES: usize = 30;
/// The entries that the maps have place for, all of them used. Nobody is behind them: nothing is sent to their ends.
const QUIET: [&str; 2] = ["--keepalive", "0"];
/// How much sooner than a list of all connections everything else is answered, at the least.
const SOONER: u32 = 4;
const WAIT: Duration = Duration::from_mins(1);

type Pinned<K, V> = HashMap<MapData, K, V>;

fn open<K: Pod, V: Pod>(folder: &Path, name: &str) -> Pinned<K, V> {
    let data = MapData::from_pin(folder.join(name)).expect("a pinned map");
    Map::HashMap(data).try_into().expect("a hash map of these")
}

/// Fills the maps with copies of the one pair that stands in them: of other clients, at other endpoints.
fn fill(pins: &Path) {
    let mut flows = open::<FourTuple, Flow>(pins, FLOWS);
    let mut pairs = open::<u32, Pair>(pins, PAIRS);
    let all: Vec<(FourTuple, Flow)> = flows.iter().collect::<Result<_, _>>().expect("flows");
    let of_direction = |wanted: u32| {
        *all.iter().find(|(_, flow)| flow.direction == wanted).expect("a flow of each direction")
    };
    let (request, response) = (of_direction(DIRECTION_REQUEST), of_direction(1 - DIRECTION_REQUEST));
    let number = request.1.pair;
    let state = pairs.get(&number, 0).expect("a pair");
    for copy in 1..PAIRS_CAPACITY {
        let number = number.wrapping_add(copy);
        let [_, a, b, c] = copy.to_be_bytes();
        let with_host = |mut address: [u8; 16], first: u8| {
            address[12..].copy_from_slice(&[first, a, b, c]);
            address
        };
        let [client, endpoint] = [198, 199].map(|first| with_host(request.0.source, first));
        let (mut key, mut flow) = request;
        key.source = client;
        flow.out.destination = endpoint;
        flow.pair = number;
        flows.insert(key, flow, 0).expect("a place for a flow");
        let (mut key, mut flow) = response;
        key.source = endpoint;
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

#[test]
fn health_and_metrics_are_answered_while_the_kernel_forwards_all_it_may() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&at_once(&QUIET), peer::echo).expect("it works");
    let Forwarding { mut agent, topology, manifests, .. } = forwarding;
    let alone = ["/healthz", "/metrics"].map(|path| time(&agent, path));
    let address = topology.node_address(forwarder_tests::fixture::LISTENER_PORT);
    let stream = forwarder_tests::client::connect(&topology.client, address).expect("a connection");
    agent.offload(std::slice::from_ref(&stream));
    agent.kill().expect("it runs");
    fill(&version(&agent));

    let command = AgentCommand::new(&at_once(&QUIET)).succeeding(&agent);
    let agent = command.start(&topology.node, &manifests.path()).expect("an agent");
    wait_until("all are taken over", WAIT, || agent.pairs() == i64::from(PAIRS_CAPACITY));
    let standing = ["/healthz", "/metrics"].map(|path| time(&agent, path));

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
                let count = response.body.matches("\"tier\":\"tc\"").count();
                assert_eq!(u32::try_from(count), Ok(PAIRS_CAPACITY));
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
            "{what} (middle, longest): alone {:?}, with {PAIRS_CAPACITY} pairs {:?}, while they are listed {:?}",
            alone[index], standing[index], busy[index]
        );
        for (_, longest) in [standing[index], busy[index]] {
            assert!(longest * SOONER < listed, "{what} took {longest:?}, a list {listed:?}");
        }
    }
    println!("a list of all takes {listed:?}");
    agent_ends(agent);
}

/// It would say goodbye to all those ends that are not there.
fn agent_ends(mut agent: Agent) {
    agent.kill().expect("it runs");
}
