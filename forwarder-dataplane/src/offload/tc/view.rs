//! What operators see of offloaded pairs, from the maps alone where no agent runs.

use std::path::Path;
use std::thread;
use std::time::Duration;

use forwarder_common::flow::Pair;
use thiserror::Error;

use super::{Entry, Pairs, RESET_AGAIN, end, segments};
use crate::counters::End;
use crate::relay::Tier;
use crate::view::milliseconds;
use crate::view::{ConnectionState, ConnectionView, Selector};
use forwarder_kernel::clock::monotonic;
use forwarder_kernel::flows::{self, joined_pair::JoinedPair};
use forwarder_kernel::maps::DatapathError;
use forwarder_kernel::tcp::segments::{SegmentError, SegmentSocket};

impl Pairs {
    /// The connections that match. It may take a second.
    pub fn list(&self, selector: &Selector) -> Vec<ConnectionView> {
        let mut found = Vec::new();
        self.retain(|entry| {
            found.extend(self.view(entry).filter(|view| selector.matches(view)));
            true
        });
        found
    }

    /// Resets both ends of the connections that match; tells how many. It may take a second.
    pub fn reset_matching(&self, selector: &Selector) -> usize {
        let mut count = 0;
        self.retain(|entry| {
            let is_meant = self.view(entry).is_some_and(|view| selector.matches(&view));
            if is_meant {
                self.reset(&entry.pair);
                end(entry, End::ResetByOperator);
                count += 1;
            }
            !is_meant
        });
        count
    }

    /// `None` for a pair that is over.
    fn view(&self, entry: &Entry) -> Option<ConnectionView> {
        if entry.over.is_some() {
            return None;
        }
        let state = self.flows.pair(entry.pair.number)?;
        let of_pair = view(&entry.pair, &state, monotonic());
        let Some(record) = &entry.record else { return Some(of_pair) };
        Some(ConnectionView {
            upstream: of_pair.upstream,
            upstream_local: of_pair.upstream_local,
            tier: of_pair.tier,
            state: of_pair.state,
            received_bytes: of_pair.received_bytes,
            sent_bytes: of_pair.sent_bytes,
            idle_ms: milliseconds(entry.active.elapsed()),
            ..record.view()
        })
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
    let since = |time: u64| milliseconds(Duration::from_nanos(now.saturating_sub(time)));
    ConnectionView {
        listener: String::new(),
        address: address.to_string(),
        route: None,
        backend: None,
        downstream: client,
        upstream: Some(endpoint),
        upstream_local: Some(local),
        tier: Tier::Tc,
        state: if state.is_over(request) {
            ConnectionState::Closing
        } else if !pair.is_offloaded() {
            ConnectionState::Handover
        } else if state.has_fin() {
            ConnectionState::HalfClosed
        } else {
            ConnectionState::Offloaded
        },
        received_bytes: state.request.bytes,
        sent_bytes: state.response.bytes,
        age_ms: since(state.opened),
        idle_ms: since(state.request.last_seen.max(state.response.last_seen)),
        reason: None,
    }
}
