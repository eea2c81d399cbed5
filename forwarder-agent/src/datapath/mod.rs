//! What the agent writes for the eBPF programs and reads from them: the [`Datapath`] trait, the only seam to the kernel
//! maps. [`bpf`] is the real one.

pub mod arrival;
mod attach;
pub mod bpf;
mod btf;
pub mod cleanup;
mod conntrack;
#[cfg(test)]
pub(crate) mod fake;
mod filters;
mod flow_maps;
pub mod flows;
pub mod gate;
pub mod grace;
mod hook;
pub mod interfaces;
pub mod join;
pub mod joined_pair;
pub mod leg;
mod load_error;
mod maps;
#[cfg(test)]
mod namespaces;
mod netlink;
pub mod paths;
mod pin_dir;
mod pins;
pub mod ports;
pub mod probe;
pub mod routes;
pub mod segments;
pub mod sockmap;
pub mod stack;
pub(crate) mod tcp_info;
pub(crate) mod timestamp_clock;
mod updates;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use forwarder_common::{ListenerCounters, Verdict};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use self::attach::{AttachProblem, Attachment};
use self::interfaces::Interface;
use crate::model::{BindAddress, ListenerKey};

/// Why there is no tier `tc` on this kernel, whatever its programs would do; `None` if nothing is known against it.
pub fn kernel_obstacle() -> Option<&'static str> {
    // Programs keep what they know of a packet in per-CPU maps. There, the softirqs that run them can be preempted by each other.
    let is_realtime = std::fs::read_to_string("/sys/kernel/realtime").is_ok_and(|text| text.trim() == "1");
    is_realtime.then_some(
        "the kernel is a real-time one (PREEMPT_RT), where packets interrupt packets on one CPU: the programs do not allow for that",
    )
}

/// `CLOCK_MONOTONIC` in nanoseconds: the clock of the programs (`bpf_ktime_get_ns`).
pub fn monotonic() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or_default() * 1_000_000_000
        + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// The number by which the maps know a listener. Given by the reconciler, never reused while an agent runs.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct ListenerId(pub u32);

/// Whether a listener takes connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ListenerState {
    /// Its socket accepts.
    Ready,
    /// It accepts no more; its connections live on.
    Draining,
}

/// One endpoint of a listener, with its share of the listener's connections.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct BackendEntry {
    /// The endpoint.
    pub address: SocketAddr,
    /// The weight of its backend (0 to 1,000,000), shared with that backend's other endpoints.
    pub weight: u32,
}

/// The kernel's view of the listeners.
pub trait Datapath: Send {
    /// Adds a listener or changes its state.
    ///
    /// # Errors
    /// The map is full, or the kernel refuses: the listener works all the same, without counters.
    fn set_listener(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        state: ListenerState,
    ) -> Result<(), DatapathError>;

    /// Writes the endpoints of a listener, replacing those written before; only what differs is written.
    ///
    /// # Errors
    /// As [`Datapath::set_listener`].
    fn set_backends(&mut self, id: ListenerId, backends: Vec<BackendEntry>) -> Result<(), DatapathError>;

    /// Removes a listener, its endpoints and its counters. To remove an unknown one is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError>;

    /// Removes the listeners that a former agent had and this one has not. To be called once this one's are set.
    ///
    /// # Errors
    /// As [`Datapath::remove_listener`].
    fn remove_former_listeners(&mut self) -> Result<(), DatapathError>;

    /// What the program counted for a listener, over all CPUs; zeros for an unknown one.
    ///
    /// # Errors
    /// The kernel refuses.
    fn counters(&self, id: ListenerId) -> Result<ListenerCounters, DatapathError>;

    /// Counts packets on the interfaces that hold an address in `bound`, and on no others.
    ///
    /// Yields what failed, by interface; each failure once.
    fn attach(&mut self, interfaces: &[Interface], bound: &BTreeSet<BindAddress>) -> Vec<AttachProblem>;

    /// The interfaces on which packets are counted.
    fn attachments(&self) -> Vec<Attachment>;

    /// How often programs were attached again that somebody had removed from an interface.
    fn restored(&self) -> u64 {
        0
    }

    /// How many packets met with each verdict.
    ///
    /// # Errors
    /// The kernel refuses.
    fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError>;

    /// Leaves programs, maps and pins to the next agent, where there is something to leave: otherwise what ends the
    /// process removes them.
    fn leave(&mut self);
}

/// An operation on the kernel's maps that failed.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot {operation} map {map}{}: {}",
    .entry.as_ref().map(|e| format!(", entry {e}")).unwrap_or_default(),
    self.reason()
)]
pub struct DatapathError {
    /// What was attempted, such as `write to`.
    pub operation: &'static str,
    /// The map's name.
    pub map: &'static str,
    /// The entry, in words.
    pub entry: Option<String>,
    /// What the kernel said.
    #[source]
    pub source: Box<aya::maps::MapError>,
}

impl DatapathError {
    /// Whether the map has no room for the entry.
    pub fn is_full(&self) -> bool {
        // What the kernel says of a full hash (`alloc_htab_elem`) or array.
        load_error::errno_of(self.source.as_ref()) == Some(Errno::TOOBIG)
    }

    fn reason(&self) -> String {
        if self.is_full() {
            "the map is full".to_owned()
        } else {
            load_error::with_causes(self.source.as_ref())
        }
    }
}
