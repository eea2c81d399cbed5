//! What a live connection shows of itself, and how it hears that it is to end.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use super::Connection;
use crate::counters::End;
use crate::record::Record;
use crate::view::{ConnectionState, ConnectionView, milliseconds};

impl Connection {
    /// What operators see of it, given the present sweep and how long a sweep takes; `None` once it is the kernel's.
    pub(crate) fn view(&self, sweep: u32, period: Duration) -> Option<ConnectionView> {
        let record = self.record.borrow();
        let record = record.as_ref()?;
        let idle = period * sweep.wrapping_sub(self.active.get());
        Some(ConnectionView {
            state: self.state(record),
            idle_ms: milliseconds(idle.min(record.opened.elapsed())),
            reason: self.fallback_reason.get().map(|fallback_reason| fallback_reason.as_str().to_owned()),
            ..record.view()
        })
    }

    fn state(&self, record: &Record) -> ConnectionState {
        if self.end_asked_for().is_some() {
            ConnectionState::Closing
        } else if record.upstream.is_none() {
            ConnectionState::Connecting
        } else if self.is_in_handover.get() {
            ConnectionState::Handover
        } else if self.half_closed.get() {
            ConnectionState::HalfClosed
        } else {
            ConnectionState::Open
        }
    }

    fn end_asked_for(&self) -> Option<End> {
        self.actions.get().end
    }

    /// Waits until the connection is told to end, while nothing is relayed.
    pub(super) async fn asked_to_end(&self) -> End {
        poll_fn(|cx| {
            self.listen(cx);
            self.end_asked_for().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
