//! Requests per second over connections that stay.

use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::{Reading, Series, Turn};
use crate::machine;

pub(super) fn measure(turn: &Turn<'_>, connections: u32) -> Result<Vec<Reading>> {
    let busy_before = machine::busy_seconds()?;
    let load = load(turn, connections)?;
    let busy = machine::busy_seconds()? - busy_before;
    let series = Series { connections: Some(connections), ..Series::new("requests", "per second") };
    Ok(vec![Reading { series, value: load.per_second, cost: Some(busy / load.requests * 1e6) }])
}

/// Sends small requests over so many connections at once.
pub(super) fn load(turn: &Turn<'_>, connections: u32) -> Result<Load> {
    let mut command = Command::new("wrk");
    command.args(["-t2", "-c", &connections.to_string(), "-d", &format!("{}s", turn.seconds)]);
    command.args(["--timeout", "5s", &format!("http://{}/", turn.target())]);
    let text = turn.client(&mut command)?;
    parse(&text).with_context(|| format!("reading what {command:?} printed"))
}

/// What was answered.
#[derive(Debug, PartialEq)]
pub(super) struct Load {
    pub(super) requests: f64,
    pub(super) per_second: f64,
}

fn parse(text: &str) -> Result<Load> {
    let errors = ["Socket errors:", "Non-2xx or 3xx responses:"];
    if let Some(line) = text.lines().find(|line| errors.iter().any(|error| line.contains(error))) {
        bail!("wrk met errors: {}", line.trim());
    }
    let requests = text.lines().find_map(|line| line.trim().split_once(" requests in "));
    let requests = requests.with_context(|| format!("no number of requests in {text}"))?.0.parse()?;
    let per_second = text.lines().find_map(|line| line.strip_prefix("Requests/sec:"));
    let per_second = per_second.with_context(|| format!("no rate in {text}"))?.trim().parse()?;
    ensure!(requests > 0.0 && per_second > 0.0, "wrk completed no request");
    Ok(Load { requests, per_second })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 1s test @ http://10.0.2.2:5000/\n  2 threads and 50 connections\n\
        \x20 Thread Stats   Avg      Stdev     Max   +/- Stdev\n\
        \x20   Latency   392.11us  160.53us   3.68ms   79.67%\n\
        \x20 136027 requests in 1.10s, 9.86MB read\n\
        Requests/sec: 123665.11\nTransfer/sec:      8.96MB\n";

    #[test]
    fn the_rate_is_read() {
        assert_eq!(parse(OUTPUT).unwrap(), Load { requests: 136_027.0, per_second: 123_665.11 });
    }

    #[test]
    fn an_error_is_no_smaller_rate() {
        let errors = format!("{OUTPUT}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        assert!(parse(&errors).unwrap_err().to_string().contains("read 3"));
        assert!(parse("unable to connect to 10.0.2.2:5000 Connection refused").is_err());
        assert!(parse("  0 requests in 1.00s\nRequests/sec:      0.00\n").is_err());
    }
}
