//! Golden tests of `resolve`: every `tests/resolve/NAME.in.yaml` gives `NAME.out`. `UPDATE_EXPECT=1` rewrites them.
//!
//! A comment `# cluster` in the first line resolves as in a cluster, where a namespace that is not declared is unknown,
//! and endpoints have no special addresses.

#![expect(clippy::panic, clippy::unwrap_used, reason = "helpers of tests are tests")]

#[path = "resolve/any.rs"]
mod any;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use forwarder_gateway::allowed::{AllowedAddresses, AllowedPorts};
use forwarder_gateway::manifests::{ApiRelease, Change, EndpointSlice, Manifests, Metadata, NamespacedName};
use forwarder_gateway::model::{
    BackendKey, ListenerKey, ListenerName, ListenerParent, ListenerSettings, RouteTable, Target,
};
use forwarder_gateway::plan;
use forwarder_gateway::resolve::{
    self, EndpointRules, OwnSockets, ResolveSettings, Resolved, resolve, update_endpoints,
};
use forwarder_gateway::status::{Condition, ListenerStatus, Statuses};
use proptest::collection::vec;
use proptest::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

fn settings() -> ResolveSettings {
    let defaults = ListenerSettings {
        idle_timeout: Some(Duration::from_hours(1)),
        half_closed_timeout: Some(Duration::from_mins(10)),
        connect_timeout: Duration::from_secs(5),
        ..ListenerSettings::default()
    };
    let addresses = ["192.0.2.9", "2001:db8::9"].map(|ip| ip.parse().unwrap());
    ResolveSettings {
        own: OwnSockets { addresses: addresses.into(), admin: Some("127.0.0.1:9902".parse().unwrap()) },
        listener_ports: AllowedPorts::new(
            ["!10248-10259", "!6443", "10251"].map(|it| it.parse().unwrap()).into(),
        ),
        ..ResolveSettings::for_files(defaults)
    }
}

#[test]
fn golden_files() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/resolve");
    let mut inputs: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(".in.yaml"))
        .collect();
    inputs.sort();
    assert!(inputs.len() >= 35, "only {} cases in {}", inputs.len(), folder.display());
    for input in inputs {
        let yaml = std::fs::read_to_string(&input).unwrap();
        let expected = input.to_string_lossy().replace(".in.yaml", ".out");
        let rendered = render(&yaml);
        expect_test::expect_file![PathBuf::from(expected)].assert_eq(&rendered);
    }
}

fn render(yaml: &str) -> String {
    let mut settings = settings();
    if yaml.starts_with("# cluster") {
        settings.implicit_namespaces = false;
        settings.endpoint_addresses = AllowedAddresses::for_cluster(vec!["!10.66.0.0/16".parse().unwrap()]);
    }
    let manifests = load(yaml);
    let resolved = resolve(&manifests, &settings);
    check_invariants(&manifests, &resolved);
    let mut out = String::new();
    render_table(&mut out, &resolved.table, &settings.listener_defaults);
    render_statuses(&mut out, &resolved.statuses);
    for problem in &resolved.problems.list() {
        let severity = format!("{:?}", problem.severity).to_lowercase();
        writeln!(out, "{severity}: {problem}").unwrap();
    }
    out
}

