//! The binary under test.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use std::{env, process};

use anyhow::{Context as _, Result, bail};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::attach;
use crate::evidence;
use crate::http::{self, Response};
use crate::metrics::Metrics;
use crate::netns::NetNs;
use crate::process::Process;
use crate::wait::{patient, wait_for, wait_until};

/// Where the admin interface listens by TCP, inside the agent's namespace.
pub const ADMIN: &str = "127.0.0.1:9902";
/// Where the BPF file system is mounted.
const BPFFS: &str = "/sys/fs/bpf";
/// How long the agent may take to start, to apply a change, or to answer.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// The binary: `FORWARDER_BIN`, or the newer of the release and the debug build of the workspace.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("FORWARDER_BIN") {
        return path.into();
    }
    let built = |profile: &str| {
        let path = target().join(profile).join("forwarder");
        Some((fs::metadata(&path).ok()?.modified().ok()?, path))
    };
    let newest = [built("release"), built("debug")].into_iter().flatten().max();
    newest.expect("no forwarder binary: run `cargo build -p forwarder-agent` or set FORWARDER_BIN").1
}

/// The agent with failpoints: `FORWARDER_STEPPED_BIN`, or the debug build of the workspace.
pub fn stepped_binary() -> PathBuf {
    if let Some(path) = env::var_os("FORWARDER_STEPPED_BIN") {
        return path.into();
    }
    let path = target().join("debug/forwarder-stepped");
    assert!(
        path.exists(),
        "no {}: run `cargo build -p forwarder-agent --no-default-features --features failpoints --bin forwarder-stepped`",
        path.display()
    );
    path
}

/// Where cargo builds.
fn target() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace.join("target"), PathBuf::from)
}

/// How to start an agent.
#[derive(Clone, Debug, Default)]
pub struct AgentCommand {
    /// A command that ends in running the one after it, such as `prlimit --nofile=256`.
    pub wrapper: Vec<OsString>,
    /// Arguments beside those that every agent gets.
    pub arguments: Vec<OsString>,
    /// Environment variables.
    pub environment: Vec<(&'static str, &'static str)>,
    /// Another binary than [`binary`] says.
    pub binary: Option<PathBuf>,
    /// Where it pins its maps; a folder of its own if `None`.
    pub pins: Option<Arc<PinDir>>,
    /// Where its admin interface listens by TCP; [`ADMIN`] if `None`.
    pub admin: Option<&'static str>,
    /// The socket of its admin interface; one in a folder of its own if `None`, since namespaces share the file system.
    pub admin_socket: Option<PathBuf>,
}

/// A folder on the BPF file system, removed with all that is pinned there when its last user is dropped.
#[derive(Debug)]
pub struct PinDir(PathBuf);

impl PinDir {
    fn unique() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("fwd-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(Path::new(BPFFS).join(name))
    }
}

impl Drop for PinDir {
    fn drop(&mut self) {
        // It may be gone, which is well.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl AgentCommand {
    /// An agent with further arguments.
    pub fn new(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(OsString::from).collect(), ..Self::default() }
    }

    /// Runs the agent through a command that ends in running the one after it.
    #[must_use]
    pub fn wrapped(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(OsString::from).collect();
        self
    }

