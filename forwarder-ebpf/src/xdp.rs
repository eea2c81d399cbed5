//! The programs at XDP, where a frame is not yet a packet of the kernel's. All of them drop what the programs at TC would drop, for less
//! ([`refuse`]). One also sends on what is ordinary of established connections ([`forward`]), and answers SYNs of a flood ([`cookie`]). All else goes on, and TC decides: so nothing
//! depends on a program here.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use forwarder_common::packet::{LinkLayer, Segment, parse};

use crate::clients::{self, Stage};
use crate::outcome::{Outcome, count_verdict};

mod cookie;
mod forward;
mod frame;
mod neighbour;

use frame::{ETHERNET_HEADER, FrameInPlace, XdpFrame};

/// For drivers and kernels that hand a program whole frames only.
#[xdp]
pub fn fwd_xdp(context: XdpContext) -> u32 {
    drop_refused(&context)
}

/// For those that hand it the first part of a frame too: with jumbo frames, and with what the device has put together.
#[xdp(frags)]
pub fn fwd_xdp_frags(context: XdpContext) -> u32 {
    drop_refused(&context)
}

/// For kernels that tell which interfaces take frames from others (6.3): sends on, and answers, as well.
#[xdp(frags)]
pub fn fwd_xdp_forward(context: XdpContext) -> u32 {
    let Some(frame) = forward::find_segment(&context) else { return XDP_PASS };
    // What has a tag is for a VLAN interface above this one, which has programs of its own.
    if frame.segment.ip_offset != ETHERNET_HEADER as u32 {
        return XDP_PASS;
    }
    let outcome = if frame.segment.is_attempt() {
        match refuse(&frame.segment) {
            XDP_PASS => cookie::answer(&context, &frame.segment),
            action => return action,
        }
    } else {
        forward::forward(&context, frame)
    };
    let Some(Outcome { action, verdict }) = outcome else { return XDP_PASS };
    count_verdict(verdict);
    action as u32
}

#[inline(always)]
fn drop_refused(context: &XdpContext) -> u32 {
    if XdpFrame(context).asks_for_nothing() {
        return XDP_PASS;
    }
    let Ok(segment) = parse(&FrameInPlace(context), LinkLayer::Ethernet) else { return XDP_PASS };
    refuse(&segment)
}

/// Drops a SYN of a client that its listener does not let in.
#[inline(always)]
fn refuse(segment: &Segment) -> u32 {
    let Some(verdict) = clients::refuse(segment, Stage::Xdp) else { return XDP_PASS };
    count_verdict(verdict);
    XDP_DROP
}
