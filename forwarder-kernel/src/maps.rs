//! The maps as the agent writes them: of listeners, and what all have in common.

pub(crate) mod batch;
mod client_rules;
pub mod gate;
pub mod grace;
pub mod listeners;
pub(crate) mod mapped;
mod remover;
pub mod updates;
pub(crate) mod versions;

use std::net::SocketAddr;

pub use aya::maps::MapError;
use rustix::io::Errno;

use crate::load_error;

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
    pub source: Box<MapError>,
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
