//! Manifests from a file or folder, such that what worked keeps working.
//!
//! [`FileSource`] behaves as an API server would: an object whose document is refused stays as it was, and so does one of
//! which nothing can be said because its file is broken. Only an object that is certainly gone is taken away.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::document::{self, Contents, Manifest};
use super::locations::{Locations, Place};
use super::scan::{self, Scan, Stamp};
use crate::manifests::{Manifests, NamespacedName, ObjectRef};
use crate::problem::{Location, Problem, Reason, Severity};

/// What a source has read: the objects, what is wrong with them, and where they stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// The objects in force. One that has not changed is the same allocation as in the load before.
    pub manifests: Manifests,
    /// What is wrong, in the order of the files.
    pub problems: Vec<Problem>,
    /// The lines of the objects' fields.
    pub locations: Locations,
}

/// Reads manifests from a file or folder, and remembers the last good version of each object.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    /// The objects in force.
    held: BTreeMap<ObjectRef, Held>,
    /// What was made of each file, so that only those that changed are parsed.
    files: BTreeMap<PathBuf, Parsed>,
}

/// An object in force.
#[derive(Clone, Debug)]
struct Held {
    manifest: Manifest,
    place: Arc<Place>,
}

#[derive(Debug)]
struct Parsed {
    file: Arc<PathBuf>,
    digest: (usize, u64),
    contents: Contents,
}

/// What is made of the files while they are gone through in order.
#[derive(Default)]
struct Merge {
    held: BTreeMap<ObjectRef, Held>,
    /// Where each object was named first, whether it is in force or not.
    named: BTreeMap<ObjectRef, Location>,
    problems: Vec<Problem>,
}

impl FileSource {
    /// A source for `path`, of which nothing is read yet.
    ///
    /// A folder stands for the `*.yaml`, `*.yml` and `*.json` files in it and in its subfolders.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), held: BTreeMap::new(), files: BTreeMap::new() }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads everything again. What cannot be read or used becomes a problem.
    pub fn load(&mut self) -> Loaded {
        self.load_scanned(scan::scan(&self.path)).0
    }

    /// Reads what a scan has found; also yields the fingerprint of what was found.
    pub(super) fn load_scanned(
        &mut self,
        scan: Result<Scan, Box<Problem>>,
    ) -> (Loaded, Option<Vec<(PathBuf, Stamp)>>) {
        match scan {
            Ok(scan) => {
                let problems = self.load_files(&scan);
                (self.loaded(problems), Some(scan.fingerprint))
            }
            Err(mut problem) => {
                problem.message.push_str(&kept(self.held.len()));
                (self.loaded(vec![*problem]), None)
            }
        }
    }

    fn load_files(&mut self, scan: &Scan) -> Vec<Problem> {
        let mut merge = Merge { problems: scan.problems.clone(), ..Merge::default() };
        let mut before = std::mem::take(&mut self.files);
        let mut paths = scan.files.iter().chain(&scan.unknown).collect::<Vec<_>>();
        paths.sort();
        for path in paths {
            if scan.unknown.contains(path) {
                let count = self.keep(&mut merge, path);
                let is_about = |it: &&mut Problem| it.location.as_ref().is_some_and(|it| *it.file == *path);
                merge.problems.iter_mut().filter(is_about).for_each(|it| it.message.push_str(&kept(count)));
                continue;
            }
            match scan::read(path) {
                Ok(text) => {
                    let parsed = parse(path, &text, before.remove(path));
                    self.merge(&mut merge, &parsed);
                    self.files.insert(path.clone(), parsed);
                }
                Err(mut problem) => {
                    let count = self.keep(&mut merge, path);
                    problem.message.push_str(&kept(count));
                    merge.problems.push(*problem);
                }
            }
        }
        self.held = merge.held;
        merge.problems.sort_by(|a, b| a.location.cmp(&b.location));
        merge.problems
    }

