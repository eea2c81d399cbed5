//! Attaches the programs to interfaces: the ingress programs, and, where connections may be joined, the egress programs
//! too. By a tcx link (kernel 6.6 and later), which ends with the process unless it is pinned; or else by a filter of
//! the clsact queueing discipline, which does not. What stays is pinned, and taken over by the next agent (`hook.rs`).

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use forwarder_common::packet::LinkLayer;
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, PROGRAM_EGRESS_IP, PROGRAM_ETHERNET, PROGRAM_IP};
use forwarder_gateway::model::Xdp;
use rustix::io::Errno;

use crate::load_error::with_causes;
use crate::maps::DatapathError;
use crate::net::filters::Filters;
use crate::net::interfaces::{Interface, InterfaceKind};
use crate::programs::hook::{self, Found, Hook, Place, errno_of_attach};

/// Set to `clsact` to have programs attached as on a kernel without tcx, for tests of that.
const ATTACH_BY: &str = "FORWARDER_ATTACH_BY";

/// How a program hangs on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachKind {
    /// By a tcx link, before the others.
    Tcx,
    /// By a filter of the clsact queueing discipline.
    Clsact,
}

impl AttachKind {
    /// What this kernel offers.
    pub(crate) fn of_kernel() -> Self {
        if env::var(ATTACH_BY).is_ok_and(|kind| kind == Self::Clsact.as_str()) {
            return Self::Clsact;
        }
        // A kernel without tcx knows no such attach type, whatever its version says.
        match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => Self::Tcx,
            // It has named programs that hang there already, such as those of a former agent. What they are, it tells
            // CAP_SYS_ADMIN alone (`bpf_prog_get_fd_by_id` in the kernel), which an agent need not have.
            Err(ProgramError::SyscallError(error)) if error.call == "bpf_prog_get_fd_by_id" => Self::Tcx,
            Err(_) => Self::Clsact,
        }
    }

    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
}

impl fmt::Display for AttachKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that keeps packets from being counted; forwarding goes on.
#[derive(Debug, thiserror::Error)]
pub enum AttachProblem {
    /// The kernel refuses to attach to an interface.
    #[error("cannot attach to interface {interface} by {kind}: {reason}")]
    Refused {
        /// The interface's name.
        interface: String,
        /// How it was attempted.
        kind: AttachKind,
        /// What the kernel said, as a number.
        errno: Option<i32>,
        /// The error and its causes.
        reason: String,
    },
    /// The kernel or the driver refuses a program at XDP: what is to be dropped, TC drops.
    #[error(
        "cannot attach to interface {interface} at XDP, so that TC does what would be done there: {reason}"
    )]
    Xdp {
        /// The interface's name.
        interface: String,
        /// The error and its causes.
        reason: String,
    },
    /// The program at XDP is not told by which interfaces it may send on: TC sends what it does not.
    #[error("{0}")]
    XdpForwarding(String),
    /// There is no program for such interfaces.
    #[error(
        "cannot attach to interface {interface}: its packets (ARPHRD type {arphrd}) begin neither with an Ethernet nor an IP header"
    )]
    Unsupported {
        /// The interface's name.
        interface: String,
        /// Its type, as in `linux/if_arp.h`.
        arphrd: u16,
    },
    /// An address of the node is not known to the ingress programs: what is sent there is not counted for listeners on every
    /// address.
    #[error(transparent)]
    LocalAddress(#[from] DatapathError),
}

/// An interface that an ingress program hangs on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// The interface's name.
    pub interface: String,
    /// How.
    pub kind: AttachKind,
    /// What a program at XDP does there, if one hangs there.
    pub xdp: Option<Xdp>,
}

/// The interfaces that the programs hang on. Dropping it detaches them, but for what is pinned.
#[derive(Debug)]
pub(crate) struct Attachments {
    kind: AttachKind,
    stay: Stay,
    links: BTreeMap<u32, Attached>,
    /// Whether what a dead agent left was removed where it is not wanted.
    is_swept: bool,
    /// How often programs were attached again that somebody had removed.
    restored: u64,
}

/// What outlives the process.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Stay {
    /// Nothing is meant to: there are no egress programs. A filter of clsact does all the same, and its program is pinned in the folder,
    /// where there is one, for the next agent to find it.
    Nothing(Option<PathBuf>),
    /// The programs, those of the egress too, by what is pinned in the folder: connections may be joined.
    Programs(PathBuf),
}

impl Stay {
    fn pins(&self) -> Option<&Path> {
        match self {
            Self::Nothing(pins) => pins.as_deref(),
            Self::Programs(pins) => Some(pins),
        }
    }
}

#[derive(Debug)]
struct Attached {
    interface: String,
    hooks: Vec<Hook>,
}

impl Attachments {
    /// Nothing attached yet.
    pub(crate) fn new(kind: AttachKind, stay: Stay) -> Self {
        Self { kind, stay, links: BTreeMap::new(), is_swept: false, restored: 0 }
    }

    pub(crate) fn kind(&self) -> AttachKind {
        self.kind
    }

