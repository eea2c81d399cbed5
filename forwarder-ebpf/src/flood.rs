//! What tells the SYNs of a flood from those of clients.
//!
//! Anybody may send SYNs in the name of others. Each costs a socket more than a program, and takes the place of a connection where there is room for so many
//! only. So each CPU leaves a number of them to sockets, and [`cookie`](crate::cookie) answers what is beyond. While that lasts, the addresses are remembered that
//! connections have been opened from: their SYNs are let by.

#![expect(clippy::needless_borrows_for_generic_args, reason = "copies would stand on the stack")]

use core::ptr::{addr_of, read_volatile};

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::Segment;
use forwarder_common::tuple::AddressBytes;

use crate::clients::{SECOND, Stage, host, is_early};
use crate::clock::coarse_time;
use crate::maps::{FLOOD, PROVEN_CLIENTS, SYN_BUDGETS};
use crate::sk_lookup::is_established;

/// Of those SYNs that each CPU leaves to sockets, the time from one to the next, in nanoseconds; 0 where it leaves all. Set before the program is loaded.
#[unsafe(no_mangle)]
static SYN_INTERVAL: u64 = 0;

/// How much of a second's number may come at once: that of a tenth.
const AHEAD: u64 = SECOND / 10;
/// For how long after a sign of a flood clients are remembered, in nanoseconds.
const LASTS: u64 = 10 * SECOND;
/// How old a sign of a flood gets before it is renewed: CPUs would write the same word all the time.
const RENEWED: u64 = SECOND / 10;

/// Whether the program is to answer a SYN instead of a socket. If not, it counts as left to sockets.
#[inline(always)]
pub(crate) fn is_one_too_many(stage: Stage, client: &AddressBytes) -> bool {
    // SAFETY: a valid static; volatile, because the loader sets it.
    let interval = unsafe { read_volatile(addr_of!(SYN_INTERVAL)) };
    if interval == 0 {
        return false;
    }
    let Some(budget) = SYN_BUDGETS.get_ptr_mut(stage as u32) else { return false };
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the pointer is to this CPU's value, which no program interrupts here.
    unsafe { is_early(budget, now, interval, AHEAD, true) && !is_proven(client) }
}

/// Notes a sign of a flood.
#[inline(always)]
pub(crate) fn note() {
    let Some(last) = FLOOD.get_ptr_mut(0) else { return };
    let now = coarse_time();
    // SAFETY: one word of the element of an array, which others may write at the same time.
    unsafe {
        if now.saturating_sub(last.read_volatile()) > RENEWED {
            last.write_volatile(now);
        }
    }
}

/// Whether connections have been opened from a client's address, since there is a flood.
#[inline(always)]
pub(crate) fn is_proven(client: &AddressBytes) -> bool {
    PROVEN_CLIENTS.get_ptr(&host(client)).is_some()
}

/// Remembers who has sent a segment to a listener, if there is a flood and it is one of a connection that stands: whoever says that he has another's address
/// does not see the number that he would have to acknowledge.
#[inline(always)]
pub(crate) fn note_sender(context: &TcContext, segment: &Segment) {
    let Some(last) = FLOOD.get_ptr(0) else { return };
    // SAFETY: as in `note`.
    let last = unsafe { last.read_volatile() };
    if last != 0 && coarse_time().saturating_sub(last) < LASTS {
        remember(context, segment);
    }
}

/// The same during a flood. Returns 0, because older verifiers want a number of functions.
#[inline(never)]
fn remember(context: &TcContext, segment: &Segment) -> u32 {
    let client = host(&segment.tuple.source);
    if PROVEN_CLIENTS.get_ptr(&client).is_none() && is_established(context, segment) {
        // If that fails, because all elements are in use at this moment, the next segment does it.
        let _ = PROVEN_CLIENTS.insert(&client, &1, u64::from(BPF_ANY));
    }
    0
}
