//! From readings to medians, spreads and ratios, and these as JSON and as tables.

use std::fmt::{self, Write as _};

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::metric::{Figure, Reading, Series};
use crate::path::Unavailable;

/// Wide enough for what stands in a cell, so that the columns of all tables stand below each other.
const CELL_WIDTH: usize = 11;

/// One reading, and where and when it was taken.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) path: String,
    pub(crate) round: usize,
    pub(crate) reading: Reading,
}

/// What could not be measured.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub(crate) struct Failure {
    pub(crate) metric: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) path: Option<String>,
    pub(crate) error: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(formatter, "{} over {path}: {}", self.metric, self.error),
            None => write!(formatter, "{}: {}", self.metric, self.error),
        }
    }
}

/// All that was measured and all that was not.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report {
    pub(crate) entries: Vec<Entry>,
    pub(crate) failures: Vec<Failure>,
    pub(crate) unavailable: Vec<Unavailable>,
}

impl Report {
    /// Forgets what `path` yielded for `figure`.
    pub(crate) fn drop_figure(&mut self, figure: Figure, path: &str) {
        self.entries.retain(|entry| entry.path != path || !figure.yields(&entry.reading.series));
    }

    /// Sums the entries up; the order is that of the first reading of each.
    pub(crate) fn document(&self, head: Head) -> Document {
        let mut series: Vec<&Series> = Vec::new();
        let mut paths: Vec<&str> = Vec::new();
        for entry in &self.entries {
            if !series.contains(&&entry.reading.series) {
                series.push(&entry.reading.series);
            }
            if !paths.contains(&entry.path.as_str()) {
                paths.push(&entry.path);
            }
        }
        let results = series
            .iter()
            .flat_map(|series| paths.iter().filter_map(|path| self.result(series, path)))
            .collect();
        Document { head, results, unavailable: self.unavailable.clone(), failures: self.failures.clone() }
    }

    fn result(&self, series: &Series, path: &str) -> Option<Summary> {
        let rounds = self.rounds(series, path);
        let values: Vec<f64> = rounds.iter().map(|(_, reading)| reading.value).collect();
        let costs: Vec<f64> = rounds.iter().filter_map(|(_, reading)| reading.cost).collect();
        let ratio = |reference: &str| {
            let references = self.rounds(series, reference);
            let ratios: Vec<f64> = rounds
                .iter()
                .filter_map(|(round, reading)| {
                    let (_, reference) = references.iter().find(|(other, _)| other == round)?;
                    (reference.value != 0.0).then(|| reading.value / reference.value)
                })
                .collect();
            median(&ratios)
        };
        let cost = |metric: &str| median(&costs).filter(|_| series.metric == metric);
        Some(Summary {
            path: path.to_owned(),
            median: median(&values)?,
            min: values.iter().copied().reduce(f64::min)?,
            max: values.iter().copied().reduce(f64::max)?,
            rounds: values.len(),
            vs_routing: ratio("routing"),
            vs_haproxy: ratio("haproxy"),
            cpu_s_per_gbit: cost("throughput"),
            cpu_us_per_connection: cost("connections"),
            cpu_us_per_request: cost("requests"),
            cpu_us_per_packet: cost("packets"),
            series: series.clone(),
        })
    }

    fn rounds(&self, series: &Series, path: &str) -> Vec<(usize, &Reading)> {
        let entries =
            self.entries.iter().filter(|entry| entry.path == path && entry.reading.series == *series);
        entries.map(|entry| (entry.round, &entry.reading)).collect()
    }
}

/// On what was measured.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Head {
    pub(crate) kernel: String,
    pub(crate) cpus: usize,
    /// Of the forwarder.
    pub(crate) version: String,
    pub(crate) rounds: usize,
    /// How long each measurement of a rate or a latency took.
    pub(crate) seconds: u32,
}

/// The report as a program reads it.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Document {
    #[serde(flatten)]
    pub(crate) head: Head,
    pub(crate) results: Vec<Summary>,
    pub(crate) unavailable: Vec<Unavailable>,
    pub(crate) failures: Vec<Failure>,
}

