//! Starting and ending the servers.

use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

use super::api::{Api, Credentials};
use super::assets::{Program, program};
use super::audit;
use crate::netns::NetNs;
use crate::process::Process;
use crate::wait::wait_for;

/// The user who may do everything.
pub const ADMIN: &str = "admin";
/// How long a server may take to start.
const DEADLINE: Duration = Duration::from_mins(1);
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Admission plugins that wait for controllers or nodes which do not run here.
const DISABLED_PLUGINS: &str = "ServiceAccount,TaintNodesByCondition,Priority,StorageObjectInUseProtection";

/// A user who may do what RBAC grants, and nothing by itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct User {
    /// The name.
    pub name: String,
    /// The groups, beside `system:authenticated`.
    pub groups: Vec<String>,
}

impl User {
    /// A user without groups.
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned(), groups: Vec::new() }
    }
}

/// Where the servers run, and for whom.
#[derive(Clone, Debug)]
pub struct Options {
    /// The network namespace; that of the test itself if `None`.
    pub netns: Option<NetNs>,
    /// The address that the API server listens on, one of that namespace: others reach it there as the network allows.
    pub address: IpAddr,
    /// Users beside [`ADMIN`]. Service accounts need none: see [`Api::service_account_token`].
    pub users: Vec<User>,
    /// Further flags of kube-apiserver.
    pub flags: Vec<String>,
}

impl Default for Options {
    fn default() -> Self {
        Self { netns: None, address: LOOPBACK, users: Vec::new(), flags: Vec::new() }
    }
}

impl Options {
    /// Servers in `netns`, of which the API server listens on `address`.
    pub fn in_namespace(netns: &NetNs, address: IpAddr) -> Self {
        Self { netns: Some(netns.clone()), address, ..Self::default() }
    }
}

/// A running API server, with etcd behind it. Both are killed when it is dropped.
#[derive(Debug)]
pub struct ApiServer {
    /// `None` while it is stopped. Before etcd, so that it ends first.
    server: Option<Process>,
    _etcd: Process,
    options: Options,
    address: SocketAddr,
    etcd_port: u16,
    folder: TempDir,
}

impl ApiServer {
    /// Starts both on free ports of the loopback address, and waits until the API server is ready.
    pub fn start() -> Result<Self> {
        Self::start_with(Options::default())
    }

    /// The same with a choice of where, and for whom.
    pub fn start_with(mut options: Options) -> Result<Self> {
        let admin = User { name: ADMIN.to_owned(), groups: vec!["system:masters".to_owned()] };
        options.users.insert(0, admin);
        let folder = TempDir::with_prefix("forwarder-apiserver-")?;
        let netns = options.netns.as_ref();
        let etcd_port = free_port(netns, LOOPBACK)?;
        let address = SocketAddr::new(options.address, free_port(netns, options.address)?);
        let etcd = start_etcd(netns, etcd_port, &folder)?;
        let mut server = Self { server: None, _etcd: etcd, options, address, etcd_port, folder };
        server.write_users()?;
        fs::write(server.file("audit-policy.yaml"), audit::POLICY)?;
        server.restart()?;
        Ok(server)
    }

    /// Kills the API server, as the end of its machine would. Its address and its data stay.
    pub fn stop(&mut self) {
        self.server = None;
    }

    /// Starts the API server again, on the same address with the same data; kills it before if it runs.
    pub fn restart(&mut self) -> Result<()> {
        self.stop();
        let mut command = Command::new(program(Program::KubeApiserver)?);
        command.args(self.flags()).args(&self.options.flags);
        let log = self.file("kube-apiserver.log");
        let mut server = Process::start_in(self.options.netns.as_ref(), &mut command, &log)?;
        // Its certificates are there once it has started for the first time.
        await_start(&mut server, || self.api().is_ok_and(|api| api.get("/readyz").is_ok()))?;
        self.server = Some(server);
        Ok(())
    }

    /// Has the API server answer nothing, with all connections left open, until [`Self::resume`].
    pub fn pause(&mut self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Ends a [`Self::pause`].
    pub fn resume(&mut self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        Ok(self.server.as_mut().context("the API server is stopped")?.signal(signal)?)
    }

    /// Where the API server listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// The file with the certificate that signed the server's.
    pub fn authority(&self) -> PathBuf {
        self.file("certificates/apiserver.crt")
    }

    /// A client of the user who may do everything.
    pub fn api(&self) -> Result<Api> {
        self.api_as(ADMIN)
    }

    /// A client of one of the users that the server was started with.
    pub fn api_as(&self, user: &str) -> Result<Api> {
        self.api_with(&token(user))
    }

    /// A client of whoever the token belongs to.
    pub fn api_with(&self, token: &str) -> Result<Api> {
        let (address, authority) = (self.address, self.authority());
        let credentials = Credentials { address, authority, token: token.to_owned() };
        Api::new(self.options.netns.clone(), &credentials)
    }

    /// The kubeconfig of a user that the server was started with. It goes with the server.
    pub fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        self.kubeconfig_with(user, &token(user))
    }

