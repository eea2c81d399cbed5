//! What both ends of a connection do with its socket.

use std::io::{self, Read as _};
use std::net::TcpStream;
use std::time::Duration;

use crate::wait::patient;

/// How long a read or a write may wait.
pub const TIMEOUT: Duration = Duration::from_secs(30);

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
