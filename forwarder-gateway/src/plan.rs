//! The plan: the operations, in order, that lead from the table in force to the wanted one. Pure, and never failing.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::model::{BackendKey, Endpoints, Listener, ListenerKey, RouteTable};

/// One operation on a table, or on what a table stands for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    /// Stop to listen. What becomes of its connections is up to its settings.
    RemoveListener(ListenerKey),
    /// Give a backend, known or new, these endpoints.
    SetEndpoints {
        /// The backend.
        backend: BackendKey,
        /// All of its endpoints.
        endpoints: Endpoints,
    },
    /// Listen where nothing listened.
    AddListener {
        /// The address and port.
        key: ListenerKey,
        /// The listener.
        listener: Arc<Listener>,
    },
    /// Change the route, settings or name of a listener, which stays bound.
    UpdateListener {
        /// The address and port.
        key: ListenerKey,
        /// The listener as it is to be.
        listener: Arc<Listener>,
    },
    /// Forget a backend that no listener refers to any more.
    RemoveBackend(BackendKey),
}

/// The operations from `have` to `want`: nothing for what is equal in both.
///
/// Their order: first listeners are removed, for a port may move from one address to another that overlaps it; then
/// backends get their endpoints, for listeners need them; then listeners are added and updated; last, backends are
/// removed that nothing refers to any more. So, no listener ever refers to a backend that is not there.
pub fn plan(want: &RouteTable, have: &RouteTable) -> Vec<Op> {
    let gone = have.listeners.keys().filter(|key| !want.listeners.contains_key(key));
    let remove_listeners = gone.copied().map(Op::RemoveListener);

    let changed_endpoints = changed(&want.backends, &have.backends);
    let set_endpoints = changed_endpoints.map(|(backend, endpoints, _)| Op::SetEndpoints {
        backend: backend.clone(),
        endpoints: endpoints.clone(),
    });

    let changed_listeners = changed(&want.listeners, &have.listeners);
    let set_listeners = changed_listeners.map(|(key, listener, before)| {
        let (key, listener) = (*key, listener.clone());
        match before {
            None => Op::AddListener { key, listener },
            Some(_) => Op::UpdateListener { key, listener },
        }
    });

    let unneeded = have.backends.keys().filter(|backend| !want.backends.contains_key(backend));
    let remove_backends = unneeded.cloned().map(Op::RemoveBackend);

    remove_listeners.chain(set_endpoints).chain(set_listeners).chain(remove_backends).collect()
}

/// The entries of `want` that differ in `have` or are not there, with what stands there.
fn changed<'a, K: Ord, V: PartialEq>(
    want: &'a BTreeMap<K, V>,
    have: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V, Option<&'a V>)> {
    want.iter()
        .map(|(key, value)| (key, value, have.get(key)))
        .filter(|(_, value, have)| Some(*value) != *have)
}

