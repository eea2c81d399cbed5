//! No file needs another that needs it.
//!
//! The arrows are read from the text: `use` declarations and paths that begin with `crate`, `self` or `super`. What a module takes
//! from those around it (`super::Name`) is none, since a module is a part of these; a re-export leads to where the name is defined.
//! The same holds of the top-level modules of a crate, whatever files they have.

use std::collections::{BTreeMap, BTreeSet};

use super::{code_length, without_comment};

/// Sources that are a crate of their own although they lie in another one's folder.
const INNER: [&str; 1] = ["forwarder-ebpf/src/sockmap/"];

/// A module, by its path in the crate; the root has none.
type Module = Vec<String>;
/// Which names a file takes from which other, by the modules.
type Arrows = BTreeMap<Module, BTreeMap<Module, BTreeSet<String>>>;

/// The circles of every crate, each as a sentence. `files` are named from the top of the workspace.
pub(super) fn find(files: &BTreeMap<String, String>) -> Vec<String> {
    let mut findings = Vec::new();
    let crates: BTreeSet<&str> = files.keys().filter_map(|name| crate_of(name)).collect();
    for root in crates {
        let of_crate = |(name, text): (&String, &String)| {
            let path = name.strip_prefix(root).filter(|_| crate_of(name) == Some(root))?;
            Some((module_of(path)?, code_of(text)))
        };
        let modules: BTreeMap<Module, String> = files.iter().filter_map(of_crate).collect();
        let arrows = arrows(&modules);
        findings.extend(circles(&arrows).iter().map(|circle| sentence(root, circle, &arrows)));
        let top = of_top_level(&arrows);
        findings.extend(circles(&top).iter().map(|circle| sentence(root, circle, &top)));
    }
    findings
}

/// The folder of the crate's sources that a file is of, such as `xtask/src/`.
fn crate_of(name: &str) -> Option<&str> {
    let inner = INNER.iter().find(|root| name.starts_with(**root));
    inner.copied().or_else(|| name.find("/src/").and_then(|at| name.get(..at + "/src/".len())))
}

/// The module of a file below `src/`; `None` for tests.
fn module_of(path: &str) -> Option<Module> {
    let path = path.strip_suffix(".rs")?;
    let mut module: Module = path.split('/').map(str::to_owned).collect();
    if module.iter().any(|part| part == "tests" || part.ends_with("_tests") || part == "fake") {
        return None;
    }
    if module.last().is_some_and(|last| ["mod", "lib", "main"].contains(&last.as_str())) {
        module.pop();
    }
    Some(module)
}

/// The text without comments, and without the test module that ends it.
fn code_of(text: &str) -> String {
    let code = text.lines().take(code_length(text)).map(without_comment);
    code.collect::<Vec<_>>().join("\n")
}

/// What a module names, by absolute paths in the crate.
struct Named {
    paths: Vec<Module>,
    /// Names that it hands on, with the paths that they have elsewhere.
    exports: BTreeMap<String, Module>,
}

fn arrows(modules: &BTreeMap<Module, String>) -> Arrows {
    let named: BTreeMap<&Module, Named> =
        modules.iter().map(|(module, code)| (module, named(module, code))).collect();
    let mut arrows = Arrows::new();
    for (module, Named { paths, .. }) in &named {
        for path in paths {
            let Some((other, name)) = lead(path, &named) else { continue };
            let is_around = module.starts_with(&other);
            if !is_around {
                arrows.entry((*module).clone()).or_default().entry(other).or_default().insert(name);
            }
        }
    }
    arrows
}

/// The module in which a path ends, past re-exports, and the name there.
fn lead(path: &Module, named: &BTreeMap<&Module, Named>) -> Option<(Module, String)> {
    let mut path = path.clone();
    // A name is handed on a few times at most.
    for _ in 0..8 {
        let length = (0..=path.len()).rev().find(|length| named.contains_key(&path[..*length].to_vec()))?;
        let (module, rest) = path.split_at(length);
        let module = module.to_vec();
        let Some(name) = rest.first() else { return Some((module, String::new())) };
        match named.get(&module)?.exports.get(name) {
            Some(elsewhere) => path = elsewhere.iter().chain(&rest[1..]).cloned().collect(),
            None => return Some((module, name.clone())),
        }
    }
    None
}

