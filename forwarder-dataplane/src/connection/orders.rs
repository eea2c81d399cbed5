//! What a connection is told to do.

use crate::counters::End;

/// What a worker wants of a connection.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Order {
    /// See whether a peer has reset a side that is not being read, or does not answer any more.
    Look,
    /// Set keepalive on the upstream side and note its local address: short connections are spared the system calls.
    KeepAlive,
    /// Join the two sides in the kernel, whatever has moved.
    Offload,
    /// Reset both sides.
    End(End),
}

/// The orders that a connection has not carried out yet. None replaces another: several may come before the connection's task runs.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Orders {
    pub(super) look: bool,
    pub(super) keep_alive: bool,
    pub(super) offload: bool,
    /// How the connection is to end: as the first one said who ended it.
    pub(super) end: Option<End>,
}

impl Orders {
    /// These, and one more.
    #[must_use]
    pub(super) fn with(mut self, order: Order) -> Self {
        match order {
            Order::Look => self.look = true,
            Order::KeepAlive => self.keep_alive = true,
            Order::Offload => self.offload = true,
            Order::End(end) => {
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
    fn no_order_replaces_another() {
        let told = |orders: &[Order]| orders.iter().fold(Orders::default(), |all, one| all.with(*one));
        let orders = told(&[Order::End(End::ResetByOperator), Order::Look, Order::End(End::Drained)]);
        assert_eq!(orders.end, Some(End::ResetByOperator));
        assert!(orders.look && !orders.keep_alive && !orders.offload);
        let orders = told(&[Order::KeepAlive, Order::Offload, Order::Look]);
        assert_eq!((orders.look, orders.keep_alive, orders.offload, orders.end), (true, true, true, None));
    }
}
