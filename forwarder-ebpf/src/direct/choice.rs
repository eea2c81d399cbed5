//! Which endpoint serves a client: see [`DirectTarget`].

use core::ptr::addr_of;

use forwarder_common::direct::{DirectSlot, DirectTarget, endpoint_hash};
use forwarder_common::layout::ListenerValue;
use forwarder_common::packet::IpVersion;
use forwarder_common::tuple::{AddressBytes, FourTuple};

use crate::maps::DIRECT_TARGETS;

/// A place that the map does not have.
const NOWHERE: u32 = u32::MAX;

/// Where the endpoints of a direct listener stand that clients of an IP version are connected to: the first of its targets, and how many there are.
#[inline(always)]
pub(super) fn targets_of(listener: &ListenerValue, version: IpVersion) -> (u32, u32) {
    let [v4, v6] = listener.targets;
    let targets = if version == IpVersion::V4 { v4 } else { v6 };
    (targets as u32, (targets >> 32) as u32)
}

/// The target at a place of the map.
#[inline(always)]
fn at(index: u32) -> Option<&'static DirectTarget> {
    let target = DIRECT_TARGETS.get_ptr(index)?;
    // SAFETY: the element of an array lives as long as the map; the agent writes only what no listener leads to.
    Some(unsafe { &*target })
}

/// Which of a listener's targets, `count` of them from `first` on, has its turn.
#[inline(always)]
pub(super) fn next(first: u32, count: u32) -> Option<&'static DirectTarget> {
    let head = DIRECT_TARGETS.get_ptr_mut(first)?;
    // SAFETY: the element of an array lives as long as the map. Other CPUs may write the same word at the same time.
    let turn = unsafe {
        let turn = (*head).turn;
        (*head).turn = turn.wrapping_add(1);
        turn
    };
    at(first + turn % count.max(1))
}

/// Which of them serves a client instead of the endpoint of the attempt in `former`, and of the one before. Nobody loses his turn by that, and all others
/// take their part.
#[inline(always)]
pub(super) fn other(first: u32, count: u32, former: &DirectSlot) -> Option<&'static DirectTarget> {
    at(other_place(first, count, former))
}

/// Where that stands; nowhere if there is none.
#[inline(never)]
fn other_place(first: u32, count: u32, former: &DirectSlot) -> u32 {
    let asked = hash_of(&former.flows[0].out);
    let place = former.first_sequence % count.max(1);
    let Some(begin) = at(first + place) else { return NOWHERE };
    // Of three different ones, two have been asked at most.
    for distance in [0, begin.next_other, begin.next_third] {
        let index = first + (place + distance) % count.max(1);
        let Some(target) = at(index) else { return NOWHERE };
        let hash = endpoint_hash(words(&target.address), target.port);
        if hash != asked && hash != former.tried {
            return index;
        }
    }
    NOWHERE
}

/// The endpoint that packets of this tuple go to.
#[inline(always)]
pub(super) fn hash_of(out: &FourTuple) -> u32 {
    endpoint_hash(words(&out.destination), out.destination_port)
}

#[inline(always)]
fn words(address: &AddressBytes) -> &[u32; 4] {
    // SAFETY: of the two structures that hold it, each is aligned to 4 bytes, and the address stands at a multiple of that; any bits make an
    // integer.
    unsafe { &*addr_of!(*address).cast() }
}
