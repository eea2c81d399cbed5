//! Attaches the programs to interfaces: the classifier to the ingress, and, where connections may be joined, the guard to
//! the egress. By a tcx link (kernel 6.6 and later), which ends with the process unless it is pinned; or else by a filter of
//! the clsact queueing discipline, which does not and is replaced by the next agent.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{Link, ProgramError, SchedClassifier, TcAttachType};
use forwarder_common::packet::LinkLayer;
use forwarder_common::{PROGRAM_ETHERNET, PROGRAM_GUARD_ETHERNET, PROGRAM_GUARD_IP, PROGRAM_IP, PROGRAMS};
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

/// The interfaces that the programs hang on. Dropping it detaches them, but for what is pinned.
#[derive(Debug)]
pub(super) struct Attachments {
    kind: AttachKind,
    /// Where links are pinned, if connections may be joined: the guard then hangs at the egress too, and both stay when
    /// the process ends.
    pins: Option<PathBuf>,
    links: BTreeMap<u32, Attached>,
    /// Whether what a dead agent left was removed where it is not wanted.
    is_swept: bool,
}

#[derive(Debug)]
struct Attached {
    interface: String,
    hooks: Vec<Hook>,
}

/// What holds a program on an interface.
#[derive(Debug)]
enum Hook {
    /// Detached with this value.
    Owned(SchedClassifierLink),
    /// Detached when it is unpinned and this value is gone.
    Pinned { path: PathBuf, _link: FdLink },
}

impl Hook {
    fn detach(self, interface: &str) {
        match self {
            // It fails where the interface is gone, and the program with it.
            Self::Owned(link) => {
                if let Err(error) = link.detach() {
                    tracing::debug!(interface, error = with_causes(&error), "detaching was of no use");
                }
            }
            Self::Pinned { path, .. } => unpin(&path),
        }
    }
}

fn unpin(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove a pinned link: a program stays attached");
    }
}

impl Attachments {
    /// Nothing attached yet. `pins` is the folder for links that outlive the process.
    pub(super) fn new(kind: AttachKind, pins: Option<PathBuf>) -> Self {
        Self { kind, pins, links: BTreeMap::new(), is_swept: false }
    }

