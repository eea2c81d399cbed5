//! The programs at XDP, where a frame is not yet a packet of the kernel's: they drop what the programs at TC would drop, for less. All else goes
//! on, and TC decides.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use forwarder_common::packet::{
    FLAG_ACK, FLAG_SYN, Header, LinkLayer, PROTOCOL_TCP, Packet, parse, tcp_field,
};

use crate::clients::{self, Stage};
use crate::outcome::count_verdict;
use crate::skb::{IPV4_HEADER, IPV6_HEADER};

/// Headers end before: the verifier wants to know how far behind the beginning of a frame is read.
const MOST_HEADERS: usize = 0x7fff;

/// For drivers and kernels that hand a program whole frames only.
#[xdp]
pub fn fwd_xdp(context: XdpContext) -> u32 {
    decide(&context)
}

/// For those that hand it the first part of a frame too: with jumbo frames, and with what the device has put together.
#[xdp(frags)]
pub fn fwd_xdp_frags(context: XdpContext) -> u32 {
    decide(&context)
}

#[inline(always)]
fn decide(context: &XdpContext) -> u32 {
    if asks_for_nothing(&Frame(context)) {
        return XDP_PASS;
    }
    let Ok(segment) = parse(&Frame(context), LinkLayer::Ethernet) else { return XDP_PASS };
    let Some(verdict) = clients::refuse(&segment, Stage::Xdp) else { return XDP_PASS };
    count_verdict(verdict);
    XDP_DROP
}

/// Whether a frame with headers such as most are is no SYN: most are not, and these bytes are all that is read of them.
#[inline(always)]
fn asks_for_nothing(frame: &Frame<'_>) -> bool {
    const V4_FLAGS: usize = ETHERNET_HEADER + IPV4_HEADER as usize + tcp_field::FLAGS;
    const V6_FLAGS: usize = ETHERNET_HEADER + IPV6_HEADER as usize + tcp_field::FLAGS;
    let is_other = |flags: u8| flags & (FLAG_SYN | FLAG_ACK) != FLAG_SYN;
    if let Some(bytes) = frame.first::<{ V4_FLAGS + 1 }>()
        && [bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1], bytes[ETHERNET_HEADER]] == [0x08, 0x00, USUAL_IPV4]
    {
        return bytes[ETHERNET_HEADER + IPV4_PROTOCOL] != PROTOCOL_TCP || is_other(bytes[V4_FLAGS]);
    }
    if let Some(bytes) = frame.first::<{ V6_FLAGS + 1 }>()
        && [bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1]] == [0x86, 0xdd]
    {
        // Extension headers may come before.
        return bytes[ETHERNET_HEADER + IPV6_NEXT_HEADER] == PROTOCOL_TCP && is_other(bytes[V6_FLAGS]);
    }
    // What has a tag is for a VLAN interface above this one, which has programs of its own.
    frame.first::<{ ETHER_TYPE + 2 }>().is_some_and(|bytes| {
        [[0x81, 0x00], [0x88, 0xa8]].contains(&[bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1]])
    })
}

/// Bytes of the Ethernet header.
const ETHERNET_HEADER: usize = 14;
/// Where it tells what the frame holds, in bytes from the first.
const ETHER_TYPE: usize = 12;
/// Version and header length of IPv4 without options.
const USUAL_IPV4: u8 = 0x45;
/// Where the protocol stands in IP headers, in bytes from their first.
const IPV4_PROTOCOL: usize = 9;
const IPV6_NEXT_HEADER: usize = 6;

/// A frame as the driver hands it to a program.
struct Frame<'a>(&'a XdpContext);

impl Frame<'_> {
    /// The first bytes; `None` where the frame ends before.
    #[inline(always)]
    fn first<const N: usize>(&self) -> Option<&[u8; N]> {
        let Self(context) = self;
        let start = context.data();
        if start + N > context.data_end() {
            return None;
        }
        // SAFETY: they lie within the frame, which nobody writes while the program runs.
        Some(unsafe { &*(start as *const [u8; N]) })
    }
}

impl Packet for Frame<'_> {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let Self(context) = self;
        let start = context.data();
        if offset > MOST_HEADERS || start + offset + size_of::<T>() > context.data_end() {
            return None;
        }
        // SAFETY: what is read lies within the frame, any bits are valid for a header, and the read is unaligned.
        Some(unsafe { ((start + offset) as *const T).read_unaligned() })
    }
}
