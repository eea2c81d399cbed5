//! The capabilities that the Helm chart asks for: they suffice, and none is idle.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use forwarder_tests::agent::{DEADLINE, binary};
use forwarder_tests::chart::chart;
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::{Agent, AgentCommand, Forwarding, NetNs, client, peer, wait_until};
use serde_json::Value;

/// A command that leaves its process these capabilities alone, as a container runtime does.
fn confined(capabilities: &[&str]) -> Vec<String> {
    let kept = capabilities.iter().map(|name| format!("+{}", name.to_lowercase()));
    let bounds: Vec<String> = std::iter::once("-all".to_owned()).chain(kept).collect();
    vec![
        "setpriv".to_owned(),
        format!("--bounding-set={}", bounds.join(",")),
        "--inh-caps=-all".to_owned(),
        "--no-new-privs".to_owned(),
    ]
}

/// The capabilities that the chart asks for.
fn capabilities() -> Vec<String> {
    let values = fs::read_to_string(chart().join("values.yaml")).expect("a file");
    let values: Value = serde_saphyr::from_str(&values).expect("valid text");
    let names = values["capabilities"].as_array().expect("a list").iter();
    names.map(|name| name.as_str().expect("a text").to_owned()).collect()
}

/// The interfaces to which an agent has attached its programs, and how, by its log.
fn ways_to_attach(agent: &Agent) -> BTreeSet<String> {
    let log = agent.log();
    log.lines().filter_map(|line| line.split_once(" attached ")).map(|(_, what)| what.to_owned()).collect()
}

/// What `forwarder probe` finds missing with these capabilities.
fn missing(capabilities: &[&str]) -> Vec<String> {
    let netns = NetNs::new().expect("a namespace");
    let words = confined(capabilities);
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).arg(binary()).args(["probe", "--output", "json"]);
    let findings: Value =
        serde_json::from_str(&netns.stdout(&mut command).expect("an answer")).expect("valid text");
    // Whether there is a Kubernetes API has nothing to do with them.
    let is_missing = |finding: &&Value| finding["available"] == false && finding["feature"] != "kubernetes";
    let missing = findings.as_array().expect("a list").iter().filter(is_missing);
    missing.map(|finding| finding["feature"].as_str().expect("a text").to_owned()).collect()
}

#[test]
fn each_capability_is_needed_and_no_other() {
    if !is_ready() {
        return;
    }
    let capabilities = capabilities();
    let all: Vec<&str> = capabilities.iter().map(String::as_str).collect();
    assert_eq!(missing(&all), [""; 0]);
    for left_out in &all {
        let others: Vec<&str> = all.iter().filter(|name| *name != left_out).copied().collect();
        assert_ne!(missing(&others), [""; 0], "nothing is missing without {left_out}");
    }
}

#[test]
fn connections_are_taken_into_the_kernel_with_these_capabilities() {
    if !is_ready() {
        return;
    }
    let capabilities = capabilities();
    let words = confined(&capabilities.iter().map(String::as_str).collect::<Vec<_>>());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let command = AgentCommand::new(&at_once(&[])).wrapped(&words);
    let mut forwarding = Forwarding::start_with(&command, peer::echo).unwrap();
    // A port of those that not everyone may have, beside the other.
    forwarding.manifests.gateway(&[("a", 9001), ("low", 901)]).unwrap();
    forwarding.agent.wait_bound("default/gw/low");
    let streams = forwarding.connect_offloaded(3);
    // Another such agent takes them over.
    forwarding.agent.kill().unwrap();
    let before = ways_to_attach(&forwarding.agent);
    let command = command.succeeding(&forwarding.agent);
    forwarding.agent = command.start(&forwarding.topology.node, &forwarding.manifests.path()).unwrap();
    // It does so in the same way: another one would leave the programs of the former agent beside its own.
    wait_until("the programs are attached again", DEADLINE, || ways_to_attach(&forwarding.agent) == before);
    forwarding.agent.wait_pairs(3);
    for stream in &streams {
        client::ping(stream, b"still there").unwrap();
    }
}

/// The capabilities that the `DaemonSet` asks for which removes what agents have left.
fn capabilities_of_cleanup() -> Vec<String> {
    let text = fs::read_to_string(chart().join("../../kustomize/cleanup/cleanup.yaml")).expect("a file");
    let list = text.lines().find_map(|line| line.trim().strip_prefix("add: [")?.strip_suffix(']'));
    list.expect("capabilities").split(", ").map(str::to_owned).collect()
}

#[test]
fn cleanup_overlooks_nothing_with_the_capabilities_of_its_daemon_set() {
    if !is_ready() {
        return;
    }
    let mut forwarding =
        Forwarding::start_with(&AgentCommand::new(&at_once(&[])), peer::echo).expect("it works");
    let _streams = forwarding.connect_offloaded(1);
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    forwarding.agent.kill().expect("it runs");
    let cleanup = |capabilities: &[&str]| {
        let words = confined(capabilities);
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).arg(binary()).args(["cleanup", "--yes", "--pin-dir"]).arg(&pin_dir);
        forwarding.topology.node.output(&mut command).expect("cleanup")
    };
    let is_empty = || pin_dir.read_dir().map_or(true, |mut entries| entries.next().is_none());
    // Newer kernels let everybody look at what is pinned (`__sys_bpf`); there it is done. The older ones do not, and then nothing may be removed.
    let confined = cleanup(&["NET_ADMIN"]);
    if !confined.status.success() {
        assert!(String::from_utf8_lossy(&confined.stderr).contains("CAP_BPF"), "{confined:?}");
        assert!(!is_empty(), "the pins stay");
    }
    let capabilities = capabilities_of_cleanup();
    let done = cleanup(&capabilities.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(done.status.success(), "{done:?}");
    assert!(is_empty(), "{done:?}, after {confined:?}");
    let filters = forwarding
        .topology
        .node
        .output(Command::new("tc").args(["filter", "show", "dev", "veth1", "ingress"]));
    assert!(!String::from_utf8_lossy(&filters.expect("tc").stdout).contains("fwd_"), "no filter stays");
}
