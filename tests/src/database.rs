//! Database servers of the distribution, each with its own data in a folder of its own.

use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tempfile::TempDir;

use crate::netns::{NetNs, skip};
use crate::process::{Process, stdout};
use crate::wait::wait_for;

/// How long a server may take to make its files or to start.
const DEADLINE: Duration = Duration::from_mins(1);

/// Whether `program` is installed. If not, says that the test is skipped, or fails it where `REQUIRE_NETNS=1` demands that no
/// test is skipped.
pub fn require_program(program: &str) -> bool {
    let found = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"]
        .iter()
        .any(|folder| Path::new(folder).join(program).exists());
    if !found {
        skip(&format!("{program} is not installed"));
    }
    found
}

/// A database server, ended and removed when dropped.
#[derive(Debug)]
pub struct Database {
    process: Process,
    _folder: TempDir,
}

impl Database {
    /// What it logged.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Waits until the server accepts connections at `address`.
    fn wait(mut self, netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let ended = wait_for(DEADLINE, || match self.process.try_wait() {
            Ok(Some(status)) => Some(Some(status)),
            Ok(None) | Err(_) => netns.connect(address).is_ok().then_some(None),
        });
        match ended {
            Some(None) => Ok(self),
            Some(Some(status)) => bail!("the server ended at its start: {status}\n{}", self.log()),
            None => bail!("no answer at {address}\n{}", self.log()),
        }
    }

    /// A MariaDB server with the user `test` (no password) and the database `test`.
    pub fn mariadb(netns: &NetNs, address: SocketAddr, server_id: u32) -> Result<Self> {
        let folder = TempDir::with_prefix("forwarder-mariadb-")?;
        let data = folder.path().join("data");
        // Each server empties the folder of temporary tables when it starts: a shared one would lose another server's.
        let temporary = folder.path().join("tmp");
        fs::create_dir(&temporary)?;
        let mut install = Command::new("mariadb-install-db");
        install.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal"]);
        install.args(["--skip-test-db", "--skip-log-bin"]).arg(flag("--datadir=", &data));
        install.arg(flag("--tmpdir=", &temporary));
        stdout(&mut install)?;
        let init = folder.path().join("init.sql");
        fs::write(
            &init,
            "CREATE DATABASE IF NOT EXISTS test;\n\
             CREATE USER IF NOT EXISTS 'test'@'%';\n\
             GRANT ALL ON *.* TO 'test'@'%';\n",
        )?;
        let mut server = Command::new("mariadbd");
        server.args(["--no-defaults", "--user=root", "--skip-log-bin", "--innodb-flush-log-at-trx-commit=0"]);
        server.args(["--skip-name-resolve", "--max-allowed-packet=64M", "--innodb-doublewrite=0"]);
        server.arg(format!("--server-id={server_id}")).arg(format!("--port={}", address.port()));
        server.arg(format!("--bind-address={}", address.ip())).arg(flag("--datadir=", &data));
        server.arg(flag("--tmpdir=", &temporary)).arg(flag("--init-file=", &init));
        server.arg(flag("--socket=", &folder.path().join("socket")));
        server.arg(flag("--pid-file=", &folder.path().join("pid")));
        let process = Process::start(netns, &mut server, &folder.path().join("log"))?;
        Self { process, _folder: folder }.wait(netns, address)
    }

    /// A PostgreSQL server that trusts everyone.
    pub fn postgresql(netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let folder = TempDir::with_prefix("forwarder-postgresql-")?;
        // PostgreSQL refuses to run as root.
        let mut own = Command::new("chown");
        own.arg("postgres").arg(folder.path());
        stdout(&mut own)?;
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700))?;
        let data = folder.path().join("data");
        let binaries = postgresql_binaries().context("PostgreSQL's server is not installed")?;
        let mut init = unprivileged("postgres", &binaries.join("initdb"));
        init.args(["--auth=trust", "--username=postgres", "--no-sync", "-D"]).arg(&data);
        init.current_dir(folder.path());
        stdout(&mut init)?;
        fs::write(data.join("pg_hba.conf"), "host all all all trust\n")?;
        let mut server = unprivileged("postgres", &binaries.join("postgres"));
        server.arg("-D").arg(&data).args(["-c", "fsync=off", "-c", "unix_socket_directories="]);
        server.arg("-c").arg(format!("listen_addresses={}", address.ip()));
        server.arg("-c").arg(format!("port={}", address.port())).current_dir(folder.path());
        let process = Process::start(netns, &mut server, &folder.path().join("log"))?;
        Self { process, _folder: folder }.wait(netns, address)
    }

    /// A Redis server.
    pub fn redis(netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let folder = TempDir::with_prefix("forwarder-redis-")?;
        let mut server = Command::new("redis-server");
        server.args(["--save", "", "--appendonly", "no", "--protected-mode", "no"]);
        server.arg("--bind").arg(address.ip().to_string()).arg("--port").arg(address.port().to_string());
        server.arg("--dir").arg(folder.path());
        let process = Process::start(netns, &mut server, &folder.path().join("log"))?;
        Self { process, _folder: folder }.wait(netns, address)
    }
}

/// The folder of the newest PostgreSQL server's programs.
pub fn postgresql_binaries() -> Option<PathBuf> {
    let versions = fs::read_dir("/usr/lib/postgresql").ok()?.flatten().map(|entry| entry.path().join("bin"));
    versions.filter(|folder| folder.join("initdb").exists()).max()
}

/// A command that runs `program` as `user`.
fn unprivileged(user: &str, program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.arg(format!("--reuid={user}")).arg(format!("--regid={user}")).arg("--init-groups").arg(program);
    command
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}
