//! The programs with tests that cargo builds.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{ebpf, process, workspace};

/// A program with tests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Program {
    /// The name of its target: that of the file below `tests`, or of the crate whose unit tests it has.
    pub(crate) name: String,
    /// Whether it has integration tests, not a crate's unit tests.
    pub(crate) is_integration: bool,
    /// The folder of its package, in which its tests expect to run.
    pub(crate) folder: PathBuf,
    pub(crate) path: PathBuf,
}

/// What every build of tests selects, so that none builds anew what another one has built with other features.
pub(crate) const WHOLE: [&str; 5] =
    ["--workspace", "--exclude", "forwarder-ebpf", ebpf::DEV_FEATURES[0], ebpf::DEV_FEATURES[1]];

/// Builds the programs that `cargo test` of all crates with these arguments would run.
pub(crate) fn build(arguments: &[&str]) -> Result<Vec<Program>> {
    let mut command = Command::new(workspace::cargo());
    command.arg("test").args(WHOLE).args(arguments).arg("--no-run").current_dir(workspace::root());
    command.arg("--message-format=json-render-diagnostics");
    // Always the same, so that nothing is built anew.
    command.env(ebpf::OBJECTS_VARIABLE, workspace::ebpf_objects());
    eprintln!("$ {}", process::line(&command));
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("running cargo")?;
    ensure!(output.status.success(), "building the tests failed ({})", output.status);
    Ok(programs(&String::from_utf8_lossy(&output.stdout)))
}

/// The programs that cargo's messages name.
fn programs(messages: &str) -> Vec<Program> {
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let program = |message: Value| {
        let target = message.get("target")?;
        let is_test = message.get("profile")?.get("test")?.as_bool()?;
        is_test.then_some(Program {
            name: target.get("name")?.as_str()?.to_owned(),
            is_integration: target.get("kind")?.as_array()?.iter().any(|kind| kind == "test"),
            folder: Path::new(message.get("manifest_path")?.as_str()?).parent()?.to_owned(),
            path: message.get("executable")?.as_str()?.into(),
        })
    };
    messages.filter_map(program).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_read_from_the_messages_of_cargo() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","manifest_path":"/a/Cargo.toml","target":{"kind":["lib"],"name":"anyhow"},"#,
            r#""profile":{"test":false},"executable":null}"#,
            "\nnoise\n",
            r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"mtu"},"#,
            r#""profile":{"test":true},"executable":"/t/mtu-1"}"#,
            "\n",
            r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["bin"],"name":"bench"},"#,
            r#""profile":{"test":false},"executable":"/t/bench"}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        let mtu = Program {
            name: "mtu".to_owned(),
            is_integration: true,
            folder: "/w/tests".into(),
            path: "/t/mtu-1".into(),
        };
        assert_eq!(programs(messages), [mtu]);
    }
}
