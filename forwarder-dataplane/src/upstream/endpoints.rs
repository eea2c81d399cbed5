//! The endpoints of a backend: what the API says, and which of them new connections may be given. Pure.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;

use forwarder_gateway::model::Endpoints;

/// How many endpoints are tried for one connection.
const ATTEMPTS: usize = 3;

/// The endpoints of a backend at one moment.
///
/// Connections rely on all of them: one whose endpoint is no longer among them has lost it. New ones are given eligible ones: those of
/// which nobody has found out that they serve nobody.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct EndpointSet {
    all: Endpoints,
    eligible: Endpoints,
    excluded: BTreeSet<SocketAddr>,
}

impl EndpointSet {
    /// What the API says, all of it eligible. Sorted and without duplicates.
    pub fn new(all: &Endpoints) -> Self {
        Self { all: Arc::clone(all), eligible: Arc::clone(all), excluded: BTreeSet::new() }
    }

    /// What the API says.
    pub fn all(&self) -> &Endpoints {
        &self.all
    }

    /// Those that take new connections: sorted.
    pub fn eligible(&self) -> &Endpoints {
        &self.eligible
    }

    /// The endpoints that a new connection is to try, one after the other: the one whose turn it is, and the next ones. A single one
    /// comes twice.
    pub fn candidates(&self, turn: usize) -> impl Iterator<Item = SocketAddr> {
        let count = self.eligible.len();
        let attempts = if count == 0 { 0 } else { ATTEMPTS.min(count.max(2)) };
        (0..attempts).map(move |attempt| self.eligible[turn.wrapping_add(attempt) % count])
    }

    /// Whether an endpoint is one of the backend's, eligible or not.
    pub fn has(&self, endpoint: SocketAddr) -> bool {
        self.all.binary_search(&endpoint).is_ok()
    }

    /// The set after the API has changed. What was excluded and is still there stays so.
    #[must_use]
    pub fn with_all(&self, all: &Endpoints) -> Self {
        Self::new(all).without(self.excluded.iter().copied())
    }

    /// The set with these endpoints excluded, and all others eligible; those that it does not have are forgotten.
    #[must_use]
    pub fn without(&self, excluded: impl IntoIterator<Item = SocketAddr>) -> Self {
        let excluded: BTreeSet<_> = excluded.into_iter().filter(|endpoint| self.has(*endpoint)).collect();
        let eligible = if excluded.is_empty() {
            Arc::clone(&self.all)
        } else {
            self.all.iter().filter(|endpoint| !excluded.contains(endpoint)).copied().collect()
        };
        Self { all: Arc::clone(&self.all), eligible, excluded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoints(ports: &[u16]) -> Endpoints {
        ports.iter().map(|port| SocketAddr::from(([192, 0, 2, 1], *port))).collect()
    }

    #[test]
    fn endpoints_take_turns_and_the_next_ones_stand_in() {
        let ports = |known: &[u16], turn| {
            let set = EndpointSet::new(&endpoints(known));
            set.candidates(turn).map(|endpoint| endpoint.port()).collect::<Vec<_>>()
        };
        assert_eq!(ports(&[1, 2, 3, 4], 6), [3, 4, 1]);
        assert_eq!(ports(&[1, 2], 1), [2, 1]);
        assert_eq!(ports(&[1], usize::MAX), [1, 1]);
        assert!(ports(&[], 5).is_empty());
        let without = EndpointSet::new(&endpoints(&[1, 2, 3])).without(endpoints(&[2])[..].to_vec());
        assert_eq!(without.candidates(1).map(|endpoint| endpoint.port()).collect::<Vec<_>>(), [3, 1]);
    }

    #[test]
    fn what_is_excluded_stays_so_as_long_as_the_api_names_it() {
        let excluded = endpoints(&[2, 9])[..].to_vec();
        let set = EndpointSet::new(&endpoints(&[1, 2, 3])).without(excluded);
        assert_eq!((set.all(), set.eligible()), (&endpoints(&[1, 2, 3]), &endpoints(&[1, 3])));
        assert!(set.has(endpoints(&[2])[0]) && !set.has(endpoints(&[9])[0]));
        let set = set.with_all(&endpoints(&[2, 4]));
        assert_eq!(set.eligible(), &endpoints(&[4]));
        // It comes back as a new one: nothing is known against it.
        let set = set.with_all(&endpoints(&[4])).with_all(&endpoints(&[2, 4]));
        assert_eq!(set.eligible(), &endpoints(&[2, 4]));
        assert_eq!(set.without([]), EndpointSet::new(&endpoints(&[2, 4])));
    }
}
