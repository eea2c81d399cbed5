//! The timestamp clock of a socket (RFC 7323), told to the tick: what is redirected must not look older than what the socket
//! itself says (PAWS), nor newer.
//!
//! It is `CLOCK_MONOTONIC` in whole milliseconds (`tcp_clock_ms`) and an offset of the connection's own. Since Linux 6.7
//! `getsockopt(TCP_TIMESTAMP)` clears the lowest bit (`do_tcp_getsockopt`), which then says whether the clock is one of
//! microseconds. So one reading leaves two offsets possible, and a second one, an odd number of ticks away, one.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use forwarder_common::translate::NANOSECONDS_PER_TICK;

use crate::clock::monotonic;
use crate::fallback_reason::FallbackReason;
use crate::tcp::tcp_info::{Info, get};

/// How often a reading within one tick is tried for.
const ATTEMPTS: usize = 64;
/// Bits of `tcpi_options`: `TCPI_OPT_TIMESTAMPS`, and `TCPI_OPT_USEC_TS` of routes with the feature `tcp_usec_ts`.
const OPTION_TIMESTAMPS: u8 = 1;
const OPTION_MICROSECONDS: u8 = 64;

/// Whether this kernel tells every bit: an odd value was seen.
static TELLS_EVERY_BIT: AtomicBool = AtomicBool::new(false);

/// The tick that `time`, of `CLOCK_MONOTONIC` in nanoseconds, lies in.
#[expect(clippy::cast_possible_truncation, reason = "clocks wrap")]
pub(super) const fn tick(time: u64) -> u32 {
    (time / NANOSECONDS_PER_TICK) as u32
}

/// What is known of a socket's clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Clock {
    first: Option<Reading>,
    /// What the clock is ahead of [`tick`].
    offset: Option<u32>,
}

/// What a socket has told at a tick.
#[derive(Clone, Copy, Debug)]
struct Reading {
    tick: u32,
    value: u32,
}

impl Clock {
    /// What the clock is ahead of `CLOCK_MONOTONIC` in milliseconds, once it is known.
    pub fn offset(&self) -> Option<u32> {
        self.offset
    }

    /// Reads the clock unless it is known; whether it is. It is after readings of ticks of which one is odd, one even.
    ///
    /// # Errors
    /// The clock cannot be read, or is not one of milliseconds.
    pub fn learn(&mut self, socket: impl AsFd) -> Result<bool, FallbackReason> {
        if self.offset.is_some() {
            return Ok(true);
        }
        let fd = socket.as_fd().as_raw_fd();
        if self.first.is_none() {
            let options = Info::read(fd).map_err(|_| FallbackReason::Unreadable)?.options;
            if options & OPTION_MICROSECONDS != 0 {
                return Err(FallbackReason::MicrosecondClock);
            }
            if options & OPTION_TIMESTAMPS == 0 {
                // Nobody asks what it says.
                self.offset = Some(0);
                return Ok(true);
            }
        }
        let reading = Reading::of(fd).map_err(|_| FallbackReason::Unreadable)?;
        let first = *self.first.get_or_insert(reading);
        self.offset = offset(first, reading, TELLS_EVERY_BIT.load(Ordering::Relaxed));
        if reading.value % 2 == 1 {
            TELLS_EVERY_BIT.store(true, Ordering::Relaxed);
        }
        Ok(self.offset.is_some())
    }
}

/// Waits until the clock of a socket is known: some milliseconds at most.
#[cfg(test)]
pub(crate) fn wait(socket: impl AsFd) -> u32 {
    let mut clock = Clock::default();
    while !clock.learn(&socket).expect("a clock of milliseconds") {
        std::thread::yield_now();
    }
    clock.offset.expect("it is known")
}

