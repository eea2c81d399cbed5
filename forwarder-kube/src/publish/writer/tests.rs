use serde_json::json;
use tokio::time::{sleep, timeout};

use super::*;
use crate::KubeSettings;
use crate::watch::{self as source, fake::FakeApi};
use forwarder_gateway::model::ListenerSettings;
use forwarder_gateway::resolve::{ResolveSettings, resolve};
use forwarder_gateway::status::nodes::NodeReport;

const ALL: [(&str, &[&str]); 3] =
    [("gatewayclasses", &["v1"]), ("gateways", &["v1"]), ("tcproutes", &["v1"])];
/// As long as anything may take. The clock stands still while nobody waits for it, so that this is no time at all.
const LONG: Duration = Duration::from_mins(30);
/// Long enough for whatever would be written.
const QUIET: Duration = Duration::from_mins(5);

/// An agent that leads, between a fake API and nothing.
struct Leader {
    api: FakeApi,
    health: Arc<PublishHealth>,
    election: watch::Sender<bool>,
}

impl Leader {
    fn start(api: FakeApi) -> Self {
        Self::start_after(Duration::ZERO, api)
    }

    /// The same with an agent that takes so long to resolve what it reads.
    fn start_after(delay: Duration, api: FakeApi) -> Self {
        let client = api.client();
        let settings = KubeSettings::alone();
        let resolve_settings = ResolveSettings::for_cluster(ListenerSettings::default());
        let identity = Identity::new(&settings, &resolve_settings.controller_name, &client);
        let source = source::watch(client.clone(), &settings, None);
        let (sender, outcome) = watch::channel(Arc::default());
        let mut loaded = source.loaded;
        let node = identity.node.clone();
        tokio::spawn(async move {
            while loaded.changed().await.is_ok() {
                let loaded = Arc::clone(&loaded.borrow_and_update());
                sleep(delay).await;
                let statuses = resolve(&loaded.manifests, &resolve_settings).statuses;
                let report = NodeReport::new(&node, &statuses, &[]);
                sender.send_replace(Arc::new(Publication { loaded, statuses, report }));
            }
        });
        let health = Arc::new(PublishHealth::new());
        let (election, is_leader) = watch::channel(true);
        let writer = Writer::new(client, Arc::new(identity), Arc::clone(&health));
        tokio::spawn(writer.run(is_leader, outcome, source.records));
        Self { api, health, election }
    }

