//! The local ports that endpoints are connected from: those that only the agent uses, and those that the kernel gives to any
//! process.
//!
//! An offloaded pair has no socket: the kernel takes its port for free, and may give it to a process of the node that connects
//! to the same endpoint, such as the kubelet with a probe. The SYN of that process is dropped, since its answer would be the
//! pair's. From a port that the kernel gives to nobody, this cannot happen.

use std::fs;
use std::ops::RangeInclusive;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use forwarder_runtime::lock::lock;
use forwarder_runtime::values::SourcePorts;

/// Where the kernel says from which ports it chooses.
const RANGE: &str = "/proc/sys/net/ipv4/ip_local_port_range";
/// Where it says which ports of these it leaves out.
const RESERVED: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// What it chooses from by default.
const DEFAULT_RANGE: RangeInclusive<u16> = 32_768..=60_999;
/// The first port that is the agent's own unless it is told otherwise: services listen on lower ones, `NodePorts` among them.
const FIRST_OWN: u16 = 32_768;
/// How long what was read there is taken to hold.
const RANGE_HOLDS: Duration = Duration::from_secs(1);

/// The local ports.
#[derive(Debug, Default)]
pub struct LocalPorts {
    own: SourcePorts,
    /// Whether direct connections have half of them.
    has_direct: bool,
    /// The range of the kernel, and when it was read.
    known: Mutex<Option<(Instant, RangeInclusive<u16>)>>,
}

impl LocalPorts {
    /// With these ports for the agent alone, and half of them for direct connections if there may be such: sockets and programs do not know
    /// of each other's.
    pub fn new(own: SourcePorts, has_direct: bool) -> Self {
        Self { own, has_direct, known: Mutex::default() }
    }

    /// The range that the kernel chooses from, as it was a second ago at most.
    pub(super) fn of_kernel(&self) -> RangeInclusive<u16> {
        let mut known = lock(&self.known);
        if let Some((read, range)) = &*known
            && read.elapsed() < RANGE_HOLDS
        {
            return range.clone();
        }
        let range = fs::read_to_string(RANGE).ok().and_then(|text| parse(&text)).unwrap_or(DEFAULT_RANGE);
        *known = Some((Instant::now(), range.clone()));
        range
    }

    /// The ports that only the agent's sockets use, if there are any.
    pub fn own(&self) -> Option<RangeInclusive<u16>> {
        let all = self.all()?;
        if self.has_direct { halves(&all).0 } else { Some(all) }
    }

    /// The ports that only direct connections use, if there are any.
    pub fn of_direct(&self) -> Option<RangeInclusive<u16>> {
        if self.has_direct { halves(&self.all()?).1 } else { None }
    }

    fn all(&self) -> Option<RangeInclusive<u16>> {
        match self.own {
            SourcePorts::Auto => above(&self.of_kernel()),
            SourcePorts::Range { first, last } => Some(first..=last),
            SourcePorts::Off => None,
        }
    }

    /// Warns if processes of the node may be given ports of offloaded connections; to be called once tier `tc` works.
    pub fn warn_if_shared(&self) {
        let (kernel, own) = (self.of_kernel(), self.all());
        let shared = own.as_ref().map(|own| {
            let reserved = fs::read_to_string(RESERVED).unwrap_or_default();
            shared(own, &kernel, &parse_list(&reserved))
        });
        match (self.own, shared) {
            (SourcePorts::Auto, None) => tracing::warn!(
                ?kernel,
                "no local port lies above ip_local_port_range: a process of this node that connects to an endpoint may get the port of an offloaded connection to it, and times out; reserve ports with ip_local_reserved_ports and name them in --source-ports"
            ),
            (_, Some(shared)) if shared > 0 => tracing::warn!(
                ?own,
                shared,
                "some of --source-ports lie in ip_local_port_range: a process of this node that connects to an endpoint may get the port of an offloaded connection to it, and times out; reserve them with ip_local_reserved_ports"
            ),
            (SourcePorts::Auto | SourcePorts::Range { .. } | SourcePorts::Off, _) => {}
        }
    }
}

