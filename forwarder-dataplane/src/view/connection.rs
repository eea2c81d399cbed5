//! Connections as `GET /v1/connections` and `forwarder conns` show them.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::relay::Tier;

/// A connection that is open.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionView {
    /// Namespace, Gateway and listener.
    pub listener: String,
    /// Address and port that the listener is bound to.
    pub address: String,
    /// The route that served the listener when the connection was accepted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<String>,
    /// Namespace, Service and port; absent until an endpoint is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// The client.
    pub downstream: SocketAddr,
    /// The endpoint; absent until it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream: Option<SocketAddr>,
    /// The node's address and port towards the endpoint; absent during the first second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upstream_local: Option<SocketAddr>,
    /// What moves its bytes, at best.
    pub tier: Tier,
    /// How far it is.
    pub state: ConnectionState,
    /// Bytes passed on from the client.
    pub received_bytes: u64,
    /// Bytes passed on to the client.
    pub sent_bytes: u64,
    /// How long ago it was accepted, in milliseconds.
    pub age_ms: u64,
    /// How long ago a byte last moved, in milliseconds, as of when it was looked at last: a quarter of a second ago, or some seconds where
    /// very many are offloaded.
    pub idle_ms: u64,
    /// Why it is not at tier `tc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// How far a connection is.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConnectionState {
    /// No endpoint is connected yet.
    Connecting,
    /// Both directions are open.
    Open,
    /// One direction has ended.
    HalfClosed,
    /// The kernel forwards what arrives; what had arrived before is still delivered by the agent.
    Handover,
    /// The kernel forwards it alone.
    Offloaded,
    /// It was told to end.
    Closing,
}

impl ConnectionState {
    /// Its name, as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Open => "open",
            Self::HalfClosed => "half-closed",
            Self::Handover => "handover",
            Self::Offloaded => "offloaded",
            Self::Closing => "closing",
        }
    }
}

/// The answer to `GET /v1/connections`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionList {
    /// The connections, by listener, the oldest first.
    pub connections: Vec<ConnectionView>,
    /// What they add up to, with those that a limit left out.
    pub totals: ConnectionTotals,
    /// Workers that did not answer in time: their connections are missing.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unanswered: usize,
}

/// What a list of connections adds up to.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConnectionTotals {
    /// How many there are.
    pub connections: usize,
    /// How many at each tier.
    pub tiers: BTreeMap<Tier, usize>,
    /// How many in each state.
    pub states: BTreeMap<ConnectionState, usize>,
    /// Bytes passed on from their clients.
    pub received_bytes: u64,
    /// Bytes passed on to their clients.
    pub sent_bytes: u64,
}

/// The answer to `POST /v1/connections/reset`.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ResetReport {
    /// How many connections were told to end, which they do at once.
    pub reset: usize,
    /// Workers that did not answer in time: they may still reset theirs.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub unanswered: usize,
}

impl ConnectionList {
    /// Sorts and adds up `connections`, and keeps the first `limit`.
    pub fn new(
        connections: impl IntoIterator<Item = ConnectionView>,
        limit: Option<usize>,
        unanswered: usize,
    ) -> Self {
        let mut lister = Lister::new(limit);
        connections.into_iter().for_each(|connection| lister.add(connection));
        lister.finish(unanswered)
    }
}

/// Makes a list of connections, of which it keeps few more at a time than it is to have.
#[derive(Debug)]
pub struct Lister {
    limit: usize,
    list: ConnectionList,
}

impl Lister {
    /// A list of so many connections at most.
    pub fn new(limit: Option<usize>) -> Self {
        Self { limit: limit.unwrap_or(usize::MAX), list: ConnectionList::default() }
    }

