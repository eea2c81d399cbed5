//! How the ends of a pair that the agent has ended hear of it: whoever still sends is answered with a reset.
//!
//! The agent does not always know the number that an end expects, and an end takes no other reset (RFC 5961, 3). What the end
//! itself sends tells it. The local stack would answer in the same way, since it has no socket, but never sees the packet
//! where a firewall drops what connection tracking takes for invalid: that has seen nothing of what was redirected.

use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{DIRECTION_REQUEST, FLOW_BY_STACK, Flow};
use forwarder_common::packet::{FLAG_ACK, FLAG_RST, IpVersion, PROTOCOL_TCP, Segment, tcp_field};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::verdict::Verdict;

use crate::clock::coarse_time;
use crate::maps::{FLOWS, PAIRS};
use crate::outcome::{Outcome, redirect_to_neighbour};
use crate::packet::{PacketMut, Summed};
use crate::skb::{DONT_FRAGMENT, IPV4_TTL, IPV6_HEADER, IPV6_SOURCE, SocketBuffer, TCP_HEADER, load, write};

/// Bytes of an Ethernet address.
const ETHERNET_ADDRESS: usize = 6;

/// What becomes of a packet of a pair that the agent has ended, unless it opens a new connection.
#[inline(never)]
pub(crate) fn answer(context: &TcContext, segment: &Segment, flow: &Flow) -> Outcome {
    note(flow);
    // A reset is never answered, and what acknowledges nothing tells no number (RFC 9293, 3.10.7.1).
    if segment.flags & (FLAG_ACK | FLAG_RST) != FLAG_ACK {
        return Outcome::pass(Verdict::PairMissing);
    }
    let Some(back) = FLOWS.get_ptr(flow.out.reversed()) else {
        return Outcome::pass(Verdict::PairMissing);
    };
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let back = unsafe { &*back };
    // What the stack would take off what it sends on, it does not see.
    let hop_limit = back.hop_limit.saturating_sub((back.flags & FLOW_BY_STACK != 0) as u8);
    match turn(context, segment, hop_limit) {
        Ok(()) => Outcome { action: send_back(context, back), verdict: Verdict::ResetAnswered },
        Err(verdict) => Outcome::drop(verdict),
    }
}

/// Notes that an end has not been quiet: the agent keeps the pair for as long.
#[inline(always)]
fn note(flow: &Flow) {
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else { return };
    // SAFETY: as for flows. Other CPUs may write the same word at the same time.
    let pair = unsafe { &mut *pair };
    let forward = if flow.direction == DIRECTION_REQUEST { &mut pair.request } else { &mut pair.response };
    forward.last_seen = coarse_time();
}

/// Turns a packet into the reset that answers it, as `tcp_v4_send_reset` makes it: with the number that the packet
/// acknowledges, and nothing else. It may have been rewritten in part where that fails.
///
/// # Errors
/// It has headers that are not expected, or cannot be rewritten.
#[inline(always)]
fn turn(context: &TcContext, segment: &Segment, hop_limit: u8) -> Result<(), Verdict> {
    let (ip, tcp) = (segment.ip_offset, segment.tcp_offset);
    let headers = tcp.wrapping_sub(ip);
    // SAFETY: the context is the program's own; the helper checks the length.
    if unsafe { bpf_skb_change_tail(context.skb.skb, tcp + TCP_HEADER, 0) } != 0 {
        return Err(Verdict::Unwritable);
    }
    if ip != 0 {
        let [to, from]: [[u8; ETHERNET_ADDRESS]; 2] = load(context, 0)?;
        write(context, 0, &[from, to])?;
    }
    let words = segment.tuple.address_words();
    let mut pseudo = ChecksumChange::NONE.and(0, (u32::from(PROTOCOL_TCP) + TCP_HEADER).to_be());
    match segment.version {
        IpVersion::V4 => {
            // The addresses change places, which changes no sum. Options stay.
            write(context, ip + IPV4_TTL + 4, &[words[7], words[3]])?;
            pseudo = pseudo.and(0, words[3]).and(0, words[7]);
            let [first, second, third]: [u32; 3] = load(context, ip)?;
            // Version and length of the header stay; the service is the usual one.
            let new_first = ((u32::from_be(first) & 0xff00_0000) | (headers + TCP_HEADER)).to_be();
            let new_second = DONT_FRAGMENT.to_be();
            let (checksum, rest) = (u32::from_be(third) as u16, u32::from_be(third) & 0x00ff_0000);
            let new_third = u32::from(hop_limit) << 24 | rest;
            let change = ChecksumChange::NONE
                .and(first, new_first)
                .and(second, new_second)
                .and((u32::from_be(third) & 0xffff_0000).to_be(), new_third.to_be());
            let checksum = u32::from(u16::from_be(change.applied_to(checksum.to_be())));
            write(context, ip, &[new_first, new_second, (new_third | checksum).to_be()])?;
        }
        IpVersion::V6 => {
            if headers != IPV6_HEADER {
                return Err(Verdict::Unwritable);
            }
            let first = [
                0x6000_0000_u32.to_be(),
                (TCP_HEADER << 16 | u32::from(PROTOCOL_TCP) << 8 | u32::from(hop_limit)).to_be(),
            ];
            write(context, ip, &first)?;
            let ends = [words[4], words[5], words[6], words[7], words[0], words[1], words[2], words[3]];
            write(context, ip + IPV6_SOURCE, &ends)?;
            for word in ends {
                pseudo = pseudo.and(0, word);
            }
        }
    }
    let ports = u32::from(segment.tuple.destination_port) << 16 | u32::from(segment.tuple.source_port);
    // Five words, RST; no window.
    let header: [u32; 4] =
        [ports.to_be(), segment.acknowledgement.to_be(), 0, (5 << 28 | u32::from(FLAG_RST) << 16).to_be()];
    let mut change = ChecksumChange::NONE;
    for word in header {
        change = change.and(0, word);
    }
    write(context, tcp, &header)?;
    // The sum of nothing. The sender may have left it to the device to fill the checksum in (`CHECKSUM_PARTIAL`), which
    // nobody tells the program: then only the pseudo-header is part of what stands here, and the helper knows.
    write(context, tcp + tcp_field::CHECKSUM as u32, &[0xffff_u16, 0])?;
    SocketBuffer(context).change_checksum(segment, change, Summed::Segment)?;
    SocketBuffer(context).change_checksum(segment, pseudo, Summed::PseudoHeader)
}

/// Sends the packet to its sender, whom `back` leads to: never by the stack, whose connection tracking takes it for
/// invalid.
#[inline(always)]
fn send_back(context: &TcContext, back: &Flow) -> i32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose fields may be read.
    let arrival = unsafe { (*context.skb.skb).ifindex };
    if back.interface != arrival {
        return redirect_to_neighbour(back);
    }
    // SAFETY: the helper has no conditions.
    let action = unsafe { bpf_redirect(arrival, 0) };
    action as i32
}
