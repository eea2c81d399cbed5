//! Connections and tiers as `forwarder conns`, `forwarder datapath` and the admin API show them.

mod connection;
mod selector;
mod tiers;

pub use self::connection::{
    ConnectionList, ConnectionState, ConnectionTotals, ConnectionView, Lister, ResetReport,
};
pub(crate) use self::connection::{canonical, milliseconds};
pub use self::selector::{Peer, Selector};
pub use self::tiers::{DatapathTiers, TierState, TierToggleRequest, TierView};
