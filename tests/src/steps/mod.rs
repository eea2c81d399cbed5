//! Every event at every step of a handover: what is played, and the table of what came of it.
//!
//! An agent with failpoints stops at a step, one end of a connection does something just then, the agent goes on, and the
//! other end has to see it within a second. See `docs/handover.md`.

mod event;
mod lane;
mod net;
mod raw;
mod table;
mod talk;

pub use self::event::Event;
pub use self::lane::{Lane, run};
pub use self::table::{Outcome, Table};

use std::fmt;

use crate::shape::stage::Family;

/// Which end acts.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Side {
    /// The one that has connected.
    Client,
    /// The one that has accepted.
    Endpoint,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Client, Self::Endpoint];

    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Endpoint,
            Self::Endpoint => Self::Client,
        }
    }
}

/// What the agent holds of a connection at a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Held {
    /// Nothing: everything sent before has been delivered.
    Nothing,
    /// Some bytes of each end, for which the other one has room.
    Bytes,
    /// Bytes for which this end has no room, since it does not read.
    Beyond(Side),
}

/// The tiers that a connection is handed over to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tier {
    /// Programs at TC forward packets.
    Tc,
    /// The kernel joins the sockets.
    Sockmap,
}

/// One thing to play.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Cell {
    /// The family of both connections.
    pub family: Family,
    /// The step at which the agent stops.
    pub step: &'static str,
    /// What it holds then.
    pub held: Held,
    /// Where its successor stops, if the agent is killed at the step: at [`GONE`] before it starts, or at a step of its own.
    pub successor: Option<&'static str>,
    /// What happens then.
    pub event: Event,
    /// Whose doing it is.
    pub side: Side,
}

impl fmt::Display for Cell {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { family, step, held, successor, event, side } = self;
        let successor = successor.map(|at| format!("/killed, {at}")).unwrap_or_default();
        write!(formatter, "{step}/{}{successor}/{event:?}/{side:?}/{family:?}", held.name())
    }
}

impl Held {
    /// A word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Bytes => "bytes",
            Self::Beyond(Side::Client) => "closed-client",
            Self::Beyond(Side::Endpoint) => "closed-endpoint",
        }
    }
}

const EASY: &[Held] = &[Held::Nothing, Held::Bytes];
const EVERY: &[Held] =
    &[Held::Nothing, Held::Bytes, Held::Beyond(Side::Client), Held::Beyond(Side::Endpoint)];

impl Tier {
    /// The first step, at which the agent is made to hold bytes.
    fn first(self) -> &'static str {
        match self {
            Self::Tc => "join.begin",
            Self::Sockmap => "insert.begin",
        }
    }

    /// The last step.
    fn last(self) -> &'static str {
        match self {
            Self::Tc => "complete.handed_over",
            Self::Sockmap => "insert.handed_over",
        }
    }
}

/// Where an event is played that takes place while no agent runs.
pub const GONE: &str = "gone";

/// What has to come of a connection whose agent was killed at a step.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Fate {
    /// Its sockets were closed by the kernel: both ends see some end.
    Ends,
    /// The successor resets it: what the agent held is lost.
    IsReset,
    /// It goes on.
    Lives,
}

impl Fate {
    /// Of a connection whose agent was killed at `step`.
    fn of(step: &str) -> Self {
        match step {
            "complete.after" | "silence.downstream" | "complete.silenced" | "complete.handed_over" => {
                Self::Lives
            }
            "join.pair_written" | "rewrite.request_written" | "complete.before" => Self::IsReset,
            _ if step.starts_with("handover.") => Self::IsReset,
            _ => Self::Ends,
        }
    }
}

/// The steps of a handover to tier `tc`, in their order, and what may be held at each.
pub const TC: &[(&str, &[Held])] = &[
    ("join.begin", EVERY),
    ("join.downstream_read", EVERY),
    ("join.upstream_read", EVERY),
    // From here on nothing is held that its receiver has no room for.
    ("join.request_written", EASY),
    ("join.response_written", EASY),
    ("join.pair_written", EASY),
    ("handover.begin", EASY),
    ("handover.landed", EASY),
    ("complete.before", EASY),
    ("rewrite.request_written", EASY),
    ("complete.after", EASY),
    ("silence.downstream", EASY),
    ("complete.silenced", EASY),
    ("complete.handed_over", EASY),
];

/// The steps of an insertion into the maps of tier `sockmap`, in their order, and what may be held at each.
pub const SOCKMAP: &[(&str, &[Held])] = &[
    ("insert.begin", EVERY),
    ("insert.emptied", EASY),
    ("insert.streams_written", EASY),
    ("insert.request_target", EASY),
    ("insert.response_target", EASY),
    ("insert.request_source", EASY),
    ("insert.joined", EASY),
    ("insert.handed_over", EASY),
];

/// The steps of an agent that takes over what a former one has left, in their order.
pub const SUCCESSOR: [&str; 4] = [GONE, "adopt.begin", "adopt.inherited", "adopt.taken_over"];

/// Events while no agent runs that was killed at any step of a handover to tier `tc`, and at every step of its successor
/// where it was killed after the handover.
pub fn adoptions(family: Family) -> Vec<Cell> {
    let mut all = Vec::new();
    for &(step, _) in TC {
        let held = Held::Bytes;
        let (successors, events) = match Fate::of(step) {
            Fate::Lives => (&SUCCESSOR[..], &Event::ALL[..]),
            Fate::Ends | Fate::IsReset => (&SUCCESSOR[..1], &[Event::Data, Event::Fin, Event::Reset][..]),
        };
        for &successor in successors {
            // Only the end of the handover is worth every combination: each takes the start of an agent.
            if successor != GONE && step != Tier::Tc.last() {
                continue;
            }
            for &event in events {
                all.extend(Side::BOTH.map(|side| Cell {
                    family,
                    step,
                    held,
                    successor: Some(successor),
                    event,
                    side,
                }));
            }
        }
    }
    all
}

/// One of `share` cells, chosen by `seed`.
pub fn some(cells: Vec<Cell>, share: usize, seed: usize) -> Vec<Cell> {
    cells
        .into_iter()
        .enumerate()
        .filter(|(index, _)| (index + seed).is_multiple_of(share))
        .map(|(_, cell)| cell)
        .collect()
}

/// Every event from both sides at every one of `steps`.
pub fn cells(steps: &[(&'static str, &'static [Held])], family: Family) -> Vec<Cell> {
    let mut cells = Vec::new();
    for &(step, helds) in steps {
        for &held in helds {
            for event in Event::ALL {
                cells.extend(Side::BOTH.map(|side| Cell {
                    family,
                    step,
                    held,
                    successor: None,
                    event,
                    side,
                }));
            }
        }
    }
    cells
}
