//! What the programs note of a segment in the [`DirectionState`] of its direction.
//!
//! Nothing is noted that the receiver does not take, or somebody who knows no more than the addresses and the ports could
//! end a pair, or make up what it has moved: a segment counts if its sequence number *and* its acknowledgement number are such
//! as a socket accepts (RFC 9293, 3.10.7.4; RFC 5961, 3 to 5). All others are forwarded, for the receiver to decide on.

use super::{
    DirectionState, FLOW_ENDED, Flow, SENDER_CHALLENGE, SENDER_RESET, SENDER_SYN, STATE_HANDOVER, Seen,
};
use crate::packet::{FLAG_ACK, FLAG_FIN, FLAG_RST, FLAG_SYN};
use crate::translate::is_before;

/// The largest window (RFC 7323, 2.3), rounded up.
const MAX_WINDOW: u32 = 1 << 30;
/// By how much at least numbers may differ from what is expected, where a window is smaller: what was sent to a window that has
/// closed since may be sent and acknowledged again.
const LEAST: u32 = 0xffff;
/// How far beyond what is known numbers may lie in [`STATE_HANDOVER`]. The local sockets have granted their own windows, and have
/// received after they were read and before the programs saw anything: nobody told the programs of that.
const HANDOVER_GAP: u32 = 16 << 20;

impl DirectionState {
    /// Whether the receiver takes the segment of `flow`, whose opposite direction is `reverse`: its payload touches the receiver's
    /// window, or lies less than a window before it (`tcp_sequence`), and it acknowledges what the receiver may have sent
    /// (`tcp_ack`). Of SYN and RST segments it says nothing.
    ///
    /// A receiver may have sent up to the edge of the window that this direction's sender has announced, and by a little more, even
    /// where less of it is known: two CPUs that note at once may lose what one of them saw, and what is known has to catch up.
    #[inline(always)]
    #[must_use]
    pub const fn accepts(&self, reverse: &Self, flow: &Flow, segment: &Seen) -> bool {
        if segment.flags & (FLAG_SYN | FLAG_RST | FLAG_ACK) != FLAG_ACK {
            return false;
        }
        let behind = reverse.granted() | LEAST;
        let ahead = self.reach(reverse, flow);
        if !lies_within(segment.sequence, flow.first(reverse), behind + segment.payload, ahead) {
            return false;
        }
        let granted = self.granted();
        let sent = reverse.sequence_end.wrapping_sub(flow.acknowledgement_shift);
        let mut ahead = larger(granted | LEAST, distance(self.acknowledged, sent));
        if flow.state == STATE_HANDOVER {
            ahead += HANDOVER_GAP;
        }
        lies_within(segment.acknowledgement, self.acknowledged, granted | LEAST, ahead)
    }

    /// Whether a segment has more than was known before: bytes, an acknowledgement, or a window. Whoever waits for what was lost sends one that has not.
    #[inline(always)]
    #[must_use]
    pub const fn is_news(&self, segment: &Seen) -> bool {
        if segment.payload > 0 {
            is_before(self.sequence_end, segment.sequence.wrapping_add(segment.payload))
        } else {
            segment.acknowledgement != self.acknowledged || segment.window != self.window
        }
    }

    /// Notes a segment of `flow`, whose opposite direction is `reverse`; `is_accepted` is what [`Self::accepts`] says of it.
    #[inline(always)]
    pub const fn note(&mut self, reverse: &Self, flow: &Flow, segment: &Seen, is_accepted: bool) {
        self.packets += 1;
        if is_accepted {
            self.note_accepted(reverse, flow, segment);
        } else if segment.flags & FLAG_SYN != 0 {
            // Its number is that of another connection.
            if segment.flags & FLAG_ACK == 0 {
                self.flags |= SENDER_SYN;
            }
        } else if segment.flags & FLAG_RST != 0 {
            self.note_reset(reverse, flow, segment);
        }
    }

    /// A reset ends the pair only with the very number that the receiver expects (RFC 5961, 3.2): what it has acknowledged, or
    /// all that it may have received since. With another one within its window the receiver asks the sender, and so does the
    /// agent, since the sender need not answer the receiver.
    #[inline(always)]
    const fn note_reset(&mut self, reverse: &Self, flow: &Flow, segment: &Seen) {
        // Where both ends have ended and know it, it answers something late, and ends nothing.
        if flow.has_ended(self, reverse) {
            return;
        }
        let first = flow.first(reverse);
        if segment.sequence == first || segment.sequence == self.sequence_end {
            self.flags |= SENDER_RESET;
            self.last_seen = segment.time;
        } else if lies_within(segment.sequence, first, 0, self.reach(reverse, flow)) {
            self.flags |= SENDER_CHALLENGE;
        }
    }

