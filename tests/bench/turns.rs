//! Taking turns: A B C, B C A, C A B, so that the machine's mood affects all paths alike.

use anyhow::{Context as _, Result};
use forwarder_tests::Topology;

use crate::machine;
use crate::metric::{Figure, Turn};
use crate::path::{self, Path, Running};
use crate::report::{Entry, Failure, Report};

/// Measures `figure` on every path in `rounds` rounds. A path that fails is left out from then on, and reported.
pub(crate) fn take(
    figure: Figure,
    paths: &[Path],
    rounds: usize,
    seconds: u32,
    report: &mut Report,
) -> Result<()> {
    // Networks are new for each figure: what closed connections leave in the kernel goes with them.
    let is_for_xdp = paths.contains(&Path::Xdp);
    let networks = paths.iter().map(|_| path::network(is_for_xdp)).collect::<Result<Vec<_>>>()?;
    let mut failed = vec![false; paths.len()];
    for round in 0..rounds {
        for index in order(round, paths.len()) {
            let (Some(path), Some(topology), Some(failed)) =
                (paths.get(index), networks.get(index), failed.get_mut(index))
            else {
                continue;
            };
            if *failed {
                continue;
            }
            eprintln!("{figure}: round {} of {rounds}, {}", round + 1, path.name());
            match turn(figure, path, topology, seconds) {
                Ok(readings) => report.entries.extend(readings.into_iter().map(|reading| Entry {
                    path: path.name().to_owned(),
                    round,
                    reading,
                })),
                Err(error) => {
                    *failed = true;
                    let failure = Failure {
                        metric: figure.metric().to_owned(),
                        path: Some(path.name().to_owned()),
                        error: format!("{error:#}"),
                    };
                    eprintln!("error: {failure}");
                    // The medians would be of fewer rounds than those of the others.
                    report.drop_figure(figure, path.name());
                    report.failures.push(failure);
                }
            }
        }
    }
    Ok(())
}

fn turn(
    figure: Figure,
    path: &Path,
    topology: &Topology,
    seconds: u32,
) -> Result<Vec<crate::metric::Reading>> {
    let _server = figure.serve(topology).with_context(|| format!("starting the server for {figure}"))?;
    let running = Running::start(path, topology).with_context(|| format!("starting {}", path.name()))?;
    machine::settle()?;
    let turn = Turn { topology, running: &running, seconds };
    figure.measure(&turn).with_context(|| {
        let log = running.log();
        let last: Vec<&str> = log.lines().rev().take(3).collect();
        format!("measuring {figure} over {}; it printed last {last:?}", path.name())
    })
}

/// Each round starts one path later than the one before.
fn order(round: usize, paths: usize) -> impl Iterator<Item = usize> {
    (0..paths).map(move |step| (round + step) % paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_round_starts_one_later() {
        let orders: Vec<Vec<usize>> = (0..4).map(|round| order(round, 3).collect()).collect();
        assert_eq!(orders, [[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 1, 2]]);
        assert_eq!(order(3, 0).count(), 0);
    }
}
