//! Installing packages of Debian and its relatives.

use std::process::Command;
use std::sync::Once;

use anyhow::{Context, Result, bail};

use crate::process;

/// Runs apt-get without starting or restarting any server that a package brings: the tests start their own, on ports of
/// their own. Leaves a policy that is already there alone.
const INSTALL: &str = r#"
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
apt-get -o DPkg::Lock::Timeout=120 install -y --no-install-recommends --no-remove "$@"
"#;

/// Those of the packages that are not installed; all of them where there is no dpkg.
pub(crate) fn missing(packages: Vec<String>) -> Vec<String> {
    let installed = |package: &String| {
        process::read(Command::new("dpkg-query").args(["-W", "-f", "${db:Status-Status}", package]))
            .is_ok_and(|status| status == "installed")
    };
    packages.into_iter().filter(|package| !installed(package)).collect()
}

/// Whether the distribution offers the package.
pub(crate) fn is_available(package: &str) -> bool {
    refresh();
    process::read(Command::new("apt-cache").args(["show", package])).is_ok()
}

/// The version that the distribution offers, without its epoch.
pub(crate) fn candidate(package: &str) -> Option<String> {
    refresh();
    let record =
        process::read(Command::new("apt-cache").args(["show", "--no-all-versions", package])).ok()?;
    let version = record.lines().find_map(|line| line.strip_prefix("Version: "))?;
    Some(version.split_once(':').map_or(version, |(_, version)| version).to_owned())
}

/// Installs the packages, or says in one line how to.
pub(crate) fn install(packages: &[String]) -> Result<()> {
    let names = packages.join(" ");
    if process::find("apt-get").is_none() {
        bail!("no apt-get here: install what Debian calls {names} by your system's package manager");
    }
    let remedy = format!("sudo apt-get update && sudo apt-get install -y --no-install-recommends {names}");
    if !process::is_root() {
        bail!("not root: run `{remedy}`");
    }
    refresh();
    eprintln!("Installing the packages {names}");
    // The shell, rather than this process, so that an interrupt removes the policy too.
    let status = Command::new("sh")
        .args(["-c", INSTALL, "apt-get"])
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .context("running apt-get")?;
    if !status.success() {
        bail!("apt-get failed, see above: check the network, then run `{remedy}`");
    }
    Ok(())
}

/// Fetches the lists of packages, once. A failure shows in what is then not available.
fn refresh() {
    static ONCE: Once = Once::new();
    if !process::is_root() || process::find("apt-get").is_none() {
        return;
    }
    ONCE.call_once(|| {
        let mut command = Command::new("apt-get");
        command.args(["-qq", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]).args([
            "-o",
            "DPkg::Lock::Timeout=120",
            "update",
        ]);
        if let Err(error) = process::run(&mut command) {
            eprintln!("warning: {error:#}");
        }
    });
}
