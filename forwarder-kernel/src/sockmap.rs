//! The maps and the program of tier `sockmap`.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard};

use aya::maps::{HashMap as BpfHashMap, MapData, MapError, PerCpuArray, RingBuf, SockHash};
use aya::programs::{SchedClassifier, SkSkb};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader};
use forwarder_common::sockmap::{
    CREDITS, Credit, NOTICES, Notice, OFFSET_FIELDS, OFFSET_GLOBALS, PROGRAM_VERDICT, SOCK_VERDICTS, SOURCES,
    STREAMS, SockVerdict, Stream, TARGETS,
};
use forwarder_common::update::{CreditUpdate, PROGRAM_SET_CREDIT};
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::bpf::raise_memory_limit;
use crate::btf::{self, BtfError};
use crate::load_error::{LoadError, errno_of, kernel_release};
use crate::maps::DatapathError;
use crate::maps::listeners::typed;
use crate::maps::updates;
use crate::programs::uninterrupted;
use forwarder_runtime::failpoint;
use forwarder_runtime::lock::lock;

/// The program, as `cargo xtask build-ebpf` compiled it; empty if it did not.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sockmap.bpf.o"));

/// The oldest kernel whose sockmaps are known to hand every byte on, once.
const RIGHT_KERNEL: (u8, u8) = (6, 18);

/// Refuses kernels whose sockmaps are not known to be right.
///
/// # Errors
/// This one is not.
pub fn check_kernel() -> Result<(), SockmapError> {
    let version = KernelVersion::current();
    if version.is_ok_and(is_right) {
        Ok(())
    } else {
        Err(SockmapError::UnsafeKernel { release: kernel_release() })
    }
}

fn is_right(version: KernelVersion) -> bool {
    let (major, minor) = RIGHT_KERNEL;
    version >= KernelVersion::new(major, minor, 0)
}

/// Why tier `sockmap` cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SockmapError {
    /// The program is not loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The program does not find its way in the kernel's structures.
    #[error(transparent)]
    Btf(#[from] BtfError),
    /// Sockmaps of this kernel are known to lose or double bytes, or not known to be right.
    #[error(
        "kernel {release} is older than {}.{}: its sockmaps may lose or double bytes, which the self-test does not see; use a newer kernel, another tier, or --sockmap-unsafe-kernel at your own risk",
        RIGHT_KERNEL.0,
        RIGHT_KERNEL.1
    )]
    UnsafeKernel {
        /// The kernel's release.
        release: String,
    },
}

/// Why two sockets are not joined.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct JoinError {
    /// What the kernel said.
    pub errno: Option<Errno>,
    /// Whether one of them stands in a map, so that `splice(2)` does not see what it receives any more.
    pub touched: bool,
}

/// One socket of a pair.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// The socket.
    pub socket: BorrowedFd<'a>,
    /// Its cookie.
    pub cookie: u64,
    /// How much of what it receives may be redirected.
    pub credit: Credit,
}

/// The maps, open, and the program, attached. Dropping it leaves sockets in the maps without verdicts: close them before.
pub struct Sockmap {
    maps: Mutex<Maps>,
    notices: Mutex<RingBuf<MapData>>,
    verdicts: PerCpuArray<MapData, u64>,
    ebpf: Ebpf,
}

struct Maps {
    targets: SockHash<MapData, u64>,
    sources: SockHash<MapData, u64>,
    streams: BpfHashMap<MapData, u64, Stream>,
    credits: BpfHashMap<MapData, u64, Credit>,
}

