//! What is known of the interfaces that packets of flows leave by: whether the programs hang there, and who has to send them
//! so that they arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use forwarder_common::packet::LinkLayer;
use tokio::sync::Notify;

use crate::fallback_reason::FallbackReason;
use crate::flows::arrival::LooseInterfaces;
use crate::net::egress_path::{EgressPath, Via};
use crate::net::interfaces::Interface;
use crate::net::stack::{self, Family, Obstacle};
use crate::programs::hook::name_of;
use forwarder_gateway::model::Egress;
use forwarder_runtime::lock::lock;

/// How long an interface is not used by a path on which packets did not arrive.
const AVOIDANCE: Duration = Duration::from_mins(10);
/// How often it is read where the stack takes packets from: nobody tells of changes.
const FILTERS_PERIOD: Duration = Duration::from_secs(3);
/// How many clients have to find that packets do not arrive before it is taken for true of others: one alone need only not
/// answer.
const WITNESSES: usize = 3;
/// How many of them are remembered for each path.
const MOST_WITNESSES: usize = 1024;

/// The interfaces, by index. Shared by the workers, who ask, and the control loop, which attaches.
#[derive(Debug, Default)]
pub struct Paths {
    known: Mutex<Known>,
    changed: Notify,
    filters: Mutex<Filters>,
    is_sole: AtomicBool,
}

/// Where the stack takes packets from.
#[derive(Debug, Default)]
struct Filters {
    /// `None` where no programs are.
    map: Option<LooseInterfaces>,
    read: Option<Instant>,
    has_failed: bool,
}

#[derive(Debug, Default)]
struct Known {
    attached: BTreeSet<u32>,
    /// Whether packets may arrive where no program hangs.
    has_gaps: bool,
    wanted: BTreeSet<u32>,
    /// Pairs of paths by which the two ends of a pair have heard each other.
    proven: BTreeSet<[EgressPath; 2]>,
    /// The clients of the pairs of which nothing has arrived by a path, and when that was.
    broken: BTreeMap<EgressPath, BTreeMap<IpAddr, Instant>>,
    links: BTreeMap<u32, Link>,
    mtus_changed: bool,
    /// Where the stack would not send packets on, as was told.
    closed: BTreeSet<u32>,
    egress: Egress,
}

/// What the node says of an interface.
#[derive(Debug, Eq, PartialEq)]
struct Link {
    name: String,
    mtu: u32,
    begins_with: Option<LinkLayer>,
}

impl Known {
    /// Whether somebody was heard by a path.
    fn is_heard(&self, path: EgressPath) -> bool {
        self.proven.iter().any(|paths| paths.contains(&path))
    }

    /// Whether enough clients have found that nothing arrives by a path, and nobody has been heard by it.
    fn is_broken_for_all(&self, path: EgressPath) -> bool {
        !self.is_heard(path) && self.broken.get(&path).is_some_and(|clients| clients.len() >= WITNESSES)
    }

    /// Whether nothing is to leave by a path for a client, since nothing has arrived for it, or for many.
    fn is_broken(&self, path: EgressPath, client: IpAddr) -> bool {
        let Some(clients) = self.broken.get(&path) else { return false };
        let is_recent = |since: &&Instant| since.elapsed() < AVOIDANCE;
        clients.get(&witness(client)).as_ref().is_some_and(is_recent)
            || !self.is_heard(path) && clients.values().filter(is_recent).count() >= WITNESSES
    }

    /// How packets are to leave by an interface: redirected, unless they do not arrive then, or others are known to arrive
    /// by the stack.
    fn via(&self, interface: u32, client: IpAddr) -> Result<Via, FallbackReason> {
        let [redirect, stack] = [Via::Redirect, Via::Stack].map(|via| EgressPath { interface, via });
        let paths: &[EgressPath] = match self.egress {
            Egress::Auto if self.is_heard(stack) && self.is_broken_for_all(redirect) => &[stack],
            Egress::Auto => &[redirect, stack],
            Egress::Redirect => &[redirect],
            Egress::Stack => &[stack],
        };
        let path = paths.iter().find(|path| !self.is_broken(**path, client));
        path.map(|path| path.via).ok_or(FallbackReason::PathBroken)
    }
}

