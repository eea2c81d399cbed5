//! Performing one end of a conversation.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use socket2::SockRef;

use super::content::{BLOCK, Content};
use super::{Shape, Step};
use crate::client;
use crate::random;
use crate::wait::patient;

/// How long nothing may move when something should.
pub const PATIENCE: Duration = Duration::from_secs(20);
/// How many bytes are enough to find out where they belong.
const TELLING: usize = 32;

/// Which end of a conversation.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// The one that connects.
    Client,
    /// The one that accepts.
    Server,
}

/// Performs one end. The stream's end is the conversation's: a reset takes place when the stream is dropped.
///
/// # Errors
/// What went wrong, during which step, and how long after the start.
pub fn play(stream: &TcpStream, shape: &Shape, role: Role) -> Result<()> {
    let start = Instant::now();
    stream.set_read_timeout(Some(patient(PATIENCE)))?;
    stream.set_write_timeout(Some(patient(PATIENCE)))?;
    stream.set_nodelay(true)?;
    let (steps, ours, theirs) = match role {
        Role::Client => (&shape.client, shape.seed, !shape.seed),
        Role::Server => (&shape.server, !shape.seed, shape.seed),
    };
    let mut player =
        Player { stream, sent: Content::new(ours), received: Content::new(theirs), buffer: vec![0; BLOCK] };
    for (number, step) in steps.iter().enumerate() {
        player.perform(step).with_context(|| {
            format!(
                "{:.3} s after its start, in step {} of {}, {step:?}, with {} bytes sent and {} received",
                start.elapsed().as_secs_f64(),
                number + 1,
                steps.len(),
                player.sent.position(),
                player.received.position()
            )
        })?;
    }
    Ok(())
}

struct Player<'a> {
    stream: &'a TcpStream,
    sent: Content,
    received: Content,
    buffer: Vec<u8>,
}

/// What came of an attempt to move bytes.
enum Attempt {
    Moved(usize),
    Waits,
    Ended,
}

impl Player<'_> {
    fn perform(&mut self, step: &Step) -> Result<()> {
        match *step {
            Step::Move { send, receive } => self.exchange(send, receive),
            Step::Sip { receive, sips, pause } => {
                let parts = usize::try_from(sips)?;
                for part in 0..parts {
                    // Part of the conversation: the other end shall meet a closed window.
                    thread::sleep(pause);
                    let size = receive / parts + if part == 0 { receive % parts } else { 0 };
                    self.exchange(0, size)?;
                }
                Ok(())
            }
            Step::Pause(pause) => {
                thread::sleep(pause);
                Ok(())
            }
            Step::End => {
                let mut stream = self.stream;
                stream.write_all(&self.sent.digest()).context("send the digest")?;
                stream.shutdown(Shutdown::Write).context("end")
            }
            Step::AwaitEnd => self.await_end(),
            Step::Reset => Ok(SockRef::from(self.stream).set_linger(Some(Duration::ZERO))?),
            Step::AwaitReset { send, receive } => self.await_reset(send, receive),
        }
    }

    fn exchange(&mut self, mut send: usize, mut receive: usize) -> Result<()> {
        while send > 0 || receive > 0 {
            let mut moved = false;
            if send > 0 {
                match self.send(send).context("send")? {
                    Attempt::Moved(size) => (send, moved) = (send - size, true),
                    Attempt::Waits | Attempt::Ended => {}
                }
            }
            if receive > 0 {
                match self.receive(receive).context("receive")? {
                    Attempt::Moved(size) => (receive, moved) = (receive - size, true),
                    Attempt::Waits => {}
                    Attempt::Ended => bail!("a clean end while {receive} bytes were to come"),
                }
            }
            if !moved {
                self.wait(send > 0, receive > 0).with_context(|| {
                    format!("{send} bytes were still to be sent and {receive} to be received")
                })?;
            }
        }
        Ok(())
    }

    fn await_end(&mut self) -> Result<()> {
        let mut stream = self.stream;
        let mut digest = [0; 32];
        stream.read_exact(&mut digest).context("receive the digest")?;
        let own = self.received.digest();
        let hex = random::hex;
        ensure!(digest == own, "the SHA-256 are {} there and {} here", hex(digest), hex(own));
        let more = client::read(stream, &mut self.buffer).context("wait for the end")?;
        ensure!(more == 0, "{more} bytes more than were sent");
        Ok(())
    }

    fn await_reset(&mut self, mut send: usize, receive: usize) -> Result<()> {
        let most = self.received.position() + receive;
        loop {
            let mut moved = false;
            if send > 0 {
                match self.send(send) {
                    Ok(Attempt::Moved(size)) => (send, moved) = (send - size, true),
                    Ok(Attempt::Waits | Attempt::Ended) => {}
                    Err(error) => return was_reset(error),
                }
            }
            match self.receive(BLOCK) {
                Ok(Attempt::Moved(_)) => moved = true,
                Ok(Attempt::Waits) => {}
                Ok(Attempt::Ended) => bail!("a clean end where a reset was due"),
                Err(error) => return was_reset(error),
            }
            ensure!(self.received.position() <= most, "more than the {most} bytes that were sent");
            if !moved {
                self.wait(send > 0, true).context("a reset was due")?;
            }
        }
    }

    fn send(&mut self, most: usize) -> Result<Attempt> {
        let bytes = self.sent.next(most);
        match send(self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(size) => {
                self.sent.advance(&bytes[..size]);
                Ok(Attempt::Moved(size))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Attempt::Waits),
            Err(error) => Err(error.into()),
        }
    }

    fn receive(&mut self, most: usize) -> Result<Attempt> {
        let most = most.min(BLOCK);
        match recv(self.stream, &mut self.buffer[..most], RecvFlags::DONTWAIT) {
            Ok((0, _)) => Ok(Attempt::Ended),
            Ok((size, _)) => {
                let bytes = &self.buffer[..size];
                if let Some(good) = self.received.differs(bytes) {
                    let at = self.received.position() + good;
                    let strange = &bytes[good..size.min(good + TELLING)];
                    match self.received.whereabouts(strange) {
                        Some(place) => bail!("at byte {at} comes what belongs at byte {place}"),
                        None => bail!("at byte {at} comes what was never sent: {strange:02x?}"),
                    }
                }
                self.received.advance(bytes);
                Ok(Attempt::Moved(size))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(Attempt::Waits),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until something can move.
    fn wait(&self, to_send: bool, to_receive: bool) -> Result<()> {
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::OUT, to_send);
        flags.set(PollFlags::IN, to_receive);
        let timeout = Timespec::try_from(patient(PATIENCE))?;
        let ready = retry_on_intr(|| poll(&mut [PollFd::new(self.stream, flags)], Some(&timeout)))?;
        ensure!(ready > 0, "nothing moved for {PATIENCE:?}; {}", self.socket());
        Ok(())
    }

    /// What the kernel knows of this end's socket: what has not been acknowledged, and what it waits for to send that again.
    fn socket(&self) -> String {
        let Ok(local) = self.stream.local_addr() else { return "its socket has no address".to_owned() };
        let mut command = Command::new("ss");
        command.args(["-tinoHO", "sport", &format!("= :{}", local.port())]);
        let shown = command.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        shown.unwrap_or_else(|error| format!("ss: {error}"))
    }
}

/// Whether an error is what a reset looks like.
fn was_reset(error: anyhow::Error) -> Result<()> {
    match error.downcast_ref::<Errno>() {
        // A send after a reset that a receive has already shown yields the latter.
        Some(&Errno::CONNRESET | &Errno::PIPE) => Ok(()),
        Some(_) | None => Err(error.context("no reset")),
    }
}