fn named(module: &Module, code: &str) -> Named {
    let mut named = Named { paths: Vec::new(), exports: BTreeMap::new() };
    let mut rest = String::new();
    for statement in code.split_inclusive(';') {
        let Some((before, tree)) = use_tree(statement) else {
            rest.push_str(statement);
            continue;
        };
        rest.push_str(before);
        let is_export = before.trim_end().ends_with("pub") || before.trim_end().ends_with(')');
        let mut paths = Vec::new();
        expand("", tree, &mut paths);
        for path in paths {
            let (path, name) =
                path.split_once(" as ").map_or((path.as_str(), None), |(path, name)| (path, Some(name)));
            let Some(absolute) = absolute(module, path) else { continue };
            if is_export {
                let name = name.or(absolute.last().map(String::as_str)).unwrap_or_default().to_owned();
                named.exports.insert(name, absolute);
            } else {
                named.paths.push(absolute);
            }
        }
    }
    for word in rest.split(|letter: char| !(letter.is_alphanumeric() || letter == '_' || letter == ':')) {
        if word.contains("::") {
            named.paths.extend(absolute(module, word));
        }
    }
    named
}

/// What stands before a `use` declaration, and its tree.
fn use_tree(statement: &str) -> Option<(&str, &str)> {
    let at = statement.match_indices("use ").map(|(at, _)| at).find(|at| {
        let before = statement.get(..*at).unwrap_or_default();
        let line = before.rsplit('\n').next().unwrap_or_default().trim();
        line.is_empty() || line == "pub" || line.starts_with("pub(") && line.ends_with(')')
    })?;
    let (before, tree) = statement.split_at(at);
    Some((before, tree.strip_prefix("use ")?.trim_end().strip_suffix(';')?.trim()))
}

/// The paths of a tree such as `a::{b, c::{self, d}}`.
fn expand(prefix: &str, tree: &str, paths: &mut Vec<String>) {
    let tree = tree.trim();
    let Some((head, body)) = tree.split_once('{') else {
        let path = format!("{prefix}{tree}");
        paths.push(path.strip_suffix("::self").map_or(path.clone(), str::to_owned));
        return;
    };
    let prefix = format!("{prefix}{}", head.trim());
    let body = body.trim_end().strip_suffix('}').unwrap_or(body);
    let (mut depth, mut start) = (0, 0);
    for (at, letter) in body.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                expand(&prefix, &body[start..at], paths);
                start = at + 1;
            }
            _ => {}
        }
    }
    if !body[start..].trim().is_empty() {
        expand(&prefix, &body[start..], paths);
    }
}

/// A path from the root of the crate; `None` if it leads elsewhere.
fn absolute(module: &Module, path: &str) -> Option<Module> {
    let mut parts = path.split("::").map(str::trim).peekable();
    let mut around = match *parts.peek()? {
        "crate" => {
            parts.next();
            Vec::new()
        }
        "self" => {
            parts.next();
            module.clone()
        }
        "super" => module.clone(),
        _ => return None,
    };
    while parts.next_if_eq(&"super").is_some() {
        around.pop()?;
    }
    around.extend(parts.filter(|part| !part.is_empty()).map(str::to_owned));
    Some(around)
}

/// The arrows between the first parts of the modules' paths.
fn of_top_level(arrows: &Arrows) -> Arrows {
    let mut top = Arrows::new();
    for (from, others) in arrows {
        for (to, names) in others {
            let (Some(from), Some(to)) = (from.first(), to.first()) else { continue };
            if from != to {
                let names = names.iter().cloned();
                top.entry(vec![from.clone()]).or_default().entry(vec![to.clone()]).or_default().extend(names);
            }
        }
    }
    top
}

