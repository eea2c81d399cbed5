//! Rewrites a packet of one leg of a pair into the packet of the other leg.
//!
//! See [`forwarder_common::translate`] for the arithmetic. Each call of the kernel costs as much as all of this arithmetic, so
//! that what can be written at once is.

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use forwarder_common::flow::{DirectionState, FLOW_CLEAR_ECN, Flow, STATE_HANDOVER};
use forwarder_common::packet::{IpVersion, Segment, USUAL_OFFSET, USUAL_OPTIONS, USUAL_TCP_HEADER};
use forwarder_common::translate::{
    self, ChecksumChange, MAX_OPTIONS, MAX_SACK_BLOCKS, Options, OptionsWalk, Timestamps,
};
use forwarder_common::verdict::Verdict;

use crate::maps::{Frame, OPTIONS_WALK};
use crate::packet::{ChecksumKeeper, PacketMut, Summed};
use crate::skb::{ECN_MASK, IPV4_CHECKSUM, IPV4_TTL, IPV6_HOP_LIMIT, IPV6_SOURCE, TCP_HEADER};
/// 32-bit words of the TCP header before the options.
const FIXED_WORDS: usize = 5;
/// Where what changes of usual headers begins, in bytes from the frame's first: with the checksum of IPv4, and the hop limit of IPv6.
const USUAL_CHANGED_V4: u32 = USUAL_OFFSET as u32 + 3 * 4;
const USUAL_CHANGED_V6: u32 = USUAL_OFFSET as u32 + 2 * 4;

/// Rewrites the packet for the other leg.
///
/// # Errors
/// Why it cannot be: it may be rewritten in part, and must be dropped.
#[inline(always)]
pub(crate) fn rewrite(
    packet: impl PacketMut,
    frame: &mut Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
) -> Result<(), Verdict> {
    if is_usual(frame, flow) {
        rewrite_usual(packet, frame, flow, forward, reverse)
    } else {
        rewrite_any(packet, frame, flow, forward, reverse)
    }
}

/// Whether a packet and its flow are such that there is a short cut.
#[inline(always)]
pub(crate) fn is_usual(frame: &Frame, flow: &Flow) -> bool {
    frame.is_usual && flow.flags & FLOW_CLEAR_ECN == 0
}

/// The short cut of [`rewrite_any`] for packets as most are.
///
/// # Errors
/// As [`rewrite`].
#[inline(always)]
pub(crate) fn rewrite_usual(
    packet: impl PacketMut,
    frame: &mut Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
) -> Result<(), Verdict> {
    match frame.segment.version {
        IpVersion::V4 => rewrite_usual_v4(packet, frame, flow, forward, reverse),
        IpVersion::V6 => rewrite_usual_v6(packet, frame, flow, forward, reverse),
    }
}

// What changes is put together where the headers were read to, because there is no room on the stack.

#[inline(never)]
fn rewrite_usual_v4(
    packet: impl PacketMut,
    frame: &mut Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
) -> Result<(), Verdict> {
    let [_, _, _, protocol, source, destination, tcp @ .., _, _, _, _, _] = frame.headers;
    let [.., new_source, _, _, _, new_destination] = *flow.out.address_words();
    let addresses = ChecksumChange::NONE.and(source, new_source).and(destination, new_destination);
    let (new_tcp, change) = usual_tcp(frame, flow, forward, reverse, tcp);
    let keeper = packet.checksum_keeper();
    let [_, _, _, new @ .., _, _, _, _, _] = &mut frame.headers;
    let [new_protocol, at_source, at_destination, at_tcp @ ..] = new;
    *new_protocol = with_hop_limit_v4(protocol, flow, addresses);
    (*at_source, *at_destination) = (new_source, new_destination);
    write_tcp(at_tcp, new_tcp, keeper, change, addresses);
    if frame.segment.header_length == USUAL_TCP_HEADER {
        packet.store(USUAL_CHANGED_V4, new)?;
    } else {
        let [bare @ .., _, _, _] = &*new;
        packet.store(USUAL_CHANGED_V4, bare)?;
    }
    tell_checksum(packet, &frame.segment, keeper, change, addresses)
}

