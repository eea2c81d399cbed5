//! Answers to SYNs of a flood with SYN cookies ([`crate::cookie`]), out of the frame that the SYN has come in.

use aya_ebpf::bindings::BPF_FIB_LKUP_RET_SUCCESS;
use aya_ebpf::bindings::xdp_action::XDP_DROP;
use aya_ebpf::programs::XdpContext;
use forwarder_common::layout::STATE_READY;
use forwarder_common::packet::{IpVersion, PROTOCOL_TCP, Segment};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::tuple::FourTuple;
use forwarder_common::verdict::Verdict;

use crate::admission::{count_attempt, find_listener, is_leaving};
use crate::clients::Stage;
use crate::cookie::{self, Cookie, HOP_LIMIT};
use crate::outcome::Outcome;
use crate::packet::PacketMut as _;
use crate::skb::{DONT_FRAGMENT, IPV4_HEADER, IPV6_HEADER, TCP_HEADER};
use crate::xdp::forward::{interface, is_for, own_address, send_by};
use crate::xdp::frame::{ETHERNET_HEADER, UsualFrame, XdpFrame};
use crate::{direct, flood, flow, route};

/// The most words of TCP options.
const MOST_OPTIONS: u32 = 10;
/// The sum of nothing, as a checksum.
const NOTHING: u16 = 0xffff;

/// Answers a SYN, if it is one of a flood to a listener. `None` where TC is to see it.
#[inline(always)]
pub(super) fn answer(context: &XdpContext, segment: &Segment) -> Option<Outcome> {
    match try_answer(context, segment) {
        0 => None,
        action => {
            let verdict = if action == XDP_DROP { Verdict::Unwritable } else { Verdict::CookieSent };
            Some(Outcome { action: action as i32, verdict })
        }
    }
}

/// The same. Returns what the program is to return; 0 where TC decides that. (Older verifiers want a number of functions.)
#[inline(never)]
fn try_answer(context: &XdpContext, segment: &Segment) -> u32 {
    let tuple = &segment.tuple;
    let Ok(listener) = find_listener(&tuple.destination, tuple.destination_port) else { return 0 };
    let own = own_address(context);
    if listener.state != STATE_READY
        // Only TC counts how often a client comes.
        || listener.client_rate != 0
        || segment.ip_offset != ETHERNET_HEADER as u32
        || !cookie::is_plain(segment)
        || !is_for(XdpFrame(context), own)
        || is_leaving()
        || flow::has_direct() && direct::may_take(&listener, segment)
        || !flood::is_one_too_many(Stage::Xdp, &tuple.source)
        // What becomes of a SYN on the tuple of a connection, TC knows.
        || flow::find(tuple).is_some()
    {
        return 0;
    }
    let Some([first, second, third, mtu]) = neighbour(context, segment) else { return 0 };
    let Some(action) = send_by(context, interface(context), own) else { return 0 };
    let option = XdpFrame(context).load(segment.tcp_offset + TCP_HEADER).unwrap_or_default();
    let Some(cookie) = cookie::make(context.ctx.cast(), segment, option, mtu) else { return 0 };
    flood::note();
    count_attempt(listener.listener_id, segment.ip_length);
    if write(context, segment, &cookie, &[first, second, third]).is_ok() { action } else { XDP_DROP }
}

/// The first bytes of a frame to who has sent the segment, and how many bytes a packet may have there; `None` where it would not leave by the interface that the segment has come by,
/// or the kernel does not know them.
#[inline(always)]
fn neighbour(context: &XdpContext, segment: &Segment) -> Option<[u32; 4]> {
    let interface = interface(context);
    let mut question = route::back(segment, interface);
    let found = route::ask(context.ctx.cast(), &mut question, 0);
    let is_known = found == i64::from(BPF_FIB_LKUP_RET_SUCCESS) && question.ifindex == interface;
    let [first, second, third] = route::ethernet(&question);
    is_known.then(|| [first, second, third, route::mtu(&question)])
}

/// Turns the frame into the answer. Its length stays: what is not the one option, is the end of options (RFC 9293, 3.1).
///
/// # Errors
/// The frame ends before, or may not be written.
#[inline(always)]
fn write(
    context: &XdpContext,
    segment: &Segment,
    cookie: &Cookie,
    addresses: &[u32; 3],
) -> Result<(), Verdict> {
    const IP: u32 = ETHERNET_HEADER as u32;
    let frame = UsualFrame(context);
    let length = segment.header_length;
    let [a, b, c, d, e, f, g, h] = *segment.tuple.address_words();
    let pseudo = ChecksumChange::NONE.and(0, (u32::from(PROTOCOL_TCP) + length).to_be());
    frame.store(0, addresses)?;
    match segment.version {
        IpVersion::V4 => {
            let first = (0x4500_0000 | (IPV4_HEADER + length)).to_be();
            let third = u32::from(HOP_LIMIT) << 24 | u32::from(PROTOCOL_TCP) << 16;
            let sum = ChecksumChange::NONE
                .and(0, first)
                .and(0, DONT_FRAGMENT.to_be())
                .and(0, third.to_be())
                .and(0, h)
                .and(0, d);
            let third = third | u32::from(u16::from_be(sum.applied_to(NOTHING)));
            frame.store(IP, &[first, DONT_FRAGMENT.to_be(), third.to_be(), h, d])?;
            write_tcp(frame, IP + IPV4_HEADER, segment, cookie, pseudo.and(0, h).and(0, d))
        }
        IpVersion::V6 => {
            let second = length << 16 | u32::from(PROTOCOL_TCP) << 8 | u32::from(HOP_LIMIT);
            let header = [0x6000_0000_u32.to_be(), second.to_be(), e, f, g, h, a, b, c, d];
            frame.store(IP, &header)?;
            let mut pseudo = pseudo;
            for word in segment.tuple.address_words() {
                pseudo = pseudo.and(0, *word);
            }
            write_tcp(frame, IP + IPV6_HEADER, segment, cookie, pseudo)
        }
    }
}

/// Writes the TCP header, which begins `at` so many bytes from the frame's first.
///
/// # Errors
/// As [`write`].
#[inline(always)]
fn write_tcp(
    frame: UsualFrame<'_>,
    at: u32,
    segment: &Segment,
    cookie: &Cookie,
    pseudo: ChecksumChange,
) -> Result<(), Verdict> {
    let options = segment.header_length.saturating_sub(TCP_HEADER);
    let FourTuple { source_port, destination_port, .. } = segment.tuple;
    let mut header = [
        (u32::from(destination_port) << 16 | u32::from(source_port)).to_be(),
        cookie.number.to_be(),
        segment.sequence.wrapping_add(1).to_be(),
        Cookie::rest(options).to_be(),
        0,
    ];
    let mut sum = pseudo;
    for word in header {
        sum = sum.and(0, word);
    }
    if options > 0 {
        sum = sum.and(0, cookie.option);
        frame.store(at + TCP_HEADER, &[cookie.option])?;
    }
    header[4] = (u32::from(u16::from_be(sum.applied_to(NOTHING))) << 16).to_be();
    for index in 1..MOST_OPTIONS {
        if index * 4 < options {
            frame.store(at + TCP_HEADER + index * 4, &[0_u32])?;
        }
    }
    frame.store(at, &header)
}
