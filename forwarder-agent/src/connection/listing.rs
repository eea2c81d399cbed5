//! What a live connection shows of itself, and how it hears that it is to end.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::task::Poll;
use std::time::Duration;

use super::Connection;
use crate::counters::End;
use crate::record::Record;
use crate::view::{ConnectionState, ConnectionView};

impl Connection {
    /// What operators see of it, given the present sweep and how long a sweep takes; `None` once it is the kernel's.
    pub(crate) fn view(&self, sweep: u32, period: Duration) -> Option<ConnectionView> {
        let record = self.record.borrow();
        let record = record.as_ref()?;
        let idle = period * sweep.wrapping_sub(self.active.get());
        Some(ConnectionView {
            state: self.state(record),
            idle_ms: milliseconds(idle.min(record.opened.elapsed())),
            reason: self.refusal.get().map(|refusal| refusal.as_str().to_owned()),
            ..record.view()
        })
    }

    fn state(&self, record: &Record) -> ConnectionState {
        if self.order_to_end().is_some() {
            ConnectionState::Closing
        } else if record.upstream.is_none() {
            ConnectionState::Connecting
        } else if self.is_in_tail.get() {
            ConnectionState::Tail
        } else if self.half_closed.get() {
            ConnectionState::HalfClosed
        } else {
            ConnectionState::Open
        }
    }

    fn order_to_end(&self) -> Option<End> {
        self.orders.get().end
    }

    /// Waits until the connection is told to end, while nothing is relayed.
    pub(super) async fn ordered_end(&self) -> End {
        poll_fn(|cx| {
            self.listen(cx);
            self.order_to_end().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// A socket for both families writes addresses of IPv4 as ones of IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ std::net::IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        std::net::IpAddr::V6(_) => address,
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
