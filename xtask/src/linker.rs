//! Finding and installing bpf-linker.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process;
use crate::workspace;

/// The version that `setup` installs, and the oldest that is used.
const VERSION: (u32, u32) = (0, 13);

/// The versions of LLVM that it can be built with.
pub(crate) const LLVM_MAJORS: [u32; 3] = [21, 22, 23];

/// Finds a bpf-linker that reads what LLVM `llvm` emits: our own, or one on the search path.
pub(crate) fn find(llvm: u32) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    std::iter::once(workspace::tools_directory().join("bin"))
        .chain(env::split_paths(&path))
        .map(|directory| directory.join("bpf-linker"))
        .find(|candidate| candidate.is_file() && is_usable(candidate, llvm))
}

/// Debian's packages that building it with LLVM `llvm` takes.
pub(crate) fn build_packages(llvm: u32) -> Vec<String> {
    vec![
        "g++".to_owned(),
        format!("llvm-{llvm}-dev"),
        format!("libpolly-{llvm}-dev"),
        "libzstd-dev".to_owned(),
        "zlib1g-dev".to_owned(),
    ]
}

/// Where LLVM's development files are, if they are installed.
pub(crate) fn llvm_prefix(llvm: u32) -> Option<PathBuf> {
    let prefix =
        env::var_os("LLVM_PREFIX").map_or_else(|| format!("/usr/lib/llvm-{llvm}").into(), PathBuf::from);
    Some(prefix).filter(|prefix| prefix.join("include/llvm-c/Core.h").is_file())
}

/// Builds it into our directory of tools.
pub(crate) fn install(llvm: u32, llvm_prefix: &Path) -> Result<PathBuf> {
    let tools = workspace::tools_directory();
    let (major, minor) = VERSION;
    let mut command = Command::new(workspace::cargo());
    command
        .args(["install", "bpf-linker", "--version", &format!("{major}.{minor}.0"), "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{llvm}"), "--root"])
        .arg(&tools)
        .env("LLVM_PREFIX", llvm_prefix);
    process::run_within(&mut command, Duration::from_mins(15))?;
    find(llvm).with_context(|| format!("the bpf-linker just built in {} does not run", tools.display()))
}

fn is_usable(linker: &Path, llvm: u32) -> bool {
    let Ok(version) = process::read(Command::new(linker).arg("--version")) else {
        return false;
    };
    parse_version(&version).is_some_and(|version| version >= VERSION)
        // A linker that cargo did not install, such as a released binary, does not tell.
        && recorded_llvm(linker).is_none_or(|built_for| built_for >= llvm)
}

/// The version of LLVM that the linker was built for, when `cargo install` recorded it.
fn recorded_llvm(linker: &Path) -> Option<u32> {
    let record = linker.parent()?.parent()?.join(".crates2.json");
    parse_record(&fs::read_to_string(record).ok()?)
}

/// Finds bpf-linker's feature `llvm-N` in cargo's record of installed crates.
fn parse_record(record: &str) -> Option<u32> {
    let (_, entry) = record.split_once(r#""bpf-linker "#)?;
    let (_, features) = entry.split_once(r#""features":["#)?;
    let (features, _) = features.split_once(']')?;
    features.split(',').find_map(|feature| feature.trim_matches('"').strip_prefix("llvm-")?.parse().ok())
}

fn parse_version(output: &str) -> Option<(u32, u32)> {
    let mut numbers = output.strip_prefix("bpf-linker ")?.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_the_linker_says() {
        assert_eq!(parse_version("bpf-linker 0.13.0"), Some((0, 13)));
        assert_eq!(parse_version("bpf-linker 0.9.15-dev"), Some((0, 9)));
        assert_eq!(parse_version("ld 2.40"), None);
    }

    #[test]
    fn the_llvm_version_is_read_from_the_record_of_cargo() {
        let record = r#"{"installs":{"other 1.0.0 (x)":{"features":["llvm-1"]},
            "bpf-linker 0.13.0 (x)":{"bins":["bpf-linker"],"features":["llvm-22","y"]}}}"#;
        assert_eq!(parse_record(record), Some(22));
        assert_eq!(parse_record(r#"{"bpf-linker 0.13.0 (x)":{"features":[]}}"#), None);
        assert_eq!(parse_record("{}"), None);
    }
}
