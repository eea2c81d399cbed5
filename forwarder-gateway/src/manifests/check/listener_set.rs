//! ListenerSet, after its CRD of Gateway API 1.6.

use super::super::listener_set::ListenerSet;
use super::gateway::{LONGEST_NAME, listeners};
use super::{Check, NameRule};
use crate::object::Kind;
use crate::problem::Problem;

/// What is wrong with a ListenerSet.
pub fn listener_set(object: &ListenerSet) -> Vec<Problem> {
    let mut check = Check::metadata(Kind::ListenerSet, &object.metadata, NameRule::Subdomain);
    let reference = &object.spec.parent_ref;
    check.group("spec.parentRef.group", reference.group());
    check.kind("spec.parentRef.kind", reference.kind());
    if let Some(namespace) = reference.namespace.as_deref() {
        check.label("spec.parentRef.namespace", namespace);
    }
    check.text("spec.parentRef.name", &reference.name, LONGEST_NAME);
    listeners(&mut check, &object.spec.listeners);
    check.problems
}
