//! Which addresses endpoints and clients may have, and which ports listeners may take.
//!
//! Both are lists of ranges: one that begins with `!` refuses what lies in it, any other allows it, and of those that an address or
//! a port lies in, the narrowest decides. What no range says anything of is allowed.

use std::fmt;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize, Serializer};

/// One range of a list.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rule<R> {
    /// What it is about.
    pub range: R,
    /// Whether that is allowed.
    pub is_allowed: bool,
}

/// Ports, from the first to the last.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Ports {
    first: u16,
    last: u16,
}

/// Which addresses endpoints or clients may have.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AllowedAddresses {
    /// With those of `special` that no rule is about: each network once, and after all that it lies in.
    rules: Vec<Rule<IpNet>>,
    /// The narrowest other network around that of each rule.
    around: Vec<Option<usize>>,
    /// What is refused without any rule.
    special: Vec<Rule<IpNet>>,
}

/// Which ports listeners may take.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct AllowedPorts(Vec<Rule<Ports>>);

/// The addresses that an endpoint of a cluster has only if somebody wants to reach what is not meant for them: the node itself, and
/// what its links alone can reach, such as the metadata service of a cloud.
const SPECIAL: [&str; 7] = [
    "!127.0.0.0/8",
    "!169.254.0.0/16",
    // Multicast, and what was never given out.
    "!224.0.0.0/3",
    "!::1/128",
    "!fe80::/10",
    "!ff00::/8",
    // Those of IPv4, mapped into IPv6.
    "!::ffff:0:0/96",
];

impl AllowedAddresses {
    /// All addresses, as `rules` say.
    pub fn new(rules: Vec<Rule<IpNet>>) -> Self {
        Self::with(rules, Vec::new())
    }

    /// All but the special ones, unless `rules` say otherwise.
    pub fn for_cluster(mut rules: Vec<Rule<IpNet>>) -> Self {
        let special = SPECIAL.map(|text| text.parse::<Rule<IpNet>>().expect("a network"));
        let is_told = |range| rules.iter().any(|rule| rule.range == range);
        let others: Vec<_> = special.iter().copied().filter(|rule| !is_told(rule.range)).collect();
        rules.extend(others);
        Self::with(rules, special.into())
    }

    fn with(mut rules: Vec<Rule<IpNet>>, special: Vec<Rule<IpNet>>) -> Self {
        for rule in &mut rules {
            rule.range = rule.range.trunc();
        }
        // Of two about one network, the one that refuses comes first, and stays.
        rules.sort_unstable_by_key(|rule| (order(rule.range), rule.is_allowed));
        rules.dedup_by_key(|rule| rule.range);
        let mut around = Vec::with_capacity(rules.len());
        let mut open: Vec<(usize, IpNet)> = Vec::new();
        for (index, rule) in rules.iter().enumerate() {
            while open.pop_if(|(_, network)| !network.contains(&rule.range)).is_some() {}
            around.push(open.last().map(|(index, _)| *index));
            open.push((index, rule.range));
        }
        Self { rules, around, special }
    }

    /// The rules, with those that no one has written.
    pub fn rules(&self) -> &[Rule<IpNet>] {
        &self.rules
    }

    /// Whether there is no rule: all addresses are allowed.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// The addresses that both allow.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        if self.is_empty() || other.is_empty() {
            return if self.is_empty() { other.clone() } else { self.clone() };
        }
        // Of any address, the narrowest network here is within the narrowest one of either list: both have decided of all of it.
        let networks = self.rules.iter().chain(&other.rules).map(|rule| rule.range);
        let allows = |list: &Self, network| list.around(network).next().is_none_or(|rule| rule.is_allowed);
        let both = |range| Rule { range, is_allowed: allows(self, range) && allows(other, range) };
        Self::new(networks.map(both).collect())
    }

    /// The rules about a network and what it lies in, the narrowest first.
    fn around(&self, network: IpNet) -> impl Iterator<Item = &Rule<IpNet>> {
        let last = self.rules.partition_point(|rule| order(rule.range) <= order(network)).checked_sub(1);
        let next = |index: &usize| self.around.get(*index).copied().flatten();
        let rules = std::iter::successors(last, next).filter_map(|index| self.rules.get(index));
        rules.filter(move |rule| rule.range.contains(&network))
    }

    /// The networks that rules allow although no network around them is refused: such a rule changes nothing.
    pub fn without_effect(&self) -> impl Iterator<Item = IpNet> {
        let is_refused = |network: IpNet| {
            let refuses = |rule: &Rule<IpNet>| !rule.is_allowed && rule.range.contains(&network);
            self.around(network).any(refuses) || self.special.iter().any(refuses)
        };
        self.rules
            .iter()
            .filter(|rule| rule.is_allowed)
            .map(|rule| rule.range)
            .filter(move |it| !is_refused(*it))
    }

    /// The first network of IPv4 that is written as one of IPv6 (`::ffff:0:0/96`), if there is one: clients have no such addresses.
    pub fn mapped(&self) -> Option<IpNet> {
        let is_mapped = |network: &IpNet| {
            network.prefix_len() >= 96 && network.addr().to_canonical().is_ipv4() && network.addr().is_ipv6()
        };
        self.rules.iter().map(|rule| rule.range).find(is_mapped)
    }

    /// The network because of which `ip` is refused, if it is. One of IPv4 that is mapped into IPv6 has to be allowed as both.
    pub fn refusing(&self, ip: IpAddr) -> Option<IpNet> {
        let refusing = |ip: IpAddr| self.around(ip.into()).next().filter(|rule| !rule.is_allowed);
        let as_own = || Some(ip.to_canonical()).filter(|own| *own != ip).and_then(refusing);
        refusing(ip).or_else(as_own).map(|rule| rule.range)
    }
}

