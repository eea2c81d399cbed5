//! What is measured. A [`Figure`] is measured on every path in turn and yields one or more readings.

pub(crate) mod change;
mod connections;
mod latency;
mod memory;
mod packets;
mod requests;
pub(crate) mod resolve;
mod throughput;

use std::fmt;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use forwarder_tests::process::Process;
use forwarder_tests::{NetNs, Topology, wait_for};
use serde::Serialize;
use tempfile::TempDir;

use crate::path::{ENDPOINT_PORT, Running};

/// Every metric, in the order of the report.
pub(crate) const METRICS: [&str; 8] =
    ["throughput", "latency", "connections", "requests", "packets", "memory", "change", "resolve"];

const DEADLINE: Duration = Duration::from_secs(10);

/// What one turn measures.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Figure {
    Throughput { streams: u32 },
    Latency,
    Connections,
    Requests { connections: u32 },
    Packets,
    Memory,
}

/// Every figure, in the order of the report.
pub(crate) const FIGURES: [Figure; 9] = [
    Figure::Throughput { streams: 1 },
    Figure::Throughput { streams: 4 },
    Figure::Throughput { streams: 32 },
    Figure::Latency,
    Figure::Connections,
    Figure::Requests { connections: 50 },
    Figure::Requests { connections: 1000 },
    Figure::Packets,
    Figure::Memory,
];

impl Figure {
    pub(crate) fn metric(self) -> &'static str {
        match self {
            Self::Throughput { .. } => "throughput",
            Self::Latency => "latency",
            Self::Connections => "connections",
            Self::Requests { .. } => "requests",
            Self::Packets => "packets",
            Self::Memory => "memory",
        }
    }

    /// Whether the figure yields readings of `series`.
    pub(crate) fn yields(self, series: &Series) -> bool {
        let (streams, connections) = match self {
            Self::Throughput { streams } => (Some(streams), None),
            Self::Requests { connections } => (None, Some(connections)),
            // The number of connections held is a result.
            Self::Memory => (None, series.connections),
            Self::Latency | Self::Connections | Self::Packets => (None, None),
        };
        self.metric() == series.metric && (streams, connections) == (series.streams, series.connections)
    }

    /// Starts the server that the figure needs behind the path.
    pub(crate) fn serve(self, topology: &Topology) -> Result<Server> {
        let address = topology.backend1_address(ENDPOINT_PORT);
        let mut command = match self {
            Self::Throughput { .. } => throughput::server(address),
            Self::Latency => latency::server(address),
            Self::Connections | Self::Requests { .. } | Self::Packets | Self::Memory => responder(address)?,
        };
        Server::start(&topology.backend1, address, &mut command)
    }

    /// Measures once.
    pub(crate) fn measure(self, turn: &Turn<'_>) -> Result<Vec<Reading>> {
        match self {
            Self::Throughput { streams } => throughput::measure(turn, streams),
            Self::Latency => latency::measure(turn),
            Self::Connections => connections::measure(turn),
            Self::Requests { connections } => requests::measure(turn, connections),
            Self::Packets => packets::measure(turn),
            Self::Memory => memory::measure(turn),
        }
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.metric())?;
        match self {
            Self::Throughput { streams } => write!(formatter, " of {streams} streams"),
            Self::Requests { connections } => write!(formatter, " over {connections} connections"),
            Self::Latency | Self::Connections | Self::Packets | Self::Memory => Ok(()),
        }
    }
}

/// The surroundings of one measurement.
pub(crate) struct Turn<'a> {
    pub(crate) topology: &'a Topology,
    pub(crate) running: &'a Running,
    /// How long to measure.
    pub(crate) seconds: u32,
}

impl Turn<'_> {
    pub(crate) fn target(&self) -> SocketAddr {
        self.running.target
    }

    /// Runs a measuring program as a client and yields what it printed. It is ended when it takes much longer than told.
    pub(crate) fn client(&self, command: &mut Command) -> Result<String> {
        let limit = DEADLINE + Duration::from_secs(self.seconds.into());
        let folder = TempDir::with_prefix("forwarder-bench-client-")?;
        let mut process = Process::start(&self.topology.client, command, &folder.path().join("log"))?;
        match process.wait(limit) {
            Some(status) if status.success() => Ok(process.log()),
            Some(status) => bail!("{command:?}: {status}: {}", process.log().trim()),
            None => bail!("{command:?} did not end within {limit:?}: {}", process.log().trim()),
        }
    }
}

/// One measured number.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Reading {
    pub(crate) series: Series,
    pub(crate) value: f64,
    /// Processor time of the whole machine, in the unit that the metric names.
    pub(crate) cost: Option<f64>,
}

/// What readings have in common that can be compared.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Series {
    pub(crate) metric: &'static str,
    /// What is measured, where a metric has several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) quantity: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) streams: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) connections: Option<u32>,
    /// The number of manifests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) objects: Option<u32>,
    pub(crate) unit: &'static str,
}

impl Series {
    pub(crate) fn new(metric: &'static str, unit: &'static str) -> Self {
        Self { metric, quantity: None, streams: None, connections: None, objects: None, unit }
    }

    /// Which way is better, in words.
    pub(crate) fn better(&self) -> &'static str {
        match self.metric {
            "throughput" | "connections" | "requests" | "packets" => "more is better",
            _ => "less is better",
        }
    }

    /// What the metric's processor time is counted by.
    pub(crate) fn cost_unit(&self) -> &'static str {
        match self.metric {
            "throughput" => "s/Gbit",
            "connections" => "us/conn",
            "packets" => "us/packet",
            _ => "us/req",
        }
    }
}

impl fmt::Display for Series {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.metric)?;
        if let Some(quantity) = &self.quantity {
            write!(formatter, ", {quantity}")?;
        }
        for (number, what) in
            [(self.streams, "stream"), (self.connections, "connection"), (self.objects, "manifest")]
        {
            match number {
                Some(1) => write!(formatter, ", 1 {what}")?,
                Some(number) => write!(formatter, ", {number} {what}s")?,
                None => {}
            }
        }
        write!(formatter, " [{}]", self.unit)
    }
}

/// A server behind a path, ended when dropped.
pub(crate) struct Server {
    process: Process,
    _folder: TempDir,
}

impl Server {
    /// Starts `command` and waits until it listens on `address`.
    fn start(host: &NetNs, address: SocketAddr, command: &mut Command) -> Result<Self> {
        let folder = TempDir::with_prefix("forwarder-bench-server-")?;
        let process = Process::start(host, command, &folder.path().join("log"))?;
        let server = Self { process, _folder: folder };
        if wait_for(DEADLINE, || (!host.listening_inodes(address.port()).is_empty()).then_some(())).is_none()
        {
            bail!("{command:?} does not listen after {DEADLINE:?}: {}", server.process.log().trim());
        }
        Ok(server)
    }
}

/// This very program as the server of [`crate::responder`].
fn responder(address: SocketAddr) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command.arg("responder").arg(address.to_string());
    Ok(command)
}
