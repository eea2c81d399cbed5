//! Waiting for a condition, always with a deadline.

use std::env;
use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use crate::evidence;

/// How long between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(5);

/// `duration`, or as many times as long as `FORWARDER_TEST_PATIENCE` says: for machines on which everything takes longer.
pub fn patient(duration: Duration) -> Duration {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| {
        env::var("FORWARDER_TEST_PATIENCE")
            .map_or(1, |factor| factor.parse().expect("a whole number as patience"))
    });
    duration.saturating_mul(*FACTOR)
}

/// Looks at `condition` until it yields something, for at most `deadline`, or [`patient`]ly.
pub fn wait_for<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patient(deadline);
    loop {
        if let Some(value) = condition() {
            return Some(value);
        }
        if Instant::now() >= end {
            return None;
        }
        thread::park_timeout(INTERVAL);
    }
}

/// Waits until `condition` holds; fails the test with `what` after `deadline`, and shows how things stand then.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let held = wait_for(deadline, || condition().then_some(()));
    if held.is_none() {
        evidence::show();
    }
    assert!(held.is_some(), "not within {:?}: {what}", patient(deadline));
}
