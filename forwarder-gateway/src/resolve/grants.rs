//! What each ReferenceGrant permits: which routes may refer to Services of another namespace.

use std::collections::{HashMap, HashSet};

use crate::manifests::{GATEWAY_GROUP, Kind, Manifests, NamespacedName, ReferenceGrantTo};

/// The grants from routes to Services.
pub(super) struct Grants<'a> {
    /// By the namespace of the routes and that of the Services, which is the grant's own.
    granted: HashMap<(&'a str, &'a str), Granted<'a>>,
}

#[derive(Default)]
struct Granted<'a> {
    every_service: bool,
    services: HashSet<&'a str>,
}

impl<'a> Grants<'a> {
    pub(super) fn new(manifests: &'a Manifests) -> Self {
        let mut granted: HashMap<(&str, &str), Granted<'_>> = HashMap::new();
        for (name, grant) in &manifests.reference_grants {
            let from_routes =
                |group: &str, kind: &str| group == GATEWAY_GROUP && kind == Kind::TcpRoute.as_str();
            for from in grant.spec.from.iter().filter(|from| from_routes(&from.group, &from.kind)) {
                let granted = granted.entry((&from.namespace, &name.namespace)).or_default();
                grant.spec.to.iter().for_each(|to| granted.add(to));
            }
        }
        Self { granted }
    }

    /// Whether a TCPRoute of `from` may refer to the Service: always within a namespace.
    pub(super) fn permit(&self, from: &str, service: &NamespacedName) -> bool {
        from == service.namespace
            || self.granted.get(&(from, &*service.namespace)).is_some_and(|granted| {
                granted.every_service || granted.services.contains(service.name.as_str())
            })
    }
}

impl<'a> Granted<'a> {
    fn add(&mut self, to: &'a ReferenceGrantTo) {
        if !to.group.is_empty() || to.kind != Kind::Service.as_str() {
            return;
        }
        match to.name.as_deref() {
            None | Some("") => self.every_service = true,
            Some(name) => {
                self.services.insert(name);
            }
        }
    }
}
