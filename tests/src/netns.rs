//! Network namespaces, and the small network that most tests use.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context as _, Result};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command::stdout;
use crate::evidence;
use crate::wait::{patient, wait_for};

/// Where `ip netns` keeps its namespaces.
const NETNS_DIR: &str = "/run/netns";
/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Whether the process may create network namespaces. If not, says that the test is skipped, or fails it where
/// `REQUIRE_NETNS=1` demands that no test is skipped.
pub fn require_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        skip("root is needed");
    }
    is_root
}

/// Says that a test is skipped for what is missing, or fails it where `REQUIRE_NETNS=1` demands that no test is skipped.
pub fn skip(missing: &str) {
    let may_skip = env::var_os("REQUIRE_NETNS").is_none_or(|value| value != "1");
    assert!(may_skip, "{missing}, and REQUIRE_NETNS=1 forbids skipping");
    println!("skipped: {missing}");
}

/// A network namespace, removed when the last clone is dropped.
#[derive(Clone, Debug)]
pub struct NetNs {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    handle: File,
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nothing can be done about a failure here; the next run removes what is left.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

impl NetNs {
    /// A new namespace with its loopback interface up.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        static STALE: Once = Once::new();
        STALE.call_once(remove_stale);
        let name = format!("fwd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        ip(&["netns", "add", &name])?;
        let path = Path::new(NETNS_DIR).join(&name);
        let handle = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        let netns = Self { inner: Arc::new(Inner { name, handle }) };
        netns.ip(&["link", "set", "lo", "up"])?;
        for (what, program) in [("sockets", &["ss", "-tinmoH"]), ("counters", &["nstat", "-as"])] {
            let name = netns.name().to_owned();
            evidence::add(format!("{what} of {name}"), move || {
                let output = Command::new("ip").args(["netns", "exec", &name]).args(program).output().ok()?;
                output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
            });
        }
        Ok(netns)
    }

    /// Its name, as `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Runs `f` on a thread inside the namespace. Sockets that it makes, and threads and processes that it starts, stay
    /// in the namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let result = thread::scope(|scope| {
            scope
                .spawn(|| {
                    move_into_link_name_space(self.inner.handle.as_fd(), Some(LinkNameSpaceType::Network))
                        .expect("enter a network namespace that this process made");
                    f()
                })
                .join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Spawns `command` in the namespace. Only the network namespace differs: file systems stay visible.
    pub fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        self.run(|| command.spawn())
    }

    /// Runs `command` in the namespace and collects its output.
    pub fn output(&self, command: &mut Command) -> io::Result<Output> {
        self.run(|| command.output())
    }

    /// Runs `command` in the namespace and returns what it printed; fails if it failed.
    pub fn stdout(&self, command: &mut Command) -> Result<String> {
        self.run(|| stdout(command))
    }

    /// Listens on `address` in the namespace.
    pub fn bind(&self, address: SocketAddr) -> io::Result<TcpListener> {
        self.run(|| TcpListener::bind(address))
    }

    /// Connects to `address` from the namespace.
    pub fn connect(&self, address: SocketAddr) -> io::Result<TcpStream> {
        self.run(|| TcpStream::connect_timeout(&address, patient(CONNECT_TIMEOUT)))
    }

    /// Runs `ip` for the namespace.
    pub fn ip(&self, arguments: &[&str]) -> Result<()> {
        ip(&[&["-n", self.name()], arguments].concat())
    }

    /// Sets features of a device, as `ethtool -K` does.
    pub fn set_features(&self, device: &str, features: &[&str]) -> Result<()> {
        let mut command = Command::new("ethtool");
        let set = self.stdout(command.args(["-K", device]).args(features)).map(drop);
        set.context("it takes ethtool, which `cargo xtask setup --for ci` installs")
    }

