//! An agent that stops at steps, and the network around it: cells are played there one after another.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use tempfile::TempDir;

use super::net::Net;
use super::talk::Conversation;
use super::{Cell, Fate, GONE, Held, Side, Table, Tier, event};
use crate::agent::{Agent, AgentCommand, DEADLINE, stepped_binary};
use crate::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use crate::kernel::{dump, entries, standing};
use crate::manifests::Manifests;
use crate::sequence;
use crate::shape::stage::Family;
use crate::wait::wait_for;
use crate::wire;

/// How long the agent may take to come to a step.
const ARRIVAL: Duration = Duration::from_secs(3);
/// How long the agent may take to let go of a connection that is over.
const REST: Duration = Duration::from_secs(1);
/// The step that whatever writes flows anew comes to, and the one before it at a handover.
const REWRITE: &str = "rewrite.request_written";
const BEFORE_REWRITE: &str = "complete.before";
/// How long what is over may stay in the kernel: for what is sent again, and to tell both ends again.
const LEAVES: Duration = Duration::from_secs(8);
/// How much each end sends before the handover.
const BEFORE: usize = 2_048;
/// How much of each end the agent is made to hold, and how much of one that does not read.
const SOME: usize = 3_072;
const MUCH: usize = 14_000;
/// A handover that takes longer may find nothing that is held any more.
const AT_FIRST: Duration = Duration::from_millis(700);
/// The receive buffers of both hosts at first: no more than a part of what the agent may hold at a handover.
const SMALL_BUFFERS: &str = "4096 8192 6291456";
/// How many lanes there are, and how many where each cell takes the start of an agent, which keeps a CPU busy.
const LANES: usize = 4;
const LANES_OF_SUCCESSORS: usize = 2;

/// An agent with failpoints between a client and an endpoint.
pub struct Lane {
    tier: Tier,
    agent: Agent,
    command: AgentCommand,
    listener: TcpListener,
    address: SocketAddr,
    manifests: Manifests,
    net: Net,
    folder: TempDir,
    next: u64,
    shows: bool,
}

