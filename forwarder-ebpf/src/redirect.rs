//! The redirector: turns the packets of a promoted pair's one leg into packets of the other leg, and sends them on.
//!
//! See [`forwarder_common::translate`] for the arithmetic and [`forwarder_common::flow`] for what stands in the maps.

use core::mem::zeroed;

use aya_ebpf::bindings::{BPF_F_CURRENT_NETNS, BPF_F_INGRESS, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, bpf_sock_tuple};
use aya_ebpf::helpers::generated::{
    bpf_clone_redirect, bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh,
    bpf_sk_release, bpf_skb_change_tail, bpf_skb_store_bytes, bpf_skc_lookup_tcp, bpf_tcp_sock,
};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{DIRECTION_REQUEST, Flow, HALF_FIN, HALF_RESET, Half, STATE_TAIL};
use forwarder_common::packet::{
    FLAG_ACK, FLAG_FIN, FLAG_PSH, FLAG_RST, FLAG_SYN, IpVersion, PROTOCOL_TCP, Segment, tcp_field,
};
use forwarder_common::translate::{
    self, ChecksumChange, MAX_OPTIONS, MAX_SACK_BLOCKS, Options, OptionsWalk, Timestamps,
};
use forwarder_common::verdict::Verdict;

use crate::maps::{FLOWS, OPTIONS_WALK, PAIRS};

/// The mark of a packet that this program has cloned for the local socket. It is on no other packet: it is set after
/// the packet arrived, and taken away when the clone arrives in its turn.
const CLONE_MARK: u32 = 0x666c_6f77;

/// Where fields stand in the IP headers, in bytes from their first.
const IPV4_LENGTH: u32 = 2;
const IPV4_CHECKSUM: u32 = 10;
const IPV4_SOURCE: u32 = 12;
const IPV6_LENGTH: u32 = 4;
const IPV6_SOURCE: u32 = 8;
/// Words of the longest TCP header.
const MAX_HEADER_WORDS: u32 = 15;
/// Bytes of the IPv6 header, which its length does not count.
const IPV6_HEADER: u32 = 40;

/// What becomes of a packet that belongs to a flow.
pub(crate) struct Outcome {
    /// What the program returns.
    pub(crate) action: i32,
    /// Why.
    pub(crate) verdict: Verdict,
}

impl Outcome {
    #[inline(always)]
    fn drop(verdict: Verdict) -> Self {
        Self { action: TC_ACT_SHOT, verdict }
    }
}

