//! New connections and packets for the agent's listeners: counted, and SYNs held back while no agent accepts.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::trace;
use forwarder_common::layout::{ANY_ADDRESS, HoldState, ListenerKey, ListenerValue, STATE_REMOVED};
use forwarder_common::packet::{IpVersion, Segment};
use forwarder_common::tuple::AddressBytes;
use forwarder_common::verdict::Verdict;

use crate::maps::{AGENT, COUNTERS, LISTENERS, LOCAL_ADDRESSES};
use crate::sk_lookup::is_listened_to;

/// Where the agent's log takes the records for its own, whatever this crate is called.
const LOG_TARGET: &str = "forwarder_kernel::programs";

/// What becomes of a packet that is not one of a flow.
pub(crate) enum Admission {
    /// It is counted for a listener, and goes on to its socket.
    Counted,
    /// It opens a connection that has to wait for the agent's successor.
    Held,
    /// It is for none of the listeners, or cannot be counted.
    NotOurs(Verdict),
}

/// Counts the packet for its listener, and decides whether it may go on.
#[inline(never)]
pub(crate) fn admit(context: &TcContext, segment: &Segment) -> Admission {
    let listener_id = match find_listener(&segment.tuple.destination, segment.tuple.destination_port) {
        Ok(listener) => listener.listener_id,
        Err(verdict) => return Admission::NotOurs(verdict),
    };
    // Also while a new agent has not given the listener its counters yet.
    let is_held = segment.is_attempt() && is_held(context, segment);
    let Some(counters) = COUNTERS.get_ptr_mut(listener_id) else {
        return if is_held { Admission::Held } else { Admission::NotOurs(Verdict::CounterMissing) };
    };
    // SAFETY: the pointer is to this CPU's value, which no program interrupts here, and which is allocated to nobody else
    // while this program runs: see `maps`.
    let counters = unsafe { &mut *counters };
    counters.packets += 1;
    counters.bytes += u64::from(context.len().wrapping_sub(segment.ip_offset));
    if segment.is_attempt() {
        counters.syns += 1;
        trace!(
            context,
            target: LOG_TARGET,
            "connection attempt: listener {} [{:i}]:{} from [{:i}]:{}",
            listener_id,
            segment.tuple.destination,
            segment.tuple.destination_port,
            segment.tuple.source,
            segment.tuple.source_port
        );
    }
    if is_held { Admission::Held } else { Admission::Counted }
}

/// Whether the agent is about to close its sockets. (If there is none, no socket listens.)
#[inline(always)]
pub(crate) fn is_leaving() -> bool {
    let Some(agent) = AGENT.get_ptr(0) else { return false };
    // SAFETY: one word of the element of an array, which the agent may write meanwhile.
    unsafe { (*agent).is_leaving != 0 }
}

/// Whether a new connection has to wait for the agent's successor: see [`HoldState`].
#[inline(always)]
fn is_held(context: &TcContext, segment: &Segment) -> bool {
    let Some(agent) = AGENT.get_ptr(0) else { return false };
    // SAFETY: the element of an array lives as long as the map; the agent may write it meanwhile, word by word.
    let HoldState { hold_until, is_leaving, .. } = unsafe { *agent };
    // SAFETY: the helper has no conditions.
    if hold_until == 0 || unsafe { bpf_ktime_get_ns() } >= hold_until {
        return false;
    }
    is_leaving != 0 || !is_listened_to(context, segment)
}

/// Counts a SYN that no socket of its listener sees, and its bytes from the IP header on.
#[inline(always)]
pub(crate) fn count_attempt(listener_id: u32, bytes: u32) {
    let Some(counters) = COUNTERS.get_ptr_mut(listener_id) else { return };
    // SAFETY: as in `admit`.
    let counters = unsafe { &mut *counters };
    counters.packets += 1;
    counters.bytes += u64::from(bytes);
    counters.syns += 1;
}

/// Whether the stack takes a segment for one to this node: not to an address that has gone elsewhere, while its listener is still there, nor of IPv4 that is mapped into IPv6
/// (`ipv6_rcv`).
#[inline(never)]
pub(crate) fn is_for_stack(segment: &Segment) -> bool {
    let address = &segment.tuple.destination;
    LOCAL_ADDRESSES.get_ptr(address).is_some() && !is_mapped(segment)
}

/// Whether a packet of IPv6 has addresses that stand for ones of IPv4.
#[inline(always)]
fn is_mapped(segment: &Segment) -> bool {
    let [a, b, c, _, d, e, f, _] = *segment.tuple.address_words();
    let mapped = 0xffff_u32.to_be();
    segment.version == IpVersion::V6 && (a | b == 0 && c == mapped || d | e == 0 && f == mapped)
}

/// The listener of an address and a port: one on this very address first, as the kernel chooses.
#[inline(always)]
pub(crate) fn find_listener(address: &AddressBytes, port: u16) -> Result<ListenerValue, Verdict> {
    let key = ListenerKey::new(*address, port);
    if let Some(listener) = listener_at(&key) {
        return Ok(listener);
    }
    let key = ListenerKey::new(ANY_ADDRESS, port);
    let Some(listener) = listener_at(&key) else { return Err(Verdict::NoListener) };
    if LOCAL_ADDRESSES.get_ptr(address).is_none() {
        return Err(Verdict::NotLocal);
    }
    Ok(listener)
}

#[inline(always)]
fn listener_at(key: &ListenerKey) -> Option<ListenerValue> {
    let listener = LISTENERS.get_ptr(key)?;
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`. The agent may change words of it
    // meanwhile.
    let listener = unsafe { *listener };
    if listener.state == STATE_REMOVED { None } else { Some(listener) }
}
