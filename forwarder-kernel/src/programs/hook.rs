//! One program on one side of one interface, and the pin by which the next agent finds it.
//!
//! Where the kernel has tcx, the link is pinned. With clsact the program is: a filter is this installation's if the id of its
//! program is that of a pinned one (ADR 16).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::links::{FdLink, LinkError, LinkOrder, PinnedLink};
use aya::programs::tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, qdisc_add_clsact};
use aya::programs::{Link, ProgramError, ProgramInfo, SchedClassifier, TcAttachType};
use rustix::io::Errno;

use crate::load_error::{errno_of, with_causes};
use crate::net::filters::{Filter, Filters};
use crate::net::interfaces::Interface;

/// `BPF_PROG_TYPE_SCHED_CLS` in `linux/bpf.h`. No link of ours has a type of that number.
const SCHED_CLS: u32 = 3;

/// Behind the name of a pin that takes the place of another once its program does.
const NEXT: &str = "_next";

/// What holds a program on a side of an interface.
#[derive(Debug)]
pub(super) enum Hook {
    /// By a tcx link that is detached with this value.
    Owned(SchedClassifierLink),
    /// By a tcx link that is detached when it is unpinned and this value is gone.
    Pinned { path: PathBuf, _link: FdLink },
    /// By a filter that is detached with this value. `path` is where its program is pinned.
    Filter { path: PathBuf, link: SchedClassifierLink, program: u32 },
}

/// What has become of a hook.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Found {
    /// It holds its program, as far as can be known.
    Held,
    /// Somebody has removed it.
    Removed,
}

/// Where a program is to hang.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) interface: &'a Interface,
    pub(super) side: TcAttachType,
    /// The program's name.
    pub(super) program: &'static str,
}

impl Hook {
    /// Hangs a program by a tcx link that ends with this process.
    pub(super) fn own(ebpf: &mut Ebpf, place: Place<'_>) -> Result<Self, ProgramError> {
        attach_link(ebpf, place).map(Self::Owned)
    }

    /// Hangs a program by a pinned tcx link, in the place of the one that a dead agent has left there.
    pub(super) fn pin_link(ebpf: &mut Ebpf, place: Place<'_>, pins: &Path) -> Result<Self, ProgramError> {
        let path = pins.join(pin_name(place.interface.index, place.side));
        let mut former = None;
        if path.exists() {
            match replace(ebpf, place.program, &path) {
                Ok(link) => return Ok(Self::Pinned { path, _link: link }),
                // The link of an interface that had the index before, or one that somebody has detached.
                Err(error) => {
                    let interface = &place.interface.name;
                    tracing::debug!(interface, error = with_causes(&error), "attaching again");
                    former = pinned_program(&path);
                    unpin(&path);
                }
            }
        }
        let link = FdLink::try_from(attach_link(ebpf, place)?).map_err(link_error)?;
        let link = link.pin(&path).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
        // What an agent has left that attached by clsact.
        if let Some(former) = former {
            detach_filters(place.interface.index, &place.interface.name, place.side, former);
        }
        Ok(Self::Pinned { path, _link: link.into() })
    }

    /// Hangs a program by a filter, in the place of the one that a dead agent has left there: the kernel replaces a filter's
    /// program at once (`cls_bpf_change`).
    pub(super) fn pin_filter(ebpf: &mut Ebpf, place: Place<'_>, pins: &Path) -> Result<Self, ProgramError> {
        let Place { interface: Interface { index, name, .. }, side, .. } = place;
        match qdisc_add_clsact(name).map_err(ProgramError::from) {
            Ok(()) => {}
            Err(error) if errno_of_attach(&error) == Some(Errno::EXIST) => {}
            Err(error) => return Err(error),
        }
        let path = pins.join(pin_name(*index, side));
        let next = pins.join(pin_name(*index, side) + NEXT);
        let filters = Filters::open().and_then(|mut filters| filters.list(*index, side))?;
        settle(&path, &next, &filters)?;
        let mut own = filters_of(&filters, pinned_program(&path));
        let program: &mut SchedClassifier =
            ebpf.program_mut(place.program).ok_or(ProgramError::NotLoaded)?.try_into()?;
        let number = program.info()?.id();
        // Pinned before it is attached: whoever comes after a crash knows both programs that may hang there.
        program.pin(&next).map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
        let attached = if let Some(former) = own.next() {
            let link = former.link(name, side).map_err(ProgramError::from);
            link.and_then(|link| program.attach_to_link(link))
        } else {
            // Without a priority the kernel puts the filter before those that are there (`tcf_auto_prio`).
            let options = TcAttachOptions::Netlink(NlOptions::default());
            program.attach_with_options(name, side, options)
        };
        let link = match attached.and_then(|id| program.take_link(id)) {
            Ok(link) => link,
            Err(error) => {
                unpin(&next);
                return Err(error);
            }
        };
        fs::rename(&next, &path)?;
        Ok(Self::Filter { path, link, program: number })
    }

