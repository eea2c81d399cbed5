//! The tiers that tests of whole conversations go through, and the proof that it was them who carried the bytes.

use std::time::Duration;
use std::{env, fmt};

use anyhow::Result;

use crate::agent::{Agent, AgentCommand};
use crate::wait::{wait_for, wait_until};

/// What such tests go through unless `FORWARDER_TEST_DATAPATHS`, separated by commas, names others.
const USUAL: [Datapath; 4] = [Datapath("splice"), Datapath("tc"), Datapath("direct"), Datapath("sockmap")];
/// When the kernel takes a connection over, unless `FORWARDER_TEST_OFFLOAD` says something else: early, since
/// conversations are short.
const OFFLOAD: &str = "--offload-after 16KiB,250ms";
/// For many connections at once, and large ones, all of which tier `sockmap` is to take.
const SOCKMAP_MEMORY: &str = "--sockmap-memory=8GiB";
/// Who names the tier wants it on any kernel.
const UNSAFE_KERNEL: &str = "--sockmap-unsafe-kernel";
/// How long the agent may take to count what the kernel has forwarded.
const COUNTED: Duration = Duration::from_secs(5);

/// A value of the agent's flag `--datapath`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Datapath(&'static str);

impl Datapath {
    /// Those that tests go through.
    pub fn chosen() -> Vec<Self> {
        let all = [Self("splice"), Self("copy"), Self("tc"), Self("direct"), Self("sockmap")];
        env::var("FORWARDER_TEST_DATAPATHS").map_or_else(
            |_| USUAL.into_iter().filter(|datapath| datapath.is_taken()).collect(),
            |names| {
                let known = |name: &str| all.into_iter().find(|datapath| datapath.0 == name);
                names
                    .split(',')
                    .map(|name| known(name).expect("splice, copy, tc, direct or sockmap"))
                    .collect()
            },
        )
    }

    /// Whether agents have it on this kernel without being told to: tier `sockmap` they do not before 6.18.
    fn is_taken(self) -> bool {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let mut numbers = release.split(|letter: char| !letter.is_ascii_digit()).map(str::parse::<u32>);
        let version = (numbers.next(), numbers.next());
        self.0 != "sockmap"
            || matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 18))
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
        AgentCommand::new(&[&["--datapath", self.0], more.as_slice()].concat())
    }

    /// Whether the kernel forwards offloaded connections.
    pub fn is_by_kernel(self) -> bool {
        matches!(self.0, "tc" | "direct" | "sockmap")
    }

    /// Waits until new connections are such as it says: those to a direct listener are accepted for a moment after the port is open.
    #[track_caller]
    pub fn wait_ready(self, agent: &Agent) {
        if self.0 != "direct" {
            return;
        }
        wait_until("every listener is direct", COUNTED, || {
            let state = agent.state().expect("the state");
            let listeners = state["listeners"].as_array().expect("a list");
            listeners.iter().all(|listener| listener["direct"] == true)
        });
    }

    /// Prints how many bytes each tier has forwarded; yields those that the kernel has forwarded by itself.
    pub fn forwarded(self, agent: &Agent) -> Result<i64> {
        let tier = |tier: &'static str| {
            let metrics = agent.metrics()?;
            let names = ["forwarder_received_bytes_total", "forwarder_sent_bytes_total"];
            anyhow::Ok(names.iter().map(|name| metrics.sum(name, &[("tier", tier)])).sum::<i64>())
        };
        let by_kernel = if self.is_by_kernel() {
            wait_for(COUNTED, || tier(self.0).ok().filter(|&bytes| bytes > 0)).unwrap_or_default()
        } else {
            0
        };
        println!(
            "{self}: {by_kernel} bytes by the kernel, {} by splice, {} by copy",
            tier("splice")?,
            tier("copy")?
        );
        Ok(by_kernel)
    }
}

impl fmt::Display for Datapath {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.0)
    }
}
