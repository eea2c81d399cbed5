//! Statuses in a cluster where others write too: what is theirs stays, what is ours comes back.

use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::apiserver::{Api, Channel, require_kubernetes};
use forwarder_tests::client::identity;
use forwarder_tests::cluster::{CONTROLLER, DEADLINE, GATEWAY_API, condition, has_condition};
use forwarder_tests::gateways::{
    class, gateway, gateway_spec, is_current, is_programmed, listener, listener_set, listeners, parent,
    route, route_spec,
};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::{Agent, Cluster, require_root, wait_until};
use serde_json::{Value, json};

/// How soon a status that somebody else has spoilt is as it was.
const RESTORED: Duration = Duration::from_secs(8);
/// How long others write as fast as they can.
const STORM: Duration = Duration::from_secs(5);
/// A time that was long ago.
const LONG_AGO: &str = "2020-01-01T00:00:00Z";

/// A cluster with an agent on one node.
struct One {
    agent: Agent,
    cluster: Cluster,
}

impl One {
    fn start() -> Self {
        let cluster = Cluster::start("v1.6.1", Channel::Standard).expect("a cluster");
        cluster.create_basics("apps").expect("a class and a namespace");
        let agent = cluster.start_agent(&cluster.node(), &[]).expect("an agent");
        Self { agent, cluster }
    }

    fn create(&self, path: &str, spec: &Value) {
        self.cluster.create_object(path, spec).expect("an object");
    }

    fn change(&self, path: &str, changes: &Value) {
        self.cluster.change(path, changes).expect("a change");
    }

    fn wait(&self, path: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        self.cluster.wait_object(path, condition).expect("an object as expected")
    }

    fn wait_restored(&self, path: &str, condition: impl FnMut(&Value) -> bool) -> Value {
        let path = format!("{GATEWAY_API}/{path}");
        self.cluster.api.wait_for(&path, RESTORED, condition).expect("a status as it was")
    }

    /// Waits until a Gateway is programmed as it stands.
    fn wait_programmed(&self, path: &str) -> Value {
        self.wait(path, |it| is_programmed(it, "True/Programmed 1/1 nodes") && is_current(it))
    }

    /// Waits until a route is accepted as it stands, with this message.
    fn wait_accepted(&self, path: &str, message: &str) -> Value {
        self.wait(path, |it| is_accepted(it, message))
    }
}

fn is_accepted(route: &Value, message: &str) -> bool {
    let conditions = &parent(route, CONTROLLER)["conditions"];
    condition(conditions, "Accepted").is_some_and(|it| it == format!("True/Accepted {message}"))
        && by_type(conditions, "Accepted")["observedGeneration"] == route["metadata"]["generation"]
}

/// A condition that is nobody's here.
fn foreign_condition(type_: &str) -> Value {
    json!({
        "type": format!("example.com/{type_}"),
        "status": "Unknown",
        "reason": "Odd",
        "message": "left by somebody else",
        "observedGeneration": 99,
        "lastTransitionTime": LONG_AGO,
    })
}

/// What another controller says of a route at a parent.
fn foreign_parent(controller: &str, parent_ref: &Value) -> Value {
    json!({
        "controllerName": controller,
        "parentRef": parent_ref,
        "conditions": [foreign_condition("Seen")],
    })
}

fn types(conditions: &Value) -> Vec<&str> {
    let conditions = conditions.as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().filter_map(|it| it["type"].as_str()).collect()
}

fn by_type<'a>(conditions: &'a Value, type_: &str) -> &'a Value {
    let conditions = conditions.as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().find(|it| it["type"] == type_).unwrap_or(&Value::Null)
}

/// Puts a condition of others before each.
fn mix(conditions: &mut Value) {
    let Some(conditions) = conditions.as_array_mut() else { return };
    let ours = std::mem::take(conditions);
    for (index, condition) in ours.into_iter().enumerate() {
        conditions.extend([foreign_condition(&format!("N{index}")), condition]);
    }
}

