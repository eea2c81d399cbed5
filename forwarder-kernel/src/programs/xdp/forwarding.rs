//! From which interfaces packets are sent on at XDP, and to which.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::io;

use aya::Ebpf;
use aya::maps::xdp::DevMapHash;
use aya::maps::{Array, MapData};
use forwarder_common::layout::{XDP_INTERFACES, XDP_TAKES, XDP_TARGETS};

use rustix::io::Errno;

use crate::load_error::{LoadError, errno_of, with_causes};
use crate::maps::listeners::typed;
use crate::net::interfaces::{Interface, InterfaceKind, XdpFrames};
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
            Ok(accepting) => self.tell(interfaces, &accepting, hangs),
            Err(error) => {
                // Nobody knows who takes frames: TC sends all of them.
                let mut failed = self.tell(interfaces, &BTreeSet::new(), hangs);
                failed.push(format!("cannot ask the kernel which interfaces take frames from XDP: {error}"));
                failed
            }
        }
    }

    /// The same, where `accepting` take frames from XDP.
    pub(super) fn tell(
        &mut self,
        interfaces: &[Interface],
        accepting: &BTreeSet<u32>,
        hangs: impl Fn(u32) -> bool,
    ) -> Vec<String> {
        let mut failed = Vec::new();
        let mut targets: BTreeMap<u32, &str> = interfaces
            .iter()
            .filter(|interface| {
                interface.kind == InterfaceKind::Ethernet && accepting.contains(&interface.index)
            })
            .map(|interface| (interface.index, interface.name.as_str()))
            .collect();
        // First those that take nothing any more.
        self.known_targets.retain(|index| {
            if targets.contains_key(index) {
                return true;
            }
            match self.targets.remove(*index) {
                // One that is gone has left the map by itself.
                Err(error) if errno_of(&error) != Some(Errno::NOENT) => {
                    let interface = format!("interface {index}");
                    failed.push(refusal("stop sending packets on at XDP to", &interface, &error));
                    true
                }
                _ => false,
            }
        });
        // All of them: one that was in another namespace meanwhile has left the map by itself.
        targets.retain(|index, name| match self.targets.insert(*index, *index, None, 0) {
            Ok(()) => true,
            Err(error) => {
                failed.push(refusal("send packets on at XDP to", name, &error));
                false
            }
        });
        self.known_targets.extend(targets.keys());
        let sources = interfaces
            .iter()
            .filter(|interface| hangs(interface.index) && interface.xdp_frames != XdpFrames::Ambiguous);
        let wanted: BTreeMap<u32, (u64, &str)> = sources
            .filter_map(|interface| {
                let mut bytes = [0; 8];
                bytes.iter_mut().zip(interface.hardware_address?).for_each(|(to, byte)| *to = byte);
                let takes_back =
                    targets.contains_key(&interface.index) && interface.xdp_frames == XdpFrames::Own;
                let takes = if takes_back { XDP_TAKES } else { 0 };
                Some((interface.index, (u64::from_ne_bytes(bytes) | takes, interface.name.as_str())))
            })
            .collect();
        for index in self.known_interfaces.keys().filter(|index| !wanted.contains_key(index)) {
            // An element of an array can be written.
            let _ = self.interfaces.set(*index, 0, 0);
        }
        self.known_interfaces.retain(|index, _| wanted.contains_key(index));
        for (index, (value, name)) in wanted {
            if self.known_interfaces.get(&index) == Some(&value) {
                continue;
            }
            match self.interfaces.set(index, value, 0) {
                Ok(()) => drop(self.known_interfaces.insert(index, value)),
                // Only one whose index is beyond the end.
                Err(error) => failed.push(refusal("send packets on at XDP from", name, &error)),
            }
        }
        failed
    }
}

/// What the program could not be told of an interface.
fn refusal(what: &str, interface: &str, error: &(dyn Error + 'static)) -> String {
    format!("cannot {what} {interface}: {}", with_causes(error))
}
