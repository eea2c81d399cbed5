//! The paths from a client to the backend. Each runs for its turn only, in a network of its own, so that none taxes another.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path as FilePath;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use forwarder_tests::agent::binary;
use forwarder_tests::process::{Process, stdout};
use forwarder_tests::{Agent, Manifests, NetNs, Topology, wait_for};
use rustix::process::Signal;
use serde::Deserialize;
use tempfile::TempDir;

use crate::machine;

/// What clients connect to on the node.
pub(crate) const LISTENER_PORT: u16 = 9001;
/// Where the server behind the path listens.
pub(crate) const ENDPOINT_PORT: u16 = 5000;
/// The client connects from this many addresses.
const SOURCES: u8 = 11;
/// Debian keeps the module apart; where it is built in, there is no such file.
const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
const QUEUE: u32 = 4096;
/// Half of them are those of direct connections.
const DIRECT_PORTS: &str = "--source-ports=10240-65535";
/// More than bulk streams at a time, in both directions.
const PIPES: u32 = 150;
const DEADLINE: Duration = Duration::from_secs(10);

/// A way from a client to the backend.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Path {
    /// The node only routes.
    Routing,
    /// The node's kernel rewrites addresses.
    Dnat,
    /// The node's kernel rewrites addresses, as a virtual server (IPVS).
    Ipvs,
    Haproxy,
    Nginx,
    /// The forwarder, with `--datapath` set to the tier.
    Forwarder(String),
    /// The forwarder at tier tc, with a program at XDP.
    Xdp,
}

impl Path {
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Routing => "routing",
            Self::Dnat => "dnat",
            Self::Ipvs => IPVS,
            Self::Haproxy => "haproxy",
            Self::Nginx => "nginx",
            Self::Forwarder(tier) => tier,
            Self::Xdp => XDP,
        }
    }
}

/// A path that does not work here.
#[derive(Clone, Debug, Eq, PartialEq, serde::Serialize)]
pub(crate) struct Unavailable {
    pub(crate) path: String,
    pub(crate) reason: String,
}

const XDP: &str = "xdp";
const IPVS: &str = "ipvs";
/// Where the kernel has virtual servers.
const IPVS_TABLE: &str = "/proc/net/ip_vs";

/// Every path that works here, and those that do not. The binary knows its tiers.
pub(crate) fn all() -> Result<(Vec<Path>, Vec<Unavailable>)> {
    let mut probe = Command::new(binary());
    probe.args(["probe", "--output", "json"]);
    let (tiers, mut unavailable) = parse_tiers(&stdout(&mut probe)?)?;
    let mut peers = vec![Path::Routing, Path::Dnat];
    if FilePath::new(IPVS_TABLE).exists() {
        peers.push(Path::Ipvs);
    } else {
        let reason = format!("the kernel has no virtual servers: no {IPVS_TABLE}; try `modprobe ip_vs_rr`");
        unavailable.push(Unavailable { path: IPVS.to_owned(), reason });
    }
    peers.extend([Path::Haproxy, Path::Nginx]);
    let tiers = tiers.into_iter().map(Path::Forwarder);
    Ok((peers.into_iter().chain(tiers).chain([Path::Xdp]).collect(), unavailable))
}

#[derive(Deserialize)]
struct Finding {
    feature: String,
    available: bool,
    detail: String,
}

fn parse_tiers(probe: &str) -> Result<(Vec<String>, Vec<Unavailable>)> {
    let findings: Vec<Finding> = serde_json::from_str(probe)
        .with_context(|| format!("reading what `forwarder probe` says: {probe}"))?;
    let (mut tiers, mut unavailable) = (Vec::new(), Vec::new());
    for Finding { feature, available, detail } in findings {
        match (feature.strip_prefix("tier "), available) {
            (Some(tier), true) => tiers.push(tier.to_owned()),
            (Some(tier), false) => unavailable.push(Unavailable { path: tier.to_owned(), reason: detail }),
            (None, _) => {}
        }
    }
    Ok((tiers, unavailable))
}

/// A network for one path: a client with several addresses, a node, and hosts of backends. For a program at XDP, `is_for_xdp`: the others are measured
/// on the same devices then.
pub(crate) fn network(is_for_xdp: bool) -> Result<Topology> {
    let topology = Topology::new()?;
    if is_for_xdp {
        topology.finish_checksums()?;
    }
    for source in sources().iter().skip(1) {
        topology.client.ip(&["address", "add", &format!("{source}/24"), "dev", "eth0"])?;
    }
    // A proxy that answers a client's reset by a FIN upstream, as nginx does, leaves ports in TIME_WAIT. As an operator of a
    // busy proxy does: many ports, used again after a second.
    topology.node.run(|| {
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10240 65535")?;
        fs::write("/proc/sys/net/ipv4/tcp_tw_reuse", "1")
    })?;
    Ok(topology)
}

