//! The program at XDP of each interface by which clients come, where it is asked for.
//!
//! It drops what the programs at TC would drop, and sends on what they would send on, so that nothing depends on it: it ends with the process, and an
//! interface whose driver does not take it is left to TC.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::xdp::XdpMode;
use aya::programs::{ProgramError, Xdp as XdpProgram, XdpError};
use forwarder_common::{PROGRAM_XDP, PROGRAM_XDP_FORWARD, PROGRAM_XDP_FRAGS};
use forwarder_gateway::model::Xdp;
use rustix::io::Errno;

use crate::load_error::{LoadError, errno_of, with_causes};
use crate::net::interfaces::{Interface, InterfaceKind};
use crate::programs::attach::AttachProblem;
use crate::programs::uninterrupted;

mod forwarding;

use forwarding::Forwarding;

/// The programs at XDP. Dropping it detaches them.
pub(crate) struct XdpHooks {
    /// The program that the kernel takes; `None` where it takes none.
    program: Option<&'static str>,
    /// Where packets are sent on; `None` where they are dropped only.
    forwarding: Option<Forwarding>,
    links: BTreeMap<u32, Hung>,
    /// The interfaces that never take one, and are not asked again.
    unable: BTreeSet<(u32, String)>,
}

struct Hung {
    interface: String,
    _link: FdLink,
}

impl XdpHooks {
    /// Has the kernel verify a program for what is asked for: one that takes frames in pieces, where it knows of such (5.18). Returns what there is less
    /// than that, and why.
    pub(crate) fn load(ebpf: &mut Ebpf, asked: Xdp) -> (Self, Option<String>) {
        let mut hooks =
            Self { program: None, forwarding: None, links: BTreeMap::new(), unable: BTreeSet::new() };
        let mut problem = None;
        if asked == Xdp::Native {
            let forwarding = Forwarding::open(ebpf).and_then(|forwarding| {
                load(ebpf, PROGRAM_XDP_FORWARD).map(|()| forwarding).map_err(|error| error.to_string())
            });
            match forwarding {
                Ok(forwarding) => {
                    hooks.forwarding = Some(forwarding);
                    hooks.program = Some(PROGRAM_XDP_FORWARD);
                    return (hooks, None);
                }
                Err(reason) => {
                    problem = Some(format!(
                        "XDP only drops SYNs of refused clients, and TC sends all packets on: {reason}"
                    ));
                }
            }
        }
        if asked != Xdp::Off {
            let loaded = load(ebpf, PROGRAM_XDP_FRAGS).map(|()| PROGRAM_XDP_FRAGS);
            match loaded.or_else(|_| load(ebpf, PROGRAM_XDP).map(|()| PROGRAM_XDP)) {
                Ok(program) => hooks.program = Some(program),
                Err(error) => problem = Some(format!("there is no program at XDP, and TC does all: {error}")),
            }
        }
        (hooks, problem)
    }

    /// What the program on an interface does, if one hangs there.
    pub(crate) fn mode(&self, index: u32) -> Option<Xdp> {
        let sends_on = self.forwarding.as_ref().is_some_and(|forwarding| forwarding.sends_from(index));
        self.links.contains_key(&index).then_some(if sends_on { Xdp::Native } else { Xdp::Drop })
    }

    /// Whether the kernel takes a program.
    pub(crate) fn has_program(&self) -> bool {
        self.program.is_some()
    }

    /// Tells the program of an interface, the only one, as if it hung there, and as if that took packets, if it `takes` them.
    #[cfg(test)]
    pub(crate) fn pretend(&mut self, interface: &Interface, takes: bool) {
        let forwarding = self.forwarding.as_mut().expect("packets are sent on");
        let accepting = takes.then_some(interface.index).into_iter().collect();
        let failed = forwarding.tell(std::slice::from_ref(interface), &accepting, |_| true);
        // One of those there is not.
        assert!(failed.iter().all(|failure| failure.contains(&interface.name)), "{failed:?}");
    }

    /// Whether packets are sent on from where a program hangs.
    pub(crate) fn sends_on(&self) -> bool {
        self.forwarding.is_some()
    }

    /// Attaches the program to those of `wanted` that have frames, detaches it from all others, and tells it of `interfaces` (all of the node's).
    pub(crate) fn update(
        &mut self,
        ebpf: &mut Ebpf,
        wanted: &[&Interface],
        interfaces: &[Interface],
    ) -> Vec<AttachProblem> {
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
                    tracing::info!(interface, program = name, "attached at XDP");
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
                        reason: with_causes(&error) + cause,
                    });
                }
            }
        }
        if let Some(forwarding) = &mut self.forwarding {
            let links = &self.links;
            let failed = forwarding.update(interfaces, |index| links.contains_key(&index));
            problems.extend(failed.into_iter().map(AttachProblem::XdpForwarding));
        }
        problems
    }
}

/// Has the kernel verify a program.
fn load(ebpf: &mut Ebpf, name: &str) -> Result<(), LoadError> {
    program(ebpf, name)
        .and_then(|program| uninterrupted(|| program.load()))
        .map_err(|error| LoadError::new(format!("load program {name}"), name, error.into()))
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
