//! What interfaces do at XDP, by the generic netlink family `netdev` (Linux 6.3 and later).

use std::collections::BTreeSet;
use std::io;

use rustix::io::Errno;
use rustix::net::netlink::GENERIC;

use crate::net::netlink::{self, Message, NetlinkSocket, attributes, word, write_attribute};

/// From `linux/genetlink.h`: who knows the families, and the question for one of them.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
/// Bytes of `struct genlmsghdr`.
const GENERIC_HEADER: usize = 4;
/// From `linux/netdev.h`.
const FAMILY: &[u8] = b"netdev\0";
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
/// It takes frames that a program at XDP of another interface sends there (`ndo_xdp_xmit`).
const NETDEV_XDP_ACT_NDO_XMIT: u64 = 4;

/// A socket that answers for interfaces, in the network namespace in which it was opened.
#[derive(Debug)]
pub(crate) struct Netdev {
    socket: NetlinkSocket,
    family: u16,
}

impl Netdev {
    /// Opens the socket.
    ///
    /// # Errors
    /// The kernel refuses; [`io::ErrorKind::NotFound`] if it does not know the family.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = NetlinkSocket::open(Some(GENERIC))?;
        let family = socket.ask(
            |question, sequence| {
                begin(question, GENL_ID_CTRL, CTRL_CMD_GETFAMILY, sequence);
                write_attribute(question, CTRL_ATTR_FAMILY_NAME, FAMILY);
                netlink::end(question);
            },
            |answer, sequence| {
                let id = |message| {
                    let id = attribute(&message, CTRL_ATTR_FAMILY_ID);
                    id.and_then(|id| netlink::half_word(id, 0)).ok_or(Errno::NOENT)
                };
                Some(netlink::answer_to(answer, sequence)?.and_then(id))
            },
        )??;
        Ok(Self { socket, family })
    }

    /// The indices of the interfaces that take frames from programs at XDP of others.
    ///
    /// # Errors
    /// The kernel does not say.
    pub(crate) fn xdp_targets(&mut self) -> io::Result<BTreeSet<u32>> {
        let mut found = BTreeSet::new();
        let family = self.family;
        self.socket.list(
            |question, sequence| {
                begin(question, family, NETDEV_CMD_DEV_GET, sequence);
                netlink::end(question);
            },
            |message| {
                let index = attribute(message, NETDEV_A_DEV_IFINDEX).and_then(|value| word(value, 0));
                let features = attribute(message, NETDEV_A_DEV_XDP_FEATURES)
                    .and_then(|value| value.first_chunk().copied().map(u64::from_ne_bytes));
                if let (Some(index), Some(features)) = (index, features)
                    && features & NETDEV_XDP_ACT_NDO_XMIT != 0
                {
                    found.insert(index);
                }
            },
        )?;
        Ok(found)
    }
}

/// Begins a question to a family.
fn begin(question: &mut Vec<u8>, family: u16, command: u8, sequence: u32) {
    netlink::begin(question, family, sequence);
    // The command, and the version of the family.
    question.extend([command, 1, 0, 0]);
}

/// The value of an attribute.
fn attribute<'a>(message: &Message<'a>, kind: u16) -> Option<&'a [u8]> {
    let body = message.body.get(GENERIC_HEADER..)?;
    attributes(body).find_map(|(found, value)| (found == kind).then_some(value))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::net::namespaces::Namespace;

    /// One end of a veth takes frames if the other one gathers packets (GRO).
    #[test]
    fn the_kernel_tells_of_interfaces() {
        const INDICES: [u32; 2] = [11, 12];
        let Some(namespace) = Namespace::new() else { return };
        namespace.ip("link add one index 11 type veth peer name other index 12");
        namespace.ip("link set one up");
        namespace.ip("link set other up");
        let gather = |device: &str| {
            let mut command = Command::new("ethtool");
            let done = command.args(["-K", device, "gro", "on"]).output().unwrap();
            assert!(done.status.success(), "{done:?}");
        };
        namespace.run(|| {
            let mut netdev = match Netdev::open() {
                Ok(netdev) => netdev,
                Err(error) => return assert_eq!(error.kind(), io::ErrorKind::NotFound, "{error}"),
            };
            let [one, other] = INDICES;
            assert_eq!(netdev.xdp_targets().unwrap(), BTreeSet::new());
            gather("other");
            assert_eq!(netdev.xdp_targets().unwrap(), BTreeSet::from([one]));
            gather("one");
            assert_eq!(netdev.xdp_targets().unwrap(), BTreeSet::from([one, other]));
        });
    }
}
