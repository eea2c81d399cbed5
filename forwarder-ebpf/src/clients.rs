//! Which clients are let in: those of a SYN that the rules of its listener refuse are dropped before anything else is made of it.

use aya_ebpf::btf_maps::lpm_trie::Key;
use forwarder_common::layout::{CLIENT_BITS, CLIENT_DENIED, ClientNetwork, ListenerValue};
use forwarder_common::packet::Segment;
use forwarder_common::tuple::{AddressBytes, FourTuple};

use crate::admission::find_listener;
use crate::maps::{CLIENT_RULES, COUNTERS};

/// Whether a segment asks a listener for a connection that does not let its client in; counts it there.
#[inline(always)]
pub(crate) fn refuse(segment: &Segment) -> bool {
    segment.is_attempt() && refuse_attempt(&segment.tuple) != 0
}

/// The same for a SYN. (A function of its own, so that the key leaves the stack with it; as a number, which older verifiers want of those.)
#[inline(never)]
fn refuse_attempt(tuple: &FourTuple) -> u32 {
    let Ok(listener) = find_listener(&tuple.destination, tuple.destination_port) else { return 0 };
    if !is_denied(&listener, &tuple.source) {
        return 0;
    }
    if let Some(counters) = COUNTERS.get_ptr_mut(listener.listener_id) {
        // SAFETY: the pointer is to this CPU's value, which no program interrupts here, and which is allocated to nobody else while this
        // program runs: see `maps`.
        unsafe { (*counters).denied += 1 };
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