    /// Sets a variable below `/proc/sys/net`, such as `ipv4/tcp_sack`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys/net").join(name);
        self.run(|| fs::write(&path, value)).with_context(|| format!("write {value} to {}", path.display()))
    }

    /// A counter of the namespace, such as `TCPToZeroWindowAdv` or `InSegs`, by `/proc/net/netstat` and `snmp`.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let table = self.run(|| {
            let tables = ["/proc/thread-self/net/netstat", "/proc/thread-self/net/snmp"];
            tables.into_iter().map(fs::read_to_string).collect::<Result<String, _>>()
        })?;
        let lines: Vec<&str> = table.lines().collect();
        let value = lines.iter().zip(lines.iter().skip(1)).find_map(|(names, values)| {
            let index = names.split(' ').position(|field| field == name)?;
            values.split(' ').nth(index)
        });
        Ok(value.with_context(|| format!("no counter {name}"))?.parse()?)
    }

    /// The inodes of the sockets that listen on `port`, by `/proc/net/tcp` and `tcp6`: the identity of a bound socket.
    pub fn listening_inodes(&self, port: u16) -> Vec<u64> {
        self.all_listening_inodes().remove(&port).unwrap_or_default()
    }

    /// The same of every port.
    pub fn all_listening_inodes(&self) -> BTreeMap<u16, Vec<u64>> {
        const LISTEN: &str = "0A";
        let tables = self.run(|| {
            ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
                .map(|path| fs::read_to_string(path).unwrap_or_default())
        });
        let mut inodes: BTreeMap<u16, Vec<u64>> = BTreeMap::new();
        for line in tables.iter().flat_map(|table| table.lines().skip(1)) {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [_, local, _, LISTEN, _, _, _, _, _, inode, ..] = fields[..] else { continue };
            let port = local.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
            if let (Some(port), Ok(inode)) = (port, inode.parse()) {
                inodes.entry(port).or_default().push(inode);
            }
        }
        for inodes in inodes.values_mut() {
            inodes.sort_unstable();
        }
        inodes
    }
}

/// Whether tests are told to go through programs at XDP: see [`Datapath`](crate::Datapath).
fn is_xdp_chosen() -> bool {
    env::var("FORWARDER_TEST_DATAPATHS").is_ok_and(|names| names.contains("+xdp"))
}

/// Runs `ip`.
fn ip(arguments: &[&str]) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(arguments);
    stdout(&mut command).map(drop)
}

/// Removes the namespaces of processes that ended without doing so.
fn remove_stale() {
    let Ok(entries) = fs::read_dir(NETNS_DIR) else {
        return;
    };
    for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
        let owner = name.strip_prefix("fwd-").and_then(|rest| rest.split_once('-')).map(|(pid, _)| pid);
        if owner.is_some_and(|pid| !PathBuf::from("/proc").join(pid).exists()) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
    }
}

/// A client, a node and two hosts of backends, each joined to the node by a veth pair.
///
/// | namespace | IPv4 | IPv6 |
/// |---|---|---|
/// | client | 10.0.1.2 | `fd00:1::2` |
/// | node | 10.0.1.1, 10.0.2.1, 10.0.3.1 | `fd00:1::1`, `fd00:2::1`, `fd00:3::1` |
/// | backend1 | 10.0.2.2 | `fd00:2::2` |
/// | backend2 | 10.0.3.2 | `fd00:3::2` |
#[derive(Clone, Debug)]
pub struct Topology {
    /// Where clients run.
    pub client: NetNs,
    /// Where the agent runs. It also routes between the others.
    pub node: NetNs,
    /// Where some endpoints run.
    pub backend1: NetNs,
    /// Where other endpoints run.
    pub backend2: NetNs,
}

impl Topology {
    /// Builds the network, of veth pairs, or of network cards where there are some for tests.
    pub fn new() -> Result<Self> {
        if env::var_os(CARDS).is_some() { Self::joined(cards) } else { Self::of_veth() }
    }

    /// Builds the network of veth pairs, for tests that are about those.
    pub fn of_veth() -> Result<Self> {
        Self::joined(veth)
    }

    /// Builds the network with devices that `join` makes: one in the node and one in a host, whose names it is given.
    pub fn joined(mut join: impl FnMut(&NetNs, &str, &NetNs, &str) -> Result<()>) -> Result<Self> {
        let topology = Self {
            client: NetNs::new()?,
            node: NetNs::new()?,
            backend1: NetNs::new()?,
            backend2: NetNs::new()?,
        };
        topology.node.sysctl("ipv4/ip_forward", "1")?;
        topology.node.sysctl("ipv6/conf/all/forwarding", "1")?;
        for (index, host) in
            [&topology.client, &topology.backend1, &topology.backend2].into_iter().enumerate()
        {
            let near = near(index + 1);
            join(&topology.node, &near, host, FAR)?;
            address(&topology.node, &near, host, index + 1)?;
        }
        if is_xdp_chosen() {
            topology.finish_checksums()?;
        }
        Ok(topology)
    }

    /// Has no host leave checksums to its device, and all of them gather packets (GRO), without which the end of a veth takes no frames from XDP.
    pub fn finish_checksums(&self) -> Result<()> {
        for host in [&self.client, &self.backend1, &self.backend2] {
            host.set_features(FAR, &["tx", "off", "gro", "on"])?;
        }
        Ok(())
    }

    /// Sets the MTU of both ends of network `index`, which leads to `host`.
    pub fn set_mtu(&self, index: usize, host: &NetNs, mtu: u16) -> Result<()> {
        let mtu = mtu.to_string();
        self.node.ip(&["link", "set", "dev", &near(index), "mtu", &mtu])?;
        host.ip(&["link", "set", "dev", FAR, "mtu", &mtu])
    }

