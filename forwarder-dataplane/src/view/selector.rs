//! Which connections are meant.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::ConnectionView;
use forwarder_runtime::values::DurationText;

/// Which connections are meant: those that match all that is given.
#[derive(Args, Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Selector {
    /// Connections of this listener: NAMESPACE/GATEWAY/LISTENER
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub listener: Option<String>,

    /// Connections by this route: NAMESPACE/TCPROUTE
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,

    /// Connections to this backend: NAMESPACE/SERVICE:PORT
    #[arg(long, value_name = "NAME")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,

    /// Connections from this client: an IP address, one with a port, or a network
    #[arg(long, value_name = "IP[:PORT]|CIDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downstream: Option<Peer>,

    /// Connections to this endpoint: an IP address, one with a port, or a network
    #[arg(long, value_name = "IP[:PORT]|CIDR")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upstream: Option<Peer>,

    /// Connections on which no byte has moved for longer than this
    #[arg(long, value_name = "DURATION")]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "duration_text")]
    pub idle_longer_than: Option<DurationText>,

    /// Every connection
    #[arg(long)]
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub all: bool,
}

impl Selector {
    /// Whether nothing is given: not even that all are meant.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether the connection matches all that is given.
    pub fn matches(&self, connection: &ConnectionView) -> bool {
        let ConnectionView { listener, route, backend, downstream, upstream, idle_ms, .. } = connection;
        self.matches_names(listener, route.as_deref(), backend.as_deref())
            && self.matches_ends(*downstream, *upstream, *idle_ms)
    }

    /// Whether a connection that is served so matches what is given of that.
    pub(crate) fn matches_names(&self, listener: &str, route: Option<&str>, backend: Option<&str>) -> bool {
        let is = |wanted: &Option<String>, found: Option<&str>| {
            wanted.as_deref().is_none_or(|wanted| found == Some(wanted))
        };
        is(&self.listener, Some(listener)) && is(&self.route, route) && is(&self.backend, backend)
    }

    /// Whether a connection between these ends, on which no byte has moved for so long, matches what is given of that.
    pub(crate) fn matches_ends(
        &self,
        downstream: SocketAddr,
        upstream: Option<SocketAddr>,
        idle_ms: u64,
    ) -> bool {
        let is = |wanted: Option<Peer>, found: Option<SocketAddr>| {
            wanted.is_none_or(|wanted| found.is_some_and(|found| wanted.is(found)))
        };
        is(self.downstream, Some(downstream))
            && is(self.upstream, upstream)
            && self.idle_longer_than.is_none_or(|idle| Duration::from_millis(idle_ms) > idle.0)
    }
}

/// The other end of a connection: a host, one port of it, or the hosts of a network.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Peer {
    /// Any port of a host.
    Host(IpAddr),
    /// One port of it.
    Port(IpAddr, u16),
    /// Any port of the hosts whose addresses begin with so many bits of this one, whose others are 0.
    Network(IpAddr, u8),
}

impl Peer {
    /// Whether `address` is this end.
    pub fn is(self, address: SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        match self {
            Self::Host(wanted) => wanted == ip,
            Self::Port(wanted, port) => wanted == ip && port == address.port(),
            Self::Network(network, length) => {
                network.is_ipv4() == ip.is_ipv4() && masked(ip, length) == Some(network)
            }
        }
    }

    /// A network, such as `192.0.2.0/24`.
    fn network(address: &str, length: &str) -> Option<Self> {
        let (address, length) = (address.parse::<IpAddr>().ok()?, length.parse::<u8>().ok()?);
        let network = masked(address, length)?;
        // One of IPv4 addresses that are mapped into IPv6 is one of IPv4.
        Some(match network.to_canonical() {
            v4 @ IpAddr::V4(_) if network.is_ipv6() && length >= MAPPED => Self::Network(v4, length - MAPPED),
            _ => Self::Network(network, length),
        })
    }
}

/// How many bits of an IPv4 address that is mapped into IPv6 go before it.
const MAPPED: u8 = 96;

/// An address of which only the first `length` bits are left; `None` where it has not so many.
fn masked(address: IpAddr, length: u8) -> Option<IpAddr> {
    let length = u32::from(length);
    Some(match address {
        IpAddr::V4(v4) => {
            let cut = u32::BITS.checked_sub(length)?;
            IpAddr::V4((v4.to_bits() & u32::MAX.checked_shl(cut).unwrap_or(0)).into())
        }
        IpAddr::V6(v6) => {
            let cut = u128::BITS.checked_sub(length)?;
            IpAddr::V6((v6.to_bits() & u128::MAX.checked_shl(cut).unwrap_or(0)).into())
        }
    })
}

impl FromStr for Peer {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self::Port(address.ip().to_canonical(), address.port()));
        }
        if let Ok(ip) = text.parse::<IpAddr>() {
            return Ok(Self::Host(ip.to_canonical()));
        }
        text.split_once('/').and_then(|(address, length)| Self::network(address, length)).ok_or_else(|| {
            format!(
                "`{text}` is neither an IP address nor one with a port, such as 192.0.2.1:80 or [2001:db8::1]:80, \
                nor a network, such as 192.0.2.0/24 or 2001:db8::/32"
            )
        })
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Host(ip) => write!(f, "{ip}"),
            Self::Port(ip, port) => write!(f, "{}", SocketAddr::new(ip, port)),
            Self::Network(ip, length) => write!(f, "{ip}/{length}"),
        }
    }
}

