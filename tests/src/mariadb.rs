//! MariaDB's own clients.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::netns::NetNs;

/// The longest that a client may run, in seconds: its own time-outs do not cover an answer that never comes.
const DEADLINE: &str = "120";

/// The MariaDB client, set up to speak to `address`.
fn client(program: &str, address: SocketAddr) -> Command {
    let mut command = Command::new("timeout");
    command.args([DEADLINE, program, "--no-defaults", "--user=test", "--protocol=TCP"]);
    command.arg("--max-allowed-packet=64M");
    command.arg(format!("--host={}", address.ip())).arg(format!("--port={}", address.port()));
    command
}

/// What the server answers to `sql`: values separated by tabs, without headers.
pub fn query(netns: &NetNs, address: SocketAddr, sql: &str) -> Result<String> {
    let mut command = client("mariadb", address);
    command
        .args(["--batch", "--skip-column-names", "--connect-timeout=10", "test"])
        .arg(format!("--execute={sql}"));
    Ok(netns.stdout(&mut command)?.trim().to_owned())
}

/// A client that stays connected.
#[derive(Debug)]
pub struct Session {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Session {
    /// Connects to the database `test`.
    pub fn open(netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let mut command = client("mariadb", address);
        // Without a reconnect, or a lost connection could go unnoticed.
        command.args(["--batch", "--skip-column-names", "--unbuffered", "--skip-reconnect", "test"]);
        let mut child = netns.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let input = child.stdin.take().context("a piped input")?;
        let output = BufReader::new(child.stdout.take().context("a piped output")?);
        Ok(Self { child, input, output })
    }

    /// Sends a statement and returns the one line of its answer.
    pub fn ask(&mut self, sql: &str) -> Result<String> {
        writeln!(self.input, "{sql};")?;
        self.input.flush()?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the session ended: {line:?}");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Dumps the table `source` and restores it as table `source` of the database `restored`, all through `address`.
pub fn dump_and_restore(netns: &NetNs, address: SocketAddr) -> Result<u64> {
    query(netns, address, "CREATE DATABASE restored")?;
    let mut dump = client("mariadb-dump", address);
    dump.args(["--hex-blob", "--skip-comments", "test", "source"]).stdout(Stdio::piped());
    let mut dump = netns.spawn(&mut dump)?;
    let mut restore = client("mariadb", address);
    restore.arg("restored").stdin(Stdio::piped());
    let mut restore = netns.spawn(&mut restore)?;
    let mut output = dump.stdout.take().context("a piped output")?;
    let mut input = restore.stdin.take().context("a piped input")?;
    let bytes = io::copy(&mut output, &mut input)?;
    drop(input);
    let (dumped, restored) = (dump.wait()?, restore.wait()?);
    ensure!(dumped.success() && restored.success(), "dump: {dumped}, restore: {restored}");
    let checksum = |table| query(netns, address, &format!("CHECKSUM TABLE {table}"));
    let (before, after) = (checksum("test.source")?, checksum("restored.source")?);
    let value = |line: &str| line.split('\t').nth(1).map(str::to_owned);
    ensure!(value(&before).is_some() && value(&before) == value(&after), "{before}; {after}");
    Ok(bytes)
}
