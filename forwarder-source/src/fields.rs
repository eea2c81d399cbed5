//! Fields that no release knows: what is written there is not meant as it is taken.
//!
//! An API server takes them away, or refuses them where `kubectl` asks for that. In a file nobody would say so, and a field that is
//! missing often means "all": a `sectionname` leads every port of a Gateway to one backend.

mod idle;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use super::node::{Node, excerpt};
use forwarder_gateway::manifests::{Kind, ObjectRef};
use forwarder_gateway::problem::{Problem, Reason};

pub(super) use self::idle::idle;
pub(super) use forwarder_gateway::spelling::meant;

/// A kind and a path on each line: the head of the file says how.
const TABLE: &str = include_str!("fields.txt");
/// So many unknown fields of an object are told.
pub(super) const MOST: usize = 32;
/// The names of fields are shorter than so many bytes.
const LONGEST: usize = 64;
/// So many fields are named where none is like the unknown one.
const MOST_NAMED: usize = 8;

static KNOWN: LazyLock<BTreeMap<&str, Fields>> = LazyLock::new(|| {
    let mut kinds = BTreeMap::<&str, Fields>::new();
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        let (kind, path) = line.split_once(' ').unwrap_or((line, ""));
        kinds.entry(kind).or_default().add(path);
    }
    kinds
});

/// What may stand in a value.
#[derive(Debug, Default)]
struct Fields {
    /// The fields of a map by their names; those of an item of a list under [`ITEM`], those of a map with free keys under [`VALUE`].
    inner: BTreeMap<&'static str, Fields>,
    /// Whether anything may.
    is_open: bool,
}

const ITEM: &str = "[]";
const VALUE: &str = "{}";

impl Fields {
    fn add(&mut self, path: &'static str) {
        let end = path.find(['.', '[', '{', '*']).unwrap_or(path.len());
        let (step, rest) = match path.as_bytes().first() {
            None => return,
            Some(b'*') => return self.is_open = true,
            Some(b'[' | b'{') => path.split_at(ITEM.len()),
            Some(b'.') => return self.add(&path[1..]),
            Some(_) => path.split_at(end),
        };
        self.inner.entry(step).or_default().add(rest);
    }
}

/// A field that no release of its kind knows.
#[derive(Debug)]
pub(super) struct Unknown {
    pub(super) problem: Problem,
    /// The path of the field that was likely meant.
    pub(super) meant: Option<String>,
}

/// The fields of an object that no release of its kind knows.
pub(super) fn unknown(node: &Node<'_>, kind: Kind, id: &ObjectRef) -> Vec<Unknown> {
    let mut found = Vec::new();
    if let Some(known) = KNOWN.get(kind.as_str()) {
        look(node, known, &mut String::new(), &mut |path, fields, key| {
            if found.len() < MOST {
                let meant = meant(key, fields.inner.keys().copied());
                let mut message = message(meant, fields);
                let parent = path.strip_suffix(key).unwrap_or_default();
                // What is no name at all is not to be printed as one.
                let field =
                    if key.len() > LONGEST || key.contains(|c: char| c.is_control() || c.is_whitespace()) {
                        message = format!("{:?}: {message}", excerpt(key));
                        parent.trim_end_matches('.')
                    } else {
                        path
                    };
                let problem = Problem::error(Reason::UnknownField, id.clone(), field, message);
                found.push(Unknown { problem, meant: meant.map(|name| format!("{parent}{name}")) });
            }
        });
    }
    found
}

/// Whether Gateway API has a kind, read or not.
pub(super) fn is_gateway_kind(kind: &str) -> bool {
    KNOWN.contains_key(kind) && !CORE.contains(&kind)
}

/// The kinds of the table that are not of Gateway API.
const CORE: [&str; 3] = ["EndpointSlice", "Namespace", "Service"];

fn look(node: &Node<'_>, known: &Fields, path: &mut String, tell: &mut impl FnMut(&str, &Fields, &str)) {
    let length = path.len();
    match node {
        Node::List(items) => {
            let Some(item) = known.inner.get(ITEM) else { return };
            for (index, one) in items.iter().enumerate() {
                // Writing to a text does not fail.
                let _ = write!(path, "[{index}]");
                look(&one.value, item, path, tell);
                path.truncate(length);
            }
        }
        Node::Map(entries) => {
            let value = known.inner.get(VALUE);
            // Where a scalar or a list is expected, that is said elsewhere.
            if value.is_none() && (known.inner.is_empty() || known.inner.contains_key(ITEM)) {
                return;
            }
            for entry in entries {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(&entry.key);
                match value.or_else(|| known.inner.get(&*entry.key)) {
                    Some(inner) => look(&entry.value, inner, path, tell),
                    None if !known.is_open => tell(path, known, &entry.key),
                    None => {}
                }
                path.truncate(length);
            }
        }
        Node::Null | Node::Bool(_) | Node::Signed(_) | Node::Unsigned(_) | Node::Float(_) | Node::Text(_) => {
        }
    }
}

