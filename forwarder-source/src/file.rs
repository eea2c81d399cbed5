//! Manifests from a file or folder, such that what worked keeps working.
//!
//! [`FileSource`] behaves as an API server would: an object whose document is refused stays as it was, and so does one of
//! which nothing can be said because its file is broken. Only an object that is certainly gone is taken away.

mod reload;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::document::{self, Contents};
use super::loaded::Loaded;
use super::locations::Place;
use super::refused;
use super::refused::Entry;
use super::scan::{self, Scan};
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{ObjectRef, Refused};
use forwarder_gateway::problem::{Location, Problem, Reason, Severity};

/// Reads manifests from a file or folder, and remembers the last good version of each object.
#[derive(Debug)]
pub struct FileSource {
    path: PathBuf,
    /// The objects in force.
    held: BTreeMap<ObjectRef, Held>,
    /// What was made of each file, so that only those that changed are parsed.
    files: BTreeMap<PathBuf, Parsed>,
    /// The objects that stand in more than one place.
    repeated: BTreeSet<ObjectRef>,
    /// What was found at the path last; `None` if nothing could be said of it.
    scanned: Option<Scan>,
    /// All of this, to be published.
    loaded: Loaded,
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
    /// The objects that were named again.
    repeated: BTreeSet<ObjectRef>,
    /// Those that are named and in force in no version.
    refused: BTreeMap<ObjectRef, Refused>,
    /// Where nothing can be read.
    unread: Vec<Location>,
    problems: Vec<Problem>,
}

impl FileSource {
    /// A source for `path`, of which nothing is read yet.
    ///
    /// A folder stands for the `*.yaml`, `*.yml` and `*.json` files in it and in its subfolders.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            held: BTreeMap::new(),
            files: BTreeMap::new(),
            repeated: BTreeSet::new(),
            scanned: None,
            loaded: Loaded::default(),
        }
    }

    /// A source for `path` that holds what was read from it before, as if it had read that itself.
    pub(super) fn resume(path: impl Into<PathBuf>, before: Loaded) -> Self {
        let held = before.manifests.each().filter_map(|(id, manifest)| {
            let place = Arc::clone(before.locations.place(&id)?);
            Some((id, Held { manifest, place }))
        });
        Self { held: held.collect(), loaded: before, ..Self::new(path) }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many objects are in force.
    pub(super) fn count(&self) -> usize {
        self.held.len()
    }

    /// Reads everything again. What cannot be read or used becomes a problem.
    pub fn load(&mut self) -> Loaded {
        self.load_scanned(scan::scan(&self.path))
    }

    /// Reads what a scan has found.
    pub(super) fn load_scanned(&mut self, scan: Result<Scan, Box<Problem>>) -> Loaded {
        let problems = match scan {
            Ok(scan) if scan.is_empty() && !self.held.is_empty() => {
                let problem = scan::emptied(&self.path, &kept(self.held.len()));
                self.scanned = Some(scan);
                vec![problem]
            }
            Ok(scan) => {
                let problems = self.load_files(&scan);
                self.scanned = Some(scan);
                problems
            }
            Err(mut problem) => {
                problem.message.push_str(&kept(self.held.len()));
                self.scanned = None;
                vec![*problem]
            }
        };
        if *self.loaded.problems != *problems {
            self.loaded.problems = problems.into();
        }
        self.loaded.clone()
    }

    /// What was found at the path when it was read last.
    pub(super) fn scanned(&self) -> Option<&Scan> {
        self.scanned.as_ref()
    }

    fn load_files(&mut self, scan: &Scan) -> Vec<Problem> {
        let mut merge = Merge { problems: scan.problems.clone(), ..Merge::default() };
        let mut before = std::mem::take(&mut self.files);
        let mut paths = scan.files.keys().chain(&scan.unknown).collect::<Vec<_>>();
        paths.sort();
        for path in paths {
            if scan.unknown.contains(path) {
                let count = self.keep(&mut merge, path);
                merge.unread.push(Location { file: Arc::new(path.clone()), line: 0 });
                let is_about = |it: &&mut Problem| it.location.as_ref().is_some_and(|it| *it.file == *path);
                merge.problems.iter_mut().filter(is_about).for_each(|it| it.message.push_str(&kept(count)));
                continue;
            }
            match scan::read(path) {
                Ok(text) => {
                    let parsed = Parsed::of(path, &text, before.remove(path));
                    self.merge(&mut merge, &parsed);
                    self.files.insert(path.clone(), parsed);
                }
                Err(mut problem) => {
                    let count = self.keep(&mut merge, path);
                    merge.unread.extend(problem.location.clone());
                    problem.message.push_str(&kept(count));
                    merge.problems.push(*problem);
                }
            }
        }
        self.repeated = merge.repeated;
        merge.refused.retain(|id, _| !merge.held.contains_key(id));
        let refused = merge.refused.into_iter().collect();
        if self.loaded.manifests.refused != refused {
            self.loaded.manifests.refused = refused;
        }
        if *self.loaded.manifests.unread != *merge.unread {
            self.loaded.manifests.unread = merge.unread.into();
        }
        // An empty folder says so itself.
        if merge.named.is_empty() && merge.problems.is_empty() {
            merge.problems.push(scan::no_object(&self.path));
        }
        self.hold(merge.held);
        merge.problems.sort_by(|a, b| a.location.cmp(&b.location));
        merge.problems
    }

    /// Adds the objects of a file that could be parsed.
    fn merge(&self, merge: &mut Merge, parsed: &Parsed) {
        merge.problems.extend(parsed.contents.problems.iter().cloned());
        merge.refused.extend(parsed.contents.misspelt.iter().cloned());
        for entry in &parsed.contents.objects {
            let place = &entry.place;
            if let Some(first) = merge.named.get(&entry.id) {
                let mut problem = Problem::error(
                    Reason::DuplicateObject,
                    entry.id.clone(),
                    "",
                    format!(
                        "there is an object of this name already at {first}: this one is ignored; remove it, or give it another name"
                    ),
                );
                problem.location = Some(place.start());
                merge.problems.push(problem);
                merge.repeated.insert(entry.id.clone());
                continue;
            }
            merge.named.insert(entry.id.clone(), place.start());
            match self.evaluate(entry, &mut merge.problems) {
                Some(held) => drop(merge.held.insert(entry.id.clone(), held)),
                None => drop(merge.refused.insert(entry.id.clone(), entry.refused())),
            }
        }
        let is_unread = |problem: &&Problem| problem.reason == Reason::Malformed;
        let unread = parsed.contents.problems.iter().filter(is_unread);
        merge.unread.extend(unread.filter_map(|problem| problem.location.clone()));
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
                    message: format!(
                        "a document is not recognised, so that nothing is taken away{}",
                        kept(count)
                    ),
                });
            }
        }
    }

    /// What is in force once an entry has been read, and what is wrong with it.
    fn evaluate(&self, entry: &Entry, problems: &mut Vec<Problem>) -> Option<Held> {
        let last_good = self.held.get(&entry.id);
        let now =
            entry.manifest.as_ref().map(|now| refused::merge(now, last_good.map(|last| &last.manifest)));
        problems.extend(entry.problems.iter().cloned().map(|mut problem| {
            if problem.severity == Severity::Error {
                problem.message.push_str(&match (&now, last_good) {
                    (Some(merged), _) => merged.consequence(&problem.field),
                    (None, Some(_)) => "; the version before stays in force".to_owned(),
                    (None, None) => "; the object is refused".to_owned(),
                });
            }
            problem
        }));
        let now = now.map(|merged| merged.manifest);
        // What is unchanged stays the same allocation. The lines are those that the file has now in any case.
        let manifest = match (&now, last_good.map(|last| &last.manifest)) {
            (Some(manifest), Some(last)) if last != manifest => Some(manifest),
            (_, Some(last)) => Some(last),
            (manifest, None) => manifest.as_ref(),
        };
        let place = last_good.map(|last| &last.place).filter(|last| **last == entry.place);
        Some(Held { manifest: manifest?.clone(), place: Arc::clone(place.unwrap_or(&entry.place)) })
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

    /// Replaces all objects in force.
    fn hold(&mut self, held: BTreeMap<ObjectRef, Held>) {
        let before = std::mem::replace(&mut self.held, held);
        for (id, old) in before.iter().filter(|(id, _)| !self.held.contains_key(*id)) {
            self.loaded.manifests.take(id, &old.manifest);
            self.loaded.locations.remove(id);
        }
        for (id, new) in &self.held {
            self.loaded.set(id, before.get(id), new);
        }
    }
}