impl Lane {
    /// Starts one, whose network is known to work. It `shows` much of each failure, or just names it.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(tier: Tier, family: Family, shows: bool) -> Result<Self> {
        let (topology, wires) = wire::wired(1)?;
        for host in [&topology.client, &topology.backend1] {
            host.sysctl("ipv4/tcp_rmem", SMALL_BUFFERS)?;
        }
        // A scale by which windows as small as these can be told.
        topology.node.sysctl("ipv4/tcp_rmem", "4096 131072 1048576")?;
        let (endpoint, address) = match family {
            Family::V4 => (topology.backend1_address(ENDPOINT_PORT), topology.node_address(LISTENER_PORT)),
            Family::V6 => {
                (topology.backend1_address_v6(ENDPOINT_PORT), topology.node_address_v6(LISTENER_PORT))
            }
        };
        let listener = topology.backend1.bind(endpoint)?;
        listener.set_nonblocking(true)?;
        let manifests = Manifests::forward(LISTENER_PORT, &[endpoint])?;
        let folder = TempDir::with_prefix("forwarder-steps-")?;
        let datapath = match tier {
            Tier::Tc => "tc",
            Tier::Sockmap => "sockmap",
        };
        let offload = (2 * BEFORE).to_string() + "B";
        let arguments = ["--datapath", datapath, "--offload-after", &offload, "--workers", "1"];
        let variable = format!("FORWARDER_FAILPOINTS={}", folder.path().display());
        let command =
            AgentCommand::new(&arguments).with_binary(stepped_binary()).wrapped(&["env", &variable]);
        let agent = command.start(&topology.node, &manifests.path())?;
        let net = Net { topology, wires };
        let mut lane =
            Self { tier, agent, command, listener, address, manifests, net, folder, next: 0, shows };
        lane.warm_up().context("the first connection, by which the way is known to work")?;
        Ok(lane)
    }

    fn file(&self, step: &str, what: &str) -> PathBuf {
        self.folder.path().join(format!("{step}.{what}"))
    }

    /// Has the agent stop at a step.
    fn stop_at(&self, step: &str) -> io::Result<()> {
        fs::write(self.file(step, "stop"), "")
    }

    /// Lets it go on.
    fn go_on(&self, step: &str) -> io::Result<()> {
        // It may never have come there.
        let _ = fs::remove_file(self.file(step, "reached"));
        fs::remove_file(self.file(step, "stop"))
    }

    fn has_reached(&self, step: &str) -> bool {
        self.file(step, "reached").exists()
    }

    /// Waits until the agent has come to a step.
    fn await_step(&self, step: &str, time: Duration, conversation: &mut Conversation) -> Result<()> {
        if conversation.until(time, |_| self.has_reached(step)) {
            return Ok(());
        }
        bail!("the agent has not come to {step} ({})", conversation.standing());
    }

    /// A connection on which nothing has moved.
    fn connect(&mut self) -> Result<Conversation> {
        self.next += 1;
        let client = self.net.topology.client.connect(self.address).context("connect")?;
        let accepted: Option<TcpStream> =
            wait_for(ARRIVAL, || self.listener.accept().ok().map(|(stream, _)| stream));
        Ok(Conversation::new(client, accepted.context("the agent has connected no endpoint")?, self.next)?)
    }

    /// Has the kernel forward one connection, on which both ends are seen to hear each other: then a handover waits for
    /// nothing. The tier may begin to take connections a while after the agent is ready.
    fn warm_up(&mut self) -> Result<()> {
        const ATTEMPTS: usize = 10;
        const ONE: Duration = Duration::from_millis(700);
        let last = self.tier.last();
        self.stop_at(last)?;
        for _ in 0..ATTEMPTS {
            let mut conversation = self.connect()?;
            let mut sent = Instant::now();
            let has_arrived = conversation.until(ONE, |conversation| {
                if sent.elapsed() > Duration::from_millis(5) {
                    sent = Instant::now();
                    for side in Side::BOTH {
                        conversation.at(side).target += BEFORE / 2;
                    }
                }
                self.has_reached(last)
            });
            if has_arrived {
                self.go_on(last)?;
                for side in Side::BOTH {
                    conversation.at(side).finish();
                }
                drop(conversation);
                return self.await_rest();
            }
        }
        bail!("no connection was handed over\n{}", self.agent.log())
    }

    /// A connection on which both ends have heard each other, and with which the agent has come to the first step.
    fn begin(&mut self) -> Result<Conversation> {
        let first = self.tier.first();
        self.stop_at(first)?;
        let mut conversation = self.connect()?;
        // The last byte tells how much window its sender has once it has read the others: nothing else does where buffers are small.
        for more in [BEFORE - 1, 1] {
            for side in Side::BOTH {
                conversation.at(side).target += more;
            }
            let has_begun =
                conversation.until(ARRIVAL, |both| Side::BOTH.into_iter().all(|side| both.has_all(side)));
            ensure!(has_begun, "it does not begin: {}", conversation.standing());
        }
        self.await_step(first, ARRIVAL, &mut conversation)?;
        Ok(conversation)
    }

    /// Lets the agent go on from one step to another, where it stops again.
    fn go_on_to(&self, step: &str, from: &str, conversation: &mut Conversation) -> Result<()> {
        self.stop_at(step)?;
        self.go_on(from)?;
        self.await_step(step, ARRIVAL, conversation)
    }

    /// Plays a cell.
    ///
    /// # Errors
    /// What did not happen as it should.
    pub fn play(&mut self, cell: Cell) -> Result<()> {
        const ATTEMPTS: usize = 5;
        for _ in 1..ATTEMPTS {
            if self.play_once(cell, false)? {
                return Ok(());
            }
        }
        println!("{cell}: the agent is late each time: it may hold nothing");
        self.play_once(cell, true).map(drop)
    }

    /// Plays a cell, unless the agent is late, and not even then if `is_last`: it may have held more than a window that happens to be
    /// small has room for, and then hands over when it holds nothing any more. Tells whether it has.
    fn play_once(&mut self, cell: Cell, is_last: bool) -> Result<bool> {
        let (step, first) = (cell.step, self.tier.first());
        let mut conversation = self.begin()?;
        hold(cell.held, &mut conversation)?;
        let held = Instant::now();
        // Only from here on, and to the last step before it: what looks after other pairs comes there too.
        let way = if step == REWRITE { [first, BEFORE_REWRITE, step] } else { [first, first, step] };
        for pair in way.windows(2).filter(|pair| pair[0] != pair[1]) {
            self.go_on_to(pair[1], pair[0], &mut conversation)?;
        }
        if cell.held == Held::Bytes && held.elapsed() > AT_FIRST && !is_last {
            self.go_on(step)?;
            event::finish(&mut conversation).context("of what was refused")?;
            drop(conversation);
            return self.await_rest().and(Ok(false));
        }
        if let Some(successor) = cell.successor {
            return self.play_adoption(cell, successor, conversation).and(Ok(true));
        }
        let played = event::play(cell, &mut conversation, &self.net);
        self.go_on(step)?;
        let evaluated = event::evaluate(&played?, &mut conversation);
        if evaluated.is_err() && self.shows {
            println!("{cell}:\n{}", standing(&self.agent, &self.net.topology));
        }
        evaluated?;
        drop(conversation);
        self.await_rest().and(Ok(true))
    }

    /// Waits until the agent has nothing left to do for connections that are over, but to wait for stray packets.
    fn await_rest(&self) -> Result<()> {
        let mut listed = Vec::new();
        let rests = wait_for(REST, || {
            listed = self.agent.connections("").ok()?;
            listed.iter().all(|one| one["state"] != "handover" && one["tier"] == "tc").then_some(())
        });
        rests.with_context(|| format!("not within {REST:?}: the agent is done with it ({listed:?})"))
    }

    /// Kills the agent where it stands, plays the event before its successor has taken over, or while it does, and asserts
    /// what has to come of it.
    fn play_adoption(&mut self, cell: Cell, successor: &str, mut conversation: Conversation) -> Result<()> {
        self.agent.kill()?;
        self.go_on(cell.step)?;
        let command = self.command.clone().succeeding(&self.agent);
        let (node, manifests) = (self.net.topology.node.clone(), self.manifests.path());
        let played = if successor == GONE {
            let played = event::play(cell, &mut conversation, &self.net);
            self.agent = command.start(&node, &manifests)?;
            played?
        } else {
            self.stop_at(successor)?;
            let (agent, played) = thread::scope(|scope| {
                let starting = scope.spawn(|| command.start(&node, &manifests));
                let played = self
                    .await_step(successor, DEADLINE, &mut conversation)
                    .and_then(|()| event::play(cell, &mut conversation, &self.net));
                // Where it has not come there, it is not stopped either.
                let gone_on = self.go_on(successor);
                let agent = starting.join().expect("an agent's start does not panic");
                agent.and_then(|agent| gone_on.map_err(Into::into).and(Ok((agent, played?))))
            })?;
            self.agent = agent;
            played
        };
        match Fate::of(cell.step) {
            Fate::Lives => event::evaluate(&played, &mut conversation)?,
            fate => event::evaluate_end(fate, &mut conversation)?,
        }
        drop(conversation);
        self.await_rest()?;
        // The next cell is this agent's.
        self.warm_up()
    }

    /// Has bytes of an end reach the agent's socket after it was read and before the kernel forwards, for another end that
    /// does not read, and asserts that the first one heeds what the other one acknowledges: not if that were less than the
    /// agent's socket has acknowledged.
    ///
    /// # Errors
    /// It does not.
    pub fn play_gap(&mut self, side: Side) -> Result<()> {
        const READ: &str = "join.upstream_read";
        const HEEDED: Duration = Duration::from_millis(100);
        let mut conversation = self.begin()?;
        self.go_on_to(READ, self.tier.first(), &mut conversation)?;
        hold(Held::Beyond(side.other()), &mut conversation)?;
        self.go_on(READ)?;
        let began = Instant::now();
        let mut poked = began;
        let is_heeded = conversation.until(ARRIVAL, |both| {
            if poked.elapsed() > HEEDED / 10 {
                poked = Instant::now();
                both.at(side.other()).target += 1;
            }
            // What was heeded before the handover does not count.
            let stream = both.at(side).stream.as_ref();
            began.elapsed() > 3 * HEEDED
                && stream.is_some_and(|stream| {
                    sequence::since_acknowledgement(stream).is_ok_and(|since| since < HEEDED)
                })
        });
        let is_in_handover = self.agent.connections("")?.iter().any(|one| one["state"] == "handover");
        ensure!(is_in_handover, "it was not handed over with something held");
        ensure!(is_heeded, "it does not heed what is acknowledged: {}", conversation.standing());
        event::finish(&mut conversation).context("afterwards")?;
        drop(conversation);
        self.await_rest()
    }

    /// What is left in the kernel of connections that are over; after an agent was killed, `is_successor`, whatever its sockets do.
    ///
    /// # Errors
    /// Something is.
    pub fn check_left(&self, is_successor: bool) -> Result<()> {
        let is_empty = wait_for(LEAVES, || {
            let maps = ["flows", "pairs"].map(|map| entries(self.agent.pin_dir(), map).unwrap_or_default());
            // The kernel gives up what a killed agent's sockets have to say only after minutes.
            let are_closed = is_successor || self.sockets().is_empty();
            (maps == [0; 2] && self.agent.pairs() == 0 && are_closed).then_some(())
        });
        if is_empty.is_some() {
            return Ok(());
        }
        bail!(
            "something is left: flows {:?}, pairs {:?}, sockets {:?}, connections {:?}",
            dump(self.agent.pin_dir(), "flows")?,
            dump(self.agent.pin_dir(), "pairs")?,
            self.sockets(),
            self.agent.connections("")?
        )
    }

    /// The sockets of the node that belong to connections; those that only wait for stray packets (`TIME_WAIT`) do not count.
    fn sockets(&self) -> Vec<String> {
        const LISTEN: &str = "0A";
        const TIME_WAIT: &str = "06";
        let ports = [LISTENER_PORT, ENDPOINT_PORT].map(|port| format!(":{port:04X}"));
        let tables = self.net.topology.node.run(|| {
            ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
                .map(|path| fs::read_to_string(path).unwrap_or_default())
        });
        let lines = tables.iter().flat_map(|table| table.lines().skip(1));
        lines
            .filter(|line| {
                let fields: Vec<&str> = line.split_ascii_whitespace().collect();
                let of_ours =
                    fields.iter().skip(1).take(2).any(|field| ports.iter().any(|port| field.ends_with(port)));
                of_ours && fields.get(3).is_some_and(|state| ![LISTEN, TIME_WAIT].contains(state))
            })
            .map(|line| line.split_ascii_whitespace().skip(1).take(3).collect::<Vec<_>>().join(" "))
            .collect()
    }
}