fn message(meant: Option<&str>, fields: &Fields) -> String {
    if let Some(name) = meant {
        return format!("unknown field (did you mean {name}?)");
    }
    let names: Vec<&str> = fields.inner.keys().copied().take(MOST_NAMED).collect();
    let more = if fields.inner.len() > MOST_NAMED { " and others" } else { "" };
    format!("unknown field (there are {}{more})", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml;

    fn problems(kind: Kind, text: &str) -> Vec<String> {
        let documents = yaml::documents(text);
        let node = yaml::parse(documents[0]).unwrap();
        let id =
            ObjectRef { kind: kind.as_str().to_owned(), namespace: "a".to_owned(), name: "b".to_owned() };
        unknown(&node, kind, &id)
            .iter()
            .map(|Unknown { problem, .. }| format!("{}: {}", problem.field, problem.message))
            .collect()
    }

    #[test]
    fn a_typo_is_told_with_what_was_meant() {
        let text = "{metadata: {lables: {}}, spec: {parentRefs: [{name: a}, {sectionname: b}], rules: \
                    [{backendRefs: [{wieght: 5, colour: red}]}]}}";
        assert_eq!(
            problems(Kind::TcpRoute, text),
            [
                "metadata.lables: unknown field (did you mean labels?)",
                "spec.parentRefs[1].sectionname: unknown field (did you mean sectionName?)",
                "spec.rules[0].backendRefs[0].wieght: unknown field (did you mean weight?)",
                "spec.rules[0].backendRefs[0].colour: unknown field (there are group, kind, name, namespace, port, weight)",
            ]
        );
        let slice = "{addressType: IPv4, endpoints: [{adresses: [192.0.2.1], conditions: {raedy: false}}]}";
        assert_eq!(
            problems(Kind::EndpointSlice, slice),
            [
                "endpoints[0].adresses: unknown field (did you mean addresses?)",
                "endpoints[0].conditions.raedy: unknown field (did you mean ready?)",
            ]
        );
    }

    #[test]
    fn what_is_no_name_is_quoted() {
        assert_eq!(
            problems(Kind::Namespace, "{metadata: {\"a\\u001bb\": 1}}"),
            [
                "metadata: \"a\\u{1b}b\": unknown field (there are annotations, creationTimestamp, deletionGracePeriodSeconds, \
              deletionTimestamp, finalizers, generateName, generation, labels and others)"
            ]
        );
    }

    #[test]
    fn keys_of_anybodys_choice_and_what_a_server_writes_are_known() {
        let metadata = "apiVersion: a, kind: b, metadata: {labels: {a.b/c: d}, annotations: {x/y: z}, managedFields: [{fieldsV1: \
                        {'f:spec': {'f:x': {}}}}], uid: u, ownerReferences: [{apiVersion: v, kind: k, name: n, uid: u}]}";
        let status = "status: {conditions: [{whatever: true}]}";
        assert_eq!(
            problems(
                Kind::Gateway,
                &format!("{{{metadata}, {status}, spec: {{listeners: [{{tls: {{options: {{any: x}}}}}}]}}}}")
            ),
            [""; 0]
        );
        assert_eq!(
            problems(
                Kind::Service,
                &format!(
                    "{{{metadata}, {status}, spec: {{selector: {{app: x}}, ports: [{{targetPort: 1}}]}}}}"
                )
            ),
            [""; 0]
        );
        assert_eq!(problems(Kind::Namespace, &format!("{{{metadata}, {status}}}")), [""; 0]);
    }

    #[test]
    fn a_kind_is_told_by_what_is_like_it() {
        let kinds = ["Gateway", "GatewayClass", "TCPRoute"];
        for (text, name) in [
            ("Gatway", Some("Gateway")),
            ("TcpRoute", Some("TCPRoute")),
            ("tcproute", Some("TCPRoute")),
            ("Deployment", None),
        ] {
            assert_eq!(meant(text, kinds.into_iter()), name, "{text}");
        }
        assert!(
            is_gateway_kind("HTTPRoute")
                && is_gateway_kind("Gateway")
                && !is_gateway_kind("Service")
                && !is_gateway_kind("Gatway")
        );
    }
}
