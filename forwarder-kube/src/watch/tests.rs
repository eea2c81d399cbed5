use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::fake::FakeApi;
use super::*;

const ALL: [(&str, &[&str]); 5] = [
    ("gatewayclasses", &["v1"]),
    ("gateways", &["v1"]),
    ("listenersets", &["v1"]),
    ("tcproutes", &["v1"]),
    ("referencegrants", &["v1"]),
];

/// As long as anything may take. The clock stands still while nobody waits for it, so that this is no time at all.
const LONG: Duration = Duration::from_mins(10);

fn settings() -> KubeSettings {
    KubeSettings::alone()
}

fn service(name: &str) -> Value {
    json!({ "metadata": { "namespace": "db", "name": name }, "spec": { "ports": [{ "port": 1 }] } })
}

fn route(name: &str) -> Value {
    json!({ "metadata": { "namespace": "db", "name": name }, "spec": { "parentRefs": [{ "name": "gw" }] } })
}

impl KubeSource {
    /// Waits until what is read fulfils a condition.
    async fn until(&mut self, what: &str, mut condition: impl FnMut(&Loaded) -> bool) {
        let fulfilled = self.loaded.wait_for(|loaded| condition(loaded));
        timeout(LONG, fulfilled).await.unwrap_or_else(|_| panic!("never: {what}")).unwrap();
    }
}

fn services(loaded: &Loaded) -> Vec<String> {
    loaded.manifests.services.keys().map(|name| name.name.clone()).collect()
}