/// Both halves of a range, if they have a port each.
fn halves(all: &RangeInclusive<u16>) -> (Option<RangeInclusive<u16>>, Option<RangeInclusive<u16>>) {
    let (first, last) = (*all.start(), *all.end());
    let half = (u32::from(last) - u32::from(first)).div_ceil(2);
    let middle = first.saturating_add(u16::try_from(half).unwrap_or(u16::MAX));
    ((first < middle).then(|| first..=middle - 1), (middle <= last).then_some(middle..=last))
}

/// How many ports of `own` the kernel gives to others.
fn shared(
    own: &RangeInclusive<u16>,
    kernel: &RangeInclusive<u16>,
    reserved: &[RangeInclusive<u16>],
) -> usize {
    let is_reserved = |port: &u16| reserved.iter().any(|range| range.contains(port));
    own.clone().filter(|port| kernel.contains(port) && !is_reserved(port)).count()
}

/// Ports and ranges of them, as `ip_local_reserved_ports` has them.
fn parse_list(text: &str) -> Vec<RangeInclusive<u16>> {
    let parts = text.trim().split(',').filter_map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    });
    parts.collect()
}

/// What lies above the range that the kernel chooses from.
fn above(range: &RangeInclusive<u16>) -> Option<RangeInclusive<u16>> {
    range.end().checked_add(1).map(|next| next.max(FIRST_OWN)..=u16::MAX)
}

fn parse(text: &str) -> Option<RangeInclusive<u16>> {
    let (low, high) = text.trim().split_once(char::is_whitespace)?;
    let (low, high) = (low.parse().ok()?, high.trim().parse().ok()?);
    (low <= high).then_some(low..=high)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_range_is_understood() {
        assert_eq!(parse("32768\t60999\n"), Some(32_768..=60_999));
        assert_eq!(parse("1 65535"), Some(1..=u16::MAX));
        for bad in ["", "1", "2 1", "a b", "1 70000"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_agents_own_ports_lie_above_those_of_the_kernel() {
        assert_eq!(above(&DEFAULT_RANGE), Some(61_000..=u16::MAX));
        assert_eq!(above(&(20_000..=20_999)), Some(FIRST_OWN..=u16::MAX));
        assert_eq!(above(&(1024..=u16::MAX)), None);
        let own = |chosen| LocalPorts::new(chosen, false).own();
        assert_eq!(own(SourcePorts::Range { first: 40_000, last: 50_000 }), Some(40_000..=50_000));
        assert_eq!(own(SourcePorts::Off), None);
    }

    #[test]
    fn direct_connections_have_ports_of_their_own() {
        let ports = |first, last| LocalPorts::new(SourcePorts::Range { first, last }, true);
        let both = |ports: LocalPorts| (ports.own(), ports.of_direct());
        assert_eq!(both(ports(40_000, 40_003)), (Some(40_000..=40_001), Some(40_002..=40_003)));
        assert_eq!(both(ports(40_000, 40_002)), (Some(40_000..=40_000), Some(40_001..=40_002)));
        assert_eq!(both(ports(65_535, 65_535)), (None, Some(65_535..=65_535)));
        assert_eq!(both(LocalPorts::new(SourcePorts::Off, true)), (None, None));
        assert_eq!(LocalPorts::new(SourcePorts::Auto, false).of_direct(), None);
    }

    #[test]
    fn ports_that_are_not_reserved_are_shared() {
        let reserved = parse_list("9000,40000-40009\n");
        assert_eq!(reserved, [9000..=9000, 40_000..=40_009]);
        assert_eq!(parse_list("\n"), []);
        assert_eq!(shared(&(40_000..=40_009), &DEFAULT_RANGE, &reserved), 0);
        assert_eq!(shared(&(40_005..=40_019), &DEFAULT_RANGE, &reserved), 10);
        assert_eq!(shared(&(61_000..=u16::MAX), &DEFAULT_RANGE, &reserved), 0);
    }
}
