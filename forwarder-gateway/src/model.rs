//! What the agent forwards: listeners, their route, its weighted backends, and the endpoints of these.
//!
//! Plain values, made by [`crate::resolve`], compared and ordered by [`crate::plan`].

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

use crate::allowed::AllowedAddresses;
use crate::manifests::{Kind, NamespacedName, ObjectRef};
use crate::problem::Reason;

/// The address that a listener is bound to.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum BindAddress {
    /// Every address of the node, IPv4 and IPv6.
    Any,
    /// One address.
    Ip(IpAddr),
}

impl BindAddress {
    /// Whether a socket on `self` and one on `other` with the same port exclude each other.
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::Any, _) | (_, Self::Any) => true,
            (Self::Ip(a), Self::Ip(b)) => a == b,
        }
    }
}

impl fmt::Display for BindAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Ip(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// The key of everything: the address and port of a listener. Never the backend's port and never the route's name.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ListenerKey {
    /// The address that it is bound to.
    pub address: BindAddress,
    /// Its port.
    pub port: NonZeroU16,
}

impl ListenerKey {
    /// The address to bind: the unspecified IPv6 address for [`BindAddress::Any`].
    pub fn socket_address(self) -> SocketAddr {
        let ip = match self.address {
            BindAddress::Any => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            BindAddress::Ip(ip) => ip,
        };
        SocketAddr::new(ip, self.port.get())
    }
}

impl fmt::Display for ListenerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.address, self.port)
    }
}

impl Serialize for ListenerKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The object that a listener stands in: what a route names as its parent.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum ListenerParent {
    /// A Gateway.
    #[serde(serialize_with = "name_text")]
    Gateway(NamespacedName),
    /// A ListenerSet.
    #[serde(serialize_with = "name_text")]
    ListenerSet(NamespacedName),
}

impl ListenerParent {
    /// The kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Gateway(_) => Kind::Gateway,
            Self::ListenerSet(_) => Kind::ListenerSet,
        }
    }

    /// The name.
    pub fn name(&self) -> &NamespacedName {
        match self {
            Self::Gateway(name) | Self::ListenerSet(name) => name,
        }
    }

    /// The object, for problems.
    pub fn object(&self) -> ObjectRef {
        ObjectRef::new(self.kind(), self.name())
    }
}

impl fmt::Display for ListenerParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.name())
    }
}

fn name_text<S: Serializer>(name: &NamespacedName, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(name)
}

/// The name of a listener: `namespace/gateway/listener`, or `listenerset/namespace/set/listener`. The parts have no slash,
/// so that the two never look the same.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct ListenerName {
    /// The object that it stands in.
    pub parent: ListenerParent,
    /// The listener in it.
    pub section: String,
}

impl fmt::Display for ListenerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = match self.parent {
            ListenerParent::Gateway(_) => "",
            ListenerParent::ListenerSet(_) => "listenerset/",
        };
        write!(f, "{prefix}{}/{}", self.parent.name(), self.section)
    }
}

/// How a connection's bytes are moved once both sides are connected.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Datapath {
    /// The fastest tier that works here.
    #[default]
    Auto,
    /// `splice(2)` for bulk data, read and write for the rest.
    Splice,
    /// Read and write only.
    Copy,
    /// Packets are translated and redirected by the kernel, once a connection has moved some bytes or lasted a while; until
    /// then, and where that cannot be done, as `splice`.
    Tc,
    /// What one socket receives the kernel sends by the other, from the same time on; until then, and where that cannot be
    /// done, as `splice`.
    Sockmap,
    /// The kernel chooses the endpoint at the client's SYN, and translates and redirects packets from then on: no socket of the node takes
    /// part, and its firewall sees none of it. Where that cannot be done, as `auto`.
    Direct,
}

impl Datapath {
    /// Its name on the command line and in metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Tc => "tc",
            Self::Sockmap => "sockmap",
            Self::Splice => "splice",
            Self::Copy => "copy",
            Self::Direct => "direct",
        }
    }
}