/// Translates and redirects the packet if it is one of a flow. `None` for every other packet, which is unchanged.
#[inline(always)]
pub(crate) fn redirect(context: &TcContext, segment: &Segment) -> Option<Outcome> {
    let flow = FLOWS.get_ptr(segment.tuple)?;
    // SAFETY: the element lives until every running program has left it, for the map is not preallocated; a value is
    // replaced as a whole by a new element, so what is read is of one version.
    let flow = unsafe { &*flow };
    if segment.flags & FLAG_SYN != 0 {
        // A new connection on an old tuple, or a duplicate from the time of the handshake: the local stack knows.
        return None;
    }
    if mark(context) == CLONE_MARK {
        return Some(acknowledge_tail(context, segment));
    }
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else {
        return Some(Outcome::drop(Verdict::PairMissing));
    };
    // SAFETY: as above. Other CPUs may write to it at the same time: each field is of one word, and none depends on
    // another but for the learning of a timestamp, which writes the value before it says that it is known.
    let pair = unsafe { &mut *pair };
    let (half, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    if flow.state == STATE_TAIL {
        clone_for_tail(context);
    }
    Some(match translate(context, segment, flow, half, reverse) {
        Ok(()) => {
            count(segment, half, payload_length(context, segment));
            // SAFETY: no parameters: the kernel looks up the next hop by the packet's destination.
            let action = unsafe { bpf_redirect_neigh(flow.interface, core::ptr::null_mut(), 0, 0) };
            Outcome { action: action as i32, verdict: Verdict::Redirected }
        }
        Err(verdict) => Outcome::drop(verdict),
    })
}

/// Notes the packet in what is known of its direction.
#[inline(always)]
fn count(segment: &Segment, half: &mut Half, payload: u32) {
    let mut end = segment.sequence.wrapping_add(payload);
    if segment.flags & FLAG_FIN != 0 {
        end = end.wrapping_add(1);
        half.fin_end = end;
        half.flags |= HALF_FIN;
    }
    if segment.flags & FLAG_RST != 0 {
        half.flags |= HALF_RESET;
    }
    if half.packets == 0 || translate::is_before(half.sequence_end, end) {
        half.sequence_end = end;
    }
    if segment.flags & FLAG_ACK != 0 {
        half.acknowledged = segment.acknowledgement;
    }
    half.packets += 1;
    half.bytes += u64::from(payload);
    // SAFETY: the helper has no conditions.
    half.last_seen = unsafe { bpf_ktime_get_ns() };
}

/// Bytes of TCP payload, without what pads a short frame.
#[inline(always)]
pub(crate) fn payload_length(context: &TcContext, segment: &Segment) -> u32 {
    let total = match segment.ip_length {
        0 => context.len().wrapping_sub(segment.ip_offset),
        length => length,
    };
    let headers = segment.tcp_offset.wrapping_sub(segment.ip_offset) + segment.header_length;
    total.saturating_sub(headers)
}

/// Rewrites the packet for the other leg.
///
/// # Errors
/// Why it cannot be: it may be rewritten in part, and must be dropped.
#[inline(never)]
fn translate(
    context: &TcContext,
    segment: &Segment,
    flow: &Flow,
    half: &mut Half,
    reverse: &Half,
) -> Result<(), Verdict> {
    let tcp = segment.tcp_offset;
    let options = options(context, segment)?;
    let mut change = ChecksumChange::NONE;

    let sequence = segment.sequence.wrapping_add(flow.sequence_shift);
    let acknowledgement = if segment.flags & FLAG_ACK != 0 {
        segment.acknowledgement.wrapping_add(flow.acknowledgement_shift)
    } else {
        segment.acknowledgement
    };
    let numbers = [sequence.to_be(), acknowledgement.to_be()];
    change =
        change.and(segment.sequence.to_be(), numbers[0]).and(segment.acknowledgement.to_be(), numbers[1]);
    store(context, tcp + tcp_field::SEQUENCE as u32, &numbers)?;

    let window = translate::window(segment.window, flow.source_scale, flow.target_scale).to_be();
    change = change.and(u32::from(segment.window.to_be()), u32::from(window));
    store(context, tcp + tcp_field::WINDOW as u32, &window)?;

    let ports = [flow.out.source_port.to_be(), flow.out.destination_port.to_be()];
    change = change
        .and(u32::from(segment.tuple.source_port.to_be()), u32::from(ports[0]))
        .and(u32::from(segment.tuple.destination_port.to_be()), u32::from(ports[1]));
    store(context, tcp + tcp_field::PORTS as u32, &ports)?;

    if options.timestamps != 0 {
        let at = options.timestamps;
        let [value, echo]: [u32; 2] = load(context, tcp + at)?;
        let old = Timestamps { value: u32::from_be(value), echo: u32::from_be(echo) };
        if half.timestamp_known == 0 {
            // SAFETY: the helper has no conditions.
            let now = unsafe { bpf_ktime_get_ns() };
            let clock = translate::clock_at(flow.clock, flow.clock_time, now);
            // Two CPUs may do so at once: their shifts then differ by one tick at most, which a receiver tolerates
            // (`TCP_PAWS_WINDOW`).
            half.timestamp_shift = clock.wrapping_sub(old.value);
            half.timestamp_known = 1;
        }
        let reverse_shift = (reverse.timestamp_known != 0).then_some(reverse.timestamp_shift);
        let new = old.translated(half.timestamp_shift, reverse_shift);
        let new = [new.value.to_be(), new.echo.to_be()];
        change = change.and_at(at, value, new[0]).and_at(at, echo, new[1]);
        store(context, tcp + at, &new)?;
    }
    for block in 0..MAX_SACK_BLOCKS {
        if block >= options.sack_blocks {
            break;
        }
        let at = options.sack + block * 8;
        let old: [u32; 2] = load(context, tcp + at)?;
        let new = old.map(|edge| u32::from_be(edge).wrapping_add(flow.acknowledgement_shift).to_be());
        change = change.and_at(at, old[0], new[0]).and_at(at, old[1], new[1]);
        store(context, tcp + at, &new)?;
    }
    checksum(context, segment, change, 0)?;
    translate_addresses(context, segment, flow)
}

/// Puts the other leg's addresses into the IP header.
#[inline(always)]
fn translate_addresses(context: &TcContext, segment: &Segment, flow: &Flow) -> Result<(), Verdict> {
    let old = segment.tuple.address_words();
    let new = flow.out.address_words();
    let mut change = ChecksumChange::NONE;
    for word in 0..8 {
        change = change.and(old[word], new[word]);
    }
    match segment.version {
        IpVersion::V4 => {
            store(context, segment.ip_offset + IPV4_SOURCE, &[new[3], new[7]])?;
            let offset = segment.ip_offset + IPV4_CHECKSUM;
            let change = u64::from(change.folded());
            // SAFETY: the context is the program's own; the helper checks the offset.
            if unsafe { bpf_l3_csum_replace(context.skb.skb, offset, 0, change, 0) } != 0 {
                return Err(Verdict::Unwritable);
            }
        }
        IpVersion::V6 => store(context, segment.ip_offset + IPV6_SOURCE, new)?,
    }
    checksum(context, segment, change, u64::from(BPF_F_PSEUDO_HDR))
}

/// Updates the TCP checksum.
#[inline(always)]
fn checksum(
    context: &TcContext,
    segment: &Segment,
    change: ChecksumChange,
    flags: u64,
) -> Result<(), Verdict> {
    let offset = segment.tcp_offset + tcp_field::CHECKSUM as u32;
    let change = u64::from(change.folded());
    // SAFETY: the context is the program's own; the helper checks the offset.
    match unsafe { bpf_l4_csum_replace(context.skb.skb, offset, 0, change, flags) } {
        0 => Ok(()),
        _ => Err(Verdict::Unwritable),
    }
}

/// Finds the options to translate: at once where they stand as Linux writes them, else by walking.
#[inline(always)]
fn options(context: &TcContext, segment: &Segment) -> Result<Options, Verdict> {
    if segment.header_length <= 20 {
        return Ok(Options::default());
    }
    if segment.header_length == 32 {
        let first: [u8; 4] = load(context, segment.tcp_offset + 20)?;
        if first == [1, 1, 8, 10] {
            return Ok(Options { timestamps: 24, sack: 0, sack_blocks: 0 });
        }
    }
    walk_options(context, segment)
}

/// Walks the options, with the state of the walk in memory that the verifier does not follow.
#[inline(always)]
fn walk_options(context: &TcContext, segment: &Segment) -> Result<Options, Verdict> {
    let walk = OPTIONS_WALK.get_ptr_mut(0).ok_or(Verdict::OptionsRefused)?;
    // SAFETY: the pointer is to this CPU's value, which no other program uses meanwhile: packets are not interrupted by
    // packets on one CPU. Volatile, so that the state goes through memory.
    unsafe { walk.write_volatile(OptionsWalk::new()) };
    for _ in 0..MAX_OPTIONS {
        // SAFETY: as above.
        let mut state = unsafe { walk.read_volatile() };
        let read = |offset| load(context, segment.tcp_offset + offset).ok();
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

/// Sends a copy of the packet through the ingress of its interface once more, where [`acknowledge_tail`] takes it.
#[inline(always)]
fn clone_for_tail(context: &TcContext) {
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
fn acknowledge_tail(context: &TcContext, segment: &Segment) -> Outcome {
    set_mark(context, 0);
    if segment.flags & FLAG_RST != 0 || segment.flags & FLAG_ACK == 0 || segment.header_length < 20 {
        return Outcome::drop(Verdict::TailIgnored);
    }
    let Some((sent, received)) = local_numbers(context, segment) else {
        return Outcome::drop(Verdict::TailIgnored);
    };
    let acknowledgement =
        if translate::is_before(sent, segment.acknowledgement) { sent } else { segment.acknowledgement };
    match bare_acknowledgement(context, segment, received, acknowledgement) {
        Ok(()) => Outcome { action: aya_ebpf::bindings::TC_ACT_UNSPEC, verdict: Verdict::TailAcknowledged },
        Err(verdict) => Outcome::drop(verdict),
    }
}

/// `snd_nxt` and `rcv_nxt` of the local socket that the packet is for.
#[inline(always)]
fn local_numbers(context: &TcContext, segment: &Segment) -> Option<(u32, u32)> {
    // SAFETY: a plain old structure, for which zeros are valid.
    let mut tuple: bpf_sock_tuple = unsafe { zeroed() };
    let words = segment.tuple.address_words();
    let ports = [segment.tuple.source_port.to_be(), segment.tuple.destination_port.to_be()];
    let size = match segment.version {
        IpVersion::V4 => {
            // SAFETY: the union has only plain members.
            let v4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
            (v4.saddr, v4.daddr, v4.sport, v4.dport) = (words[3], words[7], ports[0], ports[1]);
            size_of_val(v4)
        }
        IpVersion::V6 => {
            // SAFETY: as above.
            let v6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
            v6.saddr = [words[0], words[1], words[2], words[3]];
            v6.daddr = [words[4], words[5], words[6], words[7]];
            (v6.sport, v6.dport) = (ports[0], ports[1]);
            size_of_val(v6)
        }
    };
    // SAFETY: the tuple is initialised and of the size given; what is found is released below, on every way.
    unsafe {
        let socket = bpf_skc_lookup_tcp(
            context.skb.skb.cast(),
            &raw mut tuple,
            size as u32,
            BPF_F_CURRENT_NETNS as u64,
            0,
        );
        if socket.is_null() {
            return None;
        }
        let tcp = bpf_tcp_sock(socket);
        let numbers = if tcp.is_null() { None } else { Some(((*tcp).snd_nxt, (*tcp).rcv_nxt)) };
        bpf_sk_release(socket.cast());
        numbers
    }
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

#[inline(always)]
fn mark(context: &TcContext) -> u32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose mark may be read.
    unsafe { (*context.skb.skb).mark }
}

#[inline(always)]
fn set_mark(context: &TcContext, mark: u32) {
    // SAFETY: as above; it may be written too.
    unsafe { (*context.skb.skb).mark = mark }
}

#[inline(always)]
fn load<T>(context: &TcContext, offset: u32) -> Result<T, Verdict> {
    context.load(offset as usize).map_err(|_| Verdict::Truncated)
}

#[inline(always)]
fn store<T>(context: &TcContext, offset: u32, value: &T) -> Result<(), Verdict> {
    // SAFETY: the value is initialised and of its own size; the helper checks the offset.
    let result = unsafe {
        bpf_skb_store_bytes(context.skb.skb, offset, (&raw const *value).cast(), size_of::<T>() as u32, 0)
    };
    if result == 0 { Ok(()) } else { Err(Verdict::Unwritable) }
}