/// The addresses of the client.
pub(crate) fn sources() -> Vec<Ipv4Addr> {
    (2..2 + SOURCES).map(|last| Ipv4Addr::new(10, 0, 1, last)).collect()
}

/// A path in use; it ends when dropped.
pub(crate) struct Running {
    /// Where clients connect.
    pub(crate) target: SocketAddr,
    means: Means,
}

enum Means {
    Routing,
    Rules(NetNs),
    VirtualServer(NetNs),
    Proxy { process: Process, _folder: TempDir },
    Agent { agent: Box<Agent>, _manifests: Manifests },
}

impl Running {
    /// Starts `path` in `topology`, and waits until it listens.
    pub(crate) fn start(path: &Path, topology: &Topology) -> Result<Self> {
        let target = topology.node_address(LISTENER_PORT);
        let endpoint = topology.backend1_address(ENDPOINT_PORT);
        let (target, means) = match path {
            Path::Routing => (endpoint, Means::Routing),
            Path::Dnat => (target, translate(&topology.node, target, endpoint)?),
            Path::Ipvs => (target, virtual_server(&topology.node, target, endpoint)?),
            Path::Haproxy => (target, haproxy(&topology.node, endpoint)?),
            Path::Nginx => (target, nginx(&topology.node, endpoint)?),
            Path::Forwarder(tier) if tier == "direct" => {
                // Of the many ports, some are its own.
                (target, forwarder(&topology.node, endpoint, &["--datapath", tier, DIRECT_PORTS])?)
            }
            Path::Forwarder(tier) => (target, forwarder(&topology.node, endpoint, &["--datapath", tier])?),
            Path::Xdp => {
                let means = forwarder(&topology.node, endpoint, &["--datapath", "tc", "--xdp", "native"])?;
                if let Means::Agent { agent, .. } = &means
                    && wait_for(DEADLINE, || (agent.at_xdp("native") > 1).then_some(())).is_none()
                {
                    bail!("nothing is sent on at XDP after {DEADLINE:?}\n{}", agent.log());
                }
                (target, means)
            }
        };
        Ok(Self { target, means })
    }

    /// The processes that do the work.
    pub(crate) fn processes(&self) -> Result<Vec<u32>> {
        match &self.means {
            Means::Routing | Means::Rules(_) | Means::VirtualServer(_) => Ok(Vec::new()),
            Means::Proxy { process, .. } => machine::process_tree(process.id()),
            Means::Agent { agent, .. } => machine::process_tree(agent.id()),
        }
    }

    /// What the processes printed.
    pub(crate) fn log(&self) -> String {
        match &self.means {
            Means::Routing | Means::Rules(_) | Means::VirtualServer(_) => String::new(),
            Means::Proxy { process, .. } => process.log(),
            Means::Agent { agent, .. } => agent.log(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match &mut self.means {
            Means::Routing | Means::Agent { .. } => {}
            Means::Rules(node) => {
                // The namespace goes too, soon after.
                let _ = node.stdout(Command::new("nft").args(["delete", "table", "ip", "bench"]));
            }
            Means::VirtualServer(node) => {
                let _ = node.stdout(Command::new("ipvsadm").arg("--clear"));
            }
            Means::Proxy { process, .. } => {
                // Killed at once, a master would leave its workers behind.
                let _ = process.signal(Signal::TERM);
                process.wait(DEADLINE);
            }
        }
    }
}

/// DNAT alone: the backend's answers pass through the node anyway, so nothing needs to be masqueraded.
fn translate(node: &NetNs, target: SocketAddr, endpoint: SocketAddr) -> Result<Means> {
    let rule = format!("ip daddr {} tcp dport {} dnat to {endpoint}", target.ip(), target.port());
    let chain = "type nat hook prerouting priority dstnat ;";
    let table = format!("table ip bench {{ chain to-backend {{ {chain} {rule} ; }} ; }}");
    node.stdout(Command::new("nft").arg(table)).context("adding the DNAT rule")?;
    Ok(Means::Rules(node.clone()))
}

/// A virtual server in turn (`rr`) that masquerades the endpoint (`-m`): its answers pass through the node anyway.
fn virtual_server(node: &NetNs, target: SocketAddr, endpoint: SocketAddr) -> Result<Means> {
    let [target, endpoint] = [target, endpoint].map(|address| address.to_string());
    let add = |arguments: &[&str]| node.stdout(Command::new("ipvsadm").args(arguments));
    add(&["--add-service", "--tcp-service", &target, "--scheduler", "rr"])
        .context("adding the virtual server")?;
    let server = ["--add-server", "--tcp-service", &target, "--real-server", &endpoint, "--masquerading"];
    add(&server).context("adding the endpoint of the virtual server")?;
    Ok(Means::VirtualServer(node.clone()))
}

fn forwarder(node: &NetNs, endpoint: SocketAddr, arguments: &[&str]) -> Result<Means> {
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint])?;
    let agent = Agent::start(node, &manifests.path(), arguments)?;
    Ok(Means::Agent { agent: Box::new(agent), _manifests: manifests })
}

