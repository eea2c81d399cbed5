//! Programs with tests, two at a time.
//!
//! Most tests wait: for time-outs, for retransmissions, for a minute in which nothing is to be written. Some load every
//! processor. One of these runs at a time, beside one of the others.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::programs::Program;
use crate::workspace;

/// The tests that load every processor, the longest first, and those that measure beside another forwarder.
const HEAVY: [&str; 11] = [
    "shapes",
    "steps",
    "kubernetes_scale",
    "transfer",
    "forwarder_kernel",
    "legs",
    "unread",
    "scale",
    "crowd",
    "peers",
    "pairs",
];

/// How a program ended.
struct Outcome {
    name: String,
    /// What it printed, in a file.
    log: PathBuf,
    took: Duration,
    is_passed: bool,
}

/// Runs the programs; `prepare` sets their environment. All of them run, whichever fails.
pub(super) fn run(programs: Vec<Program>, prepare: impl Fn(&mut Command) + Sync) -> Result<()> {
    let logs = workspace::target_directory().join("test-logs");
    fs::create_dir_all(&logs).with_context(|| format!("creating {}", logs.display()))?;
    let [heavy, light] = queues(programs).map(Mutex::new);
    let take =
        |queue: &Mutex<VecDeque<Program>>| queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    let lane = |next: &dyn Fn() -> Option<Program>| {
        let mut outcomes = Vec::new();
        while let Some(program) = next() {
            let mut command = Command::new(&program.path);
            command.current_dir(&program.folder).env("CARGO_MANIFEST_DIR", &program.folder);
            prepare(&mut command);
            let log = logs.join(program.path.file_name().unwrap_or_default()).with_extension("log");
            let outcome = perform(&mut command, program.name, log)?;
            let how = if outcome.is_passed { "passed" } else { "FAILED" };
            eprintln!("{how} in {:>5.1} s: {}", outcome.took.as_secs_f64(), outcome.name);
            outcomes.push(outcome);
        }
        Ok(outcomes)
    };
    let outcomes = thread::scope(|scope| {
        let first = scope.spawn(|| lane(&|| take(&heavy).or_else(|| take(&light))));
        let second = lane(&|| take(&light));
        let first: Result<Vec<Outcome>> = first.join().expect("the lane does not panic");
        let mut outcomes = first?;
        outcomes.extend(second?);
        anyhow::Ok(outcomes)
    })?;
    report(&outcomes, &logs)
}

/// Those that load every processor, in the order of [`HEAVY`], and the others.
fn queues(programs: Vec<Program>) -> [VecDeque<Program>; 2] {
    let rank = |program: &Program| HEAVY.iter().position(|name| *name == program.name);
    let (mut heavy, light): (Vec<_>, Vec<_>) =
        programs.into_iter().partition(|program| rank(program).is_some());
    heavy.sort_by_key(rank);
    [heavy.into(), light.into()]
}

fn perform(command: &mut Command, name: String, log: PathBuf) -> Result<Outcome> {
    let output = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let started = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("running the tests {name}"))?;
    Ok(Outcome { name, log, took: started.elapsed(), is_passed: status.success() })
}

/// Shows what those that failed have printed, last why each did, and fails if there are such; what all have printed is in `logs`.
fn report(outcomes: &[Outcome], logs: &Path) -> Result<()> {
    let failed: Vec<&Outcome> = outcomes.iter().filter(|outcome| !outcome.is_passed).collect();
    for outcome in &failed {
        let printed = fs::read(&outcome.log).unwrap_or_default();
        eprintln!("\n== {}\n{}", outcome.name, String::from_utf8_lossy(&printed));
    }
    for outcome in &failed {
        let printed = fs::read(&outcome.log).unwrap_or_default();
        for reason in panics(&String::from_utf8_lossy(&printed)) {
            eprintln!("{}: {reason}", outcome.name);
        }
    }
    if failed.is_empty() {
        eprintln!("{} programs passed; what they printed is in {}", outcomes.len(), logs.display());
        return Ok(());
    }
    let names: Vec<&str> = failed.iter().map(|outcome| outcome.name.as_str()).collect();
    bail!("{} of {} programs with tests failed: {}", failed.len(), outcomes.len(), names.join(", "));
}

/// What a program has printed of panics, without the calls that led there: where only the end of a log is kept, these are in it.
fn panics(printed: &str) -> Vec<String> {
    const MOST_LINES: usize = 12;
    let goes_on = |line: &&str| {
        !(line.is_empty() || line.starts_with("stack backtrace:") || line.starts_with("note: "))
    };
    let lines: Vec<&str> = printed.lines().collect();
    let begins = |at: &usize| lines[*at].starts_with("thread '") && lines[*at].contains(" panicked at ");
    let reason = |at: usize| lines[at..].iter().copied().take(MOST_LINES).take_while(goes_on);
    (0..lines.len()).filter(begins).map(|at| reason(at).collect::<Vec<_>>().join("\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(name: &str) -> Program {
        Program {
            name: name.to_owned(),
            is_integration: true,
            folder: PathBuf::from("/"),
            path: PathBuf::from("/bin").join(name),
        }
    }

    #[test]
    fn the_longest_of_those_that_load_every_processor_is_first() {
        let programs = ["close", "steps", "conns", "shapes"].map(program).to_vec();
        let names = queues(programs).map(|queue| queue.into_iter().map(|one| one.name).collect::<Vec<_>>());
        assert_eq!(names, [["shapes", "steps"], ["close", "conns"]]);
    }

    #[test]
    fn those_that_load_every_processor_exist() {
        let known = |name: &str| {
            let is_file =
                |folder: &str| workspace::root().join(folder).join(name).with_extension("rs").is_file();
            is_file("tests/tests") || workspace::root().join(name.replace('_', "-")).is_dir()
        };
        let unknown: Vec<_> = HEAVY.iter().filter(|name| !known(name)).collect();
        assert!(unknown.is_empty(), "{unknown:?}");
    }

    #[test]
    fn why_tests_failed_is_found_in_what_they_printed() {
        let printed = "test a ... FAILED\n---- a stdout ----\n\nthread 'a' (7) panicked at src/a.rs:1:2:\n\
                       assertion failed\n  left: 1\n right: 2\nstack backtrace:\n   0: main\n\n\
                       thread '<unnamed>' (8) panicked at src/b.rs:3:4:\nno\nnote: run with more\n";
        let first = "thread 'a' (7) panicked at src/a.rs:1:2:\nassertion failed\n  left: 1\n right: 2";
        assert_eq!(panics(printed), [first, "thread '<unnamed>' (8) panicked at src/b.rs:3:4:\nno"]);
        assert!(panics("test a ... ok\n").is_empty());
    }

    #[test]
    fn the_others_run_where_one_fails_and_it_is_named() {
        let [no, yes] = ["false", "true"].map(program);
        let error = run(vec![no, yes], |_| {}).expect_err("one fails").to_string();
        assert_eq!(error, "1 of 2 programs with tests failed: false");
    }
}
