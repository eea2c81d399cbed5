//! Why the programs cannot be loaded, and what to do about it.

use std::error::Error;
use std::fs;
use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;
use aya::util::KernelVersion;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, capabilities};

/// The oldest kernel that the programs are written for.
const OLDEST_KERNEL: (u8, u8) = (5, 10);

/// How many bytes of the verifier's log are told: the reason stands at its end.
const VERIFIER_LOG_TAIL: usize = 1_000;

/// Why the programs cannot be loaded. Each message says in one line what to do; only the verifier's has more lines.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The agent embeds no object.
    #[error("this agent was built without eBPF programs: run `cargo xtask build-ebpf` and build it again")]
    NoPrograms,
    /// The pin directory is on another file system.
    #[error(
        "the pin directory {} is not on a BPF file system: run `mount -t bpf -o mode=0700 bpf /sys/fs/bpf`, or choose a directory on one",
        .path.display()
    )]
    NotBpffs {
        /// The pin directory.
        path: PathBuf,
    },
    /// Another agent that runs holds the pin directory.
    #[error("the pin directory {} is in use by another agent that is running: stop it, or choose another directory", .path.display())]
    InUse {
        /// The pin directory.
        path: PathBuf,
    },
    /// The pin directory, or a folder above it, is not the agent's.
    #[error(
        "{} belongs to uid {owner}, and this agent is uid {own}: who owns it can exchange what is pinned there; \
         see who made it, remove it (`rm -r`), or choose another pin directory",
        .path.display()
    )]
    ForeignOwner {
        /// The folder.
        path: PathBuf,
        /// Its owner.
        owner: u32,
        /// Whose the agent is.
        own: u32,
    },
    /// The programs of another version still hang on interfaces, and connections may live in them.
    #[error(
        "an agent of another version has left connections in {}, whose layout this one does not know: wait until they have ended, or end them with `forwarder cleanup --yes`",
        .path.display()
    )]
    ForeignLayout {
        /// That version's directory.
        path: PathBuf,
    },
    /// The pin directory cannot be worked with.
    #[error("cannot {operation} {}: {source}{}", .path.display(), hint(source))]
    PinDir {
        /// What was attempted.
        operation: &'static str,
        /// On which file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The agent has not the capabilities.
    #[error("not permitted to {operation}: run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON")]
    NotPermitted {
        /// What was attempted.
        operation: String,
        /// What aya said.
        #[source]
        source: Box<EbpfError>,
    },
    /// The kernel is older than the programs need.
    #[error(
        "cannot {operation} on kernel {release}: it is older than {}.{}, which the eBPF programs are written for",
        OLDEST_KERNEL.0,
        OLDEST_KERNEL.1
    )]
    KernelTooOld {
        /// What was attempted.
        operation: String,
        /// The kernel's release.
        release: String,
        /// What aya said.
        #[source]
        source: Box<EbpfError>,
    },
    /// The kernel cannot create a map.
    #[error("cannot create map {map}: {reason}; look at the memory limits of the agent")]
    Map {
        /// The map's name.
        map: String,
        /// What the kernel said.
        reason: String,
        /// What aya said.
        #[source]
        source: Box<EbpfError>,
    },
    /// The verifier refuses a program.
    #[error(
        "kernel {release} refuses program {program}; please report this. The verifier's log ends with:\n{log}"
    )]
    Verifier {
        /// The program's name.
        program: String,
        /// The kernel's release.
        release: String,
        /// The end of the verifier's log.
        log: String,
        /// What aya said.
        #[source]
        source: Box<EbpfError>,
    },
    /// The embedded object is not what the agent expects.
    #[error(
        "the embedded eBPF programs do not fit this agent: {reason}; run `cargo xtask build-ebpf` and build it again"
    )]
    Object {
        /// What does not fit.
        reason: String,
    },
    /// Something else failed.
    #[error("cannot {operation}: {reason}")]
    Other {
        /// What was attempted.
        operation: String,
        /// The error and its causes.
        reason: String,
        /// What aya said.
        #[source]
        source: Box<EbpfError>,
    },
}

impl LoadError {
    pub(super) fn no_map(name: &str) -> Self {
        Self::Object { reason: format!("they have no map {name}") }
    }