    /// A kubeconfig with a token, such as that of a service account. `name` tells it from others.
    pub fn kubeconfig_with(&self, name: &str, token: &str) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "clusters": [
                {"name": "test", "cluster": {"server": self.url(), "certificate-authority": self.authority()}},
            ],
            "users": [{"name": name, "user": {"token": token}}],
        });
        let path = self.file(&format!("{}.kubeconfig", name.replace(['/', ':'], "-")));
        fs::write(&path, config.to_string())?;
        Ok(path)
    }

    /// Adds a user, which restarts the API server.
    pub fn add_user(&mut self, user: User) -> Result<()> {
        self.options.users.push(user);
        self.write_users()?;
        self.restart()
    }

    /// kubectl as a user that the server was started with, in the server's namespace; returns what it printed.
    pub fn kubectl(&self, user: &str, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program(Program::Kubectl)?);
        command.arg("--kubeconfig").arg(self.kubeconfig(user)?).arg("--request-timeout=30s").args(arguments);
        // Without a cache of discovery that other tests share.
        command.arg("--cache-dir").arg(self.file("kubectl-cache"));
        match &self.options.netns {
            Some(netns) => netns.stdout(&mut command),
            None => crate::process::stdout(&mut command),
        }
    }

    /// Every request so far that wrote, or tried to, in the order of their answers: the servers' own too.
    pub fn audit_writes(&self) -> Result<Vec<audit::Write>> {
        let path = self.file("audit.log");
        Ok(audit::parse(&fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?))
    }

    /// The end of what the API server printed since its last start.
    pub fn log(&self) -> String {
        self.server.as_ref().map(Process::tail).unwrap_or_default()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_users(&self) -> Result<()> {
        let mut lines = String::new();
        for User { name, groups } in &self.options.users {
            writeln!(lines, "{},{name},{name},\"{}\"", token(name), groups.join(","))?;
        }
        Ok(fs::write(self.file("tokens.csv"), lines)?)
    }

    fn flags(&self) -> Vec<String> {
        let path = |name: &str| self.file(name).display().to_string();
        // The server makes its certificate before it reads the key for tokens: one key is enough for both.
        let key = path("certificates/apiserver.key");
        let service_ips =
            if self.address.is_ipv6() { "fd96::/112,10.96.0.0/16" } else { "10.96.0.0/16,fd96::/112" };
        [
            ("etcd-servers", format!("http://{LOOPBACK}:{}", self.etcd_port)),
            ("bind-address", self.address.ip().to_string()),
            ("advertise-address", self.address.ip().to_string()),
            ("secure-port", self.address.port().to_string()),
            ("cert-dir", path("certificates")),
            ("token-auth-file", path("tokens.csv")),
            ("authorization-mode", "RBAC".to_owned()),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-account-key-file", key.clone()),
            ("service-account-signing-key-file", key),
            ("service-cluster-ip-range", service_ips.to_owned()),
            ("disable-admission-plugins", DISABLED_PLUGINS.to_owned()),
            ("audit-policy-file", path("audit-policy.yaml")),
            ("audit-log-path", path("audit.log")),
            // Nobody else is there whom requests could starve, and no node of which the address must be told.
            ("enable-priority-and-fairness", "false".to_owned()),
            ("endpoint-reconciler-type", "none".to_owned()),
            ("profiling", "false".to_owned()),
        ]
        .map(|(name, value)| format!("--{name}={value}"))
        .to_vec()
    }
}

fn token(user: &str) -> String {
    format!("token-of-{user}")
}

/// Starts etcd on the loopback address, and waits until it listens.
fn start_etcd(netns: Option<&NetNs>, port: u16, folder: &TempDir) -> Result<Process> {
    let client = format!("http://{LOOPBACK}:{port}");
    let peer = format!("http://{LOOPBACK}:{}", free_port(netns, LOOPBACK)?);
    let mut command = Command::new(program(Program::Etcd)?);
    command
        .arg("--data-dir")
        .arg(folder.path().join("etcd"))
        .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}"), "--log-level", "warn"])
        // The data need not outlive the machine.
        .args(["--unsafe-no-fsync", "--quota-backend-bytes", "268435456"]);
    let mut etcd = Process::start_in(netns, &mut command, &folder.path().join("etcd.log"))?;
    await_start(&mut etcd, || is_listening(netns, SocketAddr::new(LOOPBACK, port)))?;
    Ok(etcd)
}

/// Whether a server accepts connections at `address`.
fn is_listening(netns: Option<&NetNs>, address: SocketAddr) -> bool {
    let connect = || std::net::TcpStream::connect_timeout(&address, DEADLINE).is_ok();
    netns.map_or_else(connect, |netns| netns.run(connect))
}

/// Waits until a server is ready; fails with the end of its log if it ends or takes too long.
fn await_start(server: &mut Process, mut is_ready: impl FnMut() -> bool) -> Result<()> {
    let outcome = wait_for(DEADLINE, || match server.try_wait() {
        Ok(Some(status)) => Some(Err(status)),
        _ => is_ready().then_some(Ok(())),
    });
    match outcome {
        Some(Ok(())) => Ok(()),
        Some(Err(status)) => bail!("the server ended: {status}\n{}", server.tail()),
        None => bail!("the server is not ready within {DEADLINE:?}\n{}", server.tail()),
    }
}

/// A port that nobody listens on, and that no connection is given by chance while the server is stopped.
fn free_port(netns: Option<&NetNs>, address: IpAddr) -> Result<u16> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 20_000;
    /// The kernel gives out ports from 32768 on.
    const COUNT: u32 = 12_000;
    let start = std::process::id().wrapping_mul(97);
    for _ in 0..COUNT {
        let number = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT;
        let port = u16::try_from(FIRST + number)?;
        let bind = || TcpListener::bind((address, port)).is_ok();
        if netns.map_or_else(bind, |netns| netns.run(bind)) {
            return Ok(port);
        }
    }
    bail!("no free port on {address}: is it an address of the namespace?")
}
