//! The node's network interfaces: which there are, what their packets begin with, and their addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use forwarder_common::packet::LinkLayer;
use futures_util::{FutureExt, StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::packet_route::link::{
    InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::{Handle, MulticastGroup, new_multicast_connection};
use tokio::sync::watch;

use forwarder_gateway::model::BindAddress;

/// How long to gather changes before the interfaces are listed once more: changes come in bursts. After the first one they are listed
/// at once: what arrives by an interface without programs is the stack's, which resets what it has no socket for.
const SETTLE: Duration = Duration::from_millis(50);

/// Kinds of messages (`linux/rtnetlink.h`) about what may have held a program.
const RTM_DELQDISC: u16 = 37;
const RTM_DELTFILTER: u16 = 45;

/// How long to wait after the kernel failed to list them.
const RETRY: Duration = Duration::from_secs(1);

/// What an interface is, as far as the programs care.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum InterfaceKind {
    /// `lo`: what the node sends to itself. Its packets begin with an Ethernet header.
    Loopback,
    /// A `dummy` interface: it receives nothing, its addresses are reached through other interfaces.
    Dummy,
    /// One whose packets begin with an Ethernet header.
    Ethernet,
    /// One whose packets begin with the IP header, such as those of tun and of wireguard.
    Ip,
    /// One that there is no program for, by its ARPHRD number.
    Unsupported(u16),
}

impl InterfaceKind {
    /// What its packets begin with, if there is a program for it.
    pub fn link_layer(self) -> Option<LinkLayer> {
        match self {
            Self::Loopback | Self::Dummy | Self::Ethernet => Some(LinkLayer::Ethernet),
            Self::Ip => Some(LinkLayer::Ip),
            Self::Unsupported(_) => None,
        }
    }
}

/// A network interface that is up, or has an address and may be soon.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: InterfaceKind,
    /// Its addresses, sorted.
    pub addresses: Vec<IpAddr>,
    /// The largest packet that it takes, in bytes from the IP header on.
    pub mtu: u32,
    /// Whether it is up.
    pub is_up: bool,
    /// Whether what it receives, the node does not route as received by it, as far as one can see: a port of a bridge or of a
    /// bond hands it on to that one, and a veth without an address is a Pod's, of which a node has hundreds, and used where a
    /// route leads there.
    pub is_inner: bool,
    /// Its Ethernet address, if it has one.
    pub hardware_address: Option<[u8; 6]>,
    /// What a program at XDP may make of its frames.
    pub xdp_frames: XdpFrames,
}

/// What a program at XDP may make of an interface's frames.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum XdpFrames {
    /// They are its own, and may be sent back by it.
    Own,
    /// The same of an end of a veth, but what is sent back (`XDP_TX`) lies there until something else comes, unless the other end has a program as well
    /// (`veth_xdp_flush`). What is redirected does not.
    OfVeth,
    /// The program cannot tell them from others': there are VLAN interfaces above, and a device may have taken their tags away, or it is a bond, on whose members
    /// programs run.
    Ambiguous,
}

/// The MTU of the interfaces that packets of hosts use, where these differ: the smallest one. A connection between two of
/// them can be joined only if neither end sends packets that are too large for the other.
pub fn smallest_mtu(interfaces: &[Interface]) -> Option<u32> {
    let mtus = || {
        interfaces
            .iter()
            .filter(|interface| {
                interface.is_up && !matches!(interface.kind, InterfaceKind::Loopback | InterfaceKind::Dummy)
            })
            .map(|interface| interface.mtu)
    };
    mtus().min().filter(|least| mtus().any(|mtu| mtu > *least))
}

/// The addresses by which the node is reached, but for those of `lo`, which every node has, and those that mean something on one link
/// only, of which each Pod's interface has one.
pub fn node_addresses(interfaces: &[Interface]) -> BTreeSet<IpAddr> {
    let is_of_link = |address: &IpAddr| match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let all = interfaces.iter().flat_map(|interface| interface.addresses.iter().copied());
    all.filter(|address| !address.is_loopback() && !is_of_link(address)).collect()
}