impl Paths {
    fn known(&self) -> MutexGuard<'_, Known> {
        lock(&self.known)
    }

    /// Chooses how packets leave, whatever the interface.
    pub fn set_egress(&self, egress: Egress) {
        self.known().egress = egress;
    }

    /// How packets of a client's pair may leave by an interface. Where no program hangs yet, one is asked for.
    ///
    /// # Errors
    /// Why not now.
    pub fn check(&self, interface: u32, client: IpAddr) -> Result<Via, FallbackReason> {
        let mut known = self.known();
        let via = known.via(interface, client)?;
        // The kernel drops what arrives without an Ethernet header and is redirected to a neighbour
        // (`__bpf_redirect_neigh`), and what leaves by an interface is answered by it.
        if via == Via::Redirect
            && known.links.get(&interface).is_some_and(|link| link.begins_with == Some(LinkLayer::Ip))
        {
            return Err(FallbackReason::NoEthernet);
        }
        // Also where they hang already, for a listener's sake: they stay for the pairs' when the listener is removed.
        let is_new = known.wanted.insert(interface);
        if known.attached.contains(&interface) {
            return Ok(via);
        }
        drop(known);
        if is_new {
            self.changed.notify_one();
        }
        Err(FallbackReason::NotAttached)
    }

    /// Whether the stack sends on what arrives by an interface and is left to it.
    ///
    /// # Errors
    /// It does not; what stands in the way is told once. Where it was to be tried only because what is redirected does not
    /// arrive, that remains the reason.
    pub fn check_stack(&self, arrival: u32, family: Family) -> Result<(), FallbackReason> {
        let name = self.known().links.get(&arrival).map(|link| link.name.clone());
        let Some(name) = name else { return Err(FallbackReason::StackClosed) };
        // Not while what is known is locked, for all workers ask: several files are read.
        let Err(obstacle) = stack::check(&name, family) else { return Ok(()) };
        let mut known = self.known();
        let is_news = known.closed.insert(arrival);
        let fallback_reason = if known.egress == Egress::Stack {
            FallbackReason::StackClosed
        } else {
            FallbackReason::PathBroken
        };
        drop(known);
        if is_news {
            warn_closed(&name, &obstacle);
        }
        Err(fallback_reason)
    }

    /// The interfaces by which packets may be redirected to anybody, and their MTUs: programs hang there, and nothing is known to get lost.
    pub fn redirecting(&self) -> Vec<(u32, u32)> {
        let known = self.known();
        let may_redirect = |index: u32| {
            let anybody = IpAddr::from(std::net::Ipv4Addr::UNSPECIFIED);
            known.via(index, anybody) == Ok(Via::Redirect)
        };
        let attached = known.links.iter().filter(|(index, link)| {
            known.attached.contains(index)
                && link.begins_with == Some(LinkLayer::Ethernet)
                && may_redirect(**index)
        });
        attached.map(|(index, link)| (*index, link.mtu)).collect()
    }

    /// Asks for programs on an interface.
    pub fn want(&self, interface: u32) {
        self.known().wanted.insert(interface);
        self.changed.notify_one();
    }

    /// Has who waits for a [change](Self::changed) look anew.
    pub(crate) fn notify(&self) {
        self.changed.notify_one();
    }

    /// The interfaces that programs were asked for on.
    pub fn wanted(&self) -> BTreeSet<u32> {
        self.known().wanted.clone()
    }

    /// Waits until programs are asked for on another interface, or have what direct connections need.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Notes that no other programs than this agent's hang anywhere: none of a former one's.
    pub(crate) fn set_sole(&self) {
        self.is_sole.store(true, Ordering::Relaxed);
    }

    /// Whether that was noted.
    pub(crate) fn is_sole(&self) -> bool {
        self.is_sole.load(Ordering::Relaxed)
    }

    /// Notes where programs hang now, and by which interfaces packets may arrive. What is known of an interface ends with it.
    pub fn set_attached(&self, attached: BTreeSet<u32>, arrivals: impl IntoIterator<Item = u32>) {
        let has_gaps = arrivals.into_iter().any(|interface| !attached.contains(&interface));
        let mut known = self.known();
        known.has_gaps = has_gaps;
        known.proven.retain(|paths| paths.iter().all(|path| attached.contains(&path.interface)));
        known.broken.retain(|path, _| attached.contains(&path.interface));
        known.closed.retain(|interface| attached.contains(interface));
        known.attached = attached;
    }

    /// Notes the names and MTUs of the node's interfaces.
    pub fn set_links(&self, interfaces: &[Interface]) {
        let link = |one: &Interface| {
            let link = Link { name: one.name.clone(), mtu: one.mtu, begins_with: one.kind.link_layer() };
            (one.index, link)
        };
        let links: BTreeMap<_, _> = interfaces.iter().map(link).collect();
        let mut known = self.known();
        // One that is down only comes back, and its pairs with it; an index that is gone may become another interface's.
        known.wanted.retain(|index| links.contains_key(index) || name_of(*index).is_some());
        if known.links != links {
            (known.links, known.mtus_changed) = (links, true);
        }
        drop(known);
        self.read_filters();
    }

    /// Has the programs take packets from where the stack does, from now on.
    pub(crate) fn set_filters(&self, map: LooseInterfaces) {
        self.filters().map = Some(map);
    }

    /// Has the programs take packets from an interface, whoever is expected behind it.
    #[cfg(test)]
    pub(crate) fn take_from_any(&self, interface: u32) {
        self.filters().map.as_mut().expect("programs are loaded").let_in(interface);
    }

    fn filters(&self) -> MutexGuard<'_, Filters> {
        lock(&self.filters)
    }

    /// Reads anew where the stack takes packets from, unless that was done just now.
    pub fn refresh_filters(&self) {
        if self.filters().read.is_none_or(|read| read.elapsed() >= FILTERS_PERIOD) {
            self.read_filters();
        }
    }

    fn read_filters(&self) {
        let names: Vec<(u32, String)> =
            self.known().links.iter().map(|(index, link)| (*index, link.name.clone())).collect();
        let mut filters = self.filters();
        filters.read = Some(Instant::now());
        let Some(map) = &mut filters.map else { return };
        let result = map.update(names.iter().map(|(index, name)| (*index, name.as_str())));
        if let Err(error) = &result
            && !filters.has_failed
        {
            tracing::warn!(%error, "cannot tell the eBPF programs which interfaces rp_filter refuses: offloaded connections may accept packets from these");
        }
        filters.has_failed = result.is_err();
    }

    /// The MTU of an interface, if it is known, in bytes from the IP header on.
    pub fn mtu(&self, interface: u32) -> Option<u32> {
        self.known().links.get(&interface).map(|link| link.mtu)
    }

    /// The TTL or hop limit of the node's own packets by an interface.
    pub fn hop_limit(&self, interface: u32, family: Family) -> u8 {
        let name = self.known().links.get(&interface).map(|link| link.name.clone());
        stack::hop_limit(&name.unwrap_or_default(), family)
    }

    /// Whether MTUs have changed since this was asked last.
    pub fn take_changed_mtus(&self) -> bool {
        std::mem::take(&mut self.known().mtus_changed)
    }

    /// Whether packets are known to arrive by two paths, one for each direction. Answers of some end may come in by another
    /// interface than those of the ends that have proven the paths: where that may be one without programs, each pair has to
    /// prove them for itself.
    pub fn is_proven(&self, paths: [EgressPath; 2]) -> bool {
        let known = self.known();
        !known.has_gaps && known.proven.contains(&paths)
    }

    /// Notes that the ends of a pair have heard each other by these paths.
    pub fn prove(&self, paths: [EgressPath; 2]) {
        self.known().proven.insert(paths);
    }

    /// Notes that what was sent by a path for a client's pair did not arrive, whichever end has not answered: the client could
    /// see to either. Tells whether nobody had found so lately.
    ///
    /// From now on nothing leaves so for this client, and for others only once several have found the same, and nobody is heard.
    pub fn avoid(&self, path: EgressPath, client: IpAddr) -> bool {
        let mut known = self.known();
        // Where others go by the stack, which is known from the clients found, these stay.
        let keeps = known.is_broken_for_all(path);
        let clients = known.broken.entry(path).or_default();
        if !keeps {
            clients.retain(|_, since| since.elapsed() < AVOIDANCE);
        }
        let is_news = clients.is_empty();
        if clients.len() < MOST_WITNESSES || clients.contains_key(&witness(client)) {
            clients.insert(witness(client), Instant::now());
        }
        is_news
    }
}