/// How packets that have been translated leave the node.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Egress {
    /// Redirected; where they do not arrive, by the stack.
    #[default]
    Auto,
    /// Straight from interface to interface.
    Redirect,
    /// As the stack forwards them, through netfilter: it has to be a router, and, over IPv4, to accept its own addresses as
    /// sources (`accept_local`).
    Stack,
}

/// Whether, and how, programs hang at XDP.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Xdp {
    /// Nowhere: TC drops what is to be dropped.
    #[default]
    Off,
    /// In the driver of each interface that can: drops what TC would drop.
    Drop,
    /// There too, and sends on packets of established connections. There is no `generic`, in the kernel's receive path: of packets that it copies for that, the
    /// programs at TC do not see the Ethernet header (ADR 24).
    Native,
}

impl Xdp {
    /// Its name in settings, and in what is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Drop => "drop",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What becomes of open connections whose listener, backend or endpoint is removed.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    Eq,
    Hash,
    Ord,
    PartialEq,
    PartialOrd,
    Serialize,
    serde::Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum OnRemoval {
    /// They go on until they end by themselves.
    #[default]
    Keep,
    /// They may end by themselves for a while, and are reset then, unless what was removed comes back.
    Drain,
    /// Both ends are reset at once.
    Reset,
}

impl OnRemoval {
    /// Its name on the command line and in annotations.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Drain => "drain",
            Self::Reset => "reset",
        }
    }
}

/// The most that [`ListenerSettings::client_rate`] may be.
pub const MOST_CLIENT_RATE: u32 = 1_000_000;

/// Settings of the connections that a listener accepts. `None` for a time-out means off.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ListenerSettings {
    /// How bytes are moved.
    pub datapath: Datapath,
    /// Which clients are let in.
    #[serde(skip_serializing_if = "is_empty")]
    pub client_cidrs: Arc<AllowedAddresses>,
    /// How many new connections one client may open in a second; `None` is any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_rate: Option<NonZeroU32>,
    /// After how long without a byte in either direction a connection is reset.
    #[serde(serialize_with = "duration_text")]
    pub idle_timeout: Option<Duration>,
    /// The same for a connection of which one direction has ended.
    #[serde(serialize_with = "duration_text")]
    pub half_closed_timeout: Option<Duration>,
    /// How long one attempt to connect to an endpoint may take.
    #[serde(serialize_with = "duration_text_always")]
    pub connect_timeout: Duration,
    /// What becomes of a connection whose listener, backend or endpoint is removed.
    pub on_removal: OnRemoval,
    /// For how long it may go on where `on_removal` is [`OnRemoval::Drain`].
    #[serde(serialize_with = "duration_text_always")]
    pub removal_drain: Duration,
}

impl Default for ListenerSettings {
    fn default() -> Self {
        Self {
            datapath: Datapath::default(),
            client_cidrs: Arc::default(),
            client_rate: None,
            idle_timeout: None,
            half_closed_timeout: Some(Duration::from_mins(15)),
            connect_timeout: Duration::from_secs(3),
            on_removal: OnRemoval::default(),
            removal_drain: Duration::from_secs(30),
        }
    }
}

impl ListenerSettings {
    /// For how long a connection may go on after its listener, backend or endpoint is removed; `None` is for ever.
    pub fn removal_window(&self) -> Option<Duration> {
        match self.on_removal {
            OnRemoval::Keep => None,
            OnRemoval::Drain => Some(self.removal_drain),
            OnRemoval::Reset => Some(Duration::ZERO),
        }
    }
}

fn is_empty(clients: &AllowedAddresses) -> bool {
    clients.is_empty()
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn duration_text<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(value.unwrap_or_default()))
}

fn duration_text_always<S: Serializer>(value: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_duration(*value))
}

/// One listener that is to be bound.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Listener {
    /// The listener of a Gateway or ListenerSet that asked for it.
    pub name: ListenerName,
    /// Settings of its connections.
    pub settings: ListenerSettings,
    /// The route that serves it; without one, connections are accepted and reset.
    pub route: Option<Route>,
}

