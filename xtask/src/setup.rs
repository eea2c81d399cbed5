//! Finding and installing what building, running and testing take.
//!
//! Everything is a [`Part`] that can be found or installed. What cannot be installed says what to do, in one line.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{apiserver, keyring, linker, packages, process, toolchain, workspace};

/// What to prepare for.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Need {
    /// Building and running the agent.
    Run,
    /// The tests, and running.
    Test,
    /// Every check, and the tests.
    Ci,
    /// The benchmarks, and running.
    Bench,
    /// Tests inside other kernels, and running.
    Vm,
}

impl Need {
    fn parts(self) -> Vec<&'static Part> {
        let groups: &[&'static [Part]] = match self {
            Self::Run => &[&FOR_RUN],
            Self::Test => &[&FOR_RUN, &FOR_TEST, &FOR_KUBERNETES],
            Self::Ci => &[&FOR_RUN, &FOR_TEST, &FOR_KUBERNETES, &FOR_CI, &FOR_VM],
            Self::Bench => &[&FOR_RUN, &FOR_BENCH],
            Self::Vm => &[&FOR_RUN, &FOR_TEST, &FOR_VM],
        };
        groups.iter().copied().flatten().collect()
    }
}

/// Whether to change the system.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Mode {
    Check,
    Install,
}

/// How bad it is to go without a part.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Weight {
    Required,
    /// What needs it tells so itself.
    Advised,
    /// The same, but nothing is skipped where `CI` is set.
    RequiredInCi,
}

struct Part {
    name: &'static str,
    weight: Weight,
    /// Says where the part is, or what is missing.
    find: fn() -> Result<String>,
    install: fn() -> Result<()>,
}

static FOR_RUN: [Part; 3] = [
    Part {
        name: "eBPF toolchain",
        weight: Weight::Required,
        find: find_toolchain,
        install: install_toolchain,
    },
    Part {
        name: "programs to build with",
        weight: Weight::Required,
        find: || find_programs(&BUILD_PROGRAMS),
        install: || install_programs(&BUILD_PROGRAMS),
    },
    Part { name: "bpffs", weight: Weight::Advised, find: find_bpffs, install: mount_bpffs },
];

static FOR_TEST: [Part; 1] = [Part {
    name: "programs for tests",
    weight: Weight::Required,
    find: || find_programs(&TEST_PROGRAMS),
    install: || install_programs(&TEST_PROGRAMS),
}];

static FOR_KUBERNETES: [Part; 1] = [Part {
    name: "Kubernetes for tests",
    weight: Weight::RequiredInCi,
    find: apiserver::find,
    install: apiserver::install,
}];

/// Programs that virtual machines take, and the packages of Debian with them.
const VM_PROGRAMS: [(&str, &str); 7] = [
    ("busybox", "busybox-static"),
    ("depmod", "kmod"),
    ("dpkg-deb", "dpkg"),
    ("modprobe", "kmod"),
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
];

static FOR_VM: [Part; 2] = [
    Part {
        name: "programs for virtual machines",
        weight: Weight::Required,
        find: || find_programs(&VM_PROGRAMS),
        install: || install_programs(&VM_PROGRAMS),
    },
    Part { name: "keys of Debian", weight: Weight::Required, find: keyring::find, install: keyring::install },
];

static FOR_BENCH: [Part; 2] = [
    Part {
        name: "programs for benchmarks",
        weight: Weight::Required,
        find: || find_programs(&BENCH_PROGRAMS),
        install: || install_programs(&BENCH_PROGRAMS),
    },
    Part {
        name: "stream module of nginx",
        weight: Weight::Required,
        find: find_nginx_stream,
        install: || packages::install(&["libnginx-mod-stream".to_owned()]),
    },
];

static FOR_CI: [Part; 3] = [
    Part {
        name: "rustfmt and clippy",
        weight: Weight::Required,
        find: find_components,
        install: || rustup(&["rustfmt", "clippy"]),
    },
    Part {
        name: "clippy for eBPF",
        weight: Weight::Advised,
        find: find_ebpf_clippy,
        install: install_ebpf_clippy,
    },
    Part {
        name: "cargo-deny",
        weight: Weight::Required,
        find: || cargo_deny().map(|path| path.display().to_string()),
        install: install_cargo_deny,
    },
];

