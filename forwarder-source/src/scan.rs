//! Finds the manifest files of a path, and reads them without trusting what they are.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use forwarder_gateway::problem::{Location, Problem, Reason, Severity};

/// A larger file is refused: it is hardly a manifest.
const LARGEST_FILE: u64 = 32 << 20;

/// Folders in folders are read down to this depth.
const DEEPEST: usize = 8;

/// What was found at a path. It differs from another whenever a file or folder does, as far as their metadata tell.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Scan {
    /// The files to read.
    pub(super) files: BTreeMap<PathBuf, Stamp>,
    /// The folders that were listed, by device and inode.
    pub(super) folders: BTreeMap<PathBuf, (u64, u64)>,
    /// The folders and files that could not be looked at: what they held is unknown.
    pub(super) unknown: BTreeSet<PathBuf>,
    /// What is wrong.
    pub(super) problems: Vec<Problem>,
    /// Whether something in there can change under another name than its own, because there are links.
    pub(super) has_links: bool,
}

/// What tells a version of a file from another without reading it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// That of a regular file with one name only; `None` for anything else.
    pub(super) fn of_plain_file(path: &Path) -> Option<Self> {
        let metadata = fs::symlink_metadata(path).ok()?;
        (metadata.is_file() && metadata.nlink() == 1).then(|| Self::of(&metadata))
    }
}

/// Lists the manifests at `path`: itself if it is no folder, else the YAML and JSON files in it and its subfolders.
///
/// Fails where nothing can be said about the path as a whole.
pub(super) fn scan(path: &Path) -> Result<Scan, Box<Problem>> {
    let metadata = fs::metadata(path).map_err(|error| Box::new(unreadable(path, cannot("read", &error))))?;
    let mut scan = Scan::default();
    if metadata.is_dir() {
        scan.folder(path, &metadata, &mut Vec::new())
            .map_err(|error| Box::new(unreadable(path, cannot("list the folder", &error))))?;
        if scan.is_empty() {
            let message =
                "the folder holds no *.yaml, *.yml or *.json file: there is nothing to serve".to_owned();
            scan.problem(Severity::Warning, path, message);
        }
    } else {
        scan.has_links = metadata.nlink() > 1 || fs::symlink_metadata(path).is_ok_and(|it| it.is_symlink());
        scan.files.insert(path.to_owned(), Stamp::of(&metadata));
    }
    Ok(scan)
}

/// What is said of a folder that had manifests, and has none any more; `kept` says what stays in force.
///
/// So is a folder while it is filled by a tool that empties it before.
pub(super) fn emptied(path: &Path, kept: &str) -> Problem {
    let message = format!(
        "the folder holds no *.yaml, *.yml or *.json file any more{kept}; to remove everything, leave one such file that holds nothing but a \
         comment"
    );
    unreadable(path, message)
}

/// What is said of manifests in which there is none.
pub(super) fn no_object(path: &Path) -> Problem {
    let message = "holds no object: there is nothing to serve".to_owned();
    Problem { severity: Severity::Warning, ..unreadable(path, message) }
}

impl Scan {
    /// Whether there is nothing to read.
    pub(super) fn is_empty(&self) -> bool {
        self.files.is_empty() && self.unknown.is_empty()
    }

    /// Whether nothing that was read, or would be now, depends on what stands at `path`, which is below the path that was
    /// scanned. Not for the files and folders that were found.
    pub(super) fn is_unaffected_by(&self, root: &Path, path: &Path) -> bool {
        let is_found = self.files.contains_key(path)
            || self.folders.contains_key(path)
            || self.unknown.contains(path)
            || path == root;
        if self.has_links || is_found {
            return false;
        }
        is_below_hidden(root, path)
            || match fs::symlink_metadata(path) {
                Ok(metadata) => metadata.is_file() && !is_manifest(path),
                Err(error) => error.kind() == io::ErrorKind::NotFound,
            }
    }

    /// Whether it may be that only the contents of files that are known changed, if something did at `path`; by its name
    /// alone.
    pub(super) fn is_inner(&self, root: &Path, path: &Path) -> bool {
        self.files.contains_key(path)
            || (!self.has_links
                && path != root
                && !self.folders.contains_key(path)
                && (is_below_hidden(root, path) || !is_manifest(path)))
    }

