//! Splits a file into documents and parses each one, within limits that keep a hostile file from taking the memory.

use serde_saphyr::{DuplicateKeyPolicy, MessageFormatter, Options, UserMessageFormatter};

use super::node::Node;

/// One document of a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Document<'a> {
    /// How many lines of the file stand before it.
    pub(super) lines_before: u32,
    /// Its text.
    pub(super) text: &'a str,
}

/// Why a document could not be parsed.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct SyntaxError {
    /// The line in the file; 0 if unknown.
    pub(super) line: u32,
    /// What is wrong.
    pub(super) message: String,
}

/// The documents of a file that have content.
///
/// They are split before they are parsed, as `kubectl` does it, so that a broken document does not hide the others.
pub(super) fn documents(text: &str) -> Vec<Document<'_>> {
    let text = strip_bom(text);
    let mut documents = Vec::new();
    let (mut start, mut first_line, mut offset, mut line_number) = (0, 0, 0, 0);
    let mut has_content = false;
    let mut finish = |start: usize, end: usize, first_line: u32, has_content: bool| {
        if has_content && let Some(text) = text.get(start..end) {
            documents.push(Document { lines_before: first_line, text: strip_bom(text) });
        }
    };
    for line in text.split_inclusive('\n') {
        let end = offset + line.len();
        match marker(strip_bom(line)) {
            // Content may follow the marker on its line; if not, a byte order mark may follow on the next.
            Some(Marker::Start) if is_content(strip_bom(line).get(3..).unwrap_or_default()) => {
                finish(start, offset, first_line, has_content);
                (start, first_line, has_content) = (offset, line_number, true);
            }
            Some(Marker::Start | Marker::End) => {
                finish(start, offset, first_line, has_content);
                (start, first_line, has_content) = (end, line_number + 1, false);
            }
            None => has_content |= is_content(line) && !line.starts_with('%'),
        }
        offset = end;
        line_number += 1;
    }
    finish(start, offset, first_line, has_content);
    documents
}

/// Parses a document; the lines of the tree are those of the file.
pub(super) fn parse<'a>(document: Document<'a>) -> Result<Node<'a>, SyntaxError> {
    let mut node =
        serde_saphyr::from_str_with_options::<Node<'a>>(document.text, options()).map_err(|error| {
            let line = error.location().and_then(|location| u32::try_from(location.line()).ok()).unwrap_or(0);
            SyntaxError {
                line: if line == 0 { 0 } else { line + document.lines_before },
                message: one_line(&UserMessageFormatter.format_message(error.without_snippet())),
            }
        })?;
    if document.lines_before > 0 {
        shift(&mut node, document.lines_before);
    }
    Ok(node)
}

/// The limits of one document. A file has at most 32 MiB, of which 4 million values are one in eight bytes: more than
/// 100,000 endpoints with all that an API server writes beside them.
fn options() -> Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_documents: 1,
            // Each level costs the parser kilobytes of stack, and objects nest some fifteen deep.
            max_depth: 32,
            flow_nesting_limit: 32,
            max_nodes: 4_000_000,
            max_events: 8_000_000,
            max_anchors: 10_000,
            max_aliases: 10_000,
            max_merge_keys: 10_000,
            // The limits below say it more precisely, and a small document may well use one anchor a hundred times.
            enforce_alias_anchor_ratio: false,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: 200_000,
            max_replay_stack_depth: 16,
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
        strict_booleans: true,
        reject_unsupported_tags: true,
        with_snippet: false,
    }
}

enum Marker {
    Start,
    End,
}

fn marker(line: &str) -> Option<Marker> {
    // YAML forbids these at the start of a line in any text, quoted or block, so that no content is cut.
    let (kind, rest) = if let Some(rest) = line.strip_prefix("---") {
        (Marker::Start, rest)
    } else {
        (Marker::End, line.strip_prefix("...")?)
    };
    rest.chars().next().is_none_or(char::is_whitespace).then_some(kind)
}

fn is_content(line: &str) -> bool {
    let line = strip_bom(line).trim_start();
    !line.is_empty() && !line.starts_with('#')
}

fn strip_bom(text: &str) -> &str {
    text.strip_prefix('\u{feff}').unwrap_or(text)
}

fn shift(node: &mut Node<'_>, by: u32) {
    match node {
        Node::List(items) => {
            for item in items {
                item.line += by;
                shift(&mut item.value, by);
            }
        }
        Node::Map(entries) => {
            for entry in entries {
                entry.line += by;
                shift(&mut entry.value, by);
            }
        }
        Node::Null | Node::Bool(_) | Node::Signed(_) | Node::Unsigned(_) | Node::Float(_) | Node::Text(_) => {
        }
    }
}

/// Messages stand on one line of a log; the parser's may quote the document.
fn one_line(message: &str) -> String {
    message
        .trim_end_matches('.')
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .chars()
        .filter(|c| !c.is_control())
        .collect()
}

#[cfg(test)]
mod tests;
