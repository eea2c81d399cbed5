//! Conversations of many shapes: what a client and a server say to each other, in which order, and how they end.
//!
//! A [`Shape`] follows from its seed alone, so the two ends need to agree on nothing but the seed. [`play`] performs one
//! end of it; a [`Stage`] performs many conversations through an agent.

pub mod content;
pub mod play;
pub mod stage;

pub use stage::{Door, Failure, Stage};

use std::time::Duration;

use crate::random::Random;

/// What a conversation is about.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    /// The server greets, the client answers, both go on.
    ServerFirst,
    /// The client asks, the server answers.
    ClientFirst,
    /// Messages back and forth, each after the one before it.
    PingPong,
    /// Data from the client.
    Upload,
    /// Data from the server.
    Download,
    /// Data in both directions at once.
    BothWays,
    /// The client ends its direction and reads on.
    ClientEndsFirst,
    /// The server ends its direction and reads on.
    ServerEndsFirst,
    /// The client resets the connection amid a transfer.
    ClientResets,
    /// The server resets the connection amid a transfer.
    ServerResets,
    /// The client has a small receive buffer and reads with pauses.
    SlowClient,
    /// The server has a small receive buffer and reads with pauses.
    SlowServer,
    /// Nothing is said for a while, and then much.
    IdleThenBusy,
    /// Each end pauses now and then.
    Pauses,
}

/// All of them.
pub const KINDS: [Kind; 14] = [
    Kind::ServerFirst,
    Kind::ClientFirst,
    Kind::PingPong,
    Kind::Upload,
    Kind::Download,
    Kind::BothWays,
    Kind::ClientEndsFirst,
    Kind::ServerEndsFirst,
    Kind::ClientResets,
    Kind::ServerResets,
    Kind::SlowClient,
    Kind::SlowServer,
    Kind::IdleThenBusy,
    Kind::Pauses,
];

/// Something that one end does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Step {
    /// Sends and receives that many bytes, both at once.
    Move {
        /// How much it sends.
        send: usize,
        /// How much it receives.
        receive: usize,
    },
    /// Receives that many bytes in `sips` parts of the same size, with a pause before each.
    Sip {
        /// How much it receives.
        receive: usize,
        /// In how many parts.
        sips: u32,
        /// How long each pause takes.
        pause: Duration,
    },
    /// Does nothing for a while.
    Pause(Duration),
    /// Sends the SHA-256 of all that it has sent, and ends its direction.
    End,
    /// Receives the SHA-256 of all that it has received, compares, and waits for the other direction's end.
    AwaitEnd,
    /// Resets the connection.
    Reset,
    /// Sends up to `send` bytes and receives up to `receive`, until the other end resets the connection.
    AwaitReset {
        /// The most that it sends.
        send: usize,
        /// The most that the other end sends.
        receive: usize,
    },
}

/// A conversation: what each end does, in which order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Shape {
    /// What everything follows from.
    pub seed: u64,
    /// What it is about.
    pub kind: Kind,
    /// What the client does.
    pub client: Vec<Step>,
    /// What the server does.
    pub server: Vec<Step>,
}

impl Shape {
    /// The shape of `seed`. Seeds in a row go through all kinds.
    pub fn of(seed: u64) -> Self {
        let kinds = KINDS.len() as u64;
        let kind = usize::try_from(seed % kinds).ok().and_then(|index| KINDS.get(index).copied());
        Self::of_kind(kind.expect("a remainder is an index"), seed)
    }

    /// The shape of `seed` if it is to be of that kind.
    pub fn of_kind(kind: Kind, seed: u64) -> Self {
        let mut script = Script { random: Random::new(seed), client: Vec::new(), server: Vec::new() };
        script.write(kind);
        Self { seed, kind, client: script.client, server: script.server }
    }

    /// The same, but whoever waits for a reset always has something to send: a reset is sent once, and where it is lost
    /// only its answer to more data tells.
    #[must_use]
    pub fn for_lossy_network(mut self) -> Self {
        for step in self.client.iter_mut().chain(&mut self.server) {
            if let Step::AwaitReset { send, .. } = step {
                // More than all buffers on the way hold while nobody reads.
                *send += 1 << 30;
            }
        }
        self
    }