    async fn until(&self, what: &str, condition: impl Fn(&FakeApi) -> bool) {
        let fulfilled = async {
            while !condition(&self.api) {
                sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(LONG, fulfilled).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    fn count(&self, kind: Kind, result: WriteResult) -> u64 {
        let of = |(k, r, _): &(Kind, WriteResult, u64)| (*k, *r) == (kind, result);
        self.health.writes().find(of).map_or(0, |(_, _, count)| count)
    }

    /// How many writes there are in a time in which nothing changes.
    async fn writes_while_quiet(&self) -> usize {
        sleep(QUIET).await;
        let before = self.api.writes().len();
        sleep(QUIET).await;
        self.api.writes().len() - before
    }
}

/// An API with a class, a Gateway and a route.
fn api() -> FakeApi {
    let api = FakeApi::new(&ALL);
    let controller = forwarder_gateway::resolve::CONTROLLER_NAME;
    api.put(
        "gatewayclasses",
        json!({
            "metadata": { "name": "forwarder", "generation": 1 }, "spec": { "controllerName": controller },
        }),
    );
    api.put("gateways", json!({
        "metadata": { "namespace": "db", "name": "gw", "generation": 1 },
        "spec": { "gatewayClassName": "forwarder", "listeners": [{ "name": "a", "port": 9001, "protocol": "TCP" }] },
    }));
    api.put("tcproutes", json!({
        "metadata": { "namespace": "db", "name": "a", "generation": 1 },
        "spec": { "parentRefs": [{ "name": "gw" }], "rules": [{ "backendRefs": [{ "name": "b", "port": 1 }] }] },
    }));
    api
}

fn has_parent(api: &FakeApi) -> bool {
    api.get("tcproutes", "db/a").is_some_and(|route| route["status"]["parents"][0]["conditions"].is_array())
}

fn is_programmed(api: &FakeApi) -> bool {
    api.get("gateways", "db/gw").is_some_and(|gateway| {
        let conditions = gateway["status"]["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|it| it["type"] == "Programmed" && it["status"] == "True")
    })
}

#[tokio::test(start_paused = true)]
async fn statuses_are_written_once() {
    let leader = Leader::start(api());
    leader.until("the route's status", has_parent).await;
    leader.until("the Gateway's status", is_programmed).await;
    assert_eq!(leader.writes_while_quiet().await, 0);
    assert_eq!(leader.count(Kind::TcpRoute, WriteResult::Written), 1);
    assert_eq!(leader.count(Kind::Gateway, WriteResult::Written), 1);
}

#[tokio::test(start_paused = true)]
async fn whoever_is_faster_is_not_overwritten() {
    let api = api();
    api.disturb("tcproutes", 20);
    let leader = Leader::start(api);
    leader.until("the status", has_parent).await;
    let route = leader.api.get("tcproutes", "db/a").unwrap();
    assert_eq!(route["metadata"]["annotations"]["count"], "x".repeat(20));
    assert_eq!(leader.count(Kind::TcpRoute, WriteResult::Conflict), 20);
    assert_eq!(leader.count(Kind::TcpRoute, WriteResult::Written), 1);
    assert_eq!(leader.writes_while_quiet().await, 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_is_tried_again_later_and_later() {
    let api = api();
    api.refuse("PATCH /apis/gateway.networking.k8s.io/v1/namespaces/db/tcproutes", 403, 8);
    let leader = Leader::start(api);
    // The others do not wait for it.
    leader.until("the Gateway's status", is_programmed).await;
    assert!(!has_parent(&leader.api));
    let started = Instant::now();
    leader.until("the status", has_parent).await;
    assert_eq!(leader.count(Kind::TcpRoute, WriteResult::Failed), 8);
    assert!(started.elapsed() > Duration::from_mins(2), "{:?}", started.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_wiped_status_is_restored() {
    let leader = Leader::start(api());
    leader.until("the status", has_parent).await;
    sleep(QUIET).await;
    let mut route = leader.api.get("tcproutes", "db/a").unwrap();
    route.as_object_mut().unwrap().remove("status");
    leader.api.put("tcproutes", route);
    leader.until("the status again", has_parent).await;
    assert_eq!(leader.writes_while_quiet().await, 0);
}

#[tokio::test(start_paused = true)]
async fn a_field_that_the_api_does_not_know_is_no_reason_to_write_again() {
    let api = api();
    api.drop_field("listeners");
    let leader = Leader::start(api);
    leader.until("the Gateway's status", is_programmed).await;
    assert_eq!(leader.writes_while_quiet().await, 0);
    // A change by somebody else is looked at, and that is all.
    let mut gateway = leader.api.get("gateways", "db/gw").unwrap();
    gateway["metadata"]["annotations"] = json!({ "by": "somebody" });
    leader.api.put("gateways", gateway);
    assert_eq!(leader.writes_while_quiet().await, 0);
}

#[tokio::test(start_paused = true)]
async fn who_does_not_lead_writes_nothing() {
    let leader = Leader::start(api());
    leader.until("the status", has_parent).await;
    leader.election.send_replace(false);
    sleep(QUIET).await;
    let mut route = leader.api.get("tcproutes", "db/a").unwrap();
    route.as_object_mut().unwrap().remove("status");
    leader.api.put("tcproutes", route);
    assert_eq!(leader.writes_while_quiet().await, 0);
    assert!(!leader.health.is_leader());
    leader.election.send_replace(true);
    leader.until("the status again", has_parent).await;
}

#[tokio::test(start_paused = true)]
async fn nothing_is_taken_away_before_it_has_been_resolved() {
    let api = api();
    let before = Leader::start(api.clone());
    before.until("the status", has_parent).await;
    before.election.send_replace(false);
    sleep(QUIET).await;
    let (route, writes) = (api.get("tcproutes", "db/a"), api.writes().len());
    // Another one leads at once, and knows only later what it has read.
    let leader = Leader::start_after(Duration::from_secs(20), api);
    // A route that comes meanwhile has a status by somebody who was faster.
    let mut other = route.clone().unwrap();
    other["metadata"]["name"] = "b".into();
    sleep(Duration::from_secs(30)).await;
    leader.api.put("tcproutes", other);
    sleep(QUIET).await;
    assert_eq!(leader.api.get("tcproutes", "db/a"), route);
    let taken = leader.api.writes()[writes..].iter().any(|(_, body)| body["status"]["parents"] == json!([]));
    assert!(!taken, "{:?}", &leader.api.writes()[writes..]);
}
