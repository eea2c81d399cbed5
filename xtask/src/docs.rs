//! The documents as a book, `target/book/index.html`, made by mdBook.
//!
//! docs/README.md lists the pages once: its table is the book's outline. The book is made of a copy of every document of the tree, each
//! at its place, so that links from page to page work in the book as they do in the tree. (Those to folders and licences do not.)

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::{process, workspace};

const MDBOOK_VERSION: &str = "0.5.4";
/// What a document may be or show.
const COPIED: [&str; 2] = ["md", "svg"];
/// The list of pages.
const INDEX: &str = "docs/README.md";
const CONFIGURATION: &str = "[book]\ntitle = \"forwarder\"\nsrc = \".\"\n\n[build]\nbuild-dir = \"../book\"\n# A README stays README.html, as links say.\nuse-default-preprocessors = false\n";

/// Makes the book.
pub(crate) fn docs() -> Result<()> {
    let mdbook = mdbook()?;
    let sources = workspace::target_directory().join("book-sources");
    if sources.exists() {
        fs::remove_dir_all(&sources).with_context(|| format!("removing {}", sources.display()))?;
    }
    copy(&workspace::root(), &sources)?;
    let index = fs::read_to_string(sources.join(INDEX)).context("reading the list of pages")?;
    let outline = outline(&index, |folder| pages_of(&sources.join("docs").join(folder)));
    ensure!(outline.lines().count() > 10, "{INDEX} has no table of pages");
    fs::write(sources.join("SUMMARY.md"), outline)?;
    fs::write(sources.join("book.toml"), CONFIGURATION)?;
    process::run(Command::new(mdbook).arg("build").arg(&sources))?;
    println!("{}", workspace::target_directory().join("book/index.html").display());
    Ok(())
}

/// mdBook: our own, the one on the search path, or a new one.
fn mdbook() -> Result<PathBuf> {
    let own = workspace::tools_directory().join("bin/mdbook");
    if own.is_file() {
        return Ok(own);
    }
    if let Some(found) = process::find("mdbook") {
        return Ok(found);
    }
    let mut command = Command::new(workspace::cargo());
    command
        .args([
            "install",
            "mdbook",
            "--version",
            MDBOOK_VERSION,
            "--locked",
            "--debug",
            "--no-default-features",
            "--root",
        ])
        .arg(workspace::tools_directory())
        .current_dir(Path::new("/"));
    process::run_within(&mut command, Duration::from_mins(15))
        .context("install mdbook, or put it on PATH")?;
    Ok(own)
}

/// Copies the documents below a folder, each to its place below another.
fn copy(from: &Path, to: &Path) -> Result<()> {
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            copy(&path, &to.join(&name))?;
        } else if path.extension().is_some_and(|it| COPIED.iter().any(|extension| it == *extension)) {
            fs::create_dir_all(to)?;
            fs::copy(&path, to.join(&name)).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}

/// The pages in a folder and their headings, by name.
fn pages_of(folder: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
    let page = |entry: fs::DirEntry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let text = fs::read_to_string(entry.path()).ok()?;
        let heading = text.lines().find_map(|line| line.strip_prefix("# "))?;
        entry.path().extension().is_some_and(|it| it == "md").then(|| (name.clone(), heading.to_owned()))
    };
    let mut pages: Vec<(String, String)> = entries.filter_map(page).collect();
    pages.sort();
    pages
}

/// mdBook's outline of the table in docs/README.md: a row in bold begins a part, a row with a link is a page, and one that links a
/// folder is all pages of it. Links are from the top of the tree.
fn outline(index: &str, pages_of: impl Fn(&str) -> Vec<(String, String)>) -> String {
    let mut outline = format!("# Summary\n\n[Overview](README.md)\n[Pages]({INDEX})\n\n");
    for line in index.lines().filter_map(|line| line.strip_prefix("| ")) {
        let cell = line.split(" |").next().unwrap_or_default();
        if let Some(part) = cell.strip_prefix("**").and_then(|rest| rest.strip_suffix("**")) {
            outline.extend(["\n# ", part, "\n\n"]);
        } else if let Some((_, link)) = cell.split_once("](") {
            let link = link.trim_end_matches(')');
            let title = line.split(" | ").nth(1).unwrap_or_default().trim_end_matches(" |");
            let title = capitalised(title);
            if let Some(folder) = link.strip_suffix('/') {
                outline.extend(["- [", &title, "]()\n"]);
                for (name, heading) in pages_of(folder) {
                    outline.extend(["  - [", &heading, "](docs/", folder, "/", &name, ")\n"]);
                }
            } else {
                let path = link.strip_prefix("../").map_or_else(|| format!("docs/{link}"), str::to_owned);
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
        let pages = |folder: &str| {
            assert_eq!(folder, "adr");
            vec![("001-a.md".to_owned(), "1. A".to_owned())]
        };
        let expected = "# Summary\n\n[Overview](README.md)\n[Pages](docs/README.md)\n\n- [Build, commands](docs/install.md)\n\n# More\n\n\
                        - [Decisions]()\n  - [1. A](docs/adr/001-a.md)\n- [The chart](deploy/README.md)\n";
        assert_eq!(outline(index, pages), expected);
    }

    #[test]
    fn every_page_below_docs_is_in_the_outline() {
        let docs = workspace::root().join("docs");
        let index = fs::read_to_string(docs.join("README.md")).unwrap();
        let outline = outline(&index, |folder| pages_of(&docs.join(folder)));
        let mut folders = vec![docs.clone()];
        let mut pages = 0;
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.extension().is_some_and(|it| it == "md") {
                    let name = path.strip_prefix(workspace::root()).unwrap().display().to_string();
                    assert!(outline.contains(&format!("({name})")), "{INDEX} does not list {name}");
                    pages += 1;
                }
            }
        }
        assert!(pages > 30, "{pages}");
    }
}
