//! `forwarder explain`: listener port -> route -> service:port -> endpoints, and why something is not served.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;

use super::validate::{load, print_problems};
use super::{Output, print_json, table};
use crate::resolve::CONTROLLER_NAME;
use crate::settings::ADMIN;
use crate::view::{ListenerView, State};

/// How long an agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// File or folder of manifests; without it, the running agent is asked
    path: Option<PathBuf>,

    /// Admin address of the running agent
    #[arg(long, env = "FORWARDER_ADMIN", default_value_t = ADMIN, conflicts_with = "path")]
    admin: SocketAddr,

    /// Controller whose GatewayClasses are served
    #[arg(long, env = "FORWARDER_CONTROLLER_NAME", default_value = CONTROLLER_NAME)]
    controller_name: String,

    /// How to print the answer
    #[arg(long, short, value_enum, default_value = "table")]
    output: Output,
}

pub(crate) fn run(args: &ExplainArgs) -> anyhow::Result<ExitCode> {
    let state = match &args.path {
        Some(path) => load(path, &args.controller_name)?,
        None => ask(args.admin)?,
    };
    match args.output {
        Output::Json => print_json(&state)?,
        Output::Table => print(&state),
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks a running agent for its state.
fn ask(admin: SocketAddr) -> anyhow::Result<State> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime
        .block_on(async { tokio::time::timeout(ANSWER_TIMEOUT, fetch(admin)).await })
        .map_err(anyhow::Error::from)
        .flatten()
        .with_context(|| {
            format!(
                "cannot ask the agent at {admin}; is it running? (else give a PATH, or --admin ADDR:PORT)"
            )
        })
}

async fn fetch(admin: SocketAddr) -> anyhow::Result<State> {
    let stream = tokio::net::TcpStream::connect(admin).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("/v1/state")
        .header(hyper::header::HOST, admin.to_string())
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    if !response.status().is_success() {
        bail!("the answer to GET /v1/state is {}", response.status());
    }
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    serde_json::from_slice(&body).context("the answer to GET /v1/state is not an agent's state")
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
    }
    if let Some(datapath) = &state.datapath {
        match &datapath.error {
            Some(error) => println!("\nclassifier: off: {error}"),
            None => {
                let interfaces = datapath.interfaces.iter();
                let interfaces: Vec<_> =
                    interfaces.map(|one| format!("{} ({})", one.name, one.attachment)).collect();
                println!("\nclassifier: on {}", interfaces.join(", "));
            }
        }
    }
    if !state.problems.is_empty() {
        println!();
        print_problems(&state.problems);
    }
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
