//! Settings of the agent: from flags, the environment and one YAML file, in this order of precedence.

mod admin;
mod defaults;
mod file;
mod kube;
mod listeners;
mod rules;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use forwarder_common::direct::MOST_DIRECT;
use forwarder_common::flow::{MOST_PAIRS, PAIRS_CAPACITY};
use ipnet::IpNet;
use serde::Deserialize;

use forwarder_gateway::allowed::{AllowedAddresses, AllowedPorts, Ports, Rule};
use forwarder_gateway::model::{Datapath, Egress, ListenerSettings, OnRemoval, Xdp};
use forwarder_gateway::problem::Location;
use forwarder_gateway::resolve::CONTROLLER_NAME;

pub use self::admin::{ADMIN, ADMIN_SOCKET, AdminAddress, AdminSettings, AdminSocketPath, GroupName};
pub use self::defaults::{
    DIRECT_CAPACITY, MOST_SYNS, OFFLOAD_AFTER, PIN_DIR, PORT_WAIT, SOCKMAP_MEMORY, SYN_COOKIES_ABOVE,
};
pub use self::kube::KubeOptions;
pub(crate) use self::rules::{check_clients, check_networks, check_rules, within};
use forwarder_kube::KubeSettings;
use forwarder_runtime::values::{BytesText, DurationText, OffloadAfter, SourcePorts};