fn foreign_of(conditions: &Value) -> Vec<&Value> {
    let conditions = conditions.as_array().map_or(&[][..], Vec::as_slice);
    conditions.iter().filter(|it| it["reason"] == "Odd").collect()
}

#[test]
fn what_others_wrote_stays_where_it_is() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let one = One::start();
    one.create(&gateway("apps", "one"), &gateway_spec(&[("a", 5000)]));
    one.wait_programmed(&gateway("apps", "one"));
    the_parents_of_others_stay(&one);
    the_conditions_of_others_stay(&one);
    what_somebody_wiped_comes_back(&one);
    statuses_follow_the_spec(&one);
    a_class_goes_after_its_last_gateway(&one);
}

fn the_parents_of_others_stay(one: &One) {
    let path = route("apps", "route");
    let parent_ref = json!({ "name": "one", "sectionName": "a" });
    one.create(&path, &route_spec(&json!([parent_ref]), "none"));
    let full = one.wait_accepted(&path, "serves a")["spec"]["parentRefs"][0].clone();
    let elsewhere = json!({ "name": "elsewhere", "namespace": "other", "port": 77 });
    let edited = one.cluster.edit_status(&path, |status| {
        mix(&mut status["parents"][0]["conditions"]);
        let ours = status["parents"][0].take();
        let [before, after] =
            [foreign_parent("a.example/b", &full), foreign_parent("c.example/d", &elsewhere)];
        status["parents"] = json!([before, ours, after]);
    });
    let before = edited.expect("an edited status")["status"]["parents"].clone();

    one.change(&path, &json!({ "spec": { "rules": [{ "backendRefs": [{ "name": "other", "port": 1 }] }] } }));
    let route = one.wait(&path, |it| it["metadata"]["generation"] == 2 && is_accepted(it, "serves a"));
    let after = &route["status"]["parents"];
    assert_eq!((&after[0], &after[2]), (&before[0], &before[2]));
    assert_eq!(after[1]["parentRef"], full);
    let types_after = types(&after[1]["conditions"]);
    assert_eq!(types_after, ["example.com/N0", "Accepted", "example.com/N1", "ResolvedRefs"]);
    assert_eq!(foreign_of(&after[1]["conditions"]), foreign_of(&before[1]["conditions"]));

    let nowhere = json!([{ "name": "nowhere" }]);
    one.change(&path, &json!({ "spec": { "parentRefs": nowhere } }));
    let left = one.wait(&path, |it| parent(it, CONTROLLER).is_null());
    assert_eq!(left["status"]["parents"], json!([before[0], before[2]]));
    one.change(&path, &json!({ "spec": { "parentRefs": [parent_ref] } }));
    let back = one.wait_accepted(&path, "serves a");
    assert_eq!(back["status"]["parents"][0], before[0]);
    assert_eq!(back["status"]["parents"][1], before[2]);
}

fn the_conditions_of_others_stay(one: &One) {
    let (path, of_class) = (gateway("apps", "one"), class("forwarder"));
    let edit = |path: &str| {
        let edited = one.cluster.edit_status(path, |status| {
            mix(&mut status["conditions"]);
            mix(&mut status["listeners"][0]["conditions"]);
        });
        edited.expect("an edited status")["status"].clone()
    };
    let before = edit(&path);
    one.change(&path, &json!({ "spec": { "listeners": listeners(&[("a", 5000), ("b", 5001)]) } }));
    let after = one.wait_programmed_but_for_others(&path);
    let expected = ["example.com/N0", "Accepted", "example.com/N1", "Programmed"];
    assert_eq!(types(&after["conditions"]), expected);
    assert_eq!(foreign_of(&after["conditions"]), foreign_of(&before["conditions"]));
    let of_listener = |status: &Value| status["listeners"][0]["conditions"].clone();
    assert_eq!(types(&of_listener(&after)), types(&of_listener(&before)));
    assert_eq!(foreign_of(&of_listener(&after)).len(), 3);
    assert_eq!(foreign_of(&of_listener(&after)), foreign_of(&of_listener(&before)));

    let before = one.cluster.edit_status(&of_class, |status| mix(&mut status["conditions"]));
    let before = before.expect("an edited status")["status"]["conditions"].clone();
    one.change(&of_class, &json!({ "spec": { "description": "that of this test" } }));
    let is_new = |it: &Value| by_type(&it["status"]["conditions"], "Accepted")["observedGeneration"] == 2;
    let after = one.wait(&of_class, is_new)["status"]["conditions"].clone();
    assert_eq!(types(&after), types(&before));
    assert_eq!(foreign_of(&after), foreign_of(&before));
}

