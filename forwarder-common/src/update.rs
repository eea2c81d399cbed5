//! What the agent asks of the programs that write into elements of the maps in place.
//!
//! `bpf(BPF_MAP_UPDATE_ELEM)` puts a new element in the place of the old one, which it frees: what is freed may be allocated
//! again at once, while a program still holds it. So the agent has a program write the words that change: it runs it by
//! `bpf(BPF_PROG_TEST_RUN)`, and the packet of that run is the request.

use core::mem::{align_of, offset_of, size_of};

use crate::flow::{Flow, NextHop};
use crate::layout::{ListenerKey, ListenerValue};
use crate::sockmap::Credit;
use crate::tuple::FourTuple;

/// The program that writes what a [`FlowUpdate`] says; returns how many flows it has written.
pub const PROGRAM_SET_FLOW: &str = "fwd_set_flow";
/// The program that writes what a [`ListenerUpdate`] says; returns how many listeners it has written.
pub const PROGRAM_SET_LISTENER: &str = "fwd_set_listen";

/// The program of tier `sockmap` that writes what a [`CreditUpdate`] says; returns how many credits it has written.
pub const PROGRAM_SET_CREDIT: &str = "fwd_set_credit";

/// Where requests begin in the packet: behind the Ethernet header that the kernel expects in it.
pub const REQUEST_OFFSET: usize = 14;

/// What a flow is to be from now on, if it still is that of the pair: all that ever changes of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlowUpdate {
    /// Where it stands.
    pub key: FourTuple,
    /// Its pair's number.
    pub pair: u32,
    /// [`Flow::state`]. A state never goes back: a flow whose state is a later one is left as it is.
    pub state: u32,
    /// [`Flow::interface`].
    pub interface: u32,
    /// [`Flow::next_hop`].
    pub next_hop: NextHop,
    /// [`Flow::mtu`].
    pub mtu: u32,
    /// [`Flow::arrival`].
    pub arrival: u32,
    /// [`Flow::acknowledged`].
    pub acknowledged: u32,
    /// [`Flow::flags`].
    pub flags: u16,
    /// [`Flow::hop_limit`].
    pub hop_limit: u8,
    /// Zero.
    pub pad: u8,
}

/// Bytes of a [`FlowUpdate`].
pub const FLOW_UPDATE_SIZE: usize = size_of::<FlowUpdate>();

impl FlowUpdate {
    /// What makes the flow that stands under `key` what `flow` says.
    #[must_use]
    pub const fn new(key: FourTuple, flow: &Flow) -> Self {
        Self {
            key,
            pair: flow.pair,
            state: flow.state,
            interface: flow.interface,
            next_hop: flow.next_hop,
            mtu: flow.mtu,
            arrival: flow.arrival,
            acknowledged: flow.acknowledged,
            flags: flow.flags,
            hop_limit: flow.hop_limit,
            pad: 0,
        }
    }

    /// As it lies in the packet.
    #[must_use]
    pub fn bytes(&self) -> [u8; FLOW_UPDATE_SIZE] {
        let Self { key, pair, state, interface, next_hop, mtu, arrival, acknowledged, flags, hop_limit, pad } =
            *self;
        let mut bytes = Bytes::new();
        bytes.put(&key.source);
        bytes.put(&key.destination);
        bytes.put(&key.source_port.to_ne_bytes());
        bytes.put(&key.destination_port.to_ne_bytes());
        for word in [pair, state, interface, next_hop.family] {
            bytes.put(&word.to_ne_bytes());
        }
        bytes.put(&next_hop.address);
        for word in [mtu, arrival, acknowledged] {
            bytes.put(&word.to_ne_bytes());
        }
        bytes.put(&flags.to_ne_bytes());
        bytes.put(&[hop_limit, pad]);
        bytes.filled
    }
}

/// What a listener is to be from now on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ListenerUpdate {
    /// Where it stands.
    pub key: ListenerKey,
    /// Zero.
    pub pad: u32,
    /// What is to stand there.
    pub value: ListenerValue,
}

/// Bytes of a [`ListenerUpdate`].
pub const LISTENER_UPDATE_SIZE: usize = size_of::<ListenerUpdate>();

impl ListenerUpdate {
    /// As it lies in the packet.
    #[must_use]
    pub fn bytes(&self) -> [u8; LISTENER_UPDATE_SIZE] {
        let Self { key, pad, value } = *self;
        let mut bytes = Bytes::new();
        bytes.put(&key.address);
        bytes.put(&key.port.to_ne_bytes());
        bytes.put(&key.pad.to_ne_bytes());
        for word in [pad, value.listener_id, value.state] {
            bytes.put(&word.to_ne_bytes());
        }
        for word in value.targets {
            bytes.put(&word.to_ne_bytes());
        }
        for word in [value.client_rules, value.client_rate] {
            bytes.put(&word.to_ne_bytes());
        }
        bytes.filled
    }
}

/// What the credit of a socket's stream is to be from now on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct CreditUpdate {
    /// The socket's cookie.
    pub cookie: u64,
    /// Its credit.
    pub credit: Credit,
}

/// Bytes of a [`CreditUpdate`].
pub const CREDIT_UPDATE_SIZE: usize = size_of::<CreditUpdate>();

impl CreditUpdate {
    /// As it lies in the packet.
    #[must_use]
    pub fn bytes(&self) -> [u8; CREDIT_UPDATE_SIZE] {
        let Self { cookie, credit: Credit { relayed, credit, full, notice_shift, pad } } = *self;
        let mut bytes = Bytes::new();
        for word in [cookie, relayed] {
            bytes.put(&word.to_ne_bytes());
        }
        for word in [credit, full, notice_shift, pad] {
            bytes.put(&word.to_ne_bytes());
        }
        bytes.filled
    }
}

/// Bytes that are filled from the first on.
struct Bytes<const N: usize> {
    filled: [u8; N],
    length: usize,
}

impl<const N: usize> Bytes<N> {
    const fn new() -> Self {
        Self { filled: [0; N], length: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        for (place, byte) in self.filled.iter_mut().skip(self.length).zip(bytes) {
            *place = *byte;
        }
        self.length += bytes.len();
    }
}

const _: () = {
    assert!(size_of::<FlowUpdate>() == 84 && align_of::<FlowUpdate>() == 4);
    assert!(offset_of!(FlowUpdate, pair) == 36);
    assert!(offset_of!(FlowUpdate, state) == 40);
    assert!(offset_of!(FlowUpdate, interface) == 44);
    assert!(offset_of!(FlowUpdate, next_hop) == 48);
    assert!(offset_of!(FlowUpdate, mtu) == 68);
    assert!(offset_of!(FlowUpdate, arrival) == 72);
    assert!(offset_of!(FlowUpdate, acknowledged) == 76);
    assert!(offset_of!(FlowUpdate, flags) == 80);

    assert!(size_of::<ListenerUpdate>() == 56 && align_of::<ListenerUpdate>() == 8);
    assert!(offset_of!(ListenerUpdate, value) == 24);

    assert!(size_of::<CreditUpdate>() == 32 && align_of::<CreditUpdate>() == 8);
    assert!(offset_of!(CreditUpdate, credit) == 8);
};
