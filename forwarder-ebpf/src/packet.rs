//! A packet that a program may change, wherever it meets it.

use forwarder_common::packet::Segment;
use forwarder_common::translate::ChecksumChange;
use forwarder_common::verdict::Verdict;

/// What of a packet a TCP checksum's change comes from. A device may have been left to complete the checksum (`CHECKSUM_PARTIAL`): then
/// what stands in the header is the sum of the pseudo-header alone.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Summed {
    /// The segment itself.
    Segment,
    /// The pseudo-header: the addresses.
    PseudoHeader,
}

/// A packet as [`rewrite`](crate::rewrite) sees it, in whatever form the kernel hands it to a program: as `__sk_buff` at TC
/// ([`SocketBuffer`](crate::skb::SocketBuffer)), as a frame at XDP ([`XdpFrame`](crate::xdp::frame::XdpFrame)). Offsets are in bytes from its beginning.
pub(crate) trait PacketMut: Copy {
    /// Reads a value, any bits of which must be valid.
    ///
    /// # Errors
    /// The packet ends before.
    fn load<T>(self, offset: u32) -> Result<T, Verdict>;

    /// Writes a value.
    ///
    /// # Errors
    /// The packet ends before, or may not be written.
    fn store<T>(self, offset: u32, value: &T) -> Result<(), Verdict>;

    /// Applies a change to the TCP checksum of the segment in it.
    ///
    /// # Errors
    /// As [`store`](Self::store).
    fn change_checksum(
        self,
        segment: &Segment,
        change: ChecksumChange,
        summed: Summed,
    ) -> Result<(), Verdict>;

    /// Who keeps the checksum of the segment in it.
    fn checksum_keeper(self) -> ChecksumKeeper;
}

/// Who has to change the TCP checksum of a packet, where all that changes is written at once.
#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum ChecksumKeeper {
    /// The kernel, which knows what a device will complete: [`PacketMut::change_checksum`].
    Kernel,
    /// Whoever writes: it is the sum of all there is.
    Whole,
    /// Whoever writes: it is one of the pseudo-header alone, as of a packet that stands for several, which a device or the stack will cut it into (GSO;
    /// `tcp4_gro_complete`, `__tcp_v4_send_check`).
    PseudoHeader,
}
