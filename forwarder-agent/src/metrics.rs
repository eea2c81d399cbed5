//! The metrics of an agent, in the OpenMetrics text format: read from live counters at each scrape.

mod cluster;

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::state::{AdminHealth, AgentState};
use forwarder_dataplane::counters::{
    BackendCounters, ConnectFailure, Counter, End, ListenerCounters, PerWorker, WorkerCounters,
};
use forwarder_dataplane::reconciler::{InForce, SocketState};
use forwarder_dataplane::relay::{Fallback, Tier};
use forwarder_gateway::model::Xdp;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_runtime::lock::lock;

/// A registry that yields all metrics of an agent.
pub fn registry(shared: Arc<AgentState>) -> Registry {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(AgentCollector(shared)));
    registry
}

struct AgentCollector(Arc<AgentState>);

impl fmt::Debug for AgentCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AgentCollector")
    }
}

type Labels<'a, const N: usize> = [(&'static str, &'a str); N];

fn counter<const N: usize>(
    encoder: &mut MetricEncoder<'_>,
    labels: Labels<'_, N>,
    value: u64,
) -> fmt::Result {
    encoder.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)
}

fn gauge<const N: usize>(encoder: &mut MetricEncoder<'_>, labels: Labels<'_, N>, value: u64) -> fmt::Result {
    encoder.encode_family(&labels)?.encode_gauge(&value)
}

impl Collector for AgentCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let shared = &self.0;
        let mut info = encoder.encode_descriptor(
            "forwarder_build",
            "The version of the agent",
            None,
            MetricType::Info,
        )?;
        info.encode_info(&[("version", env!("CARGO_PKG_VERSION"))])?;

        let in_force = lock(&shared.in_force);
        let listeners = Listeners::of(&in_force);
        listeners.encode(&mut encoder)?;
        listeners.encode_kernel(&mut encoder, &in_force)?;
        encode_backends(&mut encoder, &in_force)?;
        drop(in_force);
        encode_workers(&mut encoder, shared)?;
        encode_admin(&mut encoder, &shared.admin)?;
        if let Some(cluster) = &shared.cluster {
            cluster::encode(&mut encoder, cluster)?;
        }
        encode_control(&mut encoder, shared)
    }
}

/// One listener, with the text of its labels.
struct Row<'a> {
    name: String,
    address: String,
    route: String,
    socket: &'a SocketState,
}

struct Listeners<'a>(Vec<Row<'a>>);

impl<'a> Listeners<'a> {
    fn of(in_force: &'a InForce) -> Self {
        Self(
            in_force
                .table
                .listeners
                .iter()
                .filter_map(|(key, listener)| {
                    Some(Row {
                        name: listener.name.to_string(),
                        address: key.to_string(),
                        route: listener
                            .route
                            .as_ref()
                            .map(|route| route.name.to_string())
                            .unwrap_or_default(),
                        socket: in_force.sockets.get(key)?,
                    })
                })
                .collect(),
        )
    }

