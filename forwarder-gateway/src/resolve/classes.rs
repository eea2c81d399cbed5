//! Every GatewayClass: whether it is ours, and whether we accept it.

use std::collections::BTreeMap;

use crate::manifests::{ApiRelease, GatewayClass, Kind, Manifests, ObjectRef, version};
use crate::problem::{Problem, Reason};
use crate::status::{Condition, GatewayClassStatus, names};

use super::ResolveSettings;

/// A GatewayClass in our eyes.
pub(super) enum Class<'a> {
    /// It names our controller, and its Gateways are served.
    Accepted(&'a GatewayClass),
    /// It names our controller, and asks for what we cannot do.
    Refused {
        class: &'a GatewayClass,
        /// Why, as a sentence.
        message: String,
    },
    /// It is another controller's, which is named so.
    Foreign(&'a str),
}

/// Evaluates every GatewayClass.
pub(super) fn evaluate<'a>(
    manifests: &'a Manifests,
    settings: &ResolveSettings,
    problems: &mut Vec<Problem>,
) -> BTreeMap<&'a str, Class<'a>> {
    let evaluate_one = |(name, class): (&'a String, &'a std::sync::Arc<GatewayClass>)| {
        let verdict = evaluate_class(name, class, settings, problems);
        (name.as_str(), verdict)
    };
    manifests.gateway_classes.iter().map(evaluate_one).collect()
}

fn evaluate_class<'a>(
    name: &str,
    class: &'a GatewayClass,
    settings: &ResolveSettings,
    problems: &mut Vec<Problem>,
) -> Class<'a> {
    if class.spec.controller_name != settings.controller_name {
        return Class::Foreign(&class.spec.controller_name);
    }
    let Some(parameters) = &class.spec.parameters_ref else {
        return Class::Accepted(class);
    };
    let message = format!(
        "the forwarder takes no parameters, and the class refers to {} {}: no Gateway of the class is served; remove parametersRef, \
         and set what there is to set by annotations forwarder.dev/... of each Gateway",
        parameters.kind, parameters.name
    );
    let object = ObjectRef::cluster(Kind::GatewayClass, name);
    problems.push(Problem::error(Reason::InvalidParameters, object, "spec.parametersRef", message.as_str()));
    Class::Refused { class, message }
}

/// The statuses of the classes that are ours.
pub(super) fn statuses(
    classes: &BTreeMap<&str, Class<'_>>,
    release: &ApiRelease,
) -> BTreeMap<String, GatewayClassStatus> {
    let status = |(name, class): (&&str, &Class<'_>)| {
        let (class, rejection) = match class {
            Class::Accepted(class) => (class, None),
            Class::Refused { class, message } => (class, Some(message)),
            Class::Foreign(_) => return None,
        };
        let generation = class.metadata.generation;
        let accepted = match rejection {
            None => Condition::holds(names::ACCEPTED, names::ACCEPTED, "", generation),
            Some(message) => {
                let reason = Reason::InvalidParameters.as_str();
                Condition::fails(names::ACCEPTED, reason, message.as_str(), generation)
            }
        };
        let conditions = vec![accepted, supported_version(release, generation)];
        Some(((*name).to_owned(), GatewayClassStatus { conditions }))
    };
    classes.iter().filter_map(status).collect()
}

/// Another release than the known ones is served as well as it can be: Accepted does not depend on this.
fn supported_version(release: &ApiRelease, generation: i64) -> Condition {
    use names::{SUPPORTED_VERSION, UNSUPPORTED_VERSION};
    let unsupported = |found: &str| {
        let message =
            format!("{found}; the forwarder knows v1.0 to v1.6 and serves others as well as it can");
        Condition::fails(SUPPORTED_VERSION, UNSUPPORTED_VERSION, message, generation)
    };
    match release {
        ApiRelease::NotInstalled => Condition::holds(SUPPORTED_VERSION, SUPPORTED_VERSION, "", generation),
        ApiRelease::Unknown => unsupported("the CRDs of the Gateway API do not tell their release"),
        ApiRelease::Installed(found) => {
            let releases: Vec<&str> = found.iter().map(String::as_str).collect();
            let message = format!("the CRDs of the Gateway API are of release {}", releases.join(" and "));
            if found.iter().all(|release| is_known_release(release)) {
                Condition::holds(SUPPORTED_VERSION, SUPPORTED_VERSION, message, generation)
            } else {
                unsupported(&message)
            }
        }
    }
}

fn is_known_release(release: &str) -> bool {
    matches!(version(release), Some((1, 0..=6)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_one_to_one_six_are_known() {
        for release in ["v1.0.0", "v1.6.1", "1.4", "v1.6.0-rc.1"] {
            assert!(is_known_release(release), "{release}");
        }
        for release in ["v0.8.1", "v1.7.0", "v2.0", "", "main", "v1"] {
            assert!(!is_known_release(release), "{release}");
        }
    }

    #[test]
    fn an_unknown_release_is_said_in_supported_version() {
        let condition = supported_version(&ApiRelease::Installed(["v2.0.0".to_owned()].into()), 7);
        assert_eq!(
            (condition.type_, condition.reason, condition.observed_generation),
            ("SupportedVersion", "UnsupportedVersion", 7)
        );
        assert!(condition.message.contains("v2.0.0"), "{}", condition.message);
    }
}
