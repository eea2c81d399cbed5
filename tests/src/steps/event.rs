//! What an end of a connection does, and what has to come of it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use super::net::Net;
use super::talk::{Conversation, Seen};
use super::{Cell, Fate, Side, raw};
use crate::sequence;
use crate::wire::Trouble;

/// How long after the agent goes on an event may take to have its effect.
const EFFECT: Duration = Duration::from_secs(1);
/// How long it is waited for what is late.
const LATE: Duration = Duration::from_secs(4);
/// How long a packet takes to the agent at most.
const TRAVEL: Duration = Duration::from_millis(300);
/// One packet of data.
const SMALL: usize = 700;
/// More than the hosts' windows and buffers hold.
const LARGE: usize = 256 << 10;

/// What one end does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Event {
    /// It sends one packet.
    Data,
    /// It sends more than the other end, which does not read, has room for.
    Flood,
    /// It ends its direction.
    Fin,
    /// It ends its direction, and the other end sends.
    HalfClose,
    /// It resets the connection.
    Reset,
    /// Its process dies: its socket is closed with bytes that nobody has read.
    Death,
    /// It does not read, and the other end fills its window; then it sends.
    ZeroWindow,
    /// It probes the other end, as for keepalive or for a closed window.
    Probe,
    /// What it sends is lost, and sent again.
    Retransmission,
    /// Somebody sends a SYN of its tuple.
    Syn,
    /// Its host says that it cannot be reached.
    Unreachable,
}

impl Event {
    /// Every one.
    pub const ALL: [Self; 11] = [
        Self::Data,
        Self::Flood,
        Self::Fin,
        Self::HalfClose,
        Self::Reset,
        Self::Death,
        Self::ZeroWindow,
        Self::Probe,
        Self::Retransmission,
        Self::Syn,
        Self::Unreachable,
    ];

    /// Whether the connection ends by it, whatever was on its way.
    fn is_reset(self) -> bool {
        matches!(self, Self::Reset | Self::Death)
    }
}

/// An event that has been played.
pub(super) struct Played {
    cell: Cell,
    /// How many segments the acting end had received before.
    segments: u32,
}

/// Plays an event, and waits until its packet has come to the agent.
pub(super) fn play(cell: Cell, conversation: &mut Conversation, net: &Net) -> Result<Played> {
    let side = cell.side;
    let wire = net.wire(side);
    let carried = wire.done().seen;
    let segments = match &conversation.at(side).stream {
        Some(stream) => sequence::received_segments(stream)?,
        None => 0,
    };
    match cell.event {
        Event::Data => conversation.at(side).target += SMALL,
        Event::Flood => {
            conversation.at(side.other()).reads = false;
            conversation.at(side).target += LARGE;
        }
        Event::Fin => conversation.at(side).finish(),
        Event::HalfClose => {
            conversation.at(side).finish();
            conversation.at(side.other()).target += SMALL;
        }
        Event::Reset => conversation.at(side).reset()?,
        Event::Death => {
            conversation.at(side).reads = false;
            conversation.at(side.other()).target += SMALL;
            conversation.pump();
            // Where they do not arrive, the end dies all the same.
            conversation.until(TRAVEL / 10, |conversation| {
                let stream = conversation.at(side).stream.as_ref();
                stream.is_some_and(|stream| rustix::io::ioctl_fionread(stream).is_ok_and(|left| left > 0))
            });
            conversation.at(side).stream = None;
        }
        Event::ZeroWindow => {
            conversation.at(side).reads = false;
            conversation.at(side.other()).target += LARGE;
        }
        Event::Probe => {
            sequence::probe(conversation.at(side).stream.as_ref().context("a closed end probes nobody")?)?;
        }
        Event::Retransmission => {
            let lost = wire.done().lost;
            wire.set(Trouble::OUTAGE);
            conversation.at(side).target += SMALL;
            let is_lost = conversation.until(TRAVEL, |_| wire.done().lost > lost);
            wire.set(Trouble::default());
            ensure!(is_lost, "nothing was sent that could be lost");
            return Ok(Played { cell, segments });
        }
        Event::Syn | Event::Unreachable => {
            let stream = conversation.at(side).stream.as_ref().context("a closed end sends nothing")?;
            let host = net.host(side);
            match cell.event {
                Event::Syn => host.run(|| raw::send_syn(stream))?,
                _ => host.run(|| raw::send_unreachable(stream))?,
            }
        }
    }
    // An end that was closed by the event, or whose peer has no room, may have nothing to send.
    conversation.until(TRAVEL / 10, |_| wire.done().seen > carried);
    Ok(Played { cell, segments })
}

