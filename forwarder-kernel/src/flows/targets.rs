//! The endpoints of direct listeners, as the programs choose among them: the share of each is that of its part of the list.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::maps::{HashMap as BpfHashMap, Map, MapData};
use forwarder_common::direct::{DIRECT_LINKS, DIRECT_TARGETS, DirectLink, DirectTarget};
use forwarder_common::layout;
use forwarder_common::tuple::address_bytes;

use super::direct::mapped;
use super::{FlowTable, flow_maps};
use crate::fallback_reason::FallbackReason;
use crate::maps::mapped::Mapped;
use crate::maps::versions::map_path;
use crate::maps::{DatapathError, ListenerId};
use crate::net::egress_path::Via;
use crate::net::stack::Family;

/// How long a part of the list that no listener leads to any more is left as it is: no program runs for so long.
const REST: Duration = Duration::from_secs(1);
/// How many places a listener has at most, if its endpoints have different shares.
const MOST_PLACES: u64 = 1024;

/// Why new connections of a direct listener are accepted instead.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum DirectRefusal {
    /// There is no endpoint.
    #[error("it has no endpoints")]
    NoEndpoints,
    /// Packets cannot be redirected to an endpoint.
    #[error("endpoint {endpoint}: {}", .reason.as_str())]
    Endpoint {
        /// Which.
        endpoint: SocketAddr,
        /// Why.
        reason: FallbackReason,
    },
    /// Some endpoints are of IPv4 and some of IPv6: clients of neither could be sent to each.
    #[error("its endpoints are of both IPv4 and IPv6")]
    Families,
    /// It has more endpoints than there is room for.
    #[error("the map direct_targets has no room for its endpoints")]
    NoRoom,
}

/// An endpoint of a direct listener, and how many of its connections it is to have, in proportion to the others.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Share {
    /// The endpoint.
    pub endpoint: SocketAddr,
    /// The node's address to connect it from; `None` leaves the choice to the kernel.
    pub source: Option<IpAddr>,
    /// Its share, at most 2^40.
    pub share: u64,
}

/// The endpoints of all direct listeners.
pub struct Targets {
    list: Mapped<DirectTarget>,
    local: LocalAddresses,
    links: BpfHashMap<MapData, u32, DirectLink>,
    known_links: HashMap<u32, DirectLink>,
    written: BTreeMap<ListenerId, Part>,
    /// Parts that were given up, and since when nothing leads there.
    resting: Vec<(Option<Instant>, u32, u32)>,
}

/// A listener's part of the list.
struct Part {
    first: u32,
    family: usize,
    targets: Vec<DirectTarget>,
    /// How many different ones there are.
    endpoints: u32,
}

impl Part {
    fn words(&self) -> [u64; 2] {
        let mut words = [0; 2];
        words[self.family] = layout::targets(self.first, length(&self.targets));
        words
    }
}

impl Targets {
    /// Opens the maps that are pinned in a directory, and forgets what a former agent has written: no listener of this agent's leads there.
    ///
    /// # Errors
    /// They cannot be opened.
    pub fn open(pin_dir: &Path) -> Result<Self, DatapathError> {
        let links = MapData::from_pin(map_path(pin_dir, DIRECT_LINKS))
            .and_then(|map| BpfHashMap::try_from(Map::HashMap(map)))
            .map_err(|source| flow_maps::error("open", DIRECT_LINKS, None, source))?;
        let known_links = links.iter().filter_map(Result::ok).collect();
        Ok(Self {
            list: mapped(pin_dir, DIRECT_TARGETS)?,
            local: LocalAddresses::open(),
            links,
            known_links,
            written: BTreeMap::new(),
            resting: Vec::new(),
        })
    }

