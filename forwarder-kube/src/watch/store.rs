//! What the watches have told so far, as one set of manifests.
//!
//! Nothing in here waits or asks: messages go in, and what is to be published comes out. An object that cannot be read
//! stays as it was. A list that is told anew takes away what it does not name once it is complete, so that nothing
//! flaps meanwhile. What an API server does not tell any more, because it is away, stays in force.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::kinds::{GATEWAY_KINDS, Served, kind_of_crd, plural};
use super::records::{ObservedObjects, has_status};
use super::reflector::{Item, Message, News, Scope, WatchFailure};
use forwarder_gateway::manifests::Manifest;
use forwarder_gateway::manifests::{ApiRelease, Kind, ObjectRef};
use forwarder_gateway::problem::{Problem, Reason, Severity};
use forwarder_source::loaded::Loaded;

/// What has been told, and by which watches.
#[derive(Default)]
pub(super) struct Store {
    loaded: Loaded,
    records: ObservedObjects,
    held: HashMap<ObjectRef, Manifest>,
    /// Objects that cannot be read, and why.
    unreadable: BTreeMap<ObjectRef, String>,
    scopes: BTreeMap<Scope, Progress>,
    /// The bundle version of each CRD of the Gateway API; `None` where it does not tell.
    releases: BTreeMap<String, Option<String>>,
}

/// How far the watch of a scope has come.
#[derive(Debug, Default)]
struct Progress {
    epoch: u64,
    /// Whether all objects have been told once.
    is_complete: bool,
    /// The objects of the list that is being told.
    listed: Option<HashSet<ObjectRef>>,
    /// Why it does not go on.
    failure: Option<(WatchFailure, Instant)>,
}

impl Store {
    /// Expects news of a scope from a new watch, and from no former one.
    pub(super) fn begin(&mut self, scope: Scope, epoch: u64) {
        let progress = self.scopes.entry(scope).or_default();
        progress.epoch = epoch;
        progress.listed = None;
        progress.failure = None;
    }

    /// Expects no more news of a scope. What was told of it stays.
    pub(super) fn end(&mut self, scope: &Scope) {
        self.scopes.remove(scope);
    }

    /// Takes in what a watch tells. Yields whether that changes anything to be published.
    pub(super) fn take_in(&mut self, message: Message) -> bool {
        let Message { scope, epoch, news } = message;
        let Some(progress) = self.scopes.get_mut(&scope).filter(|progress| progress.epoch == epoch) else {
            return false;
        };
        let had_failed = match &news {
            News::Failed(_) => false,
            // The first answer after a failure may be the beginning of a list that fails, too.
            News::ListBegins => progress.failure.is_some() && progress.is_complete,
            News::Put(_) | News::Gone(_) | News::ListEnds => progress.failure.take().is_some(),
        };
        match news {
            News::ListBegins => progress.listed = Some(HashSet::new()),
            News::Put(item) => {
                if let Some(listed) = &mut progress.listed {
                    listed.insert(item.id.clone());
                }
                self.put(scope.kind, *item);
            }
            News::Gone(id) => self.remove(&id),
            News::ListEnds => {
                progress.is_complete = true;
                if let Some(listed) = progress.listed.take() {
                    self.remove_others(&scope, &listed);
                }
            }
            // What was remembered is too old, which happens in every cluster: everything is listed again.
            News::Failed(failure) if failure.code == Some(410) => return false,
            News::Failed(failure) => {
                let is_new = progress.failure.as_ref().is_none_or(|(before, _)| *before != failure);
                progress.failure = Some((failure, Instant::now()));
                return is_new;
            }
        }
        if had_failed {
            tracing::info!(kind = %scope.kind, "the Kubernetes API answers again");
        }
        true
    }

    /// Writes down in which version each kind is served.
    pub(super) fn set_served(&mut self, served: &Arc<Served>) {
        self.records.served = Arc::clone(served);
    }

    /// Writes down the release that a CRD is of, if it tells.
    pub(super) fn set_release(&mut self, crd: &str, release: Option<String>) {
        self.releases.insert(crd.to_owned(), release);
    }

    /// Forgets a CRD that is gone.
    pub(super) fn forget_release(&mut self, crd: &str) {
        self.releases.remove(crd);
    }

    /// These are all CRDs of the Gateway API: others are gone.
    pub(super) fn retain_releases(&mut self, named: &BTreeSet<String>) {
        self.releases.retain(|crd, _| named.contains(crd));
    }

