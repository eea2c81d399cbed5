//! What the pure computations take, as criterion measured them before this program ran.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::{Reading, Series};

/// The benchmarks of `forwarder-agent/benches`.
pub(crate) const BENCHMARKS: [&str; 3] = [
    "resolve_and_plan/10000_routes_100000_endpoints",
    "one_endpoint/10000_routes_100000_endpoints",
    "balancer/pick",
];

/// Reads one of the estimates below criterion's folder.
pub(crate) fn measure(folder: &Path, benchmark: &str) -> Result<Reading> {
    let file = folder.join(benchmark).join("new/estimates.json");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    let value = parse(&text).with_context(|| format!("reading {}", file.display()))?;
    let series = Series { quantity: Some(benchmark.to_owned()), ..Series::new("resolve", "ns") };
    Ok(Reading { series, value, cost: None })
}

#[derive(Deserialize)]
struct Estimates {
    median: Estimate,
}

#[derive(Deserialize)]
struct Estimate {
    point_estimate: f64,
}

fn parse(text: &str) -> Result<f64> {
    Ok(serde_json::from_str::<Estimates>(text)?.median.point_estimate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_read() {
        let text = r#"{"mean": {"point_estimate": 9.0}, "median": {"confidence_interval": {}, "point_estimate": 4.5}}"#;
        assert_eq!(parse(text).unwrap().to_string(), "4.5");
    }

    #[test]
    fn a_missing_estimate_is_an_error() {
        let error = measure(Path::new("/nonexistent"), BENCHMARKS[2]).unwrap_err();
        assert!(error.to_string().contains("balancer/pick/new/estimates.json"), "{error}");
    }
}