    /// Tells the programs by which interfaces packets may leave towards clients.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_links(&mut self, flows: &FlowTable) -> Result<(), DatapathError> {
        let link = |index: u32, mtu: u32| {
            let hop_limits = [Family::V4, Family::V6].map(|family| flows.paths.hop_limit(index, family));
            (index, DirectLink { mtu, flags: 0, hop_limits })
        };
        let wanted: HashMap<u32, DirectLink> =
            flows.paths.redirecting().into_iter().map(|(index, mtu)| link(index, mtu)).collect();
        let failed = |index, source| flow_maps::error("write to", DIRECT_LINKS, Some(index), source);
        for index in self.known_links.keys().copied().collect::<Vec<_>>() {
            if !wanted.contains_key(&index) {
                self.known_links.remove(&index);
                let _ = self.links.remove(&index);
            }
        }
        for (index, link) in wanted {
            if self.known_links.get(&index) != Some(&link) {
                self.links.insert(index, link, 0).map_err(|source| failed(index, source))?;
                self.known_links.insert(index, link);
            }
        }
        Ok(())
    }

    /// Writes the endpoints of a listener, which are connected from local ports among `ports`, if they are not what was written. Yields
    /// what leads programs there: [`ListenerValue::targets`](forwarder_common::ListenerValue::targets).
    ///
    /// # Errors
    /// Why they cannot be direct.
    pub fn set(
        &mut self,
        flows: &FlowTable,
        listener: ListenerId,
        shares: &[Share],
        ports: &RangeInclusive<u16>,
    ) -> Result<[u64; 2], DirectRefusal> {
        let (family, targets) = resolve(flows, &self.local, shares, ports)?;
        if let Some(part) = self.written.get(&listener)
            && part.family == family
            && part.targets == targets
        {
            let words = part.words();
            self.limit_half_open(flows, ports);
            return Ok(words);
        }
        let first = self.free_part(length(&targets)).ok_or(DirectRefusal::NoRoom)?;
        for (index, target) in (first..).zip(&targets) {
            self.list.set(index, *target);
        }
        let different: HashSet<_> = targets.iter().map(|target| (target.address, target.port)).collect();
        let endpoints = u32::try_from(different.len()).unwrap_or(u32::MAX);
        let part = Part { first, family, targets, endpoints };
        let words = part.words();
        self.retire(listener);
        self.written.insert(listener, part);
        self.limit_half_open(flows, ports);
        Ok(words)
    }

    /// Has half-open connections leave local ports to others, even if all of them are of the listener that has the fewest endpoints.
    fn limit_half_open(&self, flows: &FlowTable, ports: &RangeInclusive<u16>) {
        let fewest = self.written.values().map(|part| part.endpoints).min().unwrap_or(1);
        let ports = u32::try_from(ports.len()).unwrap_or(u32::MAX);
        if let Some(direct) = &flows.direct {
            direct.limit_half_open(ports.saturating_mul(fewest));
        }
    }

    /// Notes that nothing leads any more to what was given up.
    pub fn settle(&mut self) {
        for (since, ..) in &mut self.resting {
            since.get_or_insert_with(Instant::now);
        }
    }

    /// Gives up what was written for a listener, once nothing leads there: see [`Self::settle`].
    fn retire(&mut self, listener: ListenerId) {
        if let Some(part) = self.written.remove(&listener) {
            self.resting.push((None, part.first, length(&part.targets)));
        }
    }

    /// Gives up what was written for listeners that are not `kept`.
    pub fn keep(&mut self, kept: impl Fn(ListenerId) -> bool) {
        for listener in self.written.keys().copied().filter(|listener| !kept(*listener)).collect::<Vec<_>>() {
            self.retire(listener);
        }
    }

    /// Where so many places lie side by side that nothing leads to.
    fn free_part(&mut self, count: u32) -> Option<u32> {
        self.resting.retain(|(since, ..)| since.is_none_or(|since| since.elapsed() < REST));
        let written = self.written.values().map(|part| (part.first, length(&part.targets)));
        let mut taken: Vec<_> =
            written.chain(self.resting.iter().map(|(_, first, count)| (*first, *count))).collect();
        taken.sort_unstable();
        let mut first = 0;
        for (taken, length) in taken {
            if taken - first >= count {
                break;
            }
            first = taken + length;
        }
        (self.list.len().saturating_sub(first) >= count).then_some(first)
    }
}

