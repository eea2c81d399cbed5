//! The command line on good and on bad input: it reports, and never crashes.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use forwarder_tests::agent::{DEADLINE, binary};
use forwarder_tests::fixture::Forwarding;
use forwarder_tests::{BackendRef, Manifests, client, manifests, peer, require_root, wait_for};
use serde_json::Value;

/// Runs the binary; it must end by itself and without a panic.
fn forwarder(arguments: &[&str], path: Option<&Path>) -> Output {
    let mut command = Command::new("timeout");
    command.arg("60").arg(binary()).args(arguments).args(path).stdin(Stdio::null());
    let output = command.output().expect("run the binary");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), None, "{arguments:?}: {}: {stderr}", output.status);
    // 101 is a panic's exit code, 124 and 137 are those of a time-out, 134 and 139 those of a crash.
    let code = output.status.code().expect("ended without a signal");
    assert!(![101, 124, 134, 137, 139].contains(&code), "{arguments:?}: {code}: {stderr}");
    assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
    output
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

/// Validates a folder: it must be found bad, and each of `words` must stand in the report, in both formats.
fn assert_reports(folder: &Path, words: &[&str]) {
    let output = forwarder(&["validate"], Some(folder));
    let report = text(&output);
    assert_ne!(output.status.code(), Some(0), "accepted: {report}");
    for word in words {
        assert!(report.contains(word), "no {word:?} in: {report}");
    }
    let output = forwarder(&["validate", "--output", "json"], Some(folder));
    assert_ne!(output.status.code(), Some(0));
    let json = serde_json::from_slice::<Value>(&output.stdout).expect("a report in JSON").to_string();
    for word in words {
        assert!(json.contains(word), "no {word:?} in: {json}");
    }
    // Explaining bad input works too: it shows what is left of it.
    forwarder(&["explain"], Some(folder));
}

fn good() -> Manifests {
    Manifests::forward(9001, &["10.0.2.2:3306".parse().expect("an address")]).expect("a folder")
}