impl Loaded {
    /// Writes down an object in force, in place of what was known of it before.
    fn set(&mut self, id: &ObjectRef, old: Option<&Held>, new: &Held) {
        if old.is_none_or(|old| old.place != new.place) {
            self.locations.insert(id.clone(), Arc::clone(&new.place));
        }
        if old.is_none_or(|old| old.manifest != new.manifest) {
            if let Some(old) = old {
                // An EndpointSlice may belong to another Service than before.
                self.manifests.take(id, &old.manifest);
            }
            self.manifests.put(id, &new.manifest);
        }
    }
}

impl Parsed {
    /// What is made of a text: what was made of it `before`, if that was the same.
    fn of(path: &Path, text: &str, before: Option<Self>) -> Self {
        let digest = digest(text);
        before.filter(|before| before.digest == digest).unwrap_or_else(|| Self::new(path, text, digest))
    }

    fn new(path: &Path, text: &str, digest: (usize, u64)) -> Self {
        let file = Arc::new(path.to_owned());
        let contents = document::read(text, &file);
        Self { file, digest, contents }
    }
}

fn digest(text: &str) -> (usize, u64) {
    let mut hasher = DefaultHasher::new();
    hasher.write(text.as_bytes());
    (text.len(), hasher.finish())
}

fn kept(count: usize) -> String {
    match count {
        0 => String::new(),
        1 => "; the object read from it before stays in force".to_owned(),
        _ => format!("; the {count} objects read from it before stay in force"),
    }
}

#[cfg(test)]
mod tests;
