//! The metrics of an agent that reads a Kubernetes API.

use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;

use super::{counter, gauge};
use crate::state::ClusterHealth;

pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, cluster: &ClusterHealth) -> fmt::Result {
    let mut served = encoder.encode_descriptor(
        "forwarder_kube_kind_served",
        "Whether the Kubernetes API serves a kind of the Gateway API, and in which version it is read",
        None,
        MetricType::Gauge,
    )?;
    for (kind, version) in cluster.source.served() {
        let labels = [("kind", kind.as_str()), ("version", version.as_deref().unwrap_or_default())];
        gauge(&mut served, labels, u64::from(version.is_some()))?;
    }
    let mut failures = encoder.encode_descriptor(
        "forwarder_kube_watch_failures",
        "Requests for objects that the Kubernetes API did not answer as it should, by kind",
        None,
        MetricType::Counter,
    )?;
    for (kind, count) in cluster.source.failures() {
        counter(&mut failures, [("kind", kind.as_str())], count)?;
    }
    let mut stale = encoder.encode_descriptor(
        "forwarder_kube_state_stale",
        "Whether the state that a former agent kept is in force because the Kubernetes API has not answered yet",
        None,
        MetricType::Gauge,
    )?;
    gauge(&mut stale, [], u64::from(cluster.source.is_stale()))?;
    let mut leader = encoder.encode_descriptor(
        "forwarder_kube_leader",
        "Whether this agent is the one that writes statuses",
        None,
        MetricType::Gauge,
    )?;
    gauge(&mut leader, [], u64::from(cluster.publish.is_leader()))?;
    let mut writes = encoder.encode_descriptor(
        "forwarder_kube_status_writes",
        "Attempts to write the status of an object, by result",
        None,
        MetricType::Counter,
    )?;
    for (kind, result, count) in cluster.publish.writes() {
        counter(&mut writes, [("kind", kind.as_str()), ("result", result.as_str())], count)?;
    }
    Ok(())
}
