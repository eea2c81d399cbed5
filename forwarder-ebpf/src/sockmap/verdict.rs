//! The verdict on what a socket of a pair has received.
//!
//! It runs under the lock of that socket, before anybody could read: so what it writes of the socket's stream nobody else
//! writes.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::Global;
use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::cty::c_void;
use aya_ebpf::helpers::generated::{
    bpf_get_socket_cookie, bpf_map_lookup_elem, bpf_sk_release, bpf_skc_to_tcp_sock,
};
use aya_ebpf::macros::stream_verdict;
use aya_ebpf::programs::SkBuffContext;
use forwarder_common::sockmap::{
    Credit, NOTICE_BROKEN, NOTICE_BUSY, NOTICE_FULL, NOTICE_PASSED, Notice, STREAM_BROKEN, STREAM_FULL,
    STREAM_NEW, STREAM_PASSED, STREAM_REDIRECTED, SockVerdict, Stream, repeated,
};

use crate::maps::{CREDITS, NOTICES, STREAMS, TARGETS, VERDICTS};

/// Where the next byte to be read stands in `struct tcp_sock` of this kernel. Set by the agent.
#[unsafe(no_mangle)]
static COPIED_SEQ: Global<u32> = Global::new(0);
/// The same of the number after the last byte that was written.
#[unsafe(no_mangle)]
static WRITE_SEQ: Global<u32> = Global::new(0);
/// The same of the number of the first byte that was not acknowledged.
#[unsafe(no_mangle)]
static SND_UNA: Global<u32> = Global::new(0);

/// The most that one call cuts off the beginning of a segment (`sk_skb_adjust_room`).
const MOST_CUT: u32 = 0xfff;
/// How many calls cut off the largest segment: those that wait to be read are put together (`tcp_try_coalesce`), up to 17
/// fragments of 32 KiB.
const CUTS: u32 = 140;

/// Hands what a socket has received to the other one of its pair, or leaves it to the agent.
#[stream_verdict]
pub fn fwd_sk_verdict(context: SkBuffContext) -> u32 {
    let (action, verdict) = evaluate(&context);
    if let Some(count) = VERDICTS.get_ptr_mut(verdict.index()) {
        // SAFETY: the pointer is to this CPU's value, which lives while the map does. A verdict that interrupts this one may
        // go uncounted.
        unsafe { *count += 1 };
    }
    action
}

#[inline(always)]
fn evaluate(context: &SkBuffContext) -> (u32, SockVerdict) {
    // SAFETY: the context is the one that the program was called with.
    let cookie = unsafe { bpf_get_socket_cookie(context.as_ptr()) };
    let (Some(stream), Some(credit)) = (STREAMS.get_ptr_mut(cookie), CREDITS.get_ptr(cookie)) else {
        return (SK_PASS, SockVerdict::StreamMissing);
    };
    // SAFETY: the pointers are to elements of the maps that stand there until this socket has been closed, after which no
    // verdict on it runs (`sock_map_close`), and that nobody replaces. Only this socket's verdicts, which run one after the
    // other, write the first one.
    let (stream, credit) = unsafe { (&mut *stream, &*credit) };
    if stream.state == STREAM_BROKEN {
        return (SK_DROP, SockVerdict::Broken);
    }
    let length = context.len();
    if length == 0 {
        return (SK_DROP, SockVerdict::End);
    }
    // SAFETY: the context is valid, and so is each word of `cb`. Those of a segment that TCP hands over are the beginning
    // of its `tcp_skb_cb`: the number of its first byte, and the one after its last (`struct sk_skb_cb`).
    let (sequence, end) = unsafe { ((*context.skb.skb).cb[0], (*context.skb.skb).cb[1]) };
    // An end counts as one.
    if end.wrapping_sub(sequence).wrapping_sub(length) > 1 {
        return broken(stream, cookie);
    }
    let Some(target) = target(cookie) else { return (SK_DROP, SockVerdict::TargetMissing) };
    if stream.state == STREAM_NEW {
        let Some(next) = next_to_read(context) else { return broken(stream, cookie) };
        stream.next_sequence = next;
        stream.target_sequence = target.written;
        stream.state = STREAM_REDIRECTED;
    }
    let Some(before) = repeated(sequence, stream.next_sequence) else { return broken(stream, cookie) };
    if before >= length {
        stream.repeated = stream.repeated.wrapping_add(length);
        return (SK_DROP, SockVerdict::Repeated);
    }
    if before > 0 {
        if !cut(context, before) {
            return broken(stream, cookie);
        }
        stream.repeated = stream.repeated.wrapping_add(before);
    }
    let length = length - before;
    stream.next_sequence = stream.next_sequence.wrapping_add(length);

    // SAFETY: the pointer is to an aligned value, which the agent may write at the same time.
    let relayed = unsafe { read_volatile(&raw const credit.relayed) };
    let held = stream.held(relayed, target.unacknowledged);
    stream.held = held;
    // What is left to the agent comes before what would be redirected.
    let is_passing = stream.passed != relayed;
    if is_passing || held > 0 && held.wrapping_add(length) > credit.credit {
        return pass(stream, credit, cookie, length);
    }
    let state = if held > credit.full { STREAM_FULL } else { STREAM_REDIRECTED };
    if state == STREAM_FULL && stream.state != STREAM_FULL {
        notify(cookie, NOTICE_FULL);
    }
    stream.state = state;
    let redirected = stream.redirected.wrapping_add(u64::from(length));
    let shift = credit.notice_shift & 63;
    if shift != 0 && redirected >> shift != stream.redirected >> shift {
        notify(cookie, NOTICE_BUSY);
    }
    stream.redirected = redirected;
    #[expect(clippy::cast_possible_truncation, reason = "the helper returns SK_PASS or SK_DROP")]
    let action = TARGETS.redirect_skb(context, cookie, 0) as u32;
    if action == SK_DROP {
        return (SK_DROP, SockVerdict::TargetMissing);
    }
    (action, SockVerdict::Redirected)
}

