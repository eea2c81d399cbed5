//! Every check that a change must pass, cheap ones first, the tests last.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::setup::{Mode, Need, cargo_deny, setup};
use crate::test::programs;
use crate::{ebpf, process, test, tidy, vm, workspace};

struct Step {
    name: &'static str,
    /// What a person types to repeat the step.
    repeat: &'static str,
    perform: fn() -> Result<()>,
}

const STEPS: [Step; 10] = [
    Step { name: "setup", repeat: "cargo xtask setup --for ci", perform: || setup(Need::Ci, Mode::Install) },
    Step { name: "fmt", repeat: "cargo fmt --all --check", perform: || cargo(&["fmt", "--all", "--check"]) },
    Step { name: "tidy", repeat: "cargo xtask tidy", perform: tidy::tidy },
    Step { name: "deny", repeat: "cargo deny check bans licenses sources", perform: deny },
    Step { name: "clippy-ebpf", repeat: "cargo xtask clippy-ebpf", perform: ebpf::clippy },
    Step { name: "build-ebpf", repeat: "cargo xtask build-ebpf", perform: || ebpf::build().map(drop) },
    Step {
        name: "clippy",
        repeat: "cargo clippy --workspace --exclude forwarder-ebpf --no-default-features --features=forwarder-agent/failpoints --all-targets -- -D warnings",
        perform: || cargo_for_all("clippy", &["--all-targets", "--", "-D", "warnings"]),
    },
    Step {
        name: "doc",
        repeat: "RUSTDOCFLAGS='-D warnings' cargo doc --workspace --exclude forwarder-ebpf --no-default-features --features=forwarder-agent/failpoints --no-deps",
        perform: || cargo_for_all("doc", &["--no-deps"]),
    },
    Step { name: "test", repeat: "cargo xtask test", perform: || test::test(None, &[]) },
    Step { name: "vm", repeat: "cargo xtask vm", perform: vm },
];

/// Performs every step until one fails.
pub(crate) fn ci() -> Result<()> {
    let start = Instant::now();
    let mut durations: Vec<(&str, Duration)> = Vec::new();
    for step in STEPS {
        eprintln!("\n== {}", step.name);
        let start = Instant::now();
        (step.perform)().with_context(|| {
            format!(
                "step {} failed after {:.0?}; repeat it with `{}`",
                step.name,
                start.elapsed(),
                step.repeat
            )
        })?;
        eprintln!("== {} passed in {:.0?}", step.name, start.elapsed());
        durations.push((step.name, start.elapsed()));
    }
    eprintln!("\nAll passed in {:.0?}:", start.elapsed());
    for (name, duration) in durations {
        eprintln!("{:>8.1} s  {name}", duration.as_secs_f64());
    }
    Ok(())
}

fn vm() -> Result<()> {
    setup(Need::Vm, Mode::Install)?;
    vm::short()
}

/// Performs a subcommand on every crate but the programs, with what the tests are built with.
fn cargo_for_all(subcommand: &str, arguments: &[&str]) -> Result<()> {
    cargo(&[&[subcommand], &programs::WHOLE[..], arguments].concat())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new(workspace::cargo());
    command
        .args(arguments)
        .current_dir(workspace::root())
        .env("RUSTDOCFLAGS", "-D warnings")
        // As in the tests, so that the agent is not built anew for each step.
        .env(ebpf::OBJECTS_VARIABLE, workspace::ebpf_objects());
    process::run(&mut command)
}

fn deny() -> Result<()> {
    let mut command = Command::new(cargo_deny()?);
    command.args(["check", "bans", "licenses", "sources"]).current_dir(workspace::root());
    process::run(&mut command)
}
