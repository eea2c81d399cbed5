//! The offloaded pairs, and how all of them are looked at: with what the maps say of each, read by thousands.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use forwarder_common::flow::Pair;

use super::entry::{Entry, Incoming, Place, Served};
use forwarder_kernel::flows::FlowTable;
use forwarder_kernel::flows::joined_pair::PairKey;

/// Where fewer than such a part of what the map has room for are there, each is read by itself.
const FEW: usize = 64;
/// How many pairs look for their paths anew at a time.
const REROUTED_AT_ONCE: usize = 1_000;

/// The pairs.
#[derive(Debug, Default)]
pub(super) struct Table {
    entries: Vec<Entry>,
    /// Where each stands among them, by its number.
    index: HashMap<u32, u32>,
    places: Places,
    round: u32,
    /// How many of the first entries are still to look for their paths anew, and whether all are to once more after that.
    to_reroute: usize,
    reroutes_again: bool,
    /// Whether all direct connections are there that programs have made: those that come from now on are new.
    knows_direct: bool,
}

/// What pairs have in common, each once.
#[derive(Debug, Default)]
pub(super) struct Places(HashMap<PlaceKey, Arc<Place>>);

/// What tells a place from others: its addresses, and where the parts of [`Served`] are.
type PlaceKey = (SocketAddr, SocketAddr, IpAddr, [usize; 3]);

impl Places {
    /// The same place, shared.
    pub(super) fn intern(&mut self, place: Place) -> Arc<Place> {
        let served = place.served.as_ref().map_or([0; 3], |Served { listener, serving, upstream }| {
            let upstream = upstream.as_ref().map_or(0, |upstream| Arc::as_ptr(upstream).addr());
            [Arc::as_ptr(listener).addr(), Arc::as_ptr(serving).addr(), upstream]
        });
        let key = (place.address, place.endpoint, place.local, served);
        Arc::clone(self.0.entry(key).or_insert_with(|| Arc::new(place)))
    }

    /// Lets go of those that no pair has any more, and of what serves them.
    fn forget_unused(&mut self) {
        self.0.retain(|_, place| Arc::strong_count(place) > 1);
    }
}

impl Table {
    /// Adds a pair. Yields the one that had its number, of which nothing was heard since.
    pub(super) fn insert(&mut self, incoming: Incoming) -> Option<Entry> {
        let former = self.remove(incoming.key.number);
        let place = self.places.intern(incoming.place());
        let entry = Entry::new(incoming, place);
        let position = u32::try_from(self.entries.len()).expect("fewer pairs than numbers");
        self.index.insert(entry.number, position);
        self.entries.push(entry);
        former
    }

    /// Adds the direct connections that programs have made; tells how many.
    pub(super) fn discover(&mut self, flows: &FlowTable) -> usize {
        let mut come = Vec::new();
        flows.for_each_direct_number(|number| {
            if !self.index.contains_key(&number) {
                come.push(number);
            }
        });
        let are_former = !std::mem::replace(&mut self.knows_direct, true);
        let before = self.entries.len();
        for (pair, state) in come.into_iter().filter_map(|number| flows.direct(number)) {
            // An agent has ended it: also if a client's SYN has made it over since, without an end of its own.
            let is_live = pair.is_offloaded() || state.is_over(&pair.flows[0].1) || state.is_replaced();
            match (is_live, are_former) {
                // Who has ended it removes it too.
                (false, false) => {}
                (false, true) => flows.remove(&pair),
                (true, false) => drop(self.insert(Incoming::opened(pair.key(), state.opened))),
                (true, true) => {
                    flows.adopt_direct(&pair);
                    self.insert(Incoming::inherited(pair.key(), false));
                }
            }
        }
        self.entries.len() - before
    }

