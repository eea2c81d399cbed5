//! The short way for the usual change: a file that was read already has other contents, with the same objects in it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{FileSource, Loaded, Parsed, digest};
use crate::scan::{self, Stamp};
use forwarder_gateway::problem::Problem;

impl FileSource {
    /// Reads only what has changed at `paths`, if that comes to the same as to read everything: that is, where each is a
    /// file that was read before, in which no object comes or goes or moves, or something that is no manifest. `None`
    /// where it does not, and then nothing is done.
    ///
    /// Work is proportional to the contents of these files, apart from a change of what is wrong with them.
    pub(crate) fn reload(&mut self, paths: &BTreeSet<PathBuf>) -> Option<Loaded> {
        let scanned = self.scanned.as_ref()?;
        // That there is nothing is said of all files together.
        if self.held.is_empty() {
            return None;
        }
        let mut read = Vec::new();
        for path in paths {
            if scanned.is_unaffected_by(&self.path, path) {
                continue;
            }
            if !scanned.files.contains_key(path) {
                return None;
            }
            let before = self.files.get(path)?;
            // The stamp is older than what is read, so that the next look notices a change in between.
            let stamp = Stamp::of_plain_file(path)?;
            let text = scan::read(path).ok()?;
            let digest = digest(&text);
            let parsed = (digest != before.digest).then(|| Parsed::new(path, &text, digest));
            if parsed.as_ref().is_some_and(|parsed| !self.is_same_but_for_contents(before, parsed)) {
                return None;
            }
            read.push((path, stamp, parsed));
        }
        for (path, stamp, parsed) in read {
            if let Some(scanned) = &mut self.scanned {
                scanned.files.insert(path.clone(), stamp);
            }
            if let Some(parsed) = parsed {
                self.replace(path, parsed);
            }
        }
        Some(self.loaded.clone())
    }

    /// Whether two versions of a file name the same objects, of which each is in force by this file and stands nowhere
    /// else: then no other file is concerned.
    fn is_same_but_for_contents(&self, before: &Parsed, now: &Parsed) -> bool {
        if before.contents.is_broken || now.contents.is_broken {
            return false;
        }
        let (old, new) = (&before.contents.objects, &now.contents.objects);
        let named: BTreeSet<_> = new.iter().map(|entry| &entry.id).collect();
        old.len() == new.len()
            && named.len() == new.len()
            && old.iter().all(|entry| named.contains(&entry.id))
            && named.iter().all(|id| {
                let is_from_here = self.held.get(id).is_some_and(|held| held.place.file == now.file);
                is_from_here && !self.repeated.contains(id)
            })
    }

    fn replace(&mut self, path: &Path, parsed: Parsed) {
        let mut problems = parsed.contents.problems.clone();
        for entry in &parsed.contents.objects {
            let Some(new) = self.evaluate(entry, &mut problems) else { continue };
            self.loaded.set(&entry.id, self.held.get(&entry.id), &new);
            self.held.insert(entry.id.clone(), new);
        }
        problems.sort_by(|a, b| a.location.cmp(&b.location));
        self.loaded.replace_problems(path, problems);
        self.files.insert(path.to_owned(), parsed);
    }
}

impl Loaded {
    /// Replaces the problems of a file; the others stand in the order of their files.
    fn replace_problems(&mut self, path: &Path, problems: Vec<Problem>) {
        let file = |it: &Problem| it.location.as_ref().map(|location| Arc::clone(&location.file));
        let is_before = |it: &Problem| file(it).is_none_or(|file| file.as_path() < path);
        let is_of_path = |it: &Problem| file(it).is_some_and(|file| file.as_path() == path);
        let (before, rest) = self.problems.split_at(self.problems.partition_point(is_before));
        let (own, after) = rest.split_at(rest.partition_point(is_of_path));
        if own != problems {
            self.problems = before.iter().chain(&problems).chain(after).cloned().collect();
        }
    }
}

#[cfg(test)]
mod tests;