/// By which networks are in order: each after all that it lies in.
fn order(network: IpNet) -> (IpAddr, u8) {
    (network.network(), network.prefix_len())
}

impl AllowedPorts {
    /// All ports, as `rules` say.
    pub fn new(rules: Vec<Rule<Ports>>) -> Self {
        Self(rules)
    }

    /// Ports that a rule allows although no rule refuses any of them, if there are: the rule changes nothing.
    pub fn without_effect(&self) -> Option<Ports> {
        let overlaps = |one: Ports, other: Ports| one.first <= other.last && other.first <= one.last;
        let has_effect = |rule: &&Rule<Ports>| {
            self.0.iter().any(|other| !other.is_allowed && overlaps(rule.range, other.range))
        };
        let allowing = self.0.iter().filter(|rule| rule.is_allowed);
        allowing.filter(|rule| !has_effect(rule)).map(|rule| rule.range).next()
    }

    /// The ports because of which `port` is refused, if it is.
    pub fn refusing(&self, port: u16) -> Option<Ports> {
        let holds = |rule: &&Rule<Ports>| rule.range.range().contains(&port);
        decide(self.0.iter().filter(holds), |range| u32::from(range.last - range.first))
    }
}

/// The range that refuses what lies in all of these, if the narrowest one does; of two that are as wide, the one that refuses.
fn decide<'a, R: Copy + 'a>(rules: impl Iterator<Item = &'a Rule<R>>, width: impl Fn(R) -> u32) -> Option<R> {
    let decisive = rules.min_by_key(|rule| (width(rule.range), rule.is_allowed))?;
    (!decisive.is_allowed).then_some(decisive.range)
}

impl Ports {
    fn range(self) -> RangeInclusive<u16> {
        self.first..=self.last
    }
}

impl<R> Rule<R> {
    fn parse(text: &str, parse: impl FnOnce(&str) -> Option<R>) -> Option<Self> {
        let refused = text.strip_prefix('!');
        Some(Self { range: parse(refused.unwrap_or(text).trim())?, is_allowed: refused.is_none() })
    }
}

impl FromStr for Rule<IpNet> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let host = |text: &str| text.parse::<IpAddr>().ok().map(IpNet::from);
        Self::parse(text, |text| text.parse().ok().or_else(|| host(text))).ok_or_else(|| {
            format!("`{text}` is not a network, such as 10.0.0.0/8 or fd00::/8, nor one with `!` in front, to refuse it")
        })
    }
}

impl FromStr for Rule<Ports> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let range = |text: &str| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            let ports = Ports { first: first.trim().parse().ok()?, last: last.trim().parse().ok()? };
            (ports.first <= ports.last).then_some(ports)
        };
        Self::parse(text, range).ok_or_else(|| {
            format!("`{text}` is neither a port, such as 3306, nor a range, such as 1024-65535, nor one with `!` in front, to refuse it")
        })
    }
}

impl<'de, R> Deserialize<'de> for Rule<R>
where
    Self: FromStr<Err = String>,
{
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl<R: fmt::Display> fmt::Display for Rule<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", if self.is_allowed { "" } else { "!" }, self.range)
    }
}

