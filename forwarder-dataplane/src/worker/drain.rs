//! How fast connections are ended that have not ended by themselves.

use std::time::Duration;

/// How often a worker looks for connections that have timed out.
pub const SWEEP_PERIOD: Duration = Duration::from_millis(250);
/// How often while it drains, so that closings are spread finely.
pub const DRAIN_SWEEP_PERIOD: Duration = Duration::from_millis(20);
/// Which part of the drain window is left for closing what has not ended by itself.
const DRAIN_CLOSING_SHARE: f64 = 0.25;

/// How many connections may be left when a drain has gone on for `elapsed`, of those that `remaining` at the beginning of
/// its last part: all of them then, none at the end of the window; `None` before.
pub fn left_of_drain(
    elapsed: Duration,
    window: Duration,
    remaining: &mut Option<usize>,
    present: usize,
) -> Option<usize> {
    let grace = window.mul_f64(1.0 - DRAIN_CLOSING_SHARE);
    if elapsed < grace {
        return None;
    }
    let total = *remaining.get_or_insert(present);
    let left = window.saturating_sub(elapsed).as_secs_f64()
        / window.saturating_sub(grace).as_secs_f64().max(f64::MIN_POSITIVE);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_precision_loss,
        clippy::cast_sign_loss,
        reason = "a share of a count of connections"
    )]
    let keep = (total as f64 * left) as usize;
    Some(keep)
}
