//! The command line.

mod admin;
mod cleanup;
mod completions;
mod conns;
mod datapath;
mod explain;
mod probe;
mod reader;
mod validate;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

use crate::agent;
use crate::settings::Options;
use crate::telemetry::{self, LogFormat};
use forwarder_runtime::error::one_line;

/// Forwards TCP connections as Gateway API TCPRoutes say.
#[derive(Debug, Parser)]
#[command(name = "forwarder", version, about, max_term_width = 110)]
pub struct Cli {
    /// Log level, or levels by target such as `info,access=debug` (one line for each connection that ends)
    #[arg(long, env = "FORWARDER_LOG", global = true, default_value = "info", value_name = "FILTER")]
    log: String,

    /// Log format
    #[arg(long, env = "FORWARDER_LOG_FORMAT", global = true, value_enum, default_value = "text")]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one in a process")]
enum Command {
    /// Run the agent: listen, forward, follow changes
    Agent(AgentArgs),
    /// Check manifests and report every problem; exit code 1 if something would not be served
    Validate(validate::ValidateArgs),
    /// Show the endpoints of each listener, and why something is not served
    Explain(explain::ExplainArgs),
    /// List open connections, or reset some of them
    Conns(conns::ConnsArgs),
    /// Show which kernel tiers (direct, tc, sockmap) take new connections, or switch one on or off
    Datapath(datapath::DatapathArgs),
    /// List or remove what stopped agents left in the kernel
    Cleanup(cleanup::CleanupArgs),
    /// Show which features work with this kernel and these privileges, and why others do not
    Probe(probe::ProbeArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

#[derive(Args, Debug)]
struct AgentArgs {
    /// Settings file (YAML); flags and environment variables take precedence over it
    #[arg(long, env = "FORWARDER_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    options: Options,
}

/// The command line, for what describes it: completions, and the reference.
pub fn command() -> clap::Command {
    Cli::command()
}

/// How a command prints its answer.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, ValueEnum)]
pub(crate) enum Output {
    /// A table for people.
    #[default]
    Table,
    /// JSON for programs.
    Json,
}

/// Runs the command line; errors have been printed when it returns.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    if let Err(error) = telemetry::init(&cli.log, cli.log_format) {
        eprintln!("error: {error}");
        return ExitCode::from(2);
    }
    if !matches!(cli.command, Command::Agent(_)) {
        reader::end_with_it();
    }
    let outcome = match cli.command {
        Command::Agent(args) => run_agent(args).map(|()| ExitCode::SUCCESS),
        Command::Validate(args) => validate::run(&args),
        Command::Explain(args) => explain::run(&args),
        Command::Conns(args) => conns::run(&args),
        Command::Datapath(args) => datapath::run(&args),
        Command::Cleanup(args) => cleanup::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Completions(args) => {
            completions::run(&args);
            Ok(ExitCode::SUCCESS)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("error: {}", one_line(error.as_ref()));
        ExitCode::from(2)
    })
}

fn run_agent(args: AgentArgs) -> anyhow::Result<()> {
    let file = match &args.config {
        Some(path) => Options::from_file(path)?,
        None => Options::default(),
    };
    agent::run(args.options.or(file).validate()?)?;
    Ok(())
}

/// Prints JSON for programs.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// An empty table in the style of all commands.
fn table(header: &[&str]) -> comfy_table::Table {
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING).set_header(header.iter().copied());
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}