fn has_problem(loaded: &Loaded, part: &str) -> bool {
    loaded.problems.iter().any(|problem| problem.message.contains(part))
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_too_old_starts_over_and_misses_nothing() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    api.put("services", service("b"));
    let mut source = watch(api.client(), &settings(), None);
    source.until("both", |loaded| services(loaded) == ["a", "b"]).await;
    // What stays is never missing while everything is listed again.
    let mut loaded = source.loaded.clone();
    let stays = tokio::spawn(async move {
        while loaded.changed().await.is_ok() {
            assert!(services(&loaded.borrow_and_update()).contains(&"a".to_owned()));
        }
    });
    api.lose("services", "db/b");
    let before = api.lists("services");
    api.expire();
    source.until("b is gone", |loaded| services(loaded) == ["a"]).await;
    assert!(api.lists("services") > before);
    api.put("services", service("c"));
    source.until("c came", |loaded| services(loaded) == ["a", "c"]).await;
    api.delete("services", "db/c");
    source.until("c went", |loaded| services(loaded) == ["a"]).await;
    stays.abort();
    // It would have panicked before.
    assert!(stays.await.unwrap_err().is_cancelled());
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_is_refused_for_its_age_starts_over() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    let mut source = watch(api.client(), &settings(), None);
    source.until("the service", |loaded| services(loaded) == ["a"]).await;
    for name in ["b", "c"] {
        api.put("services", service(name));
        api.forget();
        source.until("the other", |loaded| services(loaded).contains(&name.to_owned())).await;
    }
    // It is no problem that anybody would have to look at.
    assert!(source.loaded.borrow().problems.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_version_that_is_not_served_any_more_is_left_for_one_that_is() {
    let old: Vec<(&str, &[&str])> = ALL
        .iter()
        .map(|(kind, _)| (*kind, if *kind == "tcproutes" { &["v1alpha2"][..] } else { &["v1"][..] }))
        .collect();
    let api = FakeApi::new(&old);
    api.put("tcproutes", route("a"));
    let mut source = watch(api.client(), &settings(), None);
    source.until("the route", |loaded| loaded.manifests.tcp_routes.len() == 1).await;
    let version = |source: &KubeSource| {
        source.health.served().find_map(|(kind, version)| version.filter(|_| kind == Kind::TcpRoute))
    };
    assert_eq!(version(&source).as_deref(), Some("v1alpha2"));
    // No CRD tells of it: the watch finds its path gone.
    api.serve(&ALL);
    api.refuse("GET /apis/gateway.networking.k8s.io/v1alpha2/tcproutes", 404, u32::MAX);
    api.expire();
    api.put("tcproutes", route("b"));
    source.until("both routes", |loaded| loaded.manifests.tcp_routes.len() == 2).await;
    assert_eq!(version(&source).as_deref(), Some("v1"));
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_comes_later_is_read_then() {
    let api = FakeApi::new(&ALL[..2]);
    let mut source = watch(api.client(), &settings(), None);
    source.until("the others", |loaded| has_problem(loaded, "does not serve tcproutes")).await;
    api.serve(&ALL);
    api.put("tcproutes", route("a"));
    source.until("the route", |loaded| loaded.manifests.tcp_routes.len() == 1).await;
    assert!(!has_problem(&source.loaded.borrow(), "does not serve"));
}

#[tokio::test(start_paused = true)]
async fn a_kind_that_is_refused_is_said_so_and_does_not_hold_up_the_others() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    api.refuse("GET /apis/gateway.networking.k8s.io/v1/referencegrants", 403, 30);
    let mut source = watch(api.client(), &settings(), None);
    source.until("the service", |loaded| services(loaded) == ["a"]).await;
    assert!(has_problem(&source.loaded.borrow(), "cannot follow referencegrants"));
    source.until("the grants", |loaded| loaded.problems.is_empty()).await;
    let refused = source.health.failures().find(|(kind, _)| *kind == Kind::ReferenceGrant);
    assert_eq!(refused.map(|(_, count)| count), Some(30));
}

#[tokio::test(start_paused = true)]
async fn nothing_is_in_force_before_everything_has_been_read() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    api.put("tcproutes", route("a"));
    api.refuse("GET /apis/gateway.networking.k8s.io/v1/tcproutes", 500, 3);
    let source = watch(api.client(), &settings(), None);
    let mut loaded = source.loaded.clone();
    timeout(LONG, loaded.changed()).await.unwrap().unwrap();
    assert_eq!(loaded.borrow().manifests.tcp_routes.len(), 1);
    assert_eq!(services(&loaded.borrow()), ["a"]);
}

#[tokio::test(start_paused = true)]
async fn the_kept_state_is_in_force_while_the_api_does_not_answer() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    let state = tempfile::tempdir().unwrap();
    let settings = KubeSettings { state_dir: Some(state.path().to_owned()), ..settings() };
    let mut source = watch(api.client(), &settings, None);
    source.until("the service", |loaded| services(loaded) == ["a"]).await;
    let written = async {
        while !state.path().join("last-known.yaml").exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(LONG, written).await.unwrap();
    drop(source);

    api.refuse("GET ", 503, 200);
    let mut source = watch(api.client(), &settings, None);
    source.until("the kept service", |loaded| services(loaded) == ["a"]).await;
    assert!(source.health.is_stale());
    api.put("services", service("b"));
    source.until("both", |loaded| services(loaded) == ["a", "b"]).await;
    assert!(!source.health.is_stale());
}

#[tokio::test(start_paused = true)]
async fn an_api_that_answers_in_part_does_not_take_the_kept_state_away() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    let state = tempfile::tempdir().unwrap();
    let file = state.path().join("last-known.yaml");
    let settings = KubeSettings { state_dir: Some(state.path().to_owned()), ..settings() };
    let mut source = watch(api.client(), &settings, None);
    source.until("the service", |loaded| services(loaded) == ["a"]).await;
    let written = async {
        while !file.exists() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(LONG, written).await.unwrap();
    drop(source);
    let kept = std::fs::read_to_string(&file).unwrap();

    // It says what it serves, as one whose storage is away does, and lists nothing.
    api.refuse("GET /api/v1/services", 500, 40);
    api.put("services", service("b"));
    let mut source = watch(api.client(), &settings, None);
    source.until("the kept service", |loaded| services(loaded) == ["a"]).await;
    let others = tokio::time::sleep(Duration::from_mins(2));
    tokio::pin!(others);
    loop {
        tokio::select! {
            () = &mut others => break,
            changed = source.loaded.changed() => {
                changed.unwrap();
                assert_eq!(services(&source.loaded.borrow_and_update()), ["a"]);
            }
        }
    }
    assert!(source.health.is_stale());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), kept);
    source.until("both", |loaded| services(loaded) == ["a", "b"]).await;
    assert!(!source.health.is_stale());
}

#[tokio::test(start_paused = true)]
async fn a_kind_whose_crd_is_there_is_waited_for_until_it_is_served() {
    let api = FakeApi::new(&ALL);
    api.put("services", service("a"));
    api.put("tcproutes", route("a"));
    // As for a moment after the start of an API server.
    api.serve(&ALL[..2]);
    let mut source = watch(api.client(), &settings(), None);
    let first = source.loaded.changed();
    assert!(timeout(Duration::from_secs(5), first).await.is_err(), "something was in force");
    api.serve(&ALL);
    source.loaded.changed().await.unwrap();
    assert_eq!(source.loaded.borrow().manifests.tcp_routes.len(), 1);
}