/// Applies an operation to a table: to the record of what is in force.
pub fn apply(table: &mut RouteTable, op: Op) {
    match op {
        Op::RemoveListener(key) => {
            table.listeners.remove(&key);
        }
        Op::SetEndpoints { backend, endpoints } => {
            table.backends.insert(backend, endpoints);
        }
        Op::AddListener { key, listener } | Op::UpdateListener { key, listener } => {
            table.listeners.insert(key, listener);
        }
        Op::RemoveBackend(backend) => {
            table.backends.remove(&backend);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, SocketAddr};
    use std::num::NonZeroU16;
    use std::time::Duration;

    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;

    use super::*;
    use crate::manifests::NamespacedName;
    use crate::model::{Backend, BindAddress, ListenerName, ListenerParent, ListenerSettings, Route, Target};
    use crate::problem::Reason;

    fn port(number: u16) -> NonZeroU16 {
        NonZeroU16::new(number).unwrap()
    }

    fn keys() -> impl Strategy<Value = ListenerKey> {
        let address = prop_oneof![
            Just(BindAddress::Any),
            (1..3_u8).prop_map(|last| BindAddress::Ip(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)))),
        ];
        (address, 1..4_u16).prop_map(|(address, number)| ListenerKey { address, port: port(number) })
    }

    fn backend_keys() -> impl Strategy<Value = BackendKey> {
        (0..3_u8, 1..3_u16).prop_map(|(service, number)| BackendKey {
            service: NamespacedName::new("db", format!("service-{service}")),
            port: port(number),
        })
    }

    fn targets() -> impl Strategy<Value = Target> {
        let invalid = Target::Invalid {
            reference: "db/gone:1".to_owned(),
            reason: Reason::BackendNotFound,
            message: "gone".to_owned(),
        };
        prop_oneof![4 => backend_keys().prop_map(Target::Service), 1 => Just(invalid)]
    }

    fn routes() -> impl Strategy<Value = Option<Route>> {
        let backends = vec((0..3_u32, targets()), 0..3);
        let route = (0..3_u8, backends).prop_map(|(name, backends)| Route {
            name: NamespacedName::new("db", format!("route-{name}")),
            backends: backends.into_iter().map(|(weight, target)| Backend { weight, target }).collect(),
        });
        proptest::option::of(route)
    }

    fn listeners() -> impl Strategy<Value = Arc<Listener>> {
        (0..2_u8, 0..2_u64, routes())
            .prop_map(|(section, idle, route)| Listener {
                name: ListenerName {
                    parent: ListenerParent::Gateway(NamespacedName::new("db", "gateway")),
                    section: format!("section-{section}"),
                },
                settings: ListenerSettings {
                    idle_timeout: (idle > 0).then(|| Duration::from_secs(idle)),
                    ..ListenerSettings::default()
                },
                route,
            })
            .prop_map(Arc::new)
    }

    /// Tables as `resolve` makes them: with an entry for each backend that a listener refers to, and no other.
    fn tables() -> impl Strategy<Value = RouteTable> {
        let endpoints = vec((1..4_u8, 1..3_u16), 0..3);
        let all_backends = btree_map(backend_keys(), endpoints, 0..6);
        (btree_map(keys(), listeners(), 0..6), all_backends).prop_map(|(listeners, endpoints)| {
            let mut table = RouteTable { listeners, ..RouteTable::default() };
            let needed: Vec<BackendKey> = table.needed_backends().into_iter().cloned().collect();
            for key in needed {
                let addresses = endpoints.get(&key).into_iter().flatten();
                let socket =
                    |(last, number): &(u8, u16)| SocketAddr::from((Ipv4Addr::new(10, 1, 0, *last), *number));
                table.backends.insert(key, addresses.map(socket).collect());
            }
            table
        })
    }

    fn step(op: &Op) -> u8 {
        match op {
            Op::RemoveListener(_) => 0,
            Op::SetEndpoints { .. } => 1,
            Op::AddListener { .. } | Op::UpdateListener { .. } => 2,
            Op::RemoveBackend(_) => 3,
        }
    }

    fn check_touches_only_changes(
        op: &Op,
        want: &RouteTable,
        have: &RouteTable,
    ) -> Result<(), TestCaseError> {
        match op {
            Op::RemoveListener(key) => {
                prop_assert!(have.listeners.contains_key(key) && !want.listeners.contains_key(key));
            }
            Op::SetEndpoints { backend, .. } => {
                prop_assert_ne!(have.backends.get(backend), want.backends.get(backend));
            }
            Op::AddListener { key, .. } => prop_assert!(!have.listeners.contains_key(key)),
            Op::UpdateListener { key, listener } => {
                let before = have.listeners.get(key);
                prop_assert!(before.is_some() && before != Some(listener));
            }
            Op::RemoveBackend(backend) => {
                prop_assert!(have.backends.contains_key(backend) && !want.backends.contains_key(backend));
            }
        }
        Ok(())
    }

    proptest! {
        #[test]
        fn a_plan_leads_from_have_to_want(want in tables(), have in tables()) {
            let mut table = have.clone();
            for op in plan(&want, &have) {
                apply(&mut table, op);
            }
            prop_assert_eq!(&table, &want);
            prop_assert_eq!(plan(&want, &table), vec![]);
        }

        #[test]
        fn a_plan_touches_nothing_that_did_not_change(want in tables(), have in tables()) {
            for op in plan(&want, &have) {
                check_touches_only_changes(&op, &want, &have)?;
            }
        }

        #[test]
        fn no_listener_ever_lacks_a_backend(want in tables(), have in tables()) {
            let mut table = have.clone();
            for op in plan(&want, &have) {
                apply(&mut table, op);
                for key in table.needed_backends() {
                    prop_assert!(table.backends.contains_key(key), "{} is missing", key);
                }
            }
        }

        #[test]
        fn a_port_is_free_before_another_listener_takes_it(want in tables(), have in tables()) {
            let steps: Vec<u8> = plan(&want, &have).iter().map(step).collect();
            prop_assert!(steps.is_sorted(), "{:?}", steps);
        }
    }

    #[test]
    fn a_change_of_endpoints_touches_no_listener() {
        let backend = BackendKey { service: NamespacedName::new("db", "mysql"), port: port(3306) };
        let table = |last| RouteTable {
            backends: [(backend.clone(), [SocketAddr::from(([10, 1, 0, last], 3306))].into())].into(),
            ..RouteTable::default()
        };
        let ops = plan(&table(2), &table(1));
        let endpoints = [SocketAddr::from(([10, 1, 0, 2], 3306))].into();
        assert_eq!(ops, [Op::SetEndpoints { backend, endpoints }]);
    }
}
