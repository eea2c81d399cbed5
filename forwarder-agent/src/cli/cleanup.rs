//! `forwarder cleanup`: removes from the kernel what agents left there that did not end properly.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use crate::datapath::cleanup;
use crate::settings::PIN_DIR;

#[derive(Args, Debug)]
pub(crate) struct CleanupArgs {
    /// Folder in which agents pinned their maps
    #[arg(long, env = "FORWARDER_PIN_DIR", value_name = "DIR", default_value = PIN_DIR)]
    pin_dir: PathBuf,

    /// Remove; otherwise what would be removed is listed
    #[arg(long)]
    yes: bool,
}

pub(crate) fn run(args: &CleanupArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let found = runtime.block_on(cleanup::find(&args.pin_dir))?;
    if found.leftovers.is_empty() {
        println!("nothing is left behind: no pins in {}, no filters", args.pin_dir.display());
        return Ok(ExitCode::SUCCESS);
    }
    if !args.yes {
        for leftover in &found.leftovers {
            println!("would remove {leftover}");
        }
        println!("run again with --yes to remove this");
        return Ok(ExitCode::SUCCESS);
    }
    // All is done before anything is printed, which may end the process.
    let removed: Vec<_> =
        found.leftovers.iter().map(|leftover| (leftover.to_string(), leftover.remove())).collect();
    found.finish();
    let mut code = ExitCode::SUCCESS;
    for (leftover, result) in removed {
        match result {
            Ok(()) => println!("removed {leftover}"),
            Err(error) => {
                eprintln!("error: {error}");
                code = ExitCode::FAILURE;
            }
        }
    }
    Ok(code)
}