    pub(super) fn kind(&self) -> AttachKind {
        self.kind
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Attachment> {
        self.links
            .values()
            .map(|attached| Attachment { interface: attached.interface.clone(), kind: self.kind })
    }

    /// The indices of the interfaces on which all programs hang.
    pub(super) fn indices(&self) -> BTreeSet<u32> {
        self.links.keys().copied().collect()
    }

    /// Detaches from all interfaces but `wanted` and attaches to those of them where it is not yet. `present` are all
    /// interfaces.
    pub(super) fn update(
        &mut self,
        ebpf: &mut Ebpf,
        present: &[Interface],
        wanted: &[&Interface],
    ) -> Vec<AttachProblem> {
        let kept: BTreeSet<_> =
            wanted.iter().map(|interface| (interface.index, interface.name.as_str())).collect();
        if !std::mem::replace(&mut self.is_swept, true) {
            self.sweep(present, &kept);
        }
        let gone = self
            .links
            .extract_if(.., |index, attached| !kept.contains(&(*index, attached.interface.as_str())));
        for (_, Attached { interface, hooks }) in gone {
            for hook in hooks {
                hook.detach(&interface);
            }
        }
        let mut problems = Vec::new();
        for interface in wanted {
            if self.links.contains_key(&interface.index) {
                continue;
            }
            match self.attach(ebpf, interface) {
                Ok(hooks) => {
                    tracing::info!(interface = interface.name, kind = self.kind.as_str(), "attached");
                    let interface_name = interface.name.clone();
                    self.links.insert(interface.index, Attached { interface: interface_name, hooks });
                }
                Err(problem) => problems.push(problem),
            }
        }
        problems
    }

    /// Leaves what is attached to the next agent.
    pub(super) fn leave(&mut self) {
        for attached in std::mem::take(&mut self.links).into_values() {
            for hook in attached.hooks {
                // A filter of clsact is detached with its value; a pinned link is not.
                if let Hook::Owned(link) = hook {
                    std::mem::forget(link);
                }
            }
        }
    }

    /// Removes what a dead agent has left, but for what is taken over from it.
    fn sweep(&self, present: &[Interface], kept: &BTreeSet<(u32, &str)>) {
        if self.kind == AttachKind::Clsact {
            for interface in present {
                if self.pins.is_none() || !kept.contains(&(interface.index, interface.name.as_str())) {
                    sweep(&interface.name, TcAttachType::Ingress);
                    sweep(&interface.name, TcAttachType::Egress);
                }
            }
        }
        let Some(pins) = &self.pins else { return };
        let kept: BTreeSet<String> = kept
            .iter()
            .flat_map(|(index, _)| [TcAttachType::Ingress, TcAttachType::Egress].map(|s| pin_name(*index, s)))
            .collect();
        for entry in fs::read_dir(pins).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|name| !kept.contains(name)) {
                unpin(&entry.path());
            }
        }
    }

    fn attach(&self, ebpf: &mut Ebpf, interface: &Interface) -> Result<Vec<Hook>, AttachProblem> {
        let (classifier, guard) = match (interface.kind.link_layer(), interface.kind) {
            (Some(LinkLayer::Ethernet), _) => (PROGRAM_ETHERNET, PROGRAM_GUARD_ETHERNET),
            (Some(LinkLayer::Ip), _) => (PROGRAM_IP, PROGRAM_GUARD_IP),
            (None, InterfaceKind::Unsupported(arphrd)) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd });
            }
            (None, _) => {
                return Err(AttachProblem::Unsupported { interface: interface.name.clone(), arphrd: 0 });
            }
        };
        let refused = |error: ProgramError| AttachProblem::Refused {
            interface: interface.name.clone(),
            kind: self.kind,
            errno: errno_of_attach(&error).map(Errno::raw_os_error),
            reason: with_causes(&error),
        };
        // The guard first: what is redirected must not be contradicted.
        let guard = self.pins.is_some().then_some((guard, TcAttachType::Egress));
        guard
            .into_iter()
            .chain([(classifier, TcAttachType::Ingress)])
            .map(|(program, side)| self.hook(ebpf, program, interface, side).map_err(&refused))
            .collect()
    }

    /// Attaches one program, in the place of the one that a dead agent has left there.
    fn hook(
        &self,
        ebpf: &mut Ebpf,
        program: &str,
        interface: &Interface,
        side: TcAttachType,
    ) -> Result<Hook, ProgramError> {
        let (AttachKind::Tcx, Some(pins)) = (self.kind, &self.pins) else {
            return attach(ebpf, program, &interface.name, side, self.kind).map(Hook::Owned);
        };
        let path = pins.join(pin_name(interface.index, side));
        if path.exists() {
            match replace(ebpf, program, &path) {
                Ok(link) => return Ok(Hook::Pinned { path, _link: link }),
                // The link of an interface that had the index before.
                Err(error) => {
                    tracing::debug!(
                        interface = interface.name,
                        error = with_causes(&error),
                        "attaching anew"
                    );
                    unpin(&path);
                }
            }
        }
        let link = attach(ebpf, program, &interface.name, side, self.kind)?;
        let link = FdLink::try_from(link).map_err(link_error)?;
        let link = link.pin(&path).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
        Ok(Hook::Pinned { path, _link: link.into() })
    }
}

/// The name of the pinned link of an interface.
fn pin_name(index: u32, side: TcAttachType) -> String {
    match side {
        TcAttachType::Ingress => format!("{index}_ingress"),
        TcAttachType::Egress => format!("{index}_egress"),
        TcAttachType::Custom(parent) => format!("{index}_{parent}"),
    }
}

/// Puts a program into the place of the one that a pinned link holds: no packet meets none.
fn replace(ebpf: &mut Ebpf, program: &str, path: &Path) -> Result<FdLink, ProgramError> {
    let program: &mut SchedClassifier =
        ebpf.program_mut(program).ok_or(ProgramError::NotLoaded)?.try_into()?;
    let link = FdLink::from(PinnedLink::from_pin(path).map_err(link_error)?);
    let link = SchedClassifierLink::try_from(link).map_err(link_error)?;
    let id = program.attach_to_link(link)?;
    FdLink::try_from(program.take_link(id)?).map_err(link_error)
}

fn link_error(error: LinkError) -> ProgramError {
    match error {
        LinkError::SyscallError(error) => ProgramError::SyscallError(error),
        error => ProgramError::IOError(io::Error::other(error)),
    }
}

fn attach(
    ebpf: &mut Ebpf,
    program: &str,
    interface: &str,
    side: TcAttachType,
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
            sweep(interface, side);
            // Without a priority the kernel puts the filter before those that are there (`tcf_auto_prio`).
            TcAttachOptions::Netlink(NlOptions::default())
        }
    };
    let id = program.attach_with_options(interface, side, options)?;
    program.take_link(id)
}

/// Removes the filters of a dead agent.
fn sweep(interface: &str, side: TcAttachType) {
    for program in PROGRAMS {
        match qdisc_detach_program(interface, side, program) {
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