    /// Runs another binary.
    #[must_use]
    pub fn with_binary(mut self, binary: PathBuf) -> Self {
        self.binary = Some(binary);
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn environment(mut self, name: &'static str, value: &'static str) -> Self {
        self.environment.push((name, value));
        self
    }

    /// Has its admin interface listen somewhere else: two agents of one namespace cannot both have [`ADMIN`].
    #[must_use]
    pub fn admin(mut self, address: &'static str) -> Self {
        self.admin = Some(address);
        self
    }

    /// Has the socket of its admin interface somewhere else.
    #[must_use]
    pub fn admin_socket(mut self, path: &Path) -> Self {
        self.admin_socket = Some(path.to_owned());
        self
    }

    /// Has the agent take over what `former` leaves pinned.
    #[must_use]
    pub fn succeeding(mut self, former: &Agent) -> Self {
        self.pins = Some(Arc::clone(&former.pins));
        self.admin = Some(former.admin);
        self
    }

    /// Starts the agent in `netns` and waits until its admin interface answers. It may not be ready then.
    pub fn spawn(&self, netns: &NetNs, manifests: &Path) -> Result<Agent> {
        self.spawn_on(netns, &[OsStr::new("--manifests"), manifests.as_os_str()])
    }

    /// The same with a source that these arguments name.
    pub fn spawn_on(&self, netns: &NetNs, source: &[&OsStr]) -> Result<Agent> {
        mount_bpffs()?;
        let folder = TempDir::with_prefix("forwarder-agent-")?;
        let pins = self.pins.clone().unwrap_or_else(|| Arc::new(PinDir::unique()));
        let mut words =
            self.wrapper.iter().cloned().chain([self.binary.clone().unwrap_or_else(binary).into_os_string()]);
        let mut command = Command::new(words.next().context("an empty command")?);
        command.args(words).arg("agent").args(source);
        let admin = self.admin.unwrap_or(ADMIN);
        let socket = self.admin_socket.clone().unwrap_or_else(|| folder.path().join("admin.sock"));
        command.args(["--admin", admin]).arg("--admin-socket").arg(&socket);
        command.arg("--pin-dir").arg(&pins.0).args(&self.arguments);
        command.envs(attach::environment()).envs(self.environment.iter().copied());
        let process = Process::start(netns, &mut command, &folder.path().join("log"))?;
        for path in ["/v1/connections", "/metrics"] {
            let socket = socket.clone();
            evidence::add(format!("{} {path}", socket.display()), move || {
                let response = http::get_by(&socket, path).ok()?;
                // A metric that is 0 tells nothing.
                let told = |line: &&str| !line.starts_with('#') && !line.ends_with(" 0");
                Some(response.body.lines().filter(told).collect::<Vec<_>>().join("\n"))
            });
        }
        let mut agent = Agent { process, netns: netns.clone(), pins, admin, socket, _folder: folder };
        let ended = wait_for(DEADLINE, || {
            if let Ok(Some(status)) = agent.process.try_wait() {
                return Some(Some(status));
            }
            // It is opened after the TCP port, if that can be had.
            http::get_by(&agent.socket, "/healthz")
                .is_ok_and(|response| response.status == 200)
                .then_some(None)
        });
        match ended {
            Some(None) => Ok(agent),
            Some(Some(status)) => bail!("the agent ended at its start: {status}\n{}", agent.log()),
            None => {
                bail!("the agent's /healthz did not answer within {:?}\n{}", patient(DEADLINE), agent.log())
            }
        }
    }

    /// Starts the agent in `netns` and waits until it is ready.
    pub fn start(&self, netns: &NetNs, manifests: &Path) -> Result<Agent> {
        let agent = self.spawn(netns, manifests)?;
        agent.wait_ready()?;
        Ok(agent)
    }
}

/// A running agent, killed when dropped. Its pins go with it, unless a successor has them.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    netns: NetNs,
    pins: Arc<PinDir>,
    admin: &'static str,
    socket: PathBuf,
    _folder: TempDir,
}

impl Agent {
    /// Starts an agent in `netns` and waits until it is ready.
    pub fn start(netns: &NetNs, manifests: &Path, arguments: &[&str]) -> Result<Self> {
        AgentCommand::new(arguments).start(netns, manifests)
    }

    /// Waits until every listener is bound.
    pub fn wait_ready(&self) -> Result<()> {
        let ready = wait_for(DEADLINE, || self.ready().ok().filter(|response| response.status == 200));
        if ready.is_none() {
            bail!("the agent is not ready after {DEADLINE:?}: {:?}\n{}", self.ready(), self.log());
        }
        Ok(())
    }

    /// Asks the admin interface by TCP.
    pub fn get(&self, path: &str) -> Result<Response> {
        http::get(&self.netns, self.admin.parse::<SocketAddr>()?, path)
    }

    /// Sends JSON to the admin interface by its socket.
    pub fn post(&self, path: &str, body: &str) -> Result<Response> {
        http::post_by(&self.socket, path, body)
    }

