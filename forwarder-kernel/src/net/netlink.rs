//! What all netlink messages have in common (netlink(7)): in the host's byte order.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// Bytes of the longest answer that is understood. Most have some 100.
const ANSWER: usize = 4096;
/// Bytes of the longest part of a list: more than the kernel puts into one (`netlink_dump`).
const PART: usize = 32 << 10;

/// Bytes of `struct nlmsghdr`, and where its fields stand.
pub(super) const MESSAGE_HEADER: usize = 16;
const MESSAGE_LENGTH: usize = 0;
const MESSAGE_KIND: usize = 4;
const MESSAGE_SEQUENCE: usize = 8;
/// Bytes of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;
/// The bits of an attribute's kind that are no flags (`NLA_TYPE_MASK`).
const ATTRIBUTE_KIND: u16 = 0x3fff;

/// From `linux/netlink.h`.
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Where the flags of a message stand.
const MESSAGE_FLAGS: usize = 6;
const NLMSG_DONE: u16 = 3;
pub(super) const NLMSG_ERROR: u16 = 2;

/// A socket to the kernel, in the network namespace in which it was opened. One question at a time: a question and its
/// answer must follow each other.
#[derive(Debug)]
pub(super) struct NetlinkSocket {
    socket: OwnedFd,
    /// The number of the last question.
    sequence: u32,
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl NetlinkSocket {
    /// Opens a socket; `NETLINK_ROUTE` is the one without a protocol, which is 0.
    ///
    /// # Errors
    /// The kernel refuses, or does not know the protocol.
    pub(super) fn open(protocol: Option<Protocol>) -> rustix::io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, protocol)?;
        Ok(Self { socket, sequence: 0, question: Vec::new(), answer: vec![0; ANSWER] })
    }

    /// Sends the question that `write` makes under the number that it is given, and takes the answer, from which `read`
    /// takes what is wanted, or nothing, if it answers another question.
    ///
    /// It does not wait: the kernel answers a question for one thing while it is being sent (`netlink_unicast_kernel`), or
    /// never.
    ///
    /// # Errors
    /// The socket fails; `EAGAIN` if there is no answer.
    pub(super) fn ask<T>(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>, u32),
        read: impl Fn(&[u8], u32) -> Option<T>,
    ) -> rustix::io::Result<T> {
        self.sequence = self.sequence.wrapping_add(1);
        write(&mut self.question, self.sequence);
        // A netlink socket that is not connected sends to the kernel.
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &self.question, SendFlags::empty()))?;
        loop {
            let (length, _) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, self.answer.as_mut_slice(), RecvFlags::empty())
            })?;
            if let Some(wanted) = read(self.answer.get(..length).unwrap_or_default(), self.sequence) {
                return Ok(wanted);
            }
        }
    }

    /// Asks for a list by the question that `write` makes under the number that it is given; `each` sees every message of it.
    ///
    /// # Errors
    /// The kernel refuses, or the socket fails; `EAGAIN` after [`PATIENCE`].
    pub(super) fn list(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>, u32),
        mut each: impl FnMut(&Message<'_>),
    ) -> rustix::io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        write(&mut self.question, self.sequence);
        if let Some(flags) = self.question.get_mut(MESSAGE_FLAGS..MESSAGE_SEQUENCE) {
            flags.copy_from_slice(&(NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
        }
        rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, &self.question, SendFlags::empty()))?;
        let mut part = vec![0; PART];
        loop {
            let (length, _) = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, part.as_mut_slice(), RecvFlags::empty())
            })?;
            let mut rest = part.get(..length).unwrap_or_default();
            while let Ok(one) = message(rest) {
                let is_answer = one.sequence == self.sequence;
                match one.kind {
                    NLMSG_DONE if is_answer => return Ok(()),
                    NLMSG_ERROR if is_answer => {
                        let number = errno(one.body).unwrap_or_default();
                        return Err(Errno::from_raw_os_error(number));
                    }
                    _ if is_answer => each(&one),
                    _ => {}
                }
                let length = (MESSAGE_HEADER + one.body.len()).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
            }
        }
    }
}

/// Begins a question: its header, but for the length.
pub(super) fn begin(question: &mut Vec<u8>, kind: u16, sequence: u32) {
    begin_with(question, kind, NLM_F_REQUEST, sequence);
}

/// Begins an order, which is answered with an error, or that there is none.
pub(super) fn begin_order(question: &mut Vec<u8>, kind: u16, sequence: u32) {
    begin_with(question, kind, NLM_F_REQUEST | NLM_F_ACK, sequence);
}

fn begin_with(question: &mut Vec<u8>, kind: u16, flags: u16, sequence: u32) {
    question.clear();
    // The length, once it is known.
    question.extend([0; 4]);
    question.extend(kind.to_ne_bytes());
    question.extend(flags.to_ne_bytes());
    question.extend(sequence.to_ne_bytes());
    // The port, which the kernel chooses.
    question.extend([0; 4]);
}

/// Ends a question: it is as long as it is.
pub(super) fn end(question: &mut [u8]) {
    let length = u32::try_from(question.len()).unwrap_or_default();
    if let Some(field) = question.get_mut(MESSAGE_LENGTH..MESSAGE_KIND) {
        field.copy_from_slice(&length.to_ne_bytes());
    }
}

/// A message of the kernel.
pub(super) struct Message<'a> {
    /// Its kind.
    pub(super) kind: u16,
    /// The number of the question that it answers.
    pub(super) sequence: u32,
    /// What follows its header.
    pub(super) body: &'a [u8],
}

/// Takes an answer apart.
///
/// # Errors
/// What is wrong with it.
pub(super) fn message(answer: &[u8]) -> Result<Message<'_>, &'static str> {
    let length = word(answer, MESSAGE_LENGTH).and_then(|length| usize::try_from(length).ok());
    let message = length.and_then(|length| answer.get(..length)).ok_or("it is cut short")?;
    let parts =
        (half_word(message, MESSAGE_KIND), word(message, MESSAGE_SEQUENCE), message.get(MESSAGE_HEADER..));
    match parts {
        (Some(kind), Some(sequence), Some(body)) => Ok(Message { kind, sequence, body }),
        _ => Err("it has no header"),
    }
}

/// What answers the question `sequence`: a message, or the error that the kernel tells instead, 0 where it tells none. `None` if it answers another question.
pub(super) fn answer_to(answer: &[u8], sequence: u32) -> Option<Result<Message<'_>, Errno>> {
    let message = message(answer).ok().filter(|message| message.sequence == sequence)?;
    if message.kind == NLMSG_ERROR {
        return Some(Err(Errno::from_raw_os_error(errno(message.body).unwrap_or_default())));
    }
    Some(Ok(message))
}

/// The number of the error that a message of kind [`NLMSG_ERROR`] tells; `None` if it tells none.
pub(super) fn errno(body: &[u8]) -> Option<i32> {
    Some(word(body, 0)?.cast_signed().wrapping_neg())
}

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
