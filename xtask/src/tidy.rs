//! The rules of the source tree that no compiler knows.

mod circles;
mod documents;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::workspace;

/// The crate that computes and does nothing else. What does input and output in other crates, its manifest keeps from it.
const PURE: &str = "forwarder-gateway/src/";
/// What it must not name of the standard library.
const IMPURE: [&str; 10] = [
    "std::env",
    "std::fs",
    "std::process",
    "std::thread",
    "TcpListener",
    "TcpStream",
    "Instant::now",
    "SystemTime::now",
    "Timestamp::now",
    "UdpSocket",
];

const MAX_LINES: usize = 500;

/// Checks every file of the tree.
pub(crate) fn tidy() -> Result<()> {
    let mut findings = Vec::new();
    let mut files = BTreeMap::new();
    visit(&workspace::root(), "", &mut |name, text| {
        check_file(name, text, &mut findings);
        files.insert(name.to_owned(), text.to_owned());
    })?;
    findings.extend(circles::find(&files));
    findings.extend(documents::find(&files, |path| workspace::root().join(path).exists()));
    if !findings.is_empty() {
        bail!("the tree is not tidy:\n{}", findings.join("\n"));
    }
    Ok(())
}

/// Shows every file of text, named from the top of the workspace.
pub(crate) fn visit(directory: &Path, prefix: &str, show: &mut impl FnMut(&str, &str)) -> Result<()> {
    let context = || format!("reading {}", directory.display());
    let mut entries =
        fs::read_dir(directory).and_then(Iterator::collect::<Result<Vec<_>, _>>).with_context(context)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().with_context(context)?;
        if kind.is_dir() && name != ".git" && name != "target" {
            visit(&entry.path(), &format!("{name}/"), show)?;
        } else if kind.is_file() {
            let bytes = fs::read(entry.path()).with_context(|| format!("reading {name}"))?;
            // What is not text has no lines to look at.
            if let Ok(text) = std::str::from_utf8(&bytes) {
                show(&name, text);
            }
        }
    }
    Ok(())
}

/// Checks one file, named from the top of the workspace.
fn check_file(name: &str, text: &str, findings: &mut Vec<String>) {
    let mut find = |line: usize, what: &str| findings.push(format!("{name}:{}: {what}", line + 1));
    let is_rust = is_rust(name);
    let length = if is_rust && !is_test_module(name) { code_length(text) } else { 0 };
    if length > MAX_LINES {
        find(MAX_LINES, &format!("{length} lines of code: split the file at {MAX_LINES}"));
    }
    for (number, line) in text.lines().enumerate() {
        // Licence texts are kept to the letter.
        if line.ends_with([' ', '\t']) && !name.contains("LICENSE") {
            find(number, "trailing white space");
        }
        if is_rust && is_ignored_test(line) {
            find(number, "no test is ignored: assert what holds today, with a FIXME");
        }
        let code = without_comment(line);
        if number < length
            && name.starts_with(PURE)
            && let Some(word) = IMPURE.iter().find(|word| names(code, word))
        {
            find(number, &format!("the pure crate must not name {word}"));
        }
    }
}

fn is_rust(name: &str) -> bool {
    has_extension(name, "rs")
}

pub(crate) fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name).extension().is_some_and(|it| it == extension)
}

fn is_test_module(name: &str) -> bool {
    name.ends_with("/tests.rs") || name.contains("/src/tests/")
}

/// The number of lines before the test module that ends a file.
fn code_length(text: &str) -> usize {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .windows(2)
        .position(|pair| matches!(pair, [attribute, module] if *attribute == "#[cfg(test)]" && module.starts_with("mod ")))
        .unwrap_or(lines.len())
}

fn without_comment(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

fn is_ignored_test(line: &str) -> bool {
    let line = line.trim_start();
    line.starts_with("#[ignore") || (line.starts_with("#[cfg_attr(") && line.contains(", ignore"))
}

/// Whether the code names `word`, and not one that only ends alike.
fn names(code: &str, word: &str) -> bool {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(index, _)| code.get(..index).is_some_and(|before| !before.ends_with(is_name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, text: &str, expected: &[&str]) {
        let mut findings = Vec::new();
        check_file(name, text, &mut findings);
        assert_eq!(findings, expected);
    }

    #[test]
    fn the_pure_crate_does_no_io() {
        let name = "forwarder-gateway/src/plan.rs";
        check(name, "use std::net::SocketAddr;\nuse std::fmt; // not std::fs\n", &[]);
        check(
            name,
            "use std::fs;\n",
            &["forwarder-gateway/src/plan.rs:1: the pure crate must not name std::fs"],
        );
        let finding = "forwarder-gateway/src/resolve/mod.rs:2: the pure crate must not name TcpStream";
        check("forwarder-gateway/src/resolve/mod.rs", "\nuse std::net::{IpAddr, TcpStream};\n", &[finding]);
        check(name, "use crate::addresses::MyTcpStreams;\n", &[]);
        check(name, "fn f() {}\n\n#[cfg(test)]\nmod tests {\n    use std::fs;\n}\n", &[]);
        check("forwarder-source/src/file.rs", "use std::fs;\n", &[]);
    }

    #[test]
    fn long_files_are_split() {
        let code = "fn f() {}\n".repeat(MAX_LINES);
        let tests = format!("{code}#[cfg(test)]\nmod tests {{\n{code}}}\n");
        check("a/src/a.rs", &tests, &[]);
        check(
            "a/src/a.rs",
            &format!("{code}\n"),
            &["a/src/a.rs:501: 501 lines of code: split the file at 500"],
        );
        check("a/src/b/tests.rs", &format!("{code}\n"), &[]);
        check("a/b.yaml", &"a\n".repeat(MAX_LINES + 1), &[]);
    }

    #[test]
    fn no_test_is_ignored_and_no_line_ends_in_white_space() {
        let finding = "a.rs:2: no test is ignored: assert what holds today, with a FIXME";
        check("a.rs", "#[test]\n#[ignore = \"slow\"]\n", &[finding]);
        check("a.rs", "#[test]\n    #[cfg_attr(miri, ignore)]\n", &[finding]);
        check("README.md", "a\nb \n", &["README.md:2: trailing white space"]);
        check("LICENSE-GPL2", "a \n", &[]);
    }
}
