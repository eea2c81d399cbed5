//! Sets up, builds, runs and tests forwarder.
fn main() {}
