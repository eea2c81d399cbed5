//! Reading `OpenMetrics` text.

use std::collections::BTreeMap;

/// One sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// The name, with its suffix.
    pub name: String,
    /// The labels.
    pub labels: BTreeMap<String, String>,
    /// The value, without what follows its decimal point: tests look at counts only.
    pub value: i64,
}

/// Every sample that an agent exposes.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// The samples in their order.
    pub samples: Vec<Sample>,
}

impl Metrics {
    /// Reads samples; lines that are none are left out.
    pub fn parse(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(sample).collect();
        Self { samples }
    }

    /// The sum of the samples called `name` that have all of `labels`; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> i64 {
        let has = |sample: &&Sample| {
            labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|found| found == value))
        };
        self.samples.iter().filter(|sample| sample.name == name).filter(has).map(|sample| sample.value).sum()
    }

    /// Whether there is a sample called `name`.
    pub fn has(&self, name: &str) -> bool {
        self.samples.iter().any(|sample| sample.name == name)
    }
}

fn sample(line: &str) -> Option<Sample> {
    let (series, rest) = if let Some((name, rest)) = line.split_once('{') {
        let (labels, rest) = rest.rsplit_once('}')?;
        ((name, labels), rest)
    } else {
        let (name, rest) = line.split_once(' ')?;
        ((name, ""), rest)
    };
    let value = rest.split_ascii_whitespace().next()?.split('.').next()?.parse().ok()?;
    Some(Sample { name: series.0.to_owned(), labels: labels(series.1), value })
}

fn labels(text: &str) -> BTreeMap<String, String> {
    text.split("\",")
        .filter_map(|pair| {
            let (key, value) = pair.split_once("=\"")?;
            Some((key.trim().to_owned(), value.trim_end_matches('"').to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_label() {
        let text = "# TYPE a counter\na_total{x=\"1\",y=\"p/q\"} 3\na_total{x=\"2\",y=\"p/q\"} 4 1700\nb 1.5\n# EOF\n";
        let metrics = Metrics::parse(text);
        assert_eq!(metrics.sum("a_total", &[]), 7);
        assert_eq!(metrics.sum("a_total", &[("x", "2"), ("y", "p/q")]), 4);
        assert_eq!(metrics.sum("b", &[]), 1);
        assert!(!metrics.has("c"));
    }
}
