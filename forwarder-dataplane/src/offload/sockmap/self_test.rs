//! Whether this kernel hands bytes from socket to socket as it should: tried at start, on loopback.
//!
//! Kernels have lost, doubled and reordered what a sockmap redirects, and a distribution's may again; and the program reads
//! where TCP keeps the numbers of a segment. So each property that the tier rests on is tried once before a connection is
//! trusted to it.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::epoll::EventFlags;
use socket2::SockRef;

use super::memory::Memory;
use super::pair::SockPair;
use forwarder_kernel::sockmap::Sockmap;
use forwarder_kernel::tcp::leg::{Leg, Relayed};
use forwarder_kernel::tcp::segments::{Bare, BareKind, SegmentError, SegmentSocket};

/// How long each part may take: it is over in some milliseconds, but a node that starts is busy, and a tier would be lost for that.
const DEADLINE: Duration = Duration::from_secs(8);
/// How often what no event tells of is looked for.
const STEP: Duration = Duration::from_micros(200);
/// How much goes to the slow reader, more than all buffers hold, and how much of it at once.
const BULK: usize = 768 << 10;
const SIP: usize = 64 << 10;
/// The send buffer towards the slow reader, and the receive buffers of the ends.
const SMALL_BUFFER: usize = 32 << 10;
/// Set to fail a part of the self-test, for tests of what happens then.
const INJECT: &str = "FORWARDER_FAIL_SOCKMAP_SELF_TEST";

