//! Label selectors, applied to namespaces.

use std::collections::BTreeMap;

use crate::manifests::{LabelSelector, LabelSelectorRequirement, Manifests};

use super::ResolveSettings;

/// The label that the API server gives every namespace: its name. In files it is there without being written.
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// Whether every requirement can be evaluated; else the field below the selector and what is wrong with it.
/// `consequence` is what follows then.
pub(super) fn check(selector: &LabelSelector, consequence: &str) -> Result<(), (String, String)> {
    for (index, requirement) in selector.match_expressions.iter().enumerate() {
        let field = format!("matchExpressions[{index}]");
        match (requirement.operator.as_str(), requirement.values.is_empty()) {
            ("In" | "NotIn", false) | ("Exists" | "DoesNotExist", true) => {}
            ("In" | "NotIn", true) => {
                let message = format!("operator {} needs values: {consequence}", requirement.operator);
                return Err((format!("{field}.values"), message));
            }
            ("Exists" | "DoesNotExist", false) => {
                let message = format!("operator {} takes no values: {consequence}", requirement.operator);
                return Err((format!("{field}.values"), message));
            }
            (other, _) => {
                let message =
                    format!("{other:?} is none of In, NotIn, Exists and DoesNotExist: {consequence}");
                return Err((format!("{field}.operator"), message));
            }
        }
    }
    Ok(())
}

/// Whether `selector`, which has passed [`check`], selects the namespace.
pub(super) fn selects(
    selector: &LabelSelector,
    namespace: &str,
    manifests: &Manifests,
    settings: &ResolveSettings,
) -> bool {
    let labels = match manifests.namespaces.get(namespace) {
        Some(namespace) => Some(&namespace.metadata.labels),
        None if settings.implicit_namespaces => None,
        None => return false,
    };
    let get = |key: &str| match key {
        NAME_LABEL => Some(namespace),
        _ => labels.and_then(|labels: &BTreeMap<String, String>| labels.get(key)).map(String::as_str),
    };
    selector.match_labels.iter().all(|(key, value)| get(key) == Some(value))
        && selector.match_expressions.iter().all(|requirement| holds(requirement, get(&requirement.key)))
}

fn holds(requirement: &LabelSelectorRequirement, value: Option<&str>) -> bool {
    let among = |value: &str| requirement.values.iter().any(|v| v == value);
    match requirement.operator.as_str() {
        "In" => value.is_some_and(among),
        "NotIn" => !value.is_some_and(among),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        _ => false,
    }
}
