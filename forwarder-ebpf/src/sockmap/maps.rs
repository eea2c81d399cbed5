//! The maps of tier `sockmap`.
//!
//! The agent removes what stands under a socket's cookie once it has closed the socket, when no verdict can hold it any more,
//! and changes credits in place ([`crate::update`]): so nothing is allocated anew that a program holds (ADR 18).

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{HashMap, PerCpuArray, RingBuf, SockHash};
use aya_ebpf::macros::btf_map;
use forwarder_common::sockmap::{Credit, NOTICES_SIZE, Notice, STREAMS_CAPACITY, SockVerdict, Stream};

const CAPACITY: usize = STREAMS_CAPACITY as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// The socket that each one's bytes go to.
#[btf_map(name = "sockmap_targets")]
pub(crate) static TARGETS: SockHash<u64, CAPACITY> = SockHash::new();

/// The sockets whose bytes pass through the program.
#[btf_map(name = "sockmap_sources")]
static SOURCES: SockHash<u64, CAPACITY> = SockHash::new();

/// What each socket receives.
#[btf_map(name = "sockmap_streams")]
pub(crate) static STREAMS: HashMap<u64, Stream, CAPACITY, NO_PREALLOC> = HashMap::new();

/// How much of it may be redirected.
#[btf_map(name = "sockmap_credits")]
pub(crate) static CREDITS: HashMap<u64, Credit, CAPACITY, NO_PREALLOC> = HashMap::new();

/// What the agent should look at.
#[btf_map(name = "sockmap_notices")]
pub(crate) static NOTICES: RingBuf<Notice, { NOTICES_SIZE as usize }> = RingBuf::new();

/// How many segments met with each verdict.
#[btf_map(name = "sockmap_verdict")]
pub(crate) static VERDICTS: PerCpuArray<u64, { SockVerdict::COUNT as usize }> = PerCpuArray::new();
