//! By which interfaces the packets of a flow may arrive.

use aya_ebpf::programs::TcContext;
use forwarder_common::flow::Flow;
use forwarder_common::packet::IpVersion;

use crate::maps::LOOSE_INTERFACES;

/// Whether the stack would take the packet from this interface. What it does not look into (IPv6), or not strictly, may come
/// by any.
#[inline(always)]
pub(crate) fn is_expected(context: &TcContext, version: IpVersion, flow: &Flow) -> bool {
    let interface = interface(context);
    interface == flow.arrival
        || matches!(version, IpVersion::V6)
        || LOOSE_INTERFACES.get_ptr(interface).is_some()
}

/// The index of the interface that the packet has come by.
#[inline(always)]
pub(crate) fn interface(context: &TcContext) -> u32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose field may be read.
    unsafe { (*context.skb.skb).ifindex }
}
