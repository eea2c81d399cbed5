//! `forwarder explain`: listener port -> route -> service:port -> endpoints, and why something is not served.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::anyhow;
use clap::Args;

use super::admin::{AgentArgs, AskError};
use super::validate::{ServedArgs, load, print_problems};
use super::{Output, print_json, table};
use crate::view::{InterfaceView, ListenerView, State};

/// How many of a listener's networks of clients are shown.
const NETWORKS_SHOWN: usize = 16;

#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// File or folder of manifests; without it, ask the running agent
    #[arg(conflicts_with_all = ["admin", "admin_socket"])]
    path: Option<PathBuf>,

    #[command(flatten)]
    agent: AgentArgs,

    #[command(flatten)]
    served: ServedArgs,

    /// Output format
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

pub(crate) fn run(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let state = match &args.path {
        Some(path) => load(path, &args.served)?,
        None => ask(&args.agent)?,
    };
    match args.output {
        Output::Json => print_json(&state)?,
        Output::Table => print(&state),
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a running agent for its state.
fn ask(agent: &AgentArgs) -> anyhow::Result<State> {
    super::admin::get(agent, "/v1/state").map_err(|error| match error {
        AskError::NoAgent(_) => anyhow!("{error}; or give the PATH of manifests, to explain these"),
        error => error.into(),
    })
}

fn print(state: &State) {
    let mut rows = table(&["LISTENER", "ADDRESS", "ROUTE", "BACKEND", "WEIGHT", "ENDPOINTS", "DATAPATH"]);
    for listener in &state.listeners {
        let mut first = true;
        for backend in &listener.backends {
            let endpoints = match &backend.rejected {
                Some(reason) => format!("rejected: {reason}"),
                None => backend.endpoints.join(" "),
            };
            rows.add_row(row(listener, first, &backend.backend, &backend.weight.to_string(), &endpoints));
            first = false;
        }
        if listener.backends.is_empty() {
            let why = if listener.route.is_some() { "no backend: rejected" } else { "no route: rejected" };
            rows.add_row(row(listener, true, "-", "-", why));
        }
    }
    println!("{}", rows.trim_fmt());
    for listener in &state.listeners {
        if let Some(error) = &listener.error {
            println!("error: listener {}: {error}", listener.listener);
        }
        if let Some(networks) = clients(&listener.client_cidrs) {
            println!("clients of listener {}: {networks}", listener.listener);
        }
        if let Some(rate) = listener.client_rate {
            println!(
                "clients of listener {}: at most {rate} new connections a second each",
                listener.listener
            );
        }
    }
    if let Some(datapath) = &state.datapath {
        if let Some(error) = &datapath.error {
            println!("\neBPF programs: off: {error}");
        } else {
            let interfaces = datapath.interfaces.iter();
            let shown = |one: &InterfaceView| {
                let xdp = one.xdp.as_ref().map(|mode| format!(", xdp {mode}"));
                format!("{} ({}{})", one.name, one.attachment, xdp.unwrap_or_default())
            };
            println!("\neBPF programs: on {}", interfaces.map(shown).collect::<Vec<_>>().join(", "));
            if let Some(error) = &datapath.tc_error {
                println!("tier tc: off: {error}");
            }
            if let Some(error) = &datapath.xdp_error {
                println!("xdp: {error}");
            }
        }
    }
    if !state.problems.is_empty() {
        println!();
        print_problems(&state.problems);
    }
}

/// The networks of clients that are not let in, and exceptions: the first ones, if there are any.
fn clients(networks: &[String]) -> Option<String> {
    let (shown, others) = networks.split_at(networks.len().min(NETWORKS_SHOWN));
    let more = if others.is_empty() { String::new() } else { format!(" and {} more", others.len()) };
    (!shown.is_empty()).then(|| shown.join(" ") + &more)
}

/// A row of the table; a listener's own columns stand in its first row only.
fn row(listener: &ListenerView, first: bool, backend: &str, weight: &str, endpoints: &str) -> Vec<String> {
    let own = |text: &str| if first { text.to_owned() } else { String::new() };
    let bound = match listener.bound {
        Some(false) => " (not open)",
        Some(true) | None => "",
    };
    vec![
        own(&listener.listener),
        own(&format!("{}{bound}", listener.address)),
        own(listener.route.as_deref().unwrap_or("-")),
        backend.to_owned(),
        weight.to_owned(),
        endpoints.to_owned(),
        own(&listener.datapath),
    ]
}
