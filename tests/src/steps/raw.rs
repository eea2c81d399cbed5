//! Packets that no socket of an end would send.

use std::net::{IpAddr, SocketAddr, TcpStream};

use anyhow::Result;
use socket2::{Domain, Protocol, Socket, Type};

use crate::sequence;

const TCP: u8 = 6;
/// The length of a TCP header without options.
const HEADER: usize = 20;
const FLAG_SYN: u8 = 2;
const FLAG_ACK: u8 = 16;

/// Sends a SYN with the addresses and ports of a connection, from this end of it.
pub(super) fn send_syn(stream: &TcpStream) -> Result<()> {
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    // A number like that of a new connection: far from the window.
    let number = sequence::read(stream)?.send.wrapping_add(1 << 30);
    let header = tcp(local, peer, number, FLAG_SYN);
    send(local, peer, Protocol::TCP, &header)
}

/// Tells the other end that a packet of its own has not reached this one, since the host is unreachable.
pub(super) fn send_unreachable(stream: &TcpStream) -> Result<()> {
    let (local, peer) = (stream.local_addr()?, stream.peer_addr()?);
    // The next one that it could send: the kernel heeds only what is within its window (`tcp_v4_err`).
    let number = sequence::read(stream)?.receive;
    let header = tcp(peer, local, number, FLAG_ACK);
    match (local.ip(), peer.ip()) {
        (IpAddr::V4(to), IpAddr::V4(from)) => {
            // Destination unreachable, host unreachable.
            let mut message = vec![3, 1, 0, 0, 0, 0, 0, 0, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, TCP, 0, 0];
            message.extend(from.octets());
            message.extend(to.octets());
            let sum = checksum(&message[8..]);
            message[18..20].copy_from_slice(&sum);
            message.extend(header);
            let sum = checksum(&message);
            message[2..4].copy_from_slice(&sum);
            send(local, peer, Protocol::ICMPV4, &message)
        }
        (IpAddr::V6(to), IpAddr::V6(from)) => {
            // Destination unreachable, address unreachable; the kernel makes the checksum (`rawv6_push_pending_frames`).
            let mut message = vec![1, 3, 0, 0, 0, 0, 0, 0, 0x60, 0, 0, 0, 0, 20, TCP, 64];
            message.extend(from.octets());
            message.extend(to.octets());
            message.extend(header);
            send(local, peer, Protocol::ICMPV6, &message)
        }
        _ => Ok(()),
    }
}

fn send(local: SocketAddr, peer: SocketAddr, protocol: Protocol, bytes: &[u8]) -> Result<()> {
    let socket = Socket::new(Domain::for_address(local), Type::RAW, Some(protocol))?;
    socket.bind(&SocketAddr::new(local.ip(), 0).into())?;
    socket.send_to(bytes, &SocketAddr::new(peer.ip(), 0).into())?;
    Ok(())
}

/// A TCP header without options and payload.
fn tcp(source: SocketAddr, destination: SocketAddr, number: u32, flags: u8) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..2].copy_from_slice(&source.port().to_be_bytes());
    header[2..4].copy_from_slice(&destination.port().to_be_bytes());
    header[4..8].copy_from_slice(&number.to_be_bytes());
    header[12..16].copy_from_slice(&[5 << 4, flags, 0xff, 0xff]);
    let mut summed = Vec::new();
    for address in [source.ip(), destination.ip()] {
        match address {
            IpAddr::V4(address) => summed.extend(address.octets()),
            IpAddr::V6(address) => summed.extend(address.octets()),
        }
    }
    // The same sum as with the pseudo headers' order and widths.
    summed.extend([0, TCP, 0, 20]);
    summed.extend(header);
    header[16..18].copy_from_slice(&checksum(&summed));
    header
}

/// The checksum of RFC 1071 over an even number of bytes.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks_exact(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "the carries are folded")]
    let sum = !(sum as u16);
    sum.to_be_bytes()
}
