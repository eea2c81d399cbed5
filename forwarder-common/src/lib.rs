//! The layout of the BPF maps, shared by the agent and the eBPF programs, and the arithmetic on packets that both can
//! run.
//!
//! What [`layout`] holds is the ABI of pinned state: integers only, explicit padding, sizes asserted. A change of a map's
//! layout raises its version in [`layout::PINNED_MAPS`], and with it the folder that it is pinned in.
#![cfg_attr(not(test), no_std)]
#![expect(
    clippy::inline_always,
    reason = "in the kernel, calls cost more, and older verifiers follow them less well"
)]

#[cfg(target_endian = "big")]
compile_error!(
    "the eBPF objects are built for little-endian machines: maps would be read with their bytes swapped"
);

pub mod direct;
pub mod flow;
pub mod icmp;
pub mod layout;
pub mod packet;
pub mod sockmap;
pub mod translate;
pub mod tuple;
pub mod update;
pub mod verdict;

pub use layout::{BackendKey, BackendValue, ListenerCounters, ListenerKey, ListenerValue};
pub use verdict::Verdict;

/// The ingress program for interfaces whose packets begin with an Ethernet header (`lo` among them). At most 15 characters,
/// the kernel's limit (`BPF_OBJ_NAME_LEN` less the final zero).
pub const PROGRAM_ETHERNET: &str = "fwd_ingress_eth";

/// The ingress program for interfaces whose packets begin with the IP header, such as those of tun and of wireguard.
pub const PROGRAM_IP: &str = "fwd_ingress_ip";

/// The egress program for interfaces whose packets begin with an Ethernet header.
pub const PROGRAM_EGRESS_ETHERNET: &str = "fwd_egress_eth";

/// The egress program for interfaces whose packets begin with the IP header.
pub const PROGRAM_EGRESS_IP: &str = "fwd_egress_ip";

/// The program at XDP, for frames in one piece.
pub const PROGRAM_XDP: &str = "fwd_xdp";

/// The same, for frames in several pieces too.
pub const PROGRAM_XDP_FRAGS: &str = "fwd_xdp_frags";

/// The same, which sends on what is ordinary of established connections too.
pub const PROGRAM_XDP_FORWARD: &str = "fwd_xdp_forward";

/// Every program, for TC.
pub const PROGRAMS: [&str; 4] = [PROGRAM_ETHERNET, PROGRAM_IP, PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP];
