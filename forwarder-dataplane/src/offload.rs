//! Connections that the kernel has taken: what the agent keeps of them, by tier.

pub mod sockmap;
pub mod tc;
pub mod tier_toggles;