/// The interfaces through which connections to listeners on `bound` may arrive.
///
/// These are all that hold an address for a listener on every address, and for one on an address that `lo` or a dummy interface holds (but
/// for `127.0.0.1` and `::1`), which packets reach through any other. For a listener on another address, the interface that
/// holds it, and `lo` for the node's own connections.
pub fn wanted<'a>(interfaces: &'a [Interface], bound: &BTreeSet<BindAddress>) -> Vec<&'a Interface> {
    let any = bound.iter().any(|bound| match bound {
        BindAddress::Any => true,
        BindAddress::Ip(ip) => ip.is_unspecified(),
    });
    let is_bound = |address: &&IpAddr| bound.contains(&BindAddress::Ip(**address));
    let holds = |interface: &Interface| interface.addresses.iter().any(|address| is_bound(&address));
    let is_reached_through_others = |interface: &Interface| {
        matches!(interface.kind, InterfaceKind::Loopback | InterfaceKind::Dummy)
            && interface.addresses.iter().filter(is_bound).any(|address| !address.is_loopback())
    };
    if any || interfaces.iter().any(is_reached_through_others) {
        return interfaces.iter().filter(|interface| !interface.addresses.is_empty()).collect();
    }
    let held = interfaces.iter().any(holds);
    interfaces
        .iter()
        .filter(|interface| holds(interface) || held && interface.kind == InterfaceKind::Loopback)
        .collect()
}

/// The interfaces by which packets of a joined connection may arrive. Not only those by which its packets leave: answers
/// take whatever way the other end's routes name. The interfaces of Pods are asked for one by one, when a route leads there
/// (`paths.rs`).
pub fn arrivals(interfaces: &[Interface]) -> impl Iterator<Item = &Interface> {
    interfaces.iter().filter(|interface| {
        let is_of_hosts = match interface.kind {
            InterfaceKind::Loopback | InterfaceKind::Dummy => false,
            InterfaceKind::Ethernet | InterfaceKind::Ip => true,
            // Where there is no program for it, it is told, and nothing is sure any more: but only if it carries IP at all.
            InterfaceKind::Unsupported(_) => interface.is_up && !interface.addresses.is_empty(),
        };
        is_of_hosts && !interface.is_inner
    })
}

