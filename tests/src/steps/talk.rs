//! Both ends of a connection through the agent, in one thread.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;

use super::Side;
use crate::shape::content::Content;

/// How long between two looks at both ends.
const LOOK: Duration = Duration::from_micros(300);

/// What an end has seen of the other one's end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Seen {
    Open,
    Fin,
    Reset,
}

/// One end: what it sends, what it has received, and how far it is to go.
#[derive(Debug)]
pub(super) struct Talker {
    /// `None` once it is closed.
    pub(super) stream: Option<TcpStream>,
    sent: Content,
    received: Content,
    /// How much it is to have sent.
    pub(super) target: usize,
    pub(super) reads: bool,
    pub(super) seen: Seen,
    pub(super) has_finished: bool,
    /// A byte is not what it should be.
    pub(super) fault: Option<String>,
}

impl Talker {
    fn new(stream: TcpStream, ours: u64, theirs: u64) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self {
            stream: Some(stream),
            sent: Content::new(ours),
            received: Content::new(theirs),
            target: 0,
            reads: true,
            seen: Seen::Open,
            has_finished: false,
            fault: None,
        })
    }

    /// How much it has received.
    pub(super) fn received(&self) -> usize {
        self.received.position()
    }

    /// How much it has given to its socket.
    pub(super) fn sent(&self) -> usize {
        self.sent.position()
    }

    /// Ends its direction.
    pub(super) fn finish(&mut self) {
        self.has_finished = true;
        if let Some(stream) = &self.stream {
            // It may be reset already, which is seen otherwise.
            let _ = stream.shutdown(Shutdown::Write);
        }
    }

    /// Closes its socket by a reset.
    pub(super) fn reset(&mut self) -> io::Result<()> {
        match self.stream.take() {
            Some(stream) => SockRef::from(&stream).set_linger(Some(Duration::ZERO)),
            None => Ok(()),
        }
    }

    /// Sends and receives what it can without waiting.
    pub(super) fn pump(&mut self) {
        while self.seen != Seen::Reset && self.sent() < self.target && !self.has_finished {
            let Some(stream) = &self.stream else { return };
            let bytes = self.sent.next(self.target - self.sent());
            match send(stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(size) => self.sent.advance(&bytes[..size]),
                Err(Errno::AGAIN) => break,
                Err(_) => self.seen = Seen::Reset,
            }
        }
        self.receive();
        // An end that does not read, or has read the end, hears of a reset all the same.
        if let Some(stream) = &self.stream
            && (!self.reads || self.seen == Seen::Fin)
            && matches!(stream.take_error(), Ok(Some(_)))
        {
            self.seen = Seen::Reset;
        }
    }

    fn receive(&mut self) {
        let mut buffer = [0; 8 * 1024];
        while self.reads && self.seen == Seen::Open {
            let Some(stream) = &self.stream else { return };
            match recv(stream, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => self.seen = Seen::Fin,
                Ok((size, _)) => {
                    let bytes = &buffer[..size];
                    if let Some(index) = self.received.differs(bytes)
                        && self.fault.is_none()
                    {
                        let belongs = self.received.whereabouts(&bytes[index..size.min(index + 32)]);
                        let at = self.received() + index;
                        self.fault = Some(format!("byte {at} is another, that of {belongs:?}"));
                    }
                    self.received.advance(bytes);
                }
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(_) => self.seen = Seen::Reset,
            }
        }
    }
}

/// Both ends.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) client: Talker,
    pub(super) endpoint: Talker,
}

impl Conversation {
    pub(super) fn new(client: TcpStream, endpoint: TcpStream, seed: u64) -> io::Result<Self> {
        Ok(Self { client: Talker::new(client, seed, !seed)?, endpoint: Talker::new(endpoint, !seed, seed)? })
    }

    pub(super) fn at(&mut self, side: Side) -> &mut Talker {
        match side {
            Side::Client => &mut self.client,
            Side::Endpoint => &mut self.endpoint,
        }
    }

    pub(super) fn pump(&mut self) {
        self.client.pump();
        self.endpoint.pump();
    }

    /// Goes on until `condition` holds; whether it has within the time.
    pub(super) fn until(&mut self, time: Duration, mut condition: impl FnMut(&mut Self) -> bool) -> bool {
        let end = Instant::now() + time;
        loop {
            self.pump();
            if condition(self) {
                return true;
            }
            if Instant::now() >= end {
                return false;
            }
            thread::park_timeout(LOOK);
        }
    }

    /// Whether an end has received everything that the other one was to send.
    pub(super) fn has_all(&mut self, side: Side) -> bool {
        let target = self.at(side.other()).target;
        self.at(side).received() == target
    }

    /// Where both stand, for a report.
    pub(super) fn standing(&self) -> String {
        let end = |talker: &Talker, other: &Talker| {
            format!("{} of {} received, sees {:?}", talker.received(), other.target, talker.seen)
        };
        format!(
            "client: {}; endpoint: {}",
            end(&self.client, &self.endpoint),
            end(&self.endpoint, &self.client)
        )
    }

    /// A byte that is wrong, at either end.
    pub(super) fn fault(&self) -> Option<String> {
        let name = |name, fault: &Option<String>| fault.as_ref().map(|fault| format!("{name}: {fault}"));
        name("client", &self.client.fault).or_else(|| name("endpoint", &self.endpoint.fault))
    }
}