#[inline(never)]
fn rewrite_usual_v6(
    packet: impl PacketMut,
    frame: &mut Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
) -> Result<(), Verdict> {
    let [_, _, length, _, _, _, _, _, _, _, _, tcp @ ..] = frame.headers;
    let addresses = change_of_addresses(&frame.segment, flow);
    let (new_tcp, change) = usual_tcp(frame, flow, forward, reverse, tcp);
    let keeper = packet.checksum_keeper();
    let [_, _, new @ ..] = &mut frame.headers;
    let [new_length, at_addresses @ .., _, _, _, _, _, _, _, _] = new;
    *new_length = with_hop_limit_v6(length, flow);
    *at_addresses = *flow.out.address_words();
    let [_, _, _, _, _, _, _, _, _, at_tcp @ ..] = new;
    write_tcp(at_tcp, new_tcp, keeper, change, addresses);
    if frame.segment.header_length == USUAL_TCP_HEADER {
        packet.store(USUAL_CHANGED_V6, new)?;
    } else {
        let [bare @ .., _, _, _] = &*new;
        packet.store(USUAL_CHANGED_V6, bare)?;
    }
    tell_checksum(packet, &frame.segment, keeper, change, addresses)
}

/// Writes the TCP header of the other leg where it is to leave from, with its checksum, if whoever writes keeps that.
#[inline(always)]
fn write_tcp(
    at: &mut [u32; 8],
    new: [u32; 8],
    keeper: ChecksumKeeper,
    change: ChecksumChange,
    addresses: ChecksumChange,
) {
    let [.., last, _, _, _] = new;
    *at = new;
    let [.., at_last, _, _, _] = at;
    *at_last = with_checksum(keeper, last, change, addresses);
}

/// The TCP header on the other leg, as it will lie in the packet, but for the checksum, and what changes in it. Where it is without timestamps, the last three words
/// mean nothing.
#[inline(always)]
fn usual_tcp(
    frame: &Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
    old: [u32; 8],
) -> ([u32; 8], ChecksumChange) {
    let [ports, sequence, acknowledgement, misc, last, kinds, value, echo] = old;
    let [new_ports, new_sequence, new_acknowledgement, new_misc, _] =
        new_words(frame, flow, forward, reverse, misc, last);
    let mut change = ChecksumChange::NONE
        .and(ports, new_ports)
        .and(sequence, new_sequence)
        .and(acknowledgement, new_acknowledgement)
        .and(misc, new_misc);
    let [mut new_value, mut new_echo] = [value, echo];
    if frame.segment.header_length == USUAL_TCP_HEADER {
        [new_value, new_echo] = timestamps(frame, flow, forward, reverse, [value, echo]);
        change = change.and(value, new_value).and(echo, new_echo);
    }
    let new = [new_ports, new_sequence, new_acknowledgement, new_misc, last, kinds, new_value, new_echo];
    (new, change)
}

/// Tells the kernel of the changes, if it keeps the checksum. Of one that the device will complete, only the addresses are part: the kernel knows.
#[inline(always)]
fn tell_checksum(
    packet: impl PacketMut,
    segment: &Segment,
    keeper: ChecksumKeeper,
    change: ChecksumChange,
    addresses: ChecksumChange,
) -> Result<(), Verdict> {
    if keeper != ChecksumKeeper::Kernel {
        return Ok(());
    }
    packet.change_checksum(segment, change, Summed::Segment)?;
    packet.change_checksum(segment, addresses, Summed::PseudoHeader)
}

/// The last word of the TCP header, as it lies in the packet: the checksum, where whoever writes keeps it, and the urgent pointer. `change` is that of the segment, and
/// `addresses` that of the pseudo-header.
#[inline(always)]
fn with_checksum(
    keeper: ChecksumKeeper,
    last: u32,
    change: ChecksumChange,
    addresses: ChecksumChange,
) -> u32 {
    let old = u32::from_be(last);
    let checksum = ((old >> 16) as u16).to_be();
    let checksum = match keeper {
        ChecksumKeeper::Kernel => return last,
        ChecksumKeeper::Whole => change.with(addresses).applied_to(checksum),
        ChecksumKeeper::PseudoHeader => addresses.added_to(checksum),
    };
    (u32::from(u16::from_be(checksum)) << 16 | old & 0xffff).to_be()
}