/// Why the interfaces cannot be listed or watched.
#[derive(Debug, thiserror::Error)]
pub enum InterfacesError {
    /// The socket to the kernel cannot be opened.
    #[error("cannot open a netlink socket: {source}")]
    Socket {
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel does not list them.
    #[error("cannot list the {what}: {source}")]
    List {
        /// What was to be listed.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: rtnetlink::Error,
    },
    /// The socket was closed: changes are no longer seen.
    #[error("the netlink socket was closed")]
    Closed,
}

/// Lists the interfaces that are up or have an address, sorted by index, and keeps the list current. Receivers are woken also when a queueing
/// discipline or a filter was removed somewhere. The future, to be spawned, ends when the socket fails or all receivers are gone. Needs a tokio runtime.
///
/// # Errors
/// The first list cannot be made.
pub async fn watch() -> Result<
    (watch::Receiver<Vec<Interface>>, impl Future<Output = Result<(), InterfacesError>> + Send + 'static),
    InterfacesError,
> {
    let groups =
        [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr, MulticastGroup::Tc];
    let (connection, handle, mut changes) =
        new_multicast_connection(&groups).map_err(|source| InterfacesError::Socket { source })?;
    // It ends when the handle is dropped.
    tokio::spawn(connection);
    let (sender, receiver) = watch::channel(list(&handle).await?);
    let follow = async move {
        loop {
            // Any message is a reason to list anew, the one that others were lost (ENOBUFS) too.
            let (change, _) = tokio::select! {
                change = changes.next() => change.ok_or(InterfacesError::Closed)?,
                () = sender.closed() => return Ok(()),
            };
            let is_removal = |kind| matches!(kind, RTM_DELQDISC | RTM_DELTFILTER);
            let mut has_removals = is_removal(change.header.message_type);
            for wait in [Duration::ZERO, SETTLE] {
                tokio::time::sleep(wait).await;
                let mut is_told = wait.is_zero();
                while let Some(Some((change, _))) = changes.next().now_or_never() {
                    has_removals |= is_removal(change.header.message_type);
                    is_told = true;
                }
                if !is_told {
                    continue;
                }
                let listed = loop {
                    match list(&handle).await {
                        Ok(listed) => break listed,
                        Err(error) => {
                            tracing::warn!(%error, "cannot list the node's interfaces; trying again");
                            tokio::time::sleep(RETRY).await;
                        }
                    }
                };
                sender.send_if_modified(|known| {
                    let differs = *known != listed;
                    *known = listed;
                    // The list is the same, but somebody may have removed a program: whoever attaches them is to look.
                    differs || std::mem::take(&mut has_removals)
                });
            }
        }
    };
    Ok((receiver, follow))
}

async fn list(handle: &Handle) -> Result<Vec<Interface>, InterfacesError> {
    let links: Vec<LinkMessage> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| InterfacesError::List { what: "network interfaces", source })?;
    let addresses: Vec<AddressMessage> = handle
        .address()
        .get()
        .execute()
        .try_collect()
        .await
        .map_err(|source| InterfacesError::List { what: "addresses of the node", source })?;
    Ok(assemble(&links, &addresses))
}

fn assemble(links: &[LinkMessage], addresses: &[AddressMessage]) -> Vec<Interface> {
    let mut held: BTreeMap<u32, BTreeSet<IpAddr>> = BTreeMap::new();
    for message in addresses {
        if let Some(address) = own_address(message) {
            held.entry(message.header.index).or_default().insert(address);
        }
    }
    let routers: BTreeSet<u32> =
        links.iter().filter(|link| is_vrf(link)).map(|link| link.header.index).collect();
    let trunks: BTreeSet<u32> = links.iter().filter_map(vlan_below).collect();
    let mut interfaces: Vec<_> = links
        .iter()
        .filter_map(|link| {
            let index = link.header.index;
            let addresses: Vec<_> = held.remove(&index).unwrap_or_default().into_iter().collect();
            let is_up = link.header.flags.contains(LinkFlags::Up);
            if !is_up && addresses.is_empty() {
                return None;
            }
            let is_port = link.attributes.iter().any(|attribute| match attribute {
                LinkAttribute::Controller(master) => !routers.contains(master),
                _ => false,
            });
            let is_veth = is_kind(link, |kind| *kind == InfoKind::Veth);
            let is_inner = is_port || addresses.iter().all(is_link_local) && is_veth;
            let mtu = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Mtu(mtu) => Some(*mtu),
                _ => None,
            })?;
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            })?;
            let hardware_address = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::Address(address) => address.as_slice().try_into().ok(),
                _ => None,
            });
            let xdp_frames = if trunks.contains(&index) || is_kind(link, |kind| *kind == InfoKind::Bond) {
                XdpFrames::Ambiguous
            } else if is_veth {
                XdpFrames::OfVeth
            } else {
                XdpFrames::Own
            };
            let kind = kind(link);
            Some(Interface {
                index,
                name,
                kind,
                addresses,
                mtu,
                is_up,
                is_inner,
                hardware_address,
                xdp_frames,
            })
        })
        .collect();
    interfaces.sort_by_key(|interface| interface.index);
    interfaces
}

