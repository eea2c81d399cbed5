//! The direct connections, as the agent sees and ends them. See [`forwarder_common::direct`] for who writes what.

use std::io;
use std::mem::offset_of;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;

use aya::Pod;
use aya::maps::{MapData, MapError, Queue};
use forwarder_common::direct::{
    DIRECT, DIRECT_COUNTS, DIRECT_NUMBER, DIRECT_SLOTS, DIRECT_STATES, DirectCounts, DirectSlot,
    HANDSHAKE_ASKED, STATE_CONDEMNED, STATE_FREE,
};
use forwarder_common::flow::{Flow, NextHop, Pair};
use forwarder_common::tuple::FourTuple;

use super::FlowTable;
use super::joined_pair::{JoinedPair, PairKey};
use super::paths::Paths;
use crate::maps::mapped::Mapped;
use crate::maps::versions::map_path;
use crate::maps::{DatapathError, batch, grace};

/// One of how many places for direct connections, and of how many local ports, half-open ones may take: the others have theirs.
const HALF_OPEN_PART: u32 = 4;
/// How many slots programs get before listeners are direct.
const FIRST_SLOTS: usize = 1_000;

/// The direct connections as they lie in the kernel.
pub(super) struct DirectMaps {
    slots: Mapped<DirectSlot>,
    states: Mapped<u64>,
}

/// The direct connections of an agent that runs.
pub(crate) struct DirectTable {
    maps: DirectMaps,
    counts: Mapped<DirectCounts>,
    has_begun: AtomicBool,
    has_slots: Arc<AtomicBool>,
    work: mpsc::Sender<Work>,
}

/// What the thread is to do that gives slots to the programs.
enum Work {
    /// Programs of this agent alone use the maps from now on: they get all that is free.
    Begin,
    /// What is in this slot has ended.
    Free(u32),
}

/// Whether a number is that of a direct connection.
pub fn is_direct(number: u32) -> bool {
    number & DIRECT_NUMBER != 0
}

const fn slot_of(number: u32) -> u32 {
    number & !DIRECT_NUMBER
}

impl DirectMaps {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// They cannot be opened.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, DatapathError> {
        Ok(Self { slots: mapped(pin_dir, DIRECT_SLOTS)?, states: mapped(pin_dir, DIRECT_STATES)? })
    }

    /// Whether there is a connection in a slot.
    fn is_used(&self, slot: u32) -> bool {
        self.states.get(slot).is_some_and(|state| state != STATE_FREE && state != STATE_CONDEMNED)
    }

    /// Visits the number of each.
    pub(super) fn for_each_number(&self, mut visit: impl FnMut(u32)) {
        for slot in (0..self.states.len()).filter(|slot| self.is_used(*slot)) {
            visit(DIRECT_NUMBER | slot);
        }
    }

    /// Visits what is known of each.
    pub(crate) fn for_each(&self, mut visit: impl FnMut(u32, &Pair)) {
        for slot in 0..self.states.len() {
            let number = DIRECT_NUMBER | slot;
            if let Some(pair) = self.pair(number) {
                visit(number, &pair);
            }
        }
    }

    /// How a connection stands; `None` if there is none of this number.
    pub(crate) fn pair(&self, number: u32) -> Option<Pair> {
        let slot = slot_of(number);
        self.is_used(slot).then(|| self.slots.part(slot, offset_of!(DirectSlot, pair)))?
    }

    /// By which what is in a slot is found.
    fn tuples(&self, slot: u32) -> Option<[FourTuple; 2]> {
        let out = |side: usize| {
            let offset = offset_of!(DirectSlot, flows) + side * size_of::<Flow>() + offset_of!(Flow, out);
            self.slots.part::<FourTuple>(slot, offset)
        };
        Some([out(1)?.reversed(), out(0)?.reversed()])
    }

    /// Whether it is this connection that has its number.
    fn has(&self, key: &PairKey) -> bool {
        let slot = slot_of(key.number);
        self.is_used(slot) && self.tuples(slot) == Some(key.tuples)
    }

    /// By which a connection is found, and how it stands; `None` if there is none of this number.
    pub(crate) fn get(&self, number: u32) -> Option<(JoinedPair, Pair)> {
        let slot = slot_of(number);
        let found = self.slots.get(slot).filter(|_| self.is_used(slot))?;
        // That of one direction is what the packets of the other one get, reversed.
        let flows = [0, 1].map(|side| (found.flows[1 - side].out.reversed(), found.flows[side]));
        Some((JoinedPair { number, flows }, found.pair))
    }

    /// The connection; `None` if another one has the number.
    pub(crate) fn find(&self, key: &PairKey) -> Option<JoinedPair> {
        self.get(key.number).map(|(pair, _)| pair).filter(|pair| pair.key() == *key)
    }

    /// Makes the flows of a connection what is said, as far as it is that connection's still. A state never goes back.
    pub(crate) fn set_flows(&self, flows: &[(FourTuple, Flow); 2]) {
        let number = flows[0].1.pair;
        let key = PairKey { number, tuples: flows.map(|(tuple, _)| tuple) };
        let Some(before) = self.find(&key) else { return };
        let slot = slot_of(number);
        for (side, (_, flow)) in flows.iter().enumerate() {
            let former = before.flows[side].1;
            if former.state > flow.state {
                continue;
            }
            // Each word for itself, and only those that programs do not write at the same time.
            let set = |offset: usize, word: u32| {
                self.slots.set_word(
                    slot,
                    offset_of!(DirectSlot, flows) + side * size_of::<Flow>() + offset,
                    word,
                );
            };
            if former.next_hop != flow.next_hop {
                set(offset_of!(Flow, next_hop), flow.next_hop.family);
                for (index, word) in flow.next_hop.address.as_chunks().0.iter().enumerate() {
                    let offset =
                        offset_of!(Flow, next_hop) + offset_of!(NextHop, address) + index * size_of::<u32>();
                    set(offset, u32::from_ne_bytes(*word));
                }
            }
            let hop_limit = u32::from_ne_bytes([flow.hop_limit, flow.receiver_scale, 0, 0]);
            for (offset, is_new, word) in [
                (offset_of!(Flow, interface), former.interface != flow.interface, flow.interface),
                (offset_of!(Flow, mtu), former.mtu != flow.mtu, flow.mtu),
                (offset_of!(Flow, arrival), former.arrival != flow.arrival, flow.arrival),
                (offset_of!(Flow, hop_limit), former.hop_limit != flow.hop_limit, hop_limit),
                (offset_of!(Flow, state), former.state != flow.state, flow.state),
            ] {
                if is_new {
                    set(offset, word);
                }
            }
        }
    }
}

