//! Bytes received per second over some streams, and the processor time that a gigabit costs the machine.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::{Reading, Series, Turn};
use crate::machine;

pub(super) fn server(address: SocketAddr) -> Command {
    let mut command = Command::new("iperf3");
    command.arg("-s").args(["-B", &address.ip().to_string(), "-p", &address.port().to_string()]);
    command
}

pub(super) fn measure(turn: &Turn<'_>, streams: u32) -> Result<Vec<Reading>> {
    let target = turn.target();
    let mut command = Command::new("iperf3");
    command.args(["-J", "--connect-timeout", "5000", "-c", &target.ip().to_string()]);
    command.args(["-p", &target.port().to_string(), "-P", &streams.to_string()]);
    command.args(["-t", &turn.seconds.to_string()]);
    let busy_before = machine::busy_seconds()?;
    let text = turn.client(&mut command)?;
    let busy = machine::busy_seconds()? - busy_before;
    let received = parse(&text).with_context(|| format!("reading what {command:?} printed"))?;
    let cost = Some(busy / (received.bytes * 8.0 / 1e9));
    let series = Series { streams: Some(streams), ..Series::new("throughput", "gbps") };
    Ok(vec![Reading { series, value: received.bits_per_second / 1e9, cost }])
}

#[derive(Deserialize)]
struct Output {
    #[serde(default)]
    end: End,
    error: Option<String>,
}

#[derive(Default, Deserialize)]
struct End {
    sum_received: Option<Received>,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Received {
    bytes: f64,
    bits_per_second: f64,
}

fn parse(text: &str) -> Result<Received> {
    let output: Output = serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))?;
    if let Some(error) = output.error {
        bail!("iperf3 says: {error}");
    }
    let received = output.end.sum_received.context("no end.sum_received")?;
    ensure!(received.bytes > 0.0, "iperf3 received nothing");
    Ok(received)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_received_counts() {
        let text = r#"{"start": {}, "end": {
            "sum_sent": {"bytes": 3000, "bits_per_second": 24000.5, "retransmits": 0},
            "sum_received": {"start": 0, "bytes": 2500, "bits_per_second": 20000.25, "sender": true}}}"#;
        assert_eq!(parse(text).unwrap(), Received { bytes: 2500.0, bits_per_second: 20000.25 });
    }

    #[test]
    fn an_error_is_no_zero() {
        let check = |text: &str, expected: &str| {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(expected), "{error}");
        };
        check(r#"{"start": {}, "end": {}, "error": "unable to connect"}"#, "unable to connect");
        check(r#"{"end": {"sum_received": {"bytes": 0, "bits_per_second": 0}}}"#, "received nothing");
        check(r#"{"end": {}}"#, "sum_received");
        check("iperf3: error", "not JSON");
    }
}
