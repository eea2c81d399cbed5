//! The load generators that no program offers as we need them: short connections, and connections that stay.
//!
//! They share the machine with what they measure, so a short connection costs them four system calls: `connect`, `send`,
//! `recv`, and a `connect` to nowhere. The last resets the connection as a close with linger 0 does, and keeps the socket,
//! with its options and its place in epoll, for the next.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::socket::sockopt::IpBindAddressNoPort;
use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};

use crate::machine;
use crate::responder::{ANSWER, REQUEST};

/// How many connections are open at a time.
const CONCURRENCY: usize = 64;
/// How long nothing may complete before the measurement has failed.
const STALL: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
const TIMEOUT: Duration = Duration::from_secs(10);

/// What a load did.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    pub(crate) connections: f64,
    pub(crate) seconds: f64,
    /// Processor time of the whole machine.
    pub(crate) busy_seconds: f64,
}

#[derive(Clone, Copy, Debug)]
enum Stage {
    Connecting,
    /// The request has been sent; so many bytes of the answer have come.
    Waiting(usize),
}

struct Slot {
    socket: OwnedFd,
    stage: Stage,
    /// How many connections since the warm-up.
    served: u32,
}

/// Opens connections from `sources` to `target`, sends a request on each, reads the answer and resets it; counts for `time`
/// after `warm_up`. Any connection that fails fails the measurement.
pub(crate) fn short_connections(
    target: SocketAddr,
    sources: &[Ipv4Addr],
    warm_up: Duration,
    time: Duration,
) -> Result<Rate> {
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let mut slots = Vec::with_capacity(CONCURRENCY);
    for (number, source) in (0_u64..).zip(sources.iter().cycle().take(CONCURRENCY)) {
        let slot = Slot { socket: socket(*source)?, stage: Stage::Connecting, served: 0 };
        let interest = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        connect(&slot.socket, target)?;
        epoll::add(&epoll, slot.socket.as_fd(), epoll::EventData::new_u64(number), interest)?;
        slots.push(slot);
    }
    let mut events = Vec::with_capacity(CONCURRENCY);
    let mut completed = 0.0;
    let mut start = Instant::now();
    let mut busy_before = None;
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), Some(&STALL)) {
            Ok(0) => bail!("nothing came from {target} for {} s", STALL.tv_sec),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("waiting for connections"),
        }
        for event in &events {
            let slot = usize::try_from(event.data.u64()).ok().and_then(|number| slots.get_mut(number));
            let slot = slot.context("an event of an unknown socket")?;
            if advance(slot, target).with_context(|| format!("connection {completed} to {target}"))? {
                completed += 1.0;
            }
        }
        match busy_before {
            None if start.elapsed() >= warm_up => {
                busy_before = Some(machine::busy_seconds()?);
                completed = 0.0;
                for slot in &mut slots {
                    slot.served = 0;
                }
                start = Instant::now();
            }
            Some(before) if start.elapsed() >= time => {
                let seconds = start.elapsed().as_secs_f64();
                let busy_seconds = machine::busy_seconds()? - before;
                // The others would hide it.
                let still = slots.iter().filter(|slot| slot.served == 0).count();
                ensure!(still == 0, "{still} of {CONCURRENCY} connections were not served in {seconds:.1} s");
                return Ok(Rate { connections: completed, seconds, busy_seconds });
            }
            _ => {}
        }
    }
}

/// Opens `count` connections to `target`, exchanges one small message on each, and keeps them.
pub(crate) fn idle_connections(target: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let open = || -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&target, TIMEOUT)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.write_all(REQUEST)?;
        stream.read_exact(&mut [0; ANSWER.len()])?;
        Ok(stream)
    };
    (0..count).map(|number| open().with_context(|| format!("idle connection {number} to {target}"))).collect()
}

/// Goes on with one connection; whether it has been served, in which case the next one has begun.
fn advance(slot: &mut Slot, target: SocketAddr) -> Result<bool> {
    match slot.stage {
        Stage::Connecting => match rustix::net::send(&slot.socket, REQUEST, SendFlags::NOSIGNAL) {
            Ok(length) => {
                ensure!(length == REQUEST.len(), "only {length} bytes of the request were taken");
                slot.stage = Stage::Waiting(0);
            }
            // An event of the connection before.
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => return Err(error).context("connecting, or sending the request"),
        },
        Stage::Waiting(mut received) => loop {
            let mut buffer = [0; 2 * ANSWER.len()];
            match rustix::net::recv(&slot.socket, &mut buffer, RecvFlags::empty()) {
                Ok((_, 0)) => bail!("closed after {received} bytes of the answer"),
                Ok((_, length)) => received += length,
                Err(Errno::AGAIN | Errno::INTR) => {
                    slot.stage = Stage::Waiting(received);
                    return Ok(false);
                }
                Err(error) => return Err(error).context("reading the answer"),
            }
            if received >= ANSWER.len() {
                ensure!(received == ANSWER.len(), "{received} bytes of answer");
                rustix::net::connect_unspec(&slot.socket).context("resetting a connection")?;
                connect(&slot.socket, target)?;
                slot.stage = Stage::Connecting;
                slot.served += 1;
                return Ok(true);
            }
            // An end that came together with these bytes brings no event of its own.
        },
    }
    Ok(false)
}

fn socket(source: Ipv4Addr) -> Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket =
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // The port is chosen at connect, by the whole 4-tuple, instead of being taken for every destination at bind.
    nix::sys::socket::setsockopt(&socket, IpBindAddressNoPort, &true)?;
    let address = SocketAddrV4::new(source, 0);
    rustix::net::bind(&socket, &address).with_context(|| format!("binding to {source}"))?;
    Ok(socket)
}

fn connect(socket: &OwnedFd, target: SocketAddr) -> Result<()> {
    match rustix::net::connect(socket, &target) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("connecting to {target}")),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn a_refused_connection_fails_the_measurement() {
        let target = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let second = Duration::from_secs(1);
        let error = short_connections(target, &[Ipv4Addr::LOCALHOST], second, second).unwrap_err();
        assert!(format!("{error:#}").contains("Connection refused"), "{error:#}");
    }

    #[test]
    fn an_answer_cut_short_fails_the_measurement() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; REQUEST.len()]).unwrap();
            stream.write_all(&ANSWER[..10]).unwrap();
            drop(stream);
            // The others stay in the queue.
            thread::sleep(TIMEOUT);
        });
        let second = Duration::from_secs(1);
        let error = short_connections(target, &[Ipv4Addr::LOCALHOST], second, second).unwrap_err();
        assert!(format!("{error:#}").contains("10 bytes of the answer"), "{error:#}");
    }
}