/// What holds for whatever is resolved.
fn check_invariants(manifests: &Manifests, resolved: &Resolved) {
    let Resolved { table, statuses, .. } = resolved;
    assert!(table.needed_backends().into_iter().eq(table.backends.keys()), "backends are not closed");

    let keys: Vec<_> = table.listeners.keys().collect();
    for (index, a) in keys.iter().enumerate() {
        let overlaps = |b: &&&ListenerKey| a.port == b.port && a.address.overlaps(b.address);
        assert!(!keys[index + 1..].iter().any(|b| overlaps(&b)), "{a} overlaps another listener");
    }

    let bound: BTreeSet<_> = table.listeners.values().map(|listener| listener.name.clone()).collect();
    let gateways = statuses.gateways.iter().map(|(name, status)| {
        let object = &manifests.gateways[name];
        let parent = ListenerParent::Gateway(name.clone());
        (parent, &object.metadata, &object.spec.listeners, &status.conditions)
    });
    let sets = statuses.listener_sets.iter().map(|(name, status)| {
        let object = &manifests.listener_sets[name];
        let parent = ListenerParent::ListenerSet(name.clone());
        (parent, &object.metadata, &object.spec.listeners, &status.conditions)
    });
    let mut programmed = 0;
    for (parent, metadata, specs, conditions) in gateways.chain(sets) {
        let listeners = statuses.listeners(&parent);
        assert!(listeners.iter().map(|l| &l.name).eq(specs.iter().map(|l| &l.name)), "{parent}");
        for listener in listeners.iter().filter(|l| l.condition_holds("Programmed")) {
            programmed += 1;
            let name = ListenerName { parent: parent.clone(), section: listener.name.clone() };
            assert!(bound.contains(&name), "{name} is programmed and not in the table");
        }
        let listener_conditions = listeners.iter().flat_map(|listener| &listener.conditions);
        let mut conditions = conditions.iter().chain(listener_conditions);
        assert!(conditions.all(|c| c.observed_generation == metadata.generation), "{parent}");
    }
    assert_eq!(programmed, bound.len(), "a listener is bound and not programmed");

    for (gateway, status) in &statuses.gateways {
        let accepted =
            statuses.listener_sets.values().filter(|set| set.gateway == *gateway && set.is_accepted());
        assert_eq!(status.attached_listener_sets, Some(u32::try_from(accepted.count()).unwrap()));
    }
}

fn render_table(out: &mut String, table: &RouteTable, defaults: &ListenerSettings) {
    out.push_str("listeners:\n");
    for (key, listener) in &table.listeners {
        writeln!(out, "  {key} ({}){}", listener.name, setting_changes(&listener.settings, defaults))
            .unwrap();
        let Some(route) = &listener.route else {
            out.push_str("    no route\n");
            continue;
        };
        writeln!(out, "    {}", route.name).unwrap();
        for backend in &route.backends {
            let (weight, target) = (backend.weight, &backend.target);
            match target {
                Target::Service(_) => writeln!(out, "      {weight} to {target}").unwrap(),
                Target::Invalid { reason, .. } => {
                    writeln!(out, "      {weight} reset, for {target} is invalid ({reason})").unwrap();
                }
            }
        }
    }
    out.push_str("backends:\n");
    for (backend, endpoints) in &table.backends {
        writeln!(out, "  {backend}").unwrap();
        for endpoint in endpoints.iter() {
            writeln!(out, "    {endpoint}").unwrap();
        }
    }
}

fn setting_changes(settings: &ListenerSettings, defaults: &ListenerSettings) -> String {
    let as_json = |settings| serde_json::to_value(settings).unwrap();
    let (Value::Object(settings), Value::Object(defaults)) = (as_json(settings), as_json(defaults)) else {
        panic!("settings are no object");
    };
    let changed = settings.iter().filter(|(name, value)| defaults.get(*name) != Some(value));
    let shown = |value: &Value| match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    changed.fold(String::new(), |all, (name, value)| format!("{all} {name}={}", shown(value)))
}

fn render_statuses(out: &mut String, statuses: &Statuses) {
    for (name, status) in &statuses.gateway_classes {
        writeln!(out, "GatewayClass {name}:").unwrap();
        render_conditions(out, "  ", &status.conditions);
    }
    for (name, status) in &statuses.gateways {
        writeln!(out, "Gateway {name}:").unwrap();
        for address in &status.addresses {
            writeln!(out, "  address {} {}", address.type_, address.value).unwrap();
        }
        if let Some(count) = status.attached_listener_sets.filter(|count| *count > 0) {
            writeln!(out, "  {count} ListenerSets attached").unwrap();
        }
        render_conditions(out, "  ", &status.conditions);
        render_listeners(out, &status.listeners);
    }
    for (name, status) in &statuses.listener_sets {
        writeln!(out, "ListenerSet {name} of Gateway {}:", status.gateway).unwrap();
        render_conditions(out, "  ", &status.conditions);
        render_listeners(out, &status.listeners);
    }
    for (name, status) in &statuses.tcp_routes {
        writeln!(out, "TCPRoute {name}:").unwrap();
        for parent in &status.parents {
            let section = parent.section_name.iter().map(|name| format!(" section {name}"));
            let port = parent.port.iter().map(|port| format!(" port {port}"));
            let which: String = section.chain(port).collect();
            let name = match &parent.parent {
                ListenerParent::Gateway(name) => name.to_string(),
                set @ ListenerParent::ListenerSet(_) => set.to_string(),
            };
            writeln!(out, "  parentRefs[{}] {name}{which}:", parent.parent_ref).unwrap();
            render_conditions(out, "    ", &parent.conditions);
        }
    }
}

