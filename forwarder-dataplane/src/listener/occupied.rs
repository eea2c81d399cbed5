//! The ports of this node that somebody listens on, and who does, as `/proc` tells (proc(5)).

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use forwarder_gateway::model::{BindAddress, ListenerKey};

/// The state of a listening socket in `/proc/net/tcp` (`TCP_LISTEN`).
const LISTENING: &str = "0A";

/// A socket that listens.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ListeningSocket {
    address: SocketAddr,
    inode: u64,
}

impl ListeningSocket {
    /// Whether a listener cannot be bound beside it.
    pub fn is_in_the_way_of(&self, key: ListenerKey) -> bool {
        let ip = self.address.ip();
        let overlaps = match key.address {
            BindAddress::Any => true,
            BindAddress::Ip(wanted) => wanted == ip || wanted.is_unspecified() || ip.is_unspecified(),
        };
        overlaps && self.address.port() == key.port.get()
    }

    /// The process that has it, such as `mysqld (1234)`, where it can be seen: it runs in another namespace of processes else, or the
    /// agent may not look.
    pub fn process(&self) -> Option<String> {
        let socket = format!("socket:[{}]", self.inode);
        let is_process = |folder: &fs::DirEntry| folder.file_name().to_string_lossy().parse::<u32>().is_ok();
        let has_it = |folder: &fs::DirEntry| {
            let files = fs::read_dir(folder.path().join("fd")).into_iter().flatten().flatten();
            files.filter_map(|file| fs::read_link(file.path()).ok()).any(|link| link.as_os_str() == &*socket)
        };
        let folder = fs::read_dir("/proc").ok()?.flatten().filter(is_process).find(has_it)?;
        let name = fs::read_to_string(folder.path().join("comm")).ok()?;
        Some(format!("{} ({})", name.trim_end(), folder.file_name().display()))
    }
}

/// The sockets that listen in the network namespace of the agent.
///
/// # Errors
/// `/proc` cannot be read.
pub fn listening_sockets() -> io::Result<Vec<ListeningSocket>> {
    let mut all = Vec::new();
    for family in ["tcp", "tcp6"] {
        let file = match fs::File::open(format!("/proc/self/net/{family}")) {
            // A node without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened?,
        };
        // Those that listen come first, before what may be a million connections.
        for line in BufReader::new(file).lines().skip(1) {
            let Some(socket) = parse(&line?) else { break };
            all.push(socket);
        }
    }
    Ok(all)
}

/// A line of a socket that listens: number, local address, remote address, state, queues, timer, retransmissions, user, time-out,
/// inode.
fn parse(line: &str) -> Option<ListeningSocket> {
    let mut columns = line.split_ascii_whitespace().skip(1);
    let (local, _, state) = (columns.next()?, columns.next()?, columns.next()?);
    let (ip, port) = local.split_once(':')?;
    let address = SocketAddr::new(address(ip)?, u16::from_str_radix(port, 16).ok()?);
    let inode = columns.nth(5)?.parse().ok()?;
    (state == LISTENING).then_some(ListeningSocket { address, inode })
}

/// An address in words of 32 bits, each printed as a number of this machine.
fn address(text: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = text.get(index * 8..index * 8 + 8)?;
        Some(u32::from_str_radix(digits, 16).ok()?.to_ne_bytes())
    };
    if text.len() == 8 {
        return Some(Ipv4Addr::from(word(0)?).into());
    }
    let words = [word(0)?, word(1)?, word(2)?, word(3)?];
    let bytes: [u8; 16] = words.concat().try_into().ok()?;
    Some(Ipv6Addr::from(bytes).into())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::num::NonZeroU16;

    use super::*;

    #[test]
    fn a_listening_socket_is_found_with_its_process() {
        for ip in ["127.0.0.1", "::1", "0.0.0.0", "::"] {
            let listener = TcpListener::bind((ip, 0)).unwrap();
            let address = listener.local_addr().unwrap();
            let connected = std::net::TcpStream::connect(address).unwrap();
            let all = listening_sockets().unwrap();
            let found = all.iter().find(|socket| socket.address == address).unwrap();
            assert_eq!(
                found.process().unwrap().split_once(" (").unwrap().1,
                format!("{})", std::process::id())
            );
            let port = NonZeroU16::new(address.port()).unwrap();
            for (wanted, expected) in [
                (BindAddress::Any, true),
                (BindAddress::Ip(address.ip()), true),
                (BindAddress::Ip("192.0.2.1".parse().unwrap()), address.ip().is_unspecified()),
            ] {
                let key = ListenerKey { address: wanted, port };
                assert_eq!(found.is_in_the_way_of(key), expected, "{ip}: {key}");
            }
            drop((listener, connected));
            assert!(!listening_sockets().unwrap().iter().any(|socket| socket.address == address), "{ip}");
        }
    }
}
