//! What documents refer to is there: files, headings, and tests.

use std::collections::BTreeMap;

/// References of the documents among `files` that lead nowhere, each as a sentence. `files` are named from the top of the workspace;
/// `exists` says whether there is a file or folder of a name that is not among them.
pub(super) fn find(files: &BTreeMap<String, String>, exists: impl Fn(&str) -> bool) -> Vec<String> {
    let mut findings = Vec::new();
    for (name, text) in files.iter().filter(|(name, _)| is_document(name)) {
        for (number, line) in lines_of_prose(text) {
            let mut find = |what: String| findings.push(format!("{name}:{number}: {what}"));
            for target in links(line) {
                let (path, heading) =
                    target.split_once('#').map_or((target, None), |(path, heading)| (path, Some(heading)));
                let path = if path.is_empty() { Some(name.clone()) } else { resolve(name, path) };
                let Some(path) = path.filter(|path| files.contains_key(path) || exists(path)) else {
                    find(format!("there is no {target}"));
                    continue;
                };
                let document = files.get(&path).filter(|_| is_document(&path));
                if let (Some(heading), Some(document)) = (heading, document)
                    && !lines_of_prose(document).any(|(_, line)| slug(line).as_deref() == Some(heading))
                {
                    find(format!("{path} has no heading #{heading}"));
                }
            }
            for (program, test) in tests_named(line) {
                let source = files.get(&format!("tests/tests/{program}.rs"));
                if source.is_some_and(|source| !source.contains(&format!("fn {test}("))) {
                    find(format!("there is no test {program}::{test}"));
                }
            }
        }
    }
    findings
}

fn is_document(name: &str) -> bool {
    super::has_extension(name, "md")
}

/// The lines that are not code, with their numbers.
fn lines_of_prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut is_code = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let is_fence = line.trim_start().starts_with("```");
        is_code ^= is_fence;
        (!is_code && !is_fence && !line.starts_with("    ")).then_some((index + 1, line))
    })
}

/// The targets of links that lead into the tree.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let markdown = line.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next());
    let html = [" src=\"", " srcset=\"", " href=\""];
    let html = html.into_iter().flat_map(|attribute| line.split(attribute).skip(1));
    let targets = markdown.chain(html.filter_map(|rest| rest.split('"').next()));
    targets.filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
}

/// A path from the top of the workspace, of one that stands in the document `name`; `None` if it leads out of there.
fn resolve(name: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// How a heading is linked to: its letters in lower case, with hyphens for spaces.
fn slug(line: &str) -> Option<String> {
    let heading = line.strip_prefix('#')?.trim_start_matches('#').strip_prefix(' ')?.trim();
    let fit = |letter: char| match letter {
        ' ' => Some('-'),
        letter if letter.is_alphanumeric() || letter == '-' || letter == '_' => Some(letter),
        _ => None,
    };
    Some(heading.to_lowercase().chars().filter_map(fit).collect())
}

/// What looks like a program with tests and a test in it.
fn tests_named(line: &str) -> impl Iterator<Item = (&str, &str)> {
    let words = line.split('`').skip(1).step_by(2);
    words.filter_map(|word| word.split_once("::")).filter(|(_, test)| {
        !test.is_empty()
            && test
                .chars()
                .all(|letter| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_')
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let files = [
            ("docs/a.md", text),
            ("docs/b.md", "# One: two\n\n```\n# three\n```\n"),
            ("tests/tests/db.rs", "fn it_works() {}\n"),
        ];
        let files = files.map(|(name, text)| (name.to_owned(), text.to_owned()));
        assert_eq!(find(&files.into(), |path| path == "deploy"), expected);
    }

    #[test]
    fn files_and_headings_that_are_there_are_found() {
        check(
            "[b](b.md), [c](../docs/b.md#one-two), [d](../deploy/), [e](https://example.com/x), [f](#g)\n## G\n",
            &[],
        );
    }

    #[test]
    fn those_that_are_not_are_told() {
        check("[x](x.md)\n", &["docs/a.md:1: there is no x.md"]);
        check("<img src=\"x.svg\">\n", &["docs/a.md:1: there is no x.svg"]);
        check("[b](b.md#three)\n", &["docs/a.md:1: docs/b.md has no heading #three"]);
        check("[b](../../b.md)\n", &["docs/a.md:1: there is no ../../b.md"]);
    }

    #[test]
    fn tests_that_are_named_are_there() {
        check("`db::it_works`, `other::test`, `status::Type`\n", &[]);
        check("`db::it_fails`\n", &["docs/a.md:1: there is no test db::it_fails"]);
    }

    #[test]
    fn code_names_what_it_likes() {
        check("```\n[x](x.md)\n```\n    [x](x.md)\n", &[]);
    }
}
