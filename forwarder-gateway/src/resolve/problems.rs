//! What is wrong, kept such that the part of one backend can be replaced.

use std::sync::Arc;

use imbl::OrdMap;

use crate::model::BackendKey;
use crate::problem::Problem;

/// What is wrong with the manifests. Cloning takes no time.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Problems {
    /// With everything but endpoints.
    pub general: Arc<[Problem]>,
    /// With the endpoints of each backend, where something is. Backends of one Service share slices: both may have the
    /// same problem.
    pub of_backends: OrdMap<BackendKey, Arc<[Problem]>>,
}

impl Problems {
    /// Replaces those of a backend.
    pub(super) fn replace(&mut self, backend: &BackendKey, problems: Vec<Problem>) {
        let before = self.of_backends.get(backend).map_or(&[][..], |before| before);
        if before == problems {
            return;
        }
        if problems.is_empty() {
            self.of_backends.remove(backend);
        } else {
            self.of_backends.insert(backend.clone(), problems.into());
        }
    }

    /// All problems, sorted by object and field, so that the order does not depend on the order of evaluation, and each
    /// once.
    pub fn list(&self) -> Vec<Problem> {
        let of_backends = self.of_backends.values().flat_map(|problems| problems.iter());
        let mut all: Vec<&Problem> = self.general.iter().chain(of_backends).collect();
        all.sort_by(|a, b| {
            let key = |p: &Problem| (p.severity, p.reason);
            (&a.object, &a.field, key(a), &a.message).cmp(&(&b.object, &b.field, key(b), &b.message))
        });
        all.dedup();
        all.into_iter().cloned().collect()
    }
}