fn render_listeners(out: &mut String, listeners: &[ListenerStatus]) {
    for listener in listeners {
        let kinds: Vec<&str> = listener.supported_kinds.iter().map(|kind| kind.kind).collect();
        let (name, attached) = (&listener.name, listener.attached_routes);
        writeln!(out, "  listener {name}: kinds {kinds:?}, {attached} attached").unwrap();
        render_conditions(out, "    ", &listener.conditions);
    }
}

fn render_conditions(out: &mut String, indent: &str, conditions: &[Condition]) {
    for condition in conditions {
        let Condition { type_, status, reason, message, observed_generation } = condition;
        write!(out, "{indent}{type_} {status:?} {reason}").unwrap();
        if *observed_generation != 0 {
            write!(out, " @{observed_generation}").unwrap();
        }
        if !message.is_empty() {
            write!(out, ": {message}").unwrap();
        }
        out.push('\n');
    }
}

/// Reads manifests, strictly enough for tests: whatever cannot be read panics.
fn load(yaml: &str) -> Manifests {
    let mut manifests = Manifests::default();
    for mut document in serde_saphyr::from_multiple::<Value>(yaml).unwrap() {
        let kind = document["kind"].as_str().unwrap().to_owned();
        let is_namespaced = !matches!(kind.as_str(), "GatewayClass" | "Namespace");
        if is_namespaced && document["metadata"]["namespace"].is_null() {
            document["metadata"]["namespace"] = "default".into();
        }
        add(&mut manifests, &kind, document);
    }
    manifests
}

fn add(manifests: &mut Manifests, kind: &str, document: Value) {
    let metadata: Metadata = parse(document["metadata"].clone());
    let (name, namespaced) = (metadata.name.clone(), metadata.namespaced_name());
    let is_new = match kind {
        "GatewayClass" => manifests.gateway_classes.insert(name, parse(document)).is_none(),
        "Namespace" => manifests.namespaces.insert(name, parse(document)).is_none(),
        "Gateway" => manifests.gateways.insert(namespaced, parse(document)).is_none(),
        "ListenerSet" => manifests.listener_sets.insert(namespaced, parse(document)).is_none(),
        "TCPRoute" => manifests.tcp_routes.insert(namespaced, parse(document)).is_none(),
        "ReferenceGrant" => manifests.reference_grants.insert(namespaced, parse(document)).is_none(),
        "Service" => manifests.services.insert(namespaced, parse(document)).is_none(),
        "EndpointSlice" => {
            let slice: Arc<EndpointSlice> = parse(document);
            let service = &slice.metadata.labels["kubernetes.io/service-name"];
            let service = NamespacedName::new(&slice.metadata.namespace, service);
            manifests.endpoint_slices.entry(service).or_default().insert(name, slice).is_none()
        }
        "Lease" => {
            let addresses = metadata.annotations["forwarder.dev/node-addresses"].split(' ');
            let addresses = addresses.map(|address| address.parse().unwrap()).collect();
            std::mem::replace(&mut manifests.node_addresses, Arc::new(addresses)).is_empty()
        }
        other => panic!("kind {other}"),
    };
    assert!(is_new, "two objects of kind {kind} have the name {}", metadata.namespaced_name());
}

fn parse<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Endpoints of one backend can be had without resolving everything, and are the same.
#[test]
fn endpoints_of_one_backend_are_those_of_the_table() {
    let manifests = load(include_str!("resolve/dual-stack-endpoints.in.yaml"));
    let settings = settings();
    let table = resolve(&manifests, &settings).table;
    let rules = EndpointRules::new(&settings, &manifests, &table.listeners);
    assert!(!table.backends.is_empty());
    for (backend, endpoints) in &table.backends {
        let (alone, problems) = resolve::backends::endpoints(&manifests, &rules, backend);
        assert_eq!((&alone, problems), (endpoints, vec![]));
    }
    let port = 1.try_into().unwrap();
    let unknown = BackendKey { service: NamespacedName::new("no", "such"), port };
    let (none, problems) = resolve::backends::endpoints(&manifests, &rules, &unknown);
    assert_eq!((none.len(), problems), (0, vec![]));
}

