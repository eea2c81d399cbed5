//! The maps. `#[btf_map]` gives them types that `bpftool map dump` prints by name.
//!
//! What a lookup returns stays the element that was asked for until the program's end, though the agent may remove it
//! meanwhile. The kernel sees to that only up to 6.0: since 6.1, what is freed of a hash that is not preallocated is the next
//! to be allocated on that CPU (`bpf_mem_cache_free`, `unit_alloc`), as it always was of one that is. So the agent sees to it:
//! it allocates nothing in a map that programs read within a grace period of a removal (ADR 18), and changes what stands there
//! in place ([`crate::update`]). Programs neither insert nor remove: but in [`FRAGMENTS`], [`CLIENT_RATES`], [`PROVEN_CLIENTS`] and [`DIRECT`], which say why.

use core::mem::offset_of;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{
    Array, DevMapHash, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, Queue,
};
use aya_ebpf::macros::btf_map;
use forwarder_common::direct::{DIRECT_LINKS_CAPACITY, DirectCounts, DirectLink, DirectSlot, DirectTarget};
use forwarder_common::flow::{Flow, NextHop, PAIRS_CAPACITY, Pair, Seen};
use forwarder_common::layout::{
    BACKENDS_CAPACITY, CLIENT_RULES_CAPACITY, ClientNetwork, HoldState, LISTENERS_CAPACITY,
    LOCAL_ADDRESSES_CAPACITY, LOOSE_INTERFACES_CAPACITY, VERDICTS_CAPACITY,
};
use forwarder_common::packet::{Fragment, Segment, UsualHeaders};
use forwarder_common::translate::OptionsWalk;
use forwarder_common::tuple::AddressBytes;
use forwarder_common::tuple::FourTuple;
use forwarder_common::{BackendKey, BackendValue, ListenerCounters, ListenerKey, ListenerValue};

const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// The listeners by address and port.
#[btf_map(name = "listeners")]
pub(crate) static LISTENERS: HashMap<
    ListenerKey,
    ListenerValue,
    { LISTENERS_CAPACITY as usize },
    NO_PREALLOC,
> = HashMap::new();

/// The endpoints of the listeners. For operators: no program reads it.
#[btf_map(name = "backends")]
static BACKENDS: HashMap<BackendKey, BackendValue, { BACKENDS_CAPACITY as usize }, NO_PREALLOC> =
    HashMap::new();

/// What is counted for a listener, by its number.
#[btf_map(name = "counters")]
pub(crate) static COUNTERS: PerCpuHashMap<
    u32,
    ListenerCounters,
    { LISTENERS_CAPACITY as usize },
    NO_PREALLOC,
> = PerCpuHashMap::new();

/// The node's addresses, with the index of the interface that holds each.
#[btf_map(name = "local_addresses")]
pub(crate) static LOCAL_ADDRESSES: HashMap<
    AddressBytes,
    u32,
    { LOCAL_ADDRESSES_CAPACITY as usize },
    NO_PREALLOC,
> = HashMap::new();

/// Which clients the listeners let in.
#[btf_map(name = "client_rules")]
pub(crate) static CLIENT_RULES: LpmTrie<ClientNetwork, u32, { CLIENT_RULES_CAPACITY as usize }> =
    LpmTrie::new();

/// When connections of clients may come again: `CLOCK_MONOTONIC` in nanoseconds, by the number of the listener and the client.
///
/// The programs insert here, which is preallocated: see [`FRAGMENTS`]. With more clients at once than it holds, those that were seen least recently begin anew.
#[btf_map(name = "client_rates")]
pub(crate) static CLIENT_RATES: LruHashMap<ClientNetwork, u64, CLIENT_RATES_CAPACITY> = LruHashMap::new();

/// Of how many clients is known when they may come again, and of how many that they have their address.
pub(crate) const CLIENT_RATES_CAPACITY: usize = 32_768;

/// When the next SYN is due of those that a CPU leaves to sockets, at XDP and at TC ([`Stage`](crate::clients::Stage)): `CLOCK_MONOTONIC` in nanoseconds.
#[btf_map(name = "syn_budgets")]
pub(crate) static SYN_BUDGETS: PerCpuArray<u64, 2> = PerCpuArray::new();

/// When there was a sign of a flood of SYNs last: `CLOCK_MONOTONIC` in nanoseconds; 0 if there was none.
#[btf_map(name = "flood")]
pub(crate) static FLOOD: Array<u64, 1> = Array::new();

/// The addresses that connections have been opened from during a flood of SYNs, each with 1.
///
/// The programs insert here, which is preallocated: see [`FRAGMENTS`]. With more than it holds, those that were seen least recently are forgotten.
#[btf_map(name = "proven_clients")]
pub(crate) static PROVEN_CLIENTS: LruHashMap<AddressBytes, u32, CLIENT_RATES_CAPACITY> = LruHashMap::new();