    /// Adds a connection, at least to the totals.
    pub fn add(&mut self, connection: ConnectionView) {
        /// How many are kept beyond the limit before they are sorted out.
        const SURPLUS: usize = 10_000;
        let Self { limit, list } = self;
        list.totals.add(&connection);
        list.connections.push(connection);
        if list.connections.len() >= limit.saturating_mul(2).saturating_add(SURPLUS) {
            list.cut(*limit);
        }
    }

    /// The list.
    pub fn finish(mut self, unanswered: usize) -> ConnectionList {
        self.list.cut(self.limit);
        self.list.unanswered = unanswered;
        self.list
    }
}

impl ConnectionList {
    /// Keeps the first `limit`.
    fn cut(&mut self, limit: usize) {
        self.connections.sort_by(|a, b| {
            let by_age = || b.age_ms.cmp(&a.age_ms).then_with(|| a.downstream.cmp(&b.downstream));
            a.listener.cmp(&b.listener).then_with(by_age)
        });
        self.connections.truncate(limit);
    }
}

impl ConnectionTotals {
    fn add(&mut self, connection: &ConnectionView) {
        self.connections += 1;
        *self.tiers.entry(connection.tier).or_default() += 1;
        *self.states.entry(connection.state).or_default() += 1;
        self.received_bytes += connection.received_bytes;
        self.sent_bytes += connection.sent_bytes;
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference to the field")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// A socket for both families writes addresses of IPv4 as ones of IPv6.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        ip @ std::net::IpAddr::V4(_) => SocketAddr::new(ip, address.port()),
        std::net::IpAddr::V6(_) => address,
    }
}

pub(crate) fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn sample() -> ConnectionView {
        ConnectionView {
            listener: "default/gw/a".to_owned(),
            address: "*:9001".to_owned(),
            route: Some("default/a".to_owned()),
            backend: Some("default/a:3306".to_owned()),
            downstream: "10.0.1.2:40000".parse().unwrap(),
            upstream: Some("10.0.2.2:5000".parse().unwrap()),
            upstream_local: None,
            tier: Tier::Splice,
            state: ConnectionState::HalfClosed,
            received_bytes: 1,
            sent_bytes: 2,
            age_ms: 3000,
            idle_ms: 1000,
            reason: None,
        }
    }

    #[test]
    fn it_is_json_in_camel_case_without_what_is_absent() {
        let json = serde_json::to_value(sample()).unwrap();
        assert_eq!(json["state"], "half-closed");
        assert_eq!(json["tier"], "splice");
        assert_eq!(json["receivedBytes"], 1);
        assert_eq!(json["upstream"], "10.0.2.2:5000");
        assert!(json.get("upstreamLocal").is_none());
        assert_eq!(serde_json::from_value::<ConnectionView>(json).unwrap(), sample());
    }

    #[test]
    fn names_of_states_are_those_of_json() {
        use ConnectionState::{Closing, Connecting, HalfClosed, Handover, Offloaded, Open};
        for state in [Connecting, Open, HalfClosed, Handover, Offloaded, Closing] {
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
    }

    #[test]
    fn a_list_is_sorted_by_listener_and_age_and_totals_count_what_a_limit_leaves_out() {
        let view = |listener: &str, age_ms| ConnectionView { listener: listener.into(), age_ms, ..sample() };
        let list = ConnectionList::new(vec![view("b", 9), view("a", 1), view("a", 5)], Some(2), 0);
        let order: Vec<_> = list.connections.iter().map(|one| (one.listener.as_str(), one.age_ms)).collect();
        assert_eq!(order, [("a", 5), ("a", 1)]);
        assert_eq!(list.totals.connections, 3);
        assert_eq!(list.totals.tiers[&Tier::Splice], 3);
        assert_eq!((list.totals.received_bytes, list.totals.sent_bytes), (3, 6));
        let json = serde_json::to_value(&list).unwrap();
        assert_eq!(json["totals"]["states"]["half-closed"], 3);
        assert_eq!(serde_json::from_value::<ConnectionList>(json).unwrap(), list);
    }
}