/// The address that the message is about: of a point-to-point link, this end's.
fn own_address(message: &AddressMessage) -> Option<IpAddr> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    local.or_else(|| {
        message.attributes.iter().find_map(|attribute| match attribute {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        })
    })
}

/// Whether its driver is of such a kind.
fn is_kind(link: &LinkMessage, is_it: impl Fn(&InfoKind) -> bool) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => {
            infos.iter().any(|info| matches!(info, LinkInfo::Kind(kind) if is_it(kind)))
        }
        _ => false,
    })
}

/// The interface that a VLAN interface is one of.
fn vlan_below(link: &LinkMessage) -> Option<u32> {
    let below = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Link(index) => Some(*index),
        _ => None,
    });
    below.filter(|_| is_kind(link, |kind| *kind == InfoKind::Vlan))
}

/// The interfaces that belong to one keep what they receive (VRF).
fn is_vrf(link: &LinkMessage) -> bool {
    is_kind(link, |kind| *kind == InfoKind::Vrf)
}

/// Every interface has one of its own accord.
fn is_link_local(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn kind(link: &LinkMessage) -> InterfaceKind {
    let is_dummy = is_kind(link, |kind| *kind == InfoKind::Dummy);
    match link.header.link_layer_type {
        LinkLayerType::Loopback => InterfaceKind::Loopback,
        LinkLayerType::Ether if is_dummy => InterfaceKind::Dummy,
        LinkLayerType::Ether => InterfaceKind::Ethernet,
        // At ingress these have no header before the IP header: `skb->mac_len` is 0.
        LinkLayerType::None
        | LinkLayerType::Ppp
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit
        | LinkLayerType::Ipgre
        | LinkLayerType::Ip6gre => InterfaceKind::Ip,
        other => InterfaceKind::Unsupported(other.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(index: u32, kind: InterfaceKind, address: &str) -> Interface {
        let addresses = vec![address.parse().unwrap()];
        let name = format!("if{index}");
        Interface {
            index,
            name,
            kind,
            addresses,
            mtu: 1500,
            is_up: true,
            is_inner: false,
            hardware_address: None,
            xdp_frames: XdpFrames::Own,
        }
    }

    fn check(bound: &[BindAddress], expected: &[u32]) {
        let mut lo = interface(1, InterfaceKind::Loopback, "127.0.0.1");
        lo.addresses.push("10.0.0.1".parse().unwrap());
        let interfaces = [
            lo,
            interface(2, InterfaceKind::Ethernet, "192.0.2.1"),
            interface(3, InterfaceKind::Ip, "198.51.100.1"),
            interface(4, InterfaceKind::Dummy, "203.0.113.1"),
        ];
        let bound = bound.iter().copied().collect();
        let indices: Vec<_> = wanted(&interfaces, &bound).iter().map(|interface| interface.index).collect();
        assert_eq!(indices, expected, "{bound:?}");
    }

    fn ip(text: &str) -> BindAddress {
        BindAddress::Ip(text.parse().unwrap())
    }

    #[test]
    fn a_listener_on_every_address_wants_all_interfaces() {
        check(&[BindAddress::Any], &[1, 2, 3, 4]);
        check(&[ip("192.0.2.1"), BindAddress::Any], &[1, 2, 3, 4]);
        check(&[ip("0.0.0.0")], &[1, 2, 3, 4]);
    }

    #[test]
    fn a_listener_on_one_address_wants_its_interface_and_lo() {
        check(&[ip("127.0.0.1")], &[1]);
        check(&[ip("192.0.2.1")], &[1, 2]);
        check(&[ip("192.0.2.1"), ip("198.51.100.1")], &[1, 2, 3]);
    }

    #[test]
    fn an_address_that_no_packet_enters_through_wants_all_interfaces() {
        check(&[ip("203.0.113.1")], &[1, 2, 3, 4]);
        check(&[ip("10.0.0.1")], &[1, 2, 3, 4]);
    }

    #[test]
    fn nothing_is_wanted_for_no_listener_or_an_address_of_none() {
        check(&[], &[]);
        check(&[ip("192.0.2.99")], &[]);
    }

    #[test]
    fn packets_arrive_by_every_interface_of_hosts() {
        let bare = |index, kind| Interface { addresses: Vec::new(), ..interface(index, kind, "192.0.2.9") };
        let interfaces = [
            interface(1, InterfaceKind::Loopback, "127.0.0.1"),
            interface(2, InterfaceKind::Ethernet, "192.0.2.1"),
            interface(3, InterfaceKind::Dummy, "203.0.113.1"),
            bare(4, InterfaceKind::Ip),
            Interface { is_inner: true, ..bare(5, InterfaceKind::Ethernet) },
            interface(6, InterfaceKind::Unsupported(32), "192.0.2.2"),
            bare(7, InterfaceKind::Unsupported(280)),
        ];
        let indices: Vec<_> = arrivals(&interfaces).map(|interface| interface.index).collect();
        assert_eq!(indices, [2, 4, 6]);
    }

    #[test]
    fn the_smallest_mtu_matters_where_there_are_several() {
        let mut interfaces = [
            interface(1, InterfaceKind::Loopback, "127.0.0.1"),
            interface(2, InterfaceKind::Ethernet, "192.0.2.1"),
            interface(3, InterfaceKind::Ip, "198.51.100.1"),
        ];
        interfaces[0].mtu = 65_536;
        assert_eq!(smallest_mtu(&interfaces), None);
        interfaces[2].mtu = 1_400;
        assert_eq!(smallest_mtu(&interfaces), Some(1_400));
        interfaces[1].mtu = 1_400;
        assert_eq!(smallest_mtu(&interfaces), None);
        assert_eq!(smallest_mtu(&[]), None);
    }

    #[test]
    fn an_interface_without_an_address_is_not_a_listeners() {
        let mut bare = interface(2, InterfaceKind::Ethernet, "192.0.2.1");
        bare.addresses.clear();
        assert_eq!(wanted(&[bare], &BTreeSet::from([BindAddress::Any])), Vec::<&Interface>::new());
    }

    #[tokio::test]
    async fn lo_is_listed() {
        let (receiver, _follow) = watch().await.unwrap();
        // Where the tests run in an empty namespace, `lo` may be down and then is not listed.
        let listed = receiver.borrow().clone();
        for interface in listed.iter().filter(|interface| interface.kind == InterfaceKind::Loopback) {
            assert!(interface.addresses.iter().any(IpAddr::is_loopback), "{interface:?}");
        }
    }

    /// What the kernel tells of an interface that is up.
    fn link(index: u32, name: &str, attributes: &[LinkAttribute]) -> LinkMessage {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::Mtu(1500),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, index.to_le_bytes()[0]]),
        ];
        message.attributes.extend(attributes.iter().cloned());
        message
    }

    #[test]
    fn packets_of_trunks_and_bonds_cannot_be_told_from_others() {
        let of_kind = |kind| LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)]);
        let links = [
            link(2, "eth0", &[]),
            link(3, "eth1", &[]),
            link(4, "eth0.5", &[LinkAttribute::Link(2), of_kind(InfoKind::Vlan)]),
            // Its peer has an index there, which is another one's here.
            link(5, "veth0", &[LinkAttribute::Link(3), of_kind(InfoKind::Veth)]),
            link(6, "bond0", &[of_kind(InfoKind::Bond)]),
        ];
        let ambiguous: Vec<_> = assemble(&links, &[])
            .into_iter()
            .filter(|one| one.xdp_frames == XdpFrames::Ambiguous)
            .map(|one| one.name)
            .collect();
        assert_eq!(ambiguous, ["eth0", "bond0"]);
        assert_eq!(assemble(&links, &[])[0].hardware_address, Some([2, 0, 0, 0, 0, 2]));
    }
}