/// The interfaces whose packets are taken whoever is expected behind them.
#[btf_map(name = "loose_interfaces")]
pub(crate) static LOOSE_INTERFACES: HashMap<u32, u32, { LOOSE_INTERFACES_CAPACITY as usize }, NO_PREALLOC> =
    HashMap::new();

/// The flows: both directions of every offloaded pair.
#[btf_map(name = "flows")]
pub(crate) static FLOWS: HashMap<FourTuple, Flow, { PAIRS_CAPACITY as usize * 2 }, NO_PREALLOC> =
    HashMap::new();

/// What is known of each offloaded pair.
#[btf_map(name = "pairs")]
pub(crate) static PAIRS: HashMap<u32, Pair, { PAIRS_CAPACITY as usize }, NO_PREALLOC> = HashMap::new();

/// How many packets met with each verdict.
#[btf_map(name = "verdicts")]
pub(crate) static VERDICTS: PerCpuArray<u64, { VERDICTS_CAPACITY as usize }> = PerCpuArray::new();

/// The state of a walk over TCP options.
#[btf_map(name = "options_walk")]
pub(crate) static OPTIONS_WALK: PerCpuArray<OptionsWalk, 1> = PerCpuArray::new();

/// Where the programs put the segment that they find.
#[btf_map(name = "frame")]
pub(crate) static FRAME: PerCpuArray<Frame, 2> = PerCpuArray::new();

/// The TCP segment in a packet. Kept in a map, for there is no room for it on the stack.
#[repr(C)]
pub(crate) struct Frame {
    /// The segment.
    pub(crate) segment: Segment,
    /// The packet's headers, if `is_usual`.
    pub(crate) headers: UsualHeaders,
    /// Whether the headers are such as most are.
    pub(crate) is_usual: bool,
    /// What is noted of the segment, and whether the receiver takes it ([`accepts`](forwarder_common::flow::DirectionState::accepts)), if it
    /// is one of a flow.
    pub(crate) seen: Seen,
    pub(crate) is_accepted: bool,
    /// Whether it asks a direct listener for a connection that a socket has to take.
    pub(crate) is_refused: bool,
}

/// Which programs a [`Frame`] is for: those at ingress, or those at egress. Neither interrupts its like on one CPU.
pub(crate) const INGRESS: u32 = 0;
pub(crate) const EGRESS: u32 = 1;

/// The clock as it stood at the first packet of a tick.
#[btf_map(name = "clock")]
pub(crate) static CLOCK: PerCpuArray<CoarseClock, 1> = PerCpuArray::new();

/// Value of [`CLOCK`].
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct CoarseClock {
    /// The tick of the kernel's timer (`jiffies`).
    pub(crate) tick: u64,
    /// `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) time: u64,
}

/// The first fragments of flows' packets, by what the others of the same packet have in common with them.
///
/// The programs insert here, since nobody else sees a packet's fragments. That takes no memory and waits for none: this map
/// is preallocated, as each of its type (`htab_map_alloc_check`), and a full one gives its least recently used entry away. So
/// an element may become another's while a program looks at it, which then sees a mix of two: a fragment is sent to the wrong flow,
/// where the TCP checksum of the packet does not match, and is noted there only if that flow's receiver would take such numbers.
#[btf_map(name = "fragments")]
pub(crate) static FRAGMENTS: LruHashMap<FragmentKey, FirstFragment, FRAGMENTS_CAPACITY> = LruHashMap::new();

/// How many packets are remembered: those of which fragments are on their way.
pub(crate) const FRAGMENTS_CAPACITY: usize = 8192;

/// Key of [`FRAGMENTS`]: what the fragments of a packet have in common. Those of IPv4 are told from others by their addresses,
/// and only those of TCP are looked up. 36 bytes without padding.
#[repr(C, align(4))]
#[derive(Clone, Copy)]
pub(crate) struct FragmentKey {
    pub(crate) source: AddressBytes,
    pub(crate) destination: AddressBytes,
    pub(crate) identification: u32,
}

impl FragmentKey {
    #[inline(always)]
    pub(crate) const fn of(fragment: &Fragment) -> Self {
        let Fragment { source, destination, identification, .. } = *fragment;
        Self { source, destination, identification }
    }
}

