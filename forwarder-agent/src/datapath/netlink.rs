//! What all netlink messages have in common (netlink(7)): in the host's byte order.

/// Bytes of `struct nlmsghdr`, and where its fields stand.
pub(super) const MESSAGE_HEADER: usize = 16;
pub(super) const MESSAGE_LENGTH: usize = 0;
pub(super) const MESSAGE_KIND: usize = 4;
pub(super) const MESSAGE_SEQUENCE: usize = 8;
/// Bytes of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// The bits of an attribute's kind that are no flags (`NLA_TYPE_MASK`).
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// From `linux/netlink.h`.
pub(super) const NLM_F_REQUEST: u16 = 1;
pub(super) const NLMSG_ERROR: u16 = 2;

/// Writes an attribute behind what is there of a message.
pub(super) fn write_attribute(question: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or_default();
    question.extend(length.to_ne_bytes());
    question.extend(kind.to_ne_bytes());
    question.extend(value);
    // The next one begins at a multiple of four.
    question.resize(question.len().next_multiple_of(4), 0);
}

/// The attributes, by their kinds, up to the first that is cut short.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(half_word(bytes, 0)?);
        let kind = half_word(bytes, 2)? & ATTRIBUTE_KIND;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The 32 bits at a place.
pub(super) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

/// The 16 bits at a place.
pub(super) fn half_word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}
