//! The programs that the agent runs to change elements in place: see [`forwarder_common::update`]. They hang nowhere.

use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use forwarder_common::layout::STATE_READY;
use forwarder_common::tuple::FourTuple;
use forwarder_common::update::{FlowUpdate, ListenerUpdate, REQUEST_OFFSET};

use crate::maps::{FLOWS, LISTENERS};

/// Changes a flow, if it is still that of the pair. Returns how many. Programs that run at the same time see each word as it was
/// or as it is: one packet may go by a new interface to an old neighbour, and be lost on the way.
#[classifier]
pub fn fwd_set_flow(context: TcContext) -> i32 {
    let Ok(update) = context.load::<FlowUpdate>(REQUEST_OFFSET) else { return 0 };
    let key: &FourTuple = &update.key;
    let Some(flow) = FLOWS.get_ptr_mut(key) else { return 0 };
    // SAFETY: the element is allocated to nobody else while a program runs that has found it: see `maps`. Others read and
    // write it at the same time, word by word. Of those words that programs write, which is the state alone, none is undone
    // here but in the same instant: they write it where the pair is over, and the agent has ended nothing then.
    unsafe {
        if (*flow).pair != update.pair || (*flow).state > update.state {
            return 0;
        }
        if (*flow).state != update.state {
            (*flow).state = update.state;
        }
        (*flow).next_hop = update.next_hop;
        (*flow).mtu = update.mtu;
        (*flow).arrival = update.arrival;
        (*flow).acknowledged = update.acknowledged;
        (*flow).flags = update.flags;
        (*flow).hop_limit = update.hop_limit;
        (*flow).interface = update.interface;
    }
    1
}

/// Changes a listener. Returns how many it has found.
#[classifier]
pub fn fwd_set_listen(context: TcContext) -> i32 {
    let Ok(update) = context.load::<ListenerUpdate>(REQUEST_OFFSET) else { return 0 };
    let Some(listener) = LISTENERS.get_ptr_mut(update.key) else { return 0 };
    // SAFETY: as above. Programs read one word or another.
    unsafe {
        // First what keeps clients from it.
        if update.value.state != STATE_READY {
            (&raw mut (*listener).state).write_volatile(update.value.state);
        }
        (&raw mut (*listener).client_rules).write_volatile(update.value.client_rules);
        (*listener).client_rate = update.value.client_rate;
        (*listener).listener_id = update.value.listener_id;
        (*listener).targets = update.value.targets;
        (*listener).state = update.value.state;
    }
    1
}
