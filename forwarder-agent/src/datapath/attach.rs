//! Attaches the classifiers to the ingress of interfaces: by a tcx link (kernel 6.6 and later), which ends with the
//! process, or else by a filter of the clsact queueing discipline, which does not and is removed by the next agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use aya::Ebpf;
use aya::programs::links::LinkOrder;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{Link, ProgramError, SchedClassifier, TcAttachType};
use forwarder_common::packet::LinkLayer;
use forwarder_common::{PROGRAM_ETHERNET, PROGRAM_IP};
use rustix::io::Errno;

use super::DatapathError;
use super::interfaces::{Interface, InterfaceKind};
use super::load_error::{errno_of, with_causes};

/// How a classifier hangs on an interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum AttachKind {
    /// By a tcx link, before the others.
    Tcx,
    /// By a filter of the clsact queueing discipline.
    Clsact,
}

impl AttachKind {
    /// What this kernel offers.
    pub(super) fn of_kernel() -> Self {
        // A kernel without tcx knows no such attach type, whatever its version says.
        match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => Self::Tcx,
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
    /// There is no classifier for such interfaces.
    #[error(
        "cannot attach to interface {interface}: its packets (ARPHRD type {arphrd}) begin neither with an Ethernet nor an IP header"
    )]
    Unsupported {
        /// The interface's name.
        interface: String,
        /// Its type, as in `linux/if_arp.h`.
        arphrd: u16,
    },
    /// An address of the node is not known to the classifiers: what is sent there is not counted for listeners on every
    /// address.
    #[error(transparent)]
    LocalAddress(#[from] DatapathError),
}

/// An interface that a classifier hangs on.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Attachment {
    /// The interface's name.
    pub interface: String,
    /// How.
    pub kind: AttachKind,
}

/// The interfaces that the classifiers hang on. Dropping it detaches them.
#[derive(Debug)]
pub(super) struct Attachments {
    kind: AttachKind,
    links: BTreeMap<u32, Attached>,
    /// Whether the filters of a dead agent were removed.
    is_swept: bool,
}

#[derive(Debug)]
struct Attached {
    interface: String,
    link: SchedClassifierLink,
}

impl Attachments {
    pub(super) fn new(kind: AttachKind) -> Self {
        Self { kind, links: BTreeMap::new(), is_swept: false }
    }

    pub(super) fn kind(&self) -> AttachKind {
        self.kind
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Attachment> {
        self.links
            .values()
            .map(|attached| Attachment { interface: attached.interface.clone(), kind: self.kind })
    }

    /// Detaches from all interfaces but `wanted` and attaches to those of them where it is not yet. `present` are all
    /// interfaces.
    pub(super) fn update(
        &mut self,
        ebpf: &mut Ebpf,
        present: &[Interface],
        wanted: &[&Interface],
    ) -> Vec<AttachProblem> {
        if self.kind == AttachKind::Clsact && !self.is_swept {
            for interface in present {
                sweep(&interface.name);
            }
            self.is_swept = true;
        }
        let kept: BTreeSet<_> =
            wanted.iter().map(|interface| (interface.index, interface.name.as_str())).collect();
        let gone = self
            .links
            .extract_if(.., |index, attached| !kept.contains(&(*index, attached.interface.as_str())));
        for (_, Attached { interface, link }) in gone {
            // It fails where the interface is gone, and the classifier with it.
            if let Err(error) = link.detach() {
                tracing::debug!(interface, error = with_causes(&error), "detaching was of no use");
            }
        }
        let mut problems = Vec::new();
        for interface in wanted {
            if self.links.contains_key(&interface.index) {
                continue;
            }
            match self.attach(ebpf, interface) {
                Ok(link) => {
                    tracing::info!(interface = interface.name, kind = self.kind.as_str(), "attached");
                    let interface_name = interface.name.clone();
                    self.links.insert(interface.index, Attached { interface: interface_name, link });
                }
                Err(problem) => problems.push(problem),
            }
        }
        problems
    }

    fn attach(&self, ebpf: &mut Ebpf, interface: &Interface) -> Result<SchedClassifierLink, AttachProblem> {
        let program = match (interface.kind.link_layer(), interface.kind) {
            (Some(LinkLayer::Ethernet), _) => PROGRAM_ETHERNET,
            (Some(LinkLayer::Ip), _) => PROGRAM_IP,
            (None, InterfaceKind::Unsupported(arphrd)) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd });
            }
            (None, _) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd: 0 });
            }
        };
        attach(ebpf, program, &interface.name, self.kind).map_err(|error| AttachProblem::Refused {
            interface: interface.name.clone(),
            kind: self.kind,
            errno: errno_of_attach(&error).map(Errno::raw_os_error),
            reason: with_causes(&error),
        })
    }
}

fn attach(
    ebpf: &mut Ebpf,
    program: &str,
    interface: &str,
    kind: AttachKind,
) -> Result<SchedClassifierLink, ProgramError> {
    let program: &mut SchedClassifier =
        ebpf.program_mut(program).ok_or(ProgramError::NotLoaded)?.try_into()?;
    let options = match kind {
        AttachKind::Tcx => TcAttachOptions::TcxOrder(LinkOrder::first()),
        AttachKind::Clsact => {
            match qdisc_add_clsact(interface).map_err(ProgramError::from) {
                Ok(()) => {}
                Err(error) if errno_of_attach(&error) == Some(Errno::EXIST) => {}
                Err(error) => return Err(error),
            }
            sweep(interface);
            // Without a priority the kernel puts the filter before those that are there (`tcf_auto_prio`).
            TcAttachOptions::Netlink(NlOptions::default())
        }
    };
    let id = program.attach_with_options(interface, TcAttachType::Ingress, options)?;
    program.take_link(id)
}

/// Removes the filters of a dead agent.
fn sweep(interface: &str) {
    for program in [PROGRAM_ETHERNET, PROGRAM_IP] {
        match qdisc_detach_program(interface, TcAttachType::Ingress, program) {
            Ok(()) => tracing::info!(interface, program, "removed the filter of a former agent"),
            Err(TcError::IoError(error)) if error.kind() == io::ErrorKind::NotFound => {}
            // Where there is no clsact, there are no filters.
            Err(error) => tracing::trace!(interface, program, error = with_causes(&error), "no filters"),
        }
    }
}

/// What the kernel said; aya keeps that of netlink to itself, but for the number.
fn errno_of_attach(error: &ProgramError) -> Option<Errno> {
    let netlink = match error {
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error().map(Errno::from_raw_os_error)
        }
        _ => None,
    };
    netlink.or_else(|| errno_of(error))
}