/// The rounds of one series on one path.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Summary {
    #[serde(flatten)]
    pub(crate) series: Series,
    pub(crate) path: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) rounds: usize,
    /// The median over rounds of the ratio within the round.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vs_routing: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) vs_haproxy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_s_per_gbit: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_us_per_connection: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_us_per_request: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) cpu_us_per_packet: Option<f64>,
}

impl Summary {
    fn cost(&self) -> Option<f64> {
        let each = [
            self.cpu_s_per_gbit,
            self.cpu_us_per_connection,
            self.cpu_us_per_request,
            self.cpu_us_per_packet,
        ];
        each.into_iter().flatten().next()
    }
}

impl Document {
    /// The results, series by series.
    pub(crate) fn by_series(&self) -> impl Iterator<Item = &[Summary]> {
        self.results.chunk_by(|a, b| a.series == b.series)
    }

    /// The report as a person reads it, at most 100 columns wide but for the reasons of failures.
    pub(crate) fn table(&self) -> String {
        let Head { kernel, cpus, version, rounds, seconds } = &self.head;
        let mut text = format!(
            "forwarder {version}, Linux {kernel}, {cpus} processors, {rounds} rounds, {seconds} s each\n"
        );
        for results in self.by_series() {
            let Some(first) = results.first() else { continue };
            let _ = writeln!(text, "\n{}: {}", first.series, first.series.better());
            let _ = writeln!(text, "{}", rows(results).trim_fmt());
        }
        for Unavailable { path, reason } in &self.unavailable {
            let _ = writeln!(text, "\nnot available here: {path}: {reason}");
        }
        for failure in &self.failures {
            let _ = writeln!(text, "\nnot measured: {failure}");
        }
        text
    }
}

