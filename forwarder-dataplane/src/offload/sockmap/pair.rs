//! A pair whose sockets the kernel joins: both sockets, and what has to be done for them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use forwarder_common::sockmap::{STREAM_BROKEN, STREAM_FULL};
use rustix::event::epoll::EventFlags;
use rustix::io::Errno;
use rustix::net::sockopt;
use socket2::SockRef;

use super::direction::{Direction, Fault, Progress};
use super::memory::{Memory, Size};
use crate::counters::End;
use crate::relay::deliver_on_close;
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::sockmap::{JoinError, Sockmap, Source};
use forwarder_kernel::tcp::tcp_info::{ESTABLISHED, Info, Silence};

/// A direction that has moved so much before it is joined is one of bulk data.
const BULK: u64 = 64 << 10;

/// The downstream and the upstream socket of a pair, and both directions, from the client first. Closed by a reset unless
/// it has finished.
pub(crate) struct SockPair {
    memory: Arc<Memory>,
    // Fields are dropped in order: the sockets, which leave their maps when they are closed, never before, since that would
    // lose what they have received; then what the program knows of them.
    sockets: [OwnedFd; 2],
    entries: Entries,
    directions: [Direction; 2],
}

/// What stands in the maps of a pair.
struct Entries {
    sockmap: Arc<Sockmap>,
    cookies: [u64; 2],
}

impl Drop for Entries {
    fn drop(&mut self) {
        self.sockmap.forget(self.cookies);
    }
}

/// Why a pair is not joined.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct NotJoined {
    /// Why.
    pub(crate) fallback_reason: FallbackReason,
    /// Whether its sockets stand in a map all the same: then they may only be read and written.
    pub(crate) touched: bool,
}

