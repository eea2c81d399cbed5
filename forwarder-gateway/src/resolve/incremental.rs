//! What a change of EndpointSlices alone comes to.

use std::collections::BTreeSet;
use std::num::NonZeroU16;

use crate::manifests::{Manifests, NamespacedName};
use crate::model::{BackendKey, RouteTable};
use crate::plan::Op;

use super::endpoint_rules::EndpointRules;
use super::{ResolveSettings, Resolved, backends};

/// Brings `resolved` up to date with `manifests`, which differ from those that it was made of in nothing but the
/// EndpointSlices of `services`, and yields what has to be done in the table in force. The result is that of
/// [`resolve`](super::resolve()).
///
/// Work is proportional to the endpoints of these Services: who is attached to what does not depend on endpoints, nor
/// does any status.
pub fn update_endpoints(
    resolved: &mut Resolved,
    manifests: &Manifests,
    settings: &ResolveSettings,
    services: &BTreeSet<NamespacedName>,
) -> Vec<Op> {
    let mut ops = Vec::new();
    let RouteTable { listeners, backends: in_force } = &mut resolved.table;
    let rules = EndpointRules::new(settings, manifests, listeners);
    for service in services {
        let ports_of_service = BackendKey { service: service.clone(), port: NonZeroU16::MIN }..=BackendKey {
            service: service.clone(),
            port: NonZeroU16::MAX,
        };
        for (backend, before) in in_force.range_mut(ports_of_service) {
            let (endpoints, problems) = backends::endpoints(manifests, &rules, backend);
            if *before != endpoints {
                before.clone_from(&endpoints);
                ops.push(Op::SetEndpoints { backend: backend.clone(), endpoints });
            }
            resolved.problems.replace(backend, problems);
        }
    }
    ops
}
