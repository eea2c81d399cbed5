//! Which tests to run, and the programs that have them.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::test::programs;
use crate::workspace;

/// The word for `forwarder probe`, which loads every eBPF program into the kernel.
const PROBE: &str = "probe";
/// What runs unless something is named, in some four minutes for each kernel: programs load, bytes arrive, an agent that was killed has a
/// successor, pairs end with what they relied on, and large packets are answered.
const SHORT: [&str; 5] = [
    PROBE,
    "shapes::conversations_of_every_shape",
    "survival::a_new_agent_takes_over",
    "removal::pairs_of_a_former_agent",
    "mtu::what_a_router_says",
];

/// One thing to run in the guest.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Item {
    /// `forwarder probe`.
    Probe,
    /// The program with the tests of one file below `tests/tests`.
    Tests {
        name: String,
        /// Parts of names of tests; all of them if there is none.
        filters: Vec<String>,
    },
}

impl Item {
    pub(super) fn name(&self) -> &str {
        match self {
            Self::Probe => PROBE,
            Self::Tests { name, .. } => name,
        }
    }
}

/// What the words ask for: each is `probe`, the name of a file below `tests/tests`, or such a name with `::` and a part of the
/// names of its tests.
pub(super) fn select(words: &[String]) -> Result<Vec<Item>> {
    let items = if words.is_empty() { parse(&SHORT) } else { parse(words) };
    let folder = workspace::root().join("tests/tests");
    for item in &items {
        let Item::Tests { name, .. } = item else { continue };
        if !folder.join(name).with_extension("rs").is_file() {
            let mut known: Vec<String> = fs::read_dir(&folder)
                .with_context(|| format!("reading {}", folder.display()))?
                .flatten()
                .filter_map(|entry| Some(entry.path().file_stem()?.to_string_lossy().into_owned()))
                .collect();
            known.sort();
            bail!("no tests {name}: there are {PROBE}, {}", known.join(", "));
        }
    }
    Ok(items)
}

fn parse(words: &[impl AsRef<str>]) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    for word in words {
        let (name, filter) = match word.as_ref().split_once("::") {
            Some((name, filter)) => (name, Some(filter.to_owned())),
            None => (word.as_ref(), None),
        };
        let known = items.iter_mut().find(|item| item.name() == name);
        match (known, filter) {
            (Some(Item::Tests { filters, .. }), Some(filter)) if !filters.is_empty() => filters.push(filter),
            // All of them are chosen, or are from now on.
            (Some(Item::Tests { filters, .. }), None) => filters.clear(),
            (Some(_), _) => {}
            (None, _) if name == PROBE => items.push(Item::Probe),
            (None, filter) => {
                items.push(Item::Tests { name: name.to_owned(), filters: filter.into_iter().collect() });
            }
        }
    }
    items
}

/// Builds the programs of these tests, and yields where each is.
pub(super) fn build(items: &[Item]) -> Result<Vec<(String, PathBuf)>> {
    let names: Vec<&str> = items.iter().filter(|item| **item != Item::Probe).map(Item::name).collect();
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let arguments: Vec<&str> = names.iter().flat_map(|name| ["--test", name]).collect();
    let programs: Vec<_> = programs::build(&arguments)?
        .into_iter()
        .filter(|program| program.is_integration)
        .map(|program| (program.name, program.path))
        .collect();
    for name in names {
        ensure!(programs.iter().any(|(built, _)| built == name), "cargo built no tests {name}");
    }
    Ok(programs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tests(name: &str, filters: &[&str]) -> Item {
        Item::Tests { name: name.to_owned(), filters: filters.iter().copied().map(str::to_owned).collect() }
    }

    #[test]
    fn each_program_runs_once_with_all_its_filters() {
        assert_eq!(
            parse(&["mtu", "pairs::idle", "probe", "pairs::reset", "probe"]),
            [tests("mtu", &[]), tests("pairs", &["idle", "reset"]), Item::Probe]
        );
        assert_eq!(parse(&["pairs::idle", "pairs"]), [tests("pairs", &[])]);
        assert_eq!(parse(&["pairs", "pairs::idle"]), [tests("pairs", &[])]);
    }

    #[test]
    fn the_short_set_names_tests_that_exist() {
        assert_eq!(select(&[]).expect("all exist").len(), SHORT.len());
        let error = select(&["nothing".to_owned()]).expect_err("there is no such file").to_string();
        assert!(
            error.contains("no tests nothing: there are probe, ") && error.contains("survival"),
            "{error}"
        );
    }
}