/// Where settings come from; everything is optional, and what nobody sets has the default that its description names.
#[derive(Args, Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Options {
    /// File or folder of manifests (YAML or JSON): GatewayClass, Gateway, ListenerSet, TCPRoute, ReferenceGrant, Namespace,
    /// Service, EndpointSlice. Changes are followed.
    #[arg(long, env = "FORWARDER_MANIFESTS", value_name = "PATH")]
    pub manifests: Option<PathBuf>,

    /// Folder for the last good version of each object. An agent uses these at its start if a manifest has an error or the API server
    /// does not answer [default: none]
    #[arg(long, env = "FORWARDER_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,

    /// Settings for a Kubernetes API as the source.
    #[command(flatten)]
    pub kube: KubeOptions,

    /// TCP address of the admin endpoint (/healthz, /readyz, /metrics, /v1/...), read-only; `off` closes it
    /// [default: 127.0.0.1:9902]
    #[arg(long, env = "FORWARDER_ADMIN", value_name = "ADDR:PORT")]
    pub admin: Option<AdminAddress>,

    /// Host names allowed in requests to --admin, besides IP addresses and `localhost`; `*` allows any
    #[arg(long, env = "FORWARDER_ADMIN_HOSTS", value_name = "NAME", value_delimiter = ',')]
    pub admin_hosts: Vec<String>,

    /// Unix socket of the admin endpoint, for reads and changes, open to its owner only; `off` closes it
    /// [default: /run/forwarder/admin.sock]
    #[arg(long, env = "FORWARDER_ADMIN_SOCKET", value_name = "PATH")]
    pub admin_socket: Option<AdminSocketPath>,

    /// Group (name or GID) that may use the admin socket too [default: none]
    #[arg(long, env = "FORWARDER_ADMIN_SOCKET_GROUP", value_name = "GROUP")]
    pub admin_socket_group: Option<GroupName>,

    /// Serve Gateways whose GatewayClass names this controller [default: forwarder.dev/tcp]
    #[arg(long, env = "FORWARDER_CONTROLLER_NAME", value_name = "NAME")]
    pub controller_name: Option<String>,

    /// How data is forwarded, unless an annotation of the Gateway says otherwise [default: auto]
    #[arg(long, env = "FORWARDER_DATAPATH", value_enum)]
    pub datapath: Option<Datapath>,

    /// When a connection is offloaded to the kernel: after a number of bytes (`64KiB`), after a time (`500ms`), or whichever
    /// comes first (`64KiB,500ms`) [default: 64KiB,500ms]
    #[arg(long, env = "FORWARDER_OFFLOAD_AFTER", value_name = "BYTES,DURATION")]
    pub offload_after: Option<OffloadAfter>,

    /// How packets of offloaded connections leave the node [default: auto]
    #[arg(long, env = "FORWARDER_EGRESS", value_enum)]
    pub egress: Option<Egress>,

    /// Attach a program in the drivers of interfaces (XDP), where they can: drop SYNs of refused clients (--client-cidrs) before TC, and send packets
    /// of connections on. To attach may interrupt the interface for a moment [default: off]
    #[arg(long, env = "FORWARDER_XDP", value_enum)]
    pub xdp: Option<Xdp>,

    /// How many SYNs to listeners each CPU leaves to the listeners' sockets in a second; the eBPF programs answer further ones with SYN cookies, if the
    /// node makes such (`net.ipv4.tcp_syncookies`). 0 is off [default: 10000]
    #[arg(long, env = "FORWARDER_SYN_COOKIES_ABOVE", value_name = "N")]
    pub syn_cookies_above: Option<u32>,

    /// Maximum number of offloaded connections (up to 4,000,000); others stay in userspace [default: 262144]
    #[arg(long, env = "FORWARDER_MAX_PAIRS", value_name = "N")]
    pub max_pairs: Option<u32>,

    /// Maximum number of direct connections (up to 4,000,000), for which 700 bytes each are taken at once; others are accepted. 0 is none
    /// [default: 0, or 65536 with `--datapath direct`]
    #[arg(long, env = "FORWARDER_MAX_DIRECT", value_name = "N")]
    pub max_direct: Option<u32>,

    /// Maximum kernel memory for connections of tier `sockmap`; beyond it, connections stay in userspace
    /// [default: 256MiB]
    #[arg(long, env = "FORWARDER_SOCKMAP_MEMORY", value_name = "BYTES")]
    pub sockmap_memory: Option<BytesText>,

    /// Allow tier `sockmap` on kernels before 6.18, which may lose or repeat data [default: false]
    #[arg(
        long,
        env = "FORWARDER_SOCKMAP_UNSAFE_KERNEL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_name = "BOOL"
    )]
    pub sockmap_unsafe_kernel: Option<bool>,

    /// How long new connections wait for the next agent after this one has stopped, instead of being refused; 0 is off
    /// [default: 30s]
    #[arg(long, env = "FORWARDER_HOLD", value_name = "DURATION")]
    pub hold: Option<DurationText>,

    /// Folder on a BPF file system for pinned maps and programs [default: /sys/fs/bpf/forwarder]
    #[arg(long, env = "FORWARDER_PIN_DIR", value_name = "DIR")]
    pub pin_dir: Option<PathBuf>,

    /// Worker threads [default: one for each core]
    #[arg(long, env = "FORWARDER_WORKERS", value_name = "N")]
    pub workers: Option<usize>,

    /// Reset a connection after both directions were idle this long; 0 is off [default: 0]
    #[arg(long, env = "FORWARDER_IDLE_TIMEOUT", value_name = "DURATION")]
    pub idle_timeout: Option<DurationText>,

    /// Reset a connection of which one side has closed after this long without a byte; 0 is off [default: 15m]
    #[arg(long, env = "FORWARDER_HALF_CLOSED_TIMEOUT", value_name = "DURATION")]
    pub half_closed_timeout: Option<DurationText>,

    /// How long one attempt to connect to an endpoint may take [default: 3s]
    #[arg(long, env = "FORWARDER_CONNECT_TIMEOUT", value_name = "DURATION")]
    pub connect_timeout: Option<DurationText>,

    /// Idle time before TCP keepalive probes, on both sides; 0 is off [default: 1m]
    #[arg(long, env = "FORWARDER_KEEPALIVE", value_name = "DURATION")]
    pub keepalive: Option<DurationText>,

    /// How long connections may go on after SIGTERM; those left are reset during its last quarter [default: 30s]
    #[arg(long, env = "FORWARDER_DRAIN_TIMEOUT", value_name = "DURATION")]
    pub drain_timeout: Option<DurationText>,

    /// What happens to open connections if their listener, backend or endpoint is removed, unless an annotation of the Gateway
    /// says otherwise: `keep` lets them go on, `drain` resets them after --removal-drain unless the removed object comes back,
    /// `reset` resets them at once [default: keep]
    #[arg(long, env = "FORWARDER_ON_REMOVAL", value_enum)]
    pub on_removal: Option<OnRemoval>,

    /// How long `--on-removal drain` lets connections go on; those left are reset during its last quarter [default: 30s]
    #[arg(long, env = "FORWARDER_REMOVAL_DRAIN", value_name = "DURATION")]
    pub removal_drain: Option<DurationText>,

    /// Ports that listeners may not use, such as `!1-1023`, and exceptions, such as `443`. The narrowest range that contains a port
    /// decides; a port in no range is allowed [default: all]
    #[arg(long, env = "FORWARDER_LISTENER_PORTS", value_name = "PORTS", value_delimiter = ',')]
    #[serde(default)]
    pub listener_ports: Vec<Rule<Ports>>,

    /// Networks that endpoints may not be in, such as `!10.0.0.0/8`, and exceptions, such as `10.1.0.0/16`. The narrowest network
    /// that contains an address decides; an address in no network is allowed. With a Kubernetes API, loopback, link-local, multicast
    /// and IPv4-mapped networks are refused too, unless named as exceptions [default: all]
    #[arg(long, env = "FORWARDER_ENDPOINT_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    #[serde(default)]
    pub endpoint_cidrs: Vec<Rule<IpNet>>,

    /// Networks of clients that are not let in, such as `!203.0.113.0/24`, and exceptions, such as `203.0.113.7`. The narrowest network that
    /// contains an address decides; an address in no network is let in. An annotation of a Gateway can refuse more, not less [default: all
    /// are let in]
    #[arg(long, env = "FORWARDER_CLIENT_CIDRS", value_name = "CIDR", value_delimiter = ',')]
    #[serde(default)]
    pub client_cidrs: Vec<Rule<IpNet>>,

    /// How many new connections one client (of IPv6: one /64 network) may open at once, and in each second after, to each listener; 0 is any
    /// number. The eBPF programs drop the SYNs of further ones. An annotation of a Gateway can lower it [default: 0]
    #[arg(long, env = "FORWARDER_CLIENT_RATE", value_name = "N")]
    pub client_rate: Option<u32>,

    /// How long a port that another process used must be free before a listener takes it, so that a restarted daemon gets its
    /// port back [default: 10s]
    #[arg(long, env = "FORWARDER_PORT_WAIT", value_name = "DURATION")]
    pub port_wait: Option<DurationText>,

    /// Source addresses for connections to endpoints, used in turn; each allows about 32,000 per endpoint
    #[arg(long, env = "FORWARDER_SOURCE_ADDRESSES", value_name = "ADDR", value_delimiter = ',')]
    #[serde(default)]
    pub source_addresses: Vec<IpAddr>,

    /// Local ports for connections to endpoints that no other process of the node is given: a range, `auto` for those above
    /// `ip_local_port_range`, or `off`. If all are in use, the kernel chooses [default: auto]
    #[arg(long, env = "FORWARDER_SOURCE_PORTS", value_name = "PORTS")]
    pub source_ports: Option<SourcePorts>,
}

