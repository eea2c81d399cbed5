//! What senders have to hear of packets that are too large, which the node's stack cannot tell them: it knows nothing of
//! the connections of a flow. What a router says is passed on, and for the node's own interfaces the program speaks itself.

use aya_ebpf::bindings::{TC_ACT_REDIRECT, TC_ACT_SHOT, bpf_adj_room_mode};
use aya_ebpf::helpers::generated::{bpf_skb_adjust_room, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{Flow, STATE_HANDOVER, STATE_OVER, STATE_RESET};
use forwarder_common::icmp::{
    ICMP_CHECKSUM, ICMP_HEADER, ICMP_TOO_BIG, ICMPV6_TOO_BIG, PROTOCOL_ICMP, PROTOCOL_ICMPV6, TooBig,
    parse_too_big,
};
use forwarder_common::packet::{IpVersion, LinkLayer, Segment, tcp_field};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::verdict::Verdict;

use crate::outcome::{Outcome, transmit};
use crate::skb::{
    DONT_FRAGMENT, IPV4_CHECKSUM, IPV4_HEADER, IPV4_SOURCE, IPV6_HEADER, IPV6_SOURCE, SocketBuffer,
    TCP_HEADER, load, store, write,
};
use crate::{flow, handover};
/// How many routers may pass a message on.
const HOP_LIMIT: u32 = 64;

/// Passes on what a router says to the node of a packet that was redirected, to the end that has sent the packet. Every
/// other packet is left as it is: [`Verdict::NotTcp`].
///
/// While the local sockets still send, they see a copy: the packet may have been theirs. Who has not sent it takes no
/// notice, since its number is not one in flight there (`tcp_v4_err`).
#[inline(always)]
pub(crate) fn pass_on(context: &TcContext, link: LinkLayer) -> Outcome {
    let verdict = verdict_on(context, link);
    match verdict {
        Verdict::NotTcp | Verdict::LeftToStack => Outcome::pass(verdict),
        Verdict::TooBigPassedOn => Outcome { action: TC_ACT_REDIRECT, verdict },
        _ => Outcome::drop(verdict),
    }
}

/// A function of its own, so that what it has on the stack leaves it with it. It returns one number: the verifier sees what is left in
/// the register of the result where there are two, and refuses an address.
#[inline(never)]
fn verdict_on(context: &TcContext, link: LinkLayer) -> Verdict {
    let Some(word) = parse_too_big(&SocketBuffer(context), link) else {
        return Verdict::NotTcp;
    };
    // What comes from where the packet went goes to where the packet came from.
    let Some(found) = flow::find(&word.quoted.reversed()) else { return Verdict::NotTcp };
    // Only of a flow of ours: the clone of another installation keeps its mark, or that one would clone it for ever.
    if handover::take_clone(context) {
        return Verdict::NotTcp;
    }
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let flow = unsafe { &*found.flow };
    if flow.state == STATE_OVER || flow.state == STATE_RESET {
        return Verdict::NotTcp;
    }
    if found.pair().is_none() {
        return Verdict::NotTcp;
    }
    if flow.state == STATE_HANDOVER {
        handover::send_clone(context);
    }
    if let Err(verdict) = translate(context, &word, flow) {
        return verdict;
    }
    match transmit(flow).verdict {
        Verdict::LeftToStack => Verdict::LeftToStack,
        _ => Verdict::TooBigPassedOn,
    }
}

/// Has the message quote the packet as its sender knows it, and come from the address that it was sent to. `flow` is that
/// of the opposite direction.
#[inline(always)]
fn translate(context: &TcContext, word: &TooBig, flow: &Flow) -> Result<(), Verdict> {
    let quoted = flow.out.reversed();
    let (old, new) = (word.quoted.address_words(), quoted.address_words());
    let mut change = ChecksumChange::NONE;
    for index in 0..8 {
        change = change.and(old[index], new[index]);
    }
    match word.version {
        IpVersion::V4 => {
            // Its own checksum makes up for what changes in the quoted header.
            let at = word.quoted_offset + IPV4_CHECKSUM;
            let checksum: u16 = load(context, at)?;
            let changed = change.applied_to(checksum);
            store(context, at, &changed)?;
            store(context, word.quoted_offset + IPV4_SOURCE, &[new[3], new[7]])?;
            change = change.and(u32::from(checksum), u32::from(changed));
            let at = word.ip_offset + IPV4_SOURCE;
            let ends: [u32; 2] = load(context, at)?;
            store(context, at, &[new[7], new[3]])?;
            let outer = ChecksumChange::NONE.and(ends[0], new[7]).and(ends[1], new[3]);
            adjust(context, word.ip_offset + IPV4_CHECKSUM, outer)?;
        }
        IpVersion::V6 => {
            store(context, word.quoted_offset + IPV6_SOURCE, new)?;
            let at = word.ip_offset + IPV6_SOURCE;
            let ends: [u32; 8] = load(context, at)?;
            let told = flow.out.address_words();
            store(context, at, told)?;
            // Of IPv6, the message's checksum covers these as well.
            for index in 0..8 {
                change = change.and(ends[index], told[index]);
            }
        }
    }
    let old = [word.quoted.source_port.to_be(), word.quoted.destination_port.to_be()];
    let new = [quoted.source_port.to_be(), quoted.destination_port.to_be()];
    store(context, word.tcp_offset + tcp_field::PORTS as u32, &new)?;
    // The sender's number becomes that of the other leg by what is taken from acknowledgements on their way back.
    let sequence = word.sequence.wrapping_add(flow.acknowledgement_shift).to_be();
    store(context, word.tcp_offset + tcp_field::SEQUENCE as u32, &sequence)?;
    change = change
        .and(u32::from(old[0]), u32::from(new[0]))
        .and(u32::from(old[1]), u32::from(new[1]))
        .and(word.sequence.to_be(), sequence);
    adjust(context, word.icmp_offset + ICMP_CHECKSUM as u32, change)
}

/// Updates a checksum.
#[inline(always)]
fn adjust(context: &TcContext, at: u32, change: ChecksumChange) -> Result<(), Verdict> {
    let checksum: u16 = load(context, at)?;
    store(context, at, &change.applied_to(checksum))
}

/// Whether the packet, or each into which it will be cut, is too large for where it would leave.
#[inline(always)]
pub(crate) fn is_too_big(context: &TcContext, segment: &Segment, flow: &Flow) -> bool {
    if flow.mtu == 0 {
        return false;
    }
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose fields may be read.
    let payload = unsafe { (*context.skb.skb).gso_size };
    let length = match payload {
        0 => context.len().wrapping_sub(segment.ip_offset),
        payload => segment.tcp_offset.wrapping_sub(segment.ip_offset) + segment.header_length + payload,
    };
    flow.is_too_big(length)
}

/// Turns a packet that is too large to leave into what tells its sender so ("Fragmentation Needed", "Packet Too Big").
#[inline(always)]
pub(crate) fn answer_too_big(context: &TcContext, segment: &Segment, flow: &Flow) -> Outcome {
    Outcome { action: action_on_too_big(context, segment, flow), verdict: Verdict::TooBig }
}

/// A function of its own, as [`verdict_on`].
#[inline(never)]
fn action_on_too_big(context: &TcContext, segment: &Segment, flow: &Flow) -> i32 {
    let Some(back) = flow::find(&flow.out.reversed()) else { return TC_ACT_SHOT };
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let back = unsafe { &*back.flow };
    if quote(context, segment, flow.mtu).is_err() {
        return TC_ACT_SHOT;
    }
    transmit(back).action
}

/// Cuts the packet off behind its TCP header, and puts a message in front that quotes it.
///
/// # Errors
/// It has headers that are not expected, or cannot be rewritten.
#[inline(always)]
fn quote(context: &TcContext, segment: &Segment, mtu: u32) -> Result<(), Verdict> {
    let (ip, tcp) = (segment.ip_offset, segment.tcp_offset);
    let headers = tcp.wrapping_sub(ip);
    let skb = context.skb.skb;
    // SAFETY: the context is the program's own; the helper checks the length.
    if unsafe { bpf_skb_change_tail(skb, tcp + TCP_HEADER, 0) } != 0 {
        return Err(Verdict::Unwritable);
    }
    let at = tcp + tcp_field::CHECKSUM as u32;
    write(context, at, &0_u16)?;
    let mut sum = ChecksumChange::NONE;
    for word in 0..TCP_HEADER / 4 {
        sum = sum.and(0, load(context, tcp + word * 4)?);
    }
    // The sender may have left it to the device to fill the checksum in (`CHECKSUM_PARTIAL`), which nobody tells the
    // program, nor can it be undone: then it is filled in after the message's own has been computed. So that it becomes
    // what it is, it is minus half of the rest: half of a number of ones' complement is its rotation.
    let half = (!sum.applied_to(u16::MAX)).rotate_right(1);
    write(context, at, &!half)?;
    sum = sum.and(0, u32::from(!half));
    let words = segment.tuple.address_words();
    let quoted = headers + TCP_HEADER;
    match segment.version {
        // The sum of an IPv4 header is nothing, by its own checksum.
        IpVersion::V4 => {
            let length = IPV4_HEADER + ICMP_HEADER as u32 + quoted;
            let mut message = [
                (0x4500_0000 | length).to_be(),
                DONT_FRAGMENT.to_be(),
                (HOP_LIMIT << 24 | u32::from(PROTOCOL_ICMP) << 16).to_be(),
                words[7],
                words[3],
                u32::from_be_bytes([ICMP_TOO_BIG[0], ICMP_TOO_BIG[1], 0, 0]).to_be(),
                mtu.to_be(),
            ];
            let mut header = ChecksumChange::NONE;
            for word in message.iter().take(5) {
                header = header.and(0, *word);
            }
            message[2] |= low_half(header.applied_to(u16::MAX));
            sum = sum.and(0, message[5]).and(0, message[6]);
            message[5] |= low_half(sum.applied_to(u16::MAX));
            push(context, ip, &message)
        }
        IpVersion::V6 => {
            if headers != IPV6_HEADER {
                return Err(Verdict::Unwritable);
            }
            for word in 0..IPV6_HEADER / 4 {
                sum = sum.and(0, load(context, ip + word * 4)?);
            }
            let length = ICMP_HEADER as u32 + quoted;
            let mut message = [
                0x6000_0000_u32.to_be(),
                (length << 16 | u32::from(PROTOCOL_ICMPV6) << 8 | HOP_LIMIT).to_be(),
                words[4],
                words[5],
                words[6],
                words[7],
                words[0],
                words[1],
                words[2],
                words[3],
                u32::from_be_bytes([ICMPV6_TOO_BIG[0], ICMPV6_TOO_BIG[1], 0, 0]).to_be(),
                mtu.to_be(),
            ];
            // The pseudo-header (RFC 8200, 8.1), and the message.
            sum = sum.and(0, length.to_be()).and(0, u32::from(PROTOCOL_ICMPV6).to_be());
            for word in message.iter().skip(2) {
                sum = sum.and(0, *word);
            }
            message[10] |= low_half(sum.applied_to(u16::MAX));
            push(context, ip, &message)
        }
    }
}

/// A half-word as it lies in the packet, at the place of a word's last two bytes.
#[inline(always)]
fn low_half(value: u16) -> u32 {
    u32::from(u16::from_be(value)).to_be()
}

/// Puts `header` in front of the IP header.
#[inline(always)]
fn push<T>(context: &TcContext, ip: u32, header: &T) -> Result<(), Verdict> {
    let (length, mode) = (size_of::<T>() as i32, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC);
    // SAFETY: the context is the program's own; the helper checks the length.
    if unsafe { bpf_skb_adjust_room(context.skb.skb, length, mode, 0) } != 0 {
        return Err(Verdict::Unwritable);
    }
    write(context, ip, header)
}