    /// The interfaces on which programs hang, with their indices.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, Attachment)> {
        self.links.iter().map(|(index, attached)| {
            (*index, Attachment { interface: attached.interface.clone(), kind: self.kind, xdp: None })
        })
    }

    /// The indices of the interfaces on which all programs hang.
    pub(crate) fn indices(&self) -> BTreeSet<u32> {
        self.links.keys().copied().collect()
    }

    /// How often programs were attached again that somebody had removed.
    pub(crate) fn restored(&self) -> u64 {
        self.restored
    }

    /// Detaches from all interfaces but `wanted` and attaches to those of them where it is not yet, or not any more.
    pub(crate) fn update(&mut self, ebpf: &mut Ebpf, wanted: &[&Interface]) -> Vec<AttachProblem> {
        let kept: BTreeSet<_> =
            wanted.iter().map(|interface| (interface.index, interface.name.as_str())).collect();
        if !std::mem::replace(&mut self.is_swept, true)
            && let Some(pins) = self.stay.pins()
        {
            hook::sweep(pins, |index| wanted.iter().any(|interface| interface.index == index));
        }
        let gone = self
            .links
            .extract_if(.., |index, attached| !kept.contains(&(*index, attached.interface.as_str())));
        for (_, Attached { interface, hooks }) in gone {
            for hook in hooks {
                hook.detach(&interface);
            }
        }
        let removed = self.take_removed(ebpf, wanted);
        let mut problems = Vec::new();
        for interface in wanted {
            if self.links.contains_key(&interface.index) {
                continue;
            }
            let hooks = match self.attach(ebpf, interface) {
                Ok(hooks) => hooks,
                Err(AttachProblem::Refused { errno: Some(errno), reason, .. }) if is_gone(errno) => {
                    // The veth of a Pod that ends meanwhile, say.
                    tracing::debug!(interface = interface.name, reason, "the interface went away");
                    if let Some(pins) = self.stay.pins() {
                        hook::sweep(pins, |index| index != interface.index);
                    }
                    continue;
                }
                Err(problem) => {
                    problems.push(problem);
                    continue;
                }
            };
            if removed.contains(&interface.index) {
                self.restored += 1;
                tracing::warn!(
                    interface = interface.name,
                    kind = self.kind.as_str(),
                    "another program had removed the forwarder's BPF programs from this interface: attached again"
                );
            } else {
                tracing::info!(interface = interface.name, kind = self.kind.as_str(), "attached");
            }
            let interface_name = interface.name.clone();
            self.links.insert(interface.index, Attached { interface: interface_name, hooks });
        }
        problems
    }

    /// Forgets the interfaces from which somebody has removed a program; yields their indices.
    fn take_removed(&mut self, ebpf: &mut Ebpf, wanted: &[&Interface]) -> BTreeSet<u32> {
        let mut filters = match self.kind {
            AttachKind::Tcx => None,
            AttachKind::Clsact => Filters::open().ok(),
        };
        let mut removed = BTreeSet::new();
        for interface in wanted {
            let Some(attached) = self.links.get(&interface.index) else { continue };
            let Ok(places) = self.places(interface) else { continue };
            let is_held =
                |(hook, place): (&Hook, Place<'_>)| hook.look(ebpf, place, filters.as_mut()) == Found::Held;
            if attached.hooks.iter().zip(places).all(is_held) {
                continue;
            }
            removed.insert(interface.index);
            // What is left of them is taken over by what is attached now: by its pin.
            for hook in self.links.remove(&interface.index).into_iter().flat_map(|attached| attached.hooks) {
                hook.forget();
            }
        }
        removed
    }

    /// Leaves what is attached to the next agent.
    pub(crate) fn leave(&mut self) {
        for hook in std::mem::take(&mut self.links).into_values().flat_map(|attached| attached.hooks) {
            hook.leave();
        }
    }

    /// What is to hang on an interface: the egress program first, for what is redirected must not be contradicted.
    fn places<'a>(
        &self,
        interface: &'a Interface,
    ) -> Result<impl Iterator<Item = Place<'a>> + use<'a>, AttachProblem> {
        let (ingress, egress) = match (interface.kind.link_layer(), interface.kind) {
            (Some(LinkLayer::Ethernet), _) => (PROGRAM_ETHERNET, PROGRAM_EGRESS_ETHERNET),
            (Some(LinkLayer::Ip), _) => (PROGRAM_IP, PROGRAM_EGRESS_IP),
            (None, InterfaceKind::Unsupported(arphrd)) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd });
            }
            (None, _) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd: 0 });
            }
        };
        let egress = matches!(self.stay, Stay::Programs(_)).then_some((egress, TcAttachType::Egress));
        let hung = egress.into_iter().chain([(ingress, TcAttachType::Ingress)]);
        Ok(hung.map(move |(program, side)| Place { interface, side, program }))
    }

    fn attach(&self, ebpf: &mut Ebpf, interface: &Interface) -> Result<Vec<Hook>, AttachProblem> {
        let refused = |error: ProgramError| AttachProblem::Refused {
            interface: interface.name.clone(),
            kind: self.kind,
            errno: errno_of_attach(&error).map(Errno::raw_os_error),
            reason: with_causes(&error),
        };
        self.places(interface)?.map(|place| self.hang(ebpf, place).map_err(&refused)).collect()
    }

    /// Attaches one program, in the place of the one that a dead agent has left there.
    fn hang(&self, ebpf: &mut Ebpf, place: Place<'_>) -> Result<Hook, ProgramError> {
        match (self.kind, self.stay.pins()) {
            (AttachKind::Tcx, None) => Hook::own(ebpf, place),
            (AttachKind::Tcx, Some(pins)) => Hook::pin_link(ebpf, place, pins),
            (AttachKind::Clsact, Some(pins)) => Hook::pin_filter(ebpf, place, pins),
            (AttachKind::Clsact, None) => {
                Err(ProgramError::IOError(io::Error::other("there is no folder to pin its program in")))
            }
        }
    }
}

/// Whether an interface to which something could not be attached is not there any more.
fn is_gone(errno: i32) -> bool {
    Errno::from_raw_os_error(errno) == Errno::NODEV
}
