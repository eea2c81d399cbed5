//! What operators see of pairs of tier `sockmap`.

use super::{Entry, SockmapPairs};
use crate::counters::End;
use crate::view::milliseconds;
use crate::view::{ConnectionState, ConnectionView, Selector};

impl SockmapPairs {
    /// The connections that match.
    pub fn list(&self, selector: &Selector) -> Vec<ConnectionView> {
        let table = self.table();
        let views = table.entries.iter().map(|(_, entry)| view(entry));
        views.filter(|view| selector.matches(view)).collect()
    }

    /// Resets both ends of the connections that match; tells how many.
    pub fn reset_matching(&self, selector: &Selector) -> usize {
        self.reset_some(usize::MAX, End::ResetByOperator, |entry| selector.matches(&view(entry)))
    }

    /// Resets at most so many pairs of those that are chosen; tells how many.
    pub(super) fn reset_some(&self, most: usize, end: End, is_chosen: impl Fn(&Entry) -> bool) -> usize {
        let mut table = self.table();
        let chosen = table.entries.iter().filter(|(_, entry)| is_chosen(entry));
        let slots: Vec<usize> = chosen.map(|(slot, _)| slot).take(most).collect();
        for slot in &slots {
            self.end(&mut table, *slot, end);
        }
        slots.len()
    }

    /// Resets pairs until no more than `most` are left, for an agent that ends.
    pub fn keep_at_most(&self, most: usize) {
        let surplus = self.count().saturating_sub(most);
        self.reset_some(surplus, End::Drained, |_| true);
    }
}

fn view(entry: &Entry) -> ConnectionView {
    let redirected = entry.pair.redirected().unwrap_or(entry.counted);
    let [from_client, from_endpoint] =
        [0, 1].map(|side| redirected[side].saturating_sub(entry.counted[side]));
    let view = entry.record.view();
    ConnectionView {
        state: if entry.pair.is_half_closed() {
            ConnectionState::HalfClosed
        } else {
            ConnectionState::Offloaded
        },
        received_bytes: view.received_bytes + from_client,
        sent_bytes: view.sent_bytes + from_endpoint,
        idle_ms: milliseconds(entry.active.elapsed()),
        ..view
    }
}
