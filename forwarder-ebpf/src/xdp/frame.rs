//! A frame as the driver hands it to a program. What is read and written lies in its first part.

use core::arch::asm;
use core::mem::MaybeUninit;

use aya_ebpf::helpers::generated::{bpf_xdp_load_bytes, bpf_xdp_store_bytes};
use aya_ebpf::programs::XdpContext;
use forwarder_common::packet::{
    FLAG_ACK, FLAG_SYN, Header, PROTOCOL_TCP, Packet, Segment, USUAL_OFFSET, USUAL_WORDS_OF_OPTIONS,
    USUAL_WORDS_V4, USUAL_WORDS_V6, UsualHeaders, is_usual_v6, tcp_field,
};
use forwarder_common::translate::ChecksumChange;
use forwarder_common::verdict::Verdict;

use crate::packet::{ChecksumKeeper, PacketMut, Summed};
use crate::skb::{IPV4_HEADER, IPV6_HEADER};

/// Headers end before: the verifier wants to know how far behind the beginning of a frame is read.
const MOST_HEADERS: usize = 0x7fff;

/// Bytes of the Ethernet header.
pub(super) const ETHERNET_HEADER: usize = 14;
/// Where it tells what the frame holds, in bytes from the first.
const ETHER_TYPE: usize = 12;
/// Version and header length of IPv4 without options.
const USUAL_IPV4: u8 = 0x45;
/// Where the protocol stands in IP headers, in bytes from their first.
const IPV4_PROTOCOL: usize = 9;
const IPV6_NEXT_HEADER: usize = 6;

/// A frame.
#[derive(Clone, Copy)]
pub(super) struct XdpFrame<'a>(pub(super) &'a XdpContext);

impl XdpFrame<'_> {
    /// The first bytes; `None` where the frame ends before.
    #[inline(always)]
    pub(super) fn first<const N: usize>(&self) -> Option<&[u8; N]> {
        let Self(context) = self;
        let start = context.data();
        if start + N > context.data_end() {
            return None;
        }
        // SAFETY: they lie within the frame, which nobody else writes while the program runs.
        Some(unsafe { &*(start as *const [u8; N]) })
    }

    /// How many bytes its first part has.
    #[inline(always)]
    pub(super) fn length(self) -> u32 {
        (self.0.data_end() - self.0.data()) as u32
    }

    /// Whether a frame with headers such as most are is no SYN: most are not, and these bytes are all that is read of them.
    #[inline(always)]
    pub(super) fn asks_for_nothing(&self) -> bool {
        const V4_FLAGS: usize = ETHERNET_HEADER + IPV4_HEADER as usize + tcp_field::FLAGS;
        const V6_FLAGS: usize = ETHERNET_HEADER + IPV6_HEADER as usize + tcp_field::FLAGS;
        let is_other = |flags: u8| flags & (FLAG_SYN | FLAG_ACK) != FLAG_SYN;
        if let Some(bytes) = self.first::<{ V4_FLAGS + 1 }>()
            && [bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1], bytes[ETHERNET_HEADER]] == [0x08, 0x00, USUAL_IPV4]
        {
            return bytes[ETHERNET_HEADER + IPV4_PROTOCOL] != PROTOCOL_TCP || is_other(bytes[V4_FLAGS]);
        }
        if let Some(bytes) = self.first::<{ V6_FLAGS + 1 }>()
            && [bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1]] == [0x86, 0xdd]
        {
            // Extension headers may come before.
            return bytes[ETHERNET_HEADER + IPV6_NEXT_HEADER] == PROTOCOL_TCP && is_other(bytes[V6_FLAGS]);
        }
        // What has a tag is for a VLAN interface above this one, which has programs of its own.
        self.first::<{ ETHER_TYPE + 2 }>().is_some_and(|bytes| {
            [[0x81, 0x00], [0x88, 0xa8]].contains(&[bytes[ETHER_TYPE], bytes[ETHER_TYPE + 1]])
        })
    }
}

/// By calls of the kernel (5.18 and later): headers lie at odd places, and a copy, which does not, is cheaper than putting words together byte by byte.
impl PacketMut for XdpFrame<'_> {
    #[inline(always)]
    fn load<T>(self, offset: u32) -> Result<T, Verdict> {
        let mut value = MaybeUninit::<T>::uninit();
        let place = value.as_mut_ptr().cast();
        // SAFETY: the context is the program's own, the place of the size given; the helper checks the offset.
        match unsafe { bpf_xdp_load_bytes(self.0.ctx, offset, place, size_of::<T>() as u32) } {
            // SAFETY: the helper has written all of it, and the caller asks for what any bits are valid for.
            0 => Ok(unsafe { value.assume_init() }),
            _ => Err(Verdict::Truncated),
        }
    }

    #[inline(always)]
    fn store<T>(self, offset: u32, value: &T) -> Result<(), Verdict> {
        let value = (&raw const *value).cast_mut().cast();
        // SAFETY: the context is the program's own, the value initialised and of its own size; the helper checks the offset.
        match unsafe { bpf_xdp_store_bytes(self.0.ctx, offset, value, size_of::<T>() as u32) } {
            0 => Ok(()),
            _ => Err(Verdict::Unwritable),
        }
    }

    #[inline(always)]
    fn change_checksum(
        self,
        segment: &Segment,
        change: ChecksumChange,
        _summed: Summed,
    ) -> Result<(), Verdict> {
        let offset = segment.tcp_offset + tcp_field::CHECKSUM as u32;
        let checksum: u16 = self.load(offset)?;
        self.store(offset, &change.applied_to(checksum))
    }

    #[inline(always)]
    fn checksum_keeper(self) -> ChecksumKeeper {
        // No device completes what is sent from here.
        ChecksumKeeper::Whole
    }
}