fn texts(choices: &[&'static str]) -> impl Strategy<Value = &'static str> + use<> {
    proptest::sample::select(choices.to_vec())
}

/// An EndpointSlice, well-formed or not.
fn any_slice() -> impl Strategy<Value = EndpointSlice> {
    let address_type = texts(&["IPv4", "IPv4", "IPv4", "IPv6", "FQDN"]);
    let port =
        (texts(&["a", "b", ""]), proptest::sample::select(vec![1, 1, 2, 0]), texts(&["TCP", "TCP", "UDP"]));
    let address = texts(&["10.0.0.1", "10.0.0.2", "127.0.0.1", "::1", "x"]);
    let conditions = proptest::sample::select(vec![
        json!({}),
        json!({}),
        json!({"ready": false}),
        json!({"ready": false, "serving": true, "terminating": true}),
    ]);
    (address_type, vec(port, 0..3), vec((address, conditions), 0..3)).prop_map(
        |(address_type, ports, endpoints)| {
            let port = |(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol});
            let endpoint = |(address, conditions)| json!({"addresses": [address], "conditions": conditions});
            serde_json::from_value(json!({
                "addressType": address_type,
                "ports": ports.into_iter().map(port).collect::<Vec<_>>(),
                "endpoints": endpoints.into_iter().map(endpoint).collect::<Vec<_>>(),
            }))
            .unwrap()
        },
    )
}

/// A slice of a name comes, changes, moves to a Service or goes.
fn any_edit() -> impl Strategy<Value = (&'static str, &'static str, Option<EndpointSlice>)> {
    let slice = proptest::option::weighted(0.8, any_slice());
    (texts(&["1", "2", "3"]), texts(&["one", "two", "two", "unused", "absent"]), slice)
}

fn edit(manifests: &mut Manifests, name: &str, service: &str, slice: Option<EndpointSlice>) {
    let services: Vec<_> = manifests.endpoint_slices.keys().cloned().collect();
    for service in services {
        let slices = manifests.endpoint_slices.get_mut(&service).unwrap();
        slices.remove(name);
        if slices.is_empty() {
            manifests.endpoint_slices.remove(&service);
        }
    }
    if let Some(slice) = slice {
        let slices = manifests.endpoint_slices.entry(NamespacedName::new("default", service)).or_default();
        slices.insert(name.to_owned(), Arc::new(slice));
    }
}

proptest! {
    /// Whatever becomes of EndpointSlices, to update the backends of their Services is to resolve everything.
    #[test]
    fn updated_endpoints_are_those_of_a_full_resolution(batches in vec(vec(any_edit(), 1..3), 1..10)) {
        let mut manifests = load(include_str!("resolve/endpoints-of-services.yaml"));
        let mut resolved = resolve(&manifests, &settings());
        prop_assert_eq!(resolved.table.backends.len(), 3);
        for batch in batches {
            let before = manifests.clone();
            for (name, service, slice) in batch {
                edit(&mut manifests, name, service, slice);
            }
            let Change::Endpoints(services) = before.change_to(&manifests) else {
                return Err(TestCaseError::fail("nothing but slices was changed"));
            };
            let mut table = resolved.table.clone();
            let ops = update_endpoints(&mut resolved, &manifests, &settings(), &services);
            prop_assert_eq!(&ops, &plan::plan(&resolved.table, &table));
            for op in ops {
                plan::apply(&mut table, op);
            }
            prop_assert_eq!(&table, &resolved.table);
            let full = resolve(&manifests, &settings());
            prop_assert_eq!(resolved.problems.list(), full.problems.list());
            prop_assert_eq!(&resolved, &full);
        }
    }
}

/// A cluster of an older release would refuse the field.
#[test]
fn listener_sets_are_counted_where_the_release_has_a_place_for_it() {
    let manifests = load(include_str!("resolve/listener-set.in.yaml"));
    let count = |release: &str| {
        let api_release = ApiRelease::Installed([release.to_owned()].into());
        let resolved = resolve(&Manifests { api_release, ..manifests.clone() }, &settings());
        resolved.statuses.gateways[&NamespacedName::new("infra", "gw")].attached_listener_sets
    };
    assert_eq!((count("v1.4.1"), count("v1.5.0")), (None, Some(1)));
}

#[test]
fn a_change_of_anything_else_is_not_one_of_endpoints() {
    let before = load(include_str!("resolve/endpoints-of-services.yaml"));
    let mut after = before.clone();
    assert_eq!(before.change_to(&after), Change::Endpoints(BTreeSet::new()));
    edit(&mut after, "1", "one", Some(EndpointSlice::default()));
    let name = NamespacedName::new("default", "one");
    assert_eq!(before.change_to(&after), Change::Endpoints([name.clone()].into()));
    after.services.remove(&name);
    assert_eq!(before.change_to(&after), Change::Any);
    let mut after = before.clone();
    after.listener_sets.insert(name, Arc::default());
    assert_eq!(before.change_to(&after), Change::Any);
}

/// 1,000 Gateways of 4 listeners, 10,000 routes of which half crowd on one Gateway, 1,000 ListenerSets that crowd there too,
/// 1,000 Services of 100 endpoints.
/// The limit is generous, for this is a debug build on any machine: a quadratic step would take minutes.
#[test]
fn resolving_many_objects_takes_no_quadratic_time() {
    let mut manifests = Manifests::default();
    add(
        &mut manifests,
        "GatewayClass",
        json!({"metadata": {"name": "tcp"}, "spec": {"controllerName": "forwarder.dev/tcp"}}),
    );
    for index in 0..1000 {
        add_gateway_and_service(&mut manifests, index);
        let listener = json!({"name": "l", "port": 5000 + index, "protocol": "TCP"});
        let spec = json!({"parentRef": {"name": "gw-0"}, "listeners": [listener]});
        add_spec(&mut manifests, "ListenerSet", &format!("ls-{index}"), &spec);
    }
    for index in 0..10_000 {
        let gateway = if index % 2 == 0 { index % 1000 } else { 0 };
        let backend = json!({"name": format!("s-{}", index % 1000), "port": 3306});
        let spec = json!({
            "parentRefs": [{"name": format!("gw-{gateway}")}],
            "rules": [{"backendRefs": [backend]}],
        });
        add_spec(&mut manifests, "TCPRoute", &format!("r-{index:05}"), &spec);
    }
    let start = Instant::now();
    let resolved = resolve(&manifests, &settings());
    let elapsed = start.elapsed();
    println!("resolved in {elapsed:?}, {} problems", resolved.problems.list().len());
    assert_eq!(resolved.table.listeners.len(), 5000);
    assert_eq!(resolved.statuses.tcp_routes.len(), 10_000);
    assert!(elapsed < Duration::from_secs(10), "took {elapsed:?}");
}

fn add_gateway_and_service(manifests: &mut Manifests, index: u32) {
    let (high, low) = (index / 250, index % 250);
    let listener = |port| json!({"name": format!("l{port}"), "port": port, "protocol": "TCP"});
    let listeners: Vec<Value> = (1..=4).map(listener).collect();
    let addresses = json!([{"value": format!("10.{high}.{low}.1")}]);
    let spec = json!({
        "gatewayClassName": "tcp", "addresses": addresses, "listeners": listeners,
        "allowedListeners": {"namespaces": {"from": "Same"}},
    });
    add_spec(manifests, "Gateway", &format!("gw-{index}"), &spec);

    let service = format!("s-{index}");
    add_spec(manifests, "Service", &service, &json!({"ports": [{"name": "db", "port": 3306}]}));
    let endpoint = |n| json!({"addresses": [format!("10.{}.{low}.{n}", 10 + high)]});
    let endpoints: Vec<Value> = (0..100).map(endpoint).collect();
    let labels = json!({"kubernetes.io/service-name": service});
    let slice = json!({
        "metadata": {"name": format!("{service}-1"), "namespace": "a", "labels": labels},
        "addressType": "IPv4",
        "ports": [{"name": "db", "port": 3306}],
        "endpoints": endpoints,
    });
    add(manifests, "EndpointSlice", slice);
}

fn add_spec(manifests: &mut Manifests, kind: &str, name: &str, spec: &Value) {
    add(manifests, kind, json!({"metadata": {"name": name, "namespace": "a"}, "spec": spec}));
}
