//! Names, capacities, keys and values of the maps.
//!
//! Integers are in host byte order, ports too, so that `bpftool map dump` shows `9001`. Addresses are arrays of bytes in
//! network byte order.

use core::mem::{align_of, offset_of, size_of};

use crate::direct::{DIRECT, DIRECT_COUNTS, DIRECT_LINKS, DIRECT_SLOTS, DIRECT_STATES, DIRECT_TARGETS};
use crate::tuple::AddressBytes;

/// Hash of [`ListenerKey`] to [`ListenerValue`]. Written by the agent, read for each packet.
pub const LISTENERS: &str = "listeners";
/// Hash of [`BackendKey`] to [`BackendValue`]. Written by the agent for operators to read; no program reads it yet.
pub const BACKENDS: &str = "backends";
/// Per-CPU hash of a listener's id (`u32`) to [`ListenerCounters`]. The agent creates an entry, with zeros, before the
/// listener's; programs only add to it.
pub const COUNTERS: &str = "counters";
/// Hash of an address ([`AddressBytes`]) of the node to the index (`u32`) of the interface that holds it. A wildcard
/// listener counts what is sent to these addresses, not what is routed through.
pub const LOCAL_ADDRESSES: &str = "local_addresses";
/// Per-CPU array of how many packets (`u64`) met with each [`Verdict`](crate::Verdict), indexed by the verdict's number.
pub const VERDICTS: &str = "verdicts";

/// Hash of [`FourTuple`](crate::tuple::FourTuple) to [`Flow`](crate::flow::Flow): both directions of every pair.
pub const FLOWS: &str = "flows";
/// Hash of a pair's number (`u32`) to [`Pair`](crate::flow::Pair).
pub const PAIRS: &str = "pairs";

/// LPM trie of [`ClientNetwork`] to [`CLIENT_ALLOWED`] or [`CLIENT_DENIED`]: which clients listeners take. The longest prefix decides. Written by
/// the agent, read for each SYN to a listener that has [`ListenerValue::client_rules`].
pub const CLIENT_RULES: &str = "client_rules";

/// Array of one [`HoldState`].
pub const AGENT: &str = "agent";

/// Hash of an interface's index (`u32`) to 1, of those whose packets the stack takes whoever is expected behind them: IPv4's
/// `rp_filter` is not strict there. Of one that is not in it, programs take only flows that are expected by it.
pub const LOOSE_INTERFACES: &str = "loose_interfaces";
/// Entries that [`LOOSE_INTERFACES`] holds.
pub const LOOSE_INTERFACES_CAPACITY: u32 = 65_536;

/// Array by the index of an interface: its Ethernet address ([`XDP_ADDRESS`]) and [`XDP_TAKES`], if packets that come by it are sent on at XDP; otherwise 0. No agent
/// takes it over. So of the next two.
pub const XDP_INTERFACES: &str = "xdp_interfaces";
/// The bits of the address in a value of [`XDP_INTERFACES`].
pub const XDP_ADDRESS: u64 = (1 << 48) - 1;
/// In a value of [`XDP_INTERFACES`]: the interface takes what is sent back by it (`XDP_TX`). By others it may be redirected, as to any of [`XDP_TARGETS`].
pub const XDP_TAKES: u64 = 1 << 48;
/// Map of the interfaces that take frames from XDP, by their index (`u32`).
pub const XDP_TARGETS: &str = "xdp_targets";
/// Per-CPU array of the Ethernet addresses of neighbours. The programs' own.
pub const XDP_NEIGHBOURS: &str = "xdp_neighbours";
/// Entries that [`XDP_INTERFACES`] holds, where packets are sent on at XDP.
pub const XDP_INTERFACES_CAPACITY: u32 = 65_536;
/// Entries that [`XDP_TARGETS`] holds there.
pub const XDP_TARGETS_CAPACITY: u32 = 4_096;
/// Entries that [`XDP_NEIGHBOURS`] holds there: so many bits tell them apart.
pub const XDP_NEIGHBOURS_BITS: u32 = 10;

/// A map that is pinned: operators look at it, and a later agent takes it over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PinnedMap {
    /// Its name.
    pub name: &'static str,
    /// The version of its key and value, and of what they mean: each change of them raises it. An agent takes over no map of another
    /// version.
    pub version: u32,
}

/// The maps that are pinned, each as `v{version}/{name}` below the pin directory.
pub const PINNED_MAPS: [PinnedMap; 15] = [
    PinnedMap { name: LISTENERS, version: 5 },
    PinnedMap { name: BACKENDS, version: 4 },
    PinnedMap { name: COUNTERS, version: 5 },
    PinnedMap { name: LOCAL_ADDRESSES, version: 4 },
    PinnedMap { name: CLIENT_RULES, version: 1 },
    PinnedMap { name: VERDICTS, version: 6 },
    PinnedMap { name: FLOWS, version: FLOWS_VERSION },
    PinnedMap { name: PAIRS, version: FLOWS_VERSION },
    PinnedMap { name: AGENT, version: 4 },
    PinnedMap { name: DIRECT, version: DIRECT_VERSION },
    PinnedMap { name: DIRECT_SLOTS, version: DIRECT_VERSION },
    PinnedMap { name: DIRECT_STATES, version: DIRECT_VERSION },
    PinnedMap { name: DIRECT_TARGETS, version: DIRECT_VERSION },
    PinnedMap { name: DIRECT_LINKS, version: DIRECT_VERSION },
    PinnedMap { name: DIRECT_COUNTS, version: DIRECT_VERSION },
];

