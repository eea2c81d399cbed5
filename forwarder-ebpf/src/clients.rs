//! Which clients are let in, and how often: a SYN that its listener refuses is dropped before anything else is made of it.

#![expect(clippy::needless_borrows_for_generic_args, reason = "copies would stand on the stack")]

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use forwarder_common::layout::{CLIENT_BITS, CLIENT_DENIED, ClientNetwork, ListenerValue};
use forwarder_common::packet::Segment;
use forwarder_common::tuple::{AddressBytes, FourTuple};
use forwarder_common::verdict::Verdict;

use crate::admission::find_listener;
use crate::maps::{CLIENT_RATES, CLIENT_RULES, COUNTERS};

/// A second in nanoseconds.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Where a SYN is looked at.
#[derive(Clone, Copy)]
pub(crate) enum Stage {
    /// At XDP: what is let in there comes to TC too.
    Xdp = 0,
    /// At TC, where it counts for its client's rate.
    Tc = 1,
}

/// Why a segment is dropped, if it asks a listener for a connection that does not let its client in; counts it there.
#[inline(always)]
pub(crate) fn refuse(segment: &Segment, stage: Stage) -> Option<Verdict> {
    if !segment.is_attempt() {
        return None;
    }
    match judge(&segment.tuple) {
        LET_IN => None,
        DENIED => Some(Verdict::ClientDenied),
        limit if is_over(&segment.tuple.source, limit, stage as u32) != 0 => Some(Verdict::ClientLimited),
        _ => None,
    }
}

/// What the listener of a SYN says of its client, as a number, which older verifiers want of functions. Any other one is its limit: the connections in a second, and in
/// the lower half the listener's number.
const LET_IN: u64 = 0;
const DENIED: u64 = 1;

/// Looks whether the listener of a SYN lets its client in, and counts it if not. (A function of its own, as the next one, so that its keys leave the stack
/// with it.)
#[inline(never)]
fn judge(tuple: &FourTuple) -> u64 {
    let Ok(listener) = find_listener(&tuple.destination, tuple.destination_port) else { return LET_IN };
    if !is_denied(&listener, &tuple.source) {
        let ListenerValue { client_rate, listener_id, .. } = listener;
        return if client_rate == 0 { LET_IN } else { u64::from(client_rate) << 32 | u64::from(listener_id) };
    }
    if let Some(counters) = COUNTERS.get_ptr_mut(listener.listener_id) {
        // SAFETY: the pointer is to this CPU's value, which no program interrupts here, and which is allocated to nobody else while this
        // program runs: see `maps`.
        unsafe { (*counters).denied += 1 };
    }
    DENIED
}

/// Whether a client connects more often than a limit allows; counts that for its listener.
#[inline(never)]
fn is_over(client: &AddressBytes, limit: u64, stage: u32) -> u32 {
    let (rate, listener_id) = (limit >> 32, limit as u32);
    if !is_limited(listener_id, rate, client, stage == Stage::Tc as u32) {
        return 0;
    }
    if let Some(counters) = COUNTERS.get_ptr_mut(listener_id) {
        // SAFETY: as above.
        unsafe { (*counters).limited += 1 };
    }
    1
}

/// Whether a listener does not let a client in.
#[inline(always)]
pub(crate) fn is_denied(listener: &ListenerValue, client: &AddressBytes) -> bool {
    if listener.client_rules == 0 {
        return false;
    }
    let network = ClientNetwork { rules: listener.client_rules, address: *client };
    CLIENT_RULES.get(&Key::new(CLIENT_BITS, network)).is_some_and(|rule| *rule == CLIENT_DENIED)
}

/// Whether a client has asked for as many connections as it may in a second, and more than come in by now. If not, and `counts`, this one counts.
#[inline(always)]
fn is_limited(listener_id: u32, rate: u64, client: &AddressBytes, counts: bool) -> bool {
    let Some(interval) = SECOND.checked_div(rate) else { return false };
    let key = ClientNetwork { rules: listener_id, address: host(client) };
    // Of this very moment: by the clock of the programs, which is another one on each CPU, a client that keeps to its rate would be too early now and then.
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    let Some(next) = CLIENT_RATES.get_ptr_mut(&key) else {
        if counts {
            // If that fails, because all elements are in use at this moment, this connection counts for nobody.
            let _ = CLIENT_RATES.insert(&key, &(now + interval), u64::from(BPF_ANY));
        }
        return false;
    };
    // SAFETY: the element lives as long as the map. It may become another client's meanwhile, or be written by another CPU: then one connection
    // counts for the wrong client, or for none.
    unsafe { is_early(next, now, interval, SECOND - interval, counts) }
}

/// Whether what comes `now` is one too many for a rate of one in an `interval`, though so much of it may come ahead of time. If not, and `counts`, it counts. (The generic
/// cell rate algorithm, ITU-T I.371: what is kept is when all so far would have come if they had come evenly.) All in nanoseconds.
///
/// # Safety
/// `next` is the element of a map. If others write it at the same time, one may count for nothing.
#[inline(always)]
pub(crate) unsafe fn is_early(next: *mut u64, now: u64, interval: u64, ahead: u64, counts: bool) -> bool {
    // SAFETY: as the caller says.
    let stored = unsafe { next.read_volatile() };
    let due = if stored > now { stored } else { now };
    if due - now > ahead {
        return true;
    }
    if counts {
        // SAFETY: as the caller says.
        unsafe { next.write_volatile(due + interval) };
    }
    false
}

/// What a client is known by: its address, or the network of its link (RFC 4291, 2.5.4), of which it has as many addresses of IPv6 as it likes.
#[inline(always)]
pub(crate) fn host(client: &AddressBytes) -> AddressBytes {
    let [a, b, c, d, e, f, g, h, ..] = *client;
    // One of IPv4 begins with zeros.
    if u64::from_ne_bytes([a, b, c, d, e, f, g, h]) == 0 {
        return *client;
    }
    [a, b, c, d, e, f, g, h, 0, 0, 0, 0, 0, 0, 0, 0]
}