    #[inline(always)]
    const fn note_accepted(&mut self, reverse: &Self, flow: &Flow, segment: &Seen) {
        // Words are written only where they change: packets of one direction may be on two CPUs at once.
        self.last_seen = segment.time;
        if self.flags & (SENDER_RESET | SENDER_SYN | SENDER_CHALLENGE) != 0 {
            self.flags &= !(SENDER_RESET | SENDER_SYN | SENDER_CHALLENGE);
        }
        let first = flow.first(reverse);
        let is_fin = segment.flags & FLAG_FIN != 0;
        let end = segment.sequence.wrapping_add(segment.payload).wrapping_add(is_fin as u32);
        let advance = end.wrapping_sub(self.sequence_end);
        if advance == 0 || is_before(end, self.sequence_end) {
            // Some keepalive probes repeat a byte that has been acknowledged (RFC 9293, 3.8.4).
            if segment.payload > 1 || end != first {
                self.repeated += segment.payload as u64;
            }
            // On another CPU an acknowledgement has overtaken it: the FIN's number was taken for a byte.
            if is_fin && advance == 0 && self.fin == 0 && flow.flags & FLOW_ENDED == 0 {
                self.bytes = self.bytes.saturating_sub(1);
            }
        } else {
            // A FIN has a number of its own, but is no payload.
            let payload = advance - is_fin as u32;
            self.bytes += payload as u64;
            self.repeated += segment.payload.saturating_sub(payload) as u64;
            self.sequence_end = end;
        }
        // What lies wholly before the window the receiver only answers (`tcp_sequence`).
        let is_old = is_before(end, first);
        if is_fin {
            if !is_old && !is_before(end, self.sequence_end) {
                self.set_fin_end(end);
            }
        } else if let Some(fin_end) = self.fin_end()
            && !is_old
            && (is_before(fin_end, end) || is_before(fin_end, first))
        {
            // The sender has gone on after what looked like its end.
            self.fin = 0;
        }
        // But what it acknowledges its sender has: one whose data is acknowledged in vain, because nobody knows the window that it
        // takes acknowledgements in any more, says so in nothing else.
        if is_before(segment.acknowledgement, self.acknowledged) {
            return;
        }
        self.window = segment.window;
        // Masked for the verifier, which knows nothing of the agent's checks.
        let granted = (segment.window as u32) << (flow.source_scale & 15);
        let edge = segment.acknowledgement.wrapping_add(granted);
        if is_before(self.edge, edge) {
            self.edge = edge;
        }
        if self.acknowledged != segment.acknowledgement {
            self.acknowledged = segment.acknowledgement;
        }
    }

    /// How many bytes this direction's sender takes beyond what it has acknowledged.
    #[inline(always)]
    const fn granted(&self) -> u32 {
        distance(self.acknowledged, self.edge)
    }

    /// How far beyond what the receiver has acknowledged a segment may begin. Its sender may have sent more than the receiver has
    /// room for, as the windows of the local sockets let it in [`STATE_HANDOVER`]: what it then says begins there for as long as the
    /// receiver does not read.
    #[inline(always)]
    const fn reach(&self, reverse: &Self, flow: &Flow) -> u32 {
        let sent = larger(reverse.granted(), distance(flow.first(reverse), self.sequence_end));
        if flow.state == STATE_HANDOVER { sent + HANDOVER_GAP } else { sent }
    }
}

impl Flow {
    /// The first number that the receiver, whose own direction is `reverse`, has not acknowledged, in the sender's numbers.
    #[inline(always)]
    const fn first(&self, reverse: &DirectionState) -> u32 {
        reverse.acknowledged.wrapping_sub(self.sequence_shift)
    }
}

/// Whether `number` lies at most `behind` before `middle` and at most `ahead` after it.
#[inline(always)]
const fn lies_within(number: u32, middle: u32, behind: u32, ahead: u32) -> bool {
    number.wrapping_sub(middle).wrapping_add(behind) <= behind.wrapping_add(ahead)
}

/// How far `end` lies after `first`. None where it seems to lie before: another CPU has written one of them meanwhile.
#[inline(always)]
const fn distance(first: u32, end: u32) -> u32 {
    let distance = end.wrapping_sub(first);
    if distance > MAX_WINDOW { 0 } else { distance }
}

#[inline(always)]
const fn larger(a: u32, b: u32) -> u32 {
    if a > b { a } else { b }
}

#[cfg(test)]
mod tests;