/// Asserts that an event has the effect that it should, once the agent has gone on, and that nothing is lost.
pub(super) fn evaluate(played: &Played, conversation: &mut Conversation) -> Result<()> {
    let Cell { event, side, .. } = played.cell;
    let other = side.other();
    // Whoever does not read is to hear of a reset nevertheless.
    if !event.is_reset() {
        conversation.at(other).reads = true;
    }
    match event {
        Event::Data | Event::Flood | Event::Retransmission => {
            expect(conversation, "what was sent arrives", |both| both.has_all(other))?;
        }
        Event::Fin | Event::HalfClose => {
            expect(conversation, "the end is seen after all bytes", |both| {
                both.at(other).seen == Seen::Fin && both.has_all(other)
            })?;
            // Bytes of the other direction are its own.
            conversation.at(side).reads = true;
            if event == Event::HalfClose {
                expect(conversation, "the other direction goes on", |both| both.has_all(side))?;
            }
        }
        Event::Reset => {
            expect(conversation, "the reset is seen", |both| both.at(other).seen == Seen::Reset)?;
        }
        Event::Death => {
            // A socket that was closed without unread bytes resets at the next ones.
            conversation.at(other).target += SMALL;
            expect(conversation, "the death is seen", |both| both.at(other).seen == Seen::Reset)?;
        }
        Event::ZeroWindow => {
            conversation.at(side).target += SMALL;
            expect(conversation, "an end that does not read is heard", |both| both.has_all(other))?;
            conversation.at(side).reads = true;
            expect(conversation, "it receives everything once it reads", |both| both.has_all(side))?;
        }
        Event::Probe => expect(conversation, "the probe is answered", |both| {
            let stream = both.at(side).stream.as_ref();
            let segments = stream.and_then(|stream| sequence::received_segments(stream).ok());
            segments.is_some_and(|segments| segments > played.segments)
        })?,
        Event::Syn | Event::Unreachable => {}
    }
    if !event.is_reset() {
        finish(conversation).context("afterwards")?;
    }
    match conversation.fault() {
        None => Ok(()),
        Some(fault) => bail!("{fault}"),
    }
}

/// Asserts that a connection is over at both ends that are still there.
pub(super) fn evaluate_end(fate: Fate, conversation: &mut Conversation) -> Result<()> {
    let is_over = |seen| if fate == Fate::IsReset { seen == Seen::Reset } else { seen != Seen::Open };
    for side in Side::BOTH {
        conversation.at(side).reads = true;
    }
    expect(conversation, "both ends see that it is over", |both| {
        Side::BOTH.into_iter().all(|side| {
            let end = both.at(side);
            end.stream.is_none() || is_over(end.seen)
        })
    })
}

/// Converses to the end of both directions.
pub(super) fn finish(conversation: &mut Conversation) -> Result<()> {
    const MORE: usize = 20_000;
    for side in Side::BOTH {
        let end = conversation.at(side);
        end.reads = true;
        if !end.has_finished {
            end.target += MORE;
        }
    }
    expect(conversation, "both ends receive everything", |both| {
        Side::BOTH.into_iter().all(|side| both.has_all(side))
    })?;
    for side in Side::BOTH {
        conversation.at(side).finish();
    }
    expect(conversation, "both ends see the other's end", |both| {
        Side::BOTH.into_iter().all(|side| both.at(side).seen == Seen::Fin)
    })
}

fn expect(
    conversation: &mut Conversation,
    what: &str,
    mut condition: impl FnMut(&mut Conversation) -> bool,
) -> Result<()> {
    let started = Instant::now();
    if conversation.until(EFFECT, &mut condition) {
        return Ok(());
    }
    let standing = conversation.standing();
    // What is late and what never happens are different faults.
    let late = if conversation.until(LATE, condition) {
        format!("only after {:?}", started.elapsed())
    } else {
        format!("not within {:?}", EFFECT + LATE)
    };
    bail!("{late}: {what} (after {EFFECT:?}: {standing})")
}