fn length(targets: &[DirectTarget]) -> u32 {
    u32::try_from(targets.len()).unwrap_or(u32::MAX)
}

/// The places of a listener's endpoints, and the family that all of them are of.
fn resolve(
    flows: &FlowTable,
    local: &LocalAddresses,
    shares: &[Share],
    ports: &RangeInclusive<u16>,
) -> Result<(usize, Vec<DirectTarget>), DirectRefusal> {
    let shares: Vec<_> = shares.iter().filter(|share| share.share > 0).collect();
    let Some(first) = shares.first() else { return Err(DirectRefusal::NoEndpoints) };
    let is_v4 = first.endpoint.ip().to_canonical().is_ipv4();
    if shares.iter().any(|share| share.endpoint.ip().to_canonical().is_ipv4() != is_v4) {
        return Err(DirectRefusal::Families);
    }
    let target = |share: &&Share| {
        let endpoint = SocketAddr::new(share.endpoint.ip().to_canonical(), share.endpoint.port());
        let refused = |reason| DirectRefusal::Endpoint { endpoint, reason };
        let source = share.source.or_else(|| local.towards(endpoint));
        let source = source.ok_or_else(|| refused(FallbackReason::NoRoute))?;
        let unspecified = IpAddr::from(Ipv4Addr::UNSPECIFIED);
        let hop = flows.hop(unspecified, SocketAddr::new(source, 0), endpoint).map_err(refused)?;
        if hop.via == Via::Stack {
            return Err(refused(FallbackReason::PathBroken));
        }
        Ok(DirectTarget {
            address: address_bytes(endpoint.ip()),
            source: address_bytes(source),
            port: endpoint.port(),
            first_port: *ports.start(),
            ports: u32::from(ports.end() - ports.start()) + 1,
            interface: hop.interface,
            next_hop: hop.next_hop,
            mtu: hop.mtu,
            flags: 0,
            hop_limit: hop.hop_limit,
            pad: 0,
            turn: 0,
            next_other: 0,
            next_third: 0,
        })
    };
    let targets: Vec<_> = shares.iter().map(target).collect::<Result<_, _>>()?;
    let shares: Vec<_> = shares.iter().map(|share| share.share).collect();
    let mut list: Vec<_> = order(&shares).into_iter().map(|index| targets[index]).collect();
    let endpoints: Vec<_> = list.iter().map(|target| (target.address, target.port)).collect();
    for (target, [other, third]) in list.iter_mut().zip(distances(&endpoints)) {
        (target.next_other, target.next_third) = (other, third);
    }
    Ok((usize::from(!is_v4), list))
}

/// For each of a list that begins anew after its last: how many places farther another one stands, and a third; 0 if there is none.
fn distances<T: PartialEq>(list: &[T]) -> Vec<[u32; 2]> {
    let at = |index: usize| &list[index % list.len()];
    let distance = |index: usize, differs: &dyn Fn(&T) -> bool| {
        (1..list.len()).find(|distance| differs(at(index + distance))).unwrap_or_default()
    };
    let both = |index: usize| {
        let other = distance(index, &|one| one != at(index));
        let third = distance(index, &|one| one != at(index) && one != at(index + other));
        // No list has more places than the map.
        [other, third].map(|distance| u32::try_from(distance).unwrap_or_default())
    };
    (0..list.len()).map(both).collect()
}

/// Tells from which address the node would connect to an endpoint, by sockets that send nothing. They are kept open, since there may be no
/// descriptor left when it matters.
struct LocalAddresses([Option<UdpSocket>; 2]);

impl LocalAddresses {
    fn open() -> Self {
        let any: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        Self(any.map(|any| UdpSocket::bind((any, 0)).ok()))
    }

