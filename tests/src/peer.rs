//! Servers: thread-based, stopped when dropped, and bounded by time-outs.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;

use crate::netns::NetNs;
use crate::random;
use crate::stream::{End, TIMEOUT, read};
use crate::wait::patient;

/// How soon a stopped server notices.
const STOP_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// Handlers need little: many of them run at once.
const STACK: usize = 256 * 1024;

/// A server with one thread for each connection.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens on `address` in `netns`; `handle` serves each connection. What it returns is dropped: a handler that has
    /// something to tell sends it through a channel.
    pub fn start<F>(netns: &NetNs, address: SocketAddr, handle: F) -> Result<Self>
    where
        F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        let listener = netns.bind(address).with_context(|| format!("listen on {address}"))?;
        Self::on(listener, handle)
    }

    /// The same on a socket that listens already.
    pub fn on<F>(listener: TcpListener, handle: F) -> Result<Self>
    where
        F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let accepted = Arc::new(AtomicUsize::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let thread = thread::Builder::new().name(format!("server {address}")).spawn({
            let accepted = Arc::clone(&accepted);
            let stop = Arc::clone(&stop);
            move || accept(&listener, &Arc::new(handle), &accepted, &stop)
        })?;
        Ok(Self { address, accepted, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it took.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been printed already.
            let _ = thread.join();
        }
    }
}

fn accept<F>(listener: &TcpListener, handle: &Arc<F>, accepted: &AtomicUsize, stop: &AtomicBool)
where
    F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    while !stop.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        if !matches!(poll(&mut fds, Some(&STOP_INTERVAL)), Ok(1..)) {
            continue;
        }
        let Ok((stream, _)) = listener.accept() else {
            continue;
        };
        accepted.fetch_add(1, Ordering::Relaxed);
        let handle = Arc::clone(handle);
        let serve = move || -> io::Result<()> {
            stream.set_nonblocking(false)?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patient(TIMEOUT)))?;
            stream.set_write_timeout(Some(patient(TIMEOUT)))?;
            handle(&stream)
        };
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || {
                // The client's view of the connection is what tests look at.
                let _ = serve();
            })
            .expect("start a thread for a connection");
    }
}

/// Sends back what it receives, until the end, and then ends too.
pub fn echo(mut stream: &TcpStream) -> io::Result<()> {
    let mut buffer = [0; 16 * 1024];
    loop {
        match read(stream, &mut buffer)? {
            0 => return stream.shutdown(Shutdown::Write),
            size => stream.write_all(&buffer[..size])?,
        }
    }
}

/// Sends back what it receives until the connection ends, and tells how it did.
pub fn echo_to_end(mut stream: &TcpStream) -> io::Result<End> {
    let mut buffer = [0; 4096];
    loop {
        match read(stream, &mut buffer) {
            Ok(0) => return Ok(End::Fin),
            Ok(size) => stream.write_all(&buffer[..size])?,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(End::Reset),
            Err(_) => return Ok(End::Open),
        }
    }
}

/// Speaks first: sends its name and a line end, then echoes.
pub fn identify(name: &'static str) -> impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static {
    move |mut stream| {
        stream.write_all(name.as_bytes())?;
        stream.write_all(b"\n")?;
        echo(stream)
    }
}

/// Speaks first: sends the address that it was reached at and a line end, then echoes.
pub fn tell_address(mut stream: &TcpStream) -> io::Result<()> {
    writeln!(stream, "{}", stream.local_addr()?.ip())?;
    echo(stream)
}

/// Reads until the end, then answers with the hexadecimal SHA-256 of what it read, and the length.
pub fn digest(mut stream: &TcpStream) -> io::Result<()> {
    let (digest, length) = random::receive_to_end(&mut stream)?;
    write!(stream, "{} {length}", random::hex(digest))?;
    stream.shutdown(Shutdown::Write)
}

/// Reads nothing, and keeps the connection until the client closes it or the time-out passes.
pub fn hold(stream: &TcpStream) -> io::Result<()> {
    let deadline =
        Timespec { tv_sec: i64::try_from(patient(TIMEOUT).as_secs()).unwrap_or(i64::MAX), tv_nsec: 0 };
    retry_on_intr(|| poll(&mut [PollFd::new(stream, PollFlags::RDHUP)], Some(&deadline)))?;
    Ok(())
}

/// The request that [`transfer`] understands: send `length` bytes made from `seed`.
pub fn transfer_request(seed: u64, length: u64) -> [u8; 16] {
    let mut request = [0; 16];
    request[..8].copy_from_slice(&seed.to_le_bytes());
    request[8..].copy_from_slice(&length.to_le_bytes());
    request
}

/// Sends what a [`transfer_request`] asks for, while it reads what follows the request. Then sends two SHA-256: that of
/// what it sent, and that of what it read.
pub fn transfer(stream: &TcpStream) -> io::Result<()> {
    let (mut reader, mut writer) = (stream, stream);
    let mut request = [0; 16];
    reader.read_exact(&mut request)?;
    let number = |range| u64::from_le_bytes(<[u8; 8]>::try_from(&request[range]).expect("eight bytes"));
    let (seed, length) = (number(0..8), number(8..16));
    thread::scope(|scope| {
        let sender = scope.spawn(move || random::send(&mut writer, seed, length));
        let (digest, _) = random::receive_to_end(&mut reader)?;
        let sent = sender.join().expect("the sender does not panic")?;
        let mut stream = stream;
        stream.write_all(&[sent, digest].concat())?;
        stream.shutdown(Shutdown::Write)
    })
}

/// How many connections `accepted` by each server, in the servers' order.
pub fn accepted<'a>(servers: impl IntoIterator<Item = &'a Server>) -> Vec<usize> {
    servers.into_iter().map(Server::accepted).collect()
}

/// An address whose port refuses connections: it was bound and is free again.
pub fn refused(netns: &NetNs, address: SocketAddr) -> Result<SocketAddr> {
    Ok(netns.bind(address)?.local_addr()?)
}

/// A time in which nothing should happen, when a test asserts that nothing does.
pub const QUIET: Duration = Duration::from_millis(300);
