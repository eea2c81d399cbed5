//! What the programs make of a packet.

/// What became of a packet, and why. Every packet that an ingress program sees gets one verdict, counted in the map
/// [`VERDICTS`](crate::layout::VERDICTS) under the verdict's number. Only packets of a flow are changed or dropped, and the
/// egress programs count only what they find to be of one.
#[repr(u32)]
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Verdict {
    /// Neither IPv4 nor IPv6.
    NotIp = 0,
    /// IP, but not TCP.
    NotTcp = 1,
    /// A fragment other than the first, which has no TCP header, and as far as is known of no flow: left to the local stack.
    Fragment = 2,
    /// Ends before its TCP header does.
    Truncated = 3,
    /// TCP, but to no listener.
    NoListener = 4,
    /// To a listener; counted there.
    Counted = 5,
    /// To a listener without counters: one that is just being removed.
    CounterMissing = 6,
    /// To the port of a listener on every address, but to an address that is not this node's.
    NotLocal = 7,
    /// For another host, or for a VLAN interface above this one, which sees it again.
    NotForInterface = 8,
    /// More IPv6 extension headers than are walked.
    TooManyHeaders = 9,
    /// Of a flow: translated and sent to the other end.
    Redirected = 10,
    /// Of a flow that is just being made or removed: left to the local stack.
    PairMissing = 11,
    /// Of a flow, with options that cannot be understood: dropped.
    OptionsRefused = 12,
    /// Of a flow, but the kernel did not let it be rewritten: dropped.
    Unwritable = 13,
    /// The copy of a flow's packet for the local socket, which still has data on its way.
    HandoverAcknowledged = 14,
    /// Such a copy that tells the local socket nothing: dropped.
    HandoverIgnored = 15,
    /// Sent by a local socket of a flow that delivers what it had received before the handover.
    HandoverSent = 16,
    /// Sent by a local socket of a flow that has nothing more to say: dropped.
    Suppressed = 17,
    /// A new connection to a listener whose agent is gone or going, or on the tuple of a pair whose other end has not
    /// forgotten it: dropped, so that the client tries again.
    Held = 18,
    /// The word of a router that a flow's packet is too large for the way behind it: translated and sent to the end that
    /// the packet came from.
    TooBigPassedOn = 19,
    /// Of a flow, but too large for the interface that it would leave by: dropped, and its sender told.
    TooBig = 20,
    /// Of a flow: translated, and left to the stack, which sends it on.
    LeftToStack = 21,
    /// A fragment of a flow's packet that is refused: the first without the whole TCP header, or one that overlaps the first
    /// (RFC 1858): dropped.
    FragmentRefused = 22,
    /// Of a flow, but by an interface that the stack does not expect its sender behind, and which checks that strictly: left to
    /// the stack, which drops it (`rp_filter`).
    OtherInterface = 23,
    /// Of a pair that the agent has ended: answered with a reset.
    ResetAnswered = 24,
    /// A new connection to a direct listener that no direct connection could be made for: left to the listener's socket.
    DirectRefused = 25,
    /// An endpoint's refusal of a direct connection: turned into the client's SYN to another endpoint.
    DirectRetried = 26,
    /// A new connection to a listener that does not let its client in: dropped.
    ClientDenied = 27,
    /// A new connection of a client that asks for more in a second than its listener allows one client: dropped.
    ClientLimited = 28,
    /// At XDP, of a flow: translated and sent to the other end.
    XdpRedirected = 29,
    /// At XDP, of a flow, but not such that it can be sent on there: left to TC, which gives it a verdict of its own. So of those that follow.
    XdpLeft = 30,
    /// The same: the Ethernet address that it is to go to is not known, or was asked for anew just now, or its place is another neighbour's.
    XdpNeighbour = 31,
    /// The same: its checksum is not finished, as of what has never left its host.
    XdpUnfinished = 32,
    /// The same: the interface that it is to leave by takes nothing from XDP.
    XdpNoTarget = 33,
    /// A new connection to a listener, of a flood of SYNs: answered with a SYN cookie in the place of the listener's socket.
    CookieSent = 34,
    /// An endpoint's acknowledgement of an earlier connection, in answer to a SYN of a direct one: answered with a reset, and the SYN again.
    DirectStale = 35,
}

impl Verdict {
    /// All, in the order of their numbers.
    pub const ALL: [Self; 36] = [
        Self::NotIp,
        Self::NotTcp,
        Self::Fragment,
        Self::Truncated,
        Self::NoListener,
        Self::Counted,
        Self::CounterMissing,
        Self::NotLocal,
        Self::NotForInterface,
        Self::TooManyHeaders,
        Self::Redirected,
        Self::PairMissing,
        Self::OptionsRefused,
        Self::Unwritable,
        Self::HandoverAcknowledged,
        Self::HandoverIgnored,
        Self::HandoverSent,
        Self::Suppressed,
        Self::Held,
        Self::TooBigPassedOn,
        Self::TooBig,
        Self::LeftToStack,
        Self::FragmentRefused,
        Self::OtherInterface,
        Self::ResetAnswered,
        Self::DirectRefused,
        Self::DirectRetried,
        Self::ClientDenied,
        Self::ClientLimited,
        Self::XdpRedirected,
        Self::XdpLeft,
        Self::XdpNeighbour,
        Self::XdpUnfinished,
        Self::XdpNoTarget,
        Self::CookieSent,
        Self::DirectStale,
    ];

    /// How many there are.
    pub const COUNT: u32 = 36;

    /// Its number: the index in the map.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }

    /// Its name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotIp => "not_ip",
            Self::NotTcp => "not_tcp",
            Self::Fragment => "fragment",
            Self::Truncated => "truncated",
            Self::NoListener => "no_listener",
            Self::Counted => "counted",
            Self::CounterMissing => "counter_missing",
            Self::NotLocal => "not_local",
            Self::NotForInterface => "not_for_interface",
            Self::TooManyHeaders => "too_many_headers",
            Self::Redirected => "redirected",
            Self::PairMissing => "pair_missing",
            Self::OptionsRefused => "options_refused",
            Self::Unwritable => "unwritable",
            Self::HandoverAcknowledged => "handover_acknowledged",
            Self::HandoverIgnored => "handover_ignored",
            Self::HandoverSent => "handover_sent",
            Self::Suppressed => "suppressed",
            Self::Held => "held",
            Self::TooBigPassedOn => "too_big_passed_on",
            Self::TooBig => "too_big",
            Self::LeftToStack => "left_to_stack",
            Self::FragmentRefused => "fragment_refused",
            Self::OtherInterface => "other_interface",
            Self::ResetAnswered => "reset_answered",
            Self::DirectRefused => "direct_refused",
            Self::DirectRetried => "direct_retried",
            Self::ClientDenied => "client_denied",
            Self::ClientLimited => "client_limited",
            Self::XdpRedirected => "xdp_redirected",
            Self::XdpLeft => "xdp_left",
            Self::XdpNeighbour => "xdp_neighbour",
            Self::XdpUnfinished => "xdp_unfinished",
            Self::XdpNoTarget => "xdp_no_target",
            Self::CookieSent => "cookie_sent",
            Self::DirectStale => "direct_stale",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_dense_and_in_order() {
        for (expected, verdict) in (0..Verdict::COUNT).zip(Verdict::ALL) {
            assert_eq!(verdict.index(), expected);
        }
        assert_eq!(Verdict::ALL.len(), usize::try_from(Verdict::COUNT).unwrap());
    }
}