    fn bound(&self) -> impl Iterator<Item = (Labels<'_, 2>, &'a PerWorker<ListenerCounters>)> {
        self.0.iter().filter_map(|row| match row.socket {
            SocketState::Bound(bound) => {
                Some(([("listener", row.name.as_str()), ("address", &row.address)], &bound.counters))
            }
            SocketState::Failed(_) => None,
        })
    }

    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut up = encoder.encode_descriptor(
            "forwarder_listener_up",
            "Whether the listener's port is open",
            None,
            MetricType::Gauge,
        )?;
        for row in &self.0 {
            let labels = [("listener", row.name.as_str()), ("address", &row.address), ("route", &row.route)];
            gauge(&mut up, labels, u64::from(matches!(row.socket, SocketState::Bound(_))))?;
        }
        let mut accepted = encoder.encode_descriptor(
            "forwarder_connections",
            "Connections accepted",
            None,
            MetricType::Counter,
        )?;
        for (labels, counters) in self.bound() {
            counter(&mut accepted, labels, counters.sum(|own| own.accepted.get()))?;
        }
        let mut active = encoder.encode_descriptor(
            "forwarder_connections_active",
            "Connections that are open",
            None,
            MetricType::Gauge,
        )?;
        for (labels, counters) in self.bound() {
            gauge(&mut active, labels, counters.active())?;
        }
        let mut ended = encoder.encode_descriptor(
            "forwarder_connections_ended",
            "Connections that ended, by close reason",
            None,
            MetricType::Counter,
        )?;
        for ([listener, address], counters) in self.bound() {
            for end in End::ALL {
                let value = counters.sum(|own| own.ended[end as usize].get());
                counter(&mut ended, [listener, address, ("end", end.as_str())], value)?;
            }
        }
        self.encode_bytes(
            encoder,
            "forwarder_received_bytes",
            "Bytes passed on from clients to endpoints, by the tier that moved them",
            |counters| &counters.received_bytes,
        )?;
        self.encode_bytes(
            encoder,
            "forwarder_sent_bytes",
            "Bytes passed on from endpoints to clients, by the tier that moved them",
            |counters| &counters.sent_bytes,
        )
    }

    fn encode_bytes(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        name: &str,
        help: &str,
        field: impl Fn(&ListenerCounters) -> &[Counter; Tier::ALL.len()],
    ) -> fmt::Result {
        let mut bytes = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for ([listener, address], counters) in self.bound() {
            for tier in Tier::ALL {
                let value = counters.sum(|own| field(own)[tier as usize].get());
                counter(&mut bytes, [listener, address, ("tier", tier.as_str())], value)?;
            }
        }
        Ok(())
    }

    /// What the ingress programs counted.
    fn encode_kernel(&self, encoder: &mut DescriptorEncoder<'_>, in_force: &InForce) -> fmt::Result {
        let Some(datapath) = &in_force.datapath else { return Ok(()) };
        let counted: Vec<_> = self
            .0
            .iter()
            .filter_map(|row| match row.socket {
                SocketState::Bound(bound) => {
                    let labels = [("listener", row.name.as_str()), ("address", &row.address)];
                    Some((labels, datapath.counters(bound.id).ok()?))
                }
                SocketState::Failed(_) => None,
            })
            .collect();
        for (name, help, field) in [
            ("forwarder_ingress_syns", "Connection attempts that arrived, retransmitted ones included", 0),
            ("forwarder_ingress_packets", "TCP packets that arrived; a GRO super-packet counts once", 1),
            ("forwarder_ingress_bytes", "Bytes of these packets from the IP header on", 2),
            ("forwarder_ingress_denied", "Connection attempts dropped because the client is not let in", 3),
            (
                "forwarder_ingress_limited",
                "Connection attempts dropped because the client opens more in a second than it may",
                4,
            ),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, counters) in &counted {
                let value = match field {
                    0 => counters.syns,
                    1 => counters.packets,
                    2 => counters.bytes,
                    3 => counters.denied,
                    _ => counters.limited,
                };
                counter(&mut metric, *labels, value)?;
            }
        }
        let mut verdicts = encoder.encode_descriptor(
            "forwarder_ingress_verdicts",
            "Packets that the eBPF programs saw, by what became of them",
            None,
            MetricType::Counter,
        )?;
        for (verdict, count) in datapath.verdicts().unwrap_or_default() {
            counter(&mut verdicts, [("verdict", verdict.as_str())], count)?;
        }
        let mut at_xdp = encoder.encode_descriptor(
            "forwarder_xdp_interfaces",
            "Interfaces on which a program hangs at XDP",
            None,
            MetricType::Gauge,
        )?;
        let attachments = datapath.attachments();
        for mode in [Xdp::Drop, Xdp::Native] {
            let count = attachments.iter().filter(|one| one.xdp == Some(mode)).count();
            gauge(&mut at_xdp, [("mode", mode.as_str())], count as u64)?;
        }
        let mut restored = encoder.encode_descriptor(
            "forwarder_attachments_restored",
            "Times that programs were attached again because somebody had removed them from an interface",
            None,
            MetricType::Counter,
        )?;
        counter(&mut restored, [], datapath.restored())?;
        Ok(())
    }
}

