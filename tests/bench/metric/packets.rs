//! Small packets per second that the node passes on, and the processor time that one costs the machine.

use std::fs;

use anyhow::{Context as _, Result, ensure};

use super::{Reading, Series, Turn, requests};
use crate::machine;

/// Connections with a request on its way each: enough to keep the node busy.
const CONNECTIONS: u32 = 200;
/// What the node has received, of all that it knows of a device: behind the name, bytes and then packets.
const RECEIVED: usize = 1;

pub(super) fn measure(turn: &Turn<'_>) -> Result<Vec<Reading>> {
    let count = || turn.topology.node.run(received);
    let (packets_before, busy_before) = (count()?, machine::busy_seconds()?);
    let load = requests::load(turn, CONNECTIONS)?;
    let (packets, busy) = (count()? - packets_before, machine::busy_seconds()? - busy_before);
    ensure!(packets > 0.0, "the node received nothing");
    let value = packets * load.per_second / load.requests;
    Ok(vec![Reading {
        series: Series::new("packets", "per second"),
        value,
        cost: Some(busy / packets * 1e6),
    }])
}

/// How many packets the devices of this namespace have received, but for those of `lo`.
fn received() -> Result<f64> {
    let path = "/proc/thread-self/net/dev";
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    parse(&text).with_context(|| format!("{path} is not as expected: {text}"))
}

fn parse(text: &str) -> Option<f64> {
    let devices = text.lines().filter_map(|line| line.split_once(':'));
    let others = devices.filter(|(name, _)| name.trim() != "lo");
    others.map(|(_, counts)| counts.split_ascii_whitespace().nth(RECEIVED)?.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_all_devices_received_is_counted() {
        let text = "Inter-|   Receive         |  Transmit\n face |bytes    packets errs |bytes    packets\n\
            \x20   lo:     100       7    0      100       7\n  veth1:    2000      30    0     1000      20\n\
            \x20veth2:    3000      12    0        0       0\n";
        assert_eq!(parse(text), Some(42.0));
        assert_eq!(parse("veth1: 1"), None);
    }
}
