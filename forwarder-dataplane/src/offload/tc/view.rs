//! What operators see of offloaded pairs, from the maps alone where no agent runs.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use forwarder_common::flow::Pair;
use thiserror::Error;

use super::entry::{Entry, Place, Served};
use super::sweep::quiet;
use super::{Pairs, RESET_AGAIN, segments};
use crate::counters::End;
use crate::relay::Tier;
use crate::view::{ConnectionState, ConnectionView, Selector};
use crate::view::{canonical, milliseconds};
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::{self, joined_pair::JoinedPair};
use forwarder_kernel::maps::DatapathError;
use forwarder_kernel::tcp::segments::{SegmentError, SegmentSocket};

impl Pairs {
    /// Shows the connections that match. It may take a second.
    pub fn list(&self, selector: &Selector, mut show: impl FnMut(ConnectionView)) {
        let (mut meant, now) = (Meant::new(selector), monotonic());
        self.retain(|entry, state, _| {
            if let Some(state) = state.filter(|state| self.is_meant(entry, state, &mut meant, now)) {
                show(view_of(entry, state, now));
            }
            true
        });
    }

    /// Resets both ends of the connections that match; tells how many. It may take a second.
    pub fn reset_matching(&self, selector: &Selector) -> usize {
        let (mut meant, now, mut count) = (Meant::new(selector), monotonic(), 0);
        self.retain(|entry, state, _| {
            let is_meant = state.is_some_and(|state| self.is_meant(entry, state, &mut meant, now));
            if is_meant {
                self.reset_entry(entry, state, End::ResetByOperator);
                count += 1;
            }
            !is_meant
        });
        count
    }

    /// Whether a pair matches and is not over.
    fn is_meant(&self, entry: &Entry, state: &Pair, meant: &mut Meant<'_>, now: u64) -> bool {
        entry.over().is_none() && meant.holds(entry, state, now) && !self.is_over(entry, state)
    }
}

/// Which pairs a selector means: what they have in common is compared once.
struct Meant<'a> {
    selector: &'a Selector,
    places: HashMap<*const Place, bool>,
}

impl<'a> Meant<'a> {
    fn new(selector: &'a Selector) -> Self {
        Self { selector, places: HashMap::new() }
    }

    fn holds(&mut self, entry: &Entry, state: &Pair, now: u64) -> bool {
        let place = &entry.place;
        let upstream = Some(place.endpoint);
        self.selector.matches_ends(entry.client(), upstream, milliseconds(entry.idle_by(state, now)))
            && *self.places.entry(Arc::as_ptr(place)).or_insert_with(|| {
                let names = Names::of(place);
                self.selector.matches_names(&names.listener, names.route.as_deref(), names.backend.as_deref())
            })
    }
}

/// What operators call that which serves a pair.
struct Names {
    listener: String,
    route: Option<String>,
    backend: Option<String>,
}

impl Names {
    fn of(place: &Place) -> Self {
        let Some(Served { serving, upstream, .. }) = &place.served else {
            return Self { listener: String::new(), route: None, backend: None };
        };
        Self {
            listener: serving.listener.name.to_string(),
            route: serving.listener.route.as_ref().map(|route| route.name.to_string()),
            backend: upstream.as_ref().map(|upstream| upstream.key.to_string()),
        }
    }
}

/// What operators see of a pair that is not over.
fn view_of(entry: &Entry, state: &Pair, now: u64) -> ConnectionView {
    let Place { address, endpoint, served, .. } = &*entry.place;
    let Names { listener, route, backend } = Names::of(&entry.place);
    ConnectionView {
        listener,
        address: served
            .as_ref()
            .map_or_else(|| address.to_string(), |served| served.listener.key.to_string()),
        route,
        backend,
        downstream: canonical(entry.client()),
        upstream: Some(*endpoint),
        upstream_local: Some(entry.local()),
        tier: entry.tier(),
        state: state_of(state),
        received_bytes: state.request.bytes,
        sent_bytes: state.response.bytes,
        age_ms: milliseconds(Duration::from_nanos(now.saturating_sub(state.opened))),
        idle_ms: milliseconds(entry.idle_by(state, now)),
        reason: None,
    }
}

/// How a pair stands that is not over, and whose sockets have nothing more to do with it.
fn state_of(state: &Pair) -> ConnectionState {
    if state.offloaded == 0 {
        ConnectionState::Connecting
    } else if state.has_fin() {
        ConnectionState::HalfClosed
    } else {
        ConnectionState::Offloaded
    }
}

/// The connections that a dead agent has left in the kernel. What served them is not known there.
///
/// # Errors
/// Nothing is pinned, or it cannot be read.
pub fn from_pins(pin_dir: &Path) -> Result<Vec<ConnectionView>, DatapathError> {
    let now = monotonic();
    let pairs = flows::read(pin_dir)?;
    Ok(pairs.iter().map(|(pair, state)| view(pair, state, now)).collect())
}

/// Connections that a dead agent has left in the kernel cannot be reset.
#[derive(Debug, Error)]
pub enum ResetPinnedError {
    /// The maps do not let it.
    #[error(transparent)]
    Maps(#[from] DatapathError),
    /// Resets cannot be sent.
    #[error(transparent)]
    Segments(#[from] SegmentError),
}

/// Resets both ends of the matching connections that a dead agent has left in the kernel; tells how many, or `None` if
/// nothing is pinned.
///
/// # Errors
/// The maps, or the kernel, do not let it.
pub fn reset_pinned(pin_dir: &Path, selector: &Selector) -> Result<Option<usize>, ResetPinnedError> {
    if !flows::are_pinned(pin_dir) {
        return Ok(None);
    }
    let mut pairs = flows::read(pin_dir)?;
    let (now, socket) = (monotonic(), SegmentSocket::open()?);
    pairs.retain(|(pair, state)| selector.matches(&view(pair, state, now)));
    let ended = || pairs.iter().map(|(pair, _)| pair);
    if pairs.is_empty() {
        return Ok(Some(0));
    }
    flows::end(pin_dir, ended())?;
    let mut told = Ok(());
    for after in RESET_AGAIN {
        for (pair, state) in &pairs {
            for said in segments::last_words(pair, state, now) {
                told = told.and(said.send(&socket));
            }
        }
        // Who answers is reset by the program, as long as the pair is there.
        thread::sleep(after);
    }
    flows::forget(pin_dir, ended())?;
    told?;
    Ok(Some(pairs.len()))
}

/// What the maps tell of a pair at `now`.
fn view(pair: &JoinedPair, state: &Pair, now: u64) -> ConnectionView {
    let (client, address) = pair.downstream();
    let (endpoint, local) = pair.upstream();
    let [(_, request), _] = &pair.flows;
    ConnectionView {
        listener: String::new(),
        address: address.to_string(),
        route: None,
        backend: None,
        downstream: client,
        upstream: Some(endpoint),
        upstream_local: Some(local),
        tier: if flows::is_direct(pair.number) { Tier::Direct } else { Tier::Tc },
        state: if state.is_over(request) {
            ConnectionState::Closing
        } else if !pair.is_offloaded() {
            ConnectionState::Handover
        } else {
            state_of(state)
        },
        received_bytes: state.request.bytes,
        sent_bytes: state.response.bytes,
        age_ms: milliseconds(Duration::from_nanos(now.saturating_sub(state.opened))),
        idle_ms: milliseconds(quiet(state, now)),
        reason: None,
    }
}
