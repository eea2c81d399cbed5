//! What `--only` selects.

use anyhow::{Result, bail};

use crate::metric::METRICS;
use crate::path::{Path, Unavailable};

/// The metric that has no path.
const PATHLESS: &str = "resolve";

/// The metrics and the paths to measure.
#[derive(Debug, Eq, PartialEq)]
pub(crate) struct Selection {
    metrics: Vec<&'static str>,
    pub(crate) paths: Vec<Path>,
}

impl Selection {
    /// Selects the metrics and paths in `names`; where none of a kind is named, all of it, but for XDP, which needs other devices. The references stay.
    pub(crate) fn new(names: &[String], paths: &[Path], unavailable: &[Unavailable]) -> Result<Self> {
        for name in names {
            if let Some(tier) = unavailable.iter().find(|tier| tier.path == *name) {
                bail!("{name} is not available here: {}", tier.reason);
            }
            if !METRICS.contains(&name.as_str()) && !paths.iter().any(|path| path.name() == name) {
                let known: Vec<&str> = METRICS.into_iter().chain(paths.iter().map(Path::name)).collect();
                bail!("no metric and no path is called {name}; there are {}", known.join(", "));
            }
        }
        let is_named = |name: &str| names.iter().any(|other| other == name);
        let all_metrics = !METRICS.into_iter().any(is_named);
        let all_paths = !paths.iter().any(|path| is_named(path.name()));
        let is_default = |metric: &str| all_metrics && (all_paths || metric != PATHLESS);
        let is_reference = |path: &Path| matches!(path, Path::Routing | Path::Haproxy);
        Ok(Self {
            metrics: METRICS.into_iter().filter(|metric| is_default(metric) || is_named(metric)).collect(),
            paths: paths
                .iter()
                .filter(|path| {
                    all_paths && **path != Path::Xdp || is_reference(path) || is_named(path.name())
                })
                .cloned()
                .collect(),
        })
    }

    pub(crate) fn has_metric(&self, metric: &str) -> bool {
        self.metrics.contains(&metric)
    }

    pub(crate) fn has_path(&self, name: &str) -> bool {
        self.paths.iter().any(|path| path.name() == name)
    }

    /// Whether anything is measured that takes network namespaces.
    pub(crate) fn needs_network(&self) -> bool {
        self.metrics.iter().any(|metric| *metric != PATHLESS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(names: &[&str], metrics: &[&str], paths: &[&str]) {
        let all = [
            Path::Routing,
            Path::Dnat,
            Path::Haproxy,
            Path::Nginx,
            Path::Forwarder("splice".to_owned()),
            Path::Xdp,
        ];
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        let selection = Selection::new(&names, &all, &[]).unwrap();
        assert_eq!(selection.metrics, metrics);
        let selected: Vec<&str> = selection.paths.iter().map(Path::name).collect();
        assert_eq!(selected, paths);
    }

    #[test]
    fn metrics_and_paths_are_selected_by_name() {
        let all = ["routing", "dnat", "haproxy", "nginx", "splice"];
        check(&[], &METRICS, &all);
        check(&["latency"], &["latency"], &all);
        check(&["splice"], &METRICS[..7], &["routing", "haproxy", "splice"]);
        check(&["xdp", "packets"], &["packets"], &["routing", "haproxy", "xdp"]);
        check(&["memory", "dnat", "latency"], &["latency", "memory"], &["routing", "dnat", "haproxy"]);
    }

    #[test]
    fn what_does_not_exist_is_refused() {
        let check = |name: &str, expected: &str| {
            let tier = Unavailable { path: "sockmap".to_owned(), reason: "EPERM".to_owned() };
            let error = Selection::new(&[name.to_owned()], &[Path::Routing], &[tier]).unwrap_err();
            assert!(error.to_string().contains(expected), "{error}");
        };
        check("speed", "there are throughput");
        check("sockmap", "EPERM");
    }
}
