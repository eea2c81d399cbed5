//! The layout of the BPF maps, shared by the agent and the eBPF programs.
//!
//! Everything here is the ABI of pinned state: integers only, explicit padding, sizes asserted. A change of a layout
//! raises [`ABI_VERSION`], and with it the name of the pin directory.
#![no_std]

/// The version of every layout in this crate; pinned maps stand under `v{ABI_VERSION}`.
pub const ABI_VERSION: u32 = 1;

/// What the classifier counts for a listener, on each CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct ListenerCounters {
    /// Connection attempts seen: segments with SYN and without ACK, retransmitted ones included.
    pub syns: u64,
    /// TCP packets seen; a GRO super-packet counts once.
    pub packets: u64,
    /// Bytes of these packets from the IP header on.
    pub bytes: u64,
}