/// The third word of the IPv4 header, as it lies in the packet: TTL, protocol and checksum, with the TTL that the flow's packets
/// have, and the checksum after this change and that of the `addresses`.
#[inline(always)]
fn with_hop_limit_v4(old: u32, flow: &Flow, addresses: ChecksumChange) -> u32 {
    let old = u32::from_be(old);
    let new = old & 0x00ff_ffff | u32::from(flow.hop_limit) << 24;
    let change = addresses.and((old & 0xffff_0000).to_be(), (new & 0xffff_0000).to_be());
    let checksum = u16::from_be(change.applied_to((old as u16).to_be()));
    (new & 0xffff_0000 | u32::from(checksum)).to_be()
}

/// The second word of the IPv6 header, as it lies in the packet, with the hop limit that the flow's packets have.
#[inline(always)]
fn with_hop_limit_v6(old: u32, flow: &Flow) -> u32 {
    (u32::from_be(old) & 0xffff_ff00 | u32::from(flow.hop_limit)).to_be()
}

/// What the addresses of the other leg change.
#[inline(always)]
fn change_of_addresses(segment: &Segment, flow: &Flow) -> ChecksumChange {
    let (old, new) = (segment.tuple.address_words(), flow.out.address_words());
    let mut change = ChecksumChange::NONE;
    for word in 0..8 {
        change = change.and(old[word], new[word]);
    }
    change
}

/// The fixed part of the TCP header on the other leg, as it will lie in the packet; `misc` and `last` are its fourth and fifth
/// word as they lie there.
#[inline(always)]
fn new_words(
    frame: &Frame,
    flow: &Flow,
    forward: &DirectionState,
    reverse: &DirectionState,
    misc: u32,
    last: u32,
) -> [u32; FIXED_WORDS] {
    // The payload of a first fragment may lie in the others.
    let is_bare = frame.is_accepted && frame.seen.payload == 0 && !frame.segment.is_first_fragment;
    let numbers = flow.numbers(&frame.segment, forward, reverse, is_bare);
    let ports = u32::from(flow.out.source_port) << 16 | u32::from(flow.out.destination_port);
    let misc = u32::from_be(misc) & 0xffff_0000 | u32::from(numbers.window);
    [ports.to_be(), numbers.sequence.to_be(), numbers.acknowledgement.to_be(), misc.to_be(), last]
}

/// Rewrites any packet for the other leg, wherever its headers and options stand.
///
/// # Errors
/// Why it cannot be: it may be rewritten in part, and must be dropped.
#[inline(never)]
pub(crate) fn rewrite_any(
    packet: impl PacketMut,
    frame: &Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
) -> Result<(), Verdict> {
    let segment = &frame.segment;
    let tcp = segment.tcp_offset;
    let old: [u32; FIXED_WORDS] = packet.load(tcp)?;
    let [_, _, _, misc, last] = old;
    let new = new_words(frame, flow, forward, reverse, misc, last);
    let mut change = ChecksumChange::NONE;
    for word in 0..FIXED_WORDS {
        change = change.and(old[word], new[word]);
    }
    let options: [u32; 3] =
        if segment.header_length == USUAL_TCP_HEADER { packet.load(tcp + TCP_HEADER)? } else { [0; 3] };
    if options[0] == USUAL_OPTIONS.to_be() {
        let [kinds, value, echo] = options;
        let [new_value, new_echo] = timestamps(frame, flow, forward, reverse, [value, echo]);
        change = change.and(value, new_value).and(echo, new_echo);
        let [ports, sequence, acknowledgement, misc, last] = new;
        let new = [ports, sequence, acknowledgement, misc, last, kinds, new_value, new_echo];
        packet.store(tcp, &new)?;
    } else {
        packet.store(tcp, &new)?;
        if segment.header_length > TCP_HEADER {
            change = translate_options(packet, frame, flow, forward, reverse, change)?;
        }
    }
    packet.change_checksum(segment, change, Summed::Segment)?;
    translate_addresses(packet, segment, flow)
}

/// Puts what the options mean on the other leg into them, wherever they stand; adds that to `change`.
#[inline(always)]
fn translate_options(
    packet: impl PacketMut,
    frame: &Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
    mut change: ChecksumChange,
) -> Result<ChecksumChange, Verdict> {
    let segment = &frame.segment;
    let tcp = segment.tcp_offset;
    let options = walk_options(packet, segment)?;
    if options.timestamps != 0 {
        let at = options.timestamps;
        let old: [u32; 2] = packet.load(tcp + at)?;
        let new = timestamps(frame, flow, forward, reverse, old);
        change = change.and_at(at, old[0], new[0]).and_at(at, old[1], new[1]);
        packet.store(tcp + at, &new)?;
    }
    for block in 0..MAX_SACK_BLOCKS {
        if block >= options.sack_blocks {
            break;
        }
        let at = options.sack + block * 8;
        let old: [u32; 2] = packet.load(tcp + at)?;
        let new = old.map(|edge| u32::from_be(edge).wrapping_add(flow.acknowledgement_shift).to_be());
        change = change.and_at(at, old[0], new[0]).and_at(at, old[1], new[1]);
        packet.store(tcp + at, &new)?;
    }
    Ok(change)
}

