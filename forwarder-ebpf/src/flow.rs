//! Where what is known of connections stands: of offloaded ones in [`FLOWS`] and [`PAIRS`], of direct ones in slots ([`forwarder_common::direct`]).

use core::ptr::{addr_of, null_mut, read_volatile};

use forwarder_common::direct::{DIRECT_NUMBER, DirectSlot};
use forwarder_common::flow::{DIRECTION_REQUEST, Flow, Pair, STATE_OVER};
use forwarder_common::tuple::FourTuple;

use crate::maps::{DIRECT, DIRECT_SLOTS, FLOWS, PAIRS};

/// Whether there may be direct connections: set before the program is loaded, so that the kernel leaves out what is for them.
#[unsafe(no_mangle)]
static DIRECT_ON: u8 = 0;

/// A flow that was found.
pub(crate) struct Found {
    /// The flow.
    pub(crate) flow: *const Flow,
    /// Where it stands, if its connection is a direct one; null otherwise. The verifier follows an address, and so which of the two it is.
    slot: *mut DirectSlot,
}

impl Found {
    /// A flow of an offloaded connection.
    #[inline(always)]
    pub(crate) fn offloaded(flow: *const Flow) -> Self {
        Self { flow, slot: null_mut() }
    }

    /// A flow of a direct connection, which stands in `slot`.
    #[inline(always)]
    pub(crate) fn direct(flow: *const Flow, slot: *mut DirectSlot) -> Self {
        Self { flow, slot }
    }

    /// Whether its connection is a direct one.
    #[inline(always)]
    pub(crate) fn is_direct(&self) -> bool {
        !self.slot.is_null()
    }

    /// What is known of its connection.
    #[inline(always)]
    pub(crate) fn pair(&self) -> Option<*mut Pair> {
        if self.slot.is_null() {
            // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
            return PAIRS.get_ptr_mut(unsafe { (*self.flow).pair });
        }
        // SAFETY: the element of an array lives as long as the map.
        Some(unsafe { &raw mut (*self.slot).pair })
    }
}

/// The flow whose packets have this tuple when they arrive.
#[inline(always)]
pub(crate) fn find(tuple: &FourTuple) -> Option<Found> {
    if has_direct()
        && let Some((flow, slot)) = find_direct(tuple)
    {
        return Some(Found::direct(flow, slot));
    }
    Some(Found::offloaded(FLOWS.get_ptr(tuple)?))
}

/// Whether there may be direct connections.
#[inline(always)]
pub(crate) fn has_direct() -> bool {
    // SAFETY: a valid static; volatile, because the loader sets it.
    unsafe { read_volatile(addr_of!(DIRECT_ON)) != 0 }
}

/// The flow of a direct connection whose packets have this tuple when they arrive.
#[inline(always)]
pub(crate) fn find_direct(tuple: &FourTuple) -> Option<(*mut Flow, *mut DirectSlot)> {
    let found = DIRECT.get_ptr(tuple)?;
    // SAFETY: one word of an element of the map, which may be another's by now: what it leads to says whether it is.
    let found = unsafe { read_volatile(found) };
    let slot = DIRECT_SLOTS.get_ptr_mut(found >> 1)?;
    // SAFETY: the element of an array lives as long as the map; the connection in it stays the same while this program runs, or has
    // ended before: see `forwarder_common::direct`.
    let [request, response] = unsafe { &mut (*slot).flows };
    let (flow, back) = if found & 1 == DIRECTION_REQUEST { (request, response) } else { (response, request) };
    let is_same = is_reversed(&back.out, tuple);
    if is_same && flow.state != STATE_OVER { Some((flow, slot)) } else { None }
}

/// Whether one tuple is the other, reversed: by words, which costs less than by bytes.
#[inline(always)]
fn is_reversed(one: &FourTuple, other: &FourTuple) -> bool {
    let ([a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]) = (one.address_words(), other.address_words());
    let addresses = (a ^ m) | (b ^ n) | (c ^ o) | (d ^ p) | (e ^ i) | (f ^ j) | (g ^ k) | (h ^ l);
    let ports = (one.source_port ^ other.destination_port) | (one.destination_port ^ other.source_port);
    addresses | u32::from(ports) == 0
}

/// The slot of a flow, if its connection is a direct one.
#[inline(always)]
pub(crate) fn slot_of(flow: &Flow) -> Option<*mut DirectSlot> {
    if flow.pair & DIRECT_NUMBER == 0 { None } else { DIRECT_SLOTS.get_ptr_mut(flow.pair & !DIRECT_NUMBER) }
}