    /// Whether it still holds its program on an interface.
    pub(super) fn look(&self, ebpf: &mut Ebpf, place: Place<'_>, filters: Option<&mut Filters>) -> Found {
        match (self, filters) {
            // Its link cannot be detached but by this process.
            (Self::Owned(_), _) | (Self::Filter { .. }, None) => Found::Held,
            // To replace a program by itself changes nothing; a link that is detached refuses it (`tcx_link_update`).
            (Self::Pinned { path, .. }, _) => match replace(ebpf, place.program, path) {
                Ok(_) => Found::Held,
                Err(_) => Found::Removed,
            },
            (Self::Filter { link, program, .. }, Some(filters)) => {
                let (Ok(priority), Ok(handle)) = (link.priority(), link.handle()) else { return Found::Held };
                match filters.program(place.interface.index, place.side, priority, handle.into()) {
                    Ok(found) if found != *program => Found::Removed,
                    // No such filter; or no clsact.
                    Err(Errno::NOENT | Errno::INVAL) => Found::Removed,
                    Ok(_) | Err(_) => Found::Held,
                }
            }
        }
    }

    /// Forgets what is gone already.
    pub(super) fn forget(self) {
        if let Self::Filter { link, .. } = self {
            // It would detach whatever has its numbers now.
            std::mem::forget(link);
        }
    }

    /// Takes the program off the interface.
    pub(super) fn detach(self, interface: &str) {
        let (link, path) = match self {
            Self::Owned(link) => (Some(link), None),
            Self::Pinned { path, .. } => (None, Some(path)),
            Self::Filter { path, link, .. } => (Some(link), Some(path)),
        };
        // It fails where the interface is gone, and the program with it.
        if let Some(Err(error)) = link.map(Link::detach) {
            tracing::debug!(interface, error = with_causes(&error), "cannot detach a program");
        }
        if let Some(path) = path {
            unpin(&path);
        }
    }

    /// Leaves it to the next agent, if it can outlive this one.
    pub(super) fn leave(self) {
        match self {
            Self::Owned(link) | Self::Filter { link, .. } => std::mem::forget(link),
            Self::Pinned { .. } => {}
        }
    }
}

/// Ends what a dead agent had begun: of two pins of one place, the one remains whose program hangs there.
fn settle(path: &Path, next: &Path, filters: &[Filter]) -> io::Result<()> {
    let Some(program) = pinned_program(next) else { return Ok(()) };
    if filters.iter().any(|filter| filter.program == program) {
        fs::rename(next, path)
    } else {
        fs::remove_file(next)
    }
}

fn filters_of(filters: &[Filter], program: Option<u32>) -> impl Iterator<Item = &Filter> {
    filters.iter().filter(move |filter| Some(filter.program) == program)
}

/// The id of the program that is pinned at a path; `None` if something else is, or nothing.
pub(super) fn pinned_program(path: &Path) -> Option<u32> {
    let info = ProgramInfo::from_pin(path).ok()?;
    (info.program_type() as u32 == SCHED_CLS).then(|| info.id())
}

/// The name of the pin of a place.
fn pin_name(index: u32, side: TcAttachType) -> String {
    match side {
        TcAttachType::Ingress => format!("{index}_ingress"),
        TcAttachType::Egress => format!("{index}_egress"),
        TcAttachType::Custom(parent) => format!("{index}_{parent}"),
    }
}

