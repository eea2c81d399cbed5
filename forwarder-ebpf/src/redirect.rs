//! The redirector: turns the packets of a promoted pair's one leg into packets of the other leg, and sends them on.
//!
//! See [`forwarder_common::translate`] for the arithmetic and [`forwarder_common::flow`] for what stands in the maps.

use aya_ebpf::bindings::{BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::generated::{
    bpf_ktime_get_ns, bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_redirect_neigh, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use forwarder_common::flow::{
    DIRECTION_REQUEST, FLOW_CLEAR_ECN, Flow, Half, STATE_SPLICED, STATE_TAIL, Seen,
};
use forwarder_common::packet::{FLAG_ACK, FLAG_SYN, IpVersion, Segment, tcp_field};
use forwarder_common::translate::{
    self, ChecksumChange, MAX_OPTIONS, MAX_SACK_BLOCKS, Options, OptionsWalk, Timestamps,
};
use forwarder_common::verdict::Verdict;

use crate::maps::{FLOWS, OPTIONS_WALK, PAIRS};
use crate::tail;

pub(crate) const IPV4_CHECKSUM: u32 = 10;
const IPV4_SOURCE: u32 = 12;
const IPV6_SOURCE: u32 = 8;
/// The bits of explicit congestion notification in the type of service.
const ECN_MASK: u8 = 3;

/// What becomes of a packet that belongs to a flow.
pub(crate) struct Outcome {
    /// What the program returns.
    pub(crate) action: i32,
    /// Why.
    pub(crate) verdict: Verdict,
}

impl Outcome {
    #[inline(always)]
    pub(crate) fn drop(verdict: Verdict) -> Self {
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
    if tail::is_clone(context) {
        return Some(tail::acknowledge(context, segment));
    }
    let is_new_connection = segment.flags & (FLAG_SYN | FLAG_ACK) == FLAG_SYN;
    let Some(pair) = PAIRS.get_ptr_mut(flow.pair) else {
        // One that the agent has ended: the stack resets who does not know yet.
        if is_new_connection {
            release(segment, flow);
            return None;
        }
        return Some(Outcome { action: TC_ACT_UNSPEC, verdict: Verdict::PairMissing });
    };
    // SAFETY: as above. Other CPUs may write to it at the same time: each field is of one word, and none depends on
    // another but for the learning of a timestamp, which writes the value before it says that it is known.
    let pair = unsafe { &mut *pair };
    let (half, reverse) = if flow.direction == DIRECTION_REQUEST {
        (&mut pair.request, &pair.response)
    } else {
        (&mut pair.response, &pair.request)
    };
    if is_new_connection {
        // Where the pair is over, the local stack accepts it. Else the agent asks the other end, whose answer the client
        // resets (RFC 9293, 3.5.1).
        if flow.state == STATE_SPLICED && flow.is_over(half, reverse) {
            release(segment, flow);
            return None;
        }
        note(context, segment, flow, half, reverse);
        return Some(Outcome::drop(Verdict::Held));
    }
    if flow.state == STATE_TAIL {
        tail::send_clone(context);
    }
    Some(match translate(context, segment, flow, half, reverse) {
        Ok(()) => {
            note(context, segment, flow, half, reverse);
            // SAFETY: no parameters: the kernel looks up the next hop by the packet's destination.
            let action = unsafe { bpf_redirect_neigh(flow.interface, core::ptr::null_mut(), 0, 0) };
            Outcome { action: action as i32, verdict: Verdict::Redirected }
        }
        Err(verdict) => Outcome::drop(verdict),
    })
}

/// Forgets both directions of a pair that is over; the agent removes the rest.
#[inline(never)]
fn release(segment: &Segment, flow: &Flow) -> u32 {
    // What is not there any more needs no removal.
    let _ = FLOWS.remove(flow.out.reversed());
    let _ = FLOWS.remove(segment.tuple);
    0
}

/// Notes the packet in what is known of its direction.
#[inline(always)]
fn note(context: &TcContext, segment: &Segment, flow: &Flow, half: &mut Half, reverse: &Half) {
    let seen = Seen {
        sequence: segment.sequence,
        acknowledgement: segment.acknowledgement,
        payload: payload_length(context, segment),
        window: segment.window,
        flags: segment.flags,
        // SAFETY: the helper has no conditions.
        time: unsafe { bpf_ktime_get_ns() },
    };
    half.note(reverse, flow, &seen);
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
    let mut acknowledgement = segment.acknowledgement;
    // What the receiver has been told already and the sender still has to get from the local socket.
    let mut missing = 0;
    if segment.flags & FLAG_ACK != 0 {
        acknowledgement = acknowledgement.wrapping_add(flow.acknowledgement_shift);
        if flow.state == STATE_TAIL && translate::is_before(acknowledgement, flow.acknowledged) {
            missing = flow.acknowledged.wrapping_sub(acknowledgement);
            acknowledgement = flow.acknowledged;
        }
    }
    let numbers = [sequence.to_be(), acknowledgement.to_be()];
    change =
        change.and(segment.sequence.to_be(), numbers[0]).and(segment.acknowledgement.to_be(), numbers[1]);
    store(context, tcp + tcp_field::SEQUENCE as u32, &numbers)?;

    let window = if segment.flags & FLAG_SYN != 0 {
        segment.window
    } else {
        let window = translate::window(segment.window, flow.source_scale, flow.target_scale);
        translate::window_without(window, missing, flow.target_scale)
    };
    let window = window.to_be();
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
        let mut value_shift = half.timestamp_shift;
        if half.timestamp_known == 0 || flow.state == STATE_TAIL {
            // SAFETY: the helper has no conditions.
            let now = unsafe { bpf_ktime_get_ns() };
            let clock = translate::clock_at(flow.clock, flow.clock_time, now);
            let shift = clock.wrapping_sub(old.value);
            // While the local socket still sends, its clock is the measure: what is told here must not be ahead of it,
            // or its packets would look old (PAWS), nor behind. The largest shift stays, so that time never goes back.
            if half.timestamp_known == 0 || translate::is_before(half.timestamp_shift, shift) {
                half.timestamp_shift = shift;
                half.timestamp_known = 1;
            }
            value_shift = shift;
        }
        let reverse_shift = (reverse.timestamp_known != 0).then_some(reverse.timestamp_shift);
        let new = old.translated(value_shift, reverse_shift);
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
    if flow.flags & FLOW_CLEAR_ECN != 0 {
        clear_congestion_marks(context, segment)?;
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

/// Takes the marks of explicit congestion notification (RFC 3168, 5) from the IP header.
#[inline(always)]
fn clear_congestion_marks(context: &TcContext, segment: &Segment) -> Result<(), Verdict> {
    let offset = segment.ip_offset;
    // The first two bytes: of IPv4 the version and the type of service, of IPv6 the version and the traffic class.
    let old: [u8; 2] = load(context, offset)?;
    let new = match segment.version {
        IpVersion::V4 => [old[0], old[1] & !ECN_MASK],
        IpVersion::V6 => [old[0], old[1] & !(ECN_MASK << 4)],
    };
    if new == old {
        return Ok(());
    }
    store(context, offset, &new)?;
    match segment.version {
        IpVersion::V4 => {
            let (old, new) = (u16::from_ne_bytes(old), u16::from_ne_bytes(new));
            // SAFETY: the context is the program's own; the helper checks the offset.
            let result = unsafe {
                bpf_l3_csum_replace(context.skb.skb, offset + IPV4_CHECKSUM, old.into(), new.into(), 2)
            };
            if result == 0 { Ok(()) } else { Err(Verdict::Unwritable) }
        }
        IpVersion::V6 => Ok(()),
    }
}

/// Updates the TCP checksum.
#[inline(always)]
pub(crate) fn checksum(
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

#[inline(always)]
pub(crate) fn load<T>(context: &TcContext, offset: u32) -> Result<T, Verdict> {
    context.load(offset as usize).map_err(|_| Verdict::Truncated)
}

#[inline(always)]
pub(crate) fn store<T>(context: &TcContext, offset: u32, value: &T) -> Result<(), Verdict> {
    // SAFETY: the value is initialised and of its own size; the helper checks the offset.
    let result = unsafe {
        bpf_skb_store_bytes(context.skb.skb, offset, (&raw const *value).cast(), size_of::<T>() as u32, 0)
    };
    if result == 0 { Ok(()) } else { Err(Verdict::Unwritable) }
}
