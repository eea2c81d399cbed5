//! New connections per second, each with one small request, and the processor time that one costs the machine.

use std::time::Duration;

use anyhow::Result;

use super::{Reading, Series, Turn};
use crate::{load, path};

const WARM_UP: Duration = Duration::from_millis(300);

pub(super) fn measure(turn: &Turn<'_>) -> Result<Vec<Reading>> {
    let time = Duration::from_secs(turn.seconds.into());
    let sources = path::sources();
    let rate =
        turn.topology.client.run(|| load::short_connections(turn.target(), &sources, WARM_UP, time))?;
    let value = rate.connections / rate.seconds;
    let cost = rate.busy_seconds / rate.connections * 1e6;
    Ok(vec![Reading { series: Series::new("connections", "per second"), value, cost: Some(cost) }])
}
