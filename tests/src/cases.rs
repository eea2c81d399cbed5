//! How many of its cases a test plays.

use std::env;

/// The first of these, as many as `FORWARDER_TEST_CASES` says; else all: for machines on which each takes long. The first ones should
/// differ in as much as they can.
pub fn cases<T>(all: impl IntoIterator<Item = T>) -> impl Iterator<Item = T> {
    let count = env::var("FORWARDER_TEST_CASES")
        .map_or(usize::MAX, |count| count.parse().expect("a number of cases"));
    assert!(count > 0, "no case would test nothing");
    all.into_iter().take(count)
}
