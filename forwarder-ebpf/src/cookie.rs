//! Answers to SYNs with SYN cookies (RFC 4987, 3.6), in the place of a listener's socket that would do the same at a higher price.
//!
//! The cookie is the kernel's own: the client's next packet goes to the socket, which makes a connection of it. It is the one that tells clients the least: of their options it
//! holds the MSS.

use core::ffi::c_void;
use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_TCP_LISTEN, TC_ACT_SHOT};
use aya_ebpf::helpers::generated::{bpf_redirect_neigh, bpf_sk_release, bpf_tcp_gen_syncookie};
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN, IpVersion, Segment};
use forwarder_common::verdict::Verdict;

use crate::admission::is_for_stack;
use crate::clients::Stage;
use crate::compose::{Composed, compose};
use crate::outcome::Outcome;
use crate::sk_lookup::find_socket;
use crate::skb::{IPV4_HEADER, IPV6_HEADER, TCP_HEADER, load};
use crate::{arrival, flood, route};

/// The first word of the option that tells the maximum segment size (RFC 9293, 3.2).
const OPTION_MSS: u32 = 0x0204_0000;
/// What is taken of who does not tell his, by IPv4 and IPv6 (RFC 9293, 3.7.1).
const DEFAULT_MSS: (u32, u32) = (536, 1220);
/// The most that is announced: routers tell of what is too large for the way, but not if it is lost on the node's own network.
const MOST_MSS: (u32, u32) = (1460, 1440);
/// Words of an IPv6 header, which is the longer one, and of a TCP header with one option.
const IP_WORDS: usize = 10;
const TCP_WORDS: usize = 6;

/// The window of an answer: what a client sends at first (RFC 6928). Each socket has room for that.
const WINDOW: u32 = 14_600;
/// The TTL or hop limit of an answer.
pub(crate) const HOP_LIMIT: u8 = 64;

/// What is answered.
pub(crate) struct Cookie {
    /// The sequence number.
    pub(crate) number: u32,
    /// The option that tells the maximum segment size.
    pub(crate) option: u32,
}

impl Cookie {
    /// The word of the TCP header that holds its length, with `options` bytes of options, the flags, and the window.
    #[inline(always)]
    pub(crate) const fn rest(options: u32) -> u32 {
        ((TCP_HEADER + options) / 4) << 28 | ((FLAG_SYN | FLAG_ACK) as u32) << 16 | WINDOW
    }
}

/// Whether a SYN is such that it may be answered: whole, without data, in a frame, without other headers than the usual ones, and nothing that the stack or a listening socket
/// would not look at (`tcp_v4_rcv`, `tcp_rcv_state_process`).
#[inline(always)]
pub(crate) fn is_plain(segment: &Segment) -> bool {
    let header = if segment.version == IpVersion::V4 { IPV4_HEADER } else { IPV6_HEADER };
    segment.ip_offset != 0
        && segment.flags & (FLAG_FIN | FLAG_RST) == 0
        && !segment.is_first_fragment
        && segment.tcp_offset.wrapping_sub(segment.ip_offset) == header
        && segment.header_length >= TCP_HEADER
        && segment.ip_length == header.wrapping_add(segment.header_length)
}

/// The cookie for a SYN, whose first word of options is `option`, and to whose sender packets of `mtu` bytes may go, 0 if that is not known; `None` where the socket that it is
/// for answers itself: it has room still, or the node makes no cookies. `context` is the program's own.
#[inline(always)]
pub(crate) fn make(context: *mut c_void, segment: &Segment, option: u32, mtu: u32) -> Option<Cookie> {
    if !is_for_stack(segment) {
        return None;
    }
    let of_version = |(v4, v6)| if segment.version == IpVersion::V4 { v4 } else { v6 };
    let announced = u32::from_be(option);
    // As all systems do, who tells it tells it first.
    let has_one = segment.header_length > TCP_HEADER && announced & 0xffff_0000 == OPTION_MSS;
    let option = if has_one { announced } else { OPTION_MSS | of_version(DEFAULT_MSS) };
    let made = generate(context, segment, option);
    if made == NONE {
        return None;
    }
    let (number, mss) = (made as u32, (made >> 32) as u32 & 0xffff);
    // As the socket: what the way takes, whatever the client announces (`tcp_advertise_mss`).
    let fits = mtu.saturating_sub(of_version((IPV4_HEADER, IPV6_HEADER)) + TCP_HEADER);
    let mss = if fits == 0 { mss } else { fits };
    let most: u32 = of_version(MOST_MSS);
    let mss = if mss < most { mss } else { most };
    Some(Cookie { number, option: (OPTION_MSS | mss).to_be() })
}

