//! Why a connection stays in userspace.

/// Why a connection is not offloaded to tier `tc` or `sockmap`, at the moment or for good.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum FallbackReason {
    /// The programs are not loaded.
    NoPrograms,
    /// One leg is IPv4, the other IPv6.
    Families,
    /// One leg uses timestamps, the other does not.
    Timestamps,
    /// One leg uses selective acknowledgements, the other does not.
    SelectiveAcknowledgements,
    /// Packets of one leg may be too large for the other.
    SegmentSizes,
    /// The client or the endpoint is on this node: its packets come through no interface.
    SameHost,
    /// One direction has ended.
    Ended,
    /// More is on its way through userspace than the receiver could take beside what would come from the kernel.
    SlowReceiver,
    /// The kernel knows no route to one end.
    NoRoute,
    /// No program hangs on the interface that one end's packets use.
    NotAttached,
    /// What was redirected through the interface to one end did not arrive lately.
    PathBroken,
    /// The node's stack would not send on what is left to it.
    StackClosed,
    /// The packets of one leg have no Ethernet header, and cannot be redirected to a neighbour.
    NoEthernet,
    /// This node translates the addresses of one leg (NAT), so that its packets are not those of its socket.
    Translated,
    /// The map of pairs is full.
    MapFull,
    /// The state of a socket cannot be read: `CAP_NET_ADMIN` is missing, or bytes come too fast.
    Unreadable,
    /// The kernel refuses a change of the maps.
    Kernel,
    /// The self-test of tier `sockmap` has failed.
    SelfTest,
    /// Tier `sockmap` is not known to be right on this kernel.
    UnsafeKernel,
    /// An operator has switched the tier off.
    SwitchedOff,
    /// The agent shuts down, and its sockets go with it.
    Shutdown,
    /// What pairs of tier `sockmap` may hold in memory is reserved.
    MemoryFull,
    /// Something else handles what a socket receives, such as kernel TLS.
    SocketInUse,
    /// The timestamps of one leg count microseconds (`tcp_usec_ts`), those of the other need not.
    MicrosecondClock,
    /// The address of one end means another host on each link: no route tells where it is.
    LinkLocal,
    /// Connection tracking does not say whether this node translates the addresses of one leg (NAT).
    TranslationUnknown,
    /// The window of one end is too small to be told by the scale of the other leg.
    WindowScale,
}

impl FallbackReason {
    /// Every one, in the order of its discriminant.
    pub const ALL: [Self; 27] = [
        Self::NoPrograms,
        Self::Families,
        Self::Timestamps,
        Self::SelectiveAcknowledgements,
        Self::SegmentSizes,
        Self::SameHost,
        Self::Ended,
        Self::SlowReceiver,
        Self::NoRoute,
        Self::NotAttached,
        Self::PathBroken,
        Self::StackClosed,
        Self::NoEthernet,
        Self::Translated,
        Self::MapFull,
        Self::Unreadable,
        Self::Kernel,
        Self::SelfTest,
        Self::UnsafeKernel,
        Self::SwitchedOff,
        Self::Shutdown,
        Self::MemoryFull,
        Self::SocketInUse,
        Self::MicrosecondClock,
        Self::LinkLocal,
        Self::TranslationUnknown,
        Self::WindowScale,
    ];

    /// Its name in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoPrograms => "no_programs",
            Self::Families => "families_differ",
            Self::Timestamps => "timestamps_differ",
            Self::SelectiveAcknowledgements => "sack_differs",
            Self::SegmentSizes => "segment_sizes_differ",
            Self::SameHost => "same_host",
            Self::Ended => "ended",
            Self::SlowReceiver => "slow_receiver",
            Self::NoRoute => "no_route",
            Self::NotAttached => "not_attached",
            Self::PathBroken => "path_broken",
            Self::StackClosed => "stack_closed",
            Self::NoEthernet => "no_ethernet",
            Self::Translated => "translated",
            Self::MapFull => "map_full",
            Self::Unreadable => "unreadable",
            Self::Kernel => "kernel",
            Self::SelfTest => "self_test_failed",
            Self::UnsafeKernel => "unsafe_kernel",
            Self::SwitchedOff => "switched_off",
            Self::Shutdown => "shutdown",
            Self::MemoryFull => "memory_full",
            Self::SocketInUse => "socket_in_use",
            Self::MicrosecondClock => "microsecond_clock",
            Self::LinkLocal => "link_local",
            Self::TranslationUnknown => "translation_unknown",
            Self::WindowScale => "window_scale",
        }
    }

    /// Whether a reason that may pass is likely to be the same a second later.
    pub fn lasts(self) -> bool {
        matches!(
            self,
            Self::NoRoute
                | Self::PathBroken
                | Self::StackClosed
                | Self::TranslationUnknown
                | Self::WindowScale
        )
    }

    /// Whether the connection may be offloaded later.
    pub fn may_pass(self) -> bool {
        match self {
            Self::SlowReceiver
            | Self::NoRoute
            | Self::NotAttached
            | Self::PathBroken
            | Self::StackClosed
            | Self::MapFull
            | Self::Unreadable
            | Self::SwitchedOff
            | Self::MemoryFull
            | Self::TranslationUnknown
            | Self::WindowScale
            | Self::Kernel => true,
            Self::NoPrograms
            | Self::Families
            | Self::Timestamps
            | Self::SelectiveAcknowledgements
            | Self::SegmentSizes
            | Self::SameHost
            | Self::NoEthernet
            | Self::Translated
            | Self::SelfTest
            | Self::UnsafeKernel
            | Self::Shutdown
            | Self::SocketInUse
            | Self::MicrosecondClock
            | Self::LinkLocal
            | Self::Ended => false,
        }
    }
}