/// Value of [`FRAGMENTS`]: what of the first fragment the others lack. 32 bytes without padding.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct FirstFragment {
    /// When it came: `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) time: u64,
    /// The sequence number after its payload.
    pub(crate) sequence: u32,
    pub(crate) acknowledgement: u32,
    /// Where the second one begins, in bytes of what was cut up.
    pub(crate) length: u32,
    pub(crate) source_port: u16,
    pub(crate) destination_port: u16,
    pub(crate) window: u16,
    pub(crate) flags: u8,
    pub(crate) pad: [u8; 5],
}

/// Which slot a tuple leads to, of direct connections. The programs insert here, and what is removed may be allocated again at once: so
/// what stands here is one word, which is taken for true only if the slot says the same. Preallocated: to allocate and free two elements costs a new connection as
/// much as all else that programs do for it.
#[btf_map(name = "direct")]
pub(crate) static DIRECT: HashMap<FourTuple, u32, 1> = HashMap::new();

const MAPPED: usize = BPF_F_MMAPABLE as usize;

/// The direct connections. How many there are, the agent says: so of those below.
#[btf_map(name = "direct_slots")]
pub(crate) static DIRECT_SLOTS: Array<DirectSlot, 1, MAPPED> = Array::new();

/// Which slots are in use.
#[btf_map(name = "direct_states")]
pub(crate) static DIRECT_STATES: Array<u64, 1, MAPPED> = Array::new();

/// The slots that are not.
#[btf_map(name = "direct_free")]
pub(crate) static DIRECT_FREE: Queue<u32, 1> = Queue::new();

/// The endpoints of direct listeners.
#[btf_map(name = "direct_targets")]
pub(crate) static DIRECT_TARGETS: Array<DirectTarget, 1, MAPPED> = Array::new();

/// The interfaces towards clients.
#[btf_map(name = "direct_links")]
pub(crate) static DIRECT_LINKS: HashMap<u32, DirectLink, { DIRECT_LINKS_CAPACITY as usize }, NO_PREALLOC> =
    HashMap::new();

/// What is counted of direct connections.
#[btf_map(name = "direct_counts")]
pub(crate) static DIRECT_COUNTS: Array<DirectCounts, 1, MAPPED> = Array::new();

/// Whether an agent accepts connections.
#[btf_map(name = "agent")]
pub(crate) static AGENT: Array<HoldState, 1> = Array::new();

/// What is known of interfaces by which frames come that are sent on at XDP, by index; zero for others. How many there may be, the agent says: so of the two below.
#[btf_map(name = "xdp_interfaces")]
pub(crate) static XDP_INTERFACES: Array<u64, 1> = Array::new();

/// The interfaces that take frames from XDP, by index.
#[btf_map(name = "xdp_targets")]
pub(crate) static XDP_TARGETS: DevMapHash<1> = DevMapHash::new();

/// The Ethernet addresses of neighbours, each at a place that follows from its key.
#[btf_map(name = "xdp_neighbours")]
pub(crate) static XDP_NEIGHBOURS: PerCpuArray<XdpNeighbour, 1> = PerCpuArray::new();

/// What a neighbour is known by: the part of a [`Flow`] that begins with its interface. 24 bytes without padding.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct NeighbourKey {
    pub(crate) interface: u32,
    pub(crate) next_hop: NextHop,
}

const _: () = assert!(
    size_of::<NeighbourKey>() == 24
        && offset_of!(Flow, next_hop) == offset_of!(Flow, interface) + offset_of!(NeighbourKey, next_hop)
);

impl NeighbourKey {
    /// That of a flow, where it stands.
    #[inline(always)]
    pub(crate) fn of(flow: &Flow) -> &Self {
        // SAFETY: the two fields stand in a flow as they do here: see above.
        unsafe { &*(&raw const flow.interface).cast() }
    }

    /// Whether both are the same neighbour's: by words, which costs less than by bytes.
    #[inline(always)]
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let ([a, b, c, d, e, f], [g, h, i, j, k, l]) = (self.words(), other.words());
        (a ^ g) | (b ^ h) | (c ^ i) | (d ^ j) | (e ^ k) | (f ^ l) == 0
    }

    /// It as words: the interface, the family, and the address as it lies in the packet.
    #[inline(always)]
    pub(crate) fn words(&self) -> &[u32; 6] {
        // SAFETY: 24 bytes, which begin at a multiple of four.
        unsafe { &*(&raw const *self).cast() }
    }
}

/// Value of [`XDP_NEIGHBOURS`]. 48 bytes without padding.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct XdpNeighbour {
    /// Whose addresses these are.
    pub(crate) key: NeighbourKey,
    /// When the kernel was asked: `CLOCK_MONOTONIC` in nanoseconds.
    pub(crate) time: u64,
    /// The first bytes of frames: the neighbour's address, and that of the interface.
    pub(crate) addresses: [u32; 3],
    pub(crate) pad: u32,
}
