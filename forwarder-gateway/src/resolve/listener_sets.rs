//! ListenerSets: which belong to a Gateway of ours, and whether it takes them.

use std::collections::HashMap;

use crate::manifests::{ApiRelease, Kind, ListenerSet, Manifests, NamespacedName, ObjectRef};
use crate::model::ListenerParent;
use crate::problem::{Problem, Reason};

use super::evaluated::{EvaluatedGateway, EvaluatedSet};
use super::listeners;
use super::{ResolveSettings, settings};

/// The first release of the Gateway API that knows ListenerSets.
const FIRST_RELEASE: (u32, u32) = (1, 5);

/// Evaluates the ListenerSets of the Gateways, and adds them to these, oldest first.
pub(super) fn evaluate<'a>(
    manifests: &'a Manifests,
    settings: &ResolveSettings,
    gateways: &mut [EvaluatedGateway<'a>],
    problems: &mut Vec<Problem>,
) {
    let index_of: HashMap<&NamespacedName, usize> =
        gateways.iter().enumerate().map(|(index, gateway)| (gateway.name, index)).collect();
    let mut oldest_first: Vec<(&NamespacedName, &ListenerSet)> =
        manifests.listener_sets.iter().map(|(name, set)| (name, &**set)).collect();
    oldest_first.sort_by_cached_key(|(_, set)| set.metadata.age_key());
    for (name, set) in oldest_first {
        let gateway = gateway(manifests, name, set, problems);
        let index = gateway.and_then(|gateway| index_of.get(&gateway).copied());
        if let Some(gateway) = index.and_then(|index| gateways.get_mut(index)) {
            let evaluated = evaluate_set(manifests, settings, gateway, (name, set), problems);
            gateway.sets.push(evaluated);
        }
    }
}

/// The Gateway that a ListenerSet names, ours or not.
fn gateway(
    manifests: &Manifests,
    name: &NamespacedName,
    set: &ListenerSet,
    problems: &mut Vec<Problem>,
) -> Option<NamespacedName> {
    let object = || ObjectRef::new(Kind::ListenerSet, name);
    let reference = &set.spec.parent_ref;
    let Some(gateway) = reference.gateway(&name.namespace) else {
        let message = format!(
            "a parent of kind {} is not the forwarder's: the ListenerSet is ignored",
            reference.kind()
        );
        problems.push(Problem::warning(Reason::UnsupportedKind, object(), "spec.parentRef.kind", message));
        return None;
    };
    if !manifests.gateways.contains_key(&gateway) {
        let (reason, message) = match manifests.why_missing(&ObjectRef::new(Kind::Gateway, &gateway)) {
            Some(why) => {
                (Reason::Refused, format!("{why}: the ListenerSet is not served until that is corrected"))
            }
            None => (
                Reason::NoMatchingParent,
                format!(
                    "there is no Gateway {gateway}: the ListenerSet is not served; create it, or name another"
                ),
            ),
        };
        problems.push(Problem::error(reason, object(), "spec.parentRef.name", message));
    }
    Some(gateway)
}

fn evaluate_set<'a>(
    manifests: &Manifests,
    settings: &ResolveSettings,
    gateway: &EvaluatedGateway<'_>,
    (name, set): (&'a NamespacedName, &'a ListenerSet),
    problems: &mut Vec<Problem>,
) -> EvaluatedSet<'a> {
    let own = &gateway.name.namespace;
    let rejection =
        gateway.allowed_listeners.rejection(own, &name.namespace, manifests, settings).map(|why| {
            let message = format!(
                "Gateway {} does not take the ListenerSet ({why}): no listener of the set is served; \
             change spec.allowedListeners.namespaces of the Gateway, or refer to another Gateway",
                gateway.name
            );
            let object = ObjectRef::new(Kind::ListenerSet, name);
            problems.push(Problem::error(Reason::NotAllowed, object, "spec.parentRef", message.as_str()));
            message
        });
    let defaults = settings::of_gateway(gateway.gateway, &settings.listener_defaults);
    let parent = ListenerParent::ListenerSet(name.clone());
    let annotations = &set.metadata.annotations;
    let ports = &settings.listener_ports;
    let listeners = listeners::evaluate(parent, &set.spec.listeners, annotations, &defaults, ports, problems);
    EvaluatedSet { set, rejection, listeners }
}

/// Whether `Gateway.status` has a place for the number of ListenerSets.
pub(super) fn are_counted(release: &ApiRelease) -> bool {
    match release {
        ApiRelease::NotInstalled => true,
        ApiRelease::Unknown => false,
        ApiRelease::Installed(_) => release.is_at_least(FIRST_RELEASE.0, FIRST_RELEASE.1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listener_sets_are_counted_from_release_one_five_on() {
        assert!(are_counted(&ApiRelease::NotInstalled));
        assert!(!are_counted(&ApiRelease::Unknown));
        let installed = |release: &str| are_counted(&ApiRelease::Installed([release.to_owned()].into()));
        for release in ["v1.5.0", "v1.6.1", "1.10", "v2.0.0-rc.1"] {
            assert!(installed(release), "{release}");
        }
        for release in ["v1.4.1", "v0.8.1", "main", "v1", ""] {
            assert!(!installed(release), "{release}");
        }
    }
}
