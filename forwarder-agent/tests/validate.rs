//! What `forwarder validate` says of each mistake, word for word, and its exit code: `tests/validate/NAME.out`. `UPDATE_EXPECT=1`
//! rewrites them.
//!
//! Each row is a mistake in the manifests of two databases, `tests/validate/*.yaml`.

#![expect(clippy::unwrap_used, reason = "helpers of tests are tests")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

use tempfile::TempDir;

const FILES: [&str; 3] = ["gw.yaml", "orders.yaml", "users.yaml"];

/// A mistake: in which file, what stands there instead of what. An empty text is the whole file.
struct Row {
    name: &'static str,
    file: &'static str,
    changes: &'static [(&'static str, &'static str)],
}

const fn row(
    name: &'static str,
    file: &'static str,
    changes: &'static [(&'static str, &'static str)],
) -> Row {
    Row { name, file, changes }
}

const ORDERS: &str = "  - name: orders\n    port: 3307\n";

const ROWS: [Row; 31] = [
    row("no-mistake", "gw.yaml", &[]),
    row("field-of-a-reference", "orders.yaml", &[("sectionName", "sectionname")]),
    row(
        "fields-elsewhere",
        "orders.yaml",
        &[("weight", "wieght"), ("{ready", "{raedy"), ("- addresses", "- adresses")],
    ),
    row("controller", "gw.yaml", &[("forwarder.dev/tcp", "forwarder.dev/tpc")]),
    row("kind-of-a-route", "orders.yaml", &[("TCPRoute", "TcpRoute")]),
    row("kind-of-a-gateway", "gw.yaml", &[("kind: Gateway\n", "kind: Gatway\n")]),
    row("listener-without-route", "orders.yaml", &[("", "# not yet\n")]),
    row("port-that-is-a-text", "gw.yaml", &[("port: 3307", "port: \"3307\"")]),
    row("port-out-of-range", "gw.yaml", &[("port: 3307", "port: 70000")]),
    row("listeners-of-one-name", "gw.yaml", &[("name: users", "name: orders")]),
    row("field-of-a-listener", "gw.yaml", &[("    port: 3307", "    prot: 3307")]),
    row("name-of-a-listener", "gw.yaml", &[("- name: orders", "- nmae: orders")]),
    row("every-listener", "gw.yaml", &[("port: 3307", "port: \"3307\""), ("port: 3308", "port: 70000")]),
    row("gateway", "gw.yaml", &[("gatewayClassName", "gatewayclassName")]),
    row("class", "gw.yaml", &[("controllerName: forwarder.dev/tcp", "controllerName: tcp")]),
    row("service", "orders.yaml", &[("    port: 3306\n---", "    port: mysql\n---")]),
    row("host-name-as-an-endpoint", "orders.yaml", &[("192.0.2.2", "orders.example.com")]),
    row("name-of-an-endpoint-port", "orders.yaml", &[("- name: mysql\n  port", "- name: sql\n  port")]),
    row(
        "slice-without-label",
        "orders.yaml",
        &[("  labels: {kubernetes.io/service-name: orders-mysql}\n", "")],
    ),
    row(
        "protocol-in-other-letters",
        "gw.yaml",
        &[("port: 3307\n    protocol: TCP", "port: 3307\n    protocol: tcp")],
    ),
    row("missing-service", "orders.yaml", &[("    - name: orders-mysql", "    - name: order-mysql")]),
    row("missing-listener", "orders.yaml", &[("sectionName: orders", "sectionName: order")]),
    row("listeners-on-one-port", "gw.yaml", &[("port: 3308", "port: 3307")]),
    row(
        "object-twice",
        "users.yaml",
        &[("TCPRoute\nmetadata: {name: users", "TCPRoute\nmetadata: {name: orders")],
    ),
    row("tab", "gw.yaml", &[("    port: 3307", "\tport: 3307")]),
    row(
        "route-of-another-namespace",
        "orders.yaml",
        &[("name: orders, namespace: data", "name: orders, namespace: shop")],
    ),
    row("port-of-a-service", "orders.yaml", &[("      port: 3306", "      port: 3307")]),
    row("name-of-a-class", "gw.yaml", &[("gatewayClassName: tcp", "gatewayClassName: tpc")]),
    row(
        "control-characters",
        "orders.yaml",
        &[(
            "kind: Service\nmetadata: {name: orders-mysql",
            "kind: Service\nmetadata: {name: \"orders\\e[2Jmysql\"",
        )],
    ),
    row(
        "fields-without-effect",
        "orders.yaml",
        &[(
            "  ports:\n  - name",
            "  sessionAffinity: ClientIP\n  loadBalancerSourceRanges: [192.0.2.0/24]\n  ports:\n  - name",
        )],
    ),
    row(
        "listener-added",
        "gw.yaml",
        &[(
            ORDERS,
            "  - name: more\n    port: 3309\n    protocol: TCP\n    hostnme: a\n  - name: orders\n    port: 3307\n",
        )],
    ),
];

fn base() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/validate")
}

/// What `forwarder validate` prints of a path in `folder`, and its exit code.
fn validate(folder: &TempDir, path: &str) -> String {
    let forwarder = env::var_os("FORWARDER_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_forwarder").into());
    let output = Command::new(forwarder).args(["validate", path]).current_dir(folder).output().unwrap();
    let mut text = String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap();
    writeln!(text, "exit code {}", output.status.code().unwrap()).unwrap();
    text
}

fn check(name: &str, text: &str) {
    expect_test::expect_file![base().join(format!("{name}.out"))].assert_eq(text);
}

#[test]
fn each_mistake_is_told_at_its_cause() {
    for Row { name, file, changes } in ROWS {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("m")).unwrap();
        for one in FILES {
            let mut text = fs::read_to_string(base().join(one)).unwrap();
            for (from, to) in changes.iter().filter(|_| one == file) {
                assert!(text.contains(from), "{name}: no {from:?} in {file}");
                text = if from.is_empty() { (*to).to_owned() } else { text.replacen(from, to, 1) };
            }
            fs::write(folder.path().join("m").join(one), text).unwrap();
        }
        check(name, &validate(&folder, "m"));
    }
}

#[test]
fn nothing_to_serve_is_told() {
    let folder = TempDir::new().unwrap();
    fs::create_dir(folder.path().join("m")).unwrap();
    check("empty-folder", &validate(&folder, "m"));
    for (name, text) in [("empty-file", ""), ("comment-only", "# nothing\n---\n")] {
        fs::write(folder.path().join("gw.yaml"), text).unwrap();
        check(name, &validate(&folder, "gw.yaml"));
    }
    check("no-such-path", &validate(&folder, "none"));
}
