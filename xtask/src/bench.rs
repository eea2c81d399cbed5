//! The benchmarks: the agent's own of pure code by criterion, and the forwarder beside its peers in network namespaces.

use std::ffi::OsString;
use std::process::Command;

use anyhow::Result;

use crate::setup::{Mode, Need, setup};
use crate::workspace::{self, Profile};
use crate::{ebpf, process};

/// The agent's benchmarks of pure code.
const CRITERION: &str = "configuration";

/// Installs what the benchmarks need, builds everything with optimisations, and measures.
pub(crate) fn bench(arguments: &[OsString]) -> Result<()> {
    if arguments.iter().any(|argument| argument == "--help" || argument == "-h") {
        return process::run(command("run").args(["--release", "--", "--help"]));
    }
    setup(Need::Bench, Mode::Install)?;
    let objects = ebpf::build()?;
    let agent = ebpf::build_agent(Profile::Release, Some(&objects))?;
    process::run(command("build").arg("--release"))?;
    if wants_criterion(arguments) {
        let mut criterion = Command::new(workspace::cargo());
        criterion.args(["bench", "--package", "forwarder-agent", "--bench", CRITERION]);
        // What is built for it is not built anew without the object.
        criterion.current_dir(workspace::root()).env(ebpf::OBJECTS_VARIABLE, &objects);
        process::run(&mut criterion)?;
    }
    let mut bench = Command::new(workspace::target_directory().join("release/bench"));
    bench.arg("--criterion").arg(workspace::target_directory().join("criterion")).args(arguments);
    process::run(bench.env("FORWARDER_BIN", agent))
}

/// Cargo on the program that measures. It stands beside what the integration tests share.
fn command(subcommand: &str) -> Command {
    let mut command = Command::new(workspace::cargo());
    command
        .args([subcommand, "--package", "forwarder-tests", "--bin", "bench"])
        .current_dir(workspace::root());
    command
}

/// Whether the benchmarks of pure code are asked for. They take minutes; other metrics are had without.
fn wants_criterion(arguments: &[OsString]) -> bool {
    let names = selected(arguments);
    names.is_empty() || names.iter().any(|name| name == "resolve")
}

/// The values of `--only`.
fn selected(arguments: &[OsString]) -> Vec<String> {
    let mut words = arguments.iter().map(|argument| argument.to_string_lossy());
    let mut names = Vec::new();
    while let Some(word) = words.next() {
        match word.strip_prefix("--only=") {
            Some(name) => names.push(name.to_owned()),
            None if word == "--only" => names.extend(words.next().map(Into::into)),
            None => {}
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selected_names_are_found_in_both_spellings() {
        let check = |line: &str, expected: &[&str]| {
            let arguments: Vec<OsString> = line.split_ascii_whitespace().map(Into::into).collect();
            assert_eq!(selected(&arguments), expected, "{line}");
        };
        check("--quick --json only", &[]);
        check("--only resolve --quick --only=latency", &["resolve", "latency"]);
        check("--only", &[]);
    }
}
