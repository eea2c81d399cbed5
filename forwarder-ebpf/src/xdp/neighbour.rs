//! The Ethernet addresses of the neighbours that packets are handed to.
//!
//! To ask the kernel's routes for each packet would cost as much as all of its translation. So they are remembered for a moment, and the packet
//! with which they are asked for once more goes by TC: by that, the kernel sees that the neighbour is in use, and finds out if it is there no
//! more or has another address, as it does for what the stack sends.

use core::mem::zeroed;

use aya_ebpf::bindings::{BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup};
use aya_ebpf::programs::XdpContext;
use forwarder_common::flow::{Flow, Seen};
use forwarder_common::layout::XDP_NEIGHBOURS_BITS;
use forwarder_common::packet::PROTOCOL_TCP;

use crate::maps::{NeighbourKey, XDP_NEIGHBOURS, XdpNeighbour};
use crate::route::{self, AF_INET, AF_INET6};

/// For how long, in nanoseconds: about a quarter of a second. As long again only a packet without payload is sent by TC, because others may overtake it on that way.
const LIFETIME: u64 = 1 << 28;
/// Of a neighbour that the kernel does not know.
const UNKNOWN: [u32; 3] = [0; 3];

/// The Ethernet addresses that packets of a flow leave with: to whom, and from whom. `None` where the packet is to go by TC.
#[inline(always)]
pub(super) fn addresses(context: &XdpContext, flow: &Flow, seen: &Seen) -> Option<[u32; 3]> {
    let key = NeighbourKey::of(flow);
    let place = XDP_NEIGHBOURS.get_ptr_mut(place_of(key))?;
    // SAFETY: the pointer is to this CPU's value, which no other program uses meanwhile.
    let place = unsafe { &mut *place };
    let lifetime = if seen.payload > 0 { 2 * LIFETIME } else { LIFETIME };
    if seen.time.saturating_sub(place.time) < lifetime {
        // It may be another neighbour's, which is in use: this one's packets go by TC.
        let is_known = place.key.is_same(key) && place.addresses != UNKNOWN;
        return is_known.then_some(place.addresses);
    }
    ask(context, key, seen.time, place);
    None
}

/// Where the addresses of a neighbour stand.
#[inline(always)]
fn place_of(key: &NeighbourKey) -> u32 {
    let [interface, _, a, b, c, d] = *key.words();
    // By the golden ratio, as `hash_32` of the kernel.
    (interface.rotate_left(16) ^ a ^ b ^ c ^ d).wrapping_mul(0x61c8_8647) >> (32 - XDP_NEIGHBOURS_BITS)
}

/// Asks the kernel for them, and remembers what it says. If it knows no neighbour, whoever sends by TC makes it find out. Returns 0, because older verifiers want a
/// number of functions.
#[inline(never)]
fn ask(context: &XdpContext, key: &NeighbourKey, now: u64, place: &mut XdpNeighbour) -> u32 {
    *place = XdpNeighbour { key: *key, time: now, addresses: UNKNOWN, pad: 0 };
    // SAFETY: a plain old structure, for which zeros are valid.
    let mut question: bpf_fib_lookup = unsafe { zeroed() };
    question.ifindex = key.interface;
    question.l4_protocol = PROTOCOL_TCP;
    // One of IPv4 has zeros behind it.
    let [_, _, a, b, c, d] = *key.words();
    if key.next_hop.family == u32::from(AF_INET) {
        question.family = AF_INET;
        question.__bindgen_anon_4.ipv4_dst = a;
    } else {
        question.family = AF_INET6;
        question.__bindgen_anon_4.ipv6_dst = [a, b, c, d];
    }
    let found = route::ask(context.ctx.cast(), &mut question, BPF_FIB_LOOKUP_OUTPUT);
    // SAFETY: the union has only plain members, all of them initialised.
    let to = unsafe { question.__bindgen_anon_4.ipv6_dst };
    // It is the neighbour itself, and not behind another one.
    if found != i64::from(BPF_FIB_LKUP_RET_SUCCESS) || question.ifindex != key.interface || to != [a, b, c, d]
    {
        return 0;
    }
    place.addresses = route::ethernet(&question);
    0
}