    /// Visits every pair with what the maps say of it, `None` where that is gone, and keeps those for which `visit` says so. Tells
    /// how many it does not keep.
    pub(super) fn retain(
        &mut self,
        flows: &FlowTable,
        mut visit: impl FnMut(&mut Entry, Option<&Pair>, &mut Places) -> bool,
    ) -> usize {
        if self.entries.is_empty() {
            return 0;
        }
        let Self { entries, index, places, round, .. } = self;
        *round = round.wrapping_add(1);
        let (mut visited, mut searched, mut leaving) = (0_u32, 0, Vec::new());
        let mut next = 0;
        // To go through an empty map takes as long as through a full one.
        let are_few = entries.len() < flows.room() / FEW;
        let mut look = |number: u32, state: &Pair| {
            // Most stand where the kernel lists them: after the one before.
            if entries.get(next).is_none_or(|entry| entry.number != number) {
                let Some(position) = index.get(&number) else { return };
                next = *position as usize;
                searched += 1;
            }
            let entry = &mut entries[next];
            next += 1;
            if std::mem::replace(&mut entry.round, *round) == *round {
                return;
            }
            entry.rank = visited;
            visited += 1;
            if !visit(entry, Some(state), places) {
                leaving.push(number);
            }
        };
        if !are_few && let Err(error) = flows.for_each_pair(&mut look) {
            tracing::debug!(%error, "cannot read all pairs at once: each is read by itself");
        }
        flows.for_each_direct(&mut look);
        if (visited as usize) < entries.len() {
            for entry in entries.iter_mut().filter(|entry| entry.round != *round) {
                entry.rank = u32::MAX;
                if !visit(entry, flows.pair(entry.number).as_ref(), places) {
                    leaving.push(entry.number);
                }
            }
        }
        // To find each costs more than all that is looked at.
        if searched > entries.len() / 8 && self.to_reroute == 0 {
            self.sort();
        }
        self.let_go(&leaving)
    }

    /// The same of the pairs with these numbers.
    pub(super) fn retain_of(
        &mut self,
        numbers: &[u32],
        flows: &FlowTable,
        mut visit: impl FnMut(&mut Entry, Option<&Pair>) -> bool,
    ) -> usize {
        let mut leaving = Vec::new();
        for number in numbers {
            let Some(position) = self.index.get(number) else { continue };
            if !visit(&mut self.entries[*position as usize], flows.pair(*number).as_ref()) {
                leaving.push(*number);
            }
        }
        self.let_go(&leaving)
    }

    fn let_go(&mut self, leaving: &[u32]) -> usize {
        for number in leaving {
            self.remove(*number);
        }
        if !leaving.is_empty() {
            self.shrink();
        }
        leaving.len()
    }

    /// Has the pairs stand in the order in which they were visited: that of the kernel's map, which stays the same.
    fn sort(&mut self) {
        self.entries.sort_unstable_by_key(|entry| entry.rank);
        for (position, entry) in (0..).zip(&self.entries) {
            self.index.insert(entry.number, position);
        }
    }

    /// Has every pair look for its path anew.
    pub(super) fn reroute_all(&mut self) {
        if self.to_reroute == 0 {
            self.to_reroute = self.entries.len();
        } else {
            // Those that are still to come see the change too; the others would never be reached if it began anew each time.
            self.reroutes_again = true;
        }
    }

    /// The next pairs that are to look for their paths anew. From the last to the first: where one is removed, the last one takes its place.
    pub(super) fn next_to_reroute(&mut self) -> Vec<PairKey> {
        let mut end = self.to_reroute.min(self.entries.len());
        if end == 0 && std::mem::take(&mut self.reroutes_again) {
            end = self.entries.len();
        }
        self.to_reroute = end.saturating_sub(REROUTED_AT_ONCE);
        self.entries[self.to_reroute..end].iter().map(Entry::key).collect()
    }

    fn remove(&mut self, number: u32) -> Option<Entry> {
        let position = self.index.remove(&number)?;
        let entry = self.entries.swap_remove(position as usize);
        if let Some(moved) = self.entries.get(position as usize) {
            self.index.insert(moved.number, position);
        }
        Some(entry)
    }

    /// Gives back what the pairs that have gone have taken.
    fn shrink(&mut self) {
        self.places.forget_unused();
        let length = self.entries.len();
        if self.entries.capacity() / 4 > length {
            self.entries.shrink_to(length * 2);
            self.index.shrink_to(length * 2);
        }
    }
}
