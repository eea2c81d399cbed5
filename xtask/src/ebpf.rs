//! Building the eBPF programs, and the agent that embeds them.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::toolchain::{self, Compiler};
use crate::workspace::{self, Profile};

/// The variable by which the agent's build script learns where the objects to embed are.
pub(crate) const OBJECTS_VARIABLE: &str = "FORWARDER_EBPF_OBJECTS";

/// The features of what is built to lint and to test: no allocator that takes minutes to build, and the steps at which
/// tests stop the agent. Always the same, so that nothing is built twice.
pub(crate) const DEV_FEATURES: [&str; 2] = ["--no-default-features", "--features=forwarder-agent/failpoints"];

const TARGET: &str = "bpfel-unknown-none";

/// Builds the eBPF programs and yields the folder of the objects.
pub(crate) fn build() -> Result<PathBuf> {
    let (compiler, linker) = tools()?;
    process::run(&mut cargo(&compiler, &linker, "build", &[])).with_context(|| {
        let llvm = compiler.version.llvm;
        format!("building with {} (LLVM {llvm}) and {}", compiler.rustc.display(), linker.display())
    })?;
    let objects = workspace::ebpf_objects();
    for name in ["forwarder", "sockmap"] {
        let object = objects.join(name);
        if !object.is_file() {
            bail!("the build left no {}", object.display());
        }
    }
    Ok(objects)
}

/// Lints the eBPF programs for their own target, which takes clippy of the very compiler.
pub(crate) fn clippy() -> Result<()> {
    let (compiler, linker) = tools()?;
    if let Some(driver) = compiler.sibling("clippy-driver") {
        // What `cargo clippy` does, which would take the driver of another toolchain.
        let mut command = cargo(&compiler, &linker, "check", &[]);
        command.env("RUSTC_WORKSPACE_WRAPPER", driver).env("CLIPPY_ARGS", "-Dwarnings__CLIPPY_HACKERY__");
        process::run(&mut command)
    } else {
        eprintln!("WARNING: {} has no clippy: compiler warnings only", compiler.rustc.display());
        process::run(&mut cargo(&compiler, &linker, "check", &["-Dwarnings"]))
    }
}

/// Builds the agent, with the objects of a folder embedded if there is one, and yields the binary.
pub(crate) fn build_agent(profile: Profile, objects: Option<&Path>) -> Result<PathBuf> {
    let mut command = Command::new(workspace::cargo());
    command.args(["build", "--package", "forwarder-agent"]).current_dir(workspace::root());
    match profile {
        Profile::Dev => {
            command.arg("--no-default-features");
        }
        Profile::Release => {
            command.arg("--release");
        }
    }
    if let Some(objects) = objects {
        command.env(OBJECTS_VARIABLE, objects);
    }
    process::run(&mut command)?;
    Ok(workspace::agent(profile))
}

/// Builds the agent that tests stop at steps, and yields the binary. Nobody else gets it.
pub(crate) fn build_stepped_agent(objects: &Path) -> Result<PathBuf> {
    let mut command = Command::new(workspace::cargo());
    command
        .args(["build", "--package", "forwarder-agent", "--bin", "forwarder-stepped"])
        .args(DEV_FEATURES)
        .current_dir(workspace::root())
        .env(OBJECTS_VARIABLE, objects);
    process::run(&mut command)?;
    Ok(stepped_agent())
}

/// The agent that tests stop at steps, which the build of all tests makes too.
pub(crate) fn stepped_agent() -> PathBuf {
    workspace::target_directory().join("debug/forwarder-stepped")
}

/// Builds the agent with optimisations and with the C library inside, and yields the binary: it runs in an empty folder.
///
/// The GNU C library will do, which every toolchain has: since version 2.34 it looks up names of hosts, by `/etc/hosts` and
/// DNS, without files of its own.
pub(crate) fn build_static_agent(objects: &Path) -> Result<PathBuf> {
    let target = workspace::static_target();
    let mut command = Command::new(workspace::cargo());
    // With a target, the flags are not those of build scripts and macros, which are no programs of their own.
    command
        .args(["build", "--package", "forwarder-agent", "--release", "--target", &target])
        .current_dir(workspace::root())
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo")
        .env(OBJECTS_VARIABLE, objects);
    process::run(&mut command)?;
    Ok(workspace::target_directory().join(target).join("release/forwarder"))
}

fn tools() -> Result<(Compiler, PathBuf)> {
    toolchain::find().context("cannot build eBPF programs; run `cargo xtask setup`")
}

fn cargo(compiler: &Compiler, linker: &Path, subcommand: &str, flags: &[&str]) -> Command {
    let flags: Vec<String> = [
        format!("-Clinker={}", linker.display()),
        // Programs and maps are described for the kernel, and for bpftool.
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        // Kernel structures that programs see, such as pt_regs, are those of the machine.
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
    ]
    .into_iter()
    .chain(flags.iter().copied().map(str::to_owned))
    .collect();

    let mut command = Command::new(compiler.cargo());
    command
        .args([subcommand, "--package", "forwarder-ebpf", "--release", "--target", TARGET])
        .args(["-Z", "build-std=core", "--target-dir"])
        .arg(workspace::ebpf_target_directory())
        .current_dir(workspace::root())
        .env("RUSTC", &compiler.rustc)
        // `-Z` is for nightly compilers, and for those that are told to be like one.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // bpf-linker optimises across crates itself.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env_remove("RUSTC_WRAPPER")
        .env_remove("RUSTC_WORKSPACE_WRAPPER");
    command
}
