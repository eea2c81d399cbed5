//! Questions for routes and the kernel's answers, as they stand in netlink messages (rtnetlink(7)): in the host's byte
//! order, but for addresses.

use std::io;
use std::net::IpAddr;

use forwarder_common::packet::PROTOCOL_TCP;

use super::{LookupError, ResolvedRoute};
use crate::net::netlink::{self, Message, NLMSG_ERROR, attributes, word, write_attribute};

/// Bytes of `struct rtmsg`, and where the route's type stands in it.
const ROUTE_HEADER: usize = 12;
const ROUTE_KIND: usize = 7;

/// From `linux/netlink.h` and `linux/rtnetlink.h`.
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_METRICS: u16 = 8;
const RTA_VIA: u16 = 18;
const RTA_IP_PROTO: u16 = 27;
const RTAX_MTU: u16 = 2;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTN_ANYCAST: u8 = 4;
/// From `sys/socket.h`.
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// Writes the question for the route of TCP packets between two addresses of the same family.
pub(super) fn write_question(question: &mut Vec<u8>, sequence: u32, local: IpAddr, peer: IpAddr) {
    netlink::begin(question, RTM_GETROUTE, sequence);
    let (family, bits) = if peer.is_ipv4() { (AF_INET, 32) } else { (AF_INET6, 128) };
    let source_bits = if local.is_unspecified() { 0 } else { bits };
    question.extend([family, bits, source_bits, 0, 0, 0, 0, 0]);
    // No flags.
    question.extend([0; 4]);
    write_address(question, RTA_DST, peer);
    if !local.is_unspecified() {
        write_address(question, RTA_SRC, local);
    }
    // Rules may be for TCP alone.
    write_attribute(question, RTA_IP_PROTO, &[PROTOCOL_TCP]);
    netlink::end(question);
}

fn write_address(question: &mut Vec<u8>, kind: u16, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => write_attribute(question, kind, &v4.octets()),
        IpAddr::V6(v6) => write_attribute(question, kind, &v6.octets()),
    }
}

/// What the answer to the question `sequence` for the route to `peer` says; `None` if it answers another question.
pub(super) fn read_answer(
    answer: &[u8],
    sequence: u32,
    peer: IpAddr,
) -> Result<Option<ResolvedRoute>, LookupError> {
    let malformed = |what| LookupError::Malformed { what };
    let Message { kind, sequence: answered, body } = netlink::message(answer).map_err(malformed)?;
    if answered != sequence {
        return Ok(None);
    }
    match kind {
        NLMSG_ERROR => {
            let errno = netlink::errno(body).ok_or(malformed("the error has no number"))?;
            Err(LookupError::Refused { source: io::Error::from_raw_os_error(errno) })
        }
        RTM_NEWROUTE => read_route(body, peer).map(Some),
        _ => Err(malformed("it is neither a route nor an error")),
    }
}

fn read_route(route: &[u8], peer: IpAddr) -> Result<ResolvedRoute, LookupError> {
    let malformed = |what| LookupError::Malformed { what };
    let kind = *route.get(ROUTE_KIND).ok_or(malformed("the route has no header"))?;
    let is_local = match kind {
        RTN_UNICAST => false,
        // The node takes packets to an anycast address (IPv6) as it takes those to its own.
        RTN_LOCAL | RTN_ANYCAST => true,
        _ => return Err(LookupError::Kind { kind }),
    };
    let (mut interface, mut mtu, mut next_hop) = (None, None, peer);
    for (kind, value) in attributes(route.get(ROUTE_HEADER..).unwrap_or_default()) {
        match kind {
            RTA_OIF => interface = word(value, 0),
            RTA_GATEWAY => next_hop = address(value).ok_or(malformed("the gateway is no address"))?,
            // A gateway of the other family, behind that family's number.
            RTA_VIA => {
                let via = value.get(2..).and_then(address);
                next_hop = via.ok_or(malformed("the gateway is no address"))?;
            }
            RTA_METRICS => mtu = metric(value, RTAX_MTU),
            _ => {}
        }
    }
    let interface = interface.ok_or(malformed("the route has no interface"))?;
    Ok(ResolvedRoute { interface, next_hop, is_local, mtu })
}

/// The address that is all of `value`.
fn address(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(value).map(IpAddr::from)).ok()
}

/// One of the numbers among a route's metrics, if it is set.
fn metric(metrics: &[u8], wanted: u16) -> Option<u32> {
    let (_, value) = attributes(metrics).find(|(kind, _)| *kind == wanted)?;
    word(value, 0).filter(|value| *value != 0)
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::net::netlink::MESSAGE_HEADER;

    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(MESSAGE_HEADER + body.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend([0; 2]);
        message.extend(sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        message
    }

    fn route(kind: u8, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut route = vec![AF_INET, 32, 0, 0, 0, 0, 0, kind, 0, 0, 0, 0];
        for (kind, value) in attributes {
            write_attribute(&mut route, *kind, value);
        }
        route
    }

    #[test]
    fn a_route_is_read() {
        let mut metrics = Vec::new();
        write_attribute(&mut metrics, 1, &[1, 0, 0, 0]);
        write_attribute(&mut metrics, RTAX_MTU, &1400_u32.to_ne_bytes());
        let oif: &[u8] = &7_u32.to_ne_bytes();
        for (kind, is_local) in [(RTN_UNICAST, false), (RTN_LOCAL, true), (RTN_ANYCAST, true)] {
            let attributes = [(99, [1, 2, 3].as_slice()), (RTA_OIF, oif), (RTA_METRICS | 0x8000, &metrics)];
            let answer = message(RTM_NEWROUTE, 5, &route(kind, &attributes));
            let expected = ResolvedRoute { interface: 7, next_hop: PEER, is_local, mtu: Some(1400) };
            assert_eq!(read_answer(&answer, 5, PEER).unwrap(), Some(expected));
        }
    }

    #[test]
    fn the_answer_to_another_question_is_passed_over() {
        assert_eq!(read_answer(&message(NLMSG_ERROR, 4, &[0; 4]), 5, PEER).unwrap(), None);
    }

    #[test]
    fn what_is_no_route_is_told() {
        let check = |answer: &[u8], expected: &str| {
            assert_eq!(read_answer(answer, 5, PEER).unwrap_err().to_string(), expected);
        };
        let unreachable = message(NLMSG_ERROR, 5, &(-101_i32).to_ne_bytes());
        check(&unreachable, "Network is unreachable (os error 101)");
        check(&message(3, 5, &[]), "malformed answer from the kernel: it is neither a route nor an error");
        check(&message(RTM_NEWROUTE, 5, &[]), "malformed answer from the kernel: the route has no header");
        let no_interface = message(RTM_NEWROUTE, 5, &route(RTN_UNICAST, &[]));
        check(&no_interface, "malformed answer from the kernel: the route has no interface");
        check(&message(RTM_NEWROUTE, 5, &route(3, &[])), "a route of type 3 leads to no single host");
        check(&no_interface[..20], "malformed answer from the kernel: it is cut short");
        check(&[], "malformed answer from the kernel: it is cut short");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..200), kind in 0_u16..30) {
            let _ = read_answer(&bytes, 5, PEER);
            let _ = read_answer(&message(kind, 5, &bytes), 5, PEER);
        }
    }
}
