//! What a change of the configuration costs: `cargo bench -p forwarder-agent --bench configuration`.

#![expect(clippy::unwrap_used, reason = "a bench has nobody to tell of an error")]
#![allow(missing_docs, reason = "criterion's macros make public items without documentation")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use forwarder_dataplane::upstream::balancer::Balancer;
use forwarder_gateway::manifests::{
    BackendRef, Change, Endpoint, EndpointPort, EndpointSlice, Gateway, GatewayAddress, GatewayClass,
    GatewayClassSpec, GatewaySpec, Listener, Manifests, Metadata, NamespacedName, ParentRef,
    SERVICE_NAME_LABEL, Service, ServicePort, ServiceSpec, TcpRoute, TcpRouteRule, TcpRouteSpec,
};
use forwarder_gateway::model::{ListenerSettings, RouteTable};
use forwarder_gateway::plan;
use forwarder_gateway::resolve::{CONTROLLER_NAME, ResolveSettings, resolve, update_endpoints};

/// Listeners, and routes, of a Gateway.
const PER_GATEWAY: usize = 50;
/// Endpoints of a Service; each route has a Service of its own.
const PER_SERVICE: usize = 10;

fn settings() -> ResolveSettings {
    ResolveSettings::for_files(ListenerSettings {
        idle_timeout: Some(Duration::from_hours(1)),
        ..ListenerSettings::default()
    })
}

fn metadata(name: &str) -> Metadata {
    Metadata { name: name.to_owned(), namespace: "default".to_owned(), ..Metadata::default() }
}

