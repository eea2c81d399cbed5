//! What the tests' clients do on a connection.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use socket2::SockRef;

use crate::netns::NetNs;
pub use crate::stream::{End, TIMEOUT, end, read};
use crate::wait::patient;
use crate::{peer, random};

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
        ensure!(read(reader, &mut [0])? == 0, "more data than was sent");
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