/// The timestamps `TSval` and `TSecr` of the segment on the other leg, in network byte order as those on this one. Learns how
/// far the clocks are apart.
#[inline(always)]
fn timestamps(
    frame: &Frame,
    flow: &Flow,
    forward: &mut DirectionState,
    reverse: &DirectionState,
    old: [u32; 2],
) -> [u32; 2] {
    let old = Timestamps { value: u32::from_be(old[0]), echo: u32::from_be(old[1]) };
    let mut value_shift = forward.timestamp_shift;
    if forward.timestamp_known == 0 || flow.state == STATE_HANDOVER {
        // SAFETY: the helper has no conditions.
        let now = unsafe { bpf_ktime_get_ns() };
        let clock = translate::clock_at(flow.clock, flow.clock_time, now);
        let shift = clock.wrapping_sub(old.value);
        // Who repeats a SYN has not completed the handshake, and refuses echoes of other clocks than that of its SYNs
        // (`tcp_check_req`), but not their absence: so nothing is learnt from it. Nor from what the receiver does not take:
        // a stranger's clock would make all that the sender says look old.
        if frame.is_accepted {
            forward.learn_clock(shift);
        }
        // While the local socket still sends, its clock is the measure: what is told here must not be ahead of it,
        // or its packets would look old (PAWS), nor behind.
        value_shift = shift;
    }
    let new = old.translated(value_shift, reverse.echo_shift(flow.state));
    [new.value.to_be(), new.echo.to_be()]
}

/// Rewrites a packet of a direct connection for the other leg: nothing but addresses, ports and the hop limit differ.
///
/// # Errors
/// As [`rewrite`].
#[inline(never)]
pub(crate) fn readdress(packet: impl PacketMut, frame: &mut Frame, flow: &Flow) -> Result<(), Verdict> {
    if is_usual(frame, flow) {
        readdress_usual(packet, frame, flow)
    } else {
        readdress_any(packet, frame, flow)
    }
}

/// The short cut of [`readdress_any`] for packets as most are.
///
/// # Errors
/// As [`rewrite`].
#[inline(always)]
pub(crate) fn readdress_usual(packet: impl PacketMut, frame: &mut Frame, flow: &Flow) -> Result<(), Verdict> {
    let segment = &frame.segment;
    let (new_ports, ports) = change_of_ports(segment, flow);
    let addresses = change_of_addresses(segment, flow);
    let keeper = packet.checksum_keeper();
    match segment.version {
        IpVersion::V4 => {
            let [.., source, _, _, _, destination] = *flow.out.address_words();
            let [_, _, _, new @ .., _, _, _, _, _, _, _, _] = &mut frame.headers;
            let [protocol, at_source, at_destination, at_ports, _, _, _, last] = new;
            *protocol = with_hop_limit_v4(*protocol, flow, addresses);
            (*at_source, *at_destination, *at_ports) = (source, destination, new_ports);
            *last = with_checksum(keeper, *last, ports, addresses);
            if keeper == ChecksumKeeper::Kernel {
                let [changed @ .., _, _, _, _] = &*new;
                packet.store(USUAL_CHANGED_V4, changed)?;
            } else {
                packet.store(USUAL_CHANGED_V4, new)?;
            }
        }
        IpVersion::V6 => {
            let [_, _, new @ .., _, _, _] = &mut frame.headers;
            let [length, at_addresses @ .., at_ports, _, _, _, last] = new;
            *length = with_hop_limit_v6(*length, flow);
            *at_addresses = *flow.out.address_words();
            *at_ports = new_ports;
            *last = with_checksum(keeper, *last, ports, addresses);
            if keeper == ChecksumKeeper::Kernel {
                let [changed @ .., _, _, _, _] = &*new;
                packet.store(USUAL_CHANGED_V6, changed)?;
            } else {
                packet.store(USUAL_CHANGED_V6, new)?;
            }
        }
    }
    tell_checksum(packet, &frame.segment, keeper, ports, addresses)
}

