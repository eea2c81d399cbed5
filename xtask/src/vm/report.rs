//! What became of each thing that was to run.

use std::path::{Path, PathBuf};
use std::{fmt, fs};

use serde_json::Value;

use super::guest::RESULTS;
use super::qemu::End;
use super::selection::Item;

/// What `forwarder probe` must find available on each kernel. It loads the programs for that.
const REQUIRED: [&str; 4] = ["tier copy", "tier splice", "tier tc", "eBPF programs"];
/// What it may find either way.
const OPTIONAL: [&str; 1] = ["tier sockmap"];
/// The exit status of timeout(1), when it has ended a program, and when it had to kill it.
const TIMED_OUT: [i32; 2] = [124, 137];
/// What the kernel says on its console when it is broken.
const BROKEN: [&str; 4] = ["Kernel panic", "Oops: ", "BUG: ", "general protection fault"];
/// What a slow host is to blame for.
const SLOW: [&str; 2] = ["soft lockup", "workqueue lockup"];
/// How much of a log is shown.
const SHOWN_LINES: usize = 60;

/// How one thing ended.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Outcome {
    pub(super) name: String,
    pub(super) seconds: u64,
    /// What was seen, or what is wrong.
    pub(super) verdict: Result<String, String>,
    pub(super) log: PathBuf,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (word, text) = match &self.verdict {
            Ok(text) => ("ok", text),
            Err(text) => ("FAILED", text),
        };
        write!(f, "{:<10} {word:<6} {:>4} s  {text}", self.name, self.seconds)
    }
}

impl Outcome {
    /// The part of the log that tells why.
    pub(super) fn excerpt(&self) -> String {
        let log = read(&self.log);
        let failures = log.find("\nfailures:\n").and_then(|start| log.get(start..)).unwrap_or(&log);
        let lines: Vec<&str> = failures.lines().collect();
        let (shown, rest) = lines.split_at(lines.len().min(SHOWN_LINES));
        let more = if rest.is_empty() { String::new() } else { format!("\n… {} more lines", rest.len()) };
        shown.join("\n") + &more
    }
}

/// What the guest has told so far.
pub(super) fn outcomes(items: &[Item], output: &Path) -> Vec<Outcome> {
    let results = read(&output.join(RESULTS));
    // A line is whole once the next one may begin.
    let whole = results.rfind('\n').and_then(|end| results.get(..end)).unwrap_or_default();
    whole.lines().filter_map(|line| outcome(items, output, line)).collect()
}

fn outcome(items: &[Item], output: &Path, line: &str) -> Option<Outcome> {
    let mut words = line.split(' ');
    let name = words.next()?;
    let status: i32 = words.next()?.parse().ok()?;
    let seconds = words.next()?.parse().ok()?;
    let item = items.iter().find(|item| item.name() == name)?;
    let log = output.join(format!("{name}.log"));
    Some(Outcome { name: name.to_owned(), seconds, verdict: evaluate(item, status, &read(&log)), log })
}

/// An outcome for each thing that was to run: what the guest did not come to has failed.
pub(super) fn all(items: &[Item], output: &Path, end: End, console: &Path) -> Vec<Outcome> {
    let mut all = outcomes(items, output);
    let why = match end {
        End::Off => "did not run: the guest went off before",
        End::NeverUp => "did not run: the guest did not come up in time",
        End::TooLong => "did not run to its end in time",
    };
    for item in items {
        if !all.iter().any(|outcome| outcome.name == item.name()) {
            all.push(Outcome {
                name: item.name().to_owned(),
                seconds: 0,
                verdict: Err(why.to_owned()),
                log: console.to_owned(),
            });
        }
    }
    all
}

/// The lines by which the kernel says that it is broken.
pub(super) fn complaints(console: &str) -> Vec<&str> {
    let names = |line: &str, words: &[&str]| words.iter().any(|word| line.contains(word));
    console.lines().filter(|line| names(line, &BROKEN) && !names(line, &SLOW)).collect()
}

fn evaluate(item: &Item, status: i32, log: &str) -> Result<String, String> {
    if TIMED_OUT.contains(&status) {
        // What failed before says more than what hung.
        let failed = failed(log);
        let before =
            if failed.is_empty() { String::new() } else { format!("; failed before: {}", failed.join(", ")) };
        return Err(format!("took too long{before}"));
    }
    match item {
        Item::Probe if status == 0 => evaluate_probe(log),
        Item::Probe => Err(format!("exit status {status}")),
        Item::Tests { .. } => evaluate_tests(status, log),
    }
}

/// The names of the tests that failed.
fn failed(log: &str) -> Vec<&str> {
    log.lines().filter_map(|line| line.strip_prefix("test ")?.strip_suffix(" ... FAILED")).collect()
}

