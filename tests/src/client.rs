//! What the tests' clients do on a connection.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::SockRef;

use crate::netns::NetNs;
use crate::wait::patient;
use crate::{peer, random};

/// How long a read or a write may wait.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Connects from `netns`, with time-outs on reads and writes.
pub fn connect(netns: &NetNs, address: SocketAddr) -> io::Result<TcpStream> {
    let stream = netns.connect(address)?;
    stream.set_read_timeout(Some(patient(TIMEOUT)))?;
    stream.set_write_timeout(Some(patient(TIMEOUT)))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Exchanges data with [`peer::transfer`] in both directions at once and checks every byte of both.
pub fn transfer(stream: &TcpStream, seed: u64, up: u64, down: u64) -> Result<()> {
    let mut writer = stream;
    let mut reader = stream;
    thread::scope(|scope| {
        let sender = scope.spawn(move || {
            writer.write_all(&peer::transfer_request(seed, down))?;
            let digest = random::send(&mut writer, !seed, up)?;
            writer.shutdown(Shutdown::Write)?;
            io::Result::Ok(digest)
        });
        let received = random::receive(&mut reader, down).context("receive the server's data")?;
        let sent = sender.join().expect("the sender does not panic").context("send")?;
        let mut digests = [[0; 32]; 2];
        reader.read_exact(digests.as_flattened_mut()).context("receive the digests")?;
        ensure!(received == digests[0], "{down} bytes from the server arrived changed");
        ensure!(sent == digests[1], "{up} bytes from the client arrived changed");
        ensure!(reader.read(&mut [0])? == 0, "more data than was sent");
        Ok(())
    })
}

/// Sends one message to an echo server and checks what returns.
pub fn ping(mut stream: &TcpStream, message: &[u8]) -> io::Result<()> {
    stream.write_all(message)?;
    let mut answer = vec![0; message.len()];
    stream.read_exact(&mut answer)?;
    if answer == message { Ok(()) } else { Err(io::Error::other("the echo differs from the message")) }
}

/// Reads once, and again where a signal interrupts it. The kernel does not take up a read with a time-out by itself, and any thread
/// may be told of a child's end: an agent that is killed while another thread has its signals blocked, as for a new thread.
pub fn read(mut stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match stream.read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// Reads one line, without its end. Reads no byte beyond it.
pub fn read_line(stream: &TcpStream) -> io::Result<String> {
    let mut line = String::new();
    // One byte at a time: a larger buffer could swallow what follows the line.
    BufReader::with_capacity(1, stream).read_line(&mut line)?;
    if line.pop() == Some('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

/// Which server answers on a new connection to `address`: one of [`peer::identify`].
pub fn identity(netns: &NetNs, address: SocketAddr) -> io::Result<String> {
    read_line(&connect(netns, address)?)
}

/// Closes the connection with a reset.
pub fn reset(stream: TcpStream) -> io::Result<()> {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))
}

/// How a connection ended, seen by a reader that discards data.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// The peer ended its direction.
    Fin,
    /// The peer reset the connection.
    Reset,
    /// Neither, until the time-out.
    Open,
}

/// Reads until the connection ends, for at most `timeout` between two pieces of data.
pub fn end(stream: &TcpStream, timeout: Duration) -> io::Result<End> {
    stream.set_read_timeout(Some(patient(timeout)))?;
    let mut buffer = [0; 4096];
    loop {
        match read(stream, &mut buffer) {
            Ok(0) => return Ok(End::Fin),
            Ok(_) => {}
            Err(error) => match error.kind() {
                io::ErrorKind::ConnectionReset => return Ok(End::Reset),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => return Ok(End::Open),
                _ => return Err(error),
            },
        }
    }
}

/// How a new connection to `address` ends when the client says nothing. A refusal counts as a reset.
pub fn end_of_new(netns: &NetNs, address: SocketAddr, timeout: Duration) -> io::Result<End> {
    match connect(netns, address) {
        Ok(stream) => end(&stream, timeout),
        Err(error) => match error.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Ok(End::Reset),
            _ => Err(error),
        },
    }
}
