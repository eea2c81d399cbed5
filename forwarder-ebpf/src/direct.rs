//! Direct connections: the endpoint is chosen at the client's first SYN, and no socket of the node takes part. See
//! [`forwarder_common::direct`] for what stands where.
//!
//! What is not such that a direct connection can be made goes to the listener's socket, and is counted
//! ([`Verdict::DirectRefused`]).

#![expect(clippy::needless_borrows_for_generic_args, reason = "copies would stand on the stack")]

use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_ANY, BPF_NOEXIST};
use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use aya_ebpf::programs::TcContext;
use forwarder_common::direct::{
    DIRECT_NUMBER, DirectCounts, DirectSlot, DirectTarget, MOST_ASKED, direct_flow,
};
use forwarder_common::flow::{
    DIRECTION_REQUEST, DIRECTION_RESPONSE, FLOW_OPENING, Flow, NextHop, SENDER_CHALLENGE, SENDER_SYN,
    STATE_OFFLOADED, STATE_OVER, STATE_RESET,
};
use forwarder_common::layout::{ListenerValue, STATE_READY};
use forwarder_common::packet::{IpVersion, Segment};
use forwarder_common::tuple::{AddressBytes, FourTuple};
use forwarder_common::verdict::Verdict;

use crate::arrival::{self, is_expected};
use crate::flow::Found;
use crate::frame::seen;
use crate::maps::{
    DIRECT, DIRECT_COUNTS, DIRECT_FREE, DIRECT_LINKS, DIRECT_SLOTS, DIRECT_STATES, FLOWS, Frame,
};
use crate::outcome::{Outcome, transmit};
use crate::rewrite::readdress;
use crate::route::{self, AF_INET, AF_INET6};
use crate::sk_lookup::is_connected;
use crate::skb::SocketBuffer;
use crate::{admission, clients, flood, fragment, icmp, reset};

mod choice;
mod handshake;
mod retry;
mod stale;

pub(crate) use retry::ask_another;

use handshake::{begin, note_attempt};

/// How many local ports are tried for one connection, and how far they are apart.
const PORT_TRIES: u32 = 8;
const PORT_STRIDE: u32 = 7919;