    /// Removes the link between the node and the first host of backends, as the end of that host would.
    pub fn remove_backend1_link(&self) -> Result<()> {
        self.node.ip(&["link", "del", "veth2"])
    }

    /// Makes that link anew, with the same addresses.
    pub fn restore_backend1_link(&self) -> Result<()> {
        veth(&self.node, &near(2), &self.backend1, FAR)?;
        address(&self.node, &near(2), &self.backend1, 2)
    }

    /// Gives the first host of backends every address of 10.128.0.0/9: see [`Self::numbered_address`].
    pub fn add_numbered_addresses(&self) -> Result<()> {
        const NUMBERED: &str = "10.128.0.0/9";
        self.backend1.ip(&["route", "add", "local", NUMBERED, "dev", "lo"])?;
        self.node.ip(&["route", "add", NUMBERED, "via", &self.backend1_address(0).ip().to_string()])
    }

    /// One of the addresses that [`Self::add_numbered_addresses`] adds: for thousands of endpoints.
    pub fn numbered_address(&self, number: u32, port: u16) -> SocketAddr {
        let first = u32::from_be_bytes([10, 128, 0, 1]);
        SocketAddr::from((Ipv4Addr::from(first + number), port))
    }

    /// An address of the node, as seen from the client.
    pub fn node_address(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 1, 1], port))
    }

    /// The same in IPv6.
    pub fn node_address_v6(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([0xfd00, 1, 0, 0, 0, 0, 0, 1], port))
    }

    /// An address of the first host of backends.
    pub fn backend1_address(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 2, 2], port))
    }

    /// The same in IPv6.
    pub fn backend1_address_v6(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([0xfd00, 2, 0, 0, 0, 0, 0, 2], port))
    }

    /// An address of the second host of backends.
    pub fn backend2_address(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 3, 2], port))
    }

    /// The same in IPv6.
    pub fn backend2_address_v6(&self, port: u16) -> SocketAddr {
        SocketAddr::from(([0xfd00, 3, 0, 0, 0, 0, 0, 2], port))
    }
}

/// The device of a host.
pub const FAR: &str = "eth0";

/// The device of the node in network `index`: 1 is the client's, 2 and 3 are the backends'.
pub fn near(index: usize) -> String {
    format!("veth{index}")
}

/// Joins a device of the node and one of a host.
fn veth(node: &NetNs, near: &str, host: &NetNs, far: &str) -> Result<()> {
    node.ip(&["link", "add", near, "type", "veth", "peer", "name", far, "netns", host.name()])
}

/// Says that the machine has network cards for tests, each two of them on a wire: `cargo xtask vm --cards`.
const CARDS: &str = "FORWARDER_TEST_CARDS";
/// How long a card may take to come back from a namespace that has been removed.
const CARD_WAIT: Duration = Duration::from_secs(20);

/// Joins the node and a host by two network cards on a wire.
fn cards(node: &NetNs, near: &str, host: &NetNs, far: &str) -> Result<()> {
    let network = near.trim_start_matches(|letter: char| !letter.is_ascii_digit());
    for (end, netns, name) in [(1, node, near), (2, host, far)] {
        let address = format!("02:66:77:64:0{network}:0{end}");
        let card = wait_for(CARD_WAIT, || card(&address)).with_context(|| format!("no card {address}"))?;
        ip(&["link", "set", "dev", &card, "address", &address, "netns", netns.name(), "name", name])?;
    }
    Ok(())
}

/// The name of the device that was made with an Ethernet address, whichever it has now, if it is in the namespace of this process.
fn card(address: &str) -> Option<String> {
    let text = stdout(Command::new("ip").args(["-j", "link", "show"])).ok()?;
    let devices: Vec<serde_json::Value> = serde_json::from_str(&text).ok()?;
    let device = devices.into_iter().find(|device| {
        let own = device.get("permaddr").unwrap_or(&device["address"]);
        own == address
    })?;
    device["ifname"].as_str().map(str::to_owned)
}

/// Gives the devices that join `host` to `node` the addresses of network `index`.
fn address(node: &NetNs, near: &str, host: &NetNs, index: usize) -> Result<()> {
    for (netns, device, last) in [(node, near, 1), (host, FAR, 2)] {
        netns.ip(&["address", "add", &format!("10.0.{index}.{last}/24"), "dev", device])?;
        netns.ip(&["address", "add", &format!("fd00:{index}::{last}/64"), "dev", device, "nodad"])?;
        netns.ip(&["link", "set", device, "up"])?;
    }
    host.ip(&["route", "add", "default", "via", &format!("10.0.{index}.1")])?;
    host.ip(&["route", "add", "default", "via", &format!("fd00:{index}::1")])
}