impl DirectTable {
    /// Opens the maps that are pinned in a directory. Programs get no slot before [`Self::begin`].
    ///
    /// # Errors
    /// They cannot be opened.
    pub(crate) fn open(
        pin_dir: &Path,
        free: Queue<MapData, u32>,
        paths: &Arc<Paths>,
    ) -> Result<Self, DatapathError> {
        let maps = DirectMaps::open(pin_dir)?;
        let counts = mapped::<DirectCounts>(pin_dir, DIRECT_COUNTS)?;
        counts.set_word(0, offset_of!(DirectCounts, half_open), 0);
        let has_slots = Arc::<AtomicBool>::default();
        let begun = (Arc::clone(&has_slots), Arc::clone(paths));
        let mut recycler = Recycler::open(pin_dir, free, begun)?;
        let (work, todo) = mpsc::channel();
        let run = move || {
            while let Ok(first) = todo.recv() {
                recycler.perform(std::iter::once(first).chain(todo.try_iter()));
            }
        };
        thread::Builder::new()
            .name("direct".to_owned())
            .spawn(run)
            .map_err(|source| failed("start the thread for", DIRECT, source))?;
        let table = Self { maps, counts, has_begun: AtomicBool::new(false), has_slots, work };
        table.limit_half_open(u32::MAX);
        Ok(table)
    }

    /// Gives the programs the slots that are free, the first time; tells whether they have them. To be called once no programs but this agent's use the maps.
    pub(crate) fn begin(&self) -> bool {
        if !self.has_begun.swap(true, Ordering::Relaxed) {
            // The thread lives as long as this value.
            let _ = self.work.send(Work::Begin);
        }
        self.has_slots.load(Ordering::Relaxed)
    }

    /// How many there may be.
    pub(crate) fn room(&self) -> u32 {
        self.maps.slots.len()
    }

    /// The connections.
    pub(super) fn maps(&self) -> &DirectMaps {
        &self.maps
    }

