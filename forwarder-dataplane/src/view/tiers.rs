//! The kernel's tiers as `GET /v1/datapath` and `forwarder datapath` show them, and switch them.

use serde::{Deserialize, Serialize};

use crate::relay::Tier;

/// One of the tiers that take connections into the kernel.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TierView {
    /// The tier.
    pub tier: Tier,
    /// Whether it takes new connections.
    pub state: TierState,
    /// How many connections it has.
    pub connections: usize,
    /// Why it is not available.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether a tier takes new connections.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum TierState {
    /// It does.
    On,
    /// It does not, since an operator has switched it off.
    Off,
    /// It cannot.
    Unavailable,
    /// No listener wants it.
    Unused,
}

impl TierState {
    /// Its name, as in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Unavailable => "unavailable",
            Self::Unused => "unused",
        }
    }
}

/// The answer to `GET /v1/datapath` and `POST /v1/datapath`.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DatapathTiers {
    /// The tiers, the fastest first.
    pub tiers: Vec<TierView>,
}

/// What `POST /v1/datapath` takes: which tiers are to take new connections, such as `{"sockmap": false}`. A tier that is not
/// named stays as it is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TierToggleRequest {
    /// Tier `tc`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tc: Option<bool>,
    /// Tier `sockmap`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sockmap: Option<bool>,
    /// Tier `direct`: its listeners' sockets take new connections where it is off, from some seconds later on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
}

impl TierToggleRequest {
    /// The tiers that are named, and whether they are to take new connections.
    pub fn named(self) -> impl Iterator<Item = (Tier, bool)> {
        [(Tier::Tc, self.tc), (Tier::Sockmap, self.sockmap), (Tier::Direct, self.direct)]
            .into_iter()
            .filter_map(|(tier, is_on)| Some((tier, is_on?)))
    }
}
