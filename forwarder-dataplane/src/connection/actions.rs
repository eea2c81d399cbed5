//! What a connection is told to do.

use crate::counters::End;

/// What a worker wants of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action {
    /// See whether a peer has reset a side that is not being read, or does not answer any more.
    CheckReset,
    /// Set keepalive on the upstream side and note its local address: short connections are spared the system calls.
    KeepAlive,
    /// Join the two sides in the kernel, whatever has moved.
    Offload,
    /// Reset both sides.
    End(End),
}

/// The actions that a connection has not carried out yet. None replaces another: several may come before the connection's task runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Actions {
    pub(super) check_reset: bool,
    pub(super) keep_alive: bool,
    pub(super) offload: bool,
    /// How the connection is to end: as the first one said who ended it.
    pub(super) end: Option<End>,
}

impl Actions {
    /// These, and one more.
    #[must_use]
    pub(super) fn with(mut self, action: Action) -> Self {
        match action {
            Action::CheckReset => self.check_reset = true,
            Action::KeepAlive => self.keep_alive = true,
            Action::Offload => self.offload = true,
            Action::End(end) => {
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
    fn no_action_replaces_another() {
        let told = |actions: &[Action]| actions.iter().fold(Actions::default(), |all, one| all.with(*one));
        let actions =
            told(&[Action::End(End::ResetByOperator), Action::CheckReset, Action::End(End::Drained)]);
        assert_eq!(actions.end, Some(End::ResetByOperator));
        assert!(actions.check_reset && !actions.keep_alive && !actions.offload);
        let actions = told(&[Action::KeepAlive, Action::Offload, Action::CheckReset]);
        assert_eq!(
            (actions.check_reset, actions.keep_alive, actions.offload, actions.end),
            (true, true, true, None)
        );
    }
}
