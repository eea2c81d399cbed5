//! The documents as a book, `target/book/index.html`, made by mdBook.
//!
//! docs/README.md lists the pages once: its table is the book's outline. The book is made of a copy of every document of the tree, each
//! at its place, so that links from page to page work in the book as they do in the tree. (Those to folders and licences do not.)

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::tidy::{has_extension, visit};
use crate::{process, setup, workspace};

/// What a document may be or show.
const SHOWN: [&str; 2] = ["md", "svg"];
/// The list of pages.
const INDEX: &str = "docs/README.md";
const CONFIGURATION: &str = "[book]\ntitle = \"forwarder\"\nsrc = \".\"\n\n[build]\nbuild-dir = \"../book\"\n\
                             # A README stays README.html, as links say.\nuse-default-preprocessors = false\n";

/// Makes the book.
pub(crate) fn docs() -> Result<()> {
    let mdbook = setup::mdbook()?;
    let mut files = documents()?;
    let outline = outline(&files);
    ensure!(outline.lines().count() > 10, "{INDEX} has no table of pages");
    files.insert("SUMMARY.md".to_owned(), outline);
    files.insert("book.toml".to_owned(), CONFIGURATION.to_owned());
    let sources = workspace::target_directory().join("book-sources");
    if sources.exists() {
        fs::remove_dir_all(&sources).with_context(|| format!("removing {}", sources.display()))?;
    }
    for (name, text) in files {
        let path = sources.join(name);
        fs::create_dir_all(path.parent().unwrap_or(&sources))?;
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    process::run(Command::new(mdbook).arg("build").arg(&sources))?;
    println!("{}", workspace::target_directory().join("book/index.html").display());
    Ok(())
}

/// The documents of the tree, named from its top.
fn documents() -> Result<BTreeMap<String, String>> {
    let mut files = BTreeMap::new();
    visit(&workspace::root(), "", &mut |name, text| {
        if SHOWN.iter().any(|extension| has_extension(name, extension)) {
            files.insert(name.to_owned(), text.to_owned());
        }
    })?;
    Ok(files)
}

/// mdBook's outline of the table in docs/README.md: a row in bold begins a part, a row with a link is a page, and one that links a
/// folder is all pages of it. Links are from the top of the tree.
fn outline(files: &BTreeMap<String, String>) -> String {
    let index = files.get(INDEX).map(String::as_str).unwrap_or_default();
    let mut outline = format!("# Summary\n\n[Overview](README.md)\n[Pages]({INDEX})\n\n");
    for line in index.lines().filter_map(|line| line.strip_prefix("| ")) {
        let cell = line.split(" |").next().unwrap_or_default();
        if let Some(part) = cell.strip_prefix("**").and_then(|rest| rest.strip_suffix("**")) {
            outline.extend(["\n# ", part, "\n\n"]);
        } else if let Some((_, link)) = cell.split_once("](") {
            let link = link.trim_end_matches(')');
            let title = line.split(" | ").nth(1).unwrap_or_default().trim_end_matches(" |");
            let title = capitalised(title);
            let path = link.strip_prefix("../").map_or_else(|| format!("docs/{link}"), str::to_owned);
            if path.ends_with('/') {
                outline.extend(["- [", &title, "]()\n"]);
                for (name, text) in files.iter().filter(|(name, _)| name.starts_with(&path)) {
                    let heading = text.lines().find_map(|line| line.strip_prefix("# ")).unwrap_or(name);
                    outline.extend(["  - [", heading, "](", name, ")\n"]);
                }
            } else {
                outline.extend(["- [", &title, "](", &path, ")\n"]);
            }
        }
    }
    outline
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outline_follows_the_table_of_pages() {
        let index = "# Documents\n\n| page | content |\n|---|---|\n| [install.md](install.md) | build, commands |\n| **More** | |\n\
                     | [adr/](adr/) | decisions |\n| [../deploy/README.md](../deploy/README.md) | the chart |\n";
        let files = [(INDEX, index), ("docs/adr/001-a.md", "# 1. A\n")];
        let files = files.map(|(name, text)| (name.to_owned(), text.to_owned())).into();
        let expected = "# Summary\n\n[Overview](README.md)\n[Pages](docs/README.md)\n\n- [Build, commands](docs/install.md)\n\n# More\n\n\
                        - [Decisions]()\n  - [1. A](docs/adr/001-a.md)\n- [The chart](deploy/README.md)\n";
        assert_eq!(outline(&files), expected);
    }

    #[test]
    fn every_page_below_docs_is_in_the_outline() {
        let files = documents().unwrap();
        let outline = outline(&files);
        let mut pages = 0;
        for name in files.keys().filter(|name| name.starts_with("docs/") && has_extension(name, "md")) {
            assert!(outline.contains(&format!("({name})")), "{INDEX} does not list {name}");
            pages += 1;
        }
        assert!(pages > 30, "{pages}");
    }
}
