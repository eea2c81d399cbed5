//! Access to the packet that the kernel hands to a program (`__sk_buff`), and where fields stand in its IP headers.

use aya_ebpf::bindings::{BPF_CSUM_LEVEL_QUERY, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM};
use aya_ebpf::helpers::generated::{
    bpf_csum_level, bpf_l4_csum_replace, bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::programs::TcContext;
use forwarder_common::packet::{Header, Packet, Segment, tcp_field};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::verdict::Verdict;

use crate::packet::{ChecksumKeeper, PacketMut, Summed};

/// Where fields stand in the IPv4 header, in bytes from its first, and the bytes of a header without options.
pub(crate) const IPV4_LENGTH: u32 = 2;
pub(crate) const IPV4_TTL: u32 = 8;
pub(crate) const IPV4_CHECKSUM: u32 = 10;
pub(crate) const IPV4_SOURCE: u32 = 12;
pub(crate) const IPV4_HEADER: u32 = 20;
/// "Don't fragment" in the word that IPv4's identification begins: with it, there needs to be none (RFC 6864, 4.1).
pub(crate) const DONT_FRAGMENT: u32 = 0x4000;
/// The same of the IPv6 header, whose length does not count itself.
pub(crate) const IPV6_LENGTH: u32 = 4;
pub(crate) const IPV6_HOP_LIMIT: u32 = 7;
pub(crate) const IPV6_SOURCE: u32 = 8;
pub(crate) const IPV6_HEADER: u32 = 40;
/// Bytes of the TCP header without options.
pub(crate) const TCP_HEADER: u32 = 20;
/// The bits of explicit congestion notification in the type of service.
pub(crate) const ECN_MASK: u8 = 3;

/// The packet, of which the kernel copies what is read: headers lie at odd places, and a copy, which does not, is cheaper
/// than putting words together byte by byte.
#[derive(Clone, Copy)]
pub(crate) struct SocketBuffer<'a>(pub(crate) &'a TcContext);

impl Packet for SocketBuffer<'_> {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let Self(context) = self;
        context.load(offset).ok()
    }
}

impl PacketMut for SocketBuffer<'_> {
    #[inline(always)]
    fn load<T>(self, offset: u32) -> Result<T, Verdict> {
        load(self.0, offset)
    }

    #[inline(always)]
    fn store<T>(self, offset: u32, value: &T) -> Result<(), Verdict> {
        store(self.0, offset, value)
    }

    #[inline(always)]
    fn change_checksum(
        self,
        segment: &Segment,
        change: ChecksumChange,
        summed: Summed,
    ) -> Result<(), Verdict> {
        let flags = match summed {
            Summed::Segment => 0,
            Summed::PseudoHeader => u64::from(BPF_F_PSEUDO_HDR),
        };
        let (offset, change) = (segment.tcp_offset + tcp_field::CHECKSUM as u32, u64::from(change.folded()));
        // SAFETY: the context is the program's own; the helper checks the offset.
        match unsafe { bpf_l4_csum_replace(self.0.skb.skb, offset, 0, change, flags) } {
            0 => Ok(()),
            _ => Err(Verdict::Unwritable),
        }
    }

    #[inline(always)]
    fn checksum_keeper(self) -> ChecksumKeeper {
        // SAFETY: the kernel hands the program a valid `__sk_buff`; the field may be read.
        if unsafe { (*self.0.skb.skb).gso_size } == 0 {
            return ChecksumKeeper::Kernel;
        }
        // SAFETY: the context is the program's own. It yields a number below zero unless somebody has found the checksum to be right: then it is a whole one, as where the
        // packets of a super-packet stay what they were (`SKB_GSO_FRAGLIST`), or a device has put them together (LRO).
        if unsafe { bpf_csum_level(self.0.skb.skb, u64::from(BPF_CSUM_LEVEL_QUERY)) } >= 0 {
            return ChecksumKeeper::Kernel;
        }
        ChecksumKeeper::PseudoHeader
    }
}

#[inline(always)]
pub(crate) fn load<T>(context: &TcContext, offset: u32) -> Result<T, Verdict> {
    context.load(offset as usize).map_err(|_| Verdict::Truncated)
}

/// Reads into `place`, which keeps what it was where the packet ends before.
#[inline(always)]
pub(crate) fn load_into<T>(context: &TcContext, offset: u32, place: &mut T) -> bool {
    // SAFETY: the place is of its own size; of what is read there any bits are valid.
    unsafe {
        bpf_skb_load_bytes(context.skb.skb.cast(), offset, (&raw mut *place).cast(), size_of::<T>() as u32)
            == 0
    }
}

#[inline(always)]
pub(crate) fn store<T>(context: &TcContext, offset: u32, value: &T) -> Result<(), Verdict> {
    // SAFETY: the value is initialised and of its own size; the helper checks the offset.
    let result = unsafe {
        bpf_skb_store_bytes(context.skb.skb, offset, (&raw const *value).cast(), size_of::<T>() as u32, 0)
    };
    if result == 0 { Ok(()) } else { Err(Verdict::Unwritable) }
}

/// Writes into the packet, and keeps what a device has summed up of it current.
#[inline(always)]
pub(crate) fn write<T>(context: &TcContext, at: u32, value: &T) -> Result<(), Verdict> {
    let (value, size) = ((&raw const *value).cast(), size_of::<T>() as u32);
    // SAFETY: the value is initialised and of its own size; the helper checks the offset.
    match unsafe { bpf_skb_store_bytes(context.skb.skb, at, value, size, u64::from(BPF_F_RECOMPUTE_CSUM)) } {
        0 => Ok(()),
        _ => Err(Verdict::Unwritable),
    }
}

/// Writes the first words of a place into the packet, likewise: `length` bytes of them. Word by word, because older kernels do not see that a length
/// that is not constant has a bound.
#[inline(always)]
pub(crate) fn write_words<const N: usize>(
    context: &TcContext,
    at: u32,
    from: &[u32; N],
    length: u32,
) -> Result<(), Verdict> {
    for (index, word) in from.iter().enumerate() {
        let offset = index as u32 * 4;
        if offset < length {
            write(context, at + offset, word)?;
        }
    }
    Ok(())
}

/// Reads so many bytes into the first words of a place; the others become zero. Tells whether it did.
#[inline(always)]
pub(crate) fn load_words<const N: usize>(
    context: &TcContext,
    at: u32,
    place: &mut [u32; N],
    length: u32,
) -> bool {
    for (index, word) in place.iter_mut().enumerate() {
        let offset = index as u32 * 4;
        *word = 0;
        if offset < length && !load_into(context, at + offset, word) {
            return false;
        }
    }
    true
}

#[inline(always)]
pub(crate) fn mark(context: &TcContext) -> u32 {
    // SAFETY: the kernel hands the program a valid `__sk_buff`, whose mark may be read.
    unsafe { (*context.skb.skb).mark }
}

#[inline(always)]
pub(crate) fn set_mark(context: &TcContext, mark: u32) {
    // SAFETY: as above; it may be written too.
    unsafe { (*context.skb.skb).mark = mark }
}
