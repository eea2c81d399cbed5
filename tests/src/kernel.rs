//! Connections that the kernel forwards by itself, as tests see them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::agent::{Agent, DEADLINE};
use crate::database::require_program;
use crate::fixture::Forwarding;
use crate::netns::{Topology, require_root};
use crate::{AgentCommand, client, process, wait_until};

/// The settings that take every connection into the kernel at once.
pub const AT_ONCE: [&str; 4] = ["--datapath", "tc", "--offload-after", "0B"];

/// These settings, and more.
pub fn at_once<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&AT_ONCE[..], more].concat()
}

/// Whether tests of offloaded connections can run here; says if not.
pub fn is_ready() -> bool {
    require_root() && require_program("bpftool")
}

impl Agent {
    /// The sum of a metric, whatever its labels.
    pub fn metric(&self, name: &str) -> i64 {
        self.metrics().expect("metrics").sum(name, &[])
    }

    /// How many connections the kernel forwards, those that have just ended included.
    pub fn pairs(&self) -> i64 {
        self.metric("forwarder_pairs")
    }

    /// How often a connection was not offloaded for `reason`.
    pub fn fallbacks(&self, reason: &str) -> i64 {
        self.metrics().expect("metrics").sum("forwarder_tier_fallbacks_total", &[("reason", reason)])
    }

    /// On how many interfaces a program hangs at XDP, in a mode.
    pub fn at_xdp(&self, mode: &str) -> i64 {
        self.metrics().expect("metrics").sum("forwarder_xdp_interfaces", &[("mode", mode)])
    }

    /// How many packets the ingress programs gave a verdict.
    pub fn verdicts(&self, verdict: &str) -> i64 {
        self.metrics().expect("metrics").sum("forwarder_ingress_verdicts_total", &[("verdict", verdict)])
    }

    /// How many attempts to connect to an endpoint failed for `reason`.
    pub fn connect_failures(&self, reason: &str) -> i64 {
        self.metrics()
            .expect("metrics")
            .sum("forwarder_backend_connect_failures_total", &[("reason", reason)])
    }

    /// How many connections have ended by `end`.
    pub fn ended(&self, end: &str) -> i64 {
        self.metrics().expect("metrics").sum("forwarder_connections_ended_total", &[("end", end)])
    }

    /// Waits until so many connections have ended by `end`: their ends may hear of it before it is counted.
    #[track_caller]
    pub fn wait_ended(&self, end: &str, count: i64) {
        wait_until(&format!("{count} connections have ended by {end}"), DEADLINE, || {
            self.ended(end) == count
        });
    }

    /// The downstream addresses of the connections that are listed at tier `tc`.
    pub fn offloaded(&self) -> Vec<SocketAddr> {
        let connections = self.connections("").expect("a list");
        let offloaded = connections.iter().filter(|one| one["tier"] == "tc");
        offloaded.filter_map(|one| one["downstream"].as_str()?.parse().ok()).collect()
    }

    /// Waits until the kernel forwards so many connections.
    #[track_caller]
    pub fn wait_pairs(&self, count: usize) {
        wait_until(&format!("{count} connections are offloaded"), DEADLINE, || {
            usize::try_from(self.pairs()) == Ok(count)
        });
    }

    /// Sends on connections to an echo server until the kernel forwards all of them: a way on which nothing has moved yet
    /// proves nothing.
    #[track_caller]
    pub fn offload(&self, streams: &[TcpStream]) {
        let locals: BTreeSet<SocketAddr> =
            streams.iter().map(|stream| stream.local_addr().expect("a connected socket")).collect();
        wait_until("all connections are offloaded", DEADLINE, || {
            for stream in streams {
                client::ping(stream, b"offload me").expect("an echo");
            }
            let connections = self.connections("").expect("a list");
            let offloaded = connections.iter().filter(|one| one["state"] == "offloaded");
            let offloaded: BTreeSet<SocketAddr> =
                offloaded.filter_map(|one| one["downstream"].as_str()?.parse().ok()).collect();
            locals.is_subset(&offloaded)
        });
    }

    /// Waits until nothing is left of offloaded connections in the kernel.
    #[track_caller]
    pub fn wait_empty(&self) {
        wait_until("nothing is left in the kernel", DEADLINE, || {
            self.pairs() == 0
                && ["flows", "pairs"]
                    .iter()
                    .all(|map| entries(self.pin_dir(), map).is_ok_and(|count| count == 0))
        });
    }
}

impl Forwarding {
    /// Opens `count` connections to an echo server, and waits until the kernel forwards all of them.
    #[track_caller]
    pub fn connect_offloaded(&self, count: usize) -> Vec<TcpStream> {
        let streams: Vec<TcpStream> = (0..count).map(|_| self.connect().expect("connect")).collect();
        self.offload(&streams);
        streams
    }

    /// Sends on connections to an echo server until the kernel forwards all of them: a way on which nothing has moved yet
    /// proves nothing.
    #[track_caller]
    pub fn offload(&self, streams: &[TcpStream]) {
        self.agent.offload(streams);
    }

    /// Starts an agent on the pins of the present one, which has ended, and waits until it is ready.
    ///
    /// # Errors
    /// It does not start.
    pub fn succeed(&mut self, arguments: &[&str]) -> Result<()> {
        let command = AgentCommand::new(arguments).succeeding(&self.agent);
        self.agent = command.start(&self.topology.node, &self.manifests.path())?;
        Ok(())
    }
}

/// What can be seen of connections that stand still, in all places: what the agent lists and logs, the sockets and counters of
/// both ends' hosts and of the node, and the maps.
pub fn standing(agent: &Agent, topology: &Topology) -> String {
    let Topology { client, node, backend1, .. } = topology;
    let hosts = [("client", client), ("node", node), ("endpoint", backend1)].map(|(name, host)| {
        let sockets = host.stdout(Command::new("ss").args(["-tinoOH"])).unwrap_or_default();
        let counters = host.stdout(Command::new("nstat").arg("-as")).unwrap_or_default();
        format!("{name}:\n{sockets}{counters}")
    });
    let maps = ["flows", "pairs"].map(|map| {
        let entries = dump(agent.pin_dir(), map).unwrap_or_default();
        let entries = entries.iter().map(|entry| format!("    {}", entry["formatted"]));
        format!("{map}:\n{}", entries.collect::<Vec<_>>().join("\n"))
    });
    let listed = agent.connections("").unwrap_or_default();
    let listed: Vec<String> = listed.iter().map(|one| format!("    {one}")).collect();
    [&[agent.log(), format!("listed:\n{}", listed.join("\n"))][..], &hosts, &maps].concat().join("\n")
}

/// How many entries a pinned map has, by bpftool.
///
/// # Errors
/// There is no such map, or bpftool fails.
pub fn entries(pin_dir: &Path, map: &str) -> Result<usize> {
    Ok(dump(pin_dir, map)?.len())
}

/// The entries of a pinned map, as bpftool prints them.
///
/// # Errors
/// There is no such map, or bpftool fails.
pub fn dump(pin_dir: &Path, map: &str) -> Result<Vec<Value>> {
    let mut versions = fs::read_dir(pin_dir)?.flatten().map(|entry| entry.path());
    let path = versions.find(|path| path.join(map).exists()).context("no such map")?.join(map);
    let mut command = Command::new("bpftool");
    command.args(["-j", "map", "dump", "pinned"]).arg(path);
    let dump: Value = serde_json::from_str(&process::stdout(&mut command)?)?;
    dump.as_array().cloned().context("a dump that is no list")
}
