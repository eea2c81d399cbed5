//! What every crate of the agent stands on: locks, errors as people read them, what a panic does, and the steps at which a test stops
//! the agent.

pub mod error;
pub mod failpoint;
pub mod lock;
pub mod panics;
pub mod values;