/// The place of a pin: the index of an interface, and its side.
fn place_of(pin: &str) -> Option<(u32, TcAttachType)> {
    let (index, side) = pin.strip_suffix(NEXT).unwrap_or(pin).split_once('_')?;
    let side = match side {
        "ingress" => TcAttachType::Ingress,
        "egress" => TcAttachType::Egress,
        _ => return None,
    };
    Some((index.parse().ok()?, side))
}

/// Whether a pin is that of an egress program.
pub(super) fn is_egress(pin: &str) -> bool {
    matches!(place_of(pin), Some((_, TcAttachType::Egress)))
}

/// Removes what a dead agent has left in `pins`, but on the interfaces that are kept.
pub(super) fn sweep(pins: &Path, is_kept: impl Fn(u32) -> bool) {
    for entry in fs::read_dir(pins).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let place = name.to_str().and_then(place_of);
        if place.is_some_and(|(index, _)| is_kept(index)) {
            continue;
        }
        if let (Some((index, side)), Some(program)) = (place, pinned_program(&entry.path()))
            && let Some(interface) = name_of(index)
        {
            detach_filters(index, &interface, side, program);
        }
        unpin(&entry.path());
    }
}

/// The name of an interface; `None` if there is none of this index.
pub(crate) fn name_of(index: u32) -> Option<String> {
    // The binding takes the null that says so for a name without letters.
    nix::net::if_::if_indextoname(index).ok()?.into_string().ok().filter(|name| !name.is_empty())
}

/// Detaches the filters that have a program.
fn detach_filters(index: u32, interface: &str, side: TcAttachType, program: u32) {
    let listed = match Filters::open().and_then(|mut filters| filters.list(index, side)) {
        Ok(listed) => listed,
        Err(error) => {
            tracing::warn!(
                interface,
                program,
                %error,
                "cannot list the filters of a former agent: they stay attached beside those of this one"
            );
            return;
        }
    };
    for filter in filters_of(&listed, Some(program)) {
        let detached =
            filter.link(interface, side).map_err(ProgramError::from).and_then(SchedClassifierLink::detach);
        match detached {
            Ok(()) => tracing::info!(interface, program, "removed the filter of a former agent"),
            Err(error) => {
                tracing::warn!(
                    interface,
                    program,
                    error = with_causes(&error),
                    "cannot remove a filter of a former agent"
                );
            }
        }
    }
}

fn unpin(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove a pin: a program may stay attached");
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

fn attach_link(ebpf: &mut Ebpf, place: Place<'_>) -> Result<SchedClassifierLink, ProgramError> {
    let program: &mut SchedClassifier =
        ebpf.program_mut(place.program).ok_or(ProgramError::NotLoaded)?.try_into()?;
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(&place.interface.name, place.side, options)?;
    program.take_link(id)
}

fn link_error(error: LinkError) -> ProgramError {
    match error {
        LinkError::SyscallError(error) => ProgramError::SyscallError(error),
        error => ProgramError::IOError(io::Error::other(error)),
    }
}

/// What the kernel said; aya keeps that of netlink to itself, but for the number.
pub(super) fn errno_of_attach(error: &ProgramError) -> Option<Errno> {
    let netlink = match error {
        ProgramError::NetlinkError(error) | ProgramError::TcError(TcError::NetlinkError(error)) => {
            error.raw_os_error().map(Errno::from_raw_os_error)
        }
        // Which hide what they are made of from those who follow causes.
        ProgramError::IOError(error) | ProgramError::TcError(TcError::IoError(error)) => {
            Errno::from_io_error(error)
        }
        _ => None,
    };
    netlink.or_else(|| errno_of(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_names_its_place() {
        for side in [TcAttachType::Ingress, TcAttachType::Egress] {
            assert_eq!(place_of(&pin_name(17, side)), Some((17, side)));
            assert_eq!(place_of(&(pin_name(17, side) + NEXT)), Some((17, side)));
        }
        assert!(is_egress("17_egress") && !is_egress("17_ingress") && !is_egress("former"));
        assert_eq!(place_of("x_ingress"), None);
    }
}
