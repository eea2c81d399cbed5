//! Alerts and dashboard of the Helm chart: they speak of metrics that there are.

use std::collections::BTreeSet;
use std::fs;

use forwarder_tests::chart::{MONITORED, chart, objects, only, render, tool, workspace};
use forwarder_tests::kernel::{at_once, is_ready};
use forwarder_tests::{Forwarding, client, peer};
use serde_json::Value;

/// The names of metrics in a text.
fn metrics(text: &str) -> BTreeSet<&str> {
    let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
    let name = |(index, _)| {
        let rest: &str = &text[index..];
        let name = &rest[..rest.find(|c| !is_name(c)).unwrap_or(rest.len())];
        // Files and targets of logs have such names too.
        (name != "forwarder_agent").then_some(name)
    };
    text.match_indices("forwarder_").filter_map(name).collect()
}

#[test]
fn alerts_and_dashboard_name_metrics_that_there_are() {
    let source: String = ["metrics.rs", "metrics/cluster.rs"]
        .iter()
        .map(|file| fs::read_to_string(workspace().join("forwarder-agent/src").join(file)).unwrap())
        .collect();
    let known = metrics(&source);
    assert!(known.contains("forwarder_listener_up"));
    for file in ["files/alerts.yaml", "files/dashboard.json"] {
        let text = fs::read_to_string(chart().join(file)).unwrap();
        let named = metrics(&text);
        assert!(named.len() > 8, "{file}: {named:?}");
        for name in named {
            let is_known = ["", "_total", "_info"]
                .iter()
                .any(|suffix| name.strip_suffix(suffix).is_some_and(|name| known.contains(name)));
            assert!(is_known, "{file} names {name}, which no agent has");
        }
    }
}

#[test]
fn what_monitoring_reads_is_what_the_files_say() {
    let Some(helm) = tool("helm") else { return };
    let mut values = MONITORED.to_vec();
    values.push("--set=fullnameOverride=second");
    let objects = objects(&render(&helm, &values).unwrap()).unwrap();
    let files = fs::read_to_string(chart().join("files/alerts.yaml")).unwrap();
    let alerts = files.replace("=\"forwarder\"", "=\"second\"");
    let alerts: Value = serde_saphyr::from_str(&alerts).unwrap();
    assert_eq!(only(&objects, "PrometheusRule")["spec"], alerts);
    let dashboard = only(&objects, "ConfigMap")["data"]["forwarder.json"].as_str().unwrap();
    let dashboard: Value = serde_json::from_str(dashboard).unwrap();
    assert_eq!(dashboard["title"], "forwarder");
    let service = only(&objects, "Service");
    assert_eq!(service["spec"]["ports"][0]["port"], 9902);
    let monitor = only(&objects, "ServiceMonitor");
    assert_eq!(monitor["spec"]["endpoints"][0]["port"], service["spec"]["ports"][0]["name"]);
}

#[test]
fn alerts_and_dashboard_name_metrics_of_a_running_agent() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&at_once(&[]), peer::echo).unwrap();
    let stream = forwarding.connect().unwrap();
    client::ping(&stream, b"hello").unwrap();
    let metrics_of_agent = forwarding.agent.metrics().unwrap();
    for file in ["files/alerts.yaml", "files/dashboard.json"] {
        let text = fs::read_to_string(chart().join(file)).unwrap();
        // An agent has these only with tier sockmap, in a cluster, and with problems.
        let is_elsewhere = |name: &str| {
            name.starts_with("forwarder_sockmap_")
                || name.starts_with("forwarder_kube_")
                || name == "forwarder_problems"
        };
        let named = metrics(&text).into_iter().filter(|name| !is_elsewhere(name));
        for name in named {
            assert!(metrics_of_agent.has(name), "{file} names {name}, which this agent does not show");
        }
    }
}
