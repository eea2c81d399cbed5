//! Where the fields of objects stand in their files: what gives a problem its line.

use std::path::PathBuf;
use std::sync::Arc;

use imbl::OrdMap;

use super::node::Node;
use forwarder_gateway::manifests::ObjectRef;
use forwarder_gateway::problem::{Location, Problem};

/// The places of all objects and their fields: a persistent map, as in [`Manifests`](forwarder_gateway::manifests::Manifests).
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Locations {
    objects: OrdMap<ObjectRef, Arc<Place>>,
}

/// The place of one object.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Place {
    pub(super) file: Arc<PathBuf>,
    pub(super) lines: Lines,
}

/// The line of a field, and those of the fields in it.
#[derive(Debug, Eq, PartialEq)]
pub(super) struct Lines {
    line: u32,
    children: Children,
}

#[derive(Debug, Eq, PartialEq)]
enum Children {
    None,
    List(Box<[Lines]>),
    Map(Box<[(Box<str>, Lines)]>),
}

impl Locations {
    /// Where a field of an object stands: the nearest field around it that is written down. `None` for an object that is
    /// not in any file.
    ///
    /// In an EndpointSlice an endpoint is the smallest thing that is told apart.
    pub fn lookup(&self, object: &ObjectRef, field: &str) -> Option<Location> {
        let place = self.objects.get(object)?;
        Some(Location { file: Arc::clone(&place.file), line: place.lines.find(field) })
    }

    /// The place of an object.
    pub(super) fn place(&self, object: &ObjectRef) -> Option<&Arc<Place>> {
        self.objects.get(object)
    }

    /// Gives a problem without a location that of its object and field.
    pub fn locate(&self, problem: &mut Problem) {
        if problem.location.is_none()
            && let Some(object) = &problem.object
        {
            problem.location = self.lookup(object, &problem.field);
        }
    }

    pub(super) fn insert(&mut self, object: ObjectRef, place: Arc<Place>) {
        self.objects.insert(object, place);
    }

    pub(super) fn remove(&mut self, object: &ObjectRef) {
        self.objects.remove(object);
    }
}

impl Place {
    /// Where the object starts.
    pub(super) fn start(&self) -> Location {
        Location { file: Arc::clone(&self.file), line: self.lines.line }
    }
}

impl Lines {
    /// An object at `line`, of whose fields nothing is known.
    pub(super) fn at(line: u32) -> Self {
        Self { line, children: Children::None }
    }

    /// The lines of an object that starts at `line`, down to `depth` steps into it.
    pub(super) fn of(node: &Node<'_>, line: u32, depth: usize) -> Self {
        let Some(depth) = depth.checked_sub(1) else {
            return Self { line, children: Children::None };
        };
        let children = match node {
            Node::List(items) => {
                Children::List(items.iter().map(|item| Self::of(&item.value, item.line, depth)).collect())
            }
            Node::Map(entries) => Children::Map(
                entries
                    .iter()
                    .map(|entry| (entry.key.as_ref().into(), Self::of(&entry.value, entry.line, depth)))
                    .collect(),
            ),
            Node::Null
            | Node::Bool(_)
            | Node::Signed(_)
            | Node::Unsigned(_)
            | Node::Float(_)
            | Node::Text(_) => Children::None,
        };
        Self { line, children }
    }

    /// The line of a field such as `spec.rules[0].backendRefs`, or of the innermost field on the way that exists.
    pub(super) fn find(&self, field: &str) -> u32 {
        match self.step(field.strip_prefix('.').unwrap_or(field)) {
            Some((next, rest)) => next.find(rest),
            None => self.line,
        }
    }

    fn step<'p>(&self, field: &'p str) -> Option<(&Lines, &'p str)> {
        match &self.children {
            Children::None => None,
            Children::List(items) => {
                let (index, rest) = field.strip_prefix('[')?.split_once(']')?;
                Some((items.get(index.parse::<usize>().ok()?)?, rest))
            }
            Children::Map(entries) => entries
                .iter()
                .filter_map(|(key, lines)| Some((key.len(), lines, after_key(field, key)?)))
                // Keys of annotations have dots, so that one may start with another.
                .max_by_key(|(length, _, _)| *length)
                .map(|(_, lines, rest)| (lines, rest)),
        }
    }
}

/// What follows `key` in a path, where it may be written as `key` or `[key]`.
fn after_key<'p>(field: &'p str, key: &str) -> Option<&'p str> {
    if let Some(rest) = field.strip_prefix('[') {
        let (quote, rest) = match rest.strip_prefix('"') {
            Some(rest) => ("\"", rest),
            None => ("", rest),
        };
        return rest.strip_prefix(key)?.strip_prefix(quote)?.strip_prefix(']');
    }
    field.strip_prefix(key).filter(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}