impl One {
    /// As [`Self::wait_programmed`], but for the conditions of others. Yields the status.
    fn wait_programmed_but_for_others(&self, path: &str) -> Value {
        let is_done = |it: &Value| {
            let programmed = by_type(&it["status"]["conditions"], "Programmed");
            programmed["status"] == "True" && programmed["observedGeneration"] == it["metadata"]["generation"]
        };
        self.wait(path, is_done)["status"].clone()
    }
}

fn what_somebody_wiped_comes_back(one: &One) {
    let spoil = |path: &str, status: &Value| {
        one.cluster.change_status(path, status).expect("a spoilt status");
    };
    let (path, of_route, of_class) = (gateway("apps", "one"), route("apps", "route"), class("forwarder"));
    let is_whole = |it: &Value| {
        is_programmed(it, "True/Programmed 1/1 nodes")
            && listener(it, "a")["attachedRoutes"] == 1
            && it["status"]["addresses"][0]["value"] == "10.0.1.1"
    };
    for wiped in [Value::Null, json!({ "conditions": [], "listeners": [], "addresses": [] })] {
        spoil(&path, &wiped);
        one.wait_restored(&path, is_whole);
    }
    spoil(&of_route, &json!({ "parents": [] }));
    one.wait_restored(&of_route, |it| is_accepted(it, "serves a"));
    spoil(&of_class, &json!({ "conditions": [], "supportedFeatures": [] }));
    one.wait_restored(&of_class, |it| {
        has_condition(&it["status"]["conditions"], "Accepted", "True/Accepted")
            && it["status"]["supportedFeatures"][0]["name"] == "Gateway"
    });

    // One whose status is changed, and one of which only the message is.
    let edit = |status: &mut Value| {
        for condition in status["conditions"].as_array_mut().into_iter().flatten() {
            condition["message"] = "spoilt".into();
            condition["lastTransitionTime"] = LONG_AGO.into();
            if condition["type"] == "Accepted" {
                condition["status"] = "False".into();
            }
        }
    };
    one.cluster.edit_status(&path, edit).expect("a spoilt status");
    let restored = one.wait_restored(&path, is_whole)["status"]["conditions"].clone();
    assert_eq!(condition(&restored, "Accepted").as_deref(), Some("True/Accepted"));
    assert_ne!(by_type(&restored, "Accepted")["lastTransitionTime"], LONG_AGO);
    assert_eq!(by_type(&restored, "Programmed")["lastTransitionTime"], LONG_AGO);
}

fn statuses_follow_the_spec(one: &One) {
    let path = gateway("apps", "one");
    let names = |it: &Value| -> Vec<String> {
        let listeners = it["status"]["listeners"].as_array().cloned().unwrap_or_default();
        listeners.iter().filter_map(|it| Some(it["name"].as_str()?.to_owned())).collect()
    };
    for ports in [&[("c", 5002), ("a", 5000)][..], &[("b", 5001)], &[("a", 5000), ("b", 5001)]] {
        one.change(&path, &json!({ "spec": { "listeners": listeners(ports) } }));
        let told = one.wait_programmed(&path);
        let expected: Vec<&str> = ports.iter().map(|(name, _)| *name).collect();
        assert_eq!(names(&told), expected);
        let generation = &told["metadata"]["generation"];
        let of_listeners = told["status"]["listeners"].as_array().into_iter().flatten();
        for condition in of_listeners.flat_map(|it| it["conditions"].as_array().into_iter().flatten()) {
            assert_eq!(condition["observedGeneration"], *generation, "{told:#}");
        }
    }
}

