//! Direct connections, as tests see them.

use std::time::Duration;

use serde_json::Value;

use crate::agent::Agent;
use crate::fixture::{Forwarding, LISTENER};
use crate::kernel::entries;
use crate::{peer, wait_until};

const WAIT: Duration = Duration::from_secs(20);

/// The settings by which every listener is direct.
pub const DIRECT: [&str; 2] = ["--datapath", "direct"];

/// Waits until the programs choose the endpoints of the listener.
#[track_caller]
pub fn wait_direct(agent: &Agent) {
    wait_until("the listener is direct", WAIT, || is_direct(agent));
}

/// Whether they do.
pub fn is_direct(agent: &Agent) -> bool {
    let listener = agent.listener(LISTENER).expect("the state");
    listener.is_some_and(|listener| listener["direct"] == true)
}

/// Starts an agent at tier `direct`, with more arguments, in front of an echo server.
#[track_caller]
pub fn start(arguments: &[&str]) -> Forwarding {
    let forwarding = Forwarding::start(&[&DIRECT[..], arguments].concat(), peer::echo).expect("an agent");
    wait_direct(&forwarding.agent);
    forwarding
}

/// The connections that are listed at a tier.
pub fn listed(agent: &Agent, tier: &str) -> Vec<Value> {
    let connections = agent.connections("").expect("a list");
    connections.into_iter().filter(|one| one["tier"] == tier).collect()
}

/// Waits until nothing is left in the kernel of direct connections.
#[track_caller]
pub fn wait_empty(agent: &Agent) {
    wait_until("nothing is left of direct connections", WAIT, || {
        agent.pairs() == 0 && entries(agent.pin_dir(), "direct").is_ok_and(|count| count == 0)
    });
}

/// Switches the tier.
#[track_caller]
pub fn switch(agent: &Agent, state: &str) {
    let output = agent.command(&["datapath", state, "direct"]).output().expect("the command");
    assert!(output.status.success(), "{output:?}");
}