/// The sets of modules each of which leads to all others.
fn circles(arrows: &Arrows) -> Vec<BTreeSet<Module>> {
    let reached: BTreeMap<&Module, BTreeSet<&Module>> =
        arrows.keys().map(|module| (module, reach(module, arrows))).collect();
    let mut circles: Vec<BTreeSet<Module>> = Vec::new();
    for (module, others) in &reached {
        let back = |other: &&&Module| reached.get(**other).is_some_and(|of_other| of_other.contains(*module));
        let circle: BTreeSet<Module> = others.iter().filter(back).map(|other| (**other).clone()).collect();
        if !circle.is_empty() && !circles.contains(&circle) {
            circles.push(circle);
        }
    }
    circles
}

/// Every module that arrows lead to from one, by however many.
fn reach<'a>(from: &Module, arrows: &'a Arrows) -> BTreeSet<&'a Module> {
    let mut reached = BTreeSet::new();
    let mut next: Vec<&Module> = arrows.get(from).into_iter().flat_map(BTreeMap::keys).collect();
    while let Some(module) = next.pop() {
        if reached.insert(module) {
            next.extend(arrows.get(module).into_iter().flat_map(BTreeMap::keys));
        }
    }
    reached
}

fn sentence(root: &str, circle: &BTreeSet<Module>, arrows: &Arrows) -> String {
    let mut lines = vec![format!("{root}: modules need each other; move what ties them below both:")];
    for from in circle {
        let others = arrows.get(from).into_iter().flatten().filter(|(to, _)| circle.contains(*to));
        lines.extend(others.map(|(to, names)| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            format!("    {} -> {}: {}", from.join("::"), to.join("::"), names.join(", "))
        }));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let files = files.iter().map(|(name, text)| (format!("xtask/src/{name}"), (*text).to_owned()));
        find(&files.collect())
    }

    #[test]
    fn two_files_that_need_each_other_are_a_circle() {
        let circle = [("a.rs", "use crate::b::{self, B};\n"), ("b.rs", "fn f() -> super::a::A {}\n")];
        let [of_files, of_modules] = &*found(&circle) else { panic!("{:?}", found(&circle)) };
        assert!(of_files.contains("\n    a -> b: , B\n    b -> a: A"), "{of_files}");
        assert!(of_modules.contains("\n    a -> b: , B\n    b -> a: A"), "{of_modules}");
        assert_eq!(found(&circle[..1]), [""; 0]);
    }

    #[test]
    fn a_part_of_a_module_may_need_the_module() {
        let files = [("a.rs", "mod b;\nuse self::b::B;\n"), ("a/b.rs", "use super::A;\n")];
        assert_eq!(found(&files), [""; 0]);
    }

    #[test]
    fn parts_of_a_module_must_not_need_each_other() {
        let files = [("a/b.rs", "use super::c::C;\n"), ("a/c.rs", "use crate::a::b::B;\n")];
        assert_eq!(found(&files).len(), 1);
    }

    #[test]
    fn two_modules_must_not_need_each_other_by_different_files() {
        let files = [
            ("a/x.rs", "use crate::b::y::Y;\n"),
            ("b/z.rs", "use crate::a::w::W;\n"),
            ("a/w.rs", ""),
            ("b/y.rs", ""),
        ];
        assert_eq!(found(&files).len(), 1);
    }

    #[test]
    fn what_is_handed_on_leads_to_where_it_is() {
        let files = [
            ("a/mod.rs", "pub use self::b::B;\nuse crate::c::C;\n"),
            ("a/b.rs", ""),
            ("c.rs", "use crate::a::B;\n"),
        ];
        // The module `a` needs `c`, and `c` a part of `a`.
        assert_eq!(found(&files).len(), 1);
        let other = [
            ("a/mod.rs", "pub use crate::d::D;\nuse crate::c::C;\n"),
            ("d.rs", ""),
            ("c.rs", "use crate::a::D;\n"),
        ];
        assert_eq!(found(&other), [""; 0]);
    }

    #[test]
    fn comments_and_tests_need_what_they_like() {
        let files = [
            ("a.rs", "use crate::b::B;\n"),
            (
                "b.rs",
                "// crate::a::A\n/// [`A`](crate::a::A)\nfn f() {}\n\n#[cfg(test)]\nmod tests {\n    use crate::a::A;\n}\n",
            ),
            ("b/tests.rs", "use crate::a::A;\n"),
        ];
        assert_eq!(found(&files), [""; 0]);
    }
}