fn a_class_goes_after_its_last_gateway(one: &One) {
    const FINALIZER: &str = "gateway-exists-finalizer.gateway.networking.k8s.io";
    let of_class = class("brief");
    one.cluster.permit_class("brief").expect("a permission");
    one.create(&of_class, &json!({ "controllerName": CONTROLLER }));
    one.wait(&of_class, is_current);
    let paths = ["first", "last"].map(|name| gateway("apps", name));
    for (path, port) in paths.iter().zip([5100, 5101]) {
        let mut spec = gateway_spec(&[("a", port)]);
        spec["gatewayClassName"] = "brief".into();
        one.create(path, &spec);
        one.wait_programmed(path);
    }
    let has_finalizer = |it: &Value| it["metadata"]["finalizers"] == json!([FINALIZER]);
    one.wait(&of_class, has_finalizer);
    one.cluster.delete_object(&of_class).expect("a class that goes later");
    one.cluster.delete_object(&paths[0]).expect("a Gateway less");
    // What is left is served as before, and the class waits for it.
    one.change(&paths[1], &json!({ "spec": { "listeners": listeners(&[("a", 5102)]) } }));
    one.wait_programmed(&paths[1]);
    let class = one.cluster.object(&of_class).expect("a class that is still there");
    assert!(has_finalizer(&class), "{class:#}");
    one.cluster.delete_object(&paths[1]).expect("no Gateway any more");
    let path = format!("{GATEWAY_API}/{of_class}");
    one.cluster.api.wait_until_gone(&path, DEADLINE).expect("a class that is gone");
}

/// A server that says its name at `address`, and the Service of the same name.
fn serve(one: &One, name: &'static str, address: SocketAddr) -> Server {
    let topology = &one.cluster.topology;
    let host = if address.ip() == topology.backend1_address(0).ip() {
        &topology.backend1
    } else {
        &topology.backend2
    };
    one.cluster.create_backend("apps", name, &[address]).expect("a backend");
    Server::start(host, address, peer::identify(name)).expect("a server")
}

/// Waits until a server of this name answers at a port of the node.
#[track_caller]
fn wait_served(one: &One, port: u16, name: &str) {
    let topology = &one.cluster.topology;
    wait_until(&format!("{name} answers at {port}"), DEADLINE, || {
        identity(&topology.client, topology.node_address(port)).is_ok_and(|it| it == name)
    });
}

#[test]
fn of_two_routes_one_serves_and_listener_sets_serve_where_they_are_allowed() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let one = One::start();
    let topology = &one.cluster.topology;
    let _servers = [
        serve(&one, "first", topology.backend1_address(7001)),
        serve(&one, "second", topology.backend2_address(7002)),
    ];
    let mut spec = gateway_spec(&[("a", 5000)]);
    spec["allowedListeners"] = json!({ "namespaces": { "from": "Same" } });
    one.create(&gateway("apps", "one"), &spec);
    the_oldest_route_serves_and_then_the_next(&one);
    listener_sets_serve_where_they_are_allowed(&one);
}

fn the_oldest_route_serves_and_then_the_next(one: &One) {
    let [winner, loser] = ["first", "second"].map(|name| route("apps", name));
    for name in ["first", "second"] {
        one.create(&route("apps", name), &route_spec(&json!([{ "name": "one", "sectionName": "a" }]), name));
    }
    one.wait_accepted(&winner, "serves a");
    let message = "superseded on a by apps/first: the older route, or the first by name, gets every connection and this one none";
    one.wait_accepted(&loser, message);
    one.wait(&gateway("apps", "one"), |it| listener(it, "a")["attachedRoutes"] == 2);
    wait_served(one, 5000, "first");
    one.cluster.delete_object(&winner).expect("a route less");
    one.wait_accepted(&loser, "serves a");
    one.wait(&gateway("apps", "one"), |it| listener(it, "a")["attachedRoutes"] == 1);
    wait_served(one, 5000, "second");
}