fn haproxy(node: &NetNs, endpoint: SocketAddr) -> Result<Means> {
    let threads = machine::processors();
    // Two descriptors for each connection, two for each pipe, and some for itself: it refuses to start with more than it
    // may open, and would by itself reckon with a pipe for every fourth connection.
    let connections = connection_limit();
    let configuration = format!(
        "global\n  nbthread {threads}\n  maxconn {connections}\n  maxpipes {PIPES}\n\
         defaults\n  mode tcp\n  option splice-auto\n\
         \x20 timeout connect 5s\n  timeout client 10m\n  timeout server 10m\n\
         listen bench\n  bind :{LISTENER_PORT} backlog {QUEUE}\n  maxconn {connections}\n  server endpoint {endpoint}\n"
    );
    let folder = TempDir::with_prefix("forwarder-bench-haproxy-")?;
    let file = folder.path().join("haproxy.cfg");
    fs::write(&file, configuration)?;
    proxy(node, Command::new("haproxy").arg("-db").arg("-f").arg(&file), folder)
}

fn nginx(node: &NetNs, endpoint: SocketAddr) -> Result<Means> {
    let folder = TempDir::with_prefix("forwarder-bench-nginx-")?;
    let mut configuration = String::new();
    if FilePath::new(NGINX_STREAM).exists() {
        writeln!(configuration, "load_module {NGINX_STREAM};")?;
    }
    // Each worker gets any share of the connections, so each could take all.
    write!(
        configuration,
        "daemon off;\npid nginx.pid;\nerror_log error.log warn;\nworker_processes {};\n\
         events {{ worker_connections {}; }}\n\
         stream {{\n  server {{\n    listen {LISTENER_PORT} reuseport backlog={QUEUE};\n\
         \x20   proxy_pass {endpoint};\n    proxy_connect_timeout 5s;\n    proxy_timeout 10m;\n  }}\n}}\n",
        machine::processors(),
        2 * connection_limit()
    )?;
    let file = folder.path().join("nginx.conf");
    fs::write(&file, configuration)?;
    let mut command = Command::new("nginx");
    command.arg("-e").arg(folder.path().join("error.log"));
    command.arg("-p").arg(folder.path()).arg("-c").arg(&file);
    proxy(node, &mut command, folder)
}

fn proxy(node: &NetNs, command: &mut Command, folder: TempDir) -> Result<Means> {
    let mut process = Process::start(node, command, &folder.path().join("log"))?;
    let ended = wait_for(DEADLINE, || match process.try_wait() {
        Ok(None) => (!node.listening_inodes(LISTENER_PORT).is_empty()).then_some(None),
        ended => Some(Some(ended)),
    });
    match ended {
        Some(None) => Ok(Means::Proxy { process, _folder: folder }),
        Some(Some(ended)) => bail!("{command:?} ended at its start: {ended:?}\n{}", process.log()),
        None => bail!("{command:?} does not listen after {DEADLINE:?}\n{}", process.log()),
    }
}

/// How many connections a proxy can hold that needs two descriptors for each.
pub(crate) fn connection_limit() -> usize {
    const RESERVED: usize = 400;
    const ENOUGH: usize = 10_000;
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let files = files.and_then(|files| usize::try_from(files).ok()).unwrap_or(usize::MAX);
    (files.saturating_sub(RESERVED) / 2).min(ENOUGH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_those_that_the_binary_names() {
        let probe = r#"[
            {"feature": "tier copy", "available": true, "detail": "always"},
            {"feature": "tier sockmap", "available": false, "detail": "EPERM"},
            {"feature": "eBPF programs", "available": true, "detail": "tcx"}
        ]"#;
        let sockmap = Unavailable { path: "sockmap".to_owned(), reason: "EPERM".to_owned() };
        assert_eq!(parse_tiers(probe).unwrap(), (vec!["copy".to_owned()], vec![sockmap]));
        assert!(parse_tiers("no").is_err());
    }
}
