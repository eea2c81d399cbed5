//! The tests: unit tests, and the integration tests with the real binary in network namespaces.

use std::env;
use std::ffi::OsString;
use std::process::Command;

use anyhow::Result;

mod lanes;
pub(crate) mod programs;

use crate::setup::{Mode, Need, setup};
use crate::workspace::{self, Profile};
use crate::{apiserver, ebpf, process};

/// Installs what tests need, builds everything, and runs the tests that match; all of them two programs at a time.
pub(crate) fn test(package: Option<&str>, filters: &[OsString]) -> Result<()> {
    setup(Need::Test, Mode::Install)?;
    let objects = ebpf::build()?;
    // Integration tests put load on the agent: it is the one that users run.
    let agent = ebpf::build_agent(Profile::Release, Some(&objects))?;
    let stepped = match package {
        Some(_) => ebpf::build_stepped_agent(&objects)?,
        None => ebpf::stepped_agent(),
    };
    let prepare = |command: &mut Command| {
        command.env("FORWARDER_BIN", &agent).env("FORWARDER_STEPPED_BIN", &stepped);
        command.env(ebpf::OBJECTS_VARIABLE, &objects).envs(apiserver::environment());
        if process::is_root() || env::var_os("CI").is_some() {
            // Who can make network namespaces does not skip what needs them.
            command.env("REQUIRE_NETNS", "1");
        }
    };
    if package.is_none() && filters.is_empty() {
        return lanes::run(programs::build(&[])?, prepare);
    }
    let mut command = Command::new(workspace::cargo());
    command.arg("test").current_dir(workspace::root());
    match package {
        Some(package) => command.args(["--package", package, "--no-default-features"]),
        None => command.args(programs::WHOLE),
    };
    if !filters.is_empty() {
        command.arg("--").args(filters);
    }
    prepare(&mut command);
    process::run(&mut command)
}