/// Has the agent hold bytes while it stops at the first step.
fn hold(held: Held, conversation: &mut Conversation) -> Result<()> {
    match held {
        Held::Nothing => return Ok(()),
        Held::Bytes => {
            for side in Side::BOTH {
                conversation.at(side).target += SOME;
            }
        }
        Held::Beyond(side) => {
            conversation.at(side).reads = false;
            conversation.at(side.other()).target += MUCH;
        }
    }
    let is_held = conversation.until(ARRIVAL, |both| {
        Side::BOTH.into_iter().all(|side| {
            let end = both.at(side);
            let stream = end.stream.as_ref();
            end.sent() == end.target
                && stream.is_some_and(|stream| sequence::unacknowledged(stream).is_ok_and(|left| left == 0))
        })
    });
    ensure!(is_held, "the agent's sockets do not take what they are to hold");
    Ok(())
}

/// Plays cells, several at a time, each in a lane of its own; `shows` much of each failure, or just names it.
///
/// # Errors
/// No lane can be had.
pub fn run(tier: Tier, cells: &[Cell], shows: bool) -> Result<Table> {
    let next = AtomicUsize::new(0);
    let outcomes: Mutex<Vec<Option<Result<Duration, String>>>> = Mutex::new(vec![None; cells.len()]);
    let left = Mutex::new(Vec::new());
    let has_successors = cells.iter().any(|cell| cell.successor.is_some());
    thread::scope(|scope| {
        let lanes = if has_successors { LANES_OF_SUCCESSORS } else { LANES };
        let lanes: Vec<_> = (0..lanes.min(cells.len()))
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    let mut lane: Option<(Family, Lane)> = None;
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(&cell) = cells.get(index) else { break };
                        let mut present = match lane.take() {
                            Some((family, present)) if family == cell.family => present,
                            _ => Lane::start(tier, cell.family, shows)?,
                        };
                        let started = Instant::now();
                        let outcome = present.play(cell).map_err(|error| format!("{error:#}"));
                        // What has failed may leave anything.
                        if outcome.is_ok() {
                            lane = Some((cell.family, present));
                        }
                        outcomes.lock().unwrap_or_else(PoisonError::into_inner)[index] =
                            Some(outcome.map(|()| started.elapsed()));
                    }
                    if let Some((_, lane)) = lane
                        && let Err(error) = lane.check_left(has_successors)
                    {
                        left.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{error:#}"));
                    }
                    Ok(())
                })
            })
            .collect();
        lanes.into_iter().try_for_each(|lane| lane.join().expect("a lane does not panic"))
    })?;
    let mut table = Table::with(left.into_inner().unwrap_or_else(PoisonError::into_inner));
    let outcomes = outcomes.into_inner().unwrap_or_else(PoisonError::into_inner);
    for (cell, outcome) in cells.iter().zip(outcomes) {
        table.note(*cell, outcome.context("a cell that was not played")?);
    }
    Ok(table)
}
