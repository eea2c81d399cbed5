//! What an API server would refuse: the schemas and CEL rules of the Gateway API's CRDs, and the validation of core kinds.
//!
//! Each function yields every problem of an object, none if it is valid. An object with a problem of severity error is
//! refused as a whole, as an API server does it. Rules that only concern fields the forwarder does not read are left out.
//! One CRD rule is left to [`crate::resolve`] on purpose: two listeners of a Gateway or ListenerSet on one port are a conflict of these
//! listeners, and no reason to refuse the others.

mod core;
mod gateway;
mod listener_set;
mod syntax;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

pub use self::core::{endpoint_slice, namespace, service};
pub use self::gateway::{gateway, gateway_class, reference_grant, tcp_route};
pub use self::listener_set::listener_set;
use crate::object::{Kind, Metadata, ObjectRef};
use crate::problem::{Problem, Reason};

/// The numbers that a port may have.
const PORTS: RangeInclusive<i64> = 1..=65_535;

/// What the name of an object must look like.
#[derive(Clone, Copy)]
enum NameRule {
    Label,
    Subdomain,
}

/// Gathers the problems of one object.
struct Check {
    object: ObjectRef,
    problems: Vec<Problem>,
}

impl Check {
    /// Starts with what all kinds have in common: names and labels.
    fn metadata(kind: Kind, metadata: &Metadata, rule: NameRule) -> Self {
        let object = ObjectRef {
            kind: kind.as_str().to_owned(),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
        };
        let mut check = Self { object, problems: Vec::new() };
        match rule {
            NameRule::Label => check.label("metadata.name", &metadata.name),
            NameRule::Subdomain => check.subdomain("metadata.name", &metadata.name),
        }
        match (kind.is_cluster_scoped(), metadata.namespace.as_str()) {
            (_, "") => {}
            (true, namespace) => check.invalid(
                "metadata.namespace",
                format!("a {kind} has no namespace, but {namespace:?} is set: remove it"),
            ),
            (false, namespace) => check.label("metadata.namespace", namespace),
        }
        check.labels("metadata.labels", &metadata.labels);
        check
    }

    fn invalid(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::error(Reason::Invalid, self.object.clone(), field, message));
    }

    fn warning(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.problems.push(Problem::warning(Reason::Invalid, self.object.clone(), field, message));
    }

    /// A required DNS-1123 label.
    fn label(&mut self, field: impl Into<String>, value: &str) {
        if !syntax::is_label(value) {
            self.invalid(field, syntax::refuse(value, syntax::LABEL));
        }
    }

    /// A required DNS-1123 subdomain.
    fn subdomain(&mut self, field: impl Into<String>, value: &str) {
        if !syntax::is_subdomain(value) {
            self.invalid(field, syntax::refuse(value, syntax::SUBDOMAIN));
        }
    }

    /// A required text of bounded length: what CRDs ask of the names of other objects.
    fn text(&mut self, field: impl Into<String>, value: &str, longest: usize) {
        if value.is_empty() {
            self.invalid(field, "is required");
        } else if value.chars().count() > longest {
            self.invalid(
                field,
                format!("{} characters are too many: use at most {longest}", value.chars().count()),
            );
        }
    }

    /// An API group, which may be empty.
    fn group(&mut self, field: impl Into<String>, value: &str) {
        if !value.is_empty() {
            self.subdomain(field, value);
        }
    }

    /// A required kind.
    fn kind(&mut self, field: impl Into<String>, value: &str) {
        if !syntax::is_kind(value) {
            self.invalid(field, syntax::refuse(value, syntax::KIND));
        }
    }

    fn range(&mut self, field: impl Into<String>, what: &str, value: i64, range: RangeInclusive<i64>) {
        if !range.contains(&value) {
            self.invalid(
                field,
                format!("{what} {value} is out of range: use {} to {}", range.start(), range.end()),
            );
        }
    }

    /// How many items a list has; `what` names them in the plural.
    fn count(&mut self, field: impl Into<String>, what: &str, count: usize, range: RangeInclusive<usize>) {
        if range.contains(&count) {
            return;
        }
        let allowed = match (*range.start(), *range.end()) {
            (0, most) => format!("at most {most} are allowed"),
            (least, most) if least == most => format!("exactly {most} must be given"),
            (least, most) => format!("{least} to {most} must be given"),
        };
        self.invalid(field, format!("has {count} {what}: {allowed}"));
    }

    fn one_of(&mut self, field: impl Into<String>, value: &str, allowed: &[&str]) {
        if !allowed.contains(&value) {
            self.invalid(field, format!("{} is not one of {}", syntax::quote(value), allowed.join(", ")));
        }
    }

    fn labels(&mut self, field: &str, labels: &BTreeMap<String, String>) {
        for (key, value) in labels {
            self.label_key(format!("{field}[{key}]"), key);
            self.label_value(format!("{field}[{key}]"), value);
        }
    }

    fn label_key(&mut self, field: impl Into<String>, key: &str) {
        if !syntax::is_qualified_name(key) {
            self.invalid(field, syntax::refuse(key, syntax::QUALIFIED_NAME));
        }
    }

    fn label_value(&mut self, field: impl Into<String>, value: &str) {
        if !syntax::is_label_value(value) {
            self.invalid(field, syntax::refuse(value, syntax::LABEL_VALUE));
        }
    }
}

#[cfg(test)]
mod tests;
