//! The classifier: counts the TCP packets that arrive for the listeners.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::trace;
use forwarder_common::flow::Seen;
use forwarder_common::layout::{ANY_ADDRESS, AgentState, ListenerKey, ListenerValue, STATE_REMOVED};
use forwarder_common::packet::{
    Header, LinkLayer, Packet, Segment, USUAL_OFFSET, UsualHeaders, parse, parse_usual,
};
use forwarder_common::verdict::Verdict;

use crate::maps::{AGENT, COUNTERS, FOUND, LISTENERS, LOCAL_ADDRESSES, VERDICTS};
use crate::redirect::redirect;
use crate::rewrite;
use crate::tail::is_listened_to;
use crate::{fragment, icmp};

/// `__sk_buff::pkt_type` of what is addressed to the interface; TCP takes nothing else (`tcp_v4_rcv`).
const PACKET_HOST: u32 = 0;
/// Where the agent's log takes the records for its own, whatever this crate is called.
const LOG_TARGET: &str = "forwarder_agent::datapath";
/// The number of the VLAN in `__sk_buff::vlan_tci`.
const VLAN_ID: u32 = 0x0fff;

/// For interfaces whose packets begin with an Ethernet header.
#[classifier]
pub fn fwd_ingress_eth(context: TcContext) -> i32 {
    classify(&context, LinkLayer::Ethernet)
}

/// For interfaces whose packets begin with the IP header.
#[classifier]
pub fn fwd_ingress_ip(context: TcContext) -> i32 {
    classify(&context, LinkLayer::Ip)
}

/// Counts the packet and its verdict. Returns what lets the next program decide.
#[inline(always)]
fn classify(context: &TcContext, link: LinkLayer) -> i32 {
    let (action, verdict) = judge(context, link);
    count_verdict(verdict);
    action
}

/// Counts a verdict.
#[inline(always)]
pub(crate) fn count_verdict(verdict: Verdict) {
    if let Some(count) = VERDICTS.get_ptr_mut(verdict.index()) {
        // SAFETY: the pointer is to this CPU's value, which no program interrupts here, and lives while the map does.
        unsafe { *count += 1 };
    }
}

/// What becomes of the packet, and why.
#[inline(always)]
fn judge(context: &TcContext, link: LinkLayer) -> (i32, Verdict) {
    if !is_for_interface(context) {
        return (TC_ACT_UNSPEC, Verdict::NotForInterface);
    }
    let found = match find_segment(context, link, INGRESS) {
        Ok(found) => found,
        // It may be about TCP.
        Err(Verdict::NotTcp) => {
            let verdict = icmp::pass_on(context, link);
            let action = match verdict {
                Verdict::NotTcp | Verdict::LeftToStack => TC_ACT_UNSPEC,
                Verdict::TooBigPassedOn => TC_ACT_REDIRECT,
                _ => TC_ACT_SHOT,
            };
            return (action, verdict);
        }
        Err(Verdict::Fragment) => {
            let outcome = fragment::redirect(context, link);
            return (outcome.action, outcome.verdict);
        }
        Err(verdict) => return (TC_ACT_UNSPEC, verdict),
    };
    if let Some(outcome) = redirect(context, found) {
        return (outcome.action, outcome.verdict);
    }
    match count(context, &found.segment) {
        Ok(()) => (TC_ACT_UNSPEC, Verdict::Counted),
        Err(Verdict::Held) => (TC_ACT_SHOT, Verdict::Held),
        Err(verdict) => (TC_ACT_UNSPEC, verdict),
    }
}