    /// Has a connection's slot serve another one, once nothing leads to it any more. It must be over.
    pub(crate) fn remove(&self, key: &PairKey) {
        // The slot may be another connection's by now.
        if self.maps.has(key) {
            let slot = slot_of(key.number);
            self.maps.states.set(slot, STATE_CONDEMNED);
            let _ = self.work.send(Work::Free(slot));
        }
    }

    /// Tells the programs how many connections may be half open, if there are so many local ports towards the endpoints of a listener: a flood of SYNs would take
    /// all of them.
    pub(super) fn limit_half_open(&self, ports: u32) {
        let most = (self.room().min(ports) / HALF_OPEN_PART).max(1);
        self.counts.set_word(0, offset_of!(DirectCounts, most_half_open), most);
    }

    /// Tells the programs how many connections are half open.
    pub(crate) fn set_half_open(&self, count: u32) {
        self.counts.set_word(0, offset_of!(DirectCounts, half_open), count);
    }
}

impl FlowTable {
    /// Visits the number of every direct connection.
    pub fn for_each_direct_number(&self, visit: impl FnMut(u32)) {
        if let Some(direct) = &self.direct {
            direct.maps().for_each_number(visit);
        }
    }

    /// Visits what is known of every direct connection.
    pub fn for_each_direct(&self, visit: impl FnMut(u32, &Pair)) {
        if let Some(direct) = &self.direct {
            direct.maps().for_each(visit);
        }
    }

    /// By which the direct connection of a number is found, and how it stands.
    pub fn direct(&self, number: u32) -> Option<(JoinedPair, Pair)> {
        self.direct.as_ref()?.maps().get(number)
    }

    /// Has the programs make direct connections as soon as none of a former agent's hang anywhere; tells whether they do. `None` if not, for that
    /// reason.
    pub fn begin_direct(&self) -> Option<bool> {
        self.direct.as_ref().filter(|_| self.paths.is_sole()).map(DirectTable::begin)
    }

    /// Has the agent's own sockets keep off the port of a direct connection that a former agent has left, and programs on its interfaces.
    pub fn adopt_direct(&self, pair: &JoinedPair) {
        let (endpoint, local) = pair.upstream();
        self.ports.take(local, endpoint);
        for (_, flow) in &pair.flows {
            self.paths.want(flow.interface);
        }
    }

    /// How many direct connections there may be; 0 where there may be none.
    pub fn room_for_direct(&self) -> u32 {
        self.direct.as_ref().map_or(0, DirectTable::room)
    }

    /// Tells the programs how many direct connections are half open, so that there are not too many of these.
    pub fn set_half_open(&self, count: u32) {
        if let Some(direct) = &self.direct {
            direct.set_half_open(count);
        }
    }
}

/// What removes direct connections that are over.
pub(super) struct Remover {
    maps: DirectMaps,
    /// What leads to them.
    direct: MapData,
}

impl Remover {
    /// Opens the maps that are pinned in a directory.
    ///
    /// # Errors
    /// They cannot be opened.
    pub(super) fn open(pin_dir: &Path) -> Result<Self, DatapathError> {
        Ok(Self { maps: DirectMaps::open(pin_dir)?, direct: pinned(pin_dir, DIRECT)? })
    }

    /// Marks the slot of a connection as free; yields the tuples that lead to it still, and are its alone: programs insert only what is not
    /// there. Of an attempt that was replaced, the client's leads to the one in its place.
    pub(super) fn take(&self, number: u32) -> impl Iterator<Item = FourTuple> + use<> {
        let slot = slot_of(number);
        let pair = self.maps.slots.part::<Pair>(slot, offset_of!(DirectSlot, pair));
        let found = self.maps.tuples(slot).zip(pair);
        if found.is_some() {
            self.maps.states.set(slot, STATE_FREE);
        }
        found.into_iter().flat_map(|(tuples, pair)| tuples.into_iter().skip(usize::from(pair.is_replaced())))
    }

    /// Whether a program may be just about to replace an attempt.
    fn may_be_replaced(&self, slot: u32) -> bool {
        self.maps.slots.part::<u32>(slot, offset_of!(DirectSlot, handshake)) == Some(HANDSHAKE_ASKED)
    }

    /// Has tuples lead nowhere.
    pub(super) fn forget(&self, tuples: &[FourTuple]) {
        if let Err(error) = batch::delete(self.direct.fd().as_fd(), tuples) {
            tracing::warn!(%error, "cannot remove direct connections that have ended from the BPF maps: their ports are not used again");
        }
    }
}

