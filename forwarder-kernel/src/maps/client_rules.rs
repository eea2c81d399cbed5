//! Which clients listeners let in, as the programs look it up: [`CLIENT_RULES`](forwarder_common::layout::CLIENT_RULES).
//!
//! Rules have a number of their own, by which listeners refer to them: those of a listener are replaced by another number in one word, and
//! listeners that have the same rules share them. A number is never given twice, also not by the next agent: what a former
//! one's listeners refer to holds until they are replaced.

use std::collections::HashMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use aya::maps::lpm_trie::Key;
use aya::maps::{LpmTrie, MapData, MapError};
use forwarder_common::layout::{CLIENT_ALLOWED, CLIENT_DENIED, ClientNetwork};
use forwarder_common::tuple::{address_bytes, address_of};
use forwarder_gateway::allowed::AllowedAddresses;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The networks of IPv4, all of them.
const ALL_V4: IpNet = IpNet::V4(match Ipv4Net::new(Ipv4Addr::UNSPECIFIED, 0) {
    Ok(network) => network,
    Err(_) => panic!("no prefix is shorter than that"),
});
/// How many bits precede an address of IPv4 that is mapped into IPv6.
const MAPPED_BITS: u8 = 96;
/// The networks of IPv4, as they are mapped into IPv6.
const MAPPED: Ipv6Net = match Ipv6Net::new(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), MAPPED_BITS) {
    Ok(network) => network,
    Err(_) => panic!("no prefix is longer than 128"),
};

/// The key of one rule.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) struct ClientRule {
    prefix: u32,
    network: ClientNetwork,
}

impl ClientRule {
    fn new(rules: u32, network: IpNet) -> Self {
        let mapped = if network.addr().is_ipv4() { MAPPED_BITS } else { 0 };
        let prefix = u32::BITS + u32::from(mapped + network.prefix_len());
        Self { prefix, network: ClientNetwork { rules, address: address_bytes(network.network()) } }
    }

    pub(super) fn key(self) -> Key<ClientNetwork> {
        Key::new(self.prefix, self.network)
    }
}

impl fmt::Display for ClientRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ClientNetwork { rules, address } = self.network;
        write!(f, "rules {rules}, network {}, prefix {} with the number", address_of(address), self.prefix)
    }
}

/// The rules that stand in the map.
pub(super) struct ClientRules {
    map: LpmTrie<MapData, ClientNetwork, u32>,
    /// The number of each list of rules that this agent has written.
    numbers: HashMap<Vec<(IpNet, bool)>, u32>,
    /// The list that was asked for last, and its number: most listeners have the same one.
    latest: Option<(Arc<AllowedAddresses>, u32)>,
    /// What a former agent has written.
    former: Vec<ClientRule>,
    /// The number of the next list; `None` where there is none left.
    next: Option<u32>,
}

impl ClientRules {
    /// With what a former agent has left in the map.
    pub(super) fn new(map: LpmTrie<MapData, ClientNetwork, u32>) -> Self {
        let former: Vec<_> = map
            .keys()
            .filter_map(Result::ok)
            .map(|key| ClientRule { prefix: key.prefix_len(), network: key.data() })
            .collect();
        let last = former.iter().map(|rule| rule.network.rules).max().unwrap_or_default();
        Self { map, numbers: HashMap::new(), latest: None, former, next: last.checked_add(1) }
    }

    /// The number of rules, which stand in the map from now on; 0 of none.
    ///
    /// # Errors
    /// The network that the map does not take, and why: nothing is left of these rules.
    pub(super) fn number(&mut self, clients: &Arc<AllowedAddresses>) -> Result<u32, (IpNet, MapError)> {
        if let Some((latest, number)) = &self.latest
            && Arc::ptr_eq(latest, clients)
        {
            return Ok(*number);
        }
        let networks = networks(clients);
        let Some((first, _)) = networks.first() else { return Ok(0) };
        let number = match (self.numbers.get(&networks), self.next) {
            (Some(number), _) => *number,
            (None, Some(number)) => {
                self.next = number.checked_add(1);
                self.write(number, &networks)?;
                self.numbers.insert(networks, number);
                number
            }
            // After four billion changes, by as many agents as have made them.
            (None, None) => {
                return Err((*first, MapError::OutOfBounds { index: u32::MAX, max_entries: u32::MAX }));
            }
        };
        self.latest = Some((Arc::clone(clients), number));
        Ok(number)
    }