impl Sockmap {
    /// Loads the program, for so many streams: two for each pair.
    ///
    /// # Errors
    /// What the kernel does not allow or has not.
    pub fn load(streams: u32) -> Result<Self, SockmapError> {
        if OBJECT.is_empty() {
            return Err(LoadError::NoPrograms.into());
        }
        let offsets = btf::kernel_offsets("tcp_sock", OFFSET_FIELDS)?;
        raise_memory_limit();
        let mut loader = EbpfLoader::new();
        for (name, offset) in OFFSET_GLOBALS.into_iter().zip(&offsets) {
            loader.override_global(name, offset, true);
        }
        for name in [TARGETS, SOURCES, STREAMS, CREDITS] {
            loader.map_max_entries(name, streams);
        }
        let mut ebpf = loader
            .load(OBJECT)
            .map_err(|error| LoadError::new("create the maps of tier sockmap".to_owned(), "", error))?;
        let failed = |operation: &str, error: EbpfError| {
            LoadError::new(format!("{operation} program {PROGRAM_VERDICT}"), PROGRAM_VERDICT, error)
        };
        let maps = Maps::take(&mut ebpf)?;
        let notices = typed(&mut ebpf, NOTICES, RingBuf::try_from)?;
        let verdicts = typed(&mut ebpf, SOCK_VERDICTS, PerCpuArray::try_from)?;
        let setter = ebpf.program_mut(PROGRAM_SET_CREDIT).ok_or_else(|| LoadError::Object {
            reason: format!("they have no program {PROGRAM_SET_CREDIT}"),
        })?;
        <&mut SchedClassifier>::try_from(setter)
            .and_then(|program| uninterrupted(|| program.load()))
            .map_err(|error| {
                LoadError::new(format!("load program {PROGRAM_SET_CREDIT}"), PROGRAM_SET_CREDIT, error.into())
            })?;
        let program = ebpf
            .program_mut(PROGRAM_VERDICT)
            .ok_or_else(|| LoadError::Object { reason: format!("they have no program {PROGRAM_VERDICT}") })?;
        let program =
            <&mut SkSkb>::try_from(program).map_err(|error| failed("find", EbpfError::from(error)))?;
        uninterrupted(|| program.load()).map_err(|error| failed("load", EbpfError::from(error)))?;
        // Before the first socket is there: those that are there already it would not see.
        program.attach(maps.sources.fd()).map_err(|error| failed("attach", EbpfError::from(error)))?;
        Ok(Self { maps: Mutex::new(maps), notices: Mutex::new(notices), verdicts, ebpf })
    }

    /// Joins two connected sockets: what each receives, the kernel sends through the other one. What they had received
    /// before, and nobody has read, comes first. `true` for each whose bytes the kernel redirects: the peer of one of them
    /// may end its direction at this very moment, and what that one receives has to be relayed.
    ///
    /// The sockets stay in the maps until they are closed.
    ///
    /// # Errors
    /// The kernel does not take one of them; nothing that they receive is redirected.
    pub fn join(&self, pair: [Source<'_>; 2], listener_id: u32) -> Result<[bool; 2], JoinError> {
        let [one, other] = pair;
        let both = [(one, other), (other, one)];
        let joined = self.maps().join(both, listener_id);
        if joined.is_err() {
            self.forget(pair.map(|source| source.cookie));
        }
        // Only these: reading from another one would take away its error, by which its reset is told from its end.
        for (source, is_sourced) in pair.into_iter().zip(joined.unwrap_or_default()) {
            if is_sourced {
                kick(source.socket);
            }
        }
        joined
    }

    /// What is known of the stream that a socket receives.
    pub fn stream(&self, cookie: u64) -> Option<Stream> {
        self.maps().streams.get(&cookie, 0).ok()
    }

    /// Says how much of it may be redirected from now on. In place: what would be put in the place of the credit would free it
    /// for another one's, while a verdict may hold it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set_credit(&self, cookie: u64, credit: Credit) -> Result<(), DatapathError> {
        let failed = |source: MapError| DatapathError {
            operation: "change",
            map: CREDITS,
            entry: Some(format!("socket {cookie}")),
            source: Box::new(source),
        };
        let setter = self.ebpf.program(PROGRAM_SET_CREDIT).and_then(|program| program.try_into().ok());
        let setter: &SchedClassifier = setter.ok_or_else(|| failed(MapError::KeyNotFound))?;
        match updates::run(setter, &CreditUpdate { cookie, credit }.bytes()) {
            Ok(0) => Err(failed(MapError::KeyNotFound)),
            Ok(_) => Ok(()),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Removes what stands there of sockets that are closed.
    pub fn forget(&self, cookies: [u64; 2]) {
        let mut maps = self.maps();
        for cookie in cookies {
            // They may not stand there.
            let _ = maps.streams.remove(&cookie);
            let _ = maps.credits.remove(&cookie);
        }
    }

    /// The next notice of the program.
    pub fn next_notice(&self) -> Option<Notice> {
        let mut notices = lock(&self.notices);
        let item = notices.next()?;
        let (cookie, kind) = (item.first_chunk::<8>()?, item.get(8..)?.first_chunk::<4>()?);
        Some(Notice { cookie: u64::from_ne_bytes(*cookie), kind: u32::from_ne_bytes(*kind), pad: 0 })
    }

    /// Gives a descriptor that is readable while there are notices.
    pub fn with_notices<T>(&self, visit: impl FnOnce(BorrowedFd<'_>) -> T) -> T {
        visit(lock(&self.notices).as_fd())
    }

    /// How many segments met with each verdict.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn verdicts(&self) -> Result<Vec<(SockVerdict, u64)>, DatapathError> {
        let read = |verdict: SockVerdict| {
            let values = self.verdicts.get(&verdict.index(), 0).map_err(|source| DatapathError {
                operation: "read",
                map: SOCK_VERDICTS,
                entry: Some(verdict.as_str().to_owned()),
                source: Box::new(source),
            })?;
            Ok((verdict, values.iter().copied().fold(0, u64::wrapping_add)))
        };
        SockVerdict::ALL.into_iter().map(read).collect()
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        lock(&self.maps)
    }
}

impl Maps {
    fn take(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            targets: typed(ebpf, TARGETS, SockHash::try_from)?,
            sources: typed(ebpf, SOURCES, SockHash::try_from)?,
            streams: typed(ebpf, STREAMS, BpfHashMap::try_from)?,
            credits: typed(ebpf, CREDITS, BpfHashMap::try_from)?,
        })
    }

