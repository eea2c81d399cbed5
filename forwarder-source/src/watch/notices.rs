//! What events tell of the files, gathered until somebody takes it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use forwarder_runtime::lock::lock;
use notify::EventKind;
use notify::event::{AccessKind, AccessMode, ModifyKind, RenameMode};
use tokio::sync::Notify;

/// So many paths are not told apart any more.
pub(super) const TOO_MANY: usize = 1000;

/// What has changed since it was taken last.
#[derive(Debug, Default)]
pub(super) struct Notices {
    noticed: Mutex<Noticed>,
    notify: Notify,
}

/// What events told.
#[derive(Debug, Default)]
pub(super) struct Noticed {
    /// What was named, below the source's path and in its terms, and what was said of it last.
    pub(super) paths: BTreeMap<PathBuf, Told>,
    /// Whether anything may have changed besides.
    pub(super) is_beyond: bool,
}

/// What an event says of a path.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Told {
    /// Its writer has closed it or moved it into place.
    Whole,
    /// It was written to, and its writer may not be done; or it came or went.
    Open,
    /// Something that has nothing to do with its contents.
    Besides,
}

impl Notices {
    /// Takes what was told.
    pub(super) fn take(&self) -> Noticed {
        std::mem::take(&mut *self.lock())
    }

    /// Waits until something is told.
    pub(super) async fn arrived(&self) {
        self.notify.notified().await;
    }

    /// Notes an event. `path` is what is watched, as events name it; `source_path` is the same as the source names it.
    pub(super) fn tell(&self, path: &Path, source_path: &Path, event: notify::Result<notify::Event>) {
        let mut noticed = self.lock();
        match event {
            Ok(event) => {
                let Some(told) = told(event.kind) else { return };
                if !noticed.note(path, source_path, &event, told) {
                    return;
                }
            }
            Err(_) => noticed.is_beyond = true,
        }
        drop(noticed);
        self.notify.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Noticed> {
        lock(&self.noticed)
    }
}

impl Noticed {
    /// Tells whether the event says anything.
    fn note(&mut self, path: &Path, source_path: &Path, event: &notify::Event, told: Told) -> bool {
        let mut is_near = event.paths.is_empty() || event.need_rescan();
        self.is_beyond |= is_near;
        for one in &event.paths {
            if let Ok(inner) = one.strip_prefix(path) {
                // To join nothing would add a slash.
                let is_itself = inner.as_os_str().is_empty();
                let inner = if is_itself { source_path.to_owned() } else { source_path.join(inner) };
                let last = self.paths.entry(inner).or_insert(told);
                if told != Told::Besides {
                    *last = told;
                }
            } else if path.starts_with(one) || one.file_name().is_some_and(|name| name == "..data") {
                // The folder around the path may be a busy one. A file of a ConfigMap is a link through `..data`.
                self.is_beyond = true;
            } else {
                continue;
            }
            is_near = true;
        }
        if self.paths.len() > TOO_MANY {
            self.is_beyond = true;
            self.paths.clear();
        }
        is_near
    }
}

/// What an event says; `None` for what changes nothing.
fn told(kind: EventKind) -> Option<Told> {
    match kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write))
        | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both)) => Some(Told::Whole),
        EventKind::Modify(ModifyKind::Metadata(_)) => Some(Told::Besides),
        EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => Some(Told::Open),
        // Our own reading would be a reason to read again.
        EventKind::Access(_) => None,
    }
}