/// Who a client is: of IPv6 its network, which is one host's to choose addresses from (RFC 4291, 2.5.4).
fn witness(client: IpAddr) -> IpAddr {
    match client.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        v4 @ IpAddr::V4(_) => v4,
    }
}

fn warn_closed(interface: &str, obstacle: &Obstacle) {
    tracing::warn!(
        interface,
        %obstacle,
        "this node's stack does not forward packets that arrive by the interface: connections through it stay in userspace; set the sysctl that `obstacle` names"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::interfaces::InterfaceKind;

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    #[test]
    fn an_interface_is_asked_for_once_and_used_once_attached() {
        let paths = Paths::default();
        assert_eq!(paths.check(3, CLIENT), Err(FallbackReason::NotAttached));
        assert_eq!(paths.wanted(), BTreeSet::from([3]));
        paths.set_attached(BTreeSet::from([3]), []);
        assert_eq!(paths.check(3, CLIENT), Ok(Via::Redirect));
    }

    #[test]
    fn a_changed_mtu_is_told_once() {
        let interface = |mtu| Interface {
            index: 3,
            name: "test0".to_owned(),
            kind: InterfaceKind::Ethernet,
            addresses: Vec::new(),
            mtu,
            is_up: true,
            is_inner: false,
            hardware_address: None,
            xdp_frames: crate::net::interfaces::XdpFrames::Own,
        };
        let paths = Paths::default();
        assert_eq!((paths.mtu(3), paths.take_changed_mtus()), (None, false));
        for (mtu, is_new) in [(1500, true), (1500, false), (1400, true)] {
            paths.set_links(&[interface(mtu)]);
            assert_eq!((paths.mtu(3), paths.take_changed_mtus()), (Some(mtu), is_new));
            assert!(!paths.take_changed_mtus());
        }
    }

    const REDIRECTED: EgressPath = EgressPath { interface: 4, via: Via::Redirect };
    const BY_STACK: EgressPath = EgressPath { interface: 4, via: Via::Stack };

    #[test]
    fn what_does_not_arrive_goes_by_the_stack_and_then_not_until_the_interface_is_another() {
        let paths = Paths::default();
        paths.set_attached(BTreeSet::from([3, 4]), []);
        assert!(paths.avoid(REDIRECTED, CLIENT));
        assert!(!paths.avoid(REDIRECTED, CLIENT));
        assert_eq!((paths.check(4, CLIENT), paths.check(3, CLIENT)), (Ok(Via::Stack), Ok(Via::Redirect)));
        assert!(paths.avoid(BY_STACK, CLIENT));
        assert_eq!(paths.check(4, CLIENT), Err(FallbackReason::PathBroken));
        paths.set_attached(BTreeSet::from([3]), []);
        paths.set_attached(BTreeSet::from([3, 4]), []);
        assert_eq!(paths.check(4, CLIENT), Ok(Via::Redirect));
    }

    #[test]
    fn nothing_is_proven_while_answers_may_arrive_where_no_program_hangs() {
        let paths = Paths::default();
        let both = [EgressPath { interface: 3, ..REDIRECTED }, REDIRECTED];
        let attach = |attached: &[u32]| paths.set_attached(attached.iter().copied().collect(), [3, 4, 5]);
        attach(&[3, 4]);
        paths.prove(both);
        assert!(!paths.is_proven(both));
        attach(&[3, 4, 5]);
        assert!(paths.is_proven(both));
    }

    #[test]
    fn an_interface_that_is_gone_is_not_asked_for_any_more() {
        let paths = Paths::default();
        // `lo` is there in every namespace, up or not.
        for interface in [1, u32::MAX >> 1] {
            assert_eq!(paths.check(interface, CLIENT), Err(FallbackReason::NotAttached));
        }
        paths.set_links(&[]);
        assert_eq!(paths.wanted(), BTreeSet::from([1]));
    }

    #[test]
    fn the_stack_is_taken_by_all_only_once_several_have_found_that_redirected_packets_vanish() {
        let paths = Paths::default();
        let clients = ["192.0.2.2", "192.0.2.3", "192.0.2.4"].map(|client| client.parse().unwrap());
        paths.set_attached(BTreeSet::from([4]), []);
        paths.prove([BY_STACK, BY_STACK]);
        assert_eq!(paths.check(4, CLIENT), Ok(Via::Redirect));
        for client in clients {
            assert_eq!(paths.check(4, CLIENT), Ok(Via::Redirect));
            paths.avoid(REDIRECTED, client);
            assert_eq!(paths.check(4, client), Ok(Via::Stack));
        }
        assert_eq!(paths.check(4, CLIENT), Ok(Via::Stack));
    }

    #[test]
    fn no_client_makes_a_way_count_as_broken_for_others() {
        let paths = Paths::default();
        paths.set_attached(BTreeSet::from([4]), []);
        let own: [IpAddr; 2] = ["2001:db8::1", "2001:db8::2"].map(|client| client.parse().unwrap());
        for client in own.into_iter().cycle().take(10) {
            paths.avoid(REDIRECTED, client);
            paths.avoid(BY_STACK, client);
        }
        assert_eq!(own.map(|client| paths.check(4, client)), [Err(FallbackReason::PathBroken); 2]);
        assert_eq!(paths.check(4, CLIENT), Ok(Via::Redirect));
        // Nor do many, where others are heard.
        paths.prove([REDIRECTED, REDIRECTED]);
        for number in 0..10 {
            paths.avoid(REDIRECTED, IpAddr::from([192, 0, 2, 100 + number]));
        }
        assert_eq!(paths.check(4, CLIENT), Ok(Via::Redirect));
        assert!(paths.is_proven([REDIRECTED, REDIRECTED]));
    }

    #[test]
    fn a_setting_leaves_no_other_path() {
        for (egress, path) in [(Egress::Redirect, REDIRECTED), (Egress::Stack, BY_STACK)] {
            let paths = Paths::default();
            paths.set_egress(egress);
            paths.set_attached(BTreeSet::from([4]), []);
            assert_eq!(paths.check(4, CLIENT), Ok(path.via));
            paths.avoid(path, CLIENT);
            assert_eq!(paths.check(4, CLIENT), Err(FallbackReason::PathBroken));
        }
    }
}