    /// Adds the objects of a file that could be parsed.
    fn merge(&self, merge: &mut Merge, parsed: &Parsed) {
        merge.problems.extend(parsed.contents.problems.iter().cloned());
        for entry in &parsed.contents.objects {
            let place = &entry.place;
            if let Some(first) = merge.named.get(&entry.id) {
                let mut problem = Problem::error(
                    Reason::DuplicateObject,
                    entry.id.clone(),
                    "",
                    format!("the object stands at {first} already, which counts: remove one"),
                );
                problem.location = Some(place.start());
                merge.problems.push(problem);
                continue;
            }
            merge.named.insert(entry.id.clone(), place.start());
            let last_good = self.held.get(&entry.id);
            let consequence = match last_good {
                Some(_) => "; the version before stays in force",
                None => "; the object is refused",
            };
            merge.problems.extend(entry.problems.iter().cloned().map(|mut problem| {
                if problem.severity == Severity::Error {
                    problem.message.push_str(consequence);
                }
                problem
            }));
            // Unchanged objects stay the same allocation. The lines are those that the file has now in any case.
            let manifest = match (&entry.manifest, last_good.map(|last| &last.manifest)) {
                (Some(manifest), Some(last)) if last != manifest => Some(manifest),
                (_, Some(last)) => Some(last),
                (manifest, None) => manifest.as_ref(),
            };
            if let Some(manifest) = manifest.cloned() {
                merge.held.insert(entry.id.clone(), Held { manifest, place: Arc::clone(place) });
            }
        }
        if parsed.contents.is_broken {
            let count = self.keep(merge, &parsed.file);
            if count > 0 {
                let location = Some(Location { file: Arc::clone(&parsed.file), line: 0 });
                merge.problems.push(Problem {
                    severity: Severity::Warning,
                    reason: Reason::Malformed,
                    location,
                    object: None,
                    field: String::new(),
                    message: format!("a document has no name, so that nothing is taken away{}", kept(count)),
                });
            }
        }
    }

    /// Keeps all objects that came from a path and that no file before it names; returns their number.
    fn keep(&self, merge: &mut Merge, path: &Path) -> usize {
        let mut count = 0;
        for (id, held) in self.held.iter().filter(|(_, held)| held.place.file.starts_with(path)) {
            if !merge.named.contains_key(id) {
                merge.named.insert(id.clone(), held.place.start());
                merge.held.insert(id.clone(), held.clone());
                count += 1;
            }
        }
        count
    }

    fn loaded(&self, problems: Vec<Problem>) -> Loaded {
        let mut loaded = Loaded { problems, ..Loaded::default() };
        for (id, held) in &self.held {
            loaded.locations.insert(id.clone(), Arc::clone(&held.place));
            insert(&mut loaded.manifests, id, &held.manifest);
        }
        loaded
    }
}

fn parse(path: &Path, text: &str, before: Option<Parsed>) -> Parsed {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    let digest = (text.len(), hasher.finish());
    match before {
        Some(before) if before.digest == digest => before,
        _ => {
            let file = Arc::new(path.to_owned());
            let contents = document::read(text, &file);
            Parsed { file, digest, contents }
        }
    }
}

fn kept(count: usize) -> String {
    match count {
        0 => String::new(),
        1 => "; the object read from it before stays in force".to_owned(),
        _ => format!("; the {count} objects read from it before stay in force"),
    }
}

fn insert(manifests: &mut Manifests, id: &ObjectRef, manifest: &Manifest) {
    let name = || NamespacedName::new(&id.namespace, &id.name);
    match manifest {
        Manifest::GatewayClass(object) => {
            manifests.gateway_classes.insert(id.name.clone(), Arc::clone(object));
        }
        Manifest::Gateway(object) => {
            manifests.gateways.insert(name(), Arc::clone(object));
        }
        Manifest::TcpRoute(object) => {
            manifests.tcp_routes.insert(name(), Arc::clone(object));
        }
        Manifest::ReferenceGrant(object) => {
            manifests.reference_grants.insert(name(), Arc::clone(object));
        }
        Manifest::Namespace(object) => {
            manifests.namespaces.insert(id.name.clone(), Arc::clone(object));
        }
        Manifest::Service(object) => {
            manifests.services.insert(name(), Arc::clone(object));
        }
        Manifest::EndpointSlice(object) => {
            // One without the label has a warning that says that it is ignored.
            if let Some(service) = object.service_name() {
                let service = NamespacedName::new(&id.namespace, service);
                manifests
                    .endpoint_slices
                    .entry(service)
                    .or_default()
                    .insert(id.name.clone(), Arc::clone(object));
            }
        }
    }
}

#[cfg(test)]
mod tests;