    fn folder(&mut self, path: &Path, metadata: &Metadata, above: &mut Vec<(u64, u64)>) -> io::Result<()> {
        // One that vanishes while it is listed counts as unreadable, for an entry might be missed.
        let mut entries = BTreeSet::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            self.has_links |= entry.file_type().map_or(true, |kind| kind.is_symlink());
            entries.insert(entry.file_name());
        }
        self.folders.insert(path.to_owned(), (metadata.dev(), metadata.ino()));
        above.push((metadata.dev(), metadata.ino()));
        for name in entries {
            // Kubernetes keeps the versions of a mounted ConfigMap in folders such as `..data`.
            if !is_hidden(&name) {
                self.entry(&path.join(&name), above);
            }
        }
        above.pop();
        Ok(())
    }

    fn entry(&mut self, path: &Path, above: &mut Vec<(u64, u64)>) {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                if above.contains(&(metadata.dev(), metadata.ino())) {
                    self.problem(
                        Severity::Error,
                        path,
                        "the link leads back to a folder that it is in: remove it".into(),
                    );
                } else if above.len() > DEEPEST {
                    let message = format!("is deeper than {DEEPEST} folders and is not read");
                    self.problem(Severity::Warning, path, message);
                } else if let Err(error) = self.folder(path, &metadata, above) {
                    self.unknown.insert(path.to_owned());
                    self.problem(Severity::Error, path, cannot("list the folder", &error));
                }
            }
            Ok(metadata) if is_manifest(path) => {
                self.has_links |= metadata.nlink() > 1;
                self.files.insert(path.to_owned(), Stamp::of(&metadata));
            }
            Err(error) if is_manifest(path) || error.kind() != io::ErrorKind::NotFound => {
                // A file may have been removed since the folder was listed: then there is nothing to say.
                if fs::symlink_metadata(path).is_ok() {
                    self.unknown.insert(path.to_owned());
                    self.problem(Severity::Error, path, cannot("read", &error));
                }
            }
            Ok(_) | Err(_) => {}
        }
    }

    fn problem(&mut self, severity: Severity, path: &Path, message: String) {
        self.problems.push(Problem { severity, ..unreadable(path, message) });
    }
}

/// The text of a file.
pub(super) fn read(path: &Path) -> Result<String, Box<Problem>> {
    let text = read_bytes(path).map_err(|message| Box::new(unreadable(path, message)))?;
    String::from_utf8(text).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        let bytes = error.as_bytes();
        let lines = bytes.get(..valid).unwrap_or_default().split(|byte| *byte == b'\n').count();
        let line = u32::try_from(lines).unwrap_or(u32::MAX);
        let message = if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
            "the file is UTF-16: save it as UTF-8".to_owned()
        } else {
            format!("the file is not UTF-8: invalid byte at offset {valid}")
        };
        let location = Some(Location { file: Arc::new(path.to_owned()), line });
        Box::new(Problem { location, reason: Reason::Malformed, ..unreadable(path, message) })
    })
}

fn read_bytes(path: &Path) -> Result<Vec<u8>, String> {
    // Opening a device may do something: look before.
    refuse(&fs::metadata(path).map_err(|error| cannot("read", &error))?)?;
    // It may have become a pipe by now, the opening of which would block.
    let flags = OFlags::NONBLOCK.union(OFlags::CLOEXEC).union(OFlags::NOCTTY).bits().cast_signed();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(|error| cannot("open", &error))?;
    let metadata = file.metadata().map_err(|error| cannot("read", &error))?;
    refuse(&metadata)?;
    read_up_to(&file, metadata.len())
}

fn refuse(metadata: &Metadata) -> Result<(), String> {
    if !metadata.is_file() {
        return Err("is neither a file nor a folder: pipes, sockets and devices are not read".to_owned());
    }
    if metadata.len() > LARGEST_FILE {
        return Err(too_large(&format!("{} MiB", metadata.len() >> 20)));
    }
    Ok(())
}

fn read_up_to(file: &File, size: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::with_capacity(usize::try_from(size.min(LARGEST_FILE)).unwrap_or(0));
    // The size may be untrue, as it is in /proc, or out of date.
    file.take(LARGEST_FILE + 1).read_to_end(&mut bytes).map_err(|error| cannot("read", &error))?;
    if bytes.len() as u64 > LARGEST_FILE {
        return Err(too_large("more than it said"));
    }
    Ok(bytes)
}

fn too_large(size: &str) -> String {
    format!("the file is too large ({size}): at most {} MiB are read", LARGEST_FILE >> 20)
}

fn is_hidden(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".")
}

fn is_below_hidden(root: &Path, path: &Path) -> bool {
    path.strip_prefix(root).is_ok_and(|inner| inner.iter().any(is_hidden))
}

fn is_manifest(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|it| matches!(it, "yaml" | "yml" | "json"))
}

fn cannot(what: &str, error: &io::Error) -> String {
    format!("cannot {what}: {error}")
}

fn unreadable(path: &Path, message: String) -> Problem {
    Problem {
        severity: Severity::Error,
        reason: Reason::Unreadable,
        location: Some(Location { file: Arc::new(path.to_owned()), line: 0 }),
        object: None,
        field: String::new(),
        message,
    }
}