/// The version of the maps of direct connections.
const DIRECT_VERSION: u32 = 6;

/// The version of [`FLOWS`] and [`PAIRS`], neither of which means anything without the other.
const FLOWS_VERSION: u32 = 4;

/// The version of what else is pinned, below `v{PROGRAMS_VERSION}`: what holds programs on interfaces, and the programs that change
/// entries in place.
pub const PROGRAMS_VERSION: u32 = 4;

/// Entries that [`LISTENERS`] and [`COUNTERS`] hold.
pub const LISTENERS_CAPACITY: u32 = 65_536;
/// Entries that [`BACKENDS`] holds.
pub const BACKENDS_CAPACITY: u32 = 262_144;
/// Entries that [`VERDICTS`] holds: more than there are verdicts, so that a new one changes no map.
pub const VERDICTS_CAPACITY: u32 = 64;
/// Entries that [`LOCAL_ADDRESSES`] holds.
pub const LOCAL_ADDRESSES_CAPACITY: u32 = 4_096;

/// Entries that [`CLIENT_RULES`] holds.
pub const CLIENT_RULES_CAPACITY: u32 = 262_144;

/// Value of [`CLIENT_RULES`]: clients of the network are not let in.
pub const CLIENT_DENIED: u32 = 0;
/// Value of [`CLIENT_RULES`]: they are, though those of a wider network are not.
pub const CLIENT_ALLOWED: u32 = 1;

/// The address of a listener that is bound to every address of the node.
pub const ANY_ADDRESS: AddressBytes = [0; 16];

/// [`ListenerValue::state`]: there is no listener any more; the entry waits for its removal.
pub const STATE_REMOVED: u32 = 0;
/// [`ListenerValue::state`]: the listener's socket accepts.
pub const STATE_READY: u32 = 1;
/// [`ListenerValue::state`]: it accepts no more; its connections live on.
pub const STATE_DRAINING: u32 = 2;

/// Key of [`LISTENERS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ListenerKey {
    /// The address, in network byte order; [`ANY_ADDRESS`] for every address of the node.
    pub address: AddressBytes,
    /// The port, in host byte order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

impl ListenerKey {
    /// A key.
    #[inline(always)]
    pub const fn new(address: AddressBytes, port: u16) -> Self {
        Self { address, port, pad: 0 }
    }
}

/// Key of [`CLIENT_RULES`] behind the length of its prefix, which counts the bits from `rules` on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct ClientNetwork {
    /// [`ListenerValue::client_rules`].
    pub rules: u32,
    /// The network's address, in network byte order; one of IPv4 as mapped into IPv6.
    pub address: AddressBytes,
}

/// The length of the prefix that is an address with the number of its rules.
pub const CLIENT_BITS: u32 = 160;

/// Value of [`LISTENERS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ListenerValue {
    /// The listener's number: key of [`COUNTERS`], and of [`BACKENDS`] with a slot.
    pub listener_id: u32,
    /// [`STATE_READY`], [`STATE_DRAINING`] or [`STATE_REMOVED`].
    pub state: u32,
    /// The listener's part of [`DIRECT_TARGETS`], for IPv4 and for IPv6, as [`targets`] has it; 0 where connections are
    /// accepted.
    pub targets: [u64; 2],
    /// The rules of [`CLIENT_RULES`] that decide which clients are let in; 0 where all are.
    pub client_rules: u32,
    /// How many connections one client may ask for in a second; 0 where any number.
    pub client_rate: u32,
}

/// [`ListenerValue::targets`]: `count` of them from `first` on. One word, which programs read at once.
#[inline(always)]
#[must_use]
pub const fn targets(first: u32, count: u32) -> u64 {
    (count as u64) << 32 | first as u64
}

/// Key of [`BACKENDS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct BackendKey {
    /// The listener's number.
    pub listener_id: u32,
    /// The endpoint's place in the listener's list, from 0 without gaps.
    pub slot: u32,
}

/// Value of [`BACKENDS`]: one endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackendValue {
    /// The endpoint's address, in network byte order.
    pub address: AddressBytes,
    /// The weight of its backend: 0 to 1,000,000, shared with that backend's other endpoints.
    pub weight: u32,
    /// The endpoint's port, in host byte order.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

