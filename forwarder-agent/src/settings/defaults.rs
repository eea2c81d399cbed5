//! What holds where a setting says nothing.

use std::time::Duration;

use forwarder_runtime::values::OffloadAfter;

/// When connections are taken into the kernel by default.
pub const OFFLOAD_AFTER: OffloadAfter =
    OffloadAfter { bytes: Some(64 << 10), age: Some(Duration::from_millis(500)) };

/// How many bytes of memory the kernel may hold for connections of tier `sockmap` by default.
pub const SOCKMAP_MEMORY: u64 = 256 << 20;

/// How many connections may be direct, where the agent's own setting is that they are, unless it says otherwise.
pub const DIRECT_CAPACITY: u32 = 65_536;

/// How many SYNs each CPU leaves to sockets in a second by default. Not even half as many connections can be accepted on one, and what these SYNs cost is a small
/// part of it.
pub const SYN_COOKIES_ABOVE: u32 = 10_000;

/// The largest such number: of more, each would come as one.
pub const MOST_SYNS: u32 = 1_000_000;

/// How long a port that another process had must have been free, by default, before it is taken: daemons are back sooner.
pub const PORT_WAIT: Duration = Duration::from_secs(10);

/// Where maps are pinned by default.
pub const PIN_DIR: &str = "/sys/fs/bpf/forwarder";
