//! What a connection is told to do.

use crate::counters::End;

/// What a worker wants of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Signal {
    /// See whether a peer has reset a side that is not being read, or does not answer any more.
    CheckReset,
    /// Set keepalive on the upstream side and note its local address: short connections are spared the system calls.
    KeepAlive,
    /// Join the two sides in the kernel, whatever has moved.
    Offload,
    /// Reset both sides.
    End(End),
}

/// The signals that a connection has not carried out yet. None replaces another: several may come before the connection's task runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Signals {
    pub(super) check_reset: bool,
    pub(super) keep_alive: bool,
    pub(super) offload: bool,
    /// How the connection is to end: as the first one said who ended it.
    pub(super) end: Option<End>,
}

impl Signals {
    /// These, and one more.
    #[must_use]
    pub(super) fn with(mut self, signal: Signal) -> Self {
        match signal {
            Signal::CheckReset => self.check_reset = true,
            Signal::KeepAlive => self.keep_alive = true,
            Signal::Offload => self.offload = true,
            Signal::End(end) => {
                self.end.get_or_insert(end);
            }
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_signal_replaces_another() {
        let told = |signals: &[Signal]| signals.iter().fold(Signals::default(), |all, one| all.with(*one));
        let signals =
            told(&[Signal::End(End::ResetByOperator), Signal::CheckReset, Signal::End(End::Drained)]);
        assert_eq!(signals.end, Some(End::ResetByOperator));
        assert!(signals.check_reset && !signals.keep_alive && !signals.offload);
        let signals = told(&[Signal::KeepAlive, Signal::Offload, Signal::CheckReset]);
        assert_eq!(
            (signals.check_reset, signals.keep_alive, signals.offload, signals.end),
            (true, true, true, None)
        );
    }
}
