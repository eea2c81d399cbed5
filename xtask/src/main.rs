//! Sets up, builds, runs and tests forwarder: `cargo xtask <command>`.

mod apiserver;
mod bench;
mod ci;
mod demo;
mod docs;
mod ebpf;
mod image;
mod keyring;
mod linker;
mod packages;
mod process;
mod run;
mod setup;
mod test;
mod tidy;
mod toolchain;
mod vm;
mod workspace;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::setup::{Mode, Need};
use crate::workspace::Profile;

/// Sets up, builds, runs and tests forwarder.
#[derive(Parser)]
#[command(bin_name = "cargo xtask", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing for building, running or testing.
    Setup {
        /// What to prepare for.
        #[arg(long = "for", value_enum, default_value_t = Need::Run)]
        need: Need,
        /// Only report what is missing; fails when something is.
        #[arg(long)]
        check: bool,
    },
    /// Build the eBPF programs.
    BuildEbpf,
    /// Lint the eBPF programs, for their own target.
    ClippyEbpf,
    /// Build the eBPF programs and the agent that embeds them.
    Build {
        /// With optimisations.
        #[arg(long)]
        release: bool,
        /// With optimisations, and so that it needs no file beside itself.
        #[arg(long = "static")]
        is_static: bool,
    },
    /// Build a container image with nothing in it but the agent, as an archive that container tools load.
    Image(image::Arguments),
    /// Run the agent on examples/quickstart, with two demonstration backends.
    Run {
        /// Passed on to `forwarder agent`.
        #[arg(last = true)]
        arguments: Vec<OsString>,
    },
    /// Run the unit and integration tests.
    Test {
        /// Only the tests of one package.
        #[arg(long, short)]
        package: Option<String>,
        /// Substrings of test names, and libtest's options.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        filters: Vec<OsString>,
    },
    /// Run integration tests inside Debian's kernels, in qemu.
    Vm(vm::Arguments),
    /// Measure the forwarder beside its peers, as root: see docs/benchmarks.md.
    #[command(disable_help_flag = true)]
    Bench {
        /// Passed on: --quick, --only NAME, --rounds NUMBER, --json FILE, --svg DIR, --help.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// Run every check that a change must pass, then the tests.
    Ci,
    /// Make a book of the documents: target/book/index.html.
    Docs,
    /// Check the rules of the source tree that no compiler knows.
    Tidy,
}

fn main() -> ExitCode {
    match perform(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Setup { need, check } => setup::setup(need, if check { Mode::Check } else { Mode::Install }),
        Task::BuildEbpf => ebpf::build().map(drop),
        Task::ClippyEbpf => ebpf::clippy(),
        Task::Build { is_static: true, .. } => ebpf::build_static_agent(&ebpf::build()?).map(drop),
        Task::Build { release, .. } => {
            let profile = if release { Profile::Release } else { Profile::Dev };
            ebpf::build_agent(profile, Some(&ebpf::build()?)).map(drop)
        }
        Task::Image(arguments) => image::image(&arguments),
        Task::Run { arguments } => run::run(&arguments),
        Task::Test { package, filters } => test::test(package.as_deref(), &filters),
        Task::Vm(arguments) => {
            setup::setup(Need::Vm, Mode::Install)?;
            vm::vm(&arguments)
        }
        Task::Bench { arguments } => bench::bench(&arguments),
        Task::Ci => ci::ci(),
        Task::Docs => docs::docs(),
        Task::Tidy => tidy::tidy(),
    }
}
