//! The tiers that tests of whole conversations go through, and the proof that it was them who carried the bytes.

use std::time::Duration;
use std::{env, fmt};

use anyhow::Result;

use crate::agent::{Agent, AgentCommand};
use crate::netns::Topology;
use crate::release::is_at_least;
use crate::wait::{wait_for, wait_until};

const DATAPATHS: &str = "FORWARDER_TEST_DATAPATHS";
const XDP: &str = "+xdp";
/// What such tests go through unless `FORWARDER_TEST_DATAPATHS`, separated by commas, names others.
const USUAL: [Datapath; 4] = [Datapath("splice"), Datapath("tc"), Datapath("direct"), Datapath("sockmap")];
/// Those with what the programs at XDP send on, where the kernel tells which interfaces take it.
const AT_XDP: [Datapath; 2] = [Datapath("tc+xdp"), Datapath("direct+xdp")];
/// When the kernel takes a connection over, unless `FORWARDER_TEST_OFFLOAD` says something else: early, since
/// conversations are short.
const OFFLOAD: &str = "--offload-after 16KiB,250ms";
/// For many connections at once, and large ones, all of which tier `sockmap` is to take.
const SOCKMAP_MEMORY: &str = "--sockmap-memory=8GiB";
/// Who names the tier wants it on any kernel.
const UNSAFE_KERNEL: &str = "--sockmap-unsafe-kernel";
/// How long the agent may take to count what the kernel has forwarded.
const COUNTED: Duration = Duration::from_secs(5);

/// A value of the agent's flag `--datapath`; with `+xdp` behind it, programs at XDP send on too.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Datapath(&'static str);

impl Datapath {
    /// Those that tests go through.
    pub fn chosen() -> Vec<Self> {
        Self::among(&USUAL)
    }

    /// The same, and those with XDP.
    pub fn chosen_and_at_xdp() -> Vec<Self> {
        Self::among(&[&USUAL[..], &AT_XDP].concat())
    }

    fn among(usual: &[Self]) -> Vec<Self> {
        let all = [&USUAL[..], &AT_XDP, &[Self("copy")]].concat();
        env::var(DATAPATHS).map_or_else(
            |_| usual.iter().copied().filter(|datapath| datapath.is_taken()).collect(),
            |names| {
                let known = |name: &str| all.iter().copied().find(|datapath| datapath.0 == name);
                let known = |name| known(name).expect("one of those that tests know");
                names.split(',').map(known).collect()
            },
        )
    }

    /// The flag's value.
    fn tier(self) -> &'static str {
        self.0.strip_suffix(XDP).unwrap_or(self.0)
    }

    /// Whether programs at XDP send on too.
    pub fn is_at_xdp(self) -> bool {
        self.0.ends_with(XDP)
    }

    /// A network for it.
    pub fn topology(self) -> Result<Topology> {
        let topology = Topology::new()?;
        if self.is_at_xdp() {
            topology.finish_checksums()?;
        }
        Ok(topology)
    }

    /// Whether agents have it on this kernel without being told to: tier `sockmap` they do not before 6.18, and nothing is sent on at XDP before 6.3.
    fn is_taken(self) -> bool {
        match self.0 {
            "sockmap" => is_at_least(6, 18),
            _ => !self.is_at_xdp() || is_at_least(6, 3),
        }
    }

    /// How to start an agent that goes through it.
    pub fn agent(self) -> AgentCommand {
        let more = env::var("FORWARDER_TEST_OFFLOAD").unwrap_or_else(|_| OFFLOAD.to_owned());
        self.agent_with(&more.split_ascii_whitespace().collect::<Vec<_>>())
    }

    /// The same, with arguments of its own about offloading.
    pub fn agent_with(self, offload: &[&str]) -> AgentCommand {
        let mut more = if self.is_by_kernel() { offload.to_vec() } else { Vec::new() };
        if self.0 == "sockmap" {
            more.extend([SOCKMAP_MEMORY, UNSAFE_KERNEL]);
        }
        if self.is_at_xdp() {
            more.extend(["--xdp", "native"]);
        }
        AgentCommand::new(&[&["--datapath", self.tier()], more.as_slice()].concat())
    }

    /// Whether the kernel forwards offloaded connections.
    pub fn is_by_kernel(self) -> bool {
        matches!(self.tier(), "tc" | "direct" | "sockmap")
    }

    /// Waits until new connections are such as it says: those to a direct listener are accepted for a moment after the port is open.
    #[track_caller]
    pub fn wait_ready(self, agent: &Agent) {
        if self.is_at_xdp() {
            wait_until("packets are sent on at XDP", COUNTED, || agent.at_xdp("native") > 1);
        }
        if self.tier() != "direct" {
            return;
        }
        wait_until("every listener is direct", COUNTED, || {
            let state = agent.state().expect("the state");
            let listeners = state["listeners"].as_array().expect("a list");
            listeners.iter().all(|listener| listener["direct"] == true)
        });
    }

    /// Prints how many bytes each tier has forwarded; yields those that the kernel has forwarded by itself, if programs at XDP had their part where they
    /// should.
    pub fn forwarded(self, agent: &Agent) -> Result<i64> {
        let tier = |tier: &'static str| {
            let metrics = agent.metrics()?;
            let names = ["forwarder_received_bytes_total", "forwarder_sent_bytes_total"];
            anyhow::Ok(names.iter().map(|name| metrics.sum(name, &[("tier", tier)])).sum::<i64>())
        };
        let by_kernel = if self.is_by_kernel() {
            wait_for(COUNTED, || tier(self.tier()).ok().filter(|&bytes| bytes > 0)).unwrap_or_default()
        } else {
            0
        };
        println!(
            "{self}: {by_kernel} bytes by the kernel, {} by splice, {} by copy",
            tier("splice")?,
            tier("copy")?
        );
        if self.is_at_xdp() {
            let packets = agent.verdicts("xdp_redirected");
            println!("{self}: {packets} packets at XDP");
            return Ok(if packets > 0 { by_kernel } else { 0 });
        }
        Ok(by_kernel)
    }
}

impl fmt::Display for Datapath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}
