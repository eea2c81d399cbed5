//! The node's own sockets, looked up by the addresses of a packet.

use core::ffi::c_void;
use core::mem::zeroed;

use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, BPF_TCP_ESTABLISHED, BPF_TCP_LISTEN, bpf_sock, bpf_sock_tuple,
};
use aya_ebpf::helpers::generated::{bpf_sk_release, bpf_skc_lookup_tcp, bpf_tcp_sock};
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{IpVersion, Segment};
use forwarder_common::tuple::FourTuple;

/// `snd_nxt` and `rcv_nxt` of the local socket that the packet is for.
#[inline(always)]
pub(crate) fn local_numbers(context: &TcContext, segment: &Segment) -> Option<(u32, u32)> {
    // SAFETY: what is found is released below, on every way.
    unsafe {
        let socket =
            find_socket(context.skb.skb.cast(), segment.version, &segment.tuple, segment.tuple.source_port);
        if socket.is_null() {
            return None;
        }
        let tcp = bpf_tcp_sock(socket);
        let numbers = if tcp.is_null() { None } else { Some(((*tcp).snd_nxt, (*tcp).rcv_nxt)) };
        bpf_sk_release(socket.cast());
        numbers
    }
}

/// Whether a local socket listens where the packet goes to, whoever's it is. What else there may be for its tuple does not take
/// it: of a request whose listening socket has been closed, the stack would tell the client that nobody listens.
#[inline(always)]
pub(crate) fn is_listened_to(context: &TcContext, segment: &Segment) -> bool {
    // SAFETY: what is found is released below.
    unsafe {
        // Nothing but a listening socket takes what comes from port 0.
        let socket = find_socket(context.skb.skb.cast(), segment.version, &segment.tuple, 0);
        if socket.is_null() {
            return false;
        }
        bpf_sk_release(socket.cast());
        true
    }
}

/// Whether a local socket has a connection of this tuple, as packets to it do, or is about to have one: more than that it listens.
#[inline(always)]
pub(crate) fn is_connected(context: &TcContext, version: IpVersion, tuple: &FourTuple) -> bool {
    state_of(context, version, tuple).is_some_and(|state| state != BPF_TCP_LISTEN)
}

/// Whether a local socket has a connection of this tuple whose handshake is done.
#[inline(always)]
pub(crate) fn is_established(context: &TcContext, segment: &Segment) -> bool {
    state_of(context, segment.version, &segment.tuple) == Some(BPF_TCP_ESTABLISHED)
}

/// The state of the local socket that packets of this tuple are for.
#[inline(always)]
fn state_of(context: &TcContext, version: IpVersion, tuple: &FourTuple) -> Option<u32> {
    // SAFETY: what is found is released below.
    unsafe {
        let socket = find_socket(context.skb.skb.cast(), version, tuple, tuple.source_port);
        if socket.is_null() {
            return None;
        }
        let state = (*socket).state;
        bpf_sk_release(socket.cast());
        Some(state)
    }
}

/// The local socket that the packet would be for if it came from `source_port`, or null. `context` is the program's own, at TC or at XDP.
///
/// # Safety
/// What is not null must be released.
#[inline(always)]
pub(crate) unsafe fn find_socket(
    context: *mut c_void,
    version: IpVersion,
    to: &FourTuple,
    source_port: u16,
) -> *mut bpf_sock {
    // SAFETY: a plain old structure, for which zeros are valid.
    let mut tuple: bpf_sock_tuple = unsafe { zeroed() };
    let words = to.address_words();
    let ports = [source_port.to_be(), to.destination_port.to_be()];
    let size = match version {
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
    let netns = BPF_F_CURRENT_NETNS as u64;
    // SAFETY: the context is the program's own, the tuple initialised and of the size given.
    unsafe { bpf_skc_lookup_tcp(context, &raw mut tuple, size as u32, netns, 0) }
}
