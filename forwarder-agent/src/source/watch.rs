//! Follows the changes of a file or folder.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout, timeout_at};

use super::file::{FileSource, Loaded};
use super::scan::{self, Stamp};
use crate::problem::Problem;

/// When a change is acted upon.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Files are read when nothing has changed for so long: a writer may not be done.
    quiet: Duration,
    /// But at the latest so long after the first change.
    patience: Duration,
    /// How often files are looked at even without an event: networked file systems have none.
    poll: Duration,
}

const PACE: Pace = Pace {
    quiet: Duration::from_millis(100),
    patience: Duration::from_secs(1),
    poll: Duration::from_secs(5),
};

/// What tells that something has changed since the last load.
type Fingerprint = Vec<(PathBuf, Stamp)>;

/// Publishes what `source` reads, at first and whenever it differs from what was published before, until nobody listens
/// any more. Files are read on the runtime's threads for blocking work.
pub async fn watch(source: FileSource, updates: watch::Sender<Arc<Loaded>>) {
    watch_at(PACE, source, updates).await;
}

async fn watch_at(pace: Pace, mut source: FileSource, updates: watch::Sender<Arc<Loaded>>) {
    // The capacity is one, for it does not matter how much has changed.
    let (notice, mut notices) = mpsc::channel(1);
    loop {
        let sender = notice.clone();
        let loading = tokio::task::spawn_blocking(move || {
            let result = load(&mut source, sender);
            (source, result)
        });
        // A panic in there is a bug; the last configuration stays in force rather than the process ending.
        let Ok((returned, (loaded, fingerprint, watcher))) = loading.await else {
            tracing::error!("reading the manifests panicked: changes are not followed any more");
            return updates.closed().await;
        };
        source = returned;
        updates.send_if_modified(|current| {
            let is_new = **current != loaded;
            if is_new {
                *current = Arc::new(loaded);
            }
            is_new
        });
        tokio::select! {
            () = changed(pace, source.path(), fingerprint.as_ref(), &mut notices) => {}
            () = updates.closed() => return,
        }
        // Only now, when the next load will watch the folders that are there by then.
        drop(watcher);
    }
}

/// Loads with a watcher already in place, so that no change is lost between the two.
fn load(
    source: &mut FileSource,
    sender: mpsc::Sender<()>,
) -> (Loaded, Option<Fingerprint>, Option<RecommendedWatcher>) {
    // Events name what was watched and the name in it: both have to be of one form.
    let path = std::path::absolute(source.path()).unwrap_or_else(|_| source.path().to_owned());
    let mut watcher = watcher(&path, sender);
    if let Some(watcher) = &mut watcher {
        // The folder around it sees it being removed, created or replaced.
        if let Some(parent) = path.parent() {
            add(watcher, parent);
        }
        add(watcher, &path);
        for folder in scan::scan(&path).map(|scan| scan.folders).unwrap_or_default() {
            add(watcher, &folder);
        }
    }
    // Only now, for a subfolder may have changed before it was watched.
    let (loaded, fingerprint) = source.load_scanned(scan::scan(source.path()));
    (loaded, fingerprint, watcher)
}

fn watcher(path: &Path, sender: mpsc::Sender<()>) -> Option<RecommendedWatcher> {
    let path = path.to_owned();
    let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        if event.map_or(true, |event| is_change(&path, &event)) {
            // A full channel has a notice already.
            let _ = sender.try_send(());
        }
    });
    watcher
        .inspect_err(
            |error| tracing::warn!(%error, "cannot watch files: changes are noticed by looking only"),
        )
        .ok()
}

fn is_change(path: &Path, event: &notify::Event) -> bool {
    let is_written = match event.kind {
        EventKind::Access(AccessKind::Close(AccessMode::Write))
        | EventKind::Any
        | EventKind::Create(_)
        | EventKind::Modify(_)
        | EventKind::Remove(_)
        | EventKind::Other => true,
        // Our own reading would be a reason to read again.
        EventKind::Access(_) => false,
    };
    // The folder around the path may be a busy one. A file of a ConfigMap is a link through `..data`.
    let is_near = |it: &PathBuf| {
        it.starts_with(path) || path.starts_with(it) || it.file_name().is_some_and(|name| name == "..data")
    };
    is_written && (event.paths.is_empty() || event.paths.iter().any(is_near))
}

fn add(watcher: &mut RecommendedWatcher, folder: &Path) {
    if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
        tracing::debug!(path = %folder.display(), %error, "cannot watch: changes are noticed by looking only");
    }
}

/// Waits until something has changed, and then until it is quiet.
async fn changed(pace: Pace, path: &Path, before: Option<&Fingerprint>, notices: &mut mpsc::Receiver<()>) {
    while timeout(pace.poll, notices.recv()).await.is_err() {
        let path = path.to_owned();
        let now = tokio::task::spawn_blocking(move || fingerprint(scan::scan(&path)));
        if now.await.is_ok_and(|now| now.as_ref() != before) {
            break;
        }
    }
    let latest = Instant::now() + pace.patience;
    while timeout_at(latest.min(Instant::now() + pace.quiet), notices.recv()).await.is_ok() {}
}

fn fingerprint(scan: Result<scan::Scan, Box<Problem>>) -> Option<Fingerprint> {
    scan.ok().map(|scan| scan.fingerprint)
}

#[cfg(test)]
mod tests;
