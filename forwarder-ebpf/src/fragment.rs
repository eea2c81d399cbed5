//! Fragments of flows' packets. A client that lets routers cut its packets up (IPv4 without DF) may stand behind a smaller MTU,
//! and once a pair is offloaded there is no local socket that the stack could put them together for: so each fragment is
//! translated by itself, as it comes.
//!
//! Only the first has a TCP header. All that changes in a packet lies in it and in the IP headers, so that the change of the
//! checksum, which covers the whole packet, is known without the rest of it (RFC 1624). It is remembered in [`FRAGMENTS`] for
//! the others, which get the other leg's addresses. The identification stays, as behind netfilter's NAT.
//!
//! - A fragment that comes before the first of its packet cannot be attributed. It is left to the stack
//!   ([`Verdict::Fragment`]), as it may be anybody's, and the sender sends the packet again.
//! - [`FRAGMENTS`] is fed by first fragments alone, and of those by the ones that [`redirect`](crate::redirect) takes for a
//!   flow's. Who forges one (it takes the 4-tuple, and the identification that the sender uses next) sends the others of
//!   that packet elsewhere, where the TCP checksum of what they are put together to does not match: a loss, which the sender
//!   makes up for. Linux's own reassembly can be spoilt for no more (`ip_frag_queue`).

#![expect(clippy::needless_borrows_for_generic_args, reason = "copies would stand on the stack")]

use aya_ebpf::helpers::generated::bpf_l3_csum_replace;
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    DIRECTION_REQUEST, FLOW_CLEAR_ECN, Flow, STATE_HANDOVER, STATE_OFFLOADED, Seen,
};
use forwarder_common::packet::{
    FLAG_RST, FLAG_SYN, Fragment, IPV4_MORE_FRAGMENTS, IPV6_MORE_FRAGMENTS, IpVersion, LinkLayer, Segment,
    ip_header, parse_fragment,
};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::tuple::FourTuple;
use forwarder_common::verdict::Verdict;

use crate::arrival::is_expected;
use crate::clock::coarse_time;
use crate::flow;
use crate::maps::{FRAGMENTS, FRAME, FirstFragment, FragmentKey, INGRESS};
use crate::outcome::{Outcome, transmit};
use crate::skb::{ECN_MASK, IPV4_CHECKSUM, SocketBuffer, TCP_HEADER, load, store, write};
/// For how long, in nanoseconds. The fragments of a packet leave together, and identifications are used again: of IPv4 there
/// are 65,536, which connections of one client may draw at random.
const LIFETIME: u64 = 2_000_000_000;

/// Remembers the first fragment of a flow's packet, for the others.
///
/// # Errors
/// It does not hold the TCP header, of which others could then overwrite what was checked (RFC 1858).
#[inline(never)]
pub(crate) fn announce(context: &TcContext, segment: &Segment) -> Result<(), Verdict> {
    let fragment = find(context, segment).ok_or(Verdict::FragmentRefused)?;
    let headers = segment.tcp_offset.wrapping_sub(fragment.piece_offset) + segment.header_length;
    if segment.header_length < TCP_HEADER || headers > fragment.length {
        return Err(Verdict::FragmentRefused);
    }
    let first = FirstFragment {
        time: coarse_time(),
        sequence: segment.sequence.wrapping_add(fragment.length - headers),
        acknowledgement: segment.acknowledgement,
        length: fragment.length,
        source_port: segment.tuple.source_port,
        destination_port: segment.tuple.destination_port,
        window: segment.window,
        flags: segment.flags,
        pad: [0; 5],
    };
    // Where it cannot be, because CPUs are at odds over the last elements, the others are like ones that came too early.
    let _ = FRAGMENTS.insert(&FragmentKey::of(&fragment), &first, 0);
    Ok(())
}

/// Forgets what an earlier packet of the same identification has left, since this one is of no flow.
#[inline(never)]
pub(crate) fn forget(context: &TcContext, segment: &Segment) -> u32 {
    if let Some(fragment) = find(context, segment) {
        // What is not there needs no removal.
        let _ = FRAGMENTS.remove(&FragmentKey::of(&fragment));
    }
    0
}