    /// Writes down at which addresses the agents of this installation listen. Yields whether they are others than before.
    pub(super) fn set_node_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let known = &mut self.loaded.manifests.node_addresses;
        let is_new = **known != addresses;
        if is_new {
            *known = Arc::new(addresses);
        }
        is_new
    }

    /// Whether the CRD of a kind is there.
    pub(super) fn has_crd(&self, kind: Kind) -> bool {
        self.releases.keys().any(|crd| kind_of_crd(crd) == Some(kind))
    }

    /// Removes every object of a kind of which there can be none any more, whether a watch has told so or not. Yields
    /// whether there was one.
    pub(super) fn remove_kind(&mut self, kind: Kind) -> bool {
        let before = self.held.len() + self.unreadable.len();
        self.remove_others(&Scope { kind, namespace: None }, &HashSet::new());
        before != self.held.len() + self.unreadable.len()
    }

    /// Whether all objects of every scope are known; or, with `or_refused`, whether the API server will not tell of the
    /// rest. One that cannot answer for a while has refused nothing.
    pub(super) fn is_complete(&self, or_refused: bool) -> bool {
        self.scopes.values().all(|progress| {
            let is_refusal = |(failure, _): &(WatchFailure, Instant)| matches!(failure.code, Some(403 | 404));
            progress.is_complete || (or_refused && progress.failure.as_ref().is_some_and(is_refusal))
        })
    }

    /// Drops failures that have not come again for so long: a watch that goes on says nothing where nothing changes.
    /// Yields whether there was one.
    pub(super) fn forgive(&mut self, after: Duration) -> bool {
        let is_over = |progress: &&mut Progress| {
            progress.is_complete && progress.failure.as_ref().is_some_and(|(_, at)| at.elapsed() > after)
        };
        self.scopes.values_mut().filter(is_over).map(|progress| progress.failure = None).count() > 0
    }

    /// What the API server holds of the objects that carry a status.
    pub(super) fn records(&self) -> ObservedObjects {
        self.records.clone()
    }

    /// What is to be published.
    pub(super) fn loaded(&mut self) -> Loaded {
        self.loaded.manifests.api_release = self.api_release();
        let problems = self.problems();
        if *self.loaded.problems != *problems {
            self.loaded.problems = problems.into();
        }
        self.loaded.clone()
    }

    fn api_release(&self) -> ApiRelease {
        if self.releases.is_empty() || self.releases.values().any(Option::is_none) {
            return ApiRelease::Unknown;
        }
        ApiRelease::Installed(self.releases.values().flatten().cloned().collect())
    }

    fn put(&mut self, kind: Kind, item: Item) {
        let Item { id, manifest, record } = item;
        if has_status(kind) {
            self.records.objects.insert(id.clone(), Arc::new(record));
        }
        match manifest {
            Ok(manifest) => {
                self.unreadable.remove(&id);
                let before = self.held.get(&id);
                if before == Some(&manifest) {
                    return;
                }
                if let Some(before) = before {
                    // An EndpointSlice may belong to another Service than before.
                    self.loaded.manifests.take(&id, before);
                }
                self.loaded.manifests.put(&id, &manifest);
                self.held.insert(id, manifest);
            }
            Err(error) => drop(self.unreadable.insert(id, error)),
        }
    }

    fn remove(&mut self, id: &ObjectRef) {
        self.records.objects.remove(id);
        self.unreadable.remove(id);
        if let Some(manifest) = self.held.remove(id) {
            self.loaded.manifests.take(id, &manifest);
        }
    }

    /// Removes the objects of a scope that a complete list of it does not name.
    fn remove_others(&mut self, scope: &Scope, listed: &HashSet<ObjectRef>) {
        let is_gone = |id: &ObjectRef| {
            id.kind == scope.kind.as_str()
                && scope.namespace.as_ref().is_none_or(|namespace| *namespace == id.namespace)
                && !listed.contains(id)
        };
        let known = self.held.keys().chain(self.unreadable.keys());
        let gone: Vec<ObjectRef> = known.filter(|id| is_gone(id)).cloned().collect();
        for id in &gone {
            self.remove(id);
        }
    }

    fn problems(&self) -> Vec<Problem> {
        let missing = GATEWAY_KINDS.into_iter().filter(|kind| !self.records.served.contains_key(kind));
        let missing = missing.map(|kind| {
            let message = format!(
                "the cluster does not serve {}, so that none is read: install the CRDs of the Gateway API, which are followed",
                plural(kind)
            );
            of_kind(kind, Reason::UnsupportedKind, message)
        });
        let failing = self.scopes.iter().filter_map(|(scope, progress)| {
            let (failure, _) = progress.failure.as_ref()?;
            let of = scope.namespace.as_ref().map(|it| format!(" of namespace {it}")).unwrap_or_default();
            let kept = if progress.is_complete { "; what was read before stays in force" } else { "" };
            let what = plural(scope.kind);
            let message = format!("cannot follow {what}{of}: {}{kept}", failure.message);
            Some(of_kind(scope.kind, Reason::Unreadable, message))
        });
        let unreadable = self.unreadable.iter().map(|(id, error)| {
            let consequence = if self.held.contains_key(id) {
                "the version before stays in force"
            } else {
                "the object is left out"
            };
            Problem::error(
                Reason::Malformed,
                id.clone(),
                "",
                format!("cannot be read: {error}; {consequence}"),
            )
        });
        missing.chain(failing).chain(unreadable).collect()
    }
}

/// A problem of a kind as a whole.
fn of_kind(kind: Kind, reason: Reason, message: String) -> Problem {
    Problem {
        severity: Severity::Warning,
        reason,
        location: None,
        object: None,
        field: kind.as_str().to_owned(),
        message,
    }
}

#[cfg(test)]
mod tests;
