//! Counters that each worker writes on its own cache line and everyone may read.

use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_utils::CachePadded;

use crate::relay::{Fallback, Tier};
use forwarder_kernel::fallback_reason::FallbackReason;

/// A number that one worker raises and others read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `amount`. Only one thread may add to one counter: there is no locked instruction.
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One `T` for each worker.
#[derive(Debug)]
pub struct PerWorker<T>(Box<[CachePadded<T>]>);

impl<T: Default> PerWorker<T> {
    /// One for each of `workers`.
    pub fn new(workers: usize) -> Self {
        Self((0..workers.max(1)).map(|_| CachePadded::default()).collect())
    }

    /// The worker's own.
    pub fn of(&self, worker: usize) -> &T {
        self.0.get(worker).or(self.0.first()).expect("there is at least one worker")
    }

    /// The sum over all workers.
    pub fn sum(&self, field: impl Fn(&T) -> u64) -> u64 {
        self.0.iter().map(|own| field(own)).fold(0, u64::wrapping_add)
    }
}

impl PerWorker<ListenerCounters> {
    /// How many of a listener's connections are open.
    pub fn active(&self) -> u64 {
        // Ends are read first: one that comes in between makes the difference too large, never negative.
        let ended = self.sum(ListenerCounters::all_ended);
        self.sum(|own| own.accepted.get()).saturating_sub(ended)
    }
}

/// How a connection ended. Every accepted connection ends in exactly one way.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum End {
    /// Both directions ended, and both ends were passed on.
    Finished,
    /// The client reset it, or vanished; passed on.
    DownstreamReset,
    /// The endpoint reset it, or vanished; passed on.
    UpstreamReset,
    /// No byte in either direction for the idle time-out: both sides were reset.
    IdleTimeout,
    /// One direction had ended and no byte came in the other for the half-closed time-out: both sides were reset.
    HalfClosedTimeout,
    /// The agent was stopping and the drain time-out came near: both sides were reset.
    Drained,
    /// An operator asked for it: both sides were reset.
    ResetByOperator,
    /// Its listener, backend or endpoint was removed, and the listener's settings say so: both sides were reset.
    Removed,
    /// The listener does not let the client in, and no program had dropped its SYN: the client was reset.
    ClientDenied,
    /// The listener has no route: the client was reset.
    NoRoute,
    /// The route has no backend with a weight: the client was reset.
    NoDestination,
    /// The chosen backend is invalid: the client was reset, as the Gateway API demands.
    InvalidBackend,
    /// The chosen backend has no endpoint: the client was reset.
    NoEndpoints,
    /// No endpoint of the chosen backend could be connected: the client was reset.
    ConnectFailed,
    /// The kernel has lost the pair, or refuses to go on: both sides were reset.
    Lost,
}

impl End {
    /// Every end, in the order of its discriminant.
    pub const ALL: [Self; 15] = [
        Self::Finished,
        Self::DownstreamReset,
        Self::UpstreamReset,
        Self::IdleTimeout,
        Self::HalfClosedTimeout,
        Self::Drained,
        Self::ResetByOperator,
        Self::Removed,
        Self::ClientDenied,
        Self::NoRoute,
        Self::NoDestination,
        Self::InvalidBackend,
        Self::NoEndpoints,
        Self::ConnectFailed,
        Self::Lost,
    ];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::DownstreamReset => "downstream_reset",
            Self::UpstreamReset => "upstream_reset",
            Self::IdleTimeout => "idle_timeout",
            Self::HalfClosedTimeout => "half_closed_timeout",
            Self::Drained => "drained",
            Self::ResetByOperator => "reset_by_operator",
            Self::Removed => "removed",
            Self::ClientDenied => "client_denied",
            Self::NoRoute => "no_route",
            Self::NoDestination => "no_destination",
            Self::InvalidBackend => "invalid_backend",
            Self::NoEndpoints => "no_endpoints",
            Self::ConnectFailed => "connect_failed",
            Self::Lost => "lost",
        }
    }
}

/// What one worker counts for one listener.
#[derive(Debug, Default)]
pub struct ListenerCounters {
    /// Connections accepted.
    pub accepted: Counter,
    /// Connections ended, indexed as [`End::ALL`].
    pub ended: [Counter; End::ALL.len()],
    /// Bytes passed on from clients to endpoints, indexed as [`Tier::ALL`].
    pub received_bytes: [Counter; Tier::ALL.len()],
    /// Bytes passed on from endpoints to clients, indexed as [`Tier::ALL`].
    pub sent_bytes: [Counter; Tier::ALL.len()],
}

impl ListenerCounters {
    /// How many connections ended.
    pub fn all_ended(&self) -> u64 {
        self.ended.iter().map(Counter::get).sum()
    }
}

/// Why an attempt to connect to an endpoint failed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ConnectFailure {
    /// The endpoint refused, or its host did.
    Refused,
    /// No answer within the connect time-out.
    TimedOut,
    /// No route to the endpoint, or its network is down.
    Unreachable,
    /// No local port is free towards this endpoint (`EADDRNOTAVAIL`).
    NoLocalPort,
    /// No file descriptor or no memory is left.
    NoResources,
    /// Anything else.
    Other,
}

impl ConnectFailure {
    /// Every failure, in the order of its discriminant.
    pub const ALL: [Self; 6] =
        [Self::Refused, Self::TimedOut, Self::Unreachable, Self::NoLocalPort, Self::NoResources, Self::Other];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::Unreachable => "unreachable",
            Self::NoLocalPort => "no_local_port",
            Self::NoResources => "no_resources",
            Self::Other => "other",
        }
    }
}

/// What one worker counts for one backend.
#[derive(Debug, Default)]
pub struct BackendCounters {
    /// Connections established.
    pub connected: Counter,
    /// Those of them whose local port the kernel gives to other processes of the node too.
    pub shared_ports: Counter,
    /// Connections ended.
    pub ended: Counter,
    /// Attempts that failed, indexed as [`ConnectFailure::ALL`].
    pub failures: [Counter; ConnectFailure::ALL.len()],
    /// Bytes passed on to endpoints.
    pub received_bytes: Counter,
    /// Bytes passed on from endpoints.
    pub sent_bytes: Counter,
}

/// What one worker counts beyond listeners and backends.
#[derive(Debug, Default)]
pub struct WorkerCounters {
    /// Falls from a faster tier, indexed as [`Fallback::ALL`].
    pub fallbacks: [Counter; Fallback::ALL.len()],
    /// Times that accepting paused because the process or system had no file descriptor or memory left.
    pub accept_pauses: Counter,
    /// Connections handed to a less busy worker.
    pub handed_over: Counter,
    /// Connections joined in the kernel.
    pub offloaded: Counter,
    /// Connections taken back, since what was redirected did not arrive.
    pub taken_back: Counter,
    /// Times that a connection was not offloaded, indexed as [`FallbackReason::ALL`].
    pub fallback_reasons: [Counter; FallbackReason::ALL.len()],
    /// Pairs taken over from a former agent.
    pub inherited: Counter,
}
