//! The kernel as the agent uses it, and nearly all unsafe code: the [`programs`] and how they are attached, the [`maps`] that they share
//! with the agent, the [`flows`] of offloaded pairs, the network's state ([`net`]), and the state of TCP sockets ([`tcp`]).
//! [`listener_maps`] is the only seam through which the reconciler sees maps.

pub mod bpf;
mod btf;
pub mod clock;
pub mod fallback_reason;
pub mod flows;
pub mod listener_maps;
mod load_error;
pub mod maps;
pub mod net;
pub mod probe;
pub mod programs;
pub mod sockmap;
pub mod tcp;
