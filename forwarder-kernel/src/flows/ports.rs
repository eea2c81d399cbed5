//! The local ports that offloaded pairs use, by endpoint: what the kernel does not know, since a pair has no socket.

use forwarder_runtime::lock::lock;
use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::{Mutex, MutexGuard};

/// How many ports stand in one word.
const BLOCK: u16 = 64;

/// The ports that pairs use. A hint, by which free ones are found fast: what holds is what stands in the maps.
#[derive(Debug, Default)]
pub struct TakenPorts(Mutex<HashMap<SocketAddr, HashMap<IpAddr, Ports>>>);

/// A set of ports: the words in which a bit is set, by the number of the block.
type Ports = BTreeMap<u16, u64>;

/// Where to look for a local port.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Free {
    /// No pair leads to this endpoint.
    All,
    /// The next ports in a row that no pair uses.
    Gap(RangeInclusive<u16>),
    /// Pairs use all of them.
    Nothing,
}

impl TakenPorts {
    /// Notes that a pair uses a port of this node towards an endpoint.
    pub(super) fn take(&self, local: SocketAddr, endpoint: SocketAddr) {
        let mut taken = self.lock();
        let ports = taken.entry(endpoint).or_default().entry(local.ip()).or_default();
        *ports.entry(local.port() / BLOCK).or_default() |= bit(local.port());
    }

    /// Notes that a pair uses it no longer.
    pub(super) fn free(&self, local: SocketAddr, endpoint: SocketAddr) {
        let mut taken = self.lock();
        let Some(sources) = taken.get_mut(&endpoint) else { return };
        let Some(ports) = sources.get_mut(&local.ip()) else { return };
        if let Some(bits) = ports.get_mut(&(local.port() / BLOCK)) {
            *bits &= !bit(local.port());
            if *bits == 0 {
                ports.remove(&(local.port() / BLOCK));
            }
        }
        if ports.is_empty() {
            sources.remove(&local.ip());
        }
        if sources.is_empty() {
            taken.remove(&endpoint);
        }
    }

    /// The first ports in `range` that no pair uses towards an endpoint: from `source`, or from any address of this node
    /// where the kernel is to choose it.
    pub fn find(&self, endpoint: SocketAddr, source: Option<IpAddr>, range: &RangeInclusive<u16>) -> Free {
        let taken = self.lock();
        let Some(sources) = taken.get(&endpoint) else { return Free::All };
        let used = |block: u16| {
            let meant = sources.iter().filter(|(address, _)| source.is_none_or(|source| source == **address));
            meant.filter_map(|(_, ports)| ports.get(&block)).fold(0, |used, bits| used | bits)
        };
        let Some(first) = next(|block| !used(block), range) else { return Free::Nothing };
        let end = next(used, &(first..=*range.end())).map_or(*range.end(), |taken| taken - 1);
        Free::Gap(first..=end)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, HashMap<IpAddr, Ports>>> {
        lock(&self.0)
    }
}

fn bit(port: u16) -> u64 {
    1 << (port % BLOCK)
}

/// The first port in `range` whose bit is set, given the bits of each block.
fn next(bits_of: impl Fn(u16) -> u64, range: &RangeInclusive<u16>) -> Option<u16> {
    let (start, end) = (*range.start(), *range.end());
    let mut blocks = start / BLOCK..=end / BLOCK;
    let port = blocks.find_map(|block| {
        let from = if block == start / BLOCK { start % BLOCK } else { 0 };
        let bits = bits_of(block) & (u64::MAX << from);
        let first = u16::try_from(bits.trailing_zeros()).ok().filter(|first| *first < BLOCK)?;
        Some(block * BLOCK + first)
    })?;
    range.contains(&port).then_some(port)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn address(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], port))
    }

    #[test]
    fn addresses_have_ports_of_their_own() {
        let (taken, endpoint) = (TakenPorts::default(), address(9, 80));
        assert_eq!(taken.find(endpoint, None, &(1..=9)), Free::All);
        taken.take(address(1, 5), endpoint);
        taken.take(address(2, 2), endpoint);
        let of = |last| Some(address(last, 0).ip());
        assert_eq!(taken.find(endpoint, of(1), &(5..=9)), Free::Gap(6..=9));
        assert_eq!(taken.find(endpoint, of(2), &(1..=9)), Free::Gap(1..=1));
        assert_eq!(taken.find(endpoint, of(3), &(1..=9)), Free::Gap(1..=9));
        assert_eq!(taken.find(endpoint, None, &(2..=9)), Free::Gap(3..=4));
        assert_eq!(taken.find(endpoint, None, &(5..=5)), Free::Nothing);
        assert_eq!(taken.find(address(9, 81), None, &(1..=9)), Free::All);
        taken.free(address(1, 5), endpoint);
        taken.free(address(2, 2), endpoint);
        assert_eq!(taken.find(endpoint, None, &(1..=9)), Free::All);
        assert!(taken.lock().is_empty());
    }

    proptest! {
        #[test]
        fn a_gap_is_the_first_that_there_is(
            ports in prop::collection::btree_set(prop_oneof![0..200_u16, 65_300..=u16::MAX], 1..300),
            one in prop_oneof![0..200_u16, 65_300..=u16::MAX],
            other in prop_oneof![0..200_u16, 65_300..=u16::MAX],
        ) {
            let (taken, endpoint) = (TakenPorts::default(), address(9, 80));
            for port in &ports {
                taken.take(address(1, *port), endpoint);
            }
            let range = one.min(other)..=one.max(other);
            let mut free: BTreeSet<u16> = range.clone().collect();
            free.retain(|port| !ports.contains(port));
            let expected = free.first().map(|first| {
                let end = (*first..=*range.end()).take_while(|port| free.contains(port)).last();
                Free::Gap(*first..=end.unwrap())
            });
            prop_assert_eq!(taken.find(endpoint, None, &range), expected.unwrap_or(Free::Nothing));
        }
    }
}
