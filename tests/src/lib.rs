//! Support of the integration tests: the real binary, real sockets, network namespaces.
//!
//! A test lays out a [`Topology`] of its own, writes [`Manifests`], starts an [`Agent`] in the node's namespace and
//! [`peer`]s in the others. Everything is removed when its owner is dropped. Nothing waits without a deadline.

pub mod agent;
pub mod apiserver;
pub mod attach;
pub mod cases;
pub mod chart;
pub mod client;
pub mod cluster;
mod command;
#[path = "../../forwarder-common/src/packet/cut.rs"]
mod cut;
pub mod database;
pub mod databases;
pub mod datapath;
pub mod direct;
mod evidence;
pub mod fixture;
pub mod forge;
pub mod gateways;
pub mod http;
pub mod kernel;
pub mod load;
pub mod manifests;
pub mod mariadb;
pub mod metrics;
pub mod netns;
pub mod peer;
pub mod process;
pub mod random;
pub mod release;
pub mod sequence;
pub mod served;
pub mod shape;
pub mod steps;
pub mod stream;
pub mod swarm;
mod tap;
pub mod traffic;
pub mod wait;
pub mod wire;

pub use agent::{Agent, AgentCommand};
pub use apiserver::{Api, ApiServer};
pub use cases::cases;
pub use cluster::Cluster;
pub use databases::Databases;
pub use datapath::Datapath;
pub use fixture::Forwarding;
pub use load::Load;
pub use manifests::{BackendRef, Manifests};
pub use netns::{NetNs, Topology, require_root, skip};
pub use served::Served;
pub use wait::{patient, wait_for, wait_until};

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks a mutex that keeps heavy tests of one file from running at the same time.
///
/// A failed test poisons it; the others run all the same.
pub fn serialise(mutex: &'static Mutex<()>) -> MutexGuard<'static, ()> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