/// The settings of an agent, complete and valid.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the manifests come from.
    pub source: SourceSettings,
    /// Where the admin endpoint is.
    pub admin: AdminSettings,
    /// Whose GatewayClasses are served.
    pub controller_name: String,
    /// Where maps are pinned.
    pub pin_dir: PathBuf,
    /// How many workers.
    pub workers: usize,
    /// When connections are taken into the kernel.
    pub offload_after: OffloadAfter,
    /// How their packets leave the node.
    pub egress: Egress,
    /// Whether, and how, programs hang at XDP.
    pub xdp: Xdp,
    /// How many SYNs each CPU leaves to sockets in a second; 0 is all.
    pub syn_cookies_above: u32,
    /// How many connections the kernel may forward at once.
    pub max_pairs: u32,
    /// How many connections may be direct at once; 0 is none.
    pub max_direct: u32,
    /// How many bytes of memory the kernel may hold for connections of tier `sockmap`.
    pub sockmap_memory: u64,
    /// Whether tier `sockmap` may be had on a kernel that is not known to be right.
    pub sockmap_unsafe_kernel: bool,
    /// For how long after the agent's end new connections are held back.
    pub hold: Duration,
    /// What listeners have where their Gateway says nothing else.
    pub listener_defaults: ListenerSettings,
    /// TCP keepalive of both sides; `None` is off.
    pub keepalive: Option<Duration>,
    /// How long a drain may take.
    pub drain_timeout: Duration,
    /// Where upstream connections come from; empty leaves the choice to the kernel.
    pub source_addresses: Vec<IpAddr>,
    /// The local ports that only the agent connects from.
    pub source_ports: SourcePorts,
    /// Which ports listeners may take.
    pub listener_ports: AllowedPorts,
    /// Which addresses endpoints may have.
    pub endpoint_addresses: AllowedAddresses,
    /// How long a port that another process had must have been free before it is taken.
    pub port_wait: Duration,
}

