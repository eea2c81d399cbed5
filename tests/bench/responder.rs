//! The server behind the paths: one thread that answers every request alike, as fast as it can.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};

/// A request of 64 bytes. Any other that ends in an empty line is answered too.
pub(crate) const REQUEST: &[u8; 64] =
    b"GET /bench HTTP/1.1\r\nHost: responder\r\nX-Padding: 0123456789a\r\n\r\n";
/// What answers every request.
pub(crate) const ANSWER: &[u8] =
    b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 16\r\n\r\n0123456789abcde\n";

const LISTENER: u64 = u64::MAX;
const BACKLOG: i32 = 4096;
const END_OF_REQUEST: u32 = u32::from_be_bytes(*b"\r\n\r\n");
/// How soon an idle server notices that whoever started it is gone.
const LOOK_FOR_PARENT: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

struct Connection {
    socket: OwnedFd,
    /// The last four bytes, since a request may come in pieces.
    tail: u32,
}

/// Listens on `address` and answers, until the process that started this one ends.
pub(crate) fn serve(address: SocketAddr) -> Result<()> {
    let parent = rustix::process::getppid();
    forwarder_tests::swarm::raise_descriptor_limit()?;
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    listener.set_nonblocking(true)?;
    // A second call only changes the length of the queue.
    rustix::net::listen(&listener, BACKLOG)?;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
    let mut connections: Vec<Option<Connection>> = Vec::new();
    let mut events = Vec::with_capacity(512);
    while rustix::process::getppid() == parent {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&LOOK_FOR_PARENT)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for connections and requests"),
        }
        for event in &events {
            if event.data.u64() == LISTENER {
                accept(&listener, &epoll, &mut connections).context("accepting connections")?;
            } else if let Ok(index) = usize::try_from(event.data.u64())
                && let Some(slot) = connections.get_mut(index)
                && slot.as_mut().is_some_and(|connection| !answer(connection))
            {
                *slot = None;
            }
        }
    }
    Ok(())
}

/// Accepts what waits, and answers at once whoever has sent its request already.
fn accept(listener: &TcpListener, epoll: &OwnedFd, connections: &mut Vec<Option<Connection>>) -> Result<()> {
    loop {
        match rustix::net::accept_with(listener, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC) {
            Ok(socket) => {
                let mut connection = Connection { socket, tail: 0 };
                if !answer(&mut connection) {
                    continue;
                }
                let descriptor = connection.socket.as_raw_fd().unsigned_abs();
                let index = usize::try_from(descriptor)?;
                let data = epoll::EventData::new_u64(descriptor.into());
                epoll::add(epoll, connection.socket.as_fd(), data, epoll::EventFlags::IN)?;
                if connections.len() <= index {
                    connections.resize_with(index + 1, || None);
                }
                if let Some(slot) = connections.get_mut(index) {
                    *slot = Some(connection);
                }
            }
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads what is there and answers it; whether the connection goes on.
fn answer(connection: &mut Connection) -> bool {
    let mut buffer = [0; 4096];
    match rustix::net::recv(&connection.socket, &mut buffer, RecvFlags::empty()) {
        Ok((_, 0)) => false,
        Ok((_, length)) => {
            let requests = count_requests(&mut connection.tail, &buffer[..length]);
            (0..requests).all(|_| {
                // Answers are small: one that does not fit means a client that does not read.
                rustix::net::send(&connection.socket, ANSWER, SendFlags::NOSIGNAL) == Ok(ANSWER.len())
            })
        }
        Err(Errno::AGAIN | Errno::INTR) => true,
        Err(_) => false,
    }
}

/// How many requests end in `bytes`.
fn count_requests(tail: &mut u32, bytes: &[u8]) -> usize {
    let mut requests = 0;
    for &byte in bytes {
        *tail = *tail << 8 | u32::from(byte);
        requests += usize::from(*tail == END_OF_REQUEST);
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_whole_in_pieces_and_several_at_once() {
        let mut tail = 0;
        assert_eq!(count_requests(&mut tail, REQUEST), 1);
        assert_eq!(count_requests(&mut tail, &REQUEST[..61]), 0);
        assert_eq!(count_requests(&mut tail, &REQUEST[61..]), 1);
        assert_eq!(count_requests(&mut tail, &[REQUEST.as_slice(), REQUEST].concat()), 2);
    }

    #[test]
    fn the_answer_says_its_length() {
        let text = std::str::from_utf8(ANSWER).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        assert!(head.ends_with(&format!("Content-Length: {}", body.len())));
    }
}