#[test]
fn good_input_is_valid_and_explained() {
    let good = good();
    let output = forwarder(&["validate"], Some(&good.path()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let output = forwarder(&["validate", "--output", "json"], Some(&good.path()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    serde_json::from_slice::<Value>(&output.stdout).unwrap();
    let output = forwarder(&["explain"], Some(&good.path()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    let explained = text(&output);
    for word in ["9001", "default/a", "10.0.2.2:3306"] {
        assert!(explained.contains(word), "no {word:?} in: {explained}");
    }
}

#[test]
fn one_file_and_several_documents_in_it_are_input_too() {
    let good = good();
    let all: Vec<String> = fs::read_dir(good.path())
        .unwrap()
        .map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let file = manifests::file(&good.beside(""), "all.yaml", all.join("---\n")).unwrap();
    let output = forwarder(&["validate"], Some(&file));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}

#[test]
fn broken_yaml_is_reported_with_its_file_and_line() {
    let good = good();
    good.write("broken", "apiVersion: v1\nkind: Service\nmetadata: {name: [unclosed\n").unwrap();
    assert_reports(&good.path(), &["broken.yaml"]);
    good.write("broken", "{{ template }}\n").unwrap();
    assert_reports(&good.path(), &["broken.yaml"]);
    good.write("broken", "a: &a [*a]\n").unwrap();
    assert_reports(&good.path(), &["broken.yaml"]);
}

#[test]
fn a_wrong_type_is_reported_with_its_field() {
    let good = good();
    good.write(
        "bad",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: bad}\n\
         spec: {gatewayClassName: forwarder, listeners: [{name: x, port: many, protocol: TCP}]}\n",
    )
    .unwrap();
    assert_reports(&good.path(), &["bad.yaml", "spec.listeners[0].port"]);
}

#[test]
fn values_out_of_range_are_reported_with_object_and_field() {
    for port in ["0", "70000", "-1", "9223372036854775807"] {
        let good = good();
        good.write(
            "bad",
            &format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {{name: bad}}\n\
                 spec: {{gatewayClassName: forwarder, listeners: [{{name: x, port: {port}, protocol: TCP}}]}}\n"
            ),
        )
        .unwrap();
        assert_reports(&good.path(), &["bad.yaml", "bad", "spec.listeners[0].port"]);
    }
    for weight in ["-1", "1000001", "99999999999999999999"] {
        let good = good();
        good.write(
            "route-a",
            &format!(
                "apiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {{name: a}}\n\
                 spec: {{parentRefs: [{{name: gw}}], \
                 rules: [{{backendRefs: [{{name: a, port: 3306, weight: {weight}}}]}}]}}\n"
            ),
        )
        .unwrap();
        assert_reports(&good.path(), &["route-a.yaml", "spec.rules[0].backendRefs[0].weight"]);
    }
}

#[test]
fn unknown_enum_values_are_reported() {
    let good = good();
    good.write(
        "bad",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: bad}\n\
         spec: {gatewayClassName: forwarder, listeners: [{name: x, port: 9005, protocol: CARRIER-PIGEON}]}\n",
    )
    .unwrap();
    assert_reports(&good.path(), &["bad.yaml", "spec.listeners[0].protocol", "CARRIER-PIGEON"]);
}

#[test]
fn a_backend_that_does_not_exist_is_reported() {
    let good = good();
    good.route("a", &[BackendRef { service: "nowhere", weight: 1 }]).unwrap();
    assert_reports(&good.path(), &["route-a.yaml", "nowhere", "BackendNotFound"]);
    // The Service is there, its port is not.
    good.write(
        "route-a",
        "apiVersion: gateway.networking.k8s.io/v1\nkind: TCPRoute\nmetadata: {name: a}\n\
         spec: {parentRefs: [{name: gw}], rules: [{backendRefs: [{name: a, port: 1}]}]}\n",
    )
    .unwrap();
    assert_reports(&good.path(), &["route-a.yaml", "spec.rules[0].backendRefs[0]", "BackendNotFound"]);
}

#[test]
fn two_listeners_on_one_port_are_reported() {
    let good = good();
    good.gateway(&[("a", 9001), ("b", 9001)]).unwrap();
    assert_reports(&good.path(), &["gateway-gw.yaml", "spec.listeners", "9001"]);
}

#[test]
fn odd_files_are_reported_or_left_out() {
    let good = good();
    symlink(good.path().join("loop-b.yaml"), good.path().join("loop-a.yaml")).unwrap();
    symlink(good.path().join("loop-a.yaml"), good.path().join("loop-b.yaml")).unwrap();
    assert_reports(&good.path(), &["loop-a.yaml"]);
    for name in ["loop-a.yaml", "loop-b.yaml"] {
        fs::remove_file(good.path().join(name)).unwrap();
    }
    // A folder that contains itself: followed at most once.
    symlink(good.path(), good.path().join("self")).unwrap();
    forwarder(&["validate"], Some(&good.path()));
    fs::remove_file(good.path().join("self")).unwrap();

    manifests::file(&good.path(), "latin1.yaml", b"kind: Service # caf\xe9\n").unwrap();
    assert_reports(&good.path(), &["latin1.yaml"]);
    fs::remove_file(good.path().join("latin1.yaml")).unwrap();

    manifests::file(&good.path(), "large.yaml", vec![b'#'; 50 << 20]).unwrap();
    forwarder(&["validate"], Some(&good.path()));
    let entries = "- 0123456789\n".repeat((50 << 20) / 13);
    manifests::file(&good.path(), "large.yaml", entries).unwrap();
    assert_reports(&good.path(), &["large.yaml"]);
    fs::remove_file(good.path().join("large.yaml")).unwrap();

    let output = forwarder(&["validate"], Some(&good.path()));
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
}

#[test]
fn a_path_that_does_not_exist_and_wrong_usage_are_errors() {
    let good = good();
    let output = forwarder(&["validate"], Some(&good.beside("nothing-here")));
    assert_ne!(output.status.code(), Some(0));
    assert!(text(&output).contains("nothing-here"), "{}", text(&output));
    for arguments in [&["agent"][..], &["no-such-command"], &["validate"], &["agent", "--datapath", "warp"]] {
        assert_ne!(forwarder(arguments, None).status.code(), Some(0), "{arguments:?}");
    }
    assert_eq!(forwarder(&["--help"], None).status.code(), Some(0));
    assert_eq!(forwarder(&["--version"], None).status.code(), Some(0));
}

/// Runs the binary with an output that nobody reads.
fn unread(command: &mut Command) -> Output {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    command.stdin(Stdio::null()).stdout(writer).stderr(Stdio::piped());
    command.output().expect("run the binary")
}

#[test]
fn a_command_ends_silently_when_nobody_reads_what_it_prints() {
    const SIGPIPE: i32 = 13;
    let good = good();
    let folder = good.path();
    let folder = folder.to_str().unwrap();
    for arguments in [
        &["validate", folder][..],
        &["validate", "--output", "json", folder],
        &["explain", folder],
        &["probe"],
        &["completions", "bash"],
        &["--help"],
    ] {
        let output = unread(Command::new(binary()).args(arguments));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!stderr.contains("panicked") && !stderr.contains("pipe"), "{arguments:?}: {stderr}");
        // What clap prints by itself, it does not insist on.
        let ended = output.status.signal() == Some(SIGPIPE) || arguments == ["--help"];
        assert!(ended, "{arguments:?}: {}: {stderr}", output.status);
    }
}

#[test]
fn an_agent_goes_on_when_nobody_reads_its_log() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(binary());
    command.args(["agent", "--admin", "off", "--admin-socket", "off", "--datapath", "splice", "--manifests"]);
    command.arg(forwarding.manifests.path()).arg("--pin-dir").arg(forwarding.manifests.beside("pins"));
    command.stdin(Stdio::null()).stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut agent = forwarding.topology.backend2.spawn(&mut command).unwrap();
    let address = forwarding.topology.backend2_address(9001);
    let connected = wait_for(DEADLINE, || client::connect(&forwarding.topology.client, address).ok());
    let echoed = connected.map(|stream| client::ping(&stream, b"unread"));
    let status = agent.try_wait().unwrap();
    agent.kill().unwrap();
    agent.wait().unwrap();
    assert_eq!(status, None, "it has ended");
    echoed.expect("it listens").expect("it forwards");
}

#[test]
fn a_running_agent_is_explained() {
    if !require_root() {
        return;
    }
    let forwarding = Forwarding::start(&[], peer::echo).unwrap();
    for arguments in [&["explain"][..], &["explain", "--admin", forwarder_tests::agent::ADMIN]] {
        let mut command = forwarding.agent.command(arguments);
        let explained = forwarding.topology.node.stdout(&mut command).unwrap();
        for word in ["9001", "default/a", "10.0.2.2:5000"] {
            assert!(explained.contains(word), "no {word:?} in: {explained}");
        }
    }
}
