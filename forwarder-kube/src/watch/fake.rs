//! A Kubernetes API in this process, for the faults that a real one shows by luck only.
//!
//! It lists, watches, patches and refuses. What it does not know it answers with 404, as an API server does.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::stream;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use kube::client::Body;
use serde_json::{Value, json};
use tokio::sync::watch;

use forwarder_runtime::lock::lock;

const CRDS: &str = "customresourcedefinitions";
const GROUP: &str = "/apis/gateway.networking.k8s.io";

/// The body of an answer.
type Answer = UnsyncBoxBody<Bytes, Infallible>;

/// The API. Clones are the same one.
#[derive(Clone)]
pub(crate) struct FakeApi(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// Counts whatever watches should look at.
    changes: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// Objects by collection, such as `services`, and by name.
    objects: BTreeMap<String, BTreeMap<String, Value>>,
    /// What happened to a collection: version, kind of event, object.
    history: Vec<(u64, String, &'static str, Value)>,
    /// What is older is not remembered.
    compacted: u64,
    /// How often watches were told that they are too old, and how often they just ended.
    expiries: u64,
    ends: u64,
    /// The versions of the kinds of the Gateway API that are served.
    served: BTreeMap<String, Vec<String>>,
    /// Requests to be refused: the start of method and path, the code, how many.
    refusals: Vec<(String, u16, u32)>,
    /// Before how many of the next patches of a collection somebody else is faster.
    disturbances: BTreeMap<String, u32>,
    /// A field of statuses that this API does not know.
    unknown_field: Option<&'static str>,
    /// Every request that writes, with its body.
    writes: Vec<(String, Value)>,
    /// Every list.
    lists: BTreeMap<String, u32>,
}

impl FakeApi {
    /// An API that serves these kinds of the Gateway API, such as `("gateways", &["v1"])`.
    pub(crate) fn new(served: &[(&str, &[&str])]) -> Self {
        let api = Self(Arc::new(Inner { state: Mutex::default(), changes: watch::channel(0).0 }));
        api.serve(served);
        api
    }

    /// Serves these kinds from now on.
    pub(crate) fn serve(&self, served: &[(&str, &[&str])]) {
        let owned = |(kind, versions): &(&str, &[&str])| {
            ((*kind).to_owned(), versions.iter().map(|version| (*version).to_owned()).collect())
        };
        lock(&self.0.state).served = served.iter().map(owned).collect();
        for (plural, _) in served {
            let name = format!("{plural}.gateway.networking.k8s.io");
            if self.get(CRDS, &name).is_none() {
                self.put(CRDS, json!({ "metadata": { "name": name } }));
            }
        }
        self.changed();
    }

    pub(crate) fn client(&self) -> kube::Client {
        let api = self.clone();
        let service = tower::service_fn(move |request| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.answer(request).await) }
        });
        kube::Client::new(service, "default")
    }

    /// Makes an object, or replaces it.
    pub(crate) fn put(&self, collection: &str, mut object: Value) {
        let mut state = lock(&self.0.state);
        state.version += 1;
        let version = state.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        let known = state.objects.entry(collection.to_owned()).or_default();
        let event = if known.insert(key(&object), object.clone()).is_some() { "MODIFIED" } else { "ADDED" };
        state.history.push((version, collection.to_owned(), event, object));
        drop(state);
        self.changed();
    }

    /// Deletes an object such as `namespace/name`.
    pub(crate) fn delete(&self, collection: &str, name: &str) {
        let mut state = lock(&self.0.state);
        state.version += 1;
        let version = state.version;
        let known = state.objects.get_mut(collection);
        let mut object = known.and_then(|known| known.remove(name)).expect("an object that is there");
        object["metadata"]["resourceVersion"] = version.to_string().into();
        state.history.push((version, collection.to_owned(), "DELETED", object));
        drop(state);
        self.changed();
    }

    pub(crate) fn get(&self, collection: &str, name: &str) -> Option<Value> {
        lock(&self.0.state).objects.get(collection)?.get(name).cloned()
    }

    /// Refuses the next `times` requests that begin like this: `GET /api/v1/services`.
    pub(crate) fn refuse(&self, start: &str, code: u16, times: u32) {
        lock(&self.0.state).refusals.push((start.to_owned(), code, times));
    }

    /// Forgets what has happened, and tells every watch that it is too old.
    pub(crate) fn expire(&self) {
        let mut state = lock(&self.0.state);
        state.version += 1;
        state.compacted = state.version;
        state.expiries += 1;
        drop(state);
        self.changed();
    }

    /// Forgets what has happened, and ends every watch without a word: it is refused when it comes back.
    pub(crate) fn forget(&self) {
        let mut state = lock(&self.0.state);
        state.version += 1;
        state.compacted = state.version;
        state.ends += 1;
        drop(state);
        self.changed();
    }

    /// Deletes an object so that no watch is told.
    pub(crate) fn lose(&self, collection: &str, name: &str) {
        let mut state = lock(&self.0.state);
        state.objects.get_mut(collection).and_then(|known| known.remove(name)).expect("an object");
    }

    /// Has somebody else be faster before the next `times` patches of objects of a collection.
    pub(crate) fn disturb(&self, collection: &str, times: u32) {
        lock(&self.0.state).disturbances.insert(collection.to_owned(), times);
    }

    /// Drops this field of every status, as one that the CRD does not know.
    pub(crate) fn drop_field(&self, field: &'static str) {
        lock(&self.0.state).unknown_field = Some(field);
    }

    /// The writes so far: method and path, and body.
    pub(crate) fn writes(&self) -> Vec<(String, Value)> {
        lock(&self.0.state).writes.clone()
    }

    /// How often a collection was listed.
    pub(crate) fn lists(&self, collection: &str) -> u32 {
        lock(&self.0.state).lists.get(collection).copied().unwrap_or_default()
    }

    fn changed(&self) {
        self.0.changes.send_modify(|count| *count += 1);
    }

    async fn answer(&self, request: Request<Body>) -> Response<Answer> {
        let (parts, body) = request.into_parts();
        let line = format!("{} {}", parts.method, parts.uri.path());
        let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        if let Some(code) = self.refusal(&line) {
            return status(code);
        }
        let path = parts.uri.path();
        let query = parts.uri.query().unwrap_or_default();
        if path == "/apis" {
            return self.groups();
        }
        if let Some(version) = path.strip_prefix(&format!("{GROUP}/")).filter(|rest| !rest.contains('/')) {
            return self.resources(version);
        }
        let Some((collection, name)) = self.resolve(path) else { return status(404) };
        if parts.method == Method::PATCH {
            let body = serde_json::from_slice(&body).unwrap_or_default();
            return self.patch(&line, &collection, &name, body);
        }
        if query.contains("watch=") {
            let from = parameter(query, "resourceVersion").and_then(|it| it.parse().ok()).unwrap_or_default();
            return self.watch(collection, from);
        }
        match name.as_str() {
            "" => self.list(&collection),
            name => self.get(&collection, name).map_or_else(|| status(404), |object| json_response(&object)),
        }
    }

    fn refusal(&self, line: &str) -> Option<u16> {
        let mut state = lock(&self.0.state);
        let refusal =
            state.refusals.iter_mut().find(|(start, _, left)| line.starts_with(start) && *left > 0)?;
        refusal.2 -= 1;
        Some(refusal.1)
    }

    fn groups(&self) -> Response<Answer> {
        let state = lock(&self.0.state);
        let mut versions: Vec<&String> = state.served.values().flatten().collect();
        versions.sort();
        versions.dedup();
        let versions: Vec<Value> = versions
            .into_iter()
            .map(|version| json!({ "version": version, "groupVersion": format!("gateway.networking.k8s.io/{version}") }))
            .collect();
        let groups = if versions.is_empty() {
            json!([])
        } else {
            json!([{ "name": "gateway.networking.k8s.io", "versions": versions }])
        };
        json_response(&json!({ "kind": "APIGroupList", "apiVersion": "v1", "groups": groups }))
    }

    fn resources(&self, version: &str) -> Response<Answer> {
        let state = lock(&self.0.state);
        let resources: Vec<Value> = state
            .served
            .iter()
            .filter(|(_, versions)| versions.iter().any(|it| it == version))
            .map(|(name, _)| json!({ "name": name, "singularName": "", "namespaced": true, "kind": name, "verbs": [] }))
            .collect();
        let group_version = format!("gateway.networking.k8s.io/{version}");
        json_response(
            &json!({ "kind": "APIResourceList", "groupVersion": group_version, "resources": resources }),
        )
    }

    /// The collection and the object that a path names, if they are served.
    fn resolve(&self, path: &str) -> Option<(String, String)> {
        let mut parts: Vec<&str> = path.trim_start_matches('/').split('/').collect();
        let is_gateway = path.starts_with(GROUP);
        let version = if parts.first() == Some(&"api") { parts.remove(1) } else { parts.remove(2) };
        let rest = parts.split_off(if path.starts_with("/api/") { 1 } else { 2 });
        let (namespace, rest) = match rest.as_slice() {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (Some(*namespace), rest),
            rest => (None, rest),
        };
        let (collection, name) = (rest.first()?, rest.get(1));
        let state = lock(&self.0.state);
        let versions = state.served.get(*collection);
        if is_gateway && !versions.is_some_and(|versions| versions.iter().any(|it| it == version)) {
            return None;
        }
        let name = match (namespace, name) {
            (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
            (None, Some(name)) => (*name).to_owned(),
            (_, None) => String::new(),
        };
        Some(((*collection).to_owned(), name))
    }

    fn list(&self, collection: &str) -> Response<Answer> {
        let mut state = lock(&self.0.state);
        *state.lists.entry(collection.to_owned()).or_default() += 1;
        let items: Vec<&Value> =
            state.objects.get(collection).map(|it| it.values().collect()).unwrap_or_default();
        json_response(&json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": { "resourceVersion": state.version.to_string() }, "items": items,
        }))
    }

    fn watch(&self, collection: String, from: u64) -> Response<Answer> {
        let begun = {
            let state = lock(&self.0.state);
            if from < state.compacted {
                return status(410);
            }
            (state.expiries, state.ends)
        };
        let start = (self.clone(), self.0.changes.subscribe(), collection, from, false);
        let events =
            stream::unfold(start, move |(api, mut changes, collection, mut seen, ended)| async move {
                if ended {
                    return None;
                }
                loop {
                    changes.mark_unchanged();
                    let (lines, end) = api.news(&collection, &mut seen, begun);
                    if !lines.is_empty() || end {
                        let frame = http_body::Frame::data(Bytes::from(lines));
                        return Some((Ok::<_, Infallible>(frame), (api, changes, collection, seen, end)));
                    }
                    if changes.changed().await.is_err() {
                        return None;
                    }
                }
            });
        Response::new(StreamBody::new(events).boxed_unsync())
    }

    /// What a watch is told: lines of JSON, and whether it ends.
    fn news(&self, collection: &str, seen: &mut u64, (expiries, ends): (u64, u64)) -> (String, bool) {
        let state = lock(&self.0.state);
        if state.expiries > expiries {
            return (format!("{}\n", json!({ "type": "ERROR", "object": status_object(410) })), true);
        }
        if state.ends > ends {
            return (String::new(), true);
        }
        let is_served = state.served.contains_key(collection) || !is_gateway_kind(collection);
        let news = state.history.iter().filter(|(version, of, _, _)| version > seen && of == collection);
        let lines =
            news.map(|(_, _, type_, object)| format!("{}\n", json!({ "type": type_, "object": object })));
        let lines = lines.collect();
        *seen = state.version;
        (lines, !is_served)
    }

    /// A merge patch.
    fn patch(&self, line: &str, collection: &str, name: &str, body: Value) -> Response<Answer> {
        lock(&self.0.state).writes.push((line.to_owned(), body.clone()));
        let Some(mut object) = self.get(collection, name) else { return status(404) };
        if self.is_disturbed(collection) {
            let count = object["metadata"]["annotations"]["count"].as_str().map_or(0, str::len);
            object["metadata"]["annotations"]["count"] = "x".repeat(count + 1).into();
            self.put(collection, object);
            return status(409);
        }
        let wanted = body["metadata"]["resourceVersion"].as_str();
        if wanted.is_some_and(|version| Some(version) != object["metadata"]["resourceVersion"].as_str()) {
            return status(409);
        }
        let before = object.clone();
        merge(&mut object, &body);
        let unknown = lock(&self.0.state).unknown_field;
        if let (Some(field), Some(status)) = (unknown, object["status"].as_object_mut()) {
            status.remove(field);
        }
        // A write that changes nothing makes no new version.
        if object != before {
            self.put(collection, object);
        }
        json_response(&self.get(collection, name).unwrap_or_default())
    }

    fn is_disturbed(&self, collection: &str) -> bool {
        let mut state = lock(&self.0.state);
        let Some(left) = state.disturbances.get_mut(collection).filter(|left| **left > 0) else {
            return false;
        };
        *left -= 1;
        true
    }
}

fn is_gateway_kind(collection: &str) -> bool {
    ["gatewayclasses", "gateways", "listenersets", "tcproutes", "referencegrants"].contains(&collection)
}

/// JSON merge patch (RFC 7396).
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(changes) = patch else { return target.clone_from(patch) };
    if !target.is_object() {
        *target = json!({});
    }
    for (field, change) in changes {
        match change {
            Value::Null => drop(target.as_object_mut().and_then(|fields| fields.remove(field))),
            change => merge(&mut target[field.as_str()], change),
        }
    }
}

fn key(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default();
    match text("namespace") {
        "" => text("name").to_owned(),
        namespace => format!("{namespace}/{}", text("name")),
    }
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn status_object(code: u16) -> Value {
    json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "message": "refused", "reason": "" })
}

fn status(code: u16) -> Response<Answer> {
    let mut response = json_response(&status_object(code));
    *response.status_mut() = StatusCode::from_u16(code).expect("a status code");
    response
}

fn json_response(value: &Value) -> Response<Answer> {
    Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync())
}
