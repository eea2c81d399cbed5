//! The time of a connection in userspace: both directions, the worker's actions, and how it ends there.

use std::cell::Cell;
use std::os::fd::AsRawFd as _;
use std::task::{Context, Poll};

use rustix::event::{PollFd, PollFlags, Timespec};
use socket2::SockRef;
use tokio::net::TcpStream;

use super::Connection;
use crate::counters::End;
use crate::relay::{Direction, Fault, Moved, Tier};
use crate::upstream;
use crate::worker_context::WorkerContext;
use forwarder_kernel::tcp::tcp_info::Silence;

/// A connection while its bytes move in userspace: its two sockets, and both directions between them.
pub(super) struct Relay<'a> {
    pub(super) context: &'a WorkerContext,
    pub(super) connection: &'a Connection,
    /// The sockets towards the client and towards the endpoint.
    pub(super) downstream: &'a TcpStream,
    pub(super) upstream: &'a TcpStream,
    pub(super) request: Direction,
    pub(super) response: Direction,
    is_first: bool,
}

impl<'a> Relay<'a> {
    /// Both directions, of which nothing has moved.
    pub(super) fn new(
        tier: Tier,
        context: &'a WorkerContext,
        connection: &'a Connection,
        [downstream, upstream]: [&'a TcpStream; 2],
    ) -> Self {
        let (request, response) = (Direction::new(tier), Direction::new(tier));
        Self { context, connection, downstream, upstream, request, response, is_first: true }
    }

    /// Whether neither direction has ended.
    pub(super) fn is_open(&self) -> bool {
        self.request.is_open() && self.response.is_open()
    }

    /// Has the ends of both directions kept back, or passed on.
    pub(super) fn hold_ends(&mut self, holds: bool) {
        self.request.hold_end(holds);
        self.response.hold_end(holds);
    }

    /// Has nothing more read, or goes on reading.
    pub(super) fn hold_reads(&mut self, holds: bool) {
        self.request.hold_reads(holds);
        self.response.hold_reads(holds);
    }

    /// Has the bytes read and written from now on, and no longer spliced.
    pub(super) fn copy_only(&mut self) {
        self.request.copy_only();
        self.response.copy_only();
    }

    /// Whether everything that was read has been written.
    pub(super) fn is_empty(&self) -> bool {
        self.request.is_empty() && self.response.is_empty()
    }

    /// Whether everything that was read has been passed on, ends too.
    pub(super) fn is_delivered(&self) -> bool {
        [&self.request, &self.response].iter().all(|one| one.is_empty() && (one.is_open() || one.is_done()))
    }

    /// Relays both directions; ready once both have ended, one has failed, or the worker says so.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        let Self {
            context,
            connection,
            downstream,
            upstream,
            ref mut request,
            ref mut response,
            ref mut is_first,
        } = *self;
        connection.listen(cx);
        let actions = connection.actions.take();
        if let Some(end) = actions.end {
            return Poll::Ready(end);
        }
        if actions.check_reset && has_failed(downstream, &connection.silences[0], context) {
            return Poll::Ready(End::DownstreamReset);
        }
        if actions.check_reset && has_failed(upstream, &connection.silences[1], context) {
            return Poll::Ready(End::UpstreamReset);
        }
        if actions.keep_alive {
            if let Some(record) = connection.record.borrow_mut().as_mut() {
                record.upstream_local = upstream.local_addr().ok();
            }
            set_keepalive(upstream, context);
        }
        if actions.offload {
            connection.offload_at.set(connection.offload_at.get().map(|_| 0));
        }
        let (mut received, mut sent) = (Moved::default(), Moved::default());
        let (up, down) = {
            let mut scratch = context.scratch();
            let up = request.poll(cx, downstream, upstream, &mut scratch, &mut received);
            // A socket tells an error once, and to the next one who asks, the end of the stream: to read from the one that
            // has just failed would make a cut stream look whole.
            let down = match up {
                Poll::Ready(Err(_)) => Poll::Pending,
                Poll::Ready(Ok(())) | Poll::Pending => {
                    response.poll(cx, upstream, downstream, &mut scratch, &mut sent)
                }
            };
            (up, down)
        };
        connection.count(received, sent, context);
        // Nothing was sent that would have carried it.
        if std::mem::take(is_first) && connection.received.get() == 0 {
            upstream::send_ack(upstream);
        }
        connection.half_closed.set(request.is_done() != response.is_done());
        connection.blind.set(!(request.is_reading() && response.is_reading()));
        match (up, down) {
            (Poll::Ready(Err(Fault::Source(error))), _)
            | (_, Poll::Ready(Err(Fault::Destination(error)))) => {
                tracing::trace!(downstream.addr = %connection.downstream, %error, "client side failed");
                Poll::Ready(End::DownstreamReset)
            }
            (Poll::Ready(Err(Fault::Destination(error))), _)
            | (_, Poll::Ready(Err(Fault::Source(error)))) => {
                tracing::trace!(downstream.addr = %connection.downstream, %error, "endpoint side failed");
                Poll::Ready(End::UpstreamReset)
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(End::Finished),
            (Poll::Pending, _) | (_, Poll::Pending) => Poll::Pending,
        }
    }
}

/// Has the kernel probe an endpoint that has been silent for long.
pub(super) fn set_keepalive(upstream: &TcpStream, context: &WorkerContext) {
    let Some(idle) = context.settings().connect.keepalive else { return };
    if let Err(error) = SockRef::from(upstream).set_tcp_keepalive(&upstream::keepalive(idle)) {
        tracing::debug!(%error, "cannot set keepalive on the upstream side");
    }
}

/// Whether the peer has reset the connection, or does not answer; tells even where nobody reads the socket.
fn has_failed(stream: &TcpStream, silence: &Cell<Silence>, context: &WorkerContext) -> bool {
    if let Some(patience) = context.settings().connect.keepalive.map(upstream::patience) {
        let mut looked = silence.get();
        let lasts = looked.lasts(stream.as_raw_fd(), patience);
        silence.set(looked);
        if lasts {
            return true;
        }
    }
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut polled, Some(&now)) {
        Ok(ready) => ready > 0 && polled.iter().any(|fd| fd.revents().contains(PollFlags::ERR)),
        Err(_) => false,
    }
}