impl From<FallbackReason> for NotJoined {
    fn from(fallback_reason: FallbackReason) -> Self {
        Self { fallback_reason, touched: false }
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(crate) struct PairStep {
    /// How many bytes were relayed, from the client and from the endpoint.
    pub(crate) relayed: [u64; 2],
    /// Something is to be looked for again, of which no event tells.
    pub(crate) is_waiting: bool,
    /// How far the receivers have come, where that is what is waited for.
    pub(crate) acknowledged: [u64; 2],
    /// Both directions have ended.
    pub(crate) is_finished: bool,
}

impl SockPair {
    /// Joins two sockets, of which `moved` bytes have been relayed from the client and from the endpoint, all that was read.
    pub(crate) fn join(
        sockmap: &Arc<Sockmap>,
        memory: &Arc<Memory>,
        sockets: [BorrowedFd<'_>; 2],
        moved: [u64; 2],
        listener_id: u32,
    ) -> Result<Self, NotJoined> {
        let unreadable = |_| FallbackReason::Unreadable;
        for socket in sockets {
            if Info::read(socket.as_raw_fd()).map_err(unreadable)?.state != ESTABLISHED {
                return Err(FallbackReason::Ended.into());
            }
        }
        let mut cookies = [0; 2];
        let mut owned = Vec::with_capacity(2);
        for (cookie, socket) in cookies.iter_mut().zip(sockets) {
            *cookie = sockopt::socket_cookie(socket).map_err(|_| FallbackReason::Unreadable)?;
            owned.push(socket.try_clone_to_owned().map_err(unreadable)?);
        }
        let [downstream, upstream] = sockets;
        let direction = |cookie, moved, source, target| {
            let wanted = if moved >= BULK { [Size::Medium, Size::Small] } else { [Size::Small; 2] };
            let reserve = |size: Size| {
                let buffer = size.buffer(source).ok()?;
                Some((size, buffer, memory.reserve(size.bytes(buffer))?))
            };
            let (size, buffer, reservation) =
                wanted.into_iter().find_map(reserve).ok_or(FallbackReason::MemoryFull)?;
            let direction = Direction::new(cookie, moved, target, size, reservation);
            Ok::<_, FallbackReason>((direction.map_err(|_| FallbackReason::Unreadable)?, buffer))
        };
        let (request, request_buffer) = direction(cookies[0], moved[0], downstream, upstream)?;
        let (response, response_buffer) = direction(cookies[1], moved[1], upstream, downstream)?;
        let mut directions = [request, response];
        for socket in sockets {
            SockRef::from(&socket).set_tcp_nodelay(true).map_err(unreadable)?;
        }
        let source = |index: usize| Source {
            socket: sockets[index],
            cookie: cookies[index],
            credit: directions[index].size.credits(0),
        };
        let redirected = sockmap.join([source(0), source(1)], listener_id).map_err(fallback_reason_of)?;
        // Once they are joined: who stays in userspace keeps the buffers that it had.
        let ways = [(downstream, upstream, request_buffer), (upstream, downstream, response_buffer)];
        for ((direction, is_redirected), (source, target, buffer)) in
            directions.iter_mut().zip(redirected).zip(ways)
        {
            direction.is_redirected = is_redirected;
            if let Err(error) = direction.size.apply(source, target, buffer) {
                tracing::debug!(%error, "cannot size the socket buffers of a connection: it keeps those that it has");
            }
        }
        let sockets = <[OwnedFd; 2]>::try_from(owned).map_err(|_| FallbackReason::Unreadable)?;
        Ok(Self {
            memory: Arc::clone(memory),
            sockets,
            entries: Entries { sockmap: Arc::clone(sockmap), cookies },
            directions,
        })
    }

    /// The cookies of both sockets.
    pub(crate) fn cookies(&self) -> [u64; 2] {
        self.entries.cookies
    }

    /// One of the sockets.
    pub(crate) fn socket(&self, side: usize) -> BorrowedFd<'_> {
        self.sockets[side].as_fd()
    }

    /// What one of the sockets is to be watched for.
    ///
    /// Not for bytes, as a rule: whoever is woken for each segment that the kernel redirects has saved nothing.
    pub(crate) fn interest(&self, side: usize) -> EventFlags {
        let mut flags = EventFlags::RDHUP | EventFlags::ET;
        flags.set(EventFlags::IN, self.directions[side].wants_read());
        flags.set(EventFlags::OUT, self.directions[1 - side].wants_write());
        flags
    }

    /// The kernel leaves to the agent what a socket receives.
    pub(crate) fn passes(&mut self, side: usize) {
        self.directions[side].passes();
    }

    /// The kernel holds more of what a socket receives than it should.
    pub(crate) fn throttle(&mut self, side: usize) {
        let source = self.sockets[side].as_fd();
        self.directions[side].throttle(source);
    }

    /// Takes what a socket is said to have met; how the pair ends, if it does.
    pub(crate) fn met(&mut self, side: usize, events: EventFlags) -> Option<End> {
        if events.contains(EventFlags::ERR) {
            return Some(end_of(side));
        }
        if events.intersects(EventFlags::RDHUP | EventFlags::HUP) {
            self.directions[side].ends();
        }
        None
    }

    /// How the pair ends if one of its peers does not answer.
    pub(crate) fn silent(&self, silences: &mut [Silence; 2], patience: Duration) -> Option<End> {
        let lasts =
            |side: usize, silence: &mut Silence| silence.lasts(self.socket(side).as_raw_fd(), patience);
        silences.iter_mut().enumerate().find_map(|(side, silence)| lasts(side, silence).then(|| end_of(side)))
    }

    /// Relays what the kernel leaves, and passes ends on.
    pub(crate) fn step(&mut self, scratch: &mut [u8]) -> Result<PairStep, End> {
        let Self { entries, sockets: [downstream, upstream], directions: [request, response], .. } = self;
        let sockmap = &entries.sockmap;
        let (downstream, upstream) = (downstream.as_fd(), upstream.as_fd());
        let up =
            request.step(sockmap, downstream, upstream, scratch).map_err(|fault| end_after(&fault, 0))?;
        let down =
            response.step(sockmap, upstream, downstream, scratch).map_err(|fault| end_after(&fault, 1))?;
        Ok(PairStep {
            relayed: [up.relayed, down.relayed],
            is_waiting: up.is_waiting || down.is_waiting,
            acknowledged: [up.acknowledged, down.acknowledged],
            is_finished: request.is_done() && response.is_done(),
        })
    }

    /// How many bytes of each direction the kernel has redirected; `None` where one is broken, and bytes are missing.
    pub(crate) fn redirected(&self) -> Option<[u64; 2]> {
        let mut redirected = [0; 2];
        for (redirected, direction) in redirected.iter_mut().zip(&self.directions) {
            let stream = self.entries.sockmap.stream(direction.cookie)?;
            if stream.state == STREAM_BROKEN {
                return None;
            }
            *redirected = stream.redirected;
        }
        Some(redirected)
    }

    /// Looks for what notices tell, which may be lost; whether there is something to do.
    pub(crate) fn look_for_notices(&mut self) -> bool {
        for (direction, source) in self.directions.iter_mut().zip(&self.sockets) {
            let Some(stream) =
                self.entries.sockmap.stream(direction.cookie).filter(|_| direction.is_redirected)
            else {
                continue;
            };
            if stream.passed != direction.relayed() {
                direction.passes();
            }
            // One that is quiet tells of the past.
            if stream.state == STREAM_FULL && direction.has_moved(stream.redirected) {
                direction.throttle(source.as_fd());
            }
        }
        self.directions.iter().any(Direction::has_work)
    }

    /// Whether one direction has ended.
    pub(crate) fn is_half_closed(&self) -> bool {
        self.directions[0].is_done() != self.directions[1].is_done()
    }

    /// How each direction stands.
    pub(crate) fn progress(&self) -> Result<[Progress; 2], End> {
        let [request, response] = &self.directions;
        let (downstream, upstream) = (self.socket(0), self.socket(1));
        Ok([
            request
                .progress(&self.entries.sockmap, downstream, upstream)
                .map_err(|fault| end_after(&fault, 0))?,
            response
                .progress(&self.entries.sockmap, upstream, downstream)
                .map_err(|fault| end_after(&fault, 1))?,
        ])
    }

    /// Gives a direction another size, where there is memory for it; whether it has it.
    pub(crate) fn resize(&mut self, side: usize, wanted: Size) -> bool {
        let (source, target) = (self.sockets[side].as_fd(), self.sockets[1 - side].as_fd());
        let direction = &mut self.directions[side];
        let Ok(buffer) = wanted.buffer(source) else { return false };
        let bytes = wanted.bytes(buffer);
        let reservation = if wanted > direction.size {
            let Some(reservation) = self.memory.reserve_more(bytes) else { return false };
            Some(reservation)
        } else {
            None
        };
        if let Err(error) = wanted.apply(source, target, buffer) {
            tracing::debug!(%error, "cannot size the socket buffers of a connection: it keeps those that it has");
            return false;
        }
        match reservation {
            Some(reservation) => direction.reservation = reservation,
            None => direction.reservation.shrink(bytes),
        }
        direction.resize(&self.entries.sockmap, wanted);
        true
    }

    /// How many bytes each socket's peer has acknowledged, by the kernel's count.
    pub(crate) fn acknowledged(&self) -> [u64; 2] {
        [0, 1].map(|side| Info::read(self.socket(side).as_raw_fd()).map_or(0, |info| info.acknowledged))
    }

    /// Gives a direction the next larger size, where there is one, and memory for it; whether it has got it.
    pub(crate) fn grow(&mut self, side: usize) -> bool {
        let next = self.size(side).next();
        next != self.size(side) && self.resize(side, next)
    }

    /// The size of a direction.
    pub(crate) fn size(&self, side: usize) -> Size {
        self.directions[side].size
    }

    /// Lets both sockets, which are closed next, deliver what they still have, instead of resetting their peers.
    pub(crate) fn finish(&self) {
        self.sockets.iter().for_each(deliver_on_close);
    }
}

/// How a pair ends whose client (side 0) or endpoint (side 1) has reset it.
const fn end_of(side: usize) -> End {
    if side == 0 { End::DownstreamReset } else { End::UpstreamReset }
}

/// How a pair ends of which the direction from `side` cannot go on.
const fn end_after(fault: &Fault, side: usize) -> End {
    match fault {
        Fault::Source => end_of(side),
        Fault::Target => end_of(1 - side),
        Fault::Lost => End::Lost,
    }
}

fn fallback_reason_of(error: JoinError) -> NotJoined {
    let fallback_reason = match error.errno {
        // It is not established any more.
        Some(Errno::OPNOTSUPP) => FallbackReason::Ended,
        Some(Errno::TOOBIG | Errno::NOMEM) => FallbackReason::MapFull,
        // Something else handles what it receives (`tls`, another map).
        Some(Errno::INVAL | Errno::BUSY) => FallbackReason::SocketInUse,
        _ => FallbackReason::Kernel,
    };
    NotJoined { fallback_reason, touched: error.touched }
}
