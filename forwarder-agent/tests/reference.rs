//! The reference pages have a row for everything that there is, and for nothing else.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::{Args as _, Command};
use forwarder_agent::settings::Options;
use forwarder_common::Verdict;
use forwarder_common::layout::PINNED_MAPS;
use forwarder_common::sockmap::{CREDITS, NOTICES, SOCK_VERDICTS, SOURCES, STREAMS, TARGETS};
use forwarder_dataplane::counters::End;
use forwarder_dataplane::relay::Fallback;
use forwarder_gateway::problem::Reason;
use forwarder_gateway::resolve::ANNOTATIONS;
use forwarder_kernel::fallback_reason::FallbackReason;

/// A file of the tree, named from this crate.
fn read(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(name)).expect("a file")
}

/// The rows of the tables of a page, each as its cells.
fn rows(page: &str) -> Vec<Vec<String>> {
    rows_by(page, |line| line.starts_with("| `"))
}

/// The lines of a page that are such rows, each as its cells.
fn rows_by(page: &str, is_row: impl Fn(&&str) -> bool) -> Vec<Vec<String>> {
    let cells = |line: &str| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
    read(&format!("../docs/reference/{page}")).lines().filter(is_row).map(cells).collect()
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
fn every_reason_of_a_problem_is_explained() {
    assert_eq!(names("problems.md", 0), set(Reason::ALL.map(Reason::as_str)));
}

#[test]
fn every_annotation_is_explained() {
    assert_eq!(names("annotations.md", 0), set(ANNOTATIONS));
}

#[test]
fn every_map_is_explained() {
    let of_sockmap = [SOURCES, TARGETS, STREAMS, CREDITS, NOTICES, SOCK_VERDICTS];
    assert_eq!(names("maps.md", 0), set(PINNED_MAPS.iter().map(|map| map.name).chain(of_sockmap)));
}

/// What stands in the statuses of all cases of `forwarder-gateway/tests/resolve`, each with the kind of object that has it.
fn conditions() -> BTreeSet<[String; 4]> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../forwarder-gateway/tests/resolve");
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).expect("the cases") {
        let path = entry.expect("a case").path();
        if path.extension().is_none_or(|extension| extension != "out") {
            continue;
        }
        let (text, mut object) = (fs::read_to_string(&path).expect("a case"), String::new());
        for line in text.lines() {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            match words[..] {
                [kind @ ("GatewayClass" | "Gateway" | "ListenerSet"), ..] => kind.clone_into(&mut object),
                ["listener", ..] => "listener".clone_into(&mut object),
                [parent, ..] if parent.starts_with("parentRefs[") => {
                    "TCPRoute, by parent".clone_into(&mut object);
                }
                [type_, status @ ("True" | "False"), reason, ..] => {
                    let reason = reason.trim_end_matches(':');
                    found.insert([&object, type_, status, reason].map(str::to_owned));
                }
                _ => {}
            }
        }
    }
    found
}

#[test]
fn every_condition_is_explained() {
    let rows = rows_by("conditions.md", |line| line.starts_with("| ") && line.contains("| `"));
    let written = conditions();
    assert!(written.len() > 20, "{written:?}");
    for [object, type_, status, reason] in &written {
        let row = rows.iter().find(|row| row[0] == *object && row[1] == format!("`{type_}`"));
        let row = row.unwrap_or_else(|| panic!("conditions.md has no row for {type_} of a {object}"));
        let cell = &row[if status == "True" { 2 } else { 3 }];
        // A condition that is true has its type as the reason where no other one is named.
        let is_named = cell.contains(&format!("`{reason}`")) || status == "True" && reason == type_;
        assert!(is_named, "conditions.md does not name {reason} for {type_} {status} of a {object}");
    }
    for row in &rows {
        let is_written =
            written.iter().any(|[object, type_, ..]| row[0] == *object && row[1] == format!("`{type_}`"));
        assert!(is_written, "no case writes {} of a {}", row[1], row[0]);
    }
}

/// The paths stand in the source alone, each with the methods that it answers.
#[test]
fn every_path_of_the_admin_api_is_explained() {
    let source = read("src/admin.rs");
    let answered: BTreeSet<(String, String)> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix(".route(\"")?.split_once("\", "))
        .map(|(path, handlers)| {
            let methods =
                ["get", "post"].into_iter().filter(|method| handlers.contains(&format!("{method}(")));
            (path.to_owned(), methods.map(str::to_uppercase).collect::<Vec<_>>().join(", "))
        })
        .collect();
    assert!(answered.len() > 5, "{answered:?}");
    let rows = rows("admin-api.md").into_iter();
    let explained: BTreeSet<_> =
        rows.map(|row| (row[0].trim_matches('`').to_owned(), row[1].clone())).collect();
    assert_eq!(explained, answered);
}

/// The names stand in the source alone: a metric appears once there is something to count.
#[test]
fn every_metric_is_explained() {
    let source = ["src/metrics.rs", "src/metrics/cluster.rs"].map(read);
    let known: BTreeSet<&str> = source
        .iter()
        .flat_map(|text| text.split('"'))
        .filter(|text| {
            text.starts_with("forwarder_") && text.bytes().all(|it| it.is_ascii_lowercase() || it == b'_')
        })
        .collect();
    assert!(known.len() > 30, "{known:?}");
    let explained = names("metrics.md", 0);
    let bare = |name: &str| {
        let name = name.strip_suffix("_total").or_else(|| name.strip_suffix("_info")).unwrap_or(name);
        name.to_owned()
    };
    assert_eq!(explained.iter().map(|name| bare(name)).collect::<BTreeSet<_>>(), set(known));
}

/// `UPDATE_EXPECT=1 cargo test -p forwarder-agent --test reference` writes the page.
#[test]
fn every_command_is_shown_as_it_explains_itself() {
    let mut page = "# Command line\n\nWhat `--help` prints.\n".to_owned();
    let mut command = forwarder_agent::cli::command();
    command.build();
    show(&mut page, &mut command);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference/cli.md");
    expect_test::expect_file![path].assert_eq(&page);
}

/// The help of a command, and below it that of its subcommands.
fn show(page: &mut String, command: &mut Command) {
    let shown = command.clone().term_width(100).mut_args(|argument| argument.hide_env_values(true));
    let help = { shown }.render_long_help().to_string();
    let lines = help.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    let name = command.get_bin_name().unwrap_or("forwarder").to_owned();
    page.extend(["\n## ", &name, "\n\n```text\n", lines.trim_end(), "\n```\n"]);
    for subcommand in command.get_subcommands_mut().filter(|subcommand| subcommand.get_name() != "help") {
        show(page, subcommand);
    }
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
