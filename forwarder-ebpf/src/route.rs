//! Questions to the kernel's routes and neighbours.

use core::ffi::c_void;
use core::mem::zeroed;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::bpf_fib_lookup as look_up;
use forwarder_common::packet::{IpVersion, PROTOCOL_TCP, Segment};

/// The families of addresses (`linux/socket.h`).
pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

/// Asks; the answer stands in the question. Returns one of `BPF_FIB_LKUP_RET_*`, or an error. `context` is the program's own.
#[inline(always)]
pub(crate) fn ask(context: *mut c_void, question: &mut bpf_fib_lookup, flags: u32) -> i64 {
    // SAFETY: the context is the program's own, the question initialised and of the size given.
    unsafe { look_up(context.cast(), &raw mut *question, size_of::<bpf_fib_lookup>() as i32, flags) }
}

/// Whether the answer tells a way. A neighbour that is not known yet, or a large packet: neither keeps what is sent from going there.
#[inline(always)]
pub(crate) fn leads(found: i64) -> bool {
    [BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_FRAG_NEEDED]
        .map(i64::from)
        .contains(&found)
}

/// How many bytes a packet may have that goes where the answer says; 0 where the kernel does not tell: before 5.12, and of a neighbour that it does not know.
#[inline(always)]
pub(crate) fn mtu(answer: &bpf_fib_lookup) -> u32 {
    // SAFETY: both members are of the same type. The question had a zero here.
    u32::from(unsafe { answer.__bindgen_anon_1.mtu_result })
}

/// The first bytes of a frame that goes where the answer says: the Ethernet addresses of the neighbour and of the interface.
#[inline(always)]
pub(crate) fn ethernet(answer: &bpf_fib_lookup) -> [u32; 3] {
    let bpf_fib_lookup { dmac: [a, b, c, d, e, f], smac: [g, h, i, j, k, l], .. } = *answer;
    [[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_ne_bytes)
}

/// The question by which interface, and to which neighbour, an answer goes to who has sent the segment, which has come by an interface of this index.
#[inline(always)]
pub(crate) fn back(segment: &Segment, interface: u32) -> bpf_fib_lookup {
    // SAFETY: a plain old structure, for which zeros are valid.
    let mut question: bpf_fib_lookup = unsafe { zeroed() };
    let words = segment.tuple.address_words();
    question.ifindex = interface;
    question.l4_protocol = PROTOCOL_TCP;
    question.sport = segment.tuple.destination_port.to_be();
    question.dport = segment.tuple.source_port.to_be();
    match segment.version {
        IpVersion::V4 => {
            question.family = AF_INET;
            question.__bindgen_anon_3.ipv4_src = words[7];
            question.__bindgen_anon_4.ipv4_dst = words[3];
        }
        IpVersion::V6 => {
            question.family = AF_INET6;
            question.__bindgen_anon_3.ipv6_src = [words[4], words[5], words[6], words[7]];
            question.__bindgen_anon_4.ipv6_dst = [words[0], words[1], words[2], words[3]];
        }
    }
    question
}