    /// The same, but each end rests halfway through what it sends first, so that the kernel takes the connection over amid
    /// the transfer, however fast it is.
    #[must_use]
    pub fn with_rest(mut self, rest: Duration) -> Self {
        for steps in [&mut self.client, &mut self.server] {
            let first = steps.iter().enumerate().find_map(|(index, step)| match *step {
                Step::Move { send, receive } if send > 0 => Some((index, send, receive)),
                _ => None,
            });
            if let Some((index, send, receive)) = first {
                let halves = [(send / 2, receive), (send - send / 2, 0)];
                let [before, after] = halves.map(|(send, receive)| Step::Move { send, receive });
                steps.splice(index..=index, [before, Step::Pause(rest), after]);
            }
        }
        self
    }

    /// How many bytes its ends mean to send, without those of the last words.
    pub fn bytes(&self) -> usize {
        let sent = |step: &Step| match *step {
            Step::Move { send, .. } | Step::AwaitReset { send, .. } => send,
            Step::Sip { .. } | Step::Pause(_) | Step::End | Step::AwaitEnd | Step::Reset => 0,
        };
        self.client.iter().chain(&self.server).map(sent).sum()
    }
}

/// A shape being written.
struct Script {
    random: Random,
    client: Vec<Step>,
    server: Vec<Step>,
}

impl Script {
    fn write(&mut self, kind: Kind) {
        match kind {
            Kind::ServerFirst => {
                let greeting = self.below(2000);
                self.both(0, greeting + 1);
                let (up, down) = (self.size(), self.size());
                self.turns(up, down);
                self.end();
            }
            Kind::ClientFirst => {
                let (up, down) = (self.size(), self.size());
                self.turns(up, down);
                self.end();
            }
            Kind::PingPong => {
                for _ in 0..=self.below(40) {
                    let (up, down) = (self.message(), self.message());
                    self.turns(up, down);
                }
                self.end();
            }
            Kind::Upload => {
                let up = self.size();
                self.both(up, 0);
                self.client_ends();
                self.server_ends();
            }
            Kind::Download => {
                let down = self.size();
                self.both(0, down);
                self.server_ends();
                self.client_ends();
            }
            Kind::BothWays => {
                let (up, down) = (self.size(), self.size());
                self.both(up, down);
                self.end();
            }
            Kind::ClientEndsFirst => {
                let (up, down) = (self.size(), self.size());
                self.both(up, 0);
                self.client_ends();
                self.pause_now_and_then();
                self.both(0, down);
                self.server_ends();
            }
            Kind::ServerEndsFirst => {
                let (up, down) = (self.size(), self.size());
                self.both(0, down);
                self.server_ends();
                self.pause_now_and_then();
                self.both(up, 0);
                self.client_ends();
            }
            Kind::ClientResets => {
                let (up, down, more) = (self.size(), self.size(), self.more());
                self.client.push(Step::Move { send: up, receive: down });
                self.server.push(Step::AwaitReset { send: down + more, receive: up });
                self.pause_client();
                self.client.push(Step::Reset);
            }
            Kind::ServerResets => {
                let (up, down, more) = (self.size(), self.size(), self.more());
                self.server.push(Step::Move { send: down, receive: up });
                self.client.push(Step::AwaitReset { send: up + more, receive: down });
                self.pause_server();
                self.server.push(Step::Reset);
            }
            Kind::SlowClient => {
                let (send, step) = self.sips();
                self.server.push(Step::Move { send, receive: 0 });
                self.client.push(step);
                self.end();
            }
            Kind::SlowServer => {
                let (send, step) = self.sips();
                self.client.push(Step::Move { send, receive: 0 });
                self.server.push(step);
                self.end();
            }
            Kind::IdleThenBusy => {
                let (up, down) = (self.message(), self.message());
                self.turns(up, down);
                let idle = self.milliseconds(50, 800);
                self.client.push(Step::Pause(idle));
                for _ in 0..=self.below(3) {
                    let (up, down) = (self.size() / 2, self.size() / 2);
                    self.turns(up, down);
                }
                self.end();
            }
            Kind::Pauses => {
                for _ in 0..=self.below(6) {
                    self.pause_now_and_then();
                    let (up, down) = (self.size() / 6, self.size() / 6);
                    self.both(up, down);
                }
                self.end();
            }
        }
    }