/// The same, wherever its headers stand.
///
/// # Errors
/// As [`rewrite`].
#[inline(never)]
pub(crate) fn readdress_any(packet: impl PacketMut, frame: &Frame, flow: &Flow) -> Result<(), Verdict> {
    let segment = &frame.segment;
    let (new_ports, ports) = change_of_ports(segment, flow);
    packet.store(segment.tcp_offset, &new_ports)?;
    packet.change_checksum(segment, ports, Summed::Segment)?;
    translate_addresses(packet, segment, flow)
}

/// The ports of the other leg as they lie in the packet, and what they change.
#[inline(always)]
fn change_of_ports(segment: &Segment, flow: &Flow) -> (u32, ChecksumChange) {
    let [old, new] = [&segment.tuple, &flow.out]
        .map(|tuple| (u32::from(tuple.source_port) << 16 | u32::from(tuple.destination_port)).to_be());
    (new, ChecksumChange::NONE.and(old, new))
}

/// Puts the other leg's addresses and the node's own hop limit into the IP header.
#[inline(always)]
fn translate_addresses(packet: impl PacketMut, segment: &Segment, flow: &Flow) -> Result<(), Verdict> {
    let new = flow.out.address_words();
    let change = change_of_addresses(segment, flow);
    if flow.flags & FLOW_CLEAR_ECN != 0 {
        clear_congestion_marks(packet, segment)?;
    }
    match segment.version {
        IpVersion::V4 => {
            // The TTL and the checksum stand before the addresses; they leave together.
            let offset = segment.ip_offset + IPV4_TTL;
            let word = with_hop_limit_v4(packet.load(offset)?, flow, change);
            packet.store(offset, &[word, new[3], new[7]])?;
        }
        IpVersion::V6 => {
            packet.store(segment.ip_offset + IPV6_HOP_LIMIT, &flow.hop_limit)?;
            packet.store(segment.ip_offset + IPV6_SOURCE, new)?;
        }
    }
    packet.change_checksum(segment, change, Summed::PseudoHeader)
}

/// Takes the marks of explicit congestion notification (RFC 3168, 5) from the IP header.
#[inline(always)]
fn clear_congestion_marks(packet: impl PacketMut, segment: &Segment) -> Result<(), Verdict> {
    let offset = segment.ip_offset;
    // The first two bytes: of IPv4 the version and the type of service, of IPv6 the version and the traffic class.
    let old: [u8; 2] = packet.load(offset)?;
    let new = match segment.version {
        IpVersion::V4 => [old[0], old[1] & !ECN_MASK],
        IpVersion::V6 => [old[0], old[1] & !(ECN_MASK << 4)],
    };
    if new == old {
        return Ok(());
    }
    packet.store(offset, &new)?;
    match segment.version {
        IpVersion::V4 => {
            let [old, new] = [old, new].map(|bytes| u32::from(u16::from_ne_bytes(bytes)));
            let checksum = packet.load(offset + IPV4_CHECKSUM)?;
            packet.store(offset + IPV4_CHECKSUM, &ChecksumChange::NONE.and(old, new).applied_to(checksum))
        }
        IpVersion::V6 => Ok(()),
    }
}

/// Walks the options, with the state of the walk in memory that the verifier does not follow.
#[inline(always)]
pub(crate) fn walk_options(packet: impl PacketMut, segment: &Segment) -> Result<Options, Verdict> {
    let walk = OPTIONS_WALK.get_ptr_mut(0).ok_or(Verdict::OptionsRefused)?;
    // SAFETY: the pointer is to this CPU's value, which no other program uses meanwhile: packets are not interrupted by
    // packets on one CPU. Volatile, so that the state goes through memory.
    unsafe { walk.write_volatile(OptionsWalk::new()) };
    for _ in 0..MAX_OPTIONS {
        // SAFETY: as above.
        let mut state = unsafe { walk.read_volatile() };
        let read = |offset| packet.load(segment.tcp_offset + offset).ok();
        let is_last = state.step(segment.header_length, read).map_err(|_| Verdict::OptionsRefused)?;
        // SAFETY: as above.
        unsafe { walk.write_volatile(state) };
        if is_last {
            // SAFETY: as above.
            return Ok(unsafe { walk.read_volatile() }.found);
        }
    }
    Err(Verdict::OptionsRefused)
}
