//! Read and write: for small messages, and wherever `splice(2)` does not fit.

use std::io;

use rustix::net::SendFlags;
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::receive::receive;

/// Bytes that were read and not yet taken by the other side.
#[derive(Debug)]
pub(super) struct Stash {
    bytes: Box<[u8]>,
    written: usize,
}

impl Stash {
    pub(super) fn new(bytes: &[u8]) -> Self {
        Self { bytes: bytes.into(), written: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.written == self.bytes.len()
    }

    /// Writes what is left, or part of it.
    pub(super) fn write_to(&mut self, destination: &TcpStream) -> io::Result<usize> {
        let written = write(destination, self.bytes.get(self.written..).unwrap_or_default())?;
        self.written += written;
        Ok(written)
    }
}

/// Reads what is there, up to the length of `buffer`; 0 is the end of the stream.
///
/// Where the socket says that this has emptied it, the next edge-triggered event will tell of more: so the readiness is
/// cleared at once, which saves the read that would only say `EAGAIN`. A short read alone does not say so.
pub(super) fn read(source: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut last = None;
    let result = source.try_io(Interest::READABLE, || {
        let received = receive(source, buffer)?;
        if received.bytes > 0 && received.is_empty {
            last = Some(received.bytes);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(received.bytes)
    });
    last.map_or(result, Ok)
}

/// Writes `bytes`, or as many of them as the socket takes.
pub(super) fn write(destination: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    destination.try_io(Interest::WRITABLE, || Ok(rustix::net::send(destination, bytes, SendFlags::NOSIGNAL)?))
}
