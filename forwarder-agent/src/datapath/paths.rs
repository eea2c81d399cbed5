//! What is known of the interfaces that redirected packets use: whether the programs hang there, and whether packets arrive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::interfaces::Interface;
use crate::promote::Refusal;

/// How long an interface is avoided after what was redirected through it did not arrive.
const AVOIDANCE: Duration = Duration::from_mins(10);

/// The interfaces, by index. Shared by the workers, who ask, and the control loop, which attaches.
#[derive(Debug, Default)]
pub struct Paths {
    known: Mutex<Known>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Known {
    attached: BTreeSet<u32>,
    wanted: BTreeSet<u32>,
    /// Pairs of interfaces through which the two ends of a pair have heard each other.
    proven: BTreeSet<[u32; 2]>,
    broken: BTreeMap<u32, Instant>,
    mtus: BTreeMap<u32, u32>,
    mtus_changed: bool,
}

impl Paths {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether packets may be redirected through an interface. Where no program hangs yet, one is asked for.
    ///
    /// # Errors
    /// Why not now.
    pub fn check(&self, interface: u32) -> Result<(), Refusal> {
        let mut known = self.known();
        if known.broken.get(&interface).is_some_and(|since| since.elapsed() < AVOIDANCE) {
            return Err(Refusal::PathBroken);
        }
        if known.attached.contains(&interface) {
            return Ok(());
        }
        let is_new = known.wanted.insert(interface);
        drop(known);
        if is_new {
            self.changed.notify_one();
        }
        Err(Refusal::NotAttached)
    }

    /// Asks for programs on an interface.
    pub fn want(&self, interface: u32) {
        self.known().wanted.insert(interface);
        self.changed.notify_one();
    }

    /// The interfaces that programs were asked for on.
    pub fn wanted(&self) -> BTreeSet<u32> {
        self.known().wanted.clone()
    }

    /// Waits until programs are asked for on another interface.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Notes where programs hang now. What is known of an interface ends with it.
    pub fn set_attached(&self, attached: BTreeSet<u32>) {
        let mut known = self.known();
        known.proven.retain(|pair| pair.iter().all(|interface| attached.contains(interface)));
        known.broken.retain(|interface, since| attached.contains(interface) && since.elapsed() < AVOIDANCE);
        known.attached = attached;
    }

    /// Notes the MTUs of the node's interfaces.
    pub fn set_mtus(&self, interfaces: &[Interface]) {
        let mtus = interfaces.iter().map(|interface| (interface.index, interface.mtu)).collect();
        let mut known = self.known();
        if known.mtus != mtus {
            (known.mtus, known.mtus_changed) = (mtus, true);
        }
    }

    /// The MTU of an interface, if it is known, in bytes from the IP header on.
    pub fn mtu(&self, interface: u32) -> Option<u32> {
        self.known().mtus.get(&interface).copied()
    }

    /// Whether MTUs have changed since this was asked last.
    pub fn take_changed_mtus(&self) -> bool {
        std::mem::take(&mut self.known().mtus_changed)
    }

    /// Whether packets are known to pass between two interfaces.
    pub fn is_proven(&self, interfaces: [u32; 2]) -> bool {
        self.known().proven.contains(&interfaces)
    }

    /// Notes that the ends of a pair have heard each other through these interfaces.
    pub fn prove(&self, interfaces: [u32; 2]) {
        self.known().proven.insert(interfaces);
    }

    /// Notes that what was redirected through an interface did not arrive; tells whether that is news.
    pub fn avoid(&self, interface: u32) -> bool {
        let mut known = self.known();
        known.proven.retain(|pair| !pair.contains(&interface));
        known.broken.insert(interface, Instant::now()).is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::super::interfaces::InterfaceKind;
    use super::*;

    #[test]
    fn an_interface_is_asked_for_once_and_used_once_attached() {
        let paths = Paths::default();
        assert_eq!(paths.check(3), Err(Refusal::NotAttached));
        assert_eq!(paths.wanted(), BTreeSet::from([3]));
        paths.set_attached(BTreeSet::from([3]));
        assert_eq!(paths.check(3), Ok(()));
    }

    #[test]
    fn a_changed_mtu_is_told_once() {
        let interface = |mtu| Interface {
            index: 3,
            name: "test0".to_owned(),
            kind: InterfaceKind::Ethernet,
            addresses: Vec::new(),
            mtu,
        };
        let paths = Paths::default();
        assert_eq!((paths.mtu(3), paths.take_changed_mtus()), (None, false));
        for (mtu, is_new) in [(1500, true), (1500, false), (1400, true)] {
            paths.set_mtus(&[interface(mtu)]);
            assert_eq!((paths.mtu(3), paths.take_changed_mtus()), (Some(mtu), is_new));
            assert!(!paths.take_changed_mtus());
        }
    }

    #[test]
    fn a_broken_path_is_avoided_until_its_interface_is_another() {
        let paths = Paths::default();
        paths.set_attached(BTreeSet::from([3, 4]));
        paths.prove([3, 4]);
        assert!(paths.is_proven([3, 4]));
        assert!(paths.avoid(4));
        assert!(!paths.avoid(4));
        assert!(!paths.is_proven([3, 4]));
        assert_eq!(paths.check(4), Err(Refusal::PathBroken));
        paths.set_attached(BTreeSet::from([3]));
        paths.set_attached(BTreeSet::from([3, 4]));
        assert_eq!(paths.check(4), Ok(()));
    }
}