/// Counts the packet for its listener.
///
/// # Errors
/// The verdict on a packet that is counted for none.
#[inline(never)]
fn count(context: &TcContext, segment: &Segment) -> Result<(), Verdict> {
    let listener_id = find_listener(segment)?;
    // Also while a new agent has not given the listener its counters yet.
    let is_held = segment.is_attempt() && is_held(context, segment);
    let Some(counters) = COUNTERS.get_ptr_mut(listener_id) else {
        return Err(if is_held { Verdict::Held } else { Verdict::CounterMissing });
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
    if is_held { Err(Verdict::Held) } else { Ok(()) }
}

/// Whether a new connection has to wait for the agent's successor: see [`AgentState`].
#[inline(always)]
fn is_held(context: &TcContext, segment: &Segment) -> bool {
    let Some(agent) = AGENT.get_ptr(0) else { return false };
    // SAFETY: the element of an array lives as long as the map; the agent may write it meanwhile, word by word.
    let AgentState { hold_until, is_leaving, .. } = unsafe { *agent };
    // SAFETY: the helper has no conditions.
    if hold_until == 0 || unsafe { bpf_ktime_get_ns() } >= hold_until {
        return false;
    }
    is_leaving != 0 || !is_listened_to(context, segment)
}

/// The TCP segment in a packet. Kept in a map, for there is no room for it on the stack.
#[repr(C)]
pub(crate) struct Found {
    /// The segment.
    pub(crate) segment: Segment,
    /// The packet's headers, if `is_usual`.
    pub(crate) headers: UsualHeaders,
    /// Whether the headers are such as most are.
    pub(crate) is_usual: bool,
    /// What is noted of the segment, and whether the receiver takes it ([`accepts`](forwarder_common::flow::Half::accepts)), if it is one of a flow.
    pub(crate) seen: Seen,
    pub(crate) is_accepted: bool,
}

/// Which programs a [`Found`] is for: those at ingress, or those at egress. Neither interrupts its like on one CPU.
pub(crate) const INGRESS: u32 = 0;
pub(crate) const EGRESS: u32 = 1;

/// Finds the TCP segment in the packet. `side` is [`INGRESS`] or [`EGRESS`].
///
/// # Errors
/// The verdict on a packet in which there is none.
#[inline(always)]
pub(crate) fn find_segment<'a>(
    context: &TcContext,
    link: LinkLayer,
    side: u32,
) -> Result<&'a mut Found, Verdict> {
    let found = FOUND.get_ptr_mut(side).ok_or(Verdict::Truncated)?;
    // SAFETY: the pointer is to this CPU's value, and of programs that do not interrupt each other; it begins as zeros, which
    // are valid.
    let found = unsafe { &mut *found };
    if let LinkLayer::Ethernet = link
        && rewrite::load_into(context, USUAL_OFFSET as u32, &mut found.headers)
        && let Some(segment) = parse_usual(&found.headers)
    {
        found.segment = segment;
        found.is_usual = true;
    } else {
        walk_headers(context, link, &mut found.segment)?;
        found.is_usual = false;
    }
    Ok(found)
}

/// The same for any headers: a function of its own, so that those that it reads leave the stack with it. (A segment as part of
/// its result would need a type whose description the kernel refuses.)
#[inline(never)]
fn walk_headers(context: &TcContext, link: LinkLayer, segment: &mut Segment) -> Result<(), Verdict> {
    *segment = parse(&SocketBuffer(context), link)?;
    Ok(())
}

/// Whether the IP stack takes the packet from this interface: not what the Ethernet address says is another host's, nor
/// what a VLAN interface above this one takes (tag 0 is only a priority).
#[inline(always)]
fn is_for_interface(context: &TcContext) -> bool {
    // SAFETY: the kernel hands the program a valid `__sk_buff`; the fields may be read by this type of program.
    let (packet_type, vlan_present, vlan_tci) = unsafe {
        let buffer = &*context.skb.skb;
        (buffer.pkt_type, buffer.vlan_present, buffer.vlan_tci)
    };
    packet_type == PACKET_HOST && (vlan_present == 0 || vlan_tci & VLAN_ID == 0)
}

/// The number of the listener that the segment is for: one on its very address first, as the kernel chooses.
#[inline(always)]
fn find_listener(segment: &Segment) -> Result<u32, Verdict> {
    let key = ListenerKey::new(segment.tuple.destination, segment.tuple.destination_port);
    if let Some(listener) = listener_at(&key) {
        return Ok(listener.listener_id);
    }
    let key = ListenerKey::new(ANY_ADDRESS, segment.tuple.destination_port);
    let Some(listener) = listener_at(&key) else { return Err(Verdict::NoListener) };
    if LOCAL_ADDRESSES.get_ptr(segment.tuple.destination).is_none() {
        return Err(Verdict::NotLocal);
    }
    Ok(listener.listener_id)
}

#[inline(always)]
fn listener_at(key: &ListenerKey) -> Option<ListenerValue> {
    let listener = LISTENERS.get_ptr(key)?;
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`. The agent may change words of it
    // meanwhile.
    let listener = unsafe { *listener };
    if listener.state == STATE_REMOVED { None } else { Some(listener) }
}

/// The packet, of which the kernel copies what is read: headers lie at odd places, and a copy, which does not, is cheaper
/// than putting words together byte by byte.
pub(crate) struct SocketBuffer<'a>(pub(crate) &'a TcContext);

impl Packet for SocketBuffer<'_> {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let Self(context) = self;
        context.load(offset).ok()
    }
}