fn encode_backends(encoder: &mut DescriptorEncoder<'_>, in_force: &InForce) -> fmt::Result {
    let backends: Vec<_> = in_force
        .upstreams
        .values()
        .map(|upstream| {
            (upstream.key.to_string(), upstream.endpoints.load().eligible().len() as u64, &upstream.counters)
        })
        .collect();
    let mut endpoints = encoder.encode_descriptor(
        "forwarder_backend_endpoints",
        "Endpoints that take new connections",
        None,
        MetricType::Gauge,
    )?;
    for (name, count, _) in &backends {
        gauge(&mut endpoints, [("backend", name)], *count)?;
    }
    let mut active = encoder.encode_descriptor(
        "forwarder_backend_connections_active",
        "Connections to endpoints that are open",
        None,
        MetricType::Gauge,
    )?;
    for (name, _, counters) in &backends {
        let ended = counters.sum(|own| own.ended.get());
        let connected = counters.sum(|own| own.connected.get());
        gauge(&mut active, [("backend", name)], connected.saturating_sub(ended))?;
    }
    let mut totals = |name: &str, help: &str, field: fn(&BackendCounters) -> u64| {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        backends.iter().try_for_each(|(backend, _, counters)| {
            counter(&mut metric, [("backend", backend)], counters.sum(field))
        })
    };
    totals("forwarder_backend_connections", "Connections established to endpoints", |own| {
        own.connected.get()
    })?;
    totals(
        "forwarder_backend_shared_source_ports",
        "Connections to endpoints from a local port that any process of the node may be given once the connection is offloaded: its own connection to the same endpoint then times out",
        |own| own.shared_ports.get(),
    )?;
    totals("forwarder_backend_received_bytes", "Bytes passed on to endpoints", |own| {
        own.received_bytes.get()
    })?;
    totals("forwarder_backend_sent_bytes", "Bytes passed on from endpoints", |own| own.sent_bytes.get())?;
    let mut failures = encoder.encode_descriptor(
        "forwarder_backend_connect_failures",
        "Attempts to connect to an endpoint that failed; another endpoint may have served the client",
        None,
        MetricType::Counter,
    )?;
    for (name, _, counters) in &backends {
        for failure in ConnectFailure::ALL {
            let value = counters.sum(|own| own.failures[failure as usize].get());
            counter(&mut failures, [("backend", name), ("reason", failure.as_str())], value)?;
        }
    }
    Ok(())
}

fn encode_workers(encoder: &mut DescriptorEncoder<'_>, shared: &AgentState) -> fmt::Result {
    let counters = &shared.worker_counters;
    let mut fallbacks = encoder.encode_descriptor(
        "forwarder_tier_fallbacks",
        "Times that a connection was not moved by the tier that was wanted, by reason",
        None,
        MetricType::Counter,
    )?;
    for fallback in Fallback::ALL {
        let value = counters.sum(|own| own.fallbacks[fallback as usize].get());
        counter(&mut fallbacks, [("reason", fallback.as_str())], value)?;
    }
    for fallback_reason in FallbackReason::ALL {
        let value = counters.sum(|own| own.fallback_reasons[fallback_reason as usize].get());
        counter(&mut fallbacks, [("reason", fallback_reason.as_str())], value)?;
    }
    encode_offloads(encoder, shared)?;
    let mut pauses = encoder.encode_descriptor(
        "forwarder_accept_pauses",
        "Times that accepting paused for lack of file descriptors or memory",
        None,
        MetricType::Counter,
    )?;
    counter(&mut pauses, [], counters.sum(|own| own.accept_pauses.get()))?;
    let mut handed_over = encoder.encode_descriptor(
        "forwarder_connections_handed_over",
        "Connections that a worker handed to a less busy one",
        None,
        MetricType::Counter,
    )?;
    counter(&mut handed_over, [], counters.sum(|own| own.handed_over.get()))
}

