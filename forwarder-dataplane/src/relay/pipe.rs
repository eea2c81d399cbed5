//! `splice(2)` through a pipe, and the worker's pool of pipes.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_getpipe_size, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::Fallback;

/// The capacity that is asked for each pipe, in bytes.
const PIPE_SIZE: usize = 512 << 10;
/// A smaller pipe than this is not worth its system calls. The kernel gives less where the user's share of pipe memory
/// (`/proc/sys/fs/pipe-user-pages-soft`) is used up.
const SMALLEST_PIPE: usize = 64 << 10;
/// How many empty pipes a worker keeps.
const IDLE_PIPES: usize = 16;
/// How many pipes a worker has at most: what stalled receivers can pin in kernel memory is this times [`PIPE_SIZE`].
const MOST_PIPES: usize = 256;

/// A pipe and how many bytes stand in it.
#[derive(Debug)]
pub(super) struct LoadedPipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    length: usize,
    /// Counts the pipes of the pool that exist, wherever they are dropped.
    _count: Rc<()>,
}

impl LoadedPipe {
    fn open(count: Rc<()>) -> Result<Self, Fallback> {
        let flags = PipeFlags::CLOEXEC | PipeFlags::NONBLOCK;
        let (read, write) = pipe_with(flags).map_err(|_| Fallback::NoPipe)?;
        // A refusal (EPERM: above the user's share) leaves the default size, which may still be large enough.
        let _ = fcntl_setpipe_size(&write, PIPE_SIZE);
        let capacity = fcntl_getpipe_size(&write).map_err(|_| Fallback::NoPipe)?;
        if capacity < SMALLEST_PIPE {
            return Err(Fallback::NoPipe);
        }
        Ok(Self { read, write, capacity, length: 0, _count: count })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Moves what `source` holds into this empty pipe; 0 is the end of the stream, or urgent data that has to be read: in
    /// front of it the kernel says the one or the other, or `EAGAIN` (`__tcp_read_sock`, `tcp_splice_read`).
    pub(super) fn fill_from(mut self, source: &TcpStream) -> Result<(usize, Self), (io::Error, Self)> {
        let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
        let filled = source.try_io(Interest::READABLE, || {
            match splice(source, None, &self.write, None, self.capacity, flags) {
                // The pipe is empty, so that it is the socket that yields nothing.
                Err(Errno::AGAIN) if rustix::io::ioctl_fionread(source)? > 0 => Ok(0),
                spliced => Ok(spliced?),
            }
        });
        match filled {
            Ok(filled) => {
                self.length = filled;
                Ok((filled, self))
            }
            Err(error) => Err((error, self)),
        }
    }

    /// Moves what stands in the pipe, or part of it, to `destination`.
    pub(super) fn drain_to(&mut self, destination: &TcpStream) -> io::Result<usize> {
        let drained = destination.try_io(Interest::WRITABLE, || {
            Ok(splice(
                &self.read,
                None,
                destination,
                None,
                self.length,
                SpliceFlags::MOVE | SpliceFlags::NONBLOCK,
            )?)
        })?;
        if drained == 0 {
            // The pipe holds `length` bytes, so an end of file would mean that some of them are gone.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.length -= drained;
        Ok(drained)
    }
}

/// The pipes of one worker. A connection holds one only while bytes stand in it.
#[derive(Debug, Default)]
pub struct PipePool {
    idle: Vec<LoadedPipe>,
    count: Rc<()>,
}

impl PipePool {
    pub(super) fn take(&mut self) -> Result<LoadedPipe, Fallback> {
        match self.idle.pop() {
            Some(pipe) => Ok(pipe),
            None if Rc::strong_count(&self.count) > MOST_PIPES => Err(Fallback::PipesInUse),
            None => LoadedPipe::open(Rc::clone(&self.count)),
        }
    }

    pub(super) fn put(&mut self, pipe: LoadedPipe) {
        if pipe.is_empty() && self.idle.len() < IDLE_PIPES {
            self.idle.push(pipe);
        }
    }
}

/// Moves `length` bytes from one blocking socket to another through a pipe; returns the pipe's capacity.
pub(super) fn probe(
    source: &std::net::TcpStream,
    destination: &std::net::TcpStream,
    length: usize,
) -> io::Result<usize> {
    let pipe = LoadedPipe::open(Rc::default()).map_err(|_| {
        io::Error::other("no pipe of a useful size could be made (limit on open files or pipe memory)")
    })?;
    let filled = splice(source, None, &pipe.write, None, length, SpliceFlags::MOVE)?;
    splice(&pipe.read, None, destination, None, filled, SpliceFlags::MOVE)?;
    Ok(pipe.capacity)
}
