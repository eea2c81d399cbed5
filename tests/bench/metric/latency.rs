//! The round trip of a message of 64 bytes, one at a time.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::{Reading, Series, Turn};

const PERCENTILES: [(&str, &str); 2] = [("50.000", "p50"), ("99.000", "p99")];

pub(super) fn server(address: SocketAddr) -> Command {
    let mut command = Command::new("sockperf");
    command.args(["sr", "--tcp", "-i", &address.ip().to_string(), "-p", &address.port().to_string()]);
    command
}

pub(super) fn measure(turn: &Turn<'_>) -> Result<Vec<Reading>> {
    let target = turn.target();
    let mut command = Command::new("sockperf");
    command.args(["pp", "--tcp", "-m", "64", "--full-rtt"]);
    command.args(["-i", &target.ip().to_string(), "-p", &target.port().to_string()]);
    command.args(["-t", &turn.seconds.to_string()]);
    let text = turn.client(&mut command)?;
    let reading = |(percentile, name): (&str, &str)| {
        let value = parse(&text, percentile).with_context(|| format!("reading what {command:?} printed"))?;
        let series = Series { quantity: Some(name.to_owned()), ..Series::new("latency", "us") };
        Ok(Reading { series, value, cost: None })
    };
    PERCENTILES.into_iter().map(reading).collect()
}

fn parse(text: &str, percentile: &str) -> Result<f64> {
    let value = text
        .lines()
        .filter_map(|line| line.split_once("percentile ")?.1.split_once('='))
        .find_map(|(name, value)| (name.trim() == percentile).then(|| value.trim().parse::<f64>()))
        .with_context(|| format!("no percentile {percentile} in {text}"))??;
    ensure!(value > 0.0, "a round trip of {value}");
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_found_by_name() {
        let text = "sockperf: ====> avg-rtt=47.861 (std-dev=5.4)\n\
                    sockperf: ---> <MAX> observation =  421.013\n\
                    sockperf: ---> percentile 99.999 =  421.013\n\
                    sockperf: ---> percentile 99.000 =   66.520\n\
                    sockperf: ---> percentile 50.000 =   46.977\n";
        assert!((parse(text, "50.000").unwrap() - 46.977).abs() < 1e-9);
        assert!((parse(text, "99.000").unwrap() - 66.52).abs() < 1e-9);
        assert!(parse(text, "95.000").is_err());
        assert!(parse("sockperf: ERROR: Can't connect", "50.000").is_err());
        assert!(parse("percentile 50.000 = 0.000", "50.000").is_err());
    }
}