/// Programs that the tests start or read, and the packages of Debian with them.
const TEST_PROGRAMS: [(&str, &str); 17] = [
    ("bpftool", "bpftool"),
    ("ethtool", "ethtool"),
    ("haproxy", "haproxy"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("iptables", "iptables"),
    ("ipvsadm", "ipvsadm"),
    ("mariadb", "mariadb-client"),
    ("mariadb-dump", "mariadb-client"),
    ("mariadbd", "mariadb-server-core"),
    ("nft", "nftables"),
    ("postgres", "postgresql"),
    ("psql", "postgresql-client"),
    ("redis-benchmark", "redis-tools"),
    ("redis-server", "redis-server"),
    ("socat", "socat"),
    ("tcpdump", "tcpdump"),
];

/// What the build scripts of the agent's libraries run.
const BUILD_PROGRAMS: [(&str, &str); 2] = [("cc", "gcc"), ("make", "make")];

/// The same for the benchmarks.
const BENCH_PROGRAMS: [(&str, &str); 9] = [
    ("ethtool", "ethtool"),
    ("haproxy", "haproxy"),
    ("ip", "iproute2"),
    ("iperf3", "iperf3"),
    ("ipvsadm", "ipvsadm"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("sockperf", "sockperf"),
    ("wrk", "wrk"),
];

const CARGO_DENY_VERSION: &str = "0.20.2";
const MDBOOK_VERSION: &str = "0.5.4";

/// Finds every part, and installs the missing ones if `mode` says so.
pub(crate) fn setup(need: Need, mode: Mode) -> Result<()> {
    let mut missing = Vec::new();
    for part in need.parts() {
        let mut found = (part.find)();
        if let (Err(error), Mode::Install) = (&found, mode) {
            eprintln!("{} missing: {error:#}", part.name);
            found = (part.install)().and_then(|()| (part.find)());
        }
        let weight = match part.weight {
            Weight::RequiredInCi if env::var_os("CI").is_some() => Weight::Required,
            Weight::RequiredInCi => Weight::Advised,
            weight => weight,
        };
        match (found, mode, weight) {
            (Ok(place), _, _) => eprintln!("{}: {place}", part.name),
            (Err(error), Mode::Install, Weight::Advised) => eprintln!("warning: {}: {error:#}", part.name),
            (Err(error), Mode::Check, Weight::Advised) => eprintln!("{} missing: {error:#}", part.name),
            (Err(error), _, _) => missing.push(format!("{}: {error:#}", part.name)),
        }
    }
    if !missing.is_empty() {
        bail!("missing {}", missing.join("\nmissing "));
    }
    Ok(())
}

/// Where cargo-deny is.
pub(crate) fn cargo_deny() -> Result<PathBuf> {
    find_tool("cargo-deny")
}

/// Where mdBook is, which is installed if it is nowhere.
pub(crate) fn mdbook() -> Result<PathBuf> {
    find_tool("mdbook").or_else(|_| {
        install_tool("mdbook", MDBOOK_VERSION).context("put mdbook on PATH, or")?;
        find_tool("mdbook")
    })
}

/// Where a tool that cargo installs is: our own, or the one on the search path.
fn find_tool(name: &str) -> Result<PathBuf> {
    let own = workspace::tools_directory().join("bin").join(name);
    Some(own).filter(|path| path.is_file()).or_else(|| process::find(name)).context("not installed")
}

fn find_toolchain() -> Result<String> {
    let (compiler, linker) = toolchain::find()?;
    Ok(format!("{} (LLVM {}), {}", compiler.rustc.display(), compiler.version.llvm, linker.display()))
}

fn install_toolchain() -> Result<()> {
    if toolchain::candidates().0.is_empty()
        && let Err(error) = rustup(&["rust-src"])
    {
        eprintln!("{error:#}");
    }
    let llvm_to_link = || {
        let (compilers, _) = toolchain::candidates();
        compilers.iter().map(|compiler| compiler.version.llvm).find(|&llvm| {
            linker::llvm_prefix(llvm).is_some() || packages::is_available(&format!("llvm-{llvm}-dev"))
        })
    };
    let llvm = llvm_to_link().map_or_else(
        || {
            // A distribution's compiler comes with its sources, and with the LLVM that it was built with.
            packages::install(&["rustc-web".to_owned(), "rust-web-src".to_owned()])
                .context("run `rustup component add rust-src` and put a released bpf-linker on PATH, or")?;
            llvm_to_link().context("put a bpf-linker on PATH that reads the LLVM of your compiler")
        },
        Ok,
    )?;
    if linker::find(llvm).is_some() {
        return Ok(());
    }
    let wanted = packages::missing(linker::build_packages(llvm));
    let can_install = process::is_root() && process::find("apt-get").is_some();
    if !wanted.is_empty() && (can_install || linker::llvm_prefix(llvm).is_none()) {
        packages::install(&wanted).context("put a released bpf-linker on PATH, or")?;
    }
    let prefix = linker::llvm_prefix(llvm)
        .with_context(|| format!("LLVM_PREFIX names no development files of LLVM {llvm}"))?;
    linker::install(llvm, &prefix).map(drop)
}

/// Adds components to the current toolchain.
fn rustup(components: &[&str]) -> Result<()> {
    let mut command = Command::new("rustup");
    command.args(["component", "add"]).args(components);
    if process::find("rustup").is_none() {
        bail!("no rustup here: run `{}`, or install them otherwise", process::line(&command));
    }
    process::run_within(&mut command, Duration::from_mins(5)).context("check the network")
}

fn find_bpffs() -> Result<String> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    if !is_bpffs_mounted(&mounts) {
        bail!("not mounted on /sys/fs/bpf");
    }
    Ok("/sys/fs/bpf".to_owned())
}

fn is_bpffs_mounted(mounts: &str) -> bool {
    mounts.lines().any(|mount| {
        let mut fields = mount.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    })
}

fn mount_bpffs() -> Result<()> {
    if !process::is_root() {
        bail!("not root: run `sudo mount -t bpf -o mode=0700 bpf /sys/fs/bpf`");
    }
    process::run(Command::new("mount").args(["-t", "bpf", "-o", "mode=0700", "bpf", "/sys/fs/bpf"]))
}

fn find_programs(programs: &[(&'static str, &str)]) -> Result<String> {
    let missing: Vec<&str> =
        programs.iter().map(|&(program, _)| program).filter(|program| !is_program(program)).collect();
    if !missing.is_empty() {
        bail!("{}", missing.join(", "));
    }
    Ok("all there".to_owned())
}

fn install_programs(programs: &[(&str, &str)]) -> Result<()> {
    let mut wanted: Vec<String> = programs
        .iter()
        .filter(|(program, _)| !is_program(program))
        .map(|&(_, package)| package.to_owned())
        .collect();
    wanted.dedup();
    packages::install(&wanted)
}

/// The module stands in a file of its own, or is built into the program, which then tells so.
fn find_nginx_stream() -> Result<String> {
    const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";
    if Path::new(MODULE).is_file() {
        return Ok(MODULE.to_owned());
    }
    let nginx = process::find("nginx").context("no nginx")?;
    // It describes itself on its standard error.
    let output = Command::new(&nginx).arg("-V").output().context("running nginx -V")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !text.split_ascii_whitespace().any(|word| word == "--with-stream") {
        bail!("neither {MODULE} nor built into {}", nginx.display());
    }
    Ok(nginx.display().to_string())
}

fn is_program(program: &str) -> bool {
    process::find(program).is_some() || (program == "postgres" && has_versioned_postgres())
}

/// Debian keeps each version's servers in a directory of its own.
fn has_versioned_postgres() -> bool {
    fs::read_dir("/usr/lib/postgresql")
        .is_ok_and(|versions| versions.flatten().any(|version| version.path().join("bin/postgres").is_file()))
}

fn find_components() -> Result<String> {
    for component in ["fmt", "clippy"] {
        process::read(Command::new(workspace::cargo()).args([component, "--version"]))?;
    }
    Ok("all there".to_owned())
}

fn find_ebpf_clippy() -> Result<String> {
    let (compiler, _) = toolchain::find()?;
    let driver = compiler
        .sibling("clippy-driver")
        .with_context(|| format!("{} has no clippy", compiler.rustc.display()))?;
    Ok(driver.display().to_string())
}

fn install_ebpf_clippy() -> Result<()> {
    let (compiler, _) = toolchain::find()?;
    if compiler.rustc.starts_with("/usr/bin") {
        packages::install(&["rust-web-clippy".to_owned()])
    } else {
        let toolchain = compiler.rustc.ancestors().nth(2).and_then(Path::file_name).unwrap_or_default();
        let mut command = Command::new("rustup");
        command.args(["component", "add", "clippy", "--toolchain"]).arg(toolchain);
        process::run_within(&mut command, Duration::from_mins(5))
    }
}

fn install_cargo_deny() -> Result<()> {
    install_tool("cargo-deny", CARGO_DENY_VERSION)
}

fn install_tool(name: &str, version: &str) -> Result<()> {
    let mut command = Command::new(workspace::cargo());
    // Optimising it takes minutes more than running it.
    command
        .args(["install", name, "--version", version, "--locked", "--debug"])
        .args(["--no-default-features", "--root"])
        .arg(workspace::tools_directory())
        .current_dir(Path::new("/"));
    process::run_within(&mut command, Duration::from_mins(15))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bpffs_is_found_among_the_mounts() {
        assert!(is_bpffs_mounted("proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,relatime 0 0\n"));
        assert!(!is_bpffs_mounted("bpf /run/bpf bpf rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n"));
        assert!(!is_bpffs_mounted(""));
    }
}