    /// Data in both directions at once.
    fn both(&mut self, up: usize, down: usize) {
        self.client.push(Step::Move { send: up, receive: down });
        self.server.push(Step::Move { send: down, receive: up });
    }

    /// The client's data, and then the server's.
    fn turns(&mut self, up: usize, down: usize) {
        self.client.extend([Step::Move { send: up, receive: 0 }, Step::Move { send: 0, receive: down }]);
        self.server.extend([Step::Move { send: 0, receive: up }, Step::Move { send: down, receive: 0 }]);
    }

    fn client_ends(&mut self) {
        self.client.push(Step::End);
        self.server.push(Step::AwaitEnd);
    }

    fn server_ends(&mut self) {
        self.server.push(Step::End);
        self.client.push(Step::AwaitEnd);
    }

    /// Either end first, or both at once.
    fn end(&mut self) {
        match self.below(3) {
            0 => {
                self.client_ends();
                self.server_ends();
            }
            1 => {
                self.server_ends();
                self.client_ends();
            }
            _ => {
                self.client.extend([Step::End, Step::AwaitEnd]);
                self.server.extend([Step::End, Step::AwaitEnd]);
            }
        }
    }

    fn pause_now_and_then(&mut self) {
        match self.below(4) {
            0 => self.pause_client(),
            1 => self.pause_server(),
            _ => {}
        }
    }

    fn pause_client(&mut self) {
        let pause = self.milliseconds(0, 40);
        self.client.push(Step::Pause(pause));
    }

    fn pause_server(&mut self) {
        let pause = self.milliseconds(0, 40);
        self.server.push(Step::Pause(pause));
    }

    /// How a slow reader reads: many times less at once than the sender has ready.
    fn sips(&mut self) -> (usize, Step) {
        let receive = 30_000 + self.below(270_000);
        let sips = u32::try_from(3 + self.below(8)).unwrap_or(u32::MAX);
        (receive, Step::Sip { receive, sips, pause: self.milliseconds(5, 60) })
    }

    /// Mostly small, often enough to be offloaded, now and then large.
    fn size(&mut self) -> usize {
        match self.below(40) {
            0 => (1 << 20) + self.below(3 << 20),
            1..20 => (64 << 10) + self.below(236 << 10),
            _ => self.up_to_bits(16),
        }
    }

    /// From one byte to 16 KiB.
    fn message(&mut self) -> usize {
        self.up_to_bits(14)
    }

    /// From one byte to `1 << bits`, every order of magnitude as often.
    fn up_to_bits(&mut self, bits: usize) -> usize {
        let most = 1 << self.below(bits + 1);
        1 + self.below(most)
    }

    /// How much of a stream a reset cuts off: half of the time nothing.
    fn more(&mut self) -> usize {
        if self.below(2) == 0 { 0 } else { self.size() }
    }

    fn milliseconds(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(least + self.random.below(most - least))
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.random.below(bound as u64)).expect("below a usize")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How much an end sends, and how much it receives.
    fn sums(steps: &[Step]) -> (usize, usize) {
        steps.iter().fold((0, 0), |(sent, received), step| match *step {
            Step::Move { send, receive } => (sent + send, received + receive),
            Step::Sip { receive, .. } => (sent, received + receive),
            Step::Pause(_) | Step::End | Step::AwaitEnd | Step::Reset | Step::AwaitReset { .. } => {
                (sent, received)
            }
        })
    }

    #[test]
    fn what_one_end_sends_the_other_receives() {
        for seed in 0..10_000 {
            let shape = Shape::of(seed);
            let (client, server) = (sums(&shape.client), sums(&shape.server));
            if !matches!(shape.kind, Kind::ClientResets | Kind::ServerResets) {
                assert_eq!(client, (server.1, server.0), "{shape:?}");
            }
        }
    }

    #[test]
    fn a_shape_follows_from_its_seed_and_all_kinds_come_up() {
        assert_eq!(Shape::of(77), Shape::of(77));
        assert_ne!(Shape::of(77), Shape::of(91));
        for (seed, kind) in (0..).zip(KINDS) {
            assert_eq!(Shape::of(seed).kind, kind);
        }
    }

    #[test]
    fn conversations_are_mostly_small() {
        let bytes: usize = (0..10_000).map(|seed| Shape::of(seed).bytes()).sum();
        assert!((1 << 30..5 << 30).contains(&bytes), "{bytes} bytes in all");
    }
}
