//! `forwarder cleanup`: removes from the kernel what agents left there that did not end properly.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use forwarder_kernel::programs::cleanup::{self, CleanupError, Leftovers, Search};

#[derive(Args, Debug)]
pub(crate) struct CleanupArgs {
    /// Folder for pinned maps of the agents [default: search all mounted BPF file systems]
    #[arg(long, env = "FORWARDER_PIN_DIR", value_name = "DIR")]
    pin_dir: Option<PathBuf>,

    /// Remove what is found; without it, only list it
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let Some(pin_dir) = &args.pin_dir else {
        return Ok(clean_up_all(runtime.block_on(cleanup::search())?, args.yes));
    };
    let found = runtime.block_on(cleanup::find(pin_dir))?;
    if found.leftovers.is_empty() {
        println!("nothing is left behind: no pins in {}, no filters", pin_dir.display());
        return Ok(ExitCode::SUCCESS);
    }
    let is_done = if args.yes { remove(vec![found]) } else { list(&[found]) };
    Ok(if is_done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Lists or removes what was found in all pin directories but those of running agents.
fn clean_up_all(search: Search, is_removed: bool) -> ExitCode {
    let Search { mounts, pin_dirs, closed, orphans } = search;
    let (mut found, mut skipped, mut errors) = (Vec::new(), Vec::new(), closed);
    for (pin_dir, leftovers) in pin_dirs {
        match leftovers {
            Ok(leftovers) => found.push(leftovers),
            Err(CleanupError::InUse { .. }) => skipped.push(pin_dir),
            Err(error) => errors.push(error),
        }
    }
    let orphans = orphans.unwrap_or_else(|error| {
        errors.push(error);
        Vec::new()
    });
    let is_clean = found.is_empty() && orphans.is_empty() && errors.is_empty();
    let is_done = if is_removed { remove(found) } else { list(&found) };
    for pin_dir in &skipped {
        println!("skipped {}: an agent is running with this pin directory", pin_dir.display());
    }
    for orphan in &orphans {
        println!(
            "not removed: {orphan}: nothing that it uses is pinned on a BPF file system that is mounted here; either its agent runs, \
             in a container say, or somebody removed its pins: then detach it by its number, with `bpftool net` or `tc`"
        );
    }
    for error in &errors {
        eprintln!("error: {error}");
    }
    if is_clean && mounts.is_empty() {
        println!(
            "nothing is left behind: no BPF file system is mounted here, on which agents pin what outlives them"
        );
    } else if is_clean {
        let mounts: Vec<_> = mounts.iter().map(|mount| mount.display().to_string()).collect();
        println!(
            "nothing is left behind: no pins of agents that have ended on the BPF file systems at {}",
            mounts.join(", ")
        );
    }
    if is_done && errors.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Says what would be removed.
fn list(found: &[Leftovers]) -> bool {
    for Leftovers { leftovers, .. } in found {
        for leftover in leftovers {
            println!("would remove {leftover}");
        }
    }
    if !found.is_empty() {
        println!("run again with --yes to remove this");
    }
    true
}

/// Removes everything, and says so; tells whether all went well.
fn remove(found: Vec<Leftovers>) -> bool {
    // All is done before anything is printed, which may end the process.
    let mut removed = Vec::new();
    for found in found {
        removed.extend(found.leftovers.iter().map(|leftover| (leftover.to_string(), leftover.remove())));
        found.finish();
    }
    let mut is_done = true;
    for (leftover, result) in removed {
        match result {
            Ok(()) => println!("removed {leftover}"),
            Err(error) => {
                eprintln!("error: {error}");
                is_done = false;
            }
        }
    }
    is_done
}
