//! What comes of trying to take a connection into the kernel.

use crate::counters::End;
use forwarder_kernel::fallback_reason::FallbackReason;

/// What became of an attempt to take a connection into the kernel.
pub(super) enum Attempt {
    /// It is the kernel's, or looked after elsewhere.
    HandedOver,
    /// It has ended meanwhile.
    Ended(End),
    /// It stays where it is.
    Refused(FallbackReason),
}
