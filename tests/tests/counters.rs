//! What is counted, in the agent and in the kernel, and how the agent does without the kernel's part.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use forwarder_tests::database::require_program;
use forwarder_tests::fixture::{LISTENER, LISTENER_PORT};
use forwarder_tests::{
    Agent, AgentCommand, BackendRef, Forwarding, client, kernel, peer, require_root, skip, wait_until,
};
use serde_json::Value;

const WAIT: Duration = Duration::from_secs(10);

/// What takes every privilege from an agent.
const WITHOUT_CAPABILITIES: [&str; 4] =
    ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];

/// Whether the agent has its eBPF programs. If not, says that the test is skipped, or fails it where `REQUIRE_NETNS=1`
/// demands that no test is skipped.
fn require_programs(agent: &Agent) -> bool {
    let datapath = agent.state().expect("a state")["datapath"].clone();
    let loaded = datapath["programs"] == true;
    if !loaded {
        skip(&format!("no eBPF programs: {datapath}"));
    }
    loaded
}

/// The entries of a pinned map as `bpftool` prints them by its type information.
fn dump(pin_dir: &Path, map: &str) -> Result<Vec<Value>> {
    // Without type information there would be no such part.
    kernel::dump(pin_dir, map)?
        .iter()
        .map(|entry| entry.get("formatted").cloned().context("an entry without field names"))
        .collect()
}

/// The number of the listener on `port`, by the map of listeners.
fn listener_id(pin_dir: &Path, port: u16) -> Result<u64> {
    let entries = dump(pin_dir, "listeners")?;
    let entry = entries.iter().find(|entry| entry["key"]["port"] == port);
    let entry = entry.with_context(|| format!("no listener on {port} in {entries:?}"))?;
    entry["value"]["listener_id"].as_u64().context("a listener without a number")
}

/// The sum of a counter of a listener over all processors.
fn counter(pin_dir: &Path, listener_id: u64, field: &str) -> Result<u64> {
    let entries = dump(pin_dir, "counters")?;
    let entry =
        entries.iter().find(|entry| entry["key"] == listener_id).context("a listener without counters")?;
    let values = entry["values"].as_array().context("a value for each processor")?;
    values.iter().map(|value| value["value"][field].as_u64().context("a field's number")).sum()
}

