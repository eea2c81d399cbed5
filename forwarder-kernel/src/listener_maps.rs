//! The kernel's maps of listeners as the reconciler sees them: the only seam between the two. [`Bpf`](crate::bpf::Bpf) is the real one.

use std::collections::BTreeSet;
use std::sync::Arc;

use forwarder_common::{ListenerCounters, Verdict};
use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{BindAddress, ListenerKey};

use crate::maps::{BackendEntry, DatapathError, ListenerId, ListenerState};
use crate::net::interfaces::Interface;
use crate::programs::attach::{AttachProblem, Attachment};

/// The kernel's view of the listeners.
pub trait ListenerMaps: Send {
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

    /// Has the programs drop the SYNs of clients that a listener does not let in, and those of a client that asks for more than `client_rate` connections in a
    /// second; 0 is any number. To be called before the listener is set, so that its first SYN is looked at too.
    ///
    /// # Errors
    /// As [`ListenerMaps::set_listener`]. Programs then let all clients in, and leave them to the listener's socket.
    fn set_clients(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        clients: &Arc<AllowedAddresses>,
        client_rate: u32,
    ) -> Result<(), DatapathError>;

    /// Whether programs know which clients a listener lets in.
    fn are_clients_checked(&self, id: ListenerId) -> bool;

    /// Writes the endpoints of a listener, replacing those written before; only what differs is written.
    ///
    /// # Errors
    /// As [`ListenerMaps::set_listener`].
    fn set_backends(&mut self, id: ListenerId, backends: Vec<BackendEntry>) -> Result<(), DatapathError>;

    /// Has the programs choose the endpoints of a listener's new connections among these, instead of leaving them to its socket:
    /// [`ListenerValue::targets`](forwarder_common::ListenerValue::targets). Zeros leave them to it.
    ///
    /// # Errors
    /// As [`ListenerMaps::set_listener`].
    fn set_targets(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        targets: [u64; 2],
    ) -> Result<(), DatapathError>;

    /// Removes a listener, its endpoints and its counters. To remove an unknown one is no error.
    ///
    /// # Errors
    /// The kernel refuses.
    fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError>;

    /// Removes the listeners that a former agent had and this one has not. To be called once this one's are set.
    ///
    /// # Errors
    /// As [`ListenerMaps::remove_listener`].
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
