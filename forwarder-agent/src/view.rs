//! What the agent shows of itself: the JSON of `/v1/state`, which `forwarder explain` prints as a table,
//! and the connections that `forwarder conns` lists.

use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use forwarder_gateway::model::{Listener, ListenerKey, RouteTable, Target};
use forwarder_gateway::object::Plain;
use forwarder_gateway::problem::Problem;
use forwarder_gateway::status::Statuses;

/// The state of an agent, or what the state would be for a folder of manifests.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct State {
    /// The version of the agent.
    pub version: String,
    /// Its listeners.
    pub listeners: Vec<ListenerView>,
    /// What is wrong with its input.
    pub problems: Vec<ProblemView>,
    /// What the kernel does for it; absent for a folder of manifests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub datapath: Option<DatapathView>,
    /// The statuses that a Kubernetes API server would be told, by kind and name.
    pub statuses: Value,
}

/// One listener.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListenerView {
    /// Namespace, Gateway and listener; for one of a ListenerSet, `listenerset`, namespace, ListenerSet and listener.
    pub listener: String,
    /// Address and port.
    pub address: String,
    /// Its number in the BPF maps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u32>,
    /// Whether its port is open; absent for a folder of manifests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bound: Option<bool>,
    /// Why it is not.
    pub error: Option<String>,
    /// How bytes are moved.
    pub datapath: String,
    /// Of a listener that is to be direct: whether the programs take its new connections now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    /// The networks of clients that are not let in, and exceptions: `--client-cidrs` and the annotation together.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub client_cidrs: Vec<String>,
    /// How many new connections one client may open in a second; absent where any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_rate: Option<u32>,
    /// The route that serves it.
    pub route: Option<String>,
    /// The route's backends.
    pub backends: Vec<BackendView>,
    /// Connections accepted so far.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u64>,
    /// Connections that are open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active: Option<u64>,
    /// Bytes passed on from clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received_bytes: Option<u64>,
    /// Bytes passed on to clients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_bytes: Option<u64>,
}

/// One backend of a route.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct BackendView {
    /// Namespace, Service and port.
    pub backend: String,
    /// Its weight.
    pub weight: u32,
    /// Its endpoints.
    pub endpoints: Vec<String>,
    /// Why its share of connections is rejected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rejected: Option<String>,
}

/// One problem.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct ProblemView {
    /// `error` or `warning`.
    pub severity: String,
    /// The kind of problem.
    pub reason: String,
    /// File and line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub location: Option<String>,
    /// Kind, namespace and name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// The field.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
    /// What is wrong and what to do.
    pub message: String,
}

/// What the kernel does for the agent.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DatapathView {
    /// Whether the programs are loaded.
    pub programs: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Why tier `tc` does not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tc_error: Option<String>,
    /// Why tier `direct` does not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_error: Option<String>,
    /// Why there is less at XDP than was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp_error: Option<String>,
    /// Why tier `sockmap` does not work.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sockmap_error: Option<String>,
    /// The interfaces that it is attached to, and how.
    pub interfaces: Vec<InterfaceView>,
}

/// An interface that an ingress program is attached to.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct InterfaceView {
    /// Its name.
    pub name: String,
    /// `tcx` or `clsact`.
    pub attachment: String,
    /// `drop` or `native`, where a program hangs at XDP too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub xdp: Option<String>,
}

impl From<&Problem> for ProblemView {
    fn from(problem: &Problem) -> Self {
        Self {
            severity: problem.severity.as_str().to_owned(),
            reason: problem.reason.as_str().to_owned(),
            location: problem.location.as_ref().map(ToString::to_string),
            object: problem.object.as_ref().map(ToString::to_string),
            field: Plain(&problem.field).to_string(),
            message: Plain(&problem.message).to_string(),
        }
    }
}

/// The view of one listener of a table, without anything live.
pub fn listener(key: ListenerKey, listener: &Listener, table: &RouteTable) -> ListenerView {
    let backends = listener.route.iter().flat_map(|route| &route.backends);
    ListenerView {
        listener: listener.name.to_string(),
        address: key.to_string(),
        datapath: listener.settings.datapath.to_string(),
        client_rate: listener.settings.client_rate.map(NonZeroU32::get),
        client_cidrs: listener.settings.client_cidrs.rules().iter().map(ToString::to_string).collect(),
        route: listener.route.as_ref().map(|route| route.name.to_string()),
        backends: backends
            .map(|backend| {
                let (endpoints, rejected) = match &backend.target {
                    Target::Invalid { message, reason, .. } => {
                        (Vec::new(), Some(format!("{message} ({reason})")))
                    }
                    Target::Service(key) => {
                        let endpoints = table.backends.get(key).map(|endpoints| endpoints.to_vec());
                        let endpoints = endpoints.unwrap_or_default();
                        let rejected =
                            endpoints.is_empty().then(|| "no endpoint takes connections".to_owned());
                        (endpoints.iter().map(ToString::to_string).collect(), rejected)
                    }
                };
                BackendView {
                    backend: backend.target.to_string(),
                    weight: backend.weight,
                    endpoints,
                    rejected,
                }
            })
            .collect(),
        ..ListenerView::default()
    }
}

/// The statuses by kind and name.
pub fn statuses(statuses: &Statuses) -> Value {
    fn by_name<K: ToString, S: Serialize>(entries: &std::collections::BTreeMap<K, S>) -> Value {
        entries.iter().map(|(name, status)| (name.to_string(), json!(status))).collect::<Map<_, _>>().into()
    }
    json!({
        "gatewayClasses": by_name(&statuses.gateway_classes),
        "gateways": by_name(&statuses.gateways),
        "listenerSets": by_name(&statuses.listener_sets),
        "tcpRoutes": by_name(&statuses.tcp_routes),
    })
}
