//! The table: what is left to be forwarded once everything has been judged.

use std::collections::{BTreeMap, BTreeSet};

use crate::manifests::Manifests;
use crate::model::{BackendKey, Listener, ListenerKey, Route, RouteTable, Target};
use crate::problem::Problem;

use super::attach::JudgedRoute;
use super::backends;
use super::destinations::Destinations;
use super::gateways::JudgedGateway;
use super::listeners::JudgedListener;

/// Builds the table. `destinations` belong to `routes` one by one.
pub(super) fn build(
    manifests: &Manifests,
    gateways: &[JudgedGateway<'_>],
    routes: &[JudgedRoute<'_>],
    destinations: &[Destinations],
    problems: &mut Vec<Problem>,
) -> RouteTable {
    let mut table = RouteTable::default();
    for gateway in gateways {
        for (_, listener) in gateway.served_listeners() {
            let Some(port) = listener.port else { continue };
            for &address in &gateway.addresses.bind {
                let entry = Listener {
                    name: listener.name.clone(),
                    settings: listener.settings.clone(),
                    route: serving_route(listener, routes, destinations),
                };
                table.listeners.insert(ListenerKey { address, port }, entry);
            }
        }
    }
    table.backends = needed_backends(&table.listeners)
        .into_iter()
        .map(|key| {
            let (endpoints, found) = backends::endpoints(manifests, key);
            problems.extend(found);
            (key.clone(), endpoints)
        })
        .collect();
    table
}

/// The oldest of the attached routes.
fn serving_route(
    listener: &JudgedListener<'_>,
    routes: &[JudgedRoute<'_>],
    destinations: &[Destinations],
) -> Option<Route> {
    let index = *listener.routes.first()?;
    let route = routes.get(index)?;
    Some(Route {
        name: route.name.clone(),
        backends: destinations.get(index)?.backends.clone(),
    })
}

fn needed_backends(listeners: &BTreeMap<ListenerKey, Listener>) -> BTreeSet<&BackendKey> {
    let routes = listeners.values().filter_map(|listener| listener.route.as_ref());
    routes
        .flat_map(|route| &route.backends)
        .filter_map(|backend| service_of(&backend.target))
        .collect()
}

fn service_of(target: &Target) -> Option<&BackendKey> {
    match target {
        Target::Service(key) => Some(key),
        Target::Invalid { .. } => None,
    }
}