fn listener_sets_serve_where_they_are_allowed(one: &One) {
    one.cluster.api.create_namespace("other").expect("a namespace");
    let [allowed, refused] = ["apps", "other"].map(|namespace| listener_set(namespace, "set"));
    for (path, port) in [(&allowed, 5100), (&refused, 5101)] {
        let parent = json!({ "name": "one", "namespace": "apps" });
        one.create(path, &json!({ "parentRef": parent, "listeners": listeners(&[("s", port)]) }));
    }
    let to_set = json!([{
        "group": "gateway.networking.k8s.io", "kind": "ListenerSet", "name": "set", "sectionName": "s",
    }]);
    one.create(&route("apps", "to-set"), &route_spec(&to_set, "first"));
    let accepted = one.wait_accepted(&route("apps", "to-set"), "serves s");
    assert_eq!(accepted["status"]["parents"][0]["parentRef"], to_set[0]);
    wait_served(one, 5100, "first");

    // The port is open, and told so, a moment before or after the route is counted.
    let told = one.wait(&allowed, |it| {
        is_programmed(it, "True/Programmed 1/1 nodes")
            && is_current(it)
            && listener(it, "s")["attachedRoutes"] == 1
    });
    assert!(has_condition(&told["status"]["conditions"], "Accepted", "True/Accepted"), "{told:#}");
    let of_listener = listener(&told, "s");
    assert_eq!(of_listener["attachedRoutes"], 1);
    assert!(has_condition(&of_listener["conditions"], "Programmed", "True/Programmed"), "{told:#}");
    let told = one.wait(&refused, |it| is_programmed(it, "False/NotAllowed") && is_current(it));
    assert!(has_condition(&told["status"]["conditions"], "Accepted", "False/NotAllowed"), "{told:#}");
    let counts = |count: u32| move |it: &Value| it["status"]["attachedListenerSets"] == count;
    one.wait(&gateway("apps", "one"), counts(1));

    let all = json!({ "spec": { "allowedListeners": { "namespaces": { "from": "All" } } } });
    one.change(&gateway("apps", "one"), &all);
    one.wait(&refused, |it| is_programmed(it, "True/Programmed 1/1 nodes"));
    one.wait(&gateway("apps", "one"), counts(2));
    one.cluster.delete_object(&allowed).expect("a set less");
    one.wait(&gateway("apps", "one"), counts(1));
    // The route's parent is gone, and with it what was said of it.
    one.wait(&route("apps", "to-set"), |it| parent(it, CONTROLLER).is_null());
}

/// Writes something as fast as the API server allows, a number each time. Yields the last number.
fn storm(end: Instant, write: impl Fn(u64)) -> u64 {
    let numbers = (1..).take_while(|_| Instant::now() < end);
    numbers.inspect(|number| write(*number)).last().unwrap_or_default()
}

/// Sets the message of a condition of others, or adds it.
fn set_foreign(conditions: &mut Value, number: u64) {
    let Some(conditions) = conditions.as_array_mut() else { return };
    let mut condition = foreign_condition("Storm");
    condition["message"] = number.to_string().into();
    conditions.retain(|it| it["type"] != condition["type"]);
    conditions.insert(0, condition);
}

fn annotate(api: &Api, path: &str, number: u64) {
    let changes = json!({ "metadata": { "annotations": { "example.com/storm": number.to_string() } } });
    api.patch(&format!("{GATEWAY_API}/{path}"), &changes).expect("an annotation");
}

/// The last numbers of each kind of what others wrote to the Gateway and the route.
struct Storm {
    annotations: [u64; 2],
    condition: u64,
    parent: u64,
}