fn evaluate_probe(log: &str) -> Result<String, String> {
    let findings: Value = serde_json::from_str(log).map_err(|error| format!("cannot be read: {error}"))?;
    let find = |feature: &str| {
        let finding = findings.as_array()?.iter().find(|finding| finding["feature"] == feature)?;
        Some((finding["available"].as_bool()?, finding["detail"].as_str()?.to_owned()))
    };
    let missing: Vec<String> = REQUIRED
        .into_iter()
        .filter_map(|feature| match find(feature) {
            Some((true, _)) => None,
            Some((false, why)) => Some(format!("no {feature}: {why}")),
            None => Some(format!("nothing about {feature}")),
        })
        .collect();
    if !missing.is_empty() {
        return Err(missing.join("; "));
    }
    let seen = OPTIONAL.into_iter().chain(["eBPF programs"]).filter_map(|feature| {
        let (available, detail) = find(feature)?;
        Some(if available { format!("{feature}: {detail}") } else { format!("no {feature}: {detail}") })
    });
    Ok(seen.collect::<Vec<_>>().join("; "))
}

fn evaluate_tests(status: i32, log: &str) -> Result<String, String> {
    let failed = failed(log);
    let passed = log.lines().find_map(|line| {
        let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
        counts.split_once(" passed")?.0.parse::<u32>().ok()
    });
    let skipped = log.lines().find(|line| line.starts_with("skipped: "));
    match (status, passed, skipped) {
        _ if !failed.is_empty() => Err(format!("{} failed: {}", failed.len(), failed.join(", "))),
        (0, Some(0), _) => Err("no test matches".to_owned()),
        (0, Some(_), Some(skipped)) => Err(skipped.to_owned()),
        (0, Some(passed), None) => Ok(format!("{passed} passed")),
        _ => Err(format!("exit status {status}, without a result")),
    }
}

fn read(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item() -> Item {
        Item::Tests { name: "mtu".to_owned(), filters: Vec::new() }
    }

    #[test]
    fn only_tests_that_ran_and_passed_are_green() {
        const PASSED: &str = "test a ... ok\n\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.0s\n";
        assert_eq!(evaluate(&item(), 0, PASSED), Ok("2 passed".to_owned()));
        let none = PASSED.replace("2 passed", "0 passed");
        assert_eq!(evaluate(&item(), 0, &none), Err("no test matches".to_owned()));
        let skipped = format!("skipped: needs root\n{PASSED}");
        assert_eq!(evaluate(&item(), 0, &skipped), Err("skipped: needs root".to_owned()));
        let failed =
            "test a ... ok\ntest b ... FAILED\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored\n";
        assert_eq!(evaluate(&item(), 101, failed), Err("1 failed: b".to_owned()));
        assert_eq!(evaluate(&item(), 101, ""), Err("exit status 101, without a result".to_owned()));
        assert_eq!(evaluate(&item(), 124, failed), Err("took too long; failed before: b".to_owned()));
        assert_eq!(evaluate(&item(), 124, PASSED), Err("took too long".to_owned()));
    }

    #[test]
    fn a_probe_must_find_the_programs_accepted() {
        let finding = |feature: &str, available: bool| {
            format!(r#"{{"feature":"{feature}","available":{available},"detail":"x"}}"#)
        };
        let report = |tc| {
            let some = REQUIRED.map(|feature| finding(feature, feature != "tier tc" || tc));
            format!("[{},{}]", some.join(","), finding("tier sockmap", false))
        };
        assert_eq!(
            evaluate(&Item::Probe, 0, &report(true)),
            Ok("no tier sockmap: x; eBPF programs: x".to_owned())
        );
        assert_eq!(evaluate(&Item::Probe, 0, &report(false)), Err("no tier tc: x".to_owned()));
        assert_eq!(
            evaluate(&Item::Probe, 0, "[]").map_err(|error| error.contains("nothing about tier tc")),
            Err(true)
        );
        assert!(evaluate(&Item::Probe, 0, "").is_err());
        assert!(evaluate(&Item::Probe, 1, &report(true)).is_err());
    }

    #[test]
    fn the_kernel_says_when_it_is_broken() {
        let console = "[ 1.0] Run /init\n[ 2.0] BUG: kernel NULL pointer dereference\n[ 3.0] watchdog: BUG: soft lockup - CPU#0 stuck\n";
        assert_eq!(complaints(console), ["[ 2.0] BUG: kernel NULL pointer dereference"]);
    }

    #[test]
    fn what_the_guest_did_not_come_to_has_failed() {
        let folder = std::env::temp_dir().join(format!("forwarder-vm-report-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(RESULTS), "probe 1 3\nmtu 0").expect("a file");
        let all = all(&[Item::Probe, item()], &folder, End::TooLong, Path::new("/console"));
        fs::remove_dir_all(&folder).expect("it is there");
        assert_eq!(all.len(), 2);
        assert!(all.iter().all(|outcome| outcome.verdict.is_err()), "{all:?}");
        assert_eq!(all.last().map(|last| last.name.as_str()), Some("mtu"));
    }
}
