//! The handover of a pair: its local sockets still deliver what they had received before, and see the acknowledgements of
//! it as clones of the packets that are redirected.

use aya_ebpf::bindings::BPF_F_INGRESS;
use aya_ebpf::helpers::generated::{bpf_clone_redirect, bpf_l3_csum_replace, bpf_skb_change_tail};
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{
    FLAG_ACK, FLAG_FIN, FLAG_PSH, FLAG_RST, IpVersion, PROTOCOL_TCP, Segment, tcp_field,
};
use forwarder_common::translate::{self, ChecksumChange, MAX_SACK_BLOCKS};
use forwarder_common::verdict::Verdict;

use crate::fragment;
use crate::outcome::Outcome;
use crate::rewrite::walk_options;
use crate::sk_lookup::local_numbers;
use crate::skb::{
    IPV4_CHECKSUM, IPV4_LENGTH, IPV6_HEADER, IPV6_LENGTH, SocketBuffer, TCP_HEADER, load, mark, set_mark,
    store,
};

/// The mark of a packet that this program has cloned for the local socket. It is on no other packet: it is set after
/// the packet arrived, and taken away when the clone arrives in its turn.
const CLONE_MARK: u32 = 0x666c_6f77;
/// Words of the longest TCP header.
const MAX_HEADER_WORDS: u32 = 15;

/// Sends a copy of the packet through the ingress of its interface once more, where [`acknowledge`] takes it.
#[inline(always)]
pub(crate) fn send_clone(context: &TcContext) {
    let skb = context.skb.skb;
    // SAFETY: the context is the program's own, and its mark and interface may be read and the mark written. A copy that
    // cannot be made is like one that was lost: the next acknowledgement takes its place.
    unsafe {
        let mark = (*skb).mark;
        (*skb).mark = CLONE_MARK;
        bpf_clone_redirect(skb, (*skb).ifindex, u64::from(BPF_F_INGRESS));
        (*skb).mark = mark;
    }
}

/// Turns the clone of a packet into what tells the local socket how much of its own data has arrived: an acknowledgement
/// without payload, of no more than it has sent.
#[inline(never)]
pub(crate) fn acknowledge(context: &TcContext, segment: &Segment) -> Outcome {
    set_mark(context, 0);
    if segment.flags & FLAG_RST != 0 || segment.flags & FLAG_ACK == 0 || segment.header_length < TCP_HEADER {
        return Outcome::drop(Verdict::HandoverIgnored);
    }
    let Some((sent, received)) = local_numbers(context, segment) else {
        return Outcome::drop(Verdict::HandoverIgnored);
    };
    let acknowledgement =
        if translate::is_before(sent, segment.acknowledgement) { sent } else { segment.acknowledgement };
    let bare = limit_blocks(context, segment, acknowledgement, sent)
        .and_then(|()| bare_acknowledgement(context, segment, received, acknowledgement));
    match bare {
        Ok(()) => Outcome::pass(Verdict::HandoverAcknowledged),
        Err(verdict) => Outcome::drop(verdict),
    }
}

/// Takes from the SACK blocks what lies beyond the data of the local socket, which has sent up to `sent`: it knows nothing of
/// that, and neither does connection tracking, which takes the packet for invalid (`tcp_in_window`).
///
/// # Errors
/// The options cannot be understood, or rewritten.
#[inline(always)]
fn limit_blocks(
    context: &TcContext,
    segment: &Segment,
    acknowledgement: u32,
    sent: u32,
) -> Result<(), Verdict> {
    let options = walk_options(SocketBuffer(context), segment)?;
    for block in 0..MAX_SACK_BLOCKS {
        if block >= options.sack_blocks {
            break;
        }
        let at = segment.tcp_offset + options.sack + block * 8;
        let [left, right]: [u32; 2] = load(context, at)?;
        let (left, right) = (u32::from_be(left), u32::from_be(right));
        if !translate::is_before(sent, right) {
            continue;
        }
        // A block of nothing is passed over (`tcp_is_sackblock_valid`).
        let new =
            if translate::is_before(left, sent) { [left, sent] } else { [acknowledgement, acknowledgement] };
        store(context, at, &[new[0].to_be(), new[1].to_be()])?;
    }
    Ok(())
}

/// Cuts the payload off, and sets the numbers and the flags.
#[inline(always)]
fn bare_acknowledgement(
    context: &TcContext,
    segment: &Segment,
    sequence: u32,
    acknowledgement: u32,
) -> Result<(), Verdict> {
    let tcp = segment.tcp_offset;
    let end = tcp + segment.header_length;
    // SAFETY: the context is the program's own; the helper checks the length.
    if unsafe { bpf_skb_change_tail(context.skb.skb, end, 0) } != 0 {
        return Err(Verdict::Unwritable);
    }
    store(context, tcp + tcp_field::SEQUENCE as u32, &[sequence.to_be(), acknowledgement.to_be()])?;
    let flags = segment.flags & !(FLAG_FIN | FLAG_PSH);
    store(context, tcp + tcp_field::FLAGS as u32, &flags)?;
    let length = end - segment.ip_offset;
    match segment.version {
        IpVersion::V4 => {
            let offset = segment.ip_offset + IPV4_LENGTH;
            let new = (length as u16).to_be();
            // The length on the wire, which may be the short form of a longer one.
            let old: u16 = load(context, offset)?;
            store(context, offset, &new)?;
            let offset = segment.ip_offset + IPV4_CHECKSUM;
            // SAFETY: the context is the program's own; the helper checks the offset.
            let result =
                unsafe { bpf_l3_csum_replace(context.skb.skb, offset, u64::from(old), u64::from(new), 2) };
            if result != 0 {
                return Err(Verdict::Unwritable);
            }
        }
        IpVersion::V6 => {
            let payload = (length - IPV6_HEADER) as u16;
            store(context, segment.ip_offset + IPV6_LENGTH, &payload.to_be())?;
        }
    }
    if segment.is_first_fragment {
        fragment::make_whole(context, segment)?;
    }
    sum(context, segment)
}

/// Computes the TCP checksum of a segment without payload anew.
#[inline(always)]
fn sum(context: &TcContext, segment: &Segment) -> Result<(), Verdict> {
    let tcp = segment.tcp_offset;
    let words = segment.tuple.address_words();
    let mut sum = ChecksumChange::NONE;
    let mut word = match segment.version {
        // Of the form in which the maps know it, only the last word is part of the pseudo-header.
        IpVersion::V4 => 3,
        IpVersion::V6 => 0,
    };
    while word < 4 {
        sum = sum.and(0, words[word]).and(0, words[word + 4]);
        word += 1;
    }
    sum = sum.and(0, (u32::from(PROTOCOL_TCP) + segment.header_length).to_be());
    store(context, tcp + tcp_field::CHECKSUM as u32, &0_u16)?;
    for word in 0..MAX_HEADER_WORDS {
        if word * 4 >= segment.header_length {
            break;
        }
        sum = sum.and(0, load(context, tcp + word * 4)?);
    }
    store(context, tcp + tcp_field::CHECKSUM as u32, &sum.applied_to(u16::MAX))
}

/// Whether the packet is a clone that [`send_clone`] has made.
#[inline(always)]
pub(crate) fn is_clone(context: &TcContext) -> bool {
    mark(context) == CLONE_MARK
}

/// Takes the mark from such a clone of a packet that the local stack is to see as it is; tells whether it is one.
#[inline(always)]
pub(crate) fn take_clone(context: &TcContext) -> bool {
    let is_one = is_clone(context);
    if is_one {
        set_mark(context, 0);
    }
    is_one
}