impl<'de> Deserialize<'de> for Peer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Peer {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

#[expect(clippy::ref_option, reason = "serde passes a reference to the field")]
fn duration_text<S: Serializer>(value: &Option<DurationText>, serializer: S) -> Result<S::Ok, S::Error> {
    let duration = value.map(|text| text.0).unwrap_or_default();
    serializer.collect_str(&humantime::format_duration(duration))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::connection::tests::sample;

    /// The JSON of a selector, and whether the sample matches it.
    fn check(json: &str, expected: bool) {
        let selector: Selector = serde_json::from_str(json).unwrap();
        assert_eq!(selector.matches(&sample()), expected, "{json}");
        let again = serde_json::to_string(&selector).unwrap();
        assert_eq!(serde_json::from_str::<Selector>(&again).unwrap(), selector, "{again}");
    }

    #[test]
    fn each_part_selects() {
        for (json, expected) in [
            (r#"{"listener": "default/gw/a"}"#, true),
            (r#"{"listener": "default/gw"}"#, false),
            (r#"{"route": "default/a"}"#, true),
            (r#"{"route": "default/b"}"#, false),
            (r#"{"backend": "default/a:3306"}"#, true),
            (r#"{"backend": "default/a"}"#, false),
            (r#"{"downstream": "10.0.1.2"}"#, true),
            (r#"{"downstream": "10.0.1.2:40000"}"#, true),
            (r#"{"downstream": "::ffff:10.0.1.2"}"#, true),
            (r#"{"downstream": "10.0.1.2:40001"}"#, false),
            (r#"{"downstream": "10.0.1.20"}"#, false),
            (r#"{"upstream": "10.0.2.2"}"#, true),
            (r#"{"upstream": "10.0.2.2:5000"}"#, true),
            (r#"{"upstream": "10.0.1.2"}"#, false),
            (r#"{"idleLongerThan": "999ms"}"#, true),
            (r#"{"idleLongerThan": "1s"}"#, false),
            (r#"{"idleLongerThan": "0"}"#, true),
            (r#"{"all": true}"#, true),
        ] {
            check(json, expected);
        }
    }

    #[test]
    fn all_parts_must_match() {
        check(r#"{"listener": "default/gw/a", "upstream": "10.0.2.2"}"#, true);
        check(r#"{"listener": "default/gw/a", "upstream": "10.0.2.3"}"#, false);
        check(r#"{"all": true, "listener": "default/gw/b"}"#, false);
    }

    #[test]
    fn networks_select() {
        for (network, expected) in [
            ("10.0.1.0/24", true),
            // As in rules of a firewall, what lies beyond the length is not looked at.
            ("10.0.1.77/24", true),
            ("10.0.1.2/32", true),
            ("10.0.1.3/32", false),
            ("10.0.0.0/8", true),
            ("11.0.0.0/8", false),
            ("0.0.0.0/0", true),
            ("::/0", false),
            ("::ffff:10.0.1.0/120", true),
            ("::ffff:10.0.2.0/120", false),
        ] {
            check(&format!(r#"{{"downstream": "{network}"}}"#), expected);
        }
        let peer = |text: &str| text.parse::<Peer>().unwrap();
        let v6 = |text: &str| SocketAddr::new(text.parse().unwrap(), 9);
        assert!(peer("2001:db8::/33").is(v6("2001:db8:7fff::1")));
        assert!(!peer("2001:db8::/33").is(v6("2001:db8:8000::1")));
        assert!(peer("2001:db8::1/128").is(v6("2001:db8::1")));
        assert_eq!(peer("10.99.1.5/16").to_string(), "10.99.0.0/16");
        for text in ["10.0.0.0/33", "10.0.0.0/", "10.0.0/8", "::/129", "10.0.0.0/-1", "10.0.0.1:80/24"] {
            assert!(text.parse::<Peer>().unwrap_err().contains("nor a network"), "{text}");
        }
    }

    #[test]
    fn what_a_connection_does_not_have_yet_matches_nothing() {
        let view = ConnectionView { route: None, backend: None, upstream: None, ..sample() };
        for json in [r#"{"route": "default/a"}"#, r#"{"backend": "b"}"#, r#"{"upstream": "10.0.2.2"}"#] {
            assert!(!serde_json::from_str::<Selector>(json).unwrap().matches(&view), "{json}");
        }
    }

    #[test]
    fn an_empty_one_is_told_from_one_that_means_all() {
        for (json, expected) in [
            ("{}", true),
            (r#"{"all": false}"#, true),
            (r#"{"all": true}"#, false),
            (r#"{"route": ""}"#, false),
        ] {
            assert_eq!(serde_json::from_str::<Selector>(json).unwrap().is_empty(), expected, "{json}");
        }
    }

    #[test]
    fn bad_ones_are_refused_with_a_sentence() {
        for (json, words) in [
            (r#"{"lisener": "a"}"#, "unknown field `lisener`"),
            (r#"{"upstream": "db.example.org"}"#, "`db.example.org` is neither an IP address"),
            (r#"{"idleLongerThan": "soon"}"#, "`soon` is not a duration"),
        ] {
            let message = serde_json::from_str::<Selector>(json).unwrap_err().to_string();
            assert!(message.contains(words), "{json}: {message}");
        }
    }
}
