//! The timestamp clocks of a connection's sockets, which take a tick or two to be known.

use std::future::poll_fn;
use std::time::Duration;

use tokio::time::timeout;

use super::attempt::Attempt;
use super::relaying::Relay;
use forwarder_kernel::fallback_reason::FallbackReason;

/// How long to wait for the next reading, which helps if it is an odd number of ticks after the first. A timer of whole
/// milliseconds that is set just after one of them has passed takes one more: so the first of these takes three.
const NEXT_READING: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(1)];
/// How many readings are made before the connection stays where it is for now.
const READINGS: usize = 50;

/// Relays until both clocks are known.
///
/// # Errors
/// What became of the connection meanwhile, or why they cannot be known.
pub(super) async fn learn(relay: &mut Relay<'_>) -> Result<(), Attempt> {
    for wait in NEXT_READING.into_iter().cycle().take(READINGS) {
        let mut are_known = true;
        for (socket, cell) in [relay.downstream, relay.upstream].into_iter().zip(&relay.connection.clocks) {
            let mut clock = cell.get();
            are_known &= clock.learn(socket).map_err(Attempt::Refused)?;
            cell.set(clock);
        }
        if are_known {
            // An end may have been passed on meanwhile.
            return if relay.is_open() { Ok(()) } else { Err(Attempt::Refused(FallbackReason::Ended)) };
        }
        let relayed = poll_fn(|cx| relay.poll(cx));
        if let Ok(end) = timeout(wait, relayed).await {
            return Err(Attempt::Ended(end));
        }
    }
    Err(Attempt::Refused(FallbackReason::Unreadable))
}
