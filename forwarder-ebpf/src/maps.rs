//! The maps. `#[btf_map]` gives them types that `bpftool map dump` prints by name.
//!
//! What a lookup returns stays the element that was asked for until the program's end, though the agent may remove it
//! meanwhile. The kernel sees to that only up to 6.0: since 6.1, what is freed of a hash that is not preallocated is the next
//! to be allocated on that CPU (`bpf_mem_cache_free`, `unit_alloc`), as it always was of one that is. So the agent sees to it:
//! it allocates nothing in a map that programs read within a grace period of a removal (ADR 18), and changes what stands there
//! in place ([`crate::update`]). Programs neither insert nor remove: but in [`FRAGMENTS`], which says why.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, PerCpuHashMap};
use aya_ebpf::macros::btf_map;
use forwarder_common::flow::{Flow, FlowKey, PAIRS_CAPACITY, Pair};
use forwarder_common::layout::{
    AddressBytes, AgentState, BACKENDS_CAPACITY, LISTENERS_CAPACITY, LOCAL_ADDRESSES_CAPACITY,
    LOOSE_INTERFACES_CAPACITY,
};
use forwarder_common::translate::OptionsWalk;
use forwarder_common::{BackendKey, BackendValue, ListenerCounters, ListenerKey, ListenerValue, Verdict};

use crate::classify::Found;
use crate::fragment::{FRAGMENTS_CAPACITY, FirstFragment, FragmentKey};

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

/// The interfaces whose packets are taken whoever is expected behind them.
#[btf_map(name = "loose_interfaces")]
pub(crate) static LOOSE_INTERFACES: HashMap<u32, u32, { LOOSE_INTERFACES_CAPACITY as usize }, NO_PREALLOC> =
    HashMap::new();

/// The flows: both directions of every promoted pair.
#[btf_map(name = "flows")]
pub(crate) static FLOWS: HashMap<FlowKey, Flow, { PAIRS_CAPACITY as usize * 2 }, NO_PREALLOC> =
    HashMap::new();

/// What is known of each promoted pair.
#[btf_map(name = "pairs")]
pub(crate) static PAIRS: HashMap<u32, Pair, { PAIRS_CAPACITY as usize }, NO_PREALLOC> = HashMap::new();

/// How many packets met with each verdict.
#[btf_map(name = "verdicts")]
pub(crate) static VERDICTS: PerCpuArray<u64, { Verdict::COUNT as usize }> = PerCpuArray::new();

/// The state of a walk over TCP options.
#[btf_map(name = "options_walk")]
pub(crate) static OPTIONS_WALK: PerCpuArray<OptionsWalk, 1> = PerCpuArray::new();

/// Where the programs put the segment that they find.
#[btf_map(name = "found")]
pub(crate) static FOUND: PerCpuArray<Found, 2> = PerCpuArray::new();

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

/// Whether an agent accepts connections.
#[btf_map(name = "agent")]
pub(crate) static AGENT: Array<AgentState, 1> = Array::new();