/// Translates and redirects a packet of a direct connection. `None` where that is over and the packet opens a new one: the packet is
/// unchanged.
#[inline(always)]
pub(crate) fn redirect(
    context: &TcContext,
    frame: &mut Frame,
    flow: *mut Flow,
    slot: *mut DirectSlot,
) -> Option<Outcome> {
    let segment = &frame.segment;
    // SAFETY: the element of an array lives as long as the map, and stays this connection's while this program runs. The agent, and
    // programs on other CPUs, may change words of it meanwhile.
    let (flow, pair) = unsafe { (&*flow, &mut (*slot).pair) };
    if !is_expected(context, segment.version, flow) {
        return Some(Outcome::pass(Verdict::OtherInterface));
    }
    let (forward, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    if segment.is_attempt() && (flow.state == STATE_RESET || flow.is_over(forward, reverse)) {
        // Until the agent has removed it, sockets have the tuple.
        // SAFETY: as above.
        for flow in unsafe { &mut (*slot).flows } {
            flow.state = STATE_OVER;
        }
        return None;
    }
    if flow.state == STATE_RESET {
        return Some(reset::answer(context, segment, &Found::direct(flow, slot)));
    }
    frame.seen = seen(context, segment);
    frame.is_accepted = forward.accepts(reverse, flow, &frame.seen);
    let is_opening = flow.flags & FLOW_OPENING != 0;
    if is_opening && let Some(outcome) = stale::reset(context, segment, flow) {
        return Some(outcome);
    }
    let is_noted = is_opening && handshake::follow(context, frame, flow) != 0;
    if segment.is_first_fragment
        && let Err(verdict) = fragment::announce(context, segment)
    {
        return Some(Outcome::drop(verdict));
    }
    if icmp::is_too_big(context, segment, flow) {
        return Some(icmp::answer_too_big(context, segment, flow));
    }
    Some(match readdress(SocketBuffer(context), frame, flow) {
        Ok(()) => {
            if !is_noted {
                forward.note(reverse, flow, &frame.seen, frame.is_accepted);
            }
            // What somebody claims falsely, the two ends find out by themselves.
            if forward.flags & (SENDER_SYN | SENDER_CHALLENGE) != 0 {
                forward.flags &= !(SENDER_SYN | SENDER_CHALLENGE);
            }
            transmit(flow)
        }
        Err(verdict) => Outcome::drop(verdict),
    })
}

/// Makes a direct connection, if the segment asks a direct listener for one. Returns 1 where it does, but a socket has to take it; 0
/// otherwise.
#[inline(never)]
pub(crate) fn open(context: &TcContext, segment: &Segment) -> u32 {
    let (address, port) = (&segment.tuple.destination, segment.tuple.destination_port);
    let Ok(listener) = admission::find_listener(address, port) else { return 0 };
    if listener.state != STATE_READY {
        return 0;
    }
    // Another listener than the one that has been asked may have the address meanwhile.
    if clients::is_denied(&listener, &segment.tuple.source) {
        return 1;
    }
    let (first, count) = choice::targets_of(&listener, segment.version);
    if count == 0 {
        return (listener.targets != [0; 2]) as u32;
    }
    if !admission::is_for_stack(segment) {
        return 0;
    }
    // No route tells by which link.
    if is_link_local(segment) {
        return 1;
    }
    // What there is of the client's tuple already is redirected if it stands. Otherwise a socket takes the client until it is removed.
    if let Some(flow) = FLOWS.get_ptr(&segment.tuple)
        // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
        && unsafe { (*flow).state } != STATE_OVER
    {
        return 0;
    }
    let mut former = null_mut();
    if DIRECT.get_ptr(&segment.tuple).is_some() {
        former = if count > 1 { retry::find_silent(context, segment) } else { former };
        if former.is_null() {
            return 1;
        }
    } else if is_connected(context, segment.version, &segment.tuple) || has_no_room_for(&segment.tuple.source)
    {
        // So does one that has answered the client before, whose SYN has come again.
        return 1;
    }
    let target = if former.is_null() {
        choice::next(first, count)
    } else {
        // SAFETY: the element of an array lives as long as the map, and stays this connection's while this program runs.
        choice::other(first, count, unsafe { &*former })
    };
    let Some(target) = target else { return 1 };
    let Some((number, slot)) = take_slot() else { return 1 };
    slot.flows[1].out = segment.tuple.reversed();
    if route_back(context, segment, slot) && fill(context, segment, target, number, slot) {
        // What there is no other endpoint for is never asked again.
        slot.asked_before = if count > 1 { 0 } else { MOST_ASKED };
        slot.tried = 0;
        handshake::keep_options(context, segment, slot);
        if !former.is_null() {
            // SAFETY: the element of an array lives as long as the map, and stays this connection's while this program runs.
            retry::note_replacement(slot, unsafe { &*former });
        }
        if claim(context, target, number, slot, former) {
            count_half_open(1);
            if former.is_null() {
                admission::count_attempt(listener.listener_id, context.len().wrapping_sub(segment.ip_offset));
            }
            return 0;
        }
    }
    // Nothing has led to it.
    let _ = DIRECT_FREE.push(number, 0);
    1
}

/// A free slot and its number.
#[inline(always)]
fn take_slot() -> Option<(u32, &'static mut DirectSlot)> {
    let number = DIRECT_FREE.pop().ok()??;
    let slot = DIRECT_SLOTS.get_ptr_mut(number)?;
    // SAFETY: the element of an array lives as long as the map. Whoever has got the number has it for himself: nothing leads to it.
    Some((number, unsafe { &mut *slot }))
}

/// The IP version of packets of a tuple.
#[inline(always)]
fn version_of(tuple: &FourTuple) -> IpVersion {
    let [a, b, c, ..] = *tuple.address_words();
    if a | b == 0 && c == 0xffff_u32.to_be() { IpVersion::V4 } else { IpVersion::V6 }
}

/// Whether a packet of IPv6 comes from an address that means another host on each link (fe80::/10).
#[inline(always)]
fn is_link_local(segment: &Segment) -> bool {
    let [first, ..] = *segment.tuple.address_words();
    segment.version == IpVersion::V6 && u32::from_be(first) >> 22 == 0xfe80_0000 >> 22
}

/// Whether a direct connection may be made of a SYN to a listener, as far as can be told before it is looked at.
#[inline(always)]
pub(crate) fn may_take(listener: &ListenerValue, segment: &Segment) -> bool {
    let (_, count) = choice::targets_of(listener, segment.version);
    count > 0 && !has_no_room_for(&segment.tuple.source)
}

/// Whether no more connections of a client may be waiting for the end of their handshake: those who have none would take the place of others. A flood of SYNs in the name of others
/// leaves as much room again to clients that have the address that they say.
#[inline(always)]
fn has_no_room_for(client: &AddressBytes) -> bool {
    let Some(counts) = DIRECT_COUNTS.get_ptr(0) else { return true };
    // SAFETY: the element of an array lives as long as the map; others write the words at the same time.
    let DirectCounts { half_open, most_half_open, .. } = unsafe { *counts };
    if half_open < most_half_open {
        return false;
    }
    flood::note();
    half_open >= most_half_open * 2 || !flood::is_proven(client)
}

/// Counts a connection that is half open, or with `-1` one that is so no more.
#[inline(always)]
fn count_half_open(change: i32) {
    let Some(counts) = DIRECT_COUNTS.get_ptr_mut(0) else { return };
    // SAFETY: the element of an array lives as long as the map. Where another CPU writes the word at the same time, one of the two counts is
    // lost: the agent sets it right.
    let half_open = unsafe { &mut (*counts).half_open };
    *half_open = half_open.saturating_add_signed(change);
}

/// Where to begin to look for a local port, among those of any endpoint.
#[inline(always)]
fn next_port() -> u32 {
    let Some(counts) = DIRECT_COUNTS.get_ptr_mut(0) else { return 0 };
    // SAFETY: the element of an array lives as long as the map. Of two programs that begin at the same port, one goes on to another.
    let turn = unsafe { &mut (*counts).port_turn };
    *turn = turn.wrapping_add(1);
    *turn
}

/// Writes what is known of a connection into its slot, but for the way to the client and the local port. Tells whether its options can be
/// understood.
#[inline(never)]
fn fill(
    context: &TcContext,
    segment: &Segment,
    target: &DirectTarget,
    number: u32,
    slot: &mut DirectSlot,
) -> bool {
    aim(target, number, slot);
    note_attempt(context, segment, slot)
}

/// Writes into a slot what its endpoint and its number decide. Where answers go to is there already.
#[inline(never)]
fn aim(target: &DirectTarget, number: u32, slot: &mut DirectSlot) -> u32 {
    let DirectSlot { flows: [request, response], pair, .. } = slot;
    // SAFETY: the helper has no conditions.
    let now = unsafe { bpf_ktime_get_ns() };
    request.out.source = target.source;
    request.out.destination = target.address;
    request.out.destination_port = target.port;
    request.interface = target.interface;
    request.next_hop = target.next_hop;
    request.mtu = target.mtu;
    request.flags = target.flags | FLOW_OPENING;
    request.hop_limit = target.hop_limit;
    request.arrival = response.interface;
    response.arrival = target.interface;
    for (flow, direction) in [(request, DIRECTION_REQUEST), (response, DIRECTION_RESPONSE)] {
        flow.pair = DIRECT_NUMBER | number;
        flow.direction = direction;
        flow.state = STATE_OFFLOADED;
        flow.clock_time = now;
        flow.clock = 0;
        flow.sequence_shift = 0;
        flow.acknowledgement_shift = 0;
        flow.source_scale = 0;
        flow.target_scale = 0;
        flow.receiver_scale = 0;
        flow.acknowledged = 0;
        flow.pad = [0; 2];
    }
    (pair.opened, pair.offloaded) = (now, 0);
    begin(&mut pair.request, now);
    begin(&mut pair.response, now);
    0
}

/// Finds by which interface, and by which neighbour, answers go to who has sent the segment, and writes it into the slot; tells
/// whether the node routes them there, and programs may redirect them.
#[inline(never)]
fn route_back(context: &TcContext, segment: &Segment, slot: &mut DirectSlot) -> bool {
    let [_, response] = &mut slot.flows;
    let mut question = route::back(segment, arrival::interface(context));
    let found = route::ask(context.skb.skb.cast(), &mut question, 0);
    if !route::leads(found) {
        return false;
    }
    let Some(link) = DIRECT_LINKS.get_ptr(question.ifindex) else { return false };
    response.interface = question.ifindex;
    // SAFETY: the union has only plain members, all of them initialised.
    let [a, b, c, d] = unsafe { question.__bindgen_anon_4.ipv6_dst };
    response.next_hop = if question.family == AF_INET {
        NextHop { family: u32::from(AF_INET), address: in_words([a, 0, 0, 0]) }
    } else {
        NextHop { family: u32::from(AF_INET6), address: in_words([a, b, c, d]) }
    };
    // SAFETY: one word, which is another interface's at worst, where this one has just gone.
    let link = unsafe { *link };
    let [v4, v6] = link.hop_limits;
    response.hop_limit = if segment.version == IpVersion::V4 { v4 } else { v6 };
    response.mtu = link.mtu;
    response.flags = link.flags | FLOW_OPENING;
    true
}

#[inline(always)]
fn in_words(words: [u32; 4]) -> [u8; 16] {
    let [[a, b, c, d], [e, f, g, h], [i, j, k, l], [m, n, o, p]] = words.map(u32::to_ne_bytes);
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

/// Finds a local port, and has both tuples lead to the slot, that of the client in the place of `former` unless that is null; tells whether it did. Of the
/// two, that of the endpoint's packets comes first: nobody else is to have the port.
#[inline(never)]
fn claim(
    context: &TcContext,
    target: &DirectTarget,
    number: u32,
    slot: &mut DirectSlot,
    former: *mut DirectSlot,
) -> bool {
    let mut tuple = FourTuple {
        source: target.address,
        destination: target.source,
        source_port: target.port,
        destination_port: 0,
    };
    let response = direct_flow(number, DIRECTION_RESPONSE);
    let mut is_claimed = false;
    let ports = target.ports.max(1);
    let turn = next_port();
    // Endpoints have their turn in the same step: each lap begins one farther, or one of them would only ever get the ports of its own remainder.
    let first = turn.wrapping_add(turn / ports);
    for attempt in 0..PORT_TRIES {
        let at = first.wrapping_add(attempt * PORT_STRIDE) % ports;
        tuple.destination_port = target.first_port.wrapping_add(at as u16);
        if FLOWS.get_ptr(&tuple).is_some() || is_connected(context, version_of(&tuple), &tuple) {
            continue;
        }
        slot.flows[0].out.source_port = tuple.destination_port;
        if DIRECT.insert(&tuple, &response, u64::from(BPF_NOEXIST)).is_ok() {
            is_claimed = true;
            break;
        }
    }
    if !is_claimed {
        return false;
    }
    let request = direct_flow(number, DIRECTION_REQUEST);
    let mut client = slot.flows[1].out.reversed();
    let leads_here = if former.is_null() {
        DIRECT.insert(&client, &request, u64::from(BPF_NOEXIST)).is_ok()
    } else {
        // SAFETY: the element of an array lives as long as the map, and stays this connection's while this program runs.
        retry::replace(&mut client, request, unsafe { &mut *former })
    };
    if !leads_here {
        let _ = DIRECT.remove(&tuple);
        return false;
    }
    // The agent looks after it from now on.
    DIRECT_STATES.set(number, slot.pair.opened, u64::from(BPF_ANY)).is_ok()
}
