//! The programs at the ingress of interfaces: decide for each packet whether it is one of a flow, or for a listener, or nobody's.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{FLAG_RST, LinkLayer};
use forwarder_common::verdict::Verdict;

use crate::admission::{Admission, admit};
use crate::clients::Stage;
use crate::frame::find_segment;
use crate::maps::INGRESS;
use crate::outcome::{Outcome, count_verdict};
use crate::redirect::redirect;
use crate::{clients, cookie, direct, flood, flow, fragment, icmp};

/// `__sk_buff::pkt_type` of what is addressed to the interface; TCP takes nothing else (`tcp_v4_rcv`).
const PACKET_HOST: u32 = 0;
/// The number of the VLAN in `__sk_buff::vlan_tci`.
const VLAN_ID: u32 = 0x0fff;

/// For interfaces whose packets begin with an Ethernet header.
#[classifier]
pub fn fwd_ingress_eth(context: TcContext) -> i32 {
    ingress(&context, LinkLayer::Ethernet)
}

/// For interfaces whose packets begin with the IP header.
#[classifier]
pub fn fwd_ingress_ip(context: TcContext) -> i32 {
    ingress(&context, LinkLayer::Ip)
}

/// Decides, and counts the verdict. Returns what lets the next program decide, where the packet is not ours.
#[inline(always)]
fn ingress(context: &TcContext, link: LinkLayer) -> i32 {
    let Outcome { action, verdict } = decide(context, link);
    count_verdict(verdict);
    action
}

/// What becomes of the packet, and why.
#[inline(always)]
fn decide(context: &TcContext, link: LinkLayer) -> Outcome {
    if !is_for_interface(context) {
        return Outcome::pass(Verdict::NotForInterface);
    }
    let frame = match find_segment(context, link, INGRESS) {
        Ok(frame) => frame,
        // It may be about TCP.
        Err(Verdict::NotTcp) => return icmp::pass_on(context, link),
        Err(Verdict::Fragment) => return fragment::redirect(context, link),
        Err(verdict) => return Outcome::pass(verdict),
    };
    if let Some(verdict) = clients::refuse(&frame.segment, Stage::Tc) {
        return Outcome::drop(verdict);
    }
    // Kept in memory, where the verifier does not follow it through all that comes then.
    frame.is_refused =
        flow::has_direct() && frame.segment.is_attempt() && direct::open(context, &frame.segment) != 0;
    if flow::has_direct()
        && frame.segment.flags & FLAG_RST != 0
        && let Some(outcome) = direct::ask_another(context, &frame.segment)
    {
        return outcome;
    }
    if let Some(outcome) = redirect(context, frame) {
        return outcome;
    }
    let segment = &frame.segment;
    match admit(context, segment) {
        Admission::Counted if segment.is_attempt() => match cookie::answer(context, segment) {
            Some(outcome) => outcome,
            None if frame.is_refused => Outcome::pass(Verdict::DirectRefused),
            None => Outcome::pass(Verdict::Counted),
        },
        Admission::Counted => {
            flood::note_sender(context, segment);
            Outcome::pass(Verdict::Counted)
        }
        Admission::Held => Outcome::drop(Verdict::Held),
        Admission::NotOurs(verdict) => Outcome::pass(verdict),
    }
}

/// Whether the IP stack takes the packet from this interface: not what the Ethernet address says is another host's, nor
/// what a VLAN interface above this one takes (tag 0 is only a priority).
#[inline(always)]
fn is_for_interface(context: &TcContext) -> bool {
    // SAFETY: the kernel hands the program a valid `__sk_buff`; the fields may be read by this type of program.
    let (packet_type, vlan_present, vlan_tci) = unsafe {
        let buffer = &*context.skb.skb;
        (buffer.pkt_type, buffer.vlan_present, buffer.vlan_tci)
    };
    packet_type == PACKET_HOST && (vlan_present == 0 || vlan_tci & VLAN_ID == 0)
}
