//! Integration tests inside Debian's kernels, in qemu: the programs that were built on the host, on the host's own files.
//!
//! A translating qemu says nothing about speed.

mod guest;
mod initramfs;
mod kernels;
mod qemu;
mod report;
mod selection;
mod version;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::guest::Work;
use self::kernels::{Kernel, Wanted};
use self::qemu::{Accelerator, Machine};
use self::report::Outcome;
use crate::ebpf;
use crate::workspace::{self, Profile};

/// The oldest kernel that is supported, and the oldest one on which nothing is missing.
const KERNELS: [&str; 2] = ["5.10", "6.1"];

#[derive(clap::Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub(crate) struct Arguments {
    /// The newest of Debian's kernels whose version begins so; repeatable [default: 5.10 and 6.1].
    #[arg(long = "kernel", value_name = "VERSION")]
    kernels: Vec<String>,
    /// The newest kernel of each series that Debian has.
    #[arg(long, conflicts_with = "kernels")]
    all: bool,
    /// Look for newer kernels than those that were downloaded before.
    #[arg(long)]
    update: bool,
    /// With the agent as it is built for debugging; `FORWARDER_BIN` names another one.
    #[arg(long)]
    debug: bool,
    /// How many minutes each program with tests may take.
    #[arg(long, default_value_t = 10, value_name = "MINUTES")]
    limit: u64,
    /// What executes the guest's instructions.
    #[arg(long, value_enum, default_value = "tcg")]
    accelerator: Accelerator,
    /// With network cards (`virtio_net`) between the namespaces that tests make, instead of veth.
    #[arg(long)]
    cards: bool,
    /// A shell in the guest instead of tests; Ctrl-A X ends it.
    #[arg(long)]
    shell: bool,
    /// `probe`, or files of tests/tests, such as `survival`, or `pairs::idle` for those of its tests with such a name [default:
    /// a short set].
    #[arg(last = true, value_name = "TEST")]
    tests: Vec<String>,
}

/// The short set of tests on the oldest kernels.
pub(crate) fn short() -> Result<()> {
    vm(&Arguments {
        kernels: Vec::new(),
        all: false,
        update: false,
        debug: false,
        limit: 5,
        accelerator: Accelerator::Tcg,
        cards: false,
        shell: false,
        tests: Vec::new(),
    })
}

/// Runs tests on each of the kernels, for which everything is there ([`Need::Vm`](crate::setup::Need::Vm)), one after the other, and tells what failed.
pub(crate) fn vm(arguments: &Arguments) -> Result<()> {
    ensure!(
        env::consts::ARCH == "x86_64",
        "only machines of the kind x86_64 can run Debian's kernels for it"
    );
    let items = selection::select(&arguments.tests)?;
    let agent = agent(arguments.debug)?;
    let programs = if arguments.shell { Vec::new() } else { selection::build(&items)? };
    let defaults = KERNELS.map(str::to_owned);
    let wanted = match &*arguments.kernels {
        _ if arguments.all => Wanted::All,
        [] if arguments.shell => Wanted::Newest(&defaults[..1]),
        [] => Wanted::Newest(&defaults),
        kernels => Wanted::Newest(kernels),
    };
    let work = Work {
        items: &items,
        programs: &programs,
        agent: &agent,
        limit: Duration::from_secs(arguments.limit * 60),
        cards: arguments.cards,
        shell: arguments.shell,
    };
    let mut failures = Vec::new();
    let mut summary = Vec::new();
    for kernel in kernels::find(&wanted, arguments.update)? {
        let start = Instant::now();
        let folder = workspace::target_directory().join("vm").join(&kernel.version);
        let (outcomes, complaints) = run(&kernel, &work, &folder, arguments.accelerator)?;
        summary.push(format!("{} ({:.0?})", kernel.release(), start.elapsed()));
        summary.extend(outcomes.iter().map(|outcome| format!("  {outcome}")));
        let of_tests = outcomes.iter().filter_map(|outcome| {
            let why = outcome.verdict.as_ref().err()?;
            Some(format!("{}: {}: {why}; see {}", kernel.release(), outcome.name, outcome.log.display()))
        });
        failures.extend(of_tests);
        let console = console(&folder);
        failures.extend(complaints.into_iter().map(|line| {
            format!("{}: the kernel is broken: {line}; see {}", kernel.release(), console.display())
        }));
    }
    eprintln!("\n{}", summary.join("\n"));
    if !failures.is_empty() {
        bail!(
            "{} failed:\n{}\nthe consoles are below {}",
            failures.len(),
            failures.join("\n"),
            workspace::target_directory().join("vm").display()
        );
    }
    Ok(())
}

/// Runs the tests on one kernel. Yields what became of them, and how the kernel says that it is broken.
fn run(
    kernel: &Kernel,
    work: &Work<'_>,
    folder: &Path,
    accelerator: Accelerator,
) -> Result<(Vec<Outcome>, Vec<String>)> {
    eprintln!("\n== {}", kernel.release());
    let _ = fs::remove_dir_all(folder);
    let output = folder.join("output");
    fs::create_dir_all(&output).with_context(|| format!("creating {}", output.display()))?;
    let (initramfs, script) = (folder.join("initramfs"), folder.join("guest.sh"));
    initramfs::write(kernel, &initramfs)?;
    fs::write(&script, work.script(kernel)?).with_context(|| format!("writing {}", script.display()))?;
    let console = console(folder);
    let machine = Machine {
        accelerator,
        image: kernel.image(),
        initramfs,
        script,
        output: &output,
        console: console.clone(),
        cards: work.cards,
        shell: work.shell,
    };
    let mut shown = 0;
    let watch = || {
        for outcome in report::outcomes(work.items, &output).iter().skip(shown) {
            eprintln!("{}: {outcome}", kernel.version);
            if outcome.verdict.is_err() {
                eprintln!("{}", outcome.excerpt());
            }
            shown += 1;
        }
    };
    // The time that each may take is kept in the guest; this is for a guest that hangs.
    let count = u32::try_from(work.items.len()).unwrap_or(u32::MAX);
    let end = machine.run(work.limit.saturating_mul(count) + Duration::from_mins(1), watch)?;
    if work.shell {
        return Ok((Vec::new(), Vec::new()));
    }
    let said =
        fs::read(&console).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let complaints = report::complaints(&said).into_iter().map(str::to_owned).collect();
    Ok((report::all(work.items, &output, end, &console), complaints))
}

fn console(folder: &Path) -> PathBuf {
    folder.join("console.log")
}

/// The agent that tests start: the one that `FORWARDER_BIN` names, or a new one.
fn agent(debug: bool) -> Result<PathBuf> {
    if let Some(given) = env::var_os("FORWARDER_BIN").filter(|value| !value.is_empty()) {
        return fs::canonicalize(&given).with_context(|| format!("FORWARDER_BIN is {}", given.display()));
    }
    let profile = if debug { Profile::Dev } else { Profile::Release };
    ebpf::build_agent(profile, Some(&ebpf::build()?))
}