/// The route that serves a listener: its first rule, which carries all traffic.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// The TCPRoute.
    pub name: NamespacedName,
    /// Its backends, in the order of the rule. Weights may all be zero: then connections are reset.
    pub backends: Vec<Backend>,
}

/// One weighted backend of a route.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Backend {
    /// Its share of new connections over the sum of weights; 0 to 1,000,000.
    pub weight: u32,
    /// Where the share goes.
    pub target: Target,
}

/// Where a backend's share of connections goes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Target {
    /// To the endpoints of a Service's port.
    Service(BackendKey),
    /// Nowhere: the share is reset, as the Gateway API demands.
    Invalid {
        /// The reference as it was written, such as `db/mysql:3306`.
        reference: String,
        /// Why it is invalid.
        reason: Reason,
        /// The sentence of the problem.
        message: String,
    },
}

impl Target {
    /// The Service's port, if the target is one.
    pub fn service(&self) -> Option<&BackendKey> {
        match self {
            Self::Service(key) => Some(key),
            Self::Invalid { .. } => None,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Service(key) => write!(f, "{key}"),
            Self::Invalid { reference, .. } => f.write_str(reference),
        }
    }
}

/// A port of a Service.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct BackendKey {
    /// The Service.
    pub service: NamespacedName,
    /// The Service's port (not the target port).
    pub port: NonZeroU16,
}

impl fmt::Display for BackendKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.service, self.port)
    }
}

/// The endpoints of a backend that take new connections: sorted and without duplicates.
pub type Endpoints = Arc<[SocketAddr]>;

/// Listeners by where they are bound.
pub type Listeners = BTreeMap<ListenerKey, Arc<Listener>>;

/// Everything that is to be forwarded.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct RouteTable {
    /// The listeners: shared by the tables, the plan between them, and who accepts.
    pub listeners: Listeners,
    /// The endpoints of every Service port that a listener's route refers to; an entry may be empty.
    pub backends: BTreeMap<BackendKey, Endpoints>,
}

impl RouteTable {
    /// Takes from `other` what is equal there, so that both hold it once.
    pub fn share(&mut self, other: &Self) {
        share(&mut self.listeners, &other.listeners);
        share(&mut self.backends, &other.backends);
    }

    /// The backends that the listeners' routes refer to.
    pub fn needed_backends(&self) -> BTreeSet<&BackendKey> {
        let routes = self.listeners.values().filter_map(|listener| listener.route.as_ref());
        let targets = routes.flat_map(|route| &route.backends).map(|backend| &backend.target);
        targets.filter_map(Target::service).collect()
    }
}

fn share<K: Ord, V: Clone + PartialEq>(ours: &mut BTreeMap<K, V>, theirs: &BTreeMap<K, V>) {
    for (key, value) in ours {
        if let Some(same) = theirs.get(key).filter(|other| *other == value) {
            value.clone_from(same);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_entries_of_two_tables_are_held_once() {
        let backend = |name| BackendKey { service: NamespacedName::new("db", name), port: NonZeroU16::MIN };
        let table = |last: u16| {
            let endpoints = |port| Arc::from([SocketAddr::from(([192, 0, 2, 1], port))]);
            let backends = [(backend("same"), endpoints(1)), (backend("other"), endpoints(last))];
            RouteTable { backends: backends.into(), ..RouteTable::default() }
        };
        let (before, mut after) = (table(2), table(3));
        after.share(&before);
        assert_eq!(after, table(3));
        let is_shared = |name| Arc::ptr_eq(&before.backends[&backend(name)], &after.backends[&backend(name)]);
        assert!(is_shared("same") && !is_shared("other"));
    }

    #[test]
    fn names_tell_listeners_of_gateways_and_listener_sets_apart() {
        let name = NamespacedName::new("db", "a");
        let text = |parent| ListenerName { parent, section: "mysql".to_owned() }.to_string();
        assert_eq!(text(ListenerParent::Gateway(name.clone())), "db/a/mysql");
        assert_eq!(text(ListenerParent::ListenerSet(name)), "listenerset/db/a/mysql");
    }
}
