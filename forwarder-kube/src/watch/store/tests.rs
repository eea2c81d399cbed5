use serde_json::json;

use super::*;
use crate::watch::kinds::resource;
use crate::watch::records::ObservedObject;

fn scope(kind: Kind) -> Scope {
    Scope { kind, namespace: None }
}

fn id(kind: Kind, namespace: &str, name: &str) -> ObjectRef {
    ObjectRef { kind: kind.as_str().to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
}

fn service(namespace: &str, name: &str, port: i64) -> News {
    let object = json!({
        "metadata": { "namespace": namespace, "name": name }, "spec": { "ports": [{ "port": port }] },
    });
    News::Put(Box::new(Item {
        id: id(Kind::Service, namespace, name),
        manifest: Ok(Manifest::Service(
            serde_json::from_value::<forwarder_gateway::manifests::Service>(object).unwrap().into(),
        )),
        record: ObservedObject::default(),
    }))
}

fn slice(name: &str, of_service: &str) -> News {
    let object = json!({
        "metadata": { "namespace": "db", "name": name, "labels": { "kubernetes.io/service-name": of_service } },
    });
    let slice: forwarder_gateway::manifests::EndpointSlice = serde_json::from_value(object).unwrap();
    News::Put(Box::new(Item {
        id: id(Kind::EndpointSlice, "db", name),
        manifest: Ok(Manifest::EndpointSlice(slice.into())),
        record: ObservedObject::default(),
    }))
}

struct Fixture(Store);

impl Fixture {
    fn new(kinds: &[Kind]) -> Self {
        let mut store = Store::default();
        for kind in kinds {
            store.begin(scope(*kind), 1);
        }
        Self(store)
    }

    fn tell(&mut self, kind: Kind, news: impl IntoIterator<Item = News>) -> Vec<bool> {
        let message = |news| Message { scope: scope(kind), epoch: 1, news };
        news.into_iter().map(|news| self.0.take_in(message(news))).collect()
    }

    fn services(&mut self) -> Vec<String> {
        self.0.loaded().manifests.services.keys().map(ToString::to_string).collect()
    }

    fn problems(&mut self) -> Vec<String> {
        self.0.loaded().problems.iter().map(|problem| problem.message.clone()).collect()
    }
}

fn refused(code: Option<u16>) -> News {
    News::Failed(WatchFailure { message: "refused".to_owned(), code })
}

#[test]
fn it_is_complete_when_every_list_has_ended() {
    let mut store = Fixture::new(&[Kind::Service, Kind::EndpointSlice]);
    store.tell(Kind::Service, [News::ListBegins, service("db", "a", 1), News::ListEnds]);
    assert!(!store.0.is_complete(false));
    store.tell(Kind::EndpointSlice, [News::ListBegins, News::ListEnds]);
    assert!(store.0.is_complete(false));
}

#[test]
fn a_list_told_anew_takes_away_what_it_does_not_name_at_its_end() {
    let mut store = Fixture::new(&[Kind::Service]);
    store.tell(
        Kind::Service,
        [News::ListBegins, service("db", "a", 1), service("db", "b", 1), News::ListEnds],
    );
    store.tell(Kind::Service, [News::ListBegins, service("db", "c", 1)]);
    assert_eq!(store.services(), ["db/a", "db/b", "db/c"]);
    // A list that breaks off and begins again.
    store.tell(Kind::Service, [refused(None), News::ListBegins, service("db", "b", 1), News::ListEnds]);
    assert_eq!(store.services(), ["db/b"]);
}

#[test]
fn a_list_of_one_namespace_leaves_the_others_alone() {
    let mut store = Fixture::new(&[]);
    for namespace in ["one", "two"] {
        let scope = Scope { kind: Kind::Service, namespace: Some(namespace.to_owned()) };
        store.0.begin(scope.clone(), 1);
        for news in [News::ListBegins, service(namespace, "a", 1), News::ListEnds] {
            store.0.take_in(Message { scope: scope.clone(), epoch: 1, news });
        }
    }
    let scope = Scope { kind: Kind::Service, namespace: Some("two".to_owned()) };
    for news in [News::ListBegins, News::ListEnds] {
        store.0.take_in(Message { scope: scope.clone(), epoch: 1, news });
    }
    assert_eq!(store.services(), ["one/a"]);
}

#[test]
fn news_of_a_former_watch_is_not_heard() {
    let mut store = Fixture::new(&[Kind::Service]);
    store.tell(Kind::Service, [News::ListBegins, service("db", "a", 1), News::ListEnds]);
    store.0.begin(scope(Kind::Service), 2);
    assert_eq!(store.tell(Kind::Service, [News::Gone(id(Kind::Service, "db", "a"))]), [false]);
    assert_eq!(store.services(), ["db/a"]);
    // The new watch is not waited for: what the former has told is complete.
    assert!(store.0.is_complete(false));
}

#[test]
fn a_slice_may_move_to_another_service() {
    let mut store = Fixture::new(&[Kind::EndpointSlice]);
    store.tell(Kind::EndpointSlice, [News::ListBegins, slice("x", "a"), News::ListEnds, slice("x", "b")]);
    let services: Vec<String> =
        store.0.loaded().manifests.endpoint_slices.keys().map(ToString::to_string).collect();
    assert_eq!(services, ["db/b"]);
}

#[test]
fn an_object_that_cannot_be_read_stays_as_it_was_and_is_told() {
    let mut store = Fixture::new(&[Kind::Service]);
    store.tell(Kind::Service, [News::ListBegins, service("db", "a", 1), News::ListEnds]);
    let broken = |name: &str| {
        let id = id(Kind::Service, "db", name);
        let manifest = Err("ports is a text".to_owned());
        News::Put(Box::new(Item { id, manifest, record: ObservedObject::default() }))
    };
    store.tell(Kind::Service, [broken("a"), broken("b")]);
    assert_eq!(store.services(), ["db/a"]);
    let problems = store.problems().join("\n");
    assert!(problems.contains("ports is a text; the version before stays in force"), "{problems}");
    assert!(problems.contains("ports is a text; the object is left out"), "{problems}");
    store.tell(Kind::Service, [service("db", "a", 2), News::Gone(id(Kind::Service, "db", "b"))]);
    assert!(!store.problems().join("\n").contains("ports is a text"));
}

#[test]
fn a_kind_that_is_refused_holds_up_the_others_for_a_while_only() {
    let mut store = Fixture::new(&[Kind::Service, Kind::ReferenceGrant]);
    store.tell(Kind::Service, [News::ListBegins, News::ListEnds]);
    assert_eq!(
        store.tell(Kind::ReferenceGrant, [News::ListBegins, refused(Some(403)), refused(Some(403))]),
        [true, true, false]
    );
    assert!(!store.0.is_complete(false));
    assert!(store.0.is_complete(true));
    assert!(store.problems().iter().any(|it| it == "cannot follow referencegrants: refused"));
    // An API server that cannot be reached, or not answer, has refused nothing: nothing is known of the kind.
    for code in [None, Some(500), Some(503), Some(429), Some(401)] {
        store.tell(Kind::ReferenceGrant, [refused(code)]);
        assert!(!store.0.is_complete(true), "{code:?}");
    }
    store.tell(Kind::ReferenceGrant, [News::ListBegins, News::ListEnds]);
    assert!(store.0.is_complete(false));
    assert!(!store.problems().iter().any(|it| it.contains("referencegrants: refused")));
}

#[test]
fn a_kind_that_is_not_served_is_told() {
    let mut store = Fixture::new(&[]);
    let served: Served = [(Kind::Gateway, resource(Kind::Gateway, "v1"))].into();
    store.0.set_served(&Arc::new(served));
    let problems = store.problems();
    assert!(problems.iter().any(|it| it.contains("does not serve tcproutes")), "{problems:?}");
    assert!(!problems.iter().any(|it| it.contains("does not serve gateways")), "{problems:?}");
}

#[test]
fn the_release_is_that_of_all_crds() {
    let mut store = Store::default();
    let release = |version: &str| Some(version.to_owned());
    let crd = |plural: &str| format!("{plural}.gateway.networking.k8s.io");
    assert_eq!(store.loaded().manifests.api_release, ApiRelease::Unknown);
    store.set_release(&crd("gateways"), release("v1.5.1"));
    store.set_release(&crd("tcproutes"), release("v1.6.1"));
    let both = ["v1.5.1".to_owned(), "v1.6.1".to_owned()];
    assert_eq!(store.loaded().manifests.api_release, ApiRelease::Installed(both.into()));
    store.set_release(&crd("gateways"), None);
    assert_eq!(store.loaded().manifests.api_release, ApiRelease::Unknown);
    store.forget_release(&crd("gateways"));
    assert_eq!(store.loaded().manifests.api_release, ApiRelease::Installed(["v1.6.1".to_owned()].into()));
    store.retain_releases(&BTreeSet::new());
    assert_eq!(store.loaded().manifests.api_release, ApiRelease::Unknown);
}

fn route(name: &str) -> News {
    let route: forwarder_gateway::manifests::TcpRoute =
        serde_json::from_value(json!({ "metadata": { "name": name } })).unwrap();
    News::Put(Box::new(Item {
        id: id(Kind::TcpRoute, "db", name),
        manifest: Ok(Manifest::TcpRoute(route.into())),
        record: ObservedObject::default(),
    }))
}

#[test]
fn all_objects_of_a_kind_go_and_no_others() {
    let mut store = Fixture::new(&[Kind::TcpRoute, Kind::Service]);
    store.tell(Kind::TcpRoute, [News::ListBegins, route("a"), News::ListEnds]);
    store.tell(Kind::Service, [News::ListBegins, service("db", "a", 1), News::ListEnds]);
    // That it is not served for a moment, as while an API server starts, takes nothing away.
    store.0.end(&scope(Kind::TcpRoute));
    assert_eq!(store.0.loaded().manifests.tcp_routes.len(), 1);
    store.0.set_release("tcproutes.gateway.networking.k8s.io", None);
    assert!(store.0.has_crd(Kind::TcpRoute) && !store.0.has_crd(Kind::Gateway));
    assert!(store.0.remove_kind(Kind::TcpRoute));
    assert!(!store.0.remove_kind(Kind::TcpRoute));
    assert_eq!(store.0.loaded().manifests.tcp_routes.len(), 0);
    assert!(store.0.records().objects.is_empty());
    assert_eq!(store.services(), ["db/a"]);
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_does_not_come_again_is_over() {
    let after = Duration::from_secs(30);
    let mut store = Fixture::new(&[Kind::Service, Kind::ReferenceGrant]);
    store.tell(Kind::Service, [News::ListBegins, News::ListEnds, refused(None)]);
    store.tell(Kind::ReferenceGrant, [News::ListBegins, refused(Some(403))]);
    assert!(!store.0.forgive(after));
    tokio::time::advance(Duration::from_secs(31)).await;
    assert!(store.0.forgive(after));
    // What was never read is not well because nobody says otherwise.
    let problems = store.problems().join("\n");
    assert!(!problems.contains("services") && problems.contains("referencegrants: refused"), "{problems}");
}

#[test]
fn a_watch_that_is_too_old_is_no_problem() {
    let mut store = Fixture::new(&[Kind::Service]);
    store.tell(Kind::Service, [News::ListBegins, service("db", "a", 1), News::ListEnds]);
    let before = store.problems();
    assert_eq!(store.tell(Kind::Service, [refused(Some(410))]), [false]);
    assert_eq!(store.problems(), before);
}
