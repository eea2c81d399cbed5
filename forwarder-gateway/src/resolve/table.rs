//! The table: what is left to be forwarded once everything has been evaluated.

use std::sync::Arc;

use imbl::OrdMap;

use crate::manifests::Manifests;
use crate::model::{BackendKey, Listener, ListenerKey, Route, RouteTable};
use crate::problem::Problem;

use super::attach::EvaluatedRoute;
use super::destinations::Destinations;
use super::endpoint_rules::EndpointRules;
use super::evaluated::{EvaluatedGateway, EvaluatedListener};
use super::{ResolveSettings, backends};

/// Builds the table, and says what is wrong with the endpoints of which backend. `destinations` belong to `routes` one by
/// one.
pub(super) fn build(
    manifests: &Manifests,
    settings: &ResolveSettings,
    gateways: &[EvaluatedGateway<'_>],
    routes: &[EvaluatedRoute<'_>],
    destinations: &[Destinations],
) -> (RouteTable, OrdMap<BackendKey, Arc<[Problem]>>) {
    let mut table = RouteTable::default();
    for gateway in gateways {
        for (_, listener) in gateway.parts().flat_map(|set| gateway.served_listeners(set)) {
            let Some(port) = listener.port else { continue };
            for &address in &gateway.addresses.bind {
                let entry = Listener {
                    name: listener.name.clone(),
                    settings: listener.settings.clone(),
                    route: serving_route(listener, routes, destinations),
                };
                table.listeners.insert(ListenerKey { address, port }, Arc::new(entry));
            }
        }
    }
    let mut problems = OrdMap::new();
    let rules = EndpointRules::new(settings, manifests, &table.listeners);
    let with_endpoints = |key: &BackendKey| {
        let (endpoints, found) = backends::endpoints(manifests, &rules, key);
        if !found.is_empty() {
            problems.insert(key.clone(), found.into());
        }
        (key.clone(), endpoints)
    };
    let backends = table.needed_backends().into_iter().map(with_endpoints).collect();
    table.backends = backends;
    (table, problems)
}

/// The oldest of the attached routes.
fn serving_route(
    listener: &EvaluatedListener<'_>,
    routes: &[EvaluatedRoute<'_>],
    destinations: &[Destinations],
) -> Option<Route> {
    let index = *listener.routes.first()?;
    let route = routes.get(index)?;
    Some(Route { name: route.name.clone(), backends: destinations.get(index)?.backends.clone() })
}