impl Storm {
    /// Has others write while the route changes.
    fn run(one: &One, paths: [&str; 2], change: impl Fn(u64) + Sync) -> Self {
        let end = Instant::now() + STORM;
        let cluster = &one.cluster;
        let on_status = |path: &str, edit: &dyn Fn(&mut Value)| {
            cluster.edit_status(path, edit).expect("a status of others");
        };
        thread::scope(|scope| {
            let annotations = paths
                .map(|path| scope.spawn(move || storm(end, |number| annotate(&cluster.api, path, number))));
            let condition = scope.spawn(|| {
                storm(end, |number| {
                    on_status(paths[0], &|status| set_foreign(&mut status["conditions"], number));
                })
            });
            let parent = scope.spawn(|| {
                storm(end, |number| on_status(paths[1], &|status| set_parent(&mut status["parents"], number)))
            });
            storm(end, change);
            Self {
                annotations: annotations.map(|it| it.join().expect("no panic")),
                condition: condition.join().expect("no panic"),
                parent: parent.join().expect("no panic"),
            }
        })
    }
}

fn set_parent(parents: &mut Value, number: u64) {
    let Some(parents) = parents.as_array_mut() else { return };
    let mut entry = foreign_parent("storm.example/it", &json!({ "name": "one" }));
    set_foreign(&mut entry["conditions"], number);
    parents.retain(|it| it["controllerName"] != entry["controllerName"]);
    parents.insert(0, entry);
}

#[test]
fn a_storm_of_writes_by_others_loses_nothing_of_anybody() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let one = One::start();
    let paths = [gateway("apps", "one"), route("apps", "route")];
    one.create(&paths[0], &gateway_spec(&[("a", 5000), ("b", 5001)]));
    let to = |section: &str| json!([{ "name": "one", "sectionName": section }]);
    one.create(&paths[1], &route_spec(&to("a"), "none"));
    one.wait_programmed(&paths[0]);
    one.wait_accepted(&paths[1], "serves a");

    let last = Storm::run(&one, paths.each_ref().map(String::as_str), |number| {
        let section = if number % 2 == 0 { "a" } else { "b" };
        one.change(&paths[1], &json!({ "spec": { "parentRefs": to(section) } }));
        let second = route("apps", "second");
        one.create(&second, &route_spec(&to("a"), "none"));
        one.cluster.delete_object(&second).expect("a route less");
    });
    one.change(&paths[1], &json!({ "spec": { "parentRefs": to("b") } }));

    let told = one.wait(&paths[1], |it| is_accepted(it, "serves b"));
    let storm = parent(&told, "storm.example/it");
    assert_eq!(by_type(&storm["conditions"], "example.com/Storm")["message"], last.parent.to_string());
    assert_eq!(told["status"]["parents"].as_array().map(Vec::len), Some(2), "{told:#}");
    assert_eq!(told["metadata"]["annotations"]["example.com/storm"], last.annotations[1].to_string());
    let attached = |it: &Value| ["a", "b"].map(|name| listener(it, name)["attachedRoutes"].clone());
    let told = one.wait(&paths[0], |it| attached(it) == [0, 1]);
    assert!(is_programmed(&told, "True/Programmed 1/1 nodes"), "{told:#}");
    let conditions = &told["status"]["conditions"];
    assert_eq!(types(conditions), ["example.com/Storm", "Accepted", "Programmed"]);
    assert_eq!(by_type(conditions, "example.com/Storm")["message"], last.condition.to_string());
    assert_eq!(told["metadata"]["annotations"]["example.com/storm"], last.annotations[0].to_string());

    let metrics = one.agent.metrics().unwrap();
    let writes = |result| metrics.sum("forwarder_kube_status_writes_total", &[("result", result)]);
    assert!(writes("conflict") > 0, "nobody was ever faster");
    assert_eq!(writes("failed"), 0, "{}", one.agent.log());
}