/// A frame with headers such as most are: what is read and written of it are words at places that the compiler knows, each by one instruction, wherever it lies. (The
/// compiler would take it for bytes, because Rust knows no words at odd places; a call of the kernel costs as much as all of them.)
#[derive(Clone, Copy)]
pub(super) struct UsualFrame<'a>(pub(super) &'a XdpContext);

impl UsualFrame<'_> {
    /// Where a value begins; `None` where the first part of the frame ends before it does.
    #[inline(always)]
    fn at<T>(self, offset: u32) -> Option<usize> {
        const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() == 4, "words only") };
        let start = self.0.data();
        if start + offset as usize + size_of::<T>() > self.0.data_end() {
            return None;
        }
        Some(start + offset as usize)
    }

    /// Reads what may be usual headers, and tells how many words of them there are.
    #[inline(always)]
    pub(super) fn load_headers(self, headers: &mut UsualHeaders) -> usize {
        const OFFSET: u32 = USUAL_OFFSET as u32;
        const WHOLE_V4: usize = USUAL_WORDS_V4 + USUAL_WORDS_OF_OPTIONS;
        const WHOLE_V6: usize = USUAL_WORDS_V6 + USUAL_WORDS_OF_OPTIONS;
        let mut kind = [0; 1];
        if !self.load_into(OFFSET, &mut kind) {
            return 0;
        }
        if is_usual_v6(kind[0]) {
            if self.load_into(OFFSET, headers) {
                return WHOLE_V6;
            }
            let bare = headers.first_chunk_mut::<USUAL_WORDS_V6>();
            return if bare.is_some_and(|bare| self.load_into(OFFSET, bare)) { USUAL_WORDS_V6 } else { 0 };
        }
        let whole = headers.first_chunk_mut::<WHOLE_V4>();
        if whole.is_some_and(|whole| self.load_into(OFFSET, whole)) {
            return WHOLE_V4;
        }
        let bare = headers.first_chunk_mut::<USUAL_WORDS_V4>();
        if bare.is_some_and(|bare| self.load_into(OFFSET, bare)) { USUAL_WORDS_V4 } else { 0 }
    }

    /// Reads into `place`; tells whether the frame has as much.
    #[inline(always)]
    fn load_into<T>(self, offset: u32, place: &mut T) -> bool {
        let Some(start) = self.at::<T>(offset) else { return false };
        let to = (&raw mut *place).cast::<u32>();
        for index in 0..size_of::<T>() / 4 {
            let word: u32;
            // SAFETY: it lies within the frame. The machine reads words at odd places, or the kernel refuses the program.
            unsafe {
                asm!("{} = *(u32 *)({} + 0)", out(reg) word, in(reg) start + index * 4, options(pure, readonly, nostack));
            }
            // SAFETY: `place` has as many words, of which any bits are valid.
            unsafe { to.add(index).write(word) };
        }
        true
    }
}

impl PacketMut for UsualFrame<'_> {
    #[inline(always)]
    fn load<T>(self, offset: u32) -> Result<T, Verdict> {
        XdpFrame(self.0).load(offset)
    }

    #[inline(always)]
    fn store<T>(self, offset: u32, value: &T) -> Result<(), Verdict> {
        let start = self.at::<T>(offset).ok_or(Verdict::Unwritable)?;
        let from = (&raw const *value).cast::<u32>();
        for index in 0..size_of::<T>() / 4 {
            // SAFETY: the value is initialised, and has as many words.
            let word = unsafe { from.add(index).read() };
            // SAFETY: it lies within the frame, which nobody else uses while the program runs; otherwise as above.
            unsafe {
                asm!("*(u32 *)({} + 0) = {}", in(reg) start + index * 4, in(reg) word, options(nostack));
            }
        }
        Ok(())
    }

    #[inline(always)]
    fn change_checksum(
        self,
        segment: &Segment,
        change: ChecksumChange,
        summed: Summed,
    ) -> Result<(), Verdict> {
        XdpFrame(self.0).change_checksum(segment, change, summed)
    }

    #[inline(always)]
    fn checksum_keeper(self) -> ChecksumKeeper {
        XdpFrame(self.0).checksum_keeper()
    }
}

/// A frame whose headers are read where they lie, on kernels without such calls too.
pub(super) struct FrameInPlace<'a>(pub(super) &'a XdpContext);

impl Packet for FrameInPlace<'_> {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        let start = self.0.data();
        if offset > MOST_HEADERS || start + offset + size_of::<T>() > self.0.data_end() {
            return None;
        }
        // SAFETY: what is read lies within the frame, any bits are valid for a header, and the read is unaligned.
        Some(unsafe { ((start + offset) as *const T).read_unaligned() })
    }
}

impl Packet for XdpFrame<'_> {
    #[inline(always)]
    fn read<T: Header>(&self, offset: usize) -> Option<T> {
        self.load(offset as u32).ok()
    }
}