/// What is no cookie.
const NONE: u64 = u64::MAX;

/// Has the kernel make one: in the lower half, above that the MSS that it holds.
#[inline(never)]
fn generate(context: *mut c_void, segment: &Segment, option: u32) -> u64 {
    let tuple = &segment.tuple;
    let words = tuple.address_words();
    let mut ip = [0; IP_WORDS];
    match segment.version {
        IpVersion::V4 => {
            ip[0] = 0x4500_0000_u32.to_be();
            (ip[3], ip[4]) = (words[3], words[7]);
        }
        IpVersion::V6 => {
            ip[0] = 0x6000_0000_u32.to_be();
            ip[2..].copy_from_slice(words);
        }
    }
    let ports = u32::from(tuple.source_port) << 16 | u32::from(tuple.destination_port);
    let rest = (TCP_WORDS as u32) << 28 | u32::from(FLAG_SYN) << 16;
    let mut tcp: [u32; TCP_WORDS] =
        [ports.to_be(), segment.sequence.to_be(), 0, rest.to_be(), 0, option.to_be()];
    // SAFETY: what is found is released below; the headers are initialised and of the sizes given.
    let made = unsafe {
        let socket = find_socket(context, segment.version, tuple, tuple.source_port);
        if socket.is_null() {
            return NONE;
        }
        let made = if (*socket).state == BPF_TCP_LISTEN {
            let (ip, tcp) = (ip.as_mut_ptr().cast(), tcp.as_mut_ptr().cast());
            bpf_tcp_gen_syncookie(socket.cast(), ip, (IP_WORDS * 4) as u32, tcp, (TCP_WORDS * 4) as u32)
        } else {
            -1
        };
        bpf_sk_release(socket.cast());
        made
    };
    if made < 0 { NONE } else { made as u64 }
}

/// Answers a SYN for a listener's socket, if it is one of a flood: the packet becomes the answer. `None` where the socket is to answer it.
#[inline(always)]
pub(crate) fn answer(context: &TcContext, segment: &Segment) -> Option<Outcome> {
    Outcome::decided(try_answer(context, segment), Verdict::CookieSent)
}

/// The same, for [`Outcome::decided`].
#[inline(never)]
fn try_answer(context: &TcContext, segment: &Segment) -> u32 {
    if !is_plain(segment) || !flood::is_one_too_many(Stage::Tc, &segment.tuple.source) {
        return 0;
    }
    let interface = arrival::interface(context);
    let mtu = leads_back(context, segment, interface);
    if mtu == 0 {
        return 0;
    }
    let option = load(context, segment.tcp_offset + TCP_HEADER).unwrap_or_default();
    let Some(cookie) = make(context.skb.skb.cast(), segment, option, mtu) else { return 0 };
    flood::note();
    let mut options = [0; 10];
    options[0] = cookie.option;
    let composed = Composed {
        out: &segment.tuple.reversed(),
        sequence: cookie.number,
        acknowledgement: segment.sequence.wrapping_add(1),
        rest: Cookie::rest(4),
        hop_limit: HOP_LIMIT,
        options: &options,
        options_length: 4,
    };
    if !compose(context, segment, &composed) {
        return TC_ACT_SHOT as u32;
    }
    // SAFETY: the helper takes no parameters here: it asks the node's routes.
    unsafe { bpf_redirect_neigh(interface, null_mut(), 0, 0) as u32 }
}

/// How many bytes packets may have that go to who has sent the segment by the interface that it has come by, or 1 if the kernel does not tell; 0 if they go by another. What has been
/// sent by another one, as by a balancer that answers pass by, is the stack's.
#[inline(never)]
fn leads_back(context: &TcContext, segment: &Segment, interface: u32) -> u32 {
    let mut question = route::back(segment, interface);
    let found = route::ask(context.skb.skb.cast(), &mut question, 0);
    if !route::leads(found) || question.ifindex != interface {
        return 0;
    }
    let mtu = route::mtu(&question);
    if mtu == 0 { 1 } else { mtu }
}