/// Gives the slots of connections that are over to the programs again.
struct Recycler {
    remover: Remover,
    free: Queue<MapData, u32>,
    /// Whether programs are given slots.
    has_begun: bool,
    /// Where it is noted that programs have slots, and who is told.
    begun: (Arc<AtomicBool>, Arc<Paths>),
}

impl Recycler {
    fn open(
        pin_dir: &Path,
        free: Queue<MapData, u32>,
        begun: (Arc<AtomicBool>, Arc<Paths>),
    ) -> Result<Self, DatapathError> {
        Ok(Self { remover: Remover::open(pin_dir)?, free, has_begun: false, begun })
    }

    fn perform(&mut self, todo: impl Iterator<Item = Work>) {
        let (mut leading, mut freed, mut begins) = (Vec::new(), Vec::new(), false);
        let condemned =
            |recycler: &Self, slot| recycler.remover.maps.states.get(slot) == Some(STATE_CONDEMNED);
        let todo: Vec<Work> = todo.collect();
        // A program that found it before it was condemned has replaced it then, or will not.
        if todo.iter().any(|work| matches!(work, Work::Free(slot) if self.remover.may_be_replaced(*slot))) {
            grace::wait();
        }
        for work in todo {
            match work {
                Work::Begin => {
                    begins = true;
                    self.has_begun = true;
                    // Programs that were replaced just now have ended then.
                    grace::wait();
                    self.forget_remnants();
                    for slot in 0..self.remover.maps.states.len() {
                        // A former agent has not come to the end of it, or this one not yet.
                        if condemned(self, slot) {
                            leading.extend(self.remover.take(slot));
                        }
                        if self.remover.maps.states.get(slot) == Some(STATE_FREE) {
                            freed.push(slot);
                        }
                    }
                }
                // Unless it is free already.
                Work::Free(slot) if condemned(self, slot) => {
                    leading.extend(self.remover.take(slot));
                    // Before it begins, nobody is given any; then it finds this one.
                    freed.extend(self.has_begun.then_some(slot));
                }
                Work::Free(_) => {}
            }
        }
        self.remover.forget(&leading);
        // Whoever has found one of them before goes on with it until then.
        grace::wait();
        for (number, slot) in freed.into_iter().enumerate() {
            // A million of them take a second.
            if begins && number == FIRST_SLOTS {
                self.tell_begun();
            }
            if let Err(error) = self.free.push(slot, 0) {
                tracing::warn!(%error, slot, "cannot give a slot of the BPF maps to the programs: there may be one direct connection less");
            }
        }
        if begins {
            self.tell_begun();
        }
    }

    /// Notes that programs have slots.
    fn tell_begun(&self) {
        let (has_slots, paths) = &self.begun;
        if !has_slots.swap(true, Ordering::Relaxed) {
            paths.notify();
        }
    }

    /// Removes what a former agent has left that leads to no connection: it had freed the slot, and did not come to remove the rest.
    fn forget_remnants(&self) {
        let mut remnants = Vec::new();
        let Remover { maps, direct } = &self.remover;
        let read = batch::for_each(direct.fd().as_fd(), |tuple: &FourTuple, there: &u32| {
            let (slot, direction) = (there >> 1, there & 1);
            let leads = maps.states.get(slot).is_some_and(|state| state != STATE_FREE)
                && maps.tuples(slot).is_some_and(|tuples| tuples[direction as usize] == *tuple);
            if !leads {
                remnants.push(*tuple);
            }
        });
        if let Err(error) = read {
            tracing::warn!(%error, "cannot look for what is left of a former agent's direct connections: some of their ports are not used again");
        }
        self.remover.forget(&remnants);
    }
}

fn pinned(pin_dir: &Path, name: &'static str) -> Result<MapData, DatapathError> {
    MapData::from_pin(map_path(pin_dir, name)).map_err(|source| map_error("open", name, source))
}

pub(super) fn mapped<T: Pod>(pin_dir: &Path, name: &'static str) -> Result<Mapped<T>, DatapathError> {
    Mapped::open(&pinned(pin_dir, name)?).map_err(|source| failed("map", name, source))
}

fn failed(operation: &'static str, map: &'static str, source: io::Error) -> DatapathError {
    map_error(operation, map, MapError::from(source))
}

fn map_error(operation: &'static str, map: &'static str, source: MapError) -> DatapathError {
    DatapathError { operation, map, entry: None, source: Box::new(source) }
}