    /// Finds what is behind an error of aya's.
    pub(super) fn new(operation: String, program: &str, error: EbpfError) -> Self {
        let errno = errno_of(&error);
        let verifier_log = match &error {
            EbpfError::ProgramError(ProgramError::LoadError { verifier_log, .. }) => verifier_log.to_string(),
            _ => String::new(),
        };
        // The verifier too says EPERM of what it wants a capability for, but then its log says more.
        let is_refused_program = matches!(&error, EbpfError::ProgramError(ProgramError::LoadError { .. }));
        let is_not_permitted = errno == Some(Errno::PERM) && verifier_log.is_empty();
        if is_not_permitted || is_refused_program && !may_use_pointers() {
            return Self::NotPermitted { operation, source: Box::new(error) };
        }
        if is_too_old() {
            return Self::KernelTooOld { operation, release: kernel_release(), source: Box::new(error) };
        }
        let source = Box::new(error);
        match source.as_ref() {
            EbpfError::ProgramError(ProgramError::LoadError { .. }) if errno == Some(Errno::AGAIN) => {
                Self::Other { operation, reason: "signals interrupt it again and again; find out what signals or stops the agent (a debugger, a freezer), and start it again".to_owned(), source }
            }
            EbpfError::ProgramError(ProgramError::LoadError { .. }) => Self::Verifier {
                program: program.to_owned(),
                release: kernel_release(),
                log: tail(&verifier_log, VERIFIER_LOG_TAIL),
                source,
            },
            EbpfError::MapError(MapError::CreateError { name, io_error }) => {
                Self::Map { map: name.clone(), reason: io_error.to_string(), source }
            }
            EbpfError::ParseError(error) => Self::Object { reason: error.to_string() },
            error => Self::Other { operation, reason: with_causes(error), source },
        }
    }
}

/// The kernel's release, such as `6.1.0-30-amd64`.
pub(super) fn kernel_release() -> String {
    fs::read_to_string("/proc/sys/kernel/osrelease")
        .map_or_else(|_| "of unknown release".to_owned(), |release| release.trim().to_owned())
}

/// Whether the verifier lets this thread's programs compare pointers, as every read from a packet does
/// (`perfmon_capable`).
fn may_use_pointers() -> bool {
    let needed = CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN;
    capabilities(None).map_or(true, |held| held.effective.intersects(needed))
}

fn is_too_old() -> bool {
    let (major, minor) = OLDEST_KERNEL;
    KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(major, minor, 0))
}

/// What the kernel said, somewhere down the chain of causes.
pub(super) fn errno_of(error: &(dyn Error + 'static)) -> Option<Errno> {
    causes(error).find_map(|cause| cause.downcast_ref::<io::Error>().and_then(Errno::from_io_error))
}

/// The error's message and those of its causes, without what is repeated.
pub(super) fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        let message = cause.to_string();
        if text.ends_with(&message) {
            continue;
        }
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&message);
    }
    text
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error| Error::source(*error))
}

/// The last lines of `text`, at most `limit` bytes.
fn tail(text: &str, limit: usize) -> String {
    let mut kept: Vec<&str> = Vec::new();
    let mut length = 0;
    for line in text.lines().rev() {
        length += line.len() + 1;
        if length > limit {
            break;
        }
        kept.push(line);
    }
    kept.reverse();
    kept.join("\n")
}

/// What may be wrong with a pin directory, where the kernel only says that it may not be.
fn hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::ReadOnlyFilesystem => ": mount it so that it can be written",
        io::ErrorKind::PermissionDenied => " (names on a BPF file system may not contain dots)",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tail_keeps_whole_last_lines() {
        assert_eq!(tail("first\nsecond\nthird\n", 13), "second\nthird");
        assert_eq!(tail("first\nsecond\nthird\n", 100), "first\nsecond\nthird");
        assert_eq!(tail("", 100), "");
    }

    #[test]
    fn missing_capability_is_told_from_the_errno() {
        let io_error = io::Error::from_raw_os_error(Errno::PERM.raw_os_error());
        let error = EbpfError::MapError(MapError::CreateError { name: "listeners".to_owned(), io_error });
        let error = LoadError::new("create the maps".to_owned(), "", error);
        assert!(matches!(error, LoadError::NotPermitted { .. }), "{error:?}");
        assert!(error.to_string().contains("CAP_BPF"), "{error}");
    }

    #[test]
    fn a_map_that_cannot_be_created_is_named() {
        let io_error = io::Error::from_raw_os_error(Errno::NOMEM.raw_os_error());
        let error = EbpfError::MapError(MapError::CreateError { name: "listeners".to_owned(), io_error });
        let error = LoadError::new("create the maps".to_owned(), "", error);
        assert!(
            error.to_string().starts_with("cannot create map listeners: Cannot allocate memory"),
            "{error}"
        );
    }
}