/// What the kernel does not do as it should.
#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    /// The loopback interface is down, or something else is missing for the test itself.
    #[error("it cannot be done: {0}")]
    Setup(#[from] io::Error),
    /// No segment can be sent in the name of a connection.
    #[error("it cannot be done: {0}")]
    Segment(#[from] SegmentError),
    /// Two sockets cannot be joined.
    #[error("{what}: two sockets cannot be joined ({reason})")]
    Join {
        /// What was tried.
        what: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// Something did not arrive as it was sent.
    #[error("{what}: {found}")]
    Wrong {
        /// What was tried.
        what: &'static str,
        /// What happened.
        found: String,
    },
}

/// Tries every property of the kernel that tier `sockmap` rests on; takes less than a second.
///
/// # Errors
/// The first one that it has not.
pub fn self_test(sockmap: &Arc<Sockmap>) -> Result<(), SelfTestError> {
    if std::env::var_os(INJECT).is_some() {
        return Err(SelfTestError::Wrong { what: "injected", found: format!("{INJECT} is set") });
    }
    Trial::new(sockmap, "bytes from before the sockets were joined")?.early_bytes()?;
    Trial::new(sockmap, "a segment that overlaps what has arrived")?.overlap()?;
    Trial::new(sockmap, "the end of one direction")?.half_close()?;
    Trial::new(sockmap, "a slow reader")?.slow_reader()
}

/// Two connections, each over loopback, and what is tried on them.
struct Trial<'a> {
    sockmap: &'a Arc<Sockmap>,
    what: &'static str,
    client: TcpStream,
    downstream: TcpStream,
    upstream: TcpStream,
    server: TcpStream,
}

impl<'a> Trial<'a> {
    fn new(sockmap: &'a Arc<Sockmap>, what: &'static str) -> Result<Self, SelfTestError> {
        let (client, downstream) = connection()?;
        let (upstream, server) = connection()?;
        for end in [&client, &server] {
            end.set_read_timeout(Some(DEADLINE))?;
            end.set_write_timeout(Some(DEADLINE))?;
            end.set_nodelay(true)?;
        }
        Ok(Self { sockmap, what, client, downstream, upstream, server })
    }

    fn wrong(&self, found: impl Into<String>) -> SelfTestError {
        SelfTestError::Wrong { what: self.what, found: found.into() }
    }

    /// Joins both connections, of which so many bytes have been relayed.
    fn join(&self, moved: [u64; 2]) -> Result<SockPair, SelfTestError> {
        let sockets = [self.downstream.as_fd(), self.upstream.as_fd()];
        SockPair::join(self.sockmap, &Memory::new(u64::MAX), sockets, moved, 0)
            .map_err(|error| SelfTestError::Join { what: self.what, reason: error.fallback_reason.as_str() })
    }

    fn expect(&self, mut end: &TcpStream, expected: &[u8]) -> Result<(), SelfTestError> {
        let mut found = vec![0; expected.len()];
        end.read_exact(&mut found).map_err(|error| self.wrong(format!("not all bytes arrived ({error})")))?;
        if found == expected { Ok(()) } else { Err(self.wrong("other bytes arrived than were sent")) }
    }

    /// Nothing may arrive that was not sent.
    fn expect_nothing(&self, mut end: &TcpStream) -> Result<(), SelfTestError> {
        end.set_nonblocking(true)?;
        let more = end.read(&mut [0]);
        end.set_nonblocking(false)?;
        match more {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            _ => Err(self.wrong("more arrived than was sent")),
        }
    }

    /// What was received before, partly read, and what comes after, arrives in order.
    fn early_bytes(&self) -> Result<(), SelfTestError> {
        (&self.client).write_all(b"early")?;
        (&self.server).write_all(b"greeting")?;
        wait_for(&self.downstream, 5)?;
        wait_for(&self.upstream, 8)?;
        let mut read = [0; 2];
        (&self.downstream).read_exact(&mut read)?;
        (&self.upstream).write_all(&read)?;
        let _pair = self.join([2, 0])?;
        (&self.client).write_all(b" and late")?;
        (&self.server).write_all(b" again")?;
        self.expect(&self.server, b"early and late")?;
        self.expect(&self.client, b"greeting again")?;
        self.expect_nothing(&self.server)?;
        self.expect_nothing(&self.client)
    }

    /// Bytes that arrive twice, together with new ones, are passed on once.
    fn overlap(&self) -> Result<(), SelfTestError> {
        let _pair = self.join([0, 0])?;
        (&self.client).write_all(b"0123456789")?;
        self.expect(&self.server, b"0123456789")?;
        let leg = Leg::read(&self.downstream, Relayed::default(), 0)?;
        let segment = Bare {
            from: leg.peer,
            to: leg.local,
            sequence: leg.next_received.wrapping_sub(4),
            acknowledgement: leg.next_sent,
            window: u16::MAX,
            kind: BareKind::Probe,
            timestamps: None,
        };
        SegmentSocket::open()?.send_with(&segment, b"6789abcdefghij")?;
        self.expect(&self.server, b"abcdefghij")?;
        // The client knows nothing of what was sent in its name: the connections end by a reset.
        self.expect_nothing(&self.server)
    }

    /// The end of one direction waits for its bytes and leaves the other direction alone.
    fn half_close(&self) -> Result<(), SelfTestError> {
        let mut pair = self.join([0, 0])?;
        (&self.client).write_all(b"question")?;
        self.client.shutdown(Shutdown::Write)?;
        let started = Instant::now();
        let mut scratch = [0; 4096];
        loop {
            for side in 0..2 {
                if has_ended(if side == 0 { &self.downstream } else { &self.upstream })? {
                    let _ = pair.met(side, EventFlags::RDHUP);
                }
            }
            pair.step(&mut scratch).map_err(|_| self.wrong("the other direction was cut"))?;
            if pair.is_half_closed() {
                break;
            }
            if started.elapsed() > DEADLINE {
                return Err(self.wrong("it was not passed on"));
            }
            thread::sleep(STEP);
        }
        self.expect(&self.server, b"question")?;
        if (&self.server).read(&mut [0])? != 0 {
            return Err(self.wrong("more arrived than was sent"));
        }
        (&self.server).write_all(b"answer")?;
        self.expect(&self.client, b"answer")
    }

    /// A reader with pauses gets every byte once and in order, through small buffers.
    fn slow_reader(&self) -> Result<(), SelfTestError> {
        let mut pair = self.join([0, 0])?;
        SockRef::from(&self.upstream).set_send_buffer_size(SMALL_BUFFER)?;
        let has_filled = AtomicBool::new(false);
        let data: Vec<u8> =
            (0_u32..).flat_map(|word| word.wrapping_mul(0x9e37_79b1).to_ne_bytes()).take(BULK).collect();
        let started = Instant::now();
        thread::scope(|scope| {
            let writer = scope.spawn(|| (&self.client).write_all(&data));
            let reader = scope.spawn(|| -> io::Result<bool> {
                let mut found = vec![0; SIP];
                while !has_filled.load(Ordering::Relaxed) && started.elapsed() < DEADLINE {
                    thread::sleep(STEP);
                }
                for expected in data.chunks(SIP) {
                    (&self.server).read_exact(&mut found)?;
                    if found != expected {
                        return Ok(false);
                    }
                    thread::sleep(STEP);
                }
                Ok(true)
            });
            let mut scratch = vec![0; SIP];
            while !reader.is_finished() && started.elapsed() < DEADLINE {
                // From now on the program leaves bytes to the agent.
                pair.look_for_notices();
                let stream = self.sockmap.stream(pair.cookies()[0]);
                if stream.is_some_and(|stream| stream.passed > 0) {
                    has_filled.store(true, Ordering::Relaxed);
                }
                pair.step(&mut scratch).map_err(|_| self.wrong("it was cut"))?;
                thread::sleep(STEP);
            }
            let was_held_back = has_filled.swap(true, Ordering::Relaxed);
            let read = reader.join().map_err(|_| self.wrong("the reader panicked"))?;
            let written = writer.join().map_err(|_| self.wrong("the writer panicked"))?;
            match (written, read) {
                (Ok(()), Ok(true)) if was_held_back => Ok(()),
                (Ok(()), Ok(true)) => Err(self.wrong("nothing held its sender back")),
                (_, Ok(false)) => Err(self.wrong("other bytes arrived than were sent")),
                (Err(error), _) | (_, Err(error)) => {
                    Err(self.wrong(format!("not all bytes arrived ({error})")))
                }
            }
        })
    }
}

/// A connection over loopback: the end that has connected, and the one that was accepted.
fn connection() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))?;
    // Before it connects: a window that was offered is not taken back.
    SockRef::from(&listener).set_recv_buffer_size(SMALL_BUFFER)?;
    let near = TcpStream::connect_timeout(&listener.local_addr()?, DEADLINE)?;
    loop {
        let (far, peer) = listener.accept()?;
        // Anybody may connect to the port.
        if peer == near.local_addr()? {
            return Ok((near, far));
        }
    }
}

/// Waits until a socket has received so many bytes.
fn wait_for(socket: &TcpStream, bytes: u64) -> io::Result<()> {
    let started = Instant::now();
    while rustix::io::ioctl_fionread(socket)? < bytes {
        if started.elapsed() > DEADLINE {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing arrives over loopback"));
        }
        thread::sleep(STEP);
    }
    Ok(())
}

/// Whether a socket has received the end of its stream.
fn has_ended(socket: &TcpStream) -> io::Result<bool> {
    Ok(forwarder_kernel::tcp::leg::remainder(socket)?.has_ended)
}
