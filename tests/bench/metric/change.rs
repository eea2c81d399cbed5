//! How soon a change of a manifest is in force.

use std::fmt;

use anyhow::Result;

use super::Reading;

pub(crate) const TIER: &str = "splice";
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    pub(crate) routes: u32,
}
pub(crate) const AMOUNTS: [Amount; 0] = [];
impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "change {}", self.routes)
    }
}
pub(crate) fn measure(_a: Amount, _r: usize) -> Result<Vec<Reading>> {
    Ok(vec![])
}