/// Where the manifests come from.
#[derive(Clone, Debug)]
pub enum SourceSettings {
    /// A file or folder.
    Files {
        /// Its path.
        path: PathBuf,
        /// The folder in which the last good version of each object is kept for the next agent.
        state_dir: Option<PathBuf>,
    },
    /// A Kubernetes API.
    Kube(KubeSettings),
}

/// Settings that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// The settings file could not be read.
    #[error("cannot read settings file {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The settings file is not YAML, or has a wrong or unknown key.
    #[error("{place}: {message}")]
    Parse {
        /// The file and the line.
        place: Location,
        /// Which key or value, and what was expected.
        message: String,
    },
    /// A setting has a value that cannot be used.
    #[error("setting {setting} cannot be {value}: {remedy}")]
    Value {
        /// The setting.
        setting: &'static str,
        /// Its value.
        value: String,
        /// What to set instead.
        remedy: &'static str,
    },
    /// A setting that has no default is missing.
    #[error(
        "no source given: set --manifests PATH, FORWARDER_MANIFESTS or `manifests:` in the settings file for files, or \
         --kube, FORWARDER_KUBE or `kube: {{enabled: true}}` for a Kubernetes API"
    )]
    NoSource,
    /// Two settings exclude each other.
    #[error("there are two sources, the Kubernetes API (--kube) and {path} (--manifests): set one of them")]
    TwoSources {
        /// The file or folder.
        path: PathBuf,
    },
}

