#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

use std::fmt::Write;

use expect_test::{Expect, expect};

use super::*;

/// Shows each document as the lines of its fields, or its error.
fn check(text: &str, expected: Expect) {
    fn show(node: &Node<'_>, path: &str, out: &mut String) {
        match node {
            Node::List(items) => {
                for (index, item) in items.iter().enumerate() {
                    show_at(&item.value, item.line, &format!("{path}[{index}]"), out);
                }
            }
            _ => {
                for entry in node.entries() {
                    show_at(&entry.value, entry.line, &format!("{path}.{}", entry.key), out);
                }
            }
        }
    }
    fn show_at(node: &Node<'_>, line: u32, path: &str, out: &mut String) {
        match node {
            Node::List(_) | Node::Map(_) => writeln!(out, "{line}: {path}").unwrap(),
            scalar => writeln!(out, "{line}: {path} = {scalar:?}").unwrap(),
        }
        show(node, path, out);
    }
    let mut out = String::new();
    for document in documents(text) {
        match parse(document) {
            Ok(node) => show(&node, "", &mut out),
            Err(error) => writeln!(out, "{}: error: {}", error.line, error.message).unwrap(),
        }
        out.push_str("--\n");
    }
    expected.assert_eq(&out);
}

#[test]
fn every_field_has_its_line_in_the_file() {
    check(
        "# c\n---\na: 1\nb:\n  - x\n  - y: {z: 80.0, q: }\n  -\n    w: 2\n---\nl:\n  a.b/c: t\n  yes: no\n",
        expect![[r#"
            3: .a = Signed(1)
            4: .b
            5: .b[0] = Text("x")
            6: .b[1]
            6: .b[1].y
            6: .b[1].y.z = Float(80.0)
            6: .b[1].y.q = Null
            8: .b[2]
            8: .b[2].w = Signed(2)
            --
            10: .l
            11: .l.a.b/c = Text("t")
            12: .l.yes = Text("no")
            --
        "#]],
    );
}

#[test]
fn documents_split_at_markers() {
    // Comments and directives alone are no document; content may follow a marker; a block may hold dashes.
    check(
        "\n# nothing\n--- # one\na: 1\n--- {b: 2}\n...\n# end\nc: 3\n---\n\n---\n",
        expect![[r#"
            4: .a = Signed(1)
            --
            5: .b = Signed(2)
            --
            8: .c = Signed(3)
            --
        "#]],
    );
    check(
        "%YAML 1.2\n---\nd: |\n  x\n  ---\n  y\n---x: 1\n",
        expect![[r#"
        3: .d = Text("x\n---\ny\n")
        7: .---x = Signed(1)
        --
    "#]],
    );
    check(
        "%YAML 1.2\n---\nd: |\n  x\n  ---\n  y\n",
        expect![[r#"
        3: .d = Text("x\n---\ny\n")
        --
    "#]],
    );
}

#[test]
fn empty_files_have_no_documents() {
    for text in
        ["", "\n", "# c\n", "---\n", "---\n---\n...\n", "\u{feff}", "\u{feff}---\n", "%YAML 1.2\n---\n"]
    {
        assert_eq!(documents(text), [], "{text:?}");
    }
}

#[test]
fn byte_order_marks_and_line_ends_do_not_matter() {
    check(
        "\u{feff}a: 1\r\nb:\r\n- c\r\n---\r\n\u{feff}d: 1\r\n\u{feff}---\r\ne: 1\r\n",
        expect![[r#"
            1: .a = Signed(1)
            2: .b
            3: .b[0] = Text("c")
            --
            5: .d = Signed(1)
            --
            7: .e = Signed(1)
            --
        "#]],
    );
}

#[test]
fn a_broken_document_does_not_hide_the_others() {
    check(
        "a: 1\n---\nb: [\n---\nc: 1\n---\nd: 1\nd: 2\n---\ne: 1\n",
        expect![[r#"
            1: .a = Signed(1)
            --
            3: error: unclosed bracket '['
            --
            5: .c = Signed(1)
            --
            8: error: duplicate mapping key `d` is not allowed here
            --
            10: .e = Signed(1)
            --
        "#]],
    );
}

#[test]
fn what_yaml_forbids_is_an_error() {
    for (text, expected) in [
        (
            "a:\n\tb: 1\n",
            expect![[r#"
            2: error: tabs disallowed within this context (block indentation)
            --
        "#]],
        ),
        (
            "a: b: c\n",
            expect![[r#"
            1: error: mapping values are not allowed in this context
            --
        "#]],
        ),
        (
            "a: 1\n b: 2\n",
            expect![[r#"
            2: error: mapping values are not allowed in this context
            --
        "#]],
        ),
        (
            "a: \"x\n",
            expect![[r#"
            1: error: unclosed quote
            --
        "#]],
        ),
        (
            "a: *nope\n",
            expect![[r#"
            1: error: reference to unknown value
            --
        "#]],
        ),
        (
            "a: &a [*a]\n",
            expect![[r#"
            1: error: Recursive reference not allowed here
            --
        "#]],
        ),
        (
            "a: !secret x\n",
            expect![[r#"
            1: error: unsupported tag `!secret`
            --
        "#]],
        ),
        (
            "a: 1\n? [b]\n: 2\n",
            expect![[r#"
            2: error: expected string scalar
            --
        "#]],
        ),
        (
            "null: 1\n",
            expect![[r#"
            1: error: null is not allowed here
            --
        "#]],
        ),
        (
            "a: .nan\n",
            expect![[r#"
            1: error: value `.nan` is not a finite number
            --
        "#]],
        ),
        (
            "a: 'x\u{7}y'\n",
            expect![[r#"
            1: error: unexpected character: `\u{7}'
            --
        "#]],
        ),
        (
            "a: \0\n",
            expect![[r#"
            1: error: unexpected character: `\u{0}'
            --
        "#]],
        ),
    ] {
        check(text, expected);
    }
}

#[test]
fn json_with_tabs_is_read() {
    check(
        "{\n\t\"a\": [\n\t\t1,\n\t\t\"\\u00e9\"\n\t]\n}\n",
        expect![[r#"
        2: .a
        3: .a[0] = Signed(1)
        4: .a[1] = Text("é")
        --
    "#]],
    );
}

#[test]
fn merge_keys_and_aliases_are_expanded_where_they_are_used() {
    check(
        "a: &x {b: 1}\nc: *x\nd:\n  <<: *x\n  e: 1\n",
        expect![[r#"
        1: .a
        1: .a.b = Signed(1)
        2: .c
        2: .c.b = Signed(1)
        3: .d
        5: .d.e = Signed(1)
        4: .d.b = Signed(1)
        --
    "#]],
    );
}

#[test]
fn hostile_documents_end_in_an_error() {
    let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..9 {
        let alias = format!("*a{}", level - 1);
        writeln!(bomb, "a{level}: &a{level} [{}]", vec![alias; 10].join(", ")).unwrap();
    }
    check(
        &bomb,
        expect![[r#"
        6: error: YAML document too large or too complex: total_replayed_events=200001 > 200000
        --
    "#]],
    );
    check(
        &"[".repeat(1 << 20),
        expect![[r#"
        1: error: recursion limit exceeded
        --
    "#]],
    );
    check(
        &"- ".repeat(1 << 16),
        expect![[r#"
        1: error: YAML document too large or too complex: limits breached: Depth { depth: 33 }
        --
    "#]],
    );
    check(
        &"{a: ".repeat(1 << 16),
        expect![[r#"
        1: error: recursion limit exceeded
        --
    "#]],
    );
}
