//! Whether the node's stack would send on what a program has translated and left to it: as a router, and although it
//! comes from an address of the node itself.

use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

/// Where the variables of the network namespace stand.
const VARIABLES: &str = "/proc/sys/net";

/// The TTL and hop limit of a kernel that was told nothing else (`IPDEFTTL`, `IPV6_DEFAULT_HOPLIMIT`).
const HOP_LIMIT: u8 = 64;

/// A variable of the kernel that stands in the way.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Obstacle {
    /// Its name, as sysctl(8) has it.
    pub name: String,
    /// What it would have to be.
    pub wanted: &'static str,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} has to be {}", self.name, self.wanted)
    }
}

/// The family of packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// That of an address, of which one of IPv4 may be mapped into IPv6.
    pub fn of(address: IpAddr) -> Self {
        if address.to_canonical().is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// The TTL or hop limit that the node gives its own packets by `interface`, a name: what its variables say, unless they say
/// nothing sensible. That of a single route (`ip route ... hoplimit`) is not asked for.
pub fn hop_limit(interface: &str, family: Family) -> u8 {
    hop_limit_in(Path::new(VARIABLES), interface, family)
}

fn hop_limit_in(variables: &Path, interface: &str, family: Family) -> u8 {
    let path = match family {
        Family::V4 => variables.join("ipv4/ip_default_ttl"),
        Family::V6 => variables.join("ipv6/conf").join(interface).join("hop_limit"),
    };
    let value = fs::read_to_string(path).ok().and_then(|value| value.trim().parse().ok());
    value.filter(|value| *value > 0).unwrap_or(HOP_LIMIT)
}

/// Looks whether packets that arrive through `interface`, a name, would be sent on.
///
/// # Errors
/// What has to be changed for that, by somebody who may.
pub fn check(interface: &str, family: Family) -> Result<(), Obstacle> {
    check_in(Path::new(VARIABLES), interface, family)
}

fn check_in(variables: &Path, interface: &str, family: Family) -> Result<(), Obstacle> {
    let family_name = match family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    // The names of interfaces may hold dots, for which sysctl(8) has slashes.
    let name =
        |device: &str, variable| format!("net.{family_name}.conf.{}.{variable}", device.replace('.', "/"));
    let value = |device: &str, variable: &str| -> Option<u32> {
        let path = variables.join(family_name).join("conf").join(device).join(variable);
        fs::read_to_string(path).ok()?.trim().parse().ok()
    };
    match family {
        Family::V4 => {
            if value(interface, "forwarding") != Some(1) {
                return Err(Obstacle { name: name(interface, "forwarding"), wanted: "1" });
            }
            // Else its own address is a stranger's lie (`fib_validate_source`): either variable allows it.
            if ["all", interface].iter().all(|device| value(device, "accept_local") != Some(1)) {
                return Err(Obstacle { name: name(interface, "accept_local"), wanted: "1" });
            }
            // The larger of the two counts; a local address comes through no interface, which 1 insists on.
            let strictness = ["all", interface].map(|device| (value(device, "rp_filter"), device));
            match strictness.into_iter().max() {
                Some((Some(1), device)) => {
                    Err(Obstacle { name: name(device, "rp_filter"), wanted: "0 or 2" })
                }
                _ => Ok(()),
            }
        }
        // IPv6 routes by this one (`ip6_forward`), and does not ask where its own addresses come from.
        Family::V6 if value("all", "forwarding") != Some(1) => {
            Err(Obstacle { name: name("all", "forwarding"), wanted: "1" })
        }
        Family::V6 => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Variables of which these have these values.
    fn check(family: Family, values: &[(&str, u32)], expected: Option<&str>) {
        let folder = tempfile::tempdir().unwrap();
        for (path, value) in values {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        let told = check_in(folder.path(), "eth0.7", family).err().map(|obstacle| obstacle.to_string());
        assert_eq!(told.as_deref(), expected, "{values:?}");
    }

    #[test]
    fn the_hop_limit_is_that_of_the_nodes_own_packets() {
        let folder = tempfile::tempdir().unwrap();
        let hop_limit = |family| hop_limit_in(folder.path(), "eth0.7", family);
        assert_eq!([Family::V4, Family::V6].map(hop_limit), [64, 64]);
        fs::create_dir_all(folder.path().join("ipv4")).unwrap();
        fs::create_dir_all(folder.path().join("ipv6/conf/eth0.7")).unwrap();
        fs::write(folder.path().join("ipv4/ip_default_ttl"), "128\n").unwrap();
        // A router may have told it (RFC 4861, 4.2).
        fs::write(folder.path().join("ipv6/conf/eth0.7/hop_limit"), "32\n").unwrap();
        assert_eq!([Family::V4, Family::V6].map(hop_limit), [128, 32]);
        fs::write(folder.path().join("ipv6/conf/eth0.7/hop_limit"), "0\n").unwrap();
        assert_eq!(hop_limit(Family::V6), 64);
    }

    #[test]
    fn what_stands_in_the_way_is_named() {
        let forwards = ("ipv4/conf/eth0.7/forwarding", 1);
        let (own, all) = (("ipv4/conf/eth0.7/accept_local", 1), ("ipv4/conf/all/accept_local", 1));
        let strict = |device, value| (device, value);
        check(Family::V4, &[], Some("net.ipv4.conf.eth0/7.forwarding has to be 1"));
        check(Family::V4, &[forwards], Some("net.ipv4.conf.eth0/7.accept_local has to be 1"));
        check(Family::V4, &[forwards, own], None);
        check(Family::V4, &[forwards, all], None);
        let one = [forwards, own, strict("ipv4/conf/eth0.7/rp_filter", 1)];
        check(Family::V4, &one, Some("net.ipv4.conf.eth0/7.rp_filter has to be 0 or 2"));
        let loose = [&one[..], &[strict("ipv4/conf/all/rp_filter", 2)]].concat();
        check(Family::V4, &loose, None);
        let all_strict = [forwards, own, strict("ipv4/conf/all/rp_filter", 1)];
        check(Family::V4, &all_strict, Some("net.ipv4.conf.all.rp_filter has to be 0 or 2"));
        check(Family::V6, &[], Some("net.ipv6.conf.all.forwarding has to be 1"));
        check(Family::V6, &[("ipv6/conf/all/forwarding", 1)], None);
    }
}