impl Options {
    /// Reads a settings file.
    ///
    /// # Errors
    /// It cannot be read, or is not valid; unknown keys are refused.
    pub fn from_file(path: &Path) -> Result<Self, SettingsError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| SettingsError::Read { path: path.to_owned(), source })?;
        if text.trim().is_empty() {
            return Ok(Self::default());
        }
        serde_saphyr::from_str(&text).map_err(|error| SettingsError::parse(path, &error))
    }

    /// What `self` sets, and what `other` sets where `self` does not.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            manifests: self.manifests.or(other.manifests),
            state_dir: self.state_dir.or(other.state_dir),
            kube: self.kube.or(other.kube),
            admin: self.admin.or(other.admin),
            admin_hosts: or_others(self.admin_hosts, other.admin_hosts),
            admin_socket: self.admin_socket.or(other.admin_socket),
            admin_socket_group: self.admin_socket_group.or(other.admin_socket_group),
            controller_name: self.controller_name.or(other.controller_name),
            datapath: self.datapath.or(other.datapath),
            offload_after: self.offload_after.or(other.offload_after),
            egress: self.egress.or(other.egress),
            xdp: self.xdp.or(other.xdp),
            syn_cookies_above: self.syn_cookies_above.or(other.syn_cookies_above),
            max_pairs: self.max_pairs.or(other.max_pairs),
            max_direct: self.max_direct.or(other.max_direct),
            sockmap_memory: self.sockmap_memory.or(other.sockmap_memory),
            sockmap_unsafe_kernel: self.sockmap_unsafe_kernel.or(other.sockmap_unsafe_kernel),
            hold: self.hold.or(other.hold),
            pin_dir: self.pin_dir.or(other.pin_dir),
            workers: self.workers.or(other.workers),
            idle_timeout: self.idle_timeout.or(other.idle_timeout),
            half_closed_timeout: self.half_closed_timeout.or(other.half_closed_timeout),
            connect_timeout: self.connect_timeout.or(other.connect_timeout),
            keepalive: self.keepalive.or(other.keepalive),
            drain_timeout: self.drain_timeout.or(other.drain_timeout),
            on_removal: self.on_removal.or(other.on_removal),
            removal_drain: self.removal_drain.or(other.removal_drain),
            listener_ports: or_others(self.listener_ports, other.listener_ports),
            endpoint_cidrs: or_others(self.endpoint_cidrs, other.endpoint_cidrs),
            client_cidrs: or_others(self.client_cidrs, other.client_cidrs),
            client_rate: self.client_rate.or(other.client_rate),
            port_wait: self.port_wait.or(other.port_wait),
            source_addresses: or_others(self.source_addresses, other.source_addresses),
            source_ports: self.source_ports.or(other.source_ports),
        }
    }

    /// The settings, with defaults for what is not set.
    ///
    /// # Errors
    /// A value that cannot be used, or no manifests.
    pub fn validate(self) -> Result<Settings, SettingsError> {
        let listener_defaults = self.listener_defaults()?;
        let workers = self
            .workers
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, std::num::NonZero::get));
        let workers = within("workers", workers, 1..=1024, "set 1 to 1024")?;
        let max_pairs = self.max_pairs.unwrap_or(PAIRS_CAPACITY);
        let max_pairs = within("max-pairs", max_pairs, 1..=MOST_PAIRS, "set 1 to 4000000")?;
        let is_direct = listener_defaults.datapath == Datapath::Direct;
        let max_direct = self.max_direct.unwrap_or(if is_direct { DIRECT_CAPACITY } else { 0 });
        let max_direct = within("max-direct", max_direct, 0..=MOST_DIRECT, "set 0 to 4000000")?;
        let syn_cookies_above = self.syn_cookies_above.unwrap_or(SYN_COOKIES_ABOVE);
        let syn_cookies_above =
            within("syn-cookies-above", syn_cookies_above, 0..=MOST_SYNS, "set 0 to 1000000")?;
        let controller_name = self.controller_name.unwrap_or_else(|| CONTROLLER_NAME.to_owned());
        if !controller_name.contains('/') {
            return Err(SettingsError::Value {
                setting: "controller-name",
                value: format!("`{controller_name}`"),
                remedy: "set a domain and a path, such as forwarder.dev/tcp",
            });
        }
        let state_dir = self.state_dir.or(self.kube.state_dir.clone());
        let source = match (self.manifests, self.kube.validate(state_dir.clone())?) {
            (Some(path), None) => SourceSettings::Files { state_dir: outside(state_dir, &path)?, path },
            (None, Some(kube)) => SourceSettings::Kube(kube),
            (Some(path), Some(_)) => return Err(SettingsError::TwoSources { path }),
            (None, None) => return Err(SettingsError::NoSource),
        };
        let listener_ports = AllowedPorts::new(self.listener_ports);
        let endpoint_addresses = match source {
            SourceSettings::Files { .. } => AllowedAddresses::new(self.endpoint_cidrs),
            SourceSettings::Kube(_) => AllowedAddresses::for_cluster(self.endpoint_cidrs),
        };
        check_rules(&listener_ports, &endpoint_addresses)?;
        Ok(Settings {
            source,
            admin: AdminSettings::new(
                self.admin,
                self.admin_hosts,
                self.admin_socket,
                self.admin_socket_group,
            )?,
            controller_name,
            pin_dir: self.pin_dir.unwrap_or_else(|| PathBuf::from(PIN_DIR)),
            workers,
            offload_after: self.offload_after.unwrap_or(OFFLOAD_AFTER),
            egress: self.egress.unwrap_or_default(),
            xdp: self.xdp.unwrap_or_default(),
            syn_cookies_above,
            max_pairs,
            max_direct,
            sockmap_memory: self.sockmap_memory.map_or(SOCKMAP_MEMORY, |text| text.0),
            sockmap_unsafe_kernel: self.sockmap_unsafe_kernel.unwrap_or_default(),
            hold: or_default(self.hold, Duration::from_secs(30)),
            listener_defaults,
            keepalive: off_if_zero(or_default(self.keepalive, Duration::from_mins(1))),
            drain_timeout: or_default(self.drain_timeout, Duration::from_secs(30)),
            source_addresses: self.source_addresses,
            source_ports: self.source_ports.unwrap_or_default(),
            listener_ports,
            endpoint_addresses,
            port_wait: or_default(self.port_wait, PORT_WAIT),
        })
    }
}

/// The folder of the state, which must not be read as a manifest itself.
fn outside(state_dir: Option<PathBuf>, manifests: &Path) -> Result<Option<PathBuf>, SettingsError> {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match state_dir {
        Some(folder) if absolute(&folder).starts_with(absolute(manifests)) => Err(SettingsError::Value {
            setting: "state-dir",
            value: folder.display().to_string(),
            remedy: "it is in the folder of the manifests, and would be read as one of them; set another folder",
        }),
        other => Ok(other),
    }
}

fn or_default(value: Option<DurationText>, default: Duration) -> Duration {
    value.map_or(default, |text| text.0)
}

/// The values of a list, or those of another where it is empty.
fn or_others<T>(values: Vec<T>, others: Vec<T>) -> Vec<T> {
    if values.is_empty() { others } else { values }
}

fn off_if_zero(duration: Duration) -> Option<Duration> {
    Some(duration).filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests;