/// As a list of its rules, as they are written.
impl Serialize for AllowedAddresses {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.rules.iter().map(Rule::to_string))
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.range().count() {
            1 => write!(f, "{}", self.first),
            _ => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rules<R>(text: &str) -> Vec<Rule<R>>
    where
        Rule<R>: FromStr<Err = String>,
    {
        text.split_whitespace().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_narrowest_network_decides() {
        for (text, allowed, refused) in [
            ("", &["10.0.0.1", "127.0.0.1", "::1"][..], &[][..]),
            (
                "!10.0.0.0/8 10.1.0.0/16 !10.1.2.3",
                &["10.1.2.4", "11.0.0.1", "::1"],
                &["10.0.0.1", "10.1.2.3"],
            ),
            ("!0.0.0.0/0 !::/0 10.0.0.0/8", &["10.0.0.1"], &["11.0.0.1", "fd00::1"]),
            ("10.0.0.0/8 !10.0.0.0/8", &[], &["10.0.0.1", "::ffff:10.0.0.1"]),
        ] {
            let addresses = AllowedAddresses::new(rules(text));
            for ip in allowed {
                assert_eq!(addresses.refusing(ip.parse().unwrap()), None, "{text}: {ip}");
            }
            for ip in refused {
                assert!(addresses.refusing(ip.parse().unwrap()).is_some(), "{text}: {ip}");
            }
        }
    }

    #[test]
    fn a_cluster_refuses_special_addresses_unless_told() {
        let special =
            ["127.0.0.1", "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "fe80::1", "ff02::1"];
        let refuses = |text: &str, ip: &str| {
            AllowedAddresses::for_cluster(rules(text)).refusing(ip.parse().unwrap()).is_some()
        };
        for ip in special.iter().chain(&["::ffff:127.0.0.1", "::ffff:10.0.0.1"]) {
            assert!(refuses("", ip), "{ip}");
            assert!(refuses("0.0.0.0/0 ::/0", ip), "{ip}");
        }
        for ip in ["10.0.0.1", "fd00::1", "223.255.255.255"] {
            assert!(!refuses("", ip), "{ip}");
        }
        assert!(!refuses("127.0.0.0/8", "127.0.0.1"));
        assert!(refuses("127.0.0.0/8", "::ffff:127.0.0.1"));
        assert!(refuses("::ffff:0:0/96", "::ffff:127.0.0.1"));
        assert!(!refuses("127.0.0.0/8 ::ffff:0:0/96", "::ffff:127.0.0.1"));
    }

    #[test]
    fn a_rule_that_allows_what_is_allowed_anyway_is_found() {
        for (text, found) in [
            ("", None),
            ("!1-1023 443", None),
            ("!1-65535 1024-65535", None),
            ("1024-65535", Some("1024-65535")),
            ("!1-1023 443 3306", Some("3306")),
            ("!1-1023 1000-2000", None),
            ("!1-1023 1024-2000", Some("1024-2000")),
        ] {
            let ports = AllowedPorts::new(rules(text));
            assert_eq!(ports.without_effect().map(|ports| ports.to_string()).as_deref(), found, "{text}");
        }
        let [of_files, of_cluster] = [AllowedAddresses::new, AllowedAddresses::for_cluster].map(|make| {
            make(rules("127.0.0.0/8")).without_effect().next().map(|network| network.to_string())
        });
        assert_eq!((of_files.as_deref(), of_cluster), (Some("127.0.0.0/8"), None));
        assert_eq!(AllowedAddresses::new(rules("!0.0.0.0/0 10.0.0.0/8")).without_effect().next(), None);
        assert!(AllowedAddresses::for_cluster(rules("0.0.0.0/0")).without_effect().next().is_some());
    }

    /// Networks that lie in each other now and then.
    fn networks() -> impl Strategy<Value = Vec<Rule<IpNet>>> {
        let network = (0..8_u8, prop_oneof![Just(0), Just(8), 29..=32_u8], any::<bool>());
        let rule = network.prop_map(|(last, prefix, is_allowed)| {
            let range = IpNet::new(IpAddr::from([10, 0, 0, last]), prefix).unwrap();
            Rule { range, is_allowed }
        });
        proptest::collection::vec(rule, 0..6)
    }

    proptest! {
        #[test]
        fn of_the_networks_around_an_address_the_narrowest_decides(rules in networks(), last in 0..9_u8) {
            let list = AllowedAddresses::new(rules.clone());
            for address in [[10, 0, 0, last], [11, 0, 0, last]].map(IpAddr::from) {
                let around = rules.iter().filter(|rule| rule.range.contains(&address));
                let refusing = decide(around, |range| u32::from(range.max_prefix_len() - range.prefix_len()));
                prop_assert_eq!(list.refusing(address), refusing.map(|network| network.trunc()), "{}", address);
            }
        }

        #[test]
        fn both_lists_have_to_allow_an_address(one in networks(), other in networks(), last in 0..9_u8) {
            let (one, other) = (AllowedAddresses::new(one), AllowedAddresses::new(other));
            for address in [[10, 0, 0, last], [11, 0, 0, last]].map(IpAddr::from) {
                let refused = [&one, &other].iter().any(|list| list.refusing(address).is_some());
                prop_assert_eq!(one.and(&other).refusing(address).is_some(), refused, "{}", address);
            }
        }
    }

    #[test]
    fn the_narrowest_range_of_ports_decides() {
        let ports = AllowedPorts::new(rules("!1-1023 443 !10248-10259 10251"));
        for port in [443, 1024, 10251, 65535] {
            assert_eq!(ports.refusing(port), None, "{port}");
        }
        for (port, range) in [(22, "1-1023"), (10250, "10248-10259")] {
            assert_eq!(ports.refusing(port).unwrap().to_string(), range);
        }
        assert_eq!(AllowedPorts::default().refusing(22), None);
    }

    #[test]
    fn what_is_no_range_is_refused_with_a_sentence() {
        for text in ["", "!", "10.0.0.0/33", "db", "!10.0.0/8"] {
            assert!(text.parse::<Rule<IpNet>>().unwrap_err().contains("is not a network"), "{text}");
        }
        for text in ["", "65536", "5-4", "1-", "mysql", "!!22"] {
            assert!(text.parse::<Rule<Ports>>().unwrap_err().contains("is neither a port"), "{text}");
        }
    }
}