fn encode_offloads(encoder: &mut DescriptorEncoder<'_>, shared: &AgentState) -> fmt::Result {
    let counters = &shared.worker_counters;
    for (name, help, field) in [
        (
            "forwarder_offloads",
            "Connections offloaded",
            (|own| own.offloaded.get()) as fn(&WorkerCounters) -> u64,
        ),
        (
            "forwarder_offloads_taken_back",
            "Connections taken back from the kernel because redirected packets did not arrive",
            |own| own.taken_back.get(),
        ),
        ("forwarder_pairs_inherited", "Offloaded connections taken over from a former agent", |own| {
            own.inherited.get()
        }),
    ] {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter(&mut metric, [], counters.sum(field))?;
    }
    if let Some(pairs) = &shared.connections.pairs {
        let mut metric = encoder.encode_descriptor(
            "forwarder_pairs",
            "Connections that the kernel forwards, those that have just ended included",
            None,
            MetricType::Gauge,
        )?;
        gauge(&mut metric, [], pairs.count() as u64)?;
        let mut metric = encoder.encode_descriptor(
            "forwarder_probes_suppressed",
            "Probes of offloaded connections that were put off because there were too many",
            None,
            MetricType::Counter,
        )?;
        counter(&mut metric, [], pairs.suppressed_probes())?;
    }
    encode_sockmap(encoder, shared)
}

fn encode_sockmap(encoder: &mut DescriptorEncoder<'_>, shared: &AgentState) -> fmt::Result {
    let mut up = encoder.encode_descriptor(
        "forwarder_tier_on",
        "Whether a tier takes new connections: 0 after an operator has switched it off",
        None,
        MetricType::Gauge,
    )?;
    for tier in [Tier::Direct, Tier::Tc, Tier::Sockmap] {
        gauge(&mut up, [("tier", tier.as_str())], u64::from(shared.toggles.is_on(tier)))?;
    }
    let Some(pairs) = shared.connections.sockmap() else { return Ok(()) };
    for (name, help, value) in [
        ("forwarder_sockmap_pairs", "Connections at tier sockmap", pairs.count() as u64),
        (
            "forwarder_sockmap_reserved_bytes",
            "Memory that the kernel may hold for these connections",
            pairs.reserved_memory(),
        ),
    ] {
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        gauge(&mut metric, [], value)?;
    }
    let mut stalled = encoder.encode_descriptor(
        "forwarder_sockmap_stalled",
        "Connections at tier sockmap that were reset because bytes did not arrive",
        None,
        MetricType::Counter,
    )?;
    counter(&mut stalled, [], pairs.stalled())?;
    let mut verdicts = encoder.encode_descriptor(
        "forwarder_sockmap_verdicts",
        "Segments that these sockets received, by what became of them",
        None,
        MetricType::Counter,
    )?;
    for (verdict, count) in pairs.sockmap().verdicts().unwrap_or_default() {
        counter(&mut verdicts, [("verdict", verdict.as_str())], count)?;
    }
    Ok(())
}

fn encode_admin(encoder: &mut DescriptorEncoder<'_>, admin: &AdminHealth) -> fmt::Result {
    let mut up = encoder.encode_descriptor(
        "forwarder_admin_up",
        "Whether the admin endpoint is open, by tcp and by socket",
        None,
        MetricType::Gauge,
    )?;
    for (by, is_up) in admin.ways() {
        gauge(&mut up, [("by", by.as_str())], u64::from(is_up))?;
    }
    Ok(())
}

fn encode_control(encoder: &mut DescriptorEncoder<'_>, shared: &AgentState) -> fmt::Result {
    let report = lock(&shared.report);
    let mut problems = encoder.encode_descriptor(
        "forwarder_problems",
        "Problems at present; severity error: something that was asked for is not served",
        None,
        MetricType::Gauge,
    )?;
    let mut by_kind = std::collections::BTreeMap::new();
    for problem in report.problems() {
        *by_kind.entry((problem.severity, problem.reason)).or_insert(0) += 1;
    }
    for ((severity, reason), count) in by_kind {
        gauge(&mut problems, [("severity", severity.as_str()), ("reason", reason.as_str())], count)?;
    }
    let mut updates = encoder.encode_descriptor(
        "forwarder_configuration_updates",
        "Times that the input was put into force: in full, or its endpoints only because nothing else had changed",
        None,
        MetricType::Counter,
    )?;
    for (kind, count) in [("full", report.updates.full), ("endpoints", report.updates.endpoints)] {
        counter(&mut updates, [("kind", kind)], count)?;
    }
    let mut programs = encoder.encode_descriptor(
        "forwarder_programs_up",
        "Whether the eBPF programs are loaded",
        None,
        MetricType::Gauge,
    )?;
    gauge(&mut programs, [], u64::from(report.datapath.programs))
}
