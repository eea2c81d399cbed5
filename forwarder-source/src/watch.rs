//! Follows the changes of a file or folder.

mod notices;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout, timeout_at};

use self::notices::{Notices, Told};
use super::file::FileSource;
use super::loaded::Loaded;
use super::scan;
use super::state::{self, StateFile};
use forwarder_runtime::{failpoint, panics};

/// When a change is acted upon.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// Where writers are done, and nothing but the contents of known files has changed.
    settled: Settling,
    /// Where a writer may not be done, or files come and go: these often do so together.
    open: Settling,
    /// How often files are looked at even without an event: networked file systems have none.
    poll: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Settling {
    /// Files are read when nothing has changed for so long.
    quiet: Duration,
    /// But at the latest so long after the first change.
    patience: Duration,
}

const PACE: Pace = Pace {
    settled: Settling { quiet: Duration::from_millis(5), patience: Duration::from_millis(100) },
    open: Settling { quiet: Duration::from_millis(100), patience: Duration::from_secs(1) },
    poll: Duration::from_secs(5),
};

/// What has to be read.
enum Changed {
    Everything,
    /// Nothing but what stands at these paths.
    At(BTreeSet<PathBuf>),
}

/// Publishes what `source` reads, at first and whenever it differs from what was published before, until nobody listens
/// any more. Files are read on the runtime's threads for blocking work.
///
/// Everything is read again, too, whenever `again` is notified.
///
/// With `state_dir`, the last good version of each object is kept there, and what a former agent has kept is held from the start.
pub async fn watch(
    path: PathBuf,
    state_dir: Option<PathBuf>,
    updates: watch::Sender<Arc<Loaded>>,
    again: Arc<Notify>,
) {
    let (kept, to_keep) = watch::channel(None);
    let source = match state_dir {
        None => FileSource::new(path),
        Some(folder) => {
            let file = StateFile::OfFiles { folder, manifests: path.clone() };
            let (source, is_refused) = resume(path, &file).await;
            tokio::spawn(state::keep(file, is_refused, to_keep));
            source
        }
    };
    watch_at(PACE, source, updates, &again, kept).await;
}

/// A source that holds what a former agent has kept, and whether that was refused.
async fn resume(path: PathBuf, file: &StateFile) -> (FileSource, bool) {
    match file.read().await {
        Ok(Some(before)) => {
            let source = FileSource::resume(path, before);
            tracing::info!(
                state = %file.path().display(),
                objects = source.count(),
                "found the kept state: an object with an error is served in its last good version"
            );
            (source, false)
        }
        Ok(None) => (FileSource::new(path), false),
        Err(error) => {
            tracing::warn!(
                %error,
                "cannot use the kept state: an object whose manifest has an error now is not served; correct the manifest"
            );
            (FileSource::new(path), true)
        }
    }
}

async fn watch_at(
    pace: Pace,
    mut source: FileSource,
    updates: watch::Sender<Arc<Loaded>>,
    again: &Notify,
    kept: watch::Sender<Option<Arc<Loaded>>>,
) {
    let notices = Arc::new(Notices::default());
    let mut watcher = None;
    let mut what = Changed::Everything;
    loop {
        let notices_of_load = Arc::clone(&notices);
        let path = source.path().to_owned();
        let loading = panics::survived(move || {
            let (loaded, watcher) = load(&mut source, what, watcher, &notices_of_load);
            (source, loaded, watcher)
        });
        if let Ok((returned, loaded, following)) = loading.await {
            (source, watcher) = (returned, following);
            updates.send_if_modified(|current| {
                let is_new = **current != loaded;
                if is_new {
                    *current = Arc::new(loaded);
                }
                is_new
            });
            // A file that is spoilt from now on must not take away what it said.
            kept.send_replace(Some(Arc::clone(&updates.borrow())));
        } else {
            tracing::error!(
                manifests = %path.display(),
                "BUG: the agent cannot read the manifests: the former configuration stays in force; trying again; please report it with the manifests"
            );
            (source, watcher) = (FileSource::resume(&path, Loaded::clone(&updates.borrow())), None);
        }
        what = tokio::select! {
            what = changed(pace, &source, &notices) => what,
            () = again.notified() => Changed::Everything,
            () = updates.closed() => return,
        };
    }
}

