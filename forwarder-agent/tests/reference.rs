//! The reference pages have a row for everything that there is, and for nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::{Args as _, Command};
use forwarder_agent::settings::Options;
use forwarder_common::Verdict;
use forwarder_dataplane::counters::End;
use forwarder_dataplane::relay::Fallback;
use forwarder_kernel::fallback_reason::FallbackReason;

/// The rows of the tables of a page, each as its cells.
fn rows(page: &str) -> Vec<Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference").join(page);
    let text = fs::read_to_string(path).expect("the page");
    let cells = |line: &str| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
    text.lines().filter(|line| line.starts_with("| `")).map(cells).collect()
}

/// What stands in backticks in a cell of each row.
fn names(page: &str, cell: usize) -> BTreeSet<String> {
    let name = |row: Vec<String>| row.get(cell).map(|name| name.trim_matches('`').to_owned());
    rows(page).into_iter().filter_map(name).collect()
}

fn set<'a>(names: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    names.into_iter().map(str::to_owned).collect()
}

#[test]
fn every_fallback_reason_is_explained() {
    let reasons = FallbackReason::ALL.map(FallbackReason::as_str);
    let of_userspace = Fallback::ALL.map(Fallback::as_str);
    assert_eq!(names("fallback-reasons.md", 0), set(reasons.into_iter().chain(of_userspace)));
}

#[test]
fn every_end_is_explained() {
    assert_eq!(names("close-reasons.md", 0), set(End::ALL.map(End::as_str)));
}

#[test]
fn every_verdict_is_explained_with_its_number() {
    // Those of tier `sockmap` have no number.
    let of_tc = rows("verdicts.md").into_iter().filter(|row| row[1].parse::<u32>().is_ok());
    let numbers: BTreeSet<(String, String)> =
        of_tc.map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone())).collect();
    let expected = Verdict::ALL.map(|verdict| (verdict.as_str().to_owned(), verdict.index().to_string()));
    assert_eq!(numbers, expected.into());
}

#[test]
fn every_setting_of_the_agent_is_explained_with_its_variable() {
    let command = Options::augment_args(Command::new("agent"));
    let described: BTreeSet<(String, String)> =
        rows("settings.md").into_iter().map(|row| (row[0].clone(), row[1].clone())).collect();
    for argument in command.get_arguments() {
        let flag = format!("`--{}`", argument.get_long().expect("a flag"));
        let variable = argument.get_env().and_then(|name| name.to_str()).expect("a variable");
        let row = (flag, format!("`{variable}`"));
        assert!(described.contains(&row), "settings.md has no row for {row:?}");
    }
    let flags: BTreeSet<&str> = command.get_arguments().filter_map(|argument| argument.get_long()).collect();
    // Those of every command, and the settings file itself.
    let others = ["config", "log", "log-format"];
    for (flag, _) in &described {
        let name = flag.trim_matches('`').trim_start_matches("--");
        assert!(
            flags.contains(name) || others.contains(&name),
            "settings.md has a row for {flag}, which is no setting"
        );
    }
}