    /// Writes rules that no listener refers to yet. Nothing is allocated here that a program may have found before: the kernel frees a node of
    /// such a map a grace period after its removal (`kfree_rcu`, later `bpf_mem_cache_free_rcu`, in `trie_delete_elem`). So insertions need not
    /// wait for removals as in hashes.
    fn write(&mut self, number: u32, networks: &[(IpNet, bool)]) -> Result<(), (IpNet, MapError)> {
        for (written, (network, is_allowed)) in networks.iter().enumerate() {
            let value = if *is_allowed { CLIENT_ALLOWED } else { CLIENT_DENIED };
            if let Err(error) = self.map.insert(&ClientRule::new(number, *network).key(), value, 0) {
                for (network, _) in networks.iter().take(written) {
                    let _ = self.map.remove(&ClientRule::new(number, *network).key());
                }
                return Err((*network, error));
            }
        }
        Ok(())
    }

    /// Forgets the rules of a number, which nobody uses any more; yields what is to be removed of them, once no program may have read the number.
    pub(super) fn forget(&mut self, number: u32) -> Vec<ClientRule> {
        self.latest.take_if(|(_, latest)| *latest == number);
        let unused = self.numbers.extract_if(|_, known| *known == number);
        let networks = unused.flat_map(|(networks, _)| networks);
        networks.map(|(network, _)| ClientRule::new(number, network)).collect()
    }

    /// What a former agent has written, to be removed likewise.
    pub(super) fn take_former(&mut self) -> Vec<ClientRule> {
        std::mem::take(&mut self.former)
    }
}

/// The networks as the map has them: those of the list, but none of IPv6 that says anything of clients of IPv4.
fn networks(clients: &AllowedAddresses) -> Vec<(IpNet, bool)> {
    let is_mapped = |network: &IpNet| matches!(network, IpNet::V6(network) if MAPPED.contains(network));
    let mut networks: Vec<(IpNet, bool)> = clients
        .rules()
        .iter()
        .map(|rule| (rule.range, rule.is_allowed))
        // No packet comes from there (`ipv6_rcv`).
        .filter(|(network, _)| !is_mapped(network))
        .collect();
    let covers = |(network, _): &(IpNet, bool)| matches!(network, IpNet::V6(it) if it.contains(&MAPPED));
    if networks.iter().any(covers) && networks.iter().all(|(network, _)| *network != ALL_V4) {
        networks.insert(0, (ALL_V4, true));
    }
    networks
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use forwarder_common::layout::CLIENT_BITS;

    use super::*;

    fn networks_of(rules: &[&str]) -> Vec<String> {
        let rules = rules.iter().map(|rule| rule.parse().unwrap()).collect();
        let shown = |(network, is_allowed): &(IpNet, bool)| {
            format!("{}{network}", if *is_allowed { "" } else { "!" })
        };
        networks(&AllowedAddresses::new(rules)).iter().map(shown).collect()
    }

    #[test]
    fn networks_of_ipv6_say_nothing_of_clients_of_ipv4() {
        assert_eq!(networks_of(&["!::/0", "fd00::/8"]), ["0.0.0.0/0", "!::/0", "fd00::/8"]);
        assert_eq!(
            networks_of(&["!::/0", "!0.0.0.0/0", "10.0.0.0/8"]),
            ["!0.0.0.0/0", "10.0.0.0/8", "!::/0"]
        );
        assert_eq!(networks_of(&["!::ffff:10.0.0.0/104"]), Vec::<String>::new());
    }

    #[test]
    fn of_two_rules_about_one_network_the_one_counts_that_refuses() {
        assert_eq!(
            networks_of(&["10.1.2.3/8", "!10.0.0.0/8", "!10.9.0.0/16"]),
            ["!10.0.0.0/8", "!10.9.0.0/16"]
        );
    }

    #[test]
    fn an_address_of_ipv4_is_mapped() {
        let rule = ClientRule::new(7, "10.0.0.0/8".parse().unwrap());
        assert_eq!(rule.prefix, 32 + 96 + 8);
        assert_eq!(rule.network.rules, 7);
        assert_eq!(address_of(rule.network.address), IpAddr::V4(Ipv4Addr::new(10, 0, 0, 0)));
        let host = ClientRule::new(7, "10.0.0.1/32".parse().unwrap());
        assert_eq!(host.prefix, CLIENT_BITS);
    }
}
