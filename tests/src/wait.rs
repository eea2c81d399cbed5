//! Waiting for a condition, always with a deadline.

use std::thread;
use std::time::{Duration, Instant};

/// How long between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(5);

/// Looks at `condition` until it yields something, for at most `deadline`.
pub fn wait_for<T>(deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + deadline;
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

/// Waits until `condition` holds; fails the test with `what` after `deadline`.
#[track_caller]
pub fn wait_until(what: &str, deadline: Duration, mut condition: impl FnMut() -> bool) {
    let held = wait_for(deadline, || condition().then_some(()));
    assert!(held.is_some(), "not within {deadline:?}: {what}");
}