impl Reading {
    fn of(fd: libc::c_int) -> io::Result<Self> {
        for _ in 0..ATTEMPTS {
            let before = tick(monotonic());
            let value = get(fd, libc::TCP_TIMESTAMP)?;
            if tick(monotonic()) == before {
                return Ok(Self { tick: before, value });
            }
        }
        Err(io::Error::new(io::ErrorKind::WouldBlock, "the clock cannot be read within a millisecond"))
    }
}

/// What the clock is ahead of the ticks, as two readings tell; `None` where they leave two answers.
fn offset(first: Reading, second: Reading, tells_every_bit: bool) -> Option<u32> {
    if tells_every_bit || second.value % 2 == 1 {
        return Some(second.value.wrapping_sub(second.tick));
    }
    if second.tick.wrapping_sub(first.tick).is_multiple_of(2) {
        return None;
    }
    let least = first.value.wrapping_sub(first.tick);
    [least, least.wrapping_add(1)]
        .into_iter()
        .find(|offset| second.tick.wrapping_add(*offset) & !1 == second.value)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener, TcpStream};
    use std::time::Duration;

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;

    #[test]
    fn two_readings_an_odd_number_of_ticks_apart_tell_the_lowest_bit() {
        for true_offset in [0, 1, 6, 7, u32::MAX - 4, u32::MAX] {
            for tick in [10, 11, u32::MAX - 1, u32::MAX] {
                let at = |tick: u32| Reading { tick, value: tick.wrapping_add(true_offset) & !1 };
                for apart in [1, 3, 1001] {
                    let found = offset(at(tick), at(tick.wrapping_add(apart)), false);
                    assert_eq!(found, Some(true_offset), "tick {tick}, {apart} apart");
                }
                assert_eq!(offset(at(tick), at(tick.wrapping_add(2)), false), None);
                assert_eq!(offset(at(tick), at(tick), false), None);
            }
        }
    }

    #[test]
    fn one_reading_is_enough_where_every_bit_is_told() {
        let at = |tick: u32, offset: u32| Reading { tick, value: tick.wrapping_add(offset) };
        assert_eq!(offset(at(4, 7), at(4, 7), false), Some(7));
        assert_eq!(offset(at(4, 8), at(4, 8), true), Some(8));
    }

    /// `TSval` of the segment from `port` with this payload, as a raw socket sees it.
    fn value_on_the_wire(raw: &mut Socket, port: u16, payload: u8) -> u32 {
        let mut packet = [0; 2048];
        loop {
            let length = raw.read(&mut packet).expect("the segment arrives over loopback");
            let tcp = &packet[usize::from(packet[0] & 15) * 4..length];
            let (header, data) = tcp.split_at(usize::from(tcp[12] >> 4) * 4);
            if header[..2] == port.to_be_bytes() && data == [payload] {
                // Two NOPs come first (`tcp_options_write`).
                assert_eq!(header[20..24], [1, 1, 8, 10]);
                return u32::from_be_bytes([header[24], header[25], header[26], header[27]]);
            }
        }
    }

    #[test]
    fn the_clock_is_the_one_on_the_wire() {
        let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP));
        if raw().is_err() {
            println!("skipped: no raw sockets");
            return;
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        // As many as make it improbable that only one parity was met: the offset is one of each two addresses and ports.
        for connection in 0..16_u8 {
            let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            stream.set_nodelay(true).unwrap();
            let _accepted = listener.accept().unwrap();
            let port = stream.local_addr().unwrap().port();
            let offset = wait(&stream);
            let mut compared = 0;
            for payload in 0..=u8::MAX {
                let mut raw = raw().unwrap();
                raw.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                let before = tick(monotonic());
                stream.write_all(&[payload]).unwrap();
                let after = tick(monotonic());
                let value = value_on_the_wire(&mut raw, port, payload);
                if before == after {
                    assert_eq!(value, before.wrapping_add(offset), "connection {connection}");
                    compared += 1;
                }
                if compared == 3 {
                    break;
                }
            }
            assert_eq!(compared, 3, "no segment was sent within a tick");
        }
    }
}