/// Leaves a segment to the agent, and tells it so where it does not know.
#[inline(always)]
fn pass(stream: &mut Stream, credit: &Credit, cookie: u64, length: u32) -> (u32, SockVerdict) {
    let before = stream.passed;
    stream.passed = before.wrapping_add(u64::from(length));
    // Read after the other has been written: the agent does the reverse, so that one of the two sees the other.
    // SAFETY: the pointer is to an aligned value, which the agent may write at the same time.
    let relayed = unsafe { read_volatile(&raw const credit.relayed) };
    if stream.state != STREAM_PASSED || relayed == before {
        stream.state = STREAM_PASSED;
        notify(cookie, NOTICE_PASSED);
    }
    (SK_PASS, SockVerdict::Passed)
}

#[inline(always)]
fn broken(stream: &mut Stream, cookie: u64) -> (u32, SockVerdict) {
    stream.state = STREAM_BROKEN;
    notify(cookie, NOTICE_BROKEN);
    (SK_DROP, SockVerdict::Broken)
}

/// Tells the agent, unless it has more to read than the buffer holds: it looks at every stream now and then.
#[inline(always)]
fn notify(cookie: u64, kind: u32) {
    let _ = NOTICES.output(Notice { cookie, kind, pad: 0 }, 0);
}

/// What the socket that `cookie`'s bytes go to has done.
#[derive(Clone, Copy)]
struct Target {
    /// The number after the last byte that was written to it.
    written: u32,
    /// The number of the first byte that its peer has not acknowledged.
    unacknowledged: u32,
}

#[inline(always)]
fn target(cookie: u64) -> Option<Target> {
    // SAFETY: the key is as large as the map's keys. What is found is released below.
    let socket =
        unsafe { bpf_map_lookup_elem((&raw const TARGETS).cast_mut().cast(), (&raw const cookie).cast()) };
    if socket.is_null() {
        return None;
    }
    // SAFETY: the pointer is to a socket.
    let tcp: *const u8 = unsafe { bpf_skc_to_tcp_sock(socket) }.cast();
    let target = if tcp.is_null() {
        None
    } else {
        // SAFETY: the kernel checks that fields begin there.
        let [written, unacknowledged] = unsafe { [field(tcp, WRITE_SEQ.load()), field(tcp, SND_UNA.load())] };
        Some(Target { written, unacknowledged })
    };
    // SAFETY: it was found above and is used no more.
    unsafe { bpf_sk_release(socket) };
    target
}

/// The number of the next byte that would be read of the socket that has received.
#[inline(always)]
fn next_to_read(context: &SkBuffContext) -> Option<u32> {
    // SAFETY: the context is valid.
    let socket: *mut c_void = unsafe { (*context.skb.skb).__bindgen_anon_2.sk }.cast();
    if socket.is_null() {
        return None;
    }
    // SAFETY: the pointer is to a socket.
    let tcp: *const u8 = unsafe { bpf_skc_to_tcp_sock(socket) }.cast();
    // SAFETY: the kernel checks that a field begins there.
    if tcp.is_null() { None } else { Some(unsafe { field(tcp, COPIED_SEQ.load()) }) }
}

/// The field of a socket that begins at `offset`.
#[inline(always)]
unsafe fn field(tcp: *const u8, offset: u32) -> u32 {
    // SAFETY: the caller says so; the kernel's verifier knows the type and the offset.
    unsafe { read_volatile(tcp.add(offset as usize).cast()) }
}

/// Cuts bytes off the beginning.
#[inline(always)]
fn cut(context: &SkBuffContext, mut bytes: u32) -> bool {
    for _ in 0..CUTS {
        if bytes == 0 {
            break;
        }
        let part = bytes.min(MOST_CUT);
        #[expect(clippy::cast_possible_wrap, reason = "at most MOST_CUT")]
        if context.adjust_room(-(part as i32), 0, 0).is_err() {
            return false;
        }
        bytes -= part;
    }
    bytes == 0
}