    /// The command line with these arguments, for this agent: to be run in its namespace.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.arg("60").arg(binary()).args(arguments);
        command.env("FORWARDER_ADMIN", self.admin).env("FORWARDER_ADMIN_SOCKET", &self.socket);
        command.env("FORWARDER_PIN_DIR", &self.pins.0);
        command
    }

    /// The socket of its admin interface.
    pub fn admin_socket(&self) -> &Path {
        &self.socket
    }

    /// The connections that it lists, those that match a query such as `?listener=default/gw/a`.
    pub fn connections(&self, query: &str) -> Result<Vec<Value>> {
        let response = self.get(&format!("/v1/connections{query}"))?;
        let list: Value = serde_json::from_str(&response.body)
            .with_context(|| format!("/v1/connections is not JSON: {}", response.body))?;
        list["connections"].as_array().cloned().context("a list without connections")
    }

    /// Asks whether it is ready.
    pub fn ready(&self) -> Result<Response> {
        self.get("/readyz")
    }

    /// Its metrics.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?.body))
    }

    /// How many connections it forwards now.
    pub fn active(&self) -> Result<i64> {
        Ok(self.metrics()?.sum("forwarder_connections_active", &[]))
    }

    /// Its state.
    pub fn state(&self) -> Result<Value> {
        let response = self.get("/v1/state")?;
        serde_json::from_str(&response.body)
            .with_context(|| format!("/v1/state is not JSON: {}", response.body))
    }

    /// The part of its state that is about a listener such as `default/gw/a`.
    pub fn listener(&self, name: &str) -> Result<Option<Value>> {
        let state = self.state()?;
        let listeners = state["listeners"].as_array().context("a state without listeners")?;
        Ok(listeners.iter().find(|listener| listener["listener"] == name).cloned())
    }

    /// The endpoints that a listener such as `default/gw/a` uses, by its state, over all backends.
    pub fn endpoints(&self, name: &str) -> Vec<SocketAddr> {
        let listener = self.listener(name).ok().flatten().unwrap_or_default();
        let backends = listener["backends"].as_array().cloned().unwrap_or_default();
        let mut endpoints: Vec<SocketAddr> = backends
            .iter()
            .flat_map(|backend| backend["endpoints"].as_array().cloned().unwrap_or_default())
            .filter_map(|endpoint| endpoint.as_str()?.parse().ok())
            .collect();
        endpoints.sort_unstable();
        endpoints
    }

    /// Waits until a listener uses exactly `endpoints`: then a change of the manifests has been applied.
    #[track_caller]
    pub fn wait_endpoints(&self, listener: &str, endpoints: &[SocketAddr]) {
        let mut want = endpoints.to_vec();
        want.sort_unstable();
        wait_until(&format!("{listener} uses {want:?}"), DEADLINE, || self.endpoints(listener) == want);
    }

    /// Waits until a listener is bound.
    #[track_caller]
    pub fn wait_bound(&self, listener: &str) {
        wait_until(&format!("{listener} is bound"), DEADLINE, || {
            self.listener(listener).is_ok_and(|state| state.is_some_and(|state| state["bound"] == true))
        });
    }

    /// Where its BPF maps are pinned.
    pub fn pin_dir(&self) -> &Path {
        &self.pins.0
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Its resident memory, in KiB.
    pub fn rss_kib(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()))?;
        let line =
            status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("a process without VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// How many file descriptors it has open.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.id()))?.count())
    }

    /// Asks it to end and to leave nothing behind.
    pub fn interrupt(&mut self) -> Result<()> {
        Ok(self.process.signal(Signal::INT)?)
    }

    /// Tells it that its terminal is gone, or that it is to read anew: SIGHUP.
    pub fn hang_up(&mut self) -> Result<()> {
        Ok(self.process.signal(Signal::HUP)?)
    }

    /// Asks it to drain and end.
    pub fn terminate(&mut self) -> Result<()> {
        Ok(self.process.signal(Signal::TERM)?)
    }

    /// Waits for its end.
    pub fn wait(&mut self, deadline: Duration) -> Option<ExitStatus> {
        self.process.wait(deadline)
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    /// Ends it at once, as a crash would.
    pub fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::KILL)?;
        self.process.wait(DEADLINE).context("the agent outlived SIGKILL")?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // The pins of a process that still runs could come back; it ends first. It may have ended already.
        let _ = self.kill();
    }
}

/// Mounts the BPF file system where the machine did not do so at its start.
fn mount_bpffs() -> Result<()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let _guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)) {
        return Ok(());
    }
    let mut command = Command::new("mount");
    command.args(["-t", "bpf", "-o", "mode=0700", "bpf", BPFFS]);
    crate::process::stdout(&mut command).map(drop)
}
