//! The BPF filters of the queueing discipline clsact on an interface: which programs hang there, and under which numbers.
//!
//! A filter is known by its program's id, which the kernel gives to no other program while that one lives, never by the
//! program's name: another installation on the node has programs of the same names.

use std::io;

use aya::programs::TcAttachType;
use aya::programs::tc::{SchedClassifierLink, TcHandle};
use rustix::io::Errno;

use crate::net::netlink::{self, Message, NetlinkSocket};

/// From `linux/rtnetlink.h`.
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const TCA_OPTIONS: u16 = 2;
/// From `linux/pkt_cls.h`.
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;
/// The sides of clsact as the parents of its filters (`TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)`).
const PARENT_INGRESS: u32 = 0xffff_fff2;
const PARENT_EGRESS: u32 = 0xffff_fff3;
/// `ETH_P_ALL`: filters see packets of every protocol.
const EVERY_PROTOCOL: u16 = 3;
/// Bytes of `struct tcmsg`, and where its fields stand.
const HEADER: usize = 20;
const HANDLE: usize = 8;
const PARENT: usize = 12;
const INFO: usize = 16;

/// A BPF filter.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Filter {
    /// The id of its program.
    pub(crate) program: u32,
    /// What whoever attached it called the program.
    pub(crate) name: String,
    /// Where it stands among the others.
    pub(super) priority: u16,
    /// Its number under this priority.
    pub(super) handle: u32,
}

impl Filter {
    /// What detaches it from an interface, or replaces its program.
    ///
    /// # Errors
    /// The interface is gone.
    pub(crate) fn link(&self, interface: &str, side: TcAttachType) -> io::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(interface, side, self.priority, TcHandle::from(self.handle), None)
    }
}

/// A socket that answers for filters.
#[derive(Debug)]
pub(crate) struct Filters(NetlinkSocket);

impl Filters {
    /// Opens the socket, in the network namespace of this thread.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn open() -> io::Result<Self> {
        // `NETLINK_ROUTE` is the protocol without a number.
        Ok(Self(NetlinkSocket::open(None)?))
    }

    /// The BPF filters on a side of an interface; none where there is no clsact, or no such interface.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn list(&mut self, interface: u32, side: TcAttachType) -> io::Result<Vec<Filter>> {
        let mut found = Vec::new();
        let listed = self.0.list(
            |question, sequence| write(question, sequence, interface, side, None),
            |message| {
                // Before clsact was asked for by its parent, the kernel listed the filters of the root.
                let is_asked = netlink::word(message.body, PARENT) == Some(parent(side));
                found.extend(read(message).filter(|_| is_asked));
            },
        );
        match listed {
            // What the kernel says where there is no such queueing discipline has changed between versions.
            Err(Errno::NODEV | Errno::INVAL | Errno::NOENT) => Ok(Vec::new()),
            listed => listed.map(|()| found).map_err(io::Error::from),
        }
    }

    /// The id of the program that a filter has now.
    ///
    /// # Errors
    /// `ENOENT` or `EINVAL` if there is no such filter or no clsact, `ENODEV` if there is no such interface, or the kernel does
    /// not say.
    pub(crate) fn program(
        &mut self,
        interface: u32,
        side: TcAttachType,
        priority: u16,
        handle: u32,
    ) -> Result<u32, Errno> {
        self.0.ask(
            |question, sequence| write(question, sequence, interface, side, Some((priority, handle))),
            |answer, sequence| {
                let program = |message| read(&message).map(|filter| filter.program).ok_or(Errno::NOENT);
                Some(netlink::answer_to(answer, sequence)?.and_then(program))
            },
        )?
    }
}

fn parent(side: TcAttachType) -> u32 {
    match side {
        TcAttachType::Ingress => PARENT_INGRESS,
        TcAttachType::Egress => PARENT_EGRESS,
        TcAttachType::Custom(parent) => parent,
    }
}

/// Writes the question for one filter, by priority and handle, or for all.
fn write(question: &mut Vec<u8>, sequence: u32, interface: u32, side: TcAttachType, one: Option<(u16, u32)>) {
    let (priority, handle) = one.unwrap_or_default();
    let protocol = if one.is_some() { EVERY_PROTOCOL.to_be() } else { 0 };
    netlink::begin(question, RTM_GETTFILTER, sequence);
    // The family, which is none, and padding.
    question.extend([0; 4]);
    question.extend(interface.to_ne_bytes());
    question.extend(handle.to_ne_bytes());
    question.extend(parent(side).to_ne_bytes());
    question.extend((u32::from(priority) << 16 | u32::from(protocol)).to_ne_bytes());
    netlink::end(question);
}

/// The BPF filter that a message of the kernel is about, if it is about one.
fn read(message: &Message<'_>) -> Option<Filter> {
    if message.kind != RTM_NEWTFILTER {
        return None;
    }
    let attributes = || netlink::attributes(message.body.get(HEADER..).unwrap_or_default());
    let options = attributes().find_map(|(kind, value)| (kind == TCA_OPTIONS).then_some(value))?;
    let option =
        |wanted| netlink::attributes(options).find_map(|(kind, value)| (kind == wanted).then_some(value));
    let name = option(TCA_BPF_NAME).unwrap_or_default().split(|byte| *byte == 0).next().unwrap_or_default();
    Some(Filter {
        program: netlink::word(option(TCA_BPF_ID)?, 0)?,
        name: String::from_utf8_lossy(name).into_owned(),
        priority: u16::try_from(netlink::word(message.body, INFO)? >> 16).ok()?,
        handle: netlink::word(message.body, HANDLE)?,
    })
}