#[test]
fn the_kernel_counts_every_attempt_and_every_byte() {
    const CONNECTIONS: usize = 50;
    const SIZE: usize = 10_000;
    if !require_root() || !require_program("bpftool") {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    if !require_programs(&forwarding.agent) {
        return;
    }
    let pin_dir = forwarding.agent.pin_dir();
    let id = listener_id(pin_dir, LISTENER_PORT).unwrap();
    assert_eq!(counter(pin_dir, id, "syns").unwrap(), 0);
    for _ in 0..CONNECTIONS {
        client::ping(&forwarding.connect().unwrap(), &[7; SIZE]).unwrap();
    }
    assert_eq!(counter(pin_dir, id, "syns").unwrap(), CONNECTIONS as u64);
    let bytes = counter(pin_dir, id, "bytes").unwrap();
    let payload = (CONNECTIONS * SIZE) as u64;
    assert!((payload..payload * 2).contains(&bytes), "{bytes} bytes for {payload} bytes of data");

    // A new listener has its own number and counts from zero; the old one is left alone.
    forwarding.manifests.gateway(&[("a", LISTENER_PORT), ("b", 9002)]).unwrap();
    forwarding.agent.wait_bound("default/gw/b");
    wait_until("the new listener is in the map", WAIT, || listener_id(pin_dir, 9002).is_ok());
    let second = listener_id(pin_dir, 9002).unwrap();
    assert_ne!(second, id);
    assert_eq!(listener_id(pin_dir, LISTENER_PORT).unwrap(), id);
    assert_eq!(counter(pin_dir, second, "syns").unwrap(), 0);
    assert_eq!(counter(pin_dir, id, "syns").unwrap(), CONNECTIONS as u64);

    forwarding.manifests.gateway(&[("a", LISTENER_PORT)]).unwrap();
    wait_until("the removed listener leaves the map", WAIT, || listener_id(pin_dir, 9002).is_err());
}

#[test]
fn operators_see_the_endpoints_in_the_kernels_map() {
    if !require_root() || !require_program("bpftool") {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    if !require_programs(&forwarding.agent) {
        return;
    }
    let pin_dir = forwarding.agent.pin_dir();
    let id = listener_id(pin_dir, LISTENER_PORT).unwrap();
    let entries = dump(pin_dir, "backends").unwrap();
    let entry = entries.iter().find(|entry| entry["key"]["listener_id"] == id).unwrap();
    assert_eq!(entry["value"]["port"], 5000, "{entry}");
    assert_eq!(entry["value"]["weight"], 1, "{entry}");
}

#[test]
fn trace_shows_what_the_programs_do_and_less_does_not() {
    if !require_root() {
        return;
    }
    for (level, wanted) in [("trace", true), ("info", false)] {
        let command = AgentCommand::new(&[]).environment("FORWARDER_LOG", level);
        let forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
        if !require_programs(&forwarding.agent) {
            return;
        }
        client::ping(&forwarding.connect().unwrap(), b"x").unwrap();
        let traced = || {
            let attempt = format!("]:{LISTENER_PORT} from [");
            let log = forwarding.agent.log();
            log.lines().any(|line| line.contains(" TRACE ") && line.contains(&attempt))
        };
        if wanted {
            wait_until("the lines of the programs are in the log", WAIT, traced);
        } else {
            assert!(!traced());
        }
    }
}

#[test]
fn without_capabilities_it_forwards_all_the_same_and_says_so_once() {
    if !require_root() {
        return;
    }
    let command = AgentCommand::new(&[]).wrapped(&WITHOUT_CAPABILITIES);
    let forwarding = Forwarding::start_with(&command, peer::transfer).unwrap();
    client::transfer(&forwarding.connect().unwrap(), 1, 100_000, 100_000).unwrap();
    forwarding.manifests.gateway(&[("a", LISTENER_PORT), ("b", 9002)]).unwrap();
    forwarding.manifests.route("b", &[BackendRef { service: "a", weight: 1 }]).unwrap();
    forwarding.agent.wait_bound("default/gw/b");
    client::transfer(&forwarding.connect().unwrap(), 2, 100_000, 100_000).unwrap();
    let log = forwarding.agent.log();
    let reasons: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("WARN") || line.contains("ERROR"))
        .filter(|line| {
            let line = line.to_lowercase();
            ["bpf", "cap_", "capabilit", "permitted"].iter().any(|word| line.contains(word))
        })
        .collect();
    assert_eq!(reasons.len(), 1, "{reasons:#?}\n{log}");
}

/// A tier that is asked for by its name is not replaced silently by another one.
#[test]
fn a_listener_that_asks_for_a_tier_that_is_missing_is_a_problem() {
    if !require_root() {
        return;
    }
    let command = AgentCommand::new(&["--datapath", "tc"]).wrapped(&WITHOUT_CAPABILITIES);
    let forwarding = Forwarding::start_with(&command, peer::transfer).unwrap();
    let agent = &forwarding.agent;
    client::transfer(&forwarding.connect().unwrap(), 1, 100_000, 100_000).unwrap();
    let count = || {
        let labels = [("severity", "warning"), ("reason", "TierUnavailable")];
        agent.metrics().map(|metrics| metrics.sum("forwarder_problems", &labels))
    };
    wait_until("the problem is told", WAIT, || count().is_ok_and(|count| count == 1));
    let problems = agent.state().unwrap()["problems"].to_string();
    assert!(problems.contains("listener a asks for tier tc, which does not work on this node"), "{problems}");
    // Who asks for `auto` has no problem.
    let gateway = format!(
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\n\
         metadata: {{name: gw, annotations: {{forwarder.dev/datapath: auto}}}}\n\
         spec:\n  gatewayClassName: forwarder\n  listeners:\n  - {{name: a, port: {LISTENER_PORT}, protocol: TCP}}\n"
    );
    forwarding.manifests.write("gateway-gw", &gateway).unwrap();
    wait_until("the problem is over", WAIT, || count().is_ok_and(|count| count == 0));
}

#[test]
fn metrics_count_connections_and_bytes_while_they_flow() {
    const CONNECTIONS: usize = 20;
    const SIZE: usize = 5000;
    if !require_root() {
        return;
    }
    for datapath in ["splice", "copy"] {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::digest).unwrap();
        let agent = &forwarding.agent;
        let sum = |name: &str| agent.metrics().unwrap().sum(name, &[("listener", LISTENER)]);
        assert_eq!(sum("forwarder_connections_total"), 0);
        let mut answers = 0;
        for _ in 0..CONNECTIONS {
            let mut stream = forwarding.connect().unwrap();
            stream.write_all(&[1; SIZE]).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            answers += stream.read_to_end(&mut Vec::new()).unwrap();
        }
        let [connections, size, answers] = [CONNECTIONS, SIZE, answers].map(|n| i64::try_from(n).unwrap());
        wait_until("all connections are counted", WAIT, || {
            sum("forwarder_connections_total") == connections && agent.active().unwrap() == 0
        });
        assert_eq!(sum("forwarder_received_bytes_total"), connections * size, "{datapath}");
        assert_eq!(sum("forwarder_sent_bytes_total"), answers, "{datapath}");

        let mut open = forwarding.connect().unwrap();
        open.write_all(&[1; SIZE]).unwrap();
        wait_until("bytes are counted while the connection is open", WAIT, || {
            sum("forwarder_received_bytes_total") == (connections + 1) * size
        });
        assert_eq!(agent.active().unwrap(), 1);
    }
}

#[test]
fn metrics_are_complete_text() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    let response = forwarding.agent.get("/metrics").unwrap();
    assert_eq!(response.status, 200);
    assert!(response.body.ends_with("# EOF\n"), "{}", response.body);
    assert_eq!(forwarding.agent.get("/healthz").unwrap().status, 200);
    assert_eq!(forwarding.agent.get("/no-such-page").unwrap().status, 404);
}