/// Value of [`AGENT`]: until when new connections to listeners are held back while no agent accepts them: their SYN is
/// dropped, so that the client's next one finds the agent's successor, instead of being told that nobody listens.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct HoldState {
    /// `CLOCK_MONOTONIC` in nanoseconds; the agent puts it off while it runs. 0 holds nothing back.
    pub hold_until: u64,
    /// Whether SYNs are held back though there are sockets that listen: 0 or 1. Set from when an agent leaves until it has closed
    /// its own sockets: whoever listens then is not waited for.
    pub is_leaving: u32,
    /// Zero.
    pub pad: u32,
}

/// Value of [`COUNTERS`]: what the ingress programs count for a listener, on each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ListenerCounters {
    /// Connection attempts seen: segments with SYN and without ACK, retransmitted ones included.
    pub syns: u64,
    /// TCP packets seen; a GRO super-packet counts once.
    pub packets: u64,
    /// Bytes of these packets from the IP header on, with the padding of frames shorter than Ethernet's minimum.
    pub bytes: u64,
    /// Connection attempts dropped because the client is not let in. They are not among `syns`.
    pub denied: u64,
    /// Those dropped because the client asks for more in a second than it may. Nor are they.
    pub limited: u64,
}

const _: () = {
    assert!(size_of::<ListenerKey>() == 20 && align_of::<ListenerKey>() == 2);
    assert!(offset_of!(ListenerKey, address) == 0);
    assert!(offset_of!(ListenerKey, port) == 16);
    assert!(offset_of!(ListenerKey, pad) == 18);

    assert!(size_of::<ListenerValue>() == 32 && align_of::<ListenerValue>() == 8);
    assert!(offset_of!(ListenerValue, listener_id) == 0);
    assert!(offset_of!(ListenerValue, state) == 4);
    assert!(offset_of!(ListenerValue, targets) == 8);
    assert!(offset_of!(ListenerValue, client_rules) == 24);
    assert!(offset_of!(ListenerValue, client_rate) == 28);

    assert!(size_of::<ClientNetwork>() == 20 && align_of::<ClientNetwork>() == 4);
    assert!(offset_of!(ClientNetwork, address) == 4);
    assert!(size_of::<ClientNetwork>() * 8 == CLIENT_BITS as usize);

    assert!(size_of::<BackendKey>() == 8 && align_of::<BackendKey>() == 4);
    assert!(offset_of!(BackendKey, listener_id) == 0);
    assert!(offset_of!(BackendKey, slot) == 4);

    assert!(size_of::<BackendValue>() == 24 && align_of::<BackendValue>() == 4);
    assert!(offset_of!(BackendValue, address) == 0);
    assert!(offset_of!(BackendValue, weight) == 16);
    assert!(offset_of!(BackendValue, port) == 20);
    assert!(offset_of!(BackendValue, pad) == 22);

    assert!(size_of::<HoldState>() == 16 && align_of::<HoldState>() == 8);
    assert!(offset_of!(HoldState, is_leaving) == 8);

    assert!(size_of::<ListenerCounters>() == 40 && align_of::<ListenerCounters>() == 8);
    assert!(offset_of!(ListenerCounters, syns) == 0);
    assert!(offset_of!(ListenerCounters, packets) == 8);
    assert!(offset_of!(ListenerCounters, bytes) == 16);
    assert!(offset_of!(ListenerCounters, denied) == 24);
    assert!(offset_of!(ListenerCounters, limited) == 32);
};

#[cfg(feature = "aya")]
#[expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]
mod pod {
    use super::{
        BackendKey, BackendValue, ClientNetwork, HoldState, ListenerCounters, ListenerKey, ListenerValue,
    };

    // SAFETY: `repr(C)`, made of integers only, so every pattern of bits is valid, and the sizes asserted above equal
    // the sums of the fields' sizes, so there are no padding bytes.
    unsafe impl aya::Pod for ListenerKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ListenerValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ClientNetwork {}
    // SAFETY: as above.
    unsafe impl aya::Pod for BackendKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for BackendValue {}
    // SAFETY: as above.
    unsafe impl aya::Pod for ListenerCounters {}
    // SAFETY: as above.
    unsafe impl aya::Pod for HoldState {}
}

#[cfg(test)]
mod tests {
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;
    use crate::tuple::address_bytes;

    #[test]
    fn any_address_is_the_unspecified_v6_address() {
        assert_eq!(address_bytes(IpAddr::V6(Ipv6Addr::UNSPECIFIED)), ANY_ADDRESS);
        assert_ne!(address_bytes(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), ANY_ADDRESS);
    }

    #[test]
    fn names_fit_the_kernel() {
        use crate::update::{PROGRAM_SET_CREDIT, PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER};
        let updates = [PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER, PROGRAM_SET_CREDIT];
        for name in PINNED_MAPS.iter().map(|map| map.name).chain(crate::PROGRAMS).chain(updates) {
            assert!(name.len() <= 15, "{name}");
        }
    }
}
