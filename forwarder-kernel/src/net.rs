//! The network as the kernel tells it, most of it by netlink.

pub mod conntrack;
pub mod egress_path;
pub mod filters;
pub mod interfaces;
#[cfg(test)]
pub mod namespaces;
pub(crate) mod netdev;
mod netlink;
pub mod routes;
pub mod stack;