/// Loads with a watcher already in place, so that no change is lost between the two: the former one, where it will do.
fn load(
    source: &mut FileSource,
    what: Changed,
    former: Option<RecommendedWatcher>,
    notices: &Arc<Notices>,
) -> (Loaded, Option<RecommendedWatcher>) {
    failpoint::block("source.load");
    if let Changed::At(paths) = what
        && let Some(loaded) = source.reload(&paths)
    {
        return (loaded, former);
    }
    drop(former);
    // Events name what was watched and the name in it: both have to be of one form.
    let path = std::path::absolute(source.path()).unwrap_or_else(|_| source.path().to_owned());
    let mut watcher = watcher(&path, source.path(), notices);
    if let Some(watcher) = &mut watcher {
        // The folder around it sees it being removed, created or replaced.
        if let Some(parent) = path.parent() {
            add(watcher, parent);
        }
        add(watcher, &path);
        for folder in scan::scan(&path).map(|scan| scan.folders).unwrap_or_default().keys() {
            add(watcher, folder);
        }
    }
    // What was told so far will be read.
    notices.take();
    // Only now, for a subfolder may have changed before it was watched.
    let loaded = source.load_scanned(scan::scan(source.path()));
    (loaded, watcher)
}

fn watcher(path: &Path, source_path: &Path, notices: &Arc<Notices>) -> Option<RecommendedWatcher> {
    let (path, source_path, notices) = (path.to_owned(), source_path.to_owned(), Arc::clone(notices));
    let watcher = notify::recommended_watcher(move |event| notices.tell(&path, &source_path, event));
    watcher
        .inspect_err(
            |error| tracing::warn!(%error, "cannot watch files: changes are noticed by polling only"),
        )
        .ok()
}

fn add(watcher: &mut RecommendedWatcher, folder: &Path) {
    if let Err(error) = watcher.watch(folder, RecursiveMode::NonRecursive) {
        tracing::debug!(path = %folder.display(), %error, "cannot watch a folder: changes are noticed by polling only");
    }
}

/// Waits until something has changed, and then until it is quiet.
async fn changed(pace: Pace, source: &FileSource, notices: &Notices) -> Changed {
    let mut is_beyond = false;
    while !is_beyond && timeout(pace.poll, notices.arrived()).await.is_err() {
        let path = source.path().to_owned();
        let now = panics::survived(move || scan::scan(&path).ok());
        is_beyond = now.await.is_ok_and(|now| now.as_ref() != source.scanned());
    }
    let first = Instant::now();
    let is_inner = |path: &Path| source.scanned().is_some_and(|it| it.is_inner(source.path(), path));
    let (mut paths, mut open) = (BTreeSet::new(), BTreeSet::new());
    loop {
        let news = notices.take();
        is_beyond |= news.is_beyond;
        for (path, told) in news.paths {
            match told {
                Told::Whole if is_inner(&path) => drop(open.remove(&path)),
                // What comes or goes often does not do so alone, however fast it is done.
                Told::Whole | Told::Open => drop(open.insert(path.clone())),
                Told::Besides => {}
            }
            paths.insert(path);
        }
        let settling = if is_beyond || !open.is_empty() { pace.open } else { pace.settled };
        let latest = (first + settling.patience).min(Instant::now() + settling.quiet);
        if timeout_at(latest, notices.arrived()).await.is_err() {
            break;
        }
    }
    if is_beyond || paths.len() > notices::TOO_MANY { Changed::Everything } else { Changed::At(paths) }
}

#[cfg(test)]
mod tests;
