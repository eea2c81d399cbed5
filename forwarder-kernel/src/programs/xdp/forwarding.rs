//! From which interfaces packets are sent on at XDP, and to which.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;

use aya::Ebpf;
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, MapData};
use forwarder_common::layout::{XDP_INTERFACES, XDP_TAKES, XDP_TARGETS};

use crate::load_error::{LoadError, with_causes};
use crate::maps::listeners::typed;
use crate::net::interfaces::{Interface, InterfaceKind};
use crate::net::netdev::Netdev;

/// What the program at XDP is told, and what stands in its maps.
pub(super) struct Forwarding {
    interfaces: Array<MapData, u64>,
    targets: DevMapHash<MapData>,
    netdev: Netdev,
    known_interfaces: BTreeMap<u32, u64>,
    known_targets: BTreeSet<u32>,
}

impl Forwarding {
    /// Takes the maps out of what was loaded.
    ///
    /// # Errors
    /// A map is not there, or the kernel does not tell which interfaces take frames from XDP.
    pub(super) fn open(ebpf: &mut Ebpf) -> Result<Self, String> {
        let netdev = Netdev::open().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                "the kernel does not tell which interfaces take frames from XDP (Linux 6.3 and later do)"
                    .to_owned()
            }
            _ => format!("cannot ask the kernel which interfaces take frames from XDP: {error}"),
        })?;
        let open = |ebpf: &mut Ebpf| -> Result<_, LoadError> {
            Ok((
                typed(ebpf, XDP_INTERFACES, Array::try_from)?,
                typed(ebpf, XDP_TARGETS, DevMapHash::try_from)?,
            ))
        };
        let (interfaces, targets) = open(ebpf).map_err(|error| error.to_string())?;
        let (known_interfaces, known_targets) = Default::default();
        Ok(Self { interfaces, targets, netdev, known_interfaces, known_targets })
    }

    /// Whether packets that come by an interface are sent on.
    pub(super) fn sends_from(&self, index: u32) -> bool {
        self.known_interfaces.contains_key(&index)
    }

    /// Tells the program of `interfaces` (all of the node's), on some of which it `hangs`. Returns what it could not be told.
    pub(super) fn update(&mut self, interfaces: &[Interface], hangs: impl Fn(u32) -> bool) -> Vec<String> {
        match self.netdev.xdp_targets() {
            Ok(takers) => self.tell(interfaces, &takers, hangs),
            Err(error) => {
                vec![format!("cannot ask the kernel which interfaces take frames from XDP: {error}")]
            }
        }
    }

    /// The same, where `takers` take frames from XDP.
    pub(super) fn tell(
        &mut self,
        interfaces: &[Interface],
        takers: &BTreeSet<u32>,
        hangs: impl Fn(u32) -> bool,
    ) -> Vec<String> {
        let mut failed = Vec::new();
        // First those that take nothing any more.
        let targets: BTreeSet<u32> = interfaces
            .iter()
            .filter(|interface| {
                interface.kind == InterfaceKind::Ethernet && takers.contains(&interface.index)
            })
            .map(|interface| interface.index)
            .collect();
        for index in self.known_targets.difference(&targets) {
            // One that is gone has left the map by itself.
            let _ = self.targets.remove(*index);
        }
        self.known_targets.retain(|index| targets.contains(index));
        for index in targets {
            if self.known_targets.contains(&index) {
                continue;
            }
            match self.targets.insert(index, index, None, 0) {
                Ok(()) => drop(self.known_targets.insert(index)),
                Err(error) => failed.push(refusal("to", index, &error)),
            }
        }
        let wanted: BTreeMap<u32, u64> = interfaces
            .iter()
            .filter(|interface| hangs(interface.index) && !interface.has_vlans)
            .filter_map(|interface| {
                let mut bytes = [0; 8];
                bytes.iter_mut().zip(interface.hardware_address?).for_each(|(to, byte)| *to = byte);
                let is_target = self.known_targets.contains(&interface.index);
                let value = u64::from_ne_bytes(bytes) | if is_target { XDP_TAKES } else { 0 };
                Some((interface.index, value))
            })
            .collect();
        for index in self.known_interfaces.keys().filter(|index| !wanted.contains_key(index)) {
            let _ = self.interfaces.set(*index, 0, 0);
        }
        self.known_interfaces.retain(|index, _| wanted.contains_key(index));
        for (index, address) in wanted {
            if self.known_interfaces.get(&index) == Some(&address) {
                continue;
            }
            match self.interfaces.set(index, address, 0) {
                Ok(()) => drop(self.known_interfaces.insert(index, address)),
                Err(error) => failed.push(refusal("from", index, &error)),
            }
        }
        failed
    }
}

/// Why packets are not sent on at XDP to or from an interface.
fn refusal(direction: &str, index: u32, error: &(dyn Error + 'static)) -> String {
    format!(
        "cannot send packets on at XDP {direction} the interface with index {index}: {}",
        with_causes(error)
    )
}
