//! An echo server for thousands of connections: one thread, one epoll.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result};
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::netns::NetNs;

/// How soon a stopped server notices.
const STOP_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Echoes small messages on any number of connections. Stopped when dropped.
#[derive(Debug)]
pub struct Swarm {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Swarm {
    /// Listens on `address` in `netns`.
    pub fn start(netns: &NetNs, address: SocketAddr) -> Result<Self> {
        let listener = netns.bind(address).with_context(|| format!("listen on {address}"))?;
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::Builder::new()
            .name("swarm".to_owned())
            .spawn(move || serve(&listener, &stopped).expect("epoll works"))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic in the thread has been printed already.
            let _ = thread.join();
        }
    }
}

fn serve(listener: &TcpListener, stop: &AtomicBool) -> io::Result<()> {
    const LISTENER: u64 = u64::MAX;
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, listener, epoll::EventData::new_u64(LISTENER), epoll::EventFlags::IN)?;
    let mut streams: HashMap<u64, TcpStream> = HashMap::new();
    let mut events = Vec::with_capacity(1024);
    while !stop.load(Ordering::Relaxed) {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&STOP_INTERVAL)) {
            // A signal to the process, such as that a child has ended or was stopped.
            Err(Errno::INTR) => continue,
            result => result?,
        };
        for event in &events {
            match event.data.u64() {
                LISTENER => {
                    while let Ok((stream, _)) = listener.accept() {
                        stream.set_nonblocking(true)?;
                        let key = stream.as_raw_fd().unsigned_abs().into();
                        epoll::add(
                            &epoll,
                            stream.as_fd(),
                            epoll::EventData::new_u64(key),
                            epoll::EventFlags::IN,
                        )?;
                        streams.insert(key, stream);
                    }
                }
                key => {
                    if streams.get(&key).is_some_and(|stream| !echo_once(stream)) {
                        streams.remove(&key);
                    }
                }
            }
        }
    }
    Ok(())
}

/// Echoes what is there; whether the connection goes on. Messages are small, so that a write never waits.
fn echo_once(mut stream: &TcpStream) -> bool {
    let mut buffer = [0; 4096];
    match stream.read(&mut buffer) {
        Ok(0) => {
            // The client may have reset the connection meanwhile.
            let _ = stream.shutdown(Shutdown::Write);
            false
        }
        Ok(size) => stream.write_all(&buffer[..size]).is_ok(),
        Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
    }
}

/// Lets this process open as many files as it may; returns how many.
pub fn raise_descriptor_limit() -> Result<u64> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    Ok(limit.maximum.unwrap_or(u64::MAX))
}
