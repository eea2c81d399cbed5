//! The forwarder beside its peers, and beside no forwarder at all, in one run: `cargo xtask bench`.
//!
//! Every [`metric`] is measured on every [`path`]; the paths take [`turns`]. Medians, spreads and ratios go into a
//! [`report`], as a table, as JSON and as a [`chart`]. `docs/benchmarks.md` says what the numbers mean.

mod chart;
mod load;
mod machine;
mod metric;
mod path;
mod report;
mod responder;
mod selection;
mod turns;

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::{Parser, Subcommand};
use forwarder_tests::agent::binary;
use forwarder_tests::process::stdout;

use crate::metric::{FIGURES, Figure, change, resolve};
use crate::report::{Entry, Failure, Head, Report};
use crate::selection::Selection;

/// Measures the forwarder beside its peers, and beside no forwarder at all.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench", max_term_width = 100, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// 3 rounds of 1 s instead of 5 of 3 s: to see that it works.
    #[arg(long)]
    quick: bool,
    /// Only this metric (throughput, latency, connections, requests, packets, memory, change, resolve) or this path (dnat, nginx,
    /// xdp, or a tier such as splice); may be repeated. Where a path is named, routing and haproxy are measured too, as references.
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Number of rounds.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u8).range(1..))]
    rounds: Option<u8>,
    /// Write the figures to this file, as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a chart of each metric into this folder.
    #[arg(long, value_name = "DIR")]
    svg: Option<PathBuf>,
    /// Where criterion put its estimates.
    #[arg(long, value_name = "DIR", hide = true)]
    criterion: Option<PathBuf>,
    #[command(subcommand)]
    internal: Option<Internal>,
}

#[derive(Subcommand)]
enum Internal {
    /// The server behind the paths.
    #[command(hide = true)]
    Responder { address: SocketAddr },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let outcome = match arguments.internal {
        Some(Internal::Responder { address }) => responder::serve(address),
        None => bench(&arguments),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(arguments: &Arguments) -> Result<()> {
    let (paths, unavailable) = path::all()?;
    let selection = Selection::new(&arguments.only, &paths, &unavailable)?;
    if selection.needs_network() && !rustix::process::geteuid().is_root() {
        bail!("measuring makes network namespaces: run as root");
    }
    forwarder_tests::swarm::raise_descriptor_limit().context("raising the limit on open files")?;
    let rounds = arguments.rounds.map_or(if arguments.quick { 3 } else { 5 }, usize::from);
    let seconds = if arguments.quick { 1 } else { 3 };
    let mut report = Report { unavailable, ..Report::default() };
    for figure in FIGURES.into_iter().filter(|figure| selection.has_metric(figure.metric())) {
        let rounds = match figure {
            Figure::Memory if arguments.quick => 1,
            Figure::Memory => rounds.min(3),
            _ => rounds,
        };
        turns::take(figure, &selection.paths, rounds, seconds, &mut report)?;
    }
    if selection.has_metric("change") && selection.has_path(change::TIER) {
        measure_change(rounds, &mut report);
    }
    if selection.has_metric("resolve") {
        read_estimates(arguments, &mut report);
    }
    let head =
        Head { kernel: machine::kernel(), cpus: machine::processors(), version: version()?, rounds, seconds };
    let document = report.document(head);
    println!("{}", document.table());
    if let Some(file) = &arguments.json {
        let text = serde_json::to_string_pretty(&document)?;
        fs::write(file, text + "\n").with_context(|| format!("writing {}", file.display()))?;
    }
    if let Some(folder) = &arguments.svg {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        chart::draw(&document, folder)?;
    }
    if !document.failures.is_empty() {
        bail!("{} figures could not be measured, see above", document.failures.len());
    }
    Ok(())
}

fn measure_change(rounds: usize, report: &mut Report) {
    for amount in change::AMOUNTS {
        eprintln!("{amount}");
        match change::measure(amount, rounds) {
            Ok(readings) => report.entries.extend((0..).zip(readings).map(|(round, reading)| Entry {
                path: change::TIER.to_owned(),
                round,
                reading,
            })),
            Err(error) => report.failures.push(Failure {
                metric: "change".to_owned(),
                path: Some(change::TIER.to_owned()),
                error: format!("{:#}", error.context(amount.to_string())),
            }),
        }
    }
}

fn read_estimates(arguments: &Arguments, report: &mut Report) {
    for benchmark in resolve::BENCHMARKS {
        let reading = match &arguments.criterion {
            Some(folder) => resolve::measure(folder, benchmark),
            None => Err(anyhow::anyhow!("{benchmark}: criterion did not run")),
        };
        match reading {
            Ok(reading) => {
                report.entries.push(Entry { path: "forwarder".to_owned(), round: 0, reading });
            }
            Err(error) => report.failures.push(Failure {
                metric: "resolve".to_owned(),
                path: None,
                error: format!("{error:#}"),
            }),
        }
    }
}

/// The version that the binary prints after its name.
fn version() -> Result<String> {
    let text = stdout(Command::new(binary()).arg("--version"))?;
    Ok(text.trim().split_once(' ').map_or(text.trim(), |(_, version)| version).to_owned())
}
