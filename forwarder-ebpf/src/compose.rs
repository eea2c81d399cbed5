//! A packet that becomes another one: a TCP segment without payload, made by the program.

use aya_ebpf::helpers::generated::bpf_skb_change_tail;
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{FLAG_RST, IpVersion, PROTOCOL_TCP, Segment, tcp_field};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::tuple::FourTuple;
use forwarder_common::verdict::Verdict;

use crate::packet::{PacketMut, Summed};
use crate::skb::{
    DONT_FRAGMENT, IPV4_SOURCE, IPV6_HEADER, IPV6_SOURCE, SocketBuffer, TCP_HEADER, load, write, write_words,
};

/// Bytes of an Ethernet address.
const ETHERNET_ADDRESS: usize = 6;

/// The segment that is made.
pub(crate) struct Composed<'a> {
    /// Its addresses and ports.
    pub(crate) out: &'a FourTuple,
    /// Its sequence number.
    pub(crate) sequence: u32,
    /// Its acknowledgement number.
    pub(crate) acknowledgement: u32,
    /// The word after these: the length of the header, the flags, the window.
    pub(crate) rest: u32,
    /// The TTL or hop limit.
    pub(crate) hop_limit: u8,
    /// Its options, and zeros after them.
    pub(crate) options: &'a [u32; 10],
    /// How many bytes of them there are: a multiple of 4.
    pub(crate) options_length: u32,
}

impl<'a> Composed<'a> {
    /// The reset that its sender takes for an answer to `segment`, as `tcp_v4_send_reset` makes it: with the number that the segment acknowledges, and nothing else.
    #[inline(always)]
    pub(crate) fn reset(segment: &Segment, out: &'a FourTuple, hop_limit: u8) -> Self {
        Self {
            out,
            sequence: segment.acknowledgement,
            acknowledgement: 0,
            rest: 5 << 28 | u32::from(FLAG_RST) << 16,
            hop_limit,
            options: &[0; 10],
            options_length: 0,
        }
    }
}

/// Turns the packet of `segment` into the composed segment. Its Ethernet addresses change places. Tells whether it did; where it did not, the
/// packet may be rewritten in part.
#[inline(never)]
pub(crate) fn compose(context: &TcContext, segment: &Segment, composed: &Composed<'_>) -> bool {
    write_all(context, segment, composed).is_ok()
}

/// # Errors
/// The packet has headers that are not expected, or cannot be rewritten.
#[inline(always)]
fn write_all(context: &TcContext, segment: &Segment, composed: &Composed<'_>) -> Result<(), Verdict> {
    let (ip, tcp) = (segment.ip_offset, segment.tcp_offset);
    let headers = tcp.wrapping_sub(ip);
    let length = TCP_HEADER + composed.options_length;
    // SAFETY: the context is the program's own; the helper checks the length.
    if unsafe { bpf_skb_change_tail(context.skb.skb, tcp + length, 0) } != 0 {
        return Err(Verdict::Unwritable);
    }
    if ip != 0 {
        let [to, from]: [[u8; ETHERNET_ADDRESS]; 2] = load(context, 0)?;
        write(context, 0, &[from, to])?;
    }
    let words = composed.out.address_words();
    let mut pseudo = ChecksumChange::NONE.and(0, (u32::from(PROTOCOL_TCP) + length).to_be());
    for word in words {
        pseudo = pseudo.and(0, *word);
    }
    match segment.version {
        IpVersion::V4 => {
            // Both begin with the same words, which stand for IPv4 and are in no packet.
            let mapped = 0xffff_u32.to_be();
            pseudo = pseudo.and(mapped, 0).and(mapped, 0);
            // Options stay.
            let [first, second, third, source, destination]: [u32; 5] = load(context, ip)?;
            write(context, ip + IPV4_SOURCE, &[words[3], words[7]])?;
            // Version and length of the header stay; the service is the usual one.
            let new_first = ((u32::from_be(first) & 0xff00_0000) | (headers + length)).to_be();
            let new_second = DONT_FRAGMENT.to_be();
            let (checksum, rest) = (u32::from_be(third) as u16, u32::from_be(third) & 0x00ff_0000);
            let new_third = u32::from(composed.hop_limit) << 24 | rest;
            let change = ChecksumChange::NONE
                .and(first, new_first)
                .and(second, new_second)
                .and((u32::from_be(third) & 0xffff_0000).to_be(), new_third.to_be())
                .and(source, words[3])
                .and(destination, words[7]);
            let checksum = u32::from(u16::from_be(change.applied_to(checksum.to_be())));
            write(context, ip, &[new_first, new_second, (new_third | checksum).to_be()])?;
        }
        IpVersion::V6 => {
            if headers != IPV6_HEADER {
                return Err(Verdict::Unwritable);
            }
            let first = [
                0x6000_0000_u32.to_be(),
                (length << 16 | u32::from(PROTOCOL_TCP) << 8 | u32::from(composed.hop_limit)).to_be(),
            ];
            write(context, ip, &first)?;
            write(context, ip + IPV6_SOURCE, words)?;
        }
    }
    let ports = u32::from(composed.out.source_port) << 16 | u32::from(composed.out.destination_port);
    let header: [u32; 4] =
        [ports.to_be(), composed.sequence.to_be(), composed.acknowledgement.to_be(), composed.rest.to_be()];
    let mut change = ChecksumChange::NONE;
    for word in header {
        change = change.and(0, word);
    }
    if composed.options_length != 0 {
        for index in 0..10 {
            change = change.and(0, composed.options[index]);
        }
    }
    write(context, tcp, &header)?;
    // The sum of nothing. The sender may have left it to the device to fill the checksum in (`CHECKSUM_PARTIAL`), which
    // nobody tells the program: then only the pseudo-header is part of what stands here, and the helper knows.
    write(context, tcp + tcp_field::CHECKSUM as u32, &[0xffff_u16, 0])?;
    write_words(context, tcp + TCP_HEADER, composed.options, composed.options_length)?;
    SocketBuffer(context).change_checksum(segment, change, Summed::Segment)?;
    SocketBuffer(context).change_checksum(segment, pseudo, Summed::PseudoHeader)
}
