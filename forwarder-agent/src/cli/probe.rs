//! `forwarder probe`: what this kernel and these privileges allow, with the reason for each no.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use serde::Serialize;

use super::{Output, print_json, table};
use forwarder_dataplane::descriptors::Descriptors;
use forwarder_dataplane::offload::sockmap;
use forwarder_dataplane::relay;
use forwarder_kube::watch;
use forwarder_runtime::error::one_line;

/// How long the Kubernetes API may take to answer.
const KUBERNETES: Duration = Duration::from_secs(5);
/// What tier `direct` needs beside what tier `tc` does.
const DIRECT: &str = "for listeners that ask for it, where the agent has --max-direct and local ports of its own (--source-ports)";

/// What a program at XDP needs.
const XDP: &str = "where the agent has --xdp and the driver takes it: drops refused clients, and with native sends packets of connections on";

#[derive(Args, Debug)]
pub(crate) struct ProbeArgs {
    /// Output format
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,

    /// Kubeconfig file [default: KUBECONFIG, ~/.kube/config, or the Pod's service account]
    #[arg(long, env = "FORWARDER_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,

    /// Test tier `sockmap` even on kernels before 6.18, which may lose or repeat data
    #[arg(long)]
    sockmap_unsafe_kernel: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    feature: &'static str,
    available: bool,
    detail: String,
}

impl Finding {
    fn new(feature: &'static str, result: Result<String, String>) -> Self {
        let (available, detail) = match result {
            Ok(detail) => (true, detail),
            Err(reason) => (false, reason),
        };
        Self { feature, available, detail }
    }
}

pub(crate) fn run(args: &ProbeArgs) -> anyhow::Result<ExitCode> {
    let tc = forwarder_kernel::probe::probe();
    let direct = tc.clone().and_then(|_| forwarder_kernel::probe::probe_direct()).map(|()| DIRECT.to_owned());
    let findings = [
        Finding::new("tier copy", Ok("read(2) and write(2): always".to_owned())),
        Finding::new("tier splice", relay::probe_splice().map_err(|error| error.to_string())),
        Finding::new("tier direct", direct),
        Finding::new("tier tc", tc),
        Finding::new("tier sockmap", sockmap::probe(args.sockmap_unsafe_kernel)),
        Finding::new("eBPF programs", programs()),
        Finding::new("program at XDP", xdp()),
        Finding::new("low ports", low_ports()),
        Finding::new("open files", Ok(open_files())),
        Finding::new("kernel", Ok(kernel())),
        Finding::new("kubernetes", kubernetes(args.kubeconfig.as_deref())),
    ];
    match args.output {
        Output::Json => print_json(&findings)?,
        Output::Table => {
            let mut rows = table(&["FEATURE", "AVAILABLE", "DETAIL"]);
            for finding in &findings {
                let available = if finding.available { "yes" } else { "no" };
                rows.add_row([finding.feature, available, &finding.detail]);
            }
            println!("{}", rows.trim_fmt());
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn programs() -> Result<String, String> {
    forwarder_kernel::bpf::probe(false)
        .map(|report| {
            let btf = if report.btf { "BTF" } else { "no BTF: bpftool prints maps without names" };
            format!("attached by {}, {btf}", report.attach.as_str())
        })
        .map_err(|error| error.to_string())
}

fn xdp() -> Result<String, String> {
    let limit = forwarder_kernel::probe::probe_xdp()?;
    Ok(limit.unwrap_or_else(|| XDP.to_owned()))
}

fn low_ports() -> Result<String, String> {
    let first = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start")
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok())
        .unwrap_or(1024);
    if first <= 1 {
        return Ok("every port is open to everyone".to_owned());
    }
    match capabilities(None) {
        Ok(sets) if sets.effective.contains(CapabilitySet::NET_BIND_SERVICE) => {
            Ok("ports from 1 on (CAP_NET_BIND_SERVICE)".to_owned())
        }
        Ok(_) => Err(format!("ports below {first} need CAP_NET_BIND_SERVICE")),
        Err(errno) => Err(format!("cannot read this process's capabilities: {errno}")),
    }
}

fn open_files() -> String {
    let limit = getrlimit(Resource::Nofile);
    match limit.maximum.or(limit.current) {
        Some(files) => {
            format!("up to {files}: some {} connections", Descriptors::new(files).max_connections())
        }
        None => "without limit".to_owned(),
    }
}

/// Which kinds the Kubernetes API serves, and in which version each would be read.
fn kubernetes(kubeconfig: Option<&Path>) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot make an event loop: {error}"))?;
    let ask = async {
        let client = watch::connect(kubeconfig).await.map_err(|error| one_line(&error))?;
        watch::discover(&client).await.map_err(|error| one_line(&error))
    };
    let answer = runtime.block_on(async { tokio::time::timeout(KUBERNETES, ask).await });
    // Where nobody answers, neither does the resolver of names, on a thread of its own.
    runtime.shutdown_background();
    let served = answer.map_err(|_| format!("no answer within {} seconds", KUBERNETES.as_secs()))??;
    let missing: Vec<&str> = watch::GATEWAY_KINDS
        .iter()
        .filter(|kind| !served.contains_key(kind))
        .map(|kind| kind.as_str())
        .collect();
    let served: Vec<String> =
        served.iter().map(|(kind, resource)| format!("{kind} {}", resource.version)).collect();
    if missing.is_empty() {
        return Ok(served.join(", "));
    }
    let there = if served.is_empty() { "none".to_owned() } else { served.join(", ") };
    Err(format!("not served: {} (install the CRDs of the Gateway API); served: {there}", missing.join(", ")))
}

fn kernel() -> String {
    let name = rustix::system::uname();
    format!("{} {}", name.release().to_string_lossy(), name.machine().to_string_lossy())
}