    fn towards(&self, endpoint: SocketAddr) -> Option<IpAddr> {
        let socket = self.0[usize::from(endpoint.is_ipv6())].as_ref()?;
        socket.connect(endpoint).ok()?;
        Some(socket.local_addr().ok()?.ip())
    }
}

/// In which order those with these shares have their turns, each as often as its share says, and spread over all: in each step the one
/// that is most behind its share.
fn order(shares: &[u64]) -> Vec<usize> {
    let common = shares.iter().copied().fold(0, greatest_common_divisor).max(1);
    let mut counts: Vec<u64> = shares.iter().map(|share| share / common).collect();
    let total: u64 = counts.iter().sum();
    if total > MOST_PLACES {
        // To the nearest place; nobody who has a share gets none.
        counts = counts.iter().map(|count| ((count * MOST_PLACES + total / 2) / total).max(1)).collect();
        // Nothing is more than another by what has been rounded.
        let common = counts.iter().copied().fold(0, greatest_common_divisor).max(1);
        for count in &mut counts {
            *count /= common;
        }
    }
    // As most often: a list of thousands is quickly made.
    if counts.iter().all(|count| *count == 1) {
        return (0..counts.len()).collect();
    }
    let total: u64 = counts.iter().sum();
    let total = i64::try_from(total).unwrap_or(i64::MAX);
    let mut behind = vec![0_i64; counts.len()];
    let mut order = Vec::new();
    for _ in 0..total {
        for (behind, count) in behind.iter_mut().zip(&counts) {
            *behind += i64::try_from(*count).unwrap_or(i64::MAX);
        }
        // The first of those that are equally far behind.
        let Some(next) = (0..behind.len()).rev().max_by_key(|index| behind[*index]) else { break };
        behind[next] -= total;
        order.push(next);
    }
    order
}

const fn greatest_common_divisor(mut one: u64, mut other: u64) -> u64 {
    while other != 0 {
        (one, other) = (other, one % other);
    }
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(weights: &[u64]) -> Vec<usize> {
        let order = order(weights);
        (0..weights.len()).map(|index| order.iter().filter(|one| **one == index).count()).collect()
    }

    #[test]
    fn each_has_its_turn_as_often_as_its_weight_says() {
        assert_eq!(order(&[1, 1, 1]), [0, 1, 2]);
        assert_eq!(order(&[500, 500]), [0, 1]);
        assert_eq!(order(&[3, 1]), [0, 0, 1, 0]);
        assert_eq!(shares(&[90, 10]), [9, 1]);
        assert_eq!(shares(&[0, 5]), [0, 1]);
        assert_eq!(order(&[]), Vec::<usize>::new());
    }

    #[test]
    fn from_each_place_another_endpoint_is_found() {
        assert_eq!(distances(&[1, 1, 2, 1]), [[2, 0], [1, 0], [1, 0], [3, 0]]);
        assert_eq!(distances(&[1, 2, 1, 2, 3]), [[1, 4], [1, 3], [1, 2], [1, 2], [1, 2]]);
        assert_eq!(distances(&[1, 2]), [[1, 0]; 2]);
        assert_eq!(distances(&[1, 1]), [[0; 2]; 2]);
        assert_eq!(distances(&[1]), [[0; 2]]);
        assert!(distances::<u8>(&[]).is_empty());
    }

    #[test]
    fn large_weights_keep_their_shares_to_a_thousandth() {
        let weights = [999_983_u128, 500_009, 7];
        let counts = shares(&weights.map(|weight| u64::try_from(weight).unwrap()));
        let (total, places) = (weights.iter().sum::<u128>(), counts.iter().sum::<usize>() as u128);
        for (count, weight) in counts.iter().zip(weights) {
            let off = (*count as u128 * total).abs_diff(weight * places);
            assert!(off * 1_000 <= 2 * total * places, "{count} of {places}, {weight} of {total}");
        }
        assert!(counts[2] >= 1);
    }
}