    fn join(
        &mut self,
        both: [(Source<'_>, Source<'_>); 2],
        listener_id: u32,
    ) -> Result<[bool; 2], JoinError> {
        let failed = |touched| move |error: MapError| JoinError { errno: errno_of(&error), touched };
        for (source, target) in both {
            let stream = Stream { peer: target.cookie, listener_id, ..Stream::default() };
            self.streams.insert(source.cookie, stream, 0).map_err(failed(false))?;
            self.credits.insert(source.cookie, source.credit, 0).map_err(failed(false))?;
        }
        failpoint::block("insert.streams_written");
        // A verdict whose target is missing would lose bytes: so both are targets before one is a source.
        for (index, (source, target)) in both.into_iter().enumerate() {
            let inserted = self.targets.insert(source.cookie, target.socket.as_raw_fd(), 0);
            inserted.map_err(failed(index > 0))?;
            failpoint::block(["insert.request_target", "insert.response_target"][index]);
        }
        let mut last = Errno::INVAL;
        let sourced = both.map(|(source, _)| {
            let inserted = self.sources.insert(source.cookie, source.socket.as_raw_fd(), 0);
            failpoint::block("insert.request_source");
            inserted.map_err(|error| last = errno_of(&error).unwrap_or(last)).is_ok()
        });
        if sourced == [false; 2] {
            return Err(JoinError { errno: Some(last), touched: true });
        }
        Ok(sourced)
    }
}

/// Has the verdict run on what a socket had received before it stood in the map.
fn kick(socket: BorrowedFd<'_>) {
    // Reading looks at the socket's own queue first (`tcp_bpf_recvmsg_parser`, since 6.4).
    let _ = recv(socket, &mut [0_u8], RecvFlags::PEEK | RecvFlags::DONTWAIT);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_whose_sockmaps_lose_bytes_are_refused() {
        for (version, is_taken) in [
            ((5, 10, 1), false),
            ((6, 12, 99), false),
            ((6, 17, 9), false),
            ((6, 18, 0), true),
            ((7, 0, 0), true),
        ] {
            let (major, minor, patch) = version;
            assert_eq!(is_right(KernelVersion::new(major, minor, patch)), is_taken, "{version:?}");
        }
        let refused = SockmapError::UnsafeKernel { release: "6.1.0-9-amd64".to_owned() }.to_string();
        assert!(refused.starts_with("kernel 6.1.0-9-amd64 is older than 6.18"), "{refused}");
    }
}
