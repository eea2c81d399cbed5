//! The program at XDP of each interface by which clients come, where it is asked for.
//!
//! It only drops what the programs at TC would drop, so that nothing depends on it: it ends with the process, and an interface whose driver
//! does not take it is left to TC.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::xdp::XdpMode;
use aya::programs::{ProgramError, Xdp as XdpProgram, XdpError};
use forwarder_common::{PROGRAM_XDP, PROGRAM_XDP_FRAGS};
use forwarder_gateway::model::Xdp;
use rustix::io::Errno;

use crate::load_error::{errno_of, with_causes};
use crate::net::interfaces::{Interface, InterfaceKind};
use crate::programs::attach::AttachProblem;
use crate::programs::uninterrupted;

/// The programs at XDP. Dropping it detaches them.
#[derive(Debug)]
pub(crate) struct XdpHooks {
    mode: Xdp,
    /// The program that the kernel takes; `None` where it takes none.
    program: Option<&'static str>,
    links: BTreeMap<u32, Hung>,
    /// The interfaces that never take one, and are not asked again.
    unable: BTreeSet<(u32, String)>,
}

#[derive(Debug)]
struct Hung {
    interface: String,
    _link: FdLink,
}

impl XdpHooks {
    /// Has the kernel verify a program for this mode: one that takes frames in pieces, where it knows of such (5.18).
    ///
    /// # Errors
    /// It refuses both: nothing will hang anywhere.
    pub(crate) fn load(ebpf: &mut Ebpf, mode: Xdp) -> (Self, Result<(), ProgramError>) {
        let mut hooks = Self { mode, program: None, links: BTreeMap::new(), unable: BTreeSet::new() };
        if mode == Xdp::Off {
            return (hooks, Ok(()));
        }
        let mut loaded = Err(ProgramError::NotLoaded);
        for name in [PROGRAM_XDP_FRAGS, PROGRAM_XDP] {
            loaded = program(ebpf, name).and_then(|program| uninterrupted(|| program.load()));
            if loaded.is_ok() {
                hooks.program = Some(name);
                break;
            }
        }
        (hooks, loaded)
    }

    /// How a program hangs on an interface, if one does.
    pub(crate) fn mode(&self, index: u32) -> Option<Xdp> {
        self.links.contains_key(&index).then_some(self.mode)
    }

    /// Attaches the program to those of `wanted` that have frames, and detaches it from all others.
    pub(crate) fn update(&mut self, ebpf: &mut Ebpf, wanted: &[&Interface]) -> Vec<AttachProblem> {
        let Some(name) = self.program else { return Vec::new() };
        // Those of Pods have an address of their link only.
        let has_clients = |one: &&&Interface| one.kind == InterfaceKind::Ethernet && !one.is_inner;
        let wanted: Vec<_> = wanted.iter().filter(has_clients).collect();
        let is_wanted = |index: u32, name: &str| {
            wanted.iter().any(|interface| interface.index == index && interface.name == name)
        };
        self.links.retain(|index, hung| is_wanted(*index, &hung.interface));
        self.unable.retain(|(index, name)| is_wanted(*index, name));
        let mut problems = Vec::new();
        for Interface { index, name: interface, .. } in wanted {
            if self.links.contains_key(index) || self.unable.contains(&(*index, interface.clone())) {
                continue;
            }
            match hang(ebpf, name, *index) {
                Ok(link) => {
                    tracing::info!(interface, mode = self.mode.as_str(), "attached at XDP");
                    self.links.insert(*index, Hung { interface: interface.clone(), _link: link });
                }
                Err(error) => {
                    let errno = errno(&error);
                    if errno == Some(Errno::NODEV) {
                        continue;
                    }
                    // Somebody else's may go, and then its place is free.
                    let is_taken = matches!(errno, Some(Errno::BUSY | Errno::EXIST));
                    if !is_taken {
                        self.unable.insert((*index, interface.clone()));
                    }
                    let cause = match errno {
                        _ if is_taken => ": another program hangs there, and is left alone",
                        _ => {
                            ": its driver does not take a program, or not with its present offloads, queues and MTU; restart the agent after a change"
                        }
                    };
                    problems.push(AttachProblem::Xdp {
                        interface: interface.clone(),
                        mode: self.mode.as_str(),
                        reason: with_causes(&error) + cause,
                    });
                }
            }
        }
        problems
    }
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut XdpProgram, ProgramError> {
    ebpf.program_mut(name).ok_or(ProgramError::NotLoaded)?.try_into()
}

/// Attaches a program by a link, which ends with the process. What aya has attached by netlink instead would not: that is detached again.
fn hang(ebpf: &mut Ebpf, name: &str, index: u32) -> Result<FdLink, ProgramError> {
    let program = program(ebpf, name)?;
    let id = program.attach_to_if_index(index, XdpMode::Driver)?;
    FdLink::try_from(program.take_link(id)?).map_err(|error| ProgramError::IOError(io::Error::other(error)))
}

/// What the kernel said, by whichever of its interfaces.
fn errno(error: &ProgramError) -> Option<Errno> {
    match error {
        ProgramError::XdpError(XdpError::NetlinkError(error)) => {
            error.raw_os_error().map(Errno::from_raw_os_error)
        }
        error => errno_of(error),
    }
}