fn name(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

/// One route, with a listener, a Service and an EndpointSlice of its own.
fn add_route(manifests: &mut Manifests, index: usize) {
    let service = format!("service-{index}");
    let route = TcpRoute {
        metadata: metadata(&format!("route-{index}")),
        spec: TcpRouteSpec {
            parent_refs: vec![ParentRef {
                name: format!("gateway-{}", index / PER_GATEWAY),
                section_name: Some(format!("l{}", index % PER_GATEWAY)),
                ..ParentRef::default()
            }],
            rules: vec![TcpRouteRule {
                backend_refs: vec![BackendRef {
                    name: service.clone(),
                    port: Some(3306),
                    ..BackendRef::default()
                }],
                ..TcpRouteRule::default()
            }],
        },
    };
    manifests.tcp_routes.insert(route.metadata.namespaced_name(), Arc::new(route));
    let ports = vec![ServicePort { name: Some("db".to_owned()), port: 3306, ..ServicePort::default() }];
    let object =
        Service { metadata: metadata(&service), spec: ServiceSpec { ports, ..ServiceSpec::default() } };
    manifests.services.insert(name(&service), Arc::new(object));
    set_slice(manifests, index, 3306);
}

/// Sets the target port of a route's endpoints.
fn set_slice(manifests: &mut Manifests, index: usize, target: i64) {
    let service = format!("service-{index}");
    let (a, b) = (index / 250, index % 250);
    let endpoints = (1..=PER_SERVICE)
        .map(|last| Endpoint { addresses: vec![format!("10.{a}.{b}.{last}")], ..Endpoint::default() });
    let slice = EndpointSlice {
        metadata: Metadata {
            labels: BTreeMap::from([(SERVICE_NAME_LABEL.to_owned(), service.clone())]),
            ..metadata(&format!("{service}-1"))
        },
        address_type: "IPv4".to_owned(),
        endpoints: endpoints.collect(),
        ports: vec![EndpointPort {
            name: Some("db".to_owned()),
            port: Some(target),
            ..EndpointPort::default()
        }],
    };
    let slices = manifests.endpoint_slices.entry(name(&service)).or_default();
    slices.insert(slice.metadata.name.clone(), Arc::new(slice));
}

fn manifests(routes: usize) -> Manifests {
    let mut manifests = Manifests::default();
    let class = GatewayClass {
        metadata: Metadata { name: "tcp".to_owned(), ..Metadata::default() },
        spec: GatewayClassSpec { controller_name: CONTROLLER_NAME.to_owned(), ..GatewayClassSpec::default() },
    };
    manifests.gateway_classes.insert("tcp".to_owned(), Arc::new(class));
    for index in 0..routes.div_ceil(PER_GATEWAY) {
        let listeners = (0..PER_GATEWAY).map(|listener| Listener {
            name: format!("l{listener}"),
            port: i64::try_from(1000 + listener).unwrap(),
            protocol: "TCP".to_owned(),
            ..Listener::default()
        });
        let address = GatewayAddress {
            value: Some(format!("127.0.{}.{}", index / 250, 1 + index % 250)),
            ..GatewayAddress::default()
        };
        let gateway = Gateway {
            metadata: metadata(&format!("gateway-{index}")),
            spec: GatewaySpec {
                gateway_class_name: "tcp".to_owned(),
                listeners: listeners.collect(),
                addresses: vec![address],
                ..GatewaySpec::default()
            },
        };
        manifests.gateways.insert(gateway.metadata.namespaced_name(), Arc::new(gateway));
    }
    (0..routes).for_each(|index| add_route(&mut manifests, index));
    manifests
}

/// From manifests to the operations: what each change of a Gateway, a route or a Service costs.
fn everything(criterion: &mut Criterion) {
    let manifests = manifests(10_000);
    let settings = settings();
    let resolved = resolve(&manifests, &settings);
    assert_eq!((resolved.table.listeners.len(), resolved.problems.list()), (10_000, vec![]));
    let endpoints: usize = resolved.table.backends.values().map(|endpoints| endpoints.len()).sum();
    assert_eq!(endpoints, 100_000);

    let mut group = criterion.benchmark_group("resolve_and_plan");
    group.sample_size(10).measurement_time(Duration::from_secs(5));
    group.bench_function("10000_routes_100000_endpoints", |bencher| {
        bencher.iter(|| plan::plan(&resolve(&manifests, &settings).table, &RouteTable::default()));
    });
    group.finish();

    let mut group = criterion.benchmark_group("plan");
    group.sample_size(10).measurement_time(Duration::from_secs(2));
    let have = resolved.table.clone();
    group.bench_function("nothing_changed_10000_routes_100000_endpoints", |bencher| {
        bencher.iter(|| plan::plan(&resolved.table, &have));
    });
    group.finish();
}

/// From a set of manifests that differs in one EndpointSlice to the table in force.
fn one_endpoint(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("one_endpoint");
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    for routes in [100, 10_000] {
        let mut current = manifests(routes);
        let mut resolved = resolve(&current, &settings());
        let mut in_force = resolved.table.clone();
        let mut turn = 0;
        let id = format!("{routes}_routes_{}_endpoints", routes * PER_SERVICE);
        group.bench_function(id, |bencher| {
            bencher.iter(|| {
                turn += 1;
                // What a source does.
                let mut new = current.clone();
                set_slice(&mut new, routes / 2, 3306 + turn % 2);
                // What Control does.
                let Change::Endpoints(services) = current.change_to(&new) else {
                    unreachable!("a slice was changed");
                };
                let ops = update_endpoints(&mut resolved, &new, &settings(), &services);
                assert_eq!(ops.len(), 1);
                for op in ops {
                    plan::apply(&mut in_force, op);
                }
                current = new;
            });
        });
        assert_eq!(in_force, resolved.table);
    }
    group.finish();
}

/// The choice of a backend for a connection.
fn balancer(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("balancer");
    group.sample_size(20).measurement_time(Duration::from_secs(2));
    let balancer = Balancer::new([70, 20, 5, 5]);
    let mut turn = 0;
    group.bench_function("pick", |bencher| {
        bencher.iter(|| {
            turn += 1;
            balancer.pick(black_box(turn))
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().warm_up_time(Duration::from_millis(500)).without_plots();
    targets = everything, one_endpoint, balancer
}
criterion_main!(benches);