/// Translates and redirects a fragment other than the first, if that was of a flow.
#[inline(never)]
pub(crate) fn redirect(context: &TcContext, link: LinkLayer) -> Outcome {
    let is_others = Outcome::pass(Verdict::Fragment);
    let Ok((version, ip_offset)) = ip_header(&SocketBuffer(context), link) else { return is_others };
    let Some(fragment) = parse_fragment(&SocketBuffer(context), version, ip_offset) else { return is_others };
    let Some(first) = FRAGMENTS.get_ptr(&FragmentKey::of(&fragment)) else { return is_others };
    // SAFETY: the element is one of the map, whatever becomes of it: see there. Any bits are valid.
    let first = unsafe { &*first };
    let now = coarse_time();
    if now.saturating_sub(first.time) > LIFETIME {
        return is_others;
    }
    let tuple = FourTuple {
        source: fragment.source,
        destination: fragment.destination,
        source_port: first.source_port,
        destination_port: first.destination_port,
    };
    let Some(found) = flow::find(&tuple) else { return is_others };
    // SAFETY: the element is allocated to nobody else while this program runs: see `maps`.
    let flow = unsafe { &*found.flow };
    if flow.state != STATE_HANDOVER && flow.state != STATE_OFFLOADED {
        return is_others;
    }
    if !is_expected(context, version, flow) {
        return Outcome::pass(Verdict::OtherInterface);
    }
    let Some(pair) = found.pair() else { return is_others };
    if fragment.position < first.length {
        return Outcome::drop(Verdict::FragmentRefused);
    }
    let ip_offset = ip_offset as u32;
    if flow.is_too_big(fragment.piece_offset.wrapping_sub(ip_offset) + fragment.length) {
        return Outcome::drop(Verdict::TooBig);
    }
    if let Err(verdict) = translate(context, version, ip_offset, flow) {
        return Outcome::drop(verdict);
    }
    // SAFETY: as in `redirect::redirect`.
    let pair = unsafe { &mut *pair };
    let (forward, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    if fragment.is_last && first.flags & (FLAG_SYN | FLAG_RST) == 0 {
        let Some(frame) = FRAME.get_ptr_mut(INGRESS) else { return is_others };
        // SAFETY: as in `find_segment`. There is no room for it on the stack.
        let seen = unsafe { &mut (*frame).seen };
        // Only now is it known how long the segment is.
        *seen = Seen {
            sequence: first.sequence,
            acknowledgement: first.acknowledgement,
            // The element may have become another's meanwhile: then this is nonsense, but no number beyond the packet.
            payload: (fragment.position + fragment.length).saturating_sub(first.length),
            window: first.window,
            flags: first.flags,
            time: now,
        };
        let is_accepted = forward.accepts(reverse, flow, seen);
        forward.note(reverse, flow, seen, is_accepted);
    } else {
        // The rest is noted with the first and with the last.
        forward.packets += 1;
    }
    transmit(flow)
}

/// Makes a packet of what was a first fragment, and has been cut off behind its TCP header.
///
/// # Errors
/// It cannot be rewritten.
#[inline(never)]
pub(crate) fn make_whole(context: &TcContext, segment: &Segment) -> Result<(), Verdict> {
    let fragment = find(context, segment).ok_or(Verdict::Unwritable)?;
    let old: u16 = load(context, fragment.flags_offset)?;
    match segment.version {
        IpVersion::V4 => {
            let new = old & !IPV4_MORE_FRAGMENTS.to_be();
            store(context, fragment.flags_offset, &new)?;
            let at = segment.ip_offset + IPV4_CHECKSUM;
            // SAFETY: the context is the program's own; the helper checks the offset.
            match unsafe { bpf_l3_csum_replace(context.skb.skb, at, old.into(), new.into(), 2) } {
                0 => Ok(()),
                _ => Err(Verdict::Unwritable),
            }
        }
        IpVersion::V6 => store(context, fragment.flags_offset, &(old & !IPV6_MORE_FRAGMENTS.to_be())),
    }
}

/// The fragment that a segment is the beginning of.
#[inline(always)]
fn find(context: &TcContext, segment: &Segment) -> Option<Fragment> {
    parse_fragment(&SocketBuffer(context), segment.version, segment.ip_offset as usize)
}

/// Puts the addresses and the hop limit of the other leg into the IP header, and takes marks from it that nobody would answer.
#[inline(always)]
fn translate(context: &TcContext, version: IpVersion, ip_offset: u32, flow: &Flow) -> Result<(), Verdict> {
    let out = flow.out.address_words();
    match version {
        IpVersion::V4 => {
            let [first, length, protocol, source, destination]: [u32; 5] = load(context, ip_offset)?;
            let new_first = first & !congestion_marks(flow, u32::from(ECN_MASK) << 16);
            let protocol = u32::from_be(protocol);
            let (old, checksum) = (protocol & 0xffff_0000, (protocol as u16).to_be());
            let new = old & 0x00ff_ffff | u32::from(flow.hop_limit) << 24;
            let change = ChecksumChange::NONE
                .and(first, new_first)
                .and(old.to_be(), new.to_be())
                .and(source, out[3])
                .and(destination, out[7]);
            let protocol = new | u32::from(u16::from_be(change.applied_to(checksum)));
            store(context, ip_offset, &[new_first, length, protocol.to_be(), out[3], out[7]])
        }
        IpVersion::V6 => {
            let [first, second]: [u32; 2] = load(context, ip_offset)?;
            let first = first & !congestion_marks(flow, u32::from(ECN_MASK) << 20);
            let second = second & !0xff_u32.to_be() | u32::from(flow.hop_limit).to_be();
            let [a, b, c, d, e, f, g, h] = *out;
            write(context, ip_offset, &[first, second, a, b, c, d, e, f, g, h])
        }
    }
}

/// The marks of explicit congestion notification, which stand at `mask` in the IP header's first word, if they are to go.
/// What is put together of fragments with and without them is dropped (`ip_frag_ecn_table`).
#[inline(always)]
const fn congestion_marks(flow: &Flow, mask: u32) -> u32 {
    if flow.flags & FLOW_CLEAR_ECN != 0 { mask.to_be() } else { 0 }
}
