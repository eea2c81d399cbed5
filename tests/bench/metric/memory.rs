//! What an idle connection holds: memory of the path's processes, and memory of the kernel.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{Reading, Series, Turn};
use crate::{load, machine, path};

/// What has just been freed or allocated settles for so long.
const PAUSE: Duration = Duration::from_secs(1);

pub(super) fn measure(turn: &Turn<'_>) -> Result<Vec<Reading>> {
    let count = path::connection_limit();
    let connections = Some(u32::try_from(count)?);
    // What the first connections allocate once and for all is no cost of each.
    drop(turn.topology.client.run(|| load::idle_connections(turn.target(), 16))?);
    thread::sleep(PAUSE);
    let (user_before, kernel_before) = (user_memory(turn)?, machine::kernel_memory()?);
    let streams = turn.topology.client.run(|| load::idle_connections(turn.target(), count))?;
    thread::sleep(PAUSE);
    let (user, kernel) = (user_memory(turn)? - user_before, machine::kernel_memory()? - kernel_before);
    ensure!(streams.len() == count, "{} of {count} connections were held", streams.len());
    drop(streams);
    let reading = |quantity: &str, growth: i64| -> Result<Reading> {
        let quantity = Some(quantity.to_owned());
        let series = Series { quantity, connections, ..Series::new("memory", "bytes per connection") };
        let value = f64::from(i32::try_from(growth)?) / f64::from(u32::try_from(count)?);
        Ok(Reading { series, value, cost: None })
    };
    let kernel = reading("kernel, both ends included", kernel)?;
    if turn.running.processes()?.is_empty() {
        return Ok(vec![kernel]);
    }
    Ok(vec![reading("processes", user)?, kernel])
}

fn user_memory(turn: &Turn<'_>) -> Result<i64> {
    turn.running.processes()?.into_iter().map(machine::anonymous_memory).sum()
}
