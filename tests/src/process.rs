//! A child process that ends with its owner and shows what it printed when the test fails.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::process::{Pid, Signal, kill_process};

pub use crate::command::stdout;
use crate::netns::NetNs;
use crate::wait::wait_for;

/// How much of a log is shown when a test fails.
const SHOWN_LINES: usize = 100;

/// A running program.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
    log: PathBuf,
}

impl Process {
    /// Starts `command` in `netns`; what it prints goes to `log`.
    pub fn start(netns: &NetNs, command: &mut Command, log: &Path) -> Result<Self> {
        Self::start_in(Some(netns), command, log)
    }

    /// The same; without a namespace, where the test itself runs.
    pub fn start_in(netns: Option<&NetNs>, command: &mut Command, log: &Path) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let output = File::create(log).with_context(|| format!("create {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let child = match netns {
            Some(netns) => netns.spawn(command),
            None => command.spawn(),
        };
        let child = child.with_context(|| format!("start {command:?}"))?;
        Ok(Self { child, name, log: log.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The end of that.
    pub fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(SHOWN_LINES)..).unwrap_or_default().join("\n")
    }

    /// Sends a signal; one that has ended already is left alone.
    pub fn signal(&mut self, signal: Signal) -> io::Result<()> {
        if self.child.try_wait()?.is_some() {
            return Ok(());
        }
        let pid =
            i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a child has a process id");
        Ok(kill_process(pid, signal)?)
    }

    /// How it ended, if it did.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end, for at most `deadline`.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        wait_for(deadline, || self.child.try_wait().ok().flatten())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ending a child that has ended already fails, and that is well.
        let _ = self.child.kill();
        let status = self.child.wait();
        if thread::panicking() {
            eprintln!("---- {} ended: {status:?}; the last lines:\n{}\n----", self.name, self.tail());
        }
    }
}