/// Columns that no result fills are left out.
fn rows(results: &[Summary]) -> Table {
    let ratio = |ratio: f64| format!("{ratio:.2}");
    let cost_unit = results.first().map_or("", |result| result.series.cost_unit());
    let columns: [(String, Vec<Option<String>>); 6] = [
        ("MEDIAN".to_owned(), results.iter().map(|result| Some(number(result.median))).collect()),
        ("MIN".to_owned(), results.iter().map(|result| Some(number(result.min))).collect()),
        ("MAX".to_owned(), results.iter().map(|result| Some(number(result.max))).collect()),
        ("x ROUTING".to_owned(), results.iter().map(|result| result.vs_routing.map(ratio)).collect()),
        ("x HAPROXY".to_owned(), results.iter().map(|result| result.vs_haproxy.map(ratio)).collect()),
        (format!("CPU {cost_unit}"), results.iter().map(|result| result.cost().map(number)).collect()),
    ];
    let filled: Vec<_> = columns.iter().filter(|(_, cells)| cells.iter().any(Option::is_some)).collect();
    let mut table = Table::new();
    let header = filled.iter().map(|(name, _)| format!("{name:>CELL_WIDTH$}"));
    table.load_style(presets::NOTHING).set_header(["  PATH".to_owned()].into_iter().chain(header));
    for (index, result) in results.iter().enumerate() {
        let cells = filled.iter().map(|(_, cells)| {
            let cell = cells.get(index).cloned().flatten().unwrap_or_else(|| "-".to_owned());
            format!("{cell:>CELL_WIDTH$}")
        });
        table.add_row([format!("  {:<10}", result.path)].into_iter().chain(cells));
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Three digits, or all before the decimal point.
pub(crate) fn number(value: f64) -> String {
    let digits = match value.abs() {
        1000.0.. => return thousands(value),
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

fn thousands(value: f64) -> String {
    let digits = format!("{value:.0}");
    let length = digits.trim_start_matches('-').len();
    let mut text = String::new();
    for (index, digit) in digits.trim_start_matches('-').chars().enumerate() {
        if index > 0 && (length - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("-{text}") } else { text }
}

/// The middle one, or the mean of the two in the middle.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let upper = *sorted.get(sorted.len() / 2)?;
    let lower = *sorted.get(sorted.len().checked_sub(1)? / 2)?;
    Some(f64::midpoint(lower, upper))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const TABLE_WIDTH: usize = 100;

    fn head() -> Head {
        Head { kernel: "6.1".to_owned(), cpus: 2, version: "0.1.0".to_owned(), rounds: 3, seconds: 1 }
    }

    fn report(values: &[(&str, &[f64])]) -> Report {
        let series = Series { streams: Some(4), ..Series::new("throughput", "gbps") };
        let entry = |path: &str, round, value| Entry {
            path: path.to_owned(),
            round,
            reading: Reading { series: series.clone(), value, cost: Some(0.5) },
        };
        let entries = values
            .iter()
            .flat_map(|(path, values)| {
                values.iter().enumerate().map(|(round, value)| entry(path, round, *value)).collect::<Vec<_>>()
            })
            .collect();
        Report { entries, ..Report::default() }
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn ratios_are_formed_within_rounds() {
        // The ratio of the medians would be 1.
        let report = report(&[("routing", &[1.0, 2.0, 4.0]), ("copy", &[2.0, 4.0, 1.0])]);
        let document = report.document(head());
        let copy = document.results.last().unwrap();
        assert_eq!((copy.vs_routing, copy.vs_haproxy), (Some(2.0), None));
        assert_eq!((copy.min, copy.median, copy.max), (1.0, 2.0, 4.0));
    }

    #[test]
    fn the_json_keeps_its_shape() {
        let mut report = report(&[("routing", &[2.0]), ("haproxy", &[1.0])]);
        report.unavailable.push(Unavailable { path: "tc".to_owned(), reason: "EPERM".to_owned() });
        report.failures.push(Failure { metric: "memory".to_owned(), path: None, error: "no".to_owned() });
        let result = |path: &str, value: f64, vs_routing: f64, vs_haproxy: f64| {
            json!({
                "metric": "throughput", "path": path, "streams": 4, "unit": "gbps", "rounds": 1,
                "median": value, "min": value, "max": value,
                "vs_routing": vs_routing, "vs_haproxy": vs_haproxy, "cpu_s_per_gbit": 0.5,
            })
        };
        let expected = json!({
            "kernel": "6.1", "cpus": 2, "version": "0.1.0", "rounds": 3, "seconds": 1,
            "results": [result("routing", 2.0, 1.0, 2.0), result("haproxy", 1.0, 0.5, 1.0)],
            "unavailable": [{"path": "tc", "reason": "EPERM"}],
            "failures": [{"metric": "memory", "error": "no"}],
        });
        assert_eq!(serde_json::to_value(report.document(head())).unwrap(), expected);
    }

    #[test]
    fn a_failed_figure_leaves_nothing_behind() {
        let mut report = report(&[("routing", &[2.0]), ("haproxy", &[1.0])]);
        report.drop_figure(Figure::Throughput { streams: 1 }, "haproxy");
        assert_eq!(report.entries.len(), 2);
        report.drop_figure(Figure::Throughput { streams: 4 }, "haproxy");
        assert_eq!(report.entries.len(), 1);
    }

    #[test]
    fn the_table_is_readable_and_narrow() {
        let report = report(&[("routing", &[20_000_000.0]), ("haproxy", &[1.0])]);
        let table = report.document(head()).table();
        assert!(table.lines().all(|line| line.chars().count() <= TABLE_WIDTH), "{table}");
        assert!(table.contains("throughput, 4 streams [gbps]: more is better"), "{table}");
        assert!(table.contains("20,000,000"), "{table}");
    }

    #[test]
    fn numbers_have_three_digits_or_more() {
        let numbers = [0.0123, 1.234, 56.78, 567.8, 5678.9, 1_234_567.0, -1234.0].map(number);
        assert_eq!(numbers, ["0.012", "1.23", "56.8", "568", "5,679", "1,234,567", "-1,234"]);
    }
}
