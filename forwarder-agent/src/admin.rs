//! The admin endpoint: health, readiness, metrics, state and connections over HTTP.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | 200 while the agent runs |
//! | `GET /readyz` | 200 once every listener that can be programmed is bound, or 503 and why not |
//! | `GET /metrics` | OpenMetrics text |
//! | `GET /v1/state` | listeners, routes, endpoints and problems, as [`crate::view::State`] |
//! | `GET /v1/connections` | open connections, as [`ConnectionList`](forwarder_dataplane::view::ConnectionList); see below |
//! | `GET /v1/datapath` | which of the kernel's tiers take new connections, as [`DatapathTiers`] |
//! | `POST /v1/datapath` | switches tiers, as JSON says, such as `{"sockmap": false}` ([`TierToggleRequest`]); answers as above |
//! | `POST /v1/connections/reset` | resets connections: `{"reset": 3}`; see below |
//!
//! There are two ways in. By a socket in the file system, which root alone may open, or a group as well, everything is answered. By
//! TCP, where any process of the node may come, only reads are (403 otherwise), and only those that name the endpoint by an IP address,
//! `localhost` or a name of `--admin-hosts` (421 otherwise). Neither way has to be open for the agent to forward.
//!
//! Those about connections take a [`Selector`]: the first as parameters of the query, such as
//! `?listener=default/gw/a&idleLongerThan=1h`, all optional, with `limit` for how many are listed at most; the second as
//! JSON with `Content-Type: application/json`, and not an empty one: `{"all": true}` means all. A selector that
//! cannot be used is answered with 400 and a sentence.

mod opening;
mod rules;
mod serve;
mod socket;

use std::sync::Arc;

use axum::Router;
use axum::extract::rejection::JsonRejection;
use axum::extract::{RawQuery, State as Extract};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use prometheus_client::registry::Registry;
use serde_json::{Map, Value};
use tokio::task::JoinSet;

use self::rules::Rules;
use self::serve::{Service, serve};
use crate::metrics;
use crate::settings::AdminSettings;
use crate::state::{AgentState, By};
use forwarder_dataplane::view::{DatapathTiers, ResetReport, Selector, TierToggleRequest};

/// How many connections each way may have at once, where the process may open many files.
const MAX_CONNECTIONS: u64 = 64;
/// How many it has at least.
const MIN_CONNECTIONS: u64 = 4;
/// Each way gets one file descriptor in so many: the others are for forwarding.
const FILES_FOR_ONE: u64 = 32;

struct Context {
    shared: Arc<AgentState>,
    registry: Registry,
}

/// The endpoint while it is served; it ends with this value.
#[derive(Debug)]
pub struct Admin(JoinSet<()>);

impl Admin {
    /// Ends it, and removes its socket.
    pub async fn close(mut self) {
        self.0.shutdown().await;
    }
}

/// Serves the endpoint as soon as it can be opened. `files` is how many files this process may have open.
pub fn start(settings: &AdminSettings, files: u64, shared: &Arc<AgentState>) -> Admin {
    let limit = max_connections(files);
    let router = router(Arc::clone(shared));
    let mut ways = JoinSet::new();
    if let Some(address) = settings.address {
        let rules = Rules::Reads { hosts: settings.hosts.clone(), socket: settings.socket.clone() };
        let service = Service { by: By::Tcp, rules, router: router.clone() };
        let shared = Arc::clone(shared);
        ways.spawn(async move { serve(opening::tcp(address, &shared.admin).await, limit, service).await });
    }
    if let Some(path) = settings.socket.clone() {
        let service = Service { by: By::Socket, rules: Rules::Everything, router };
        let (group, shared) = (settings.group.clone(), Arc::clone(shared));
        ways.spawn(async move {
            let (listener, _file) = opening::socket(&path, group.as_ref(), &shared.admin).await;
            serve(listener, limit, service).await;
        });
    }
    Admin(ways)
}

/// How many connections each way may have at once.
fn max_connections(files: u64) -> usize {
    let limit = (files / FILES_FOR_ONE).clamp(MIN_CONNECTIONS, MAX_CONNECTIONS);
    usize::try_from(limit).unwrap_or(usize::MAX)
}

fn router(shared: Arc<AgentState>) -> Router {
    let registry = metrics::registry(Arc::clone(&shared));
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/v1/state", get(state))
        .route("/v1/datapath", get(datapath).post(switch))
        .route("/v1/connections", get(connections))
        .route("/v1/connections/reset", post(reset_connections))
        .with_state(Arc::new(Context { shared, registry }))
}

async fn ready(Extract(context): Extract<Arc<Context>>) -> Response {
    let reasons = context.shared.unready();
    if reasons.is_empty() {
        "ready\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n").into_response()
    }
}

async fn metrics_text(Extract(context): Extract<Arc<Context>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &context.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn state(Extract(context): Extract<Arc<Context>>) -> Response {
    axum::Json(context.shared.state()).into_response()
}

async fn datapath(Extract(context): Extract<Arc<Context>>) -> axum::Json<DatapathTiers> {
    axum::Json(context.shared.tiers())
}

async fn switch(
    Extract(context): Extract<Arc<Context>>,
    toggles: Result<axum::Json<TierToggleRequest>, JsonRejection>,
) -> Result<axum::Json<DatapathTiers>, ApiError> {
    let axum::Json(toggles) = toggles.map_err(|rejection| ApiError::json("switch", rejection))?;
    for (tier, is_on) in toggles.named() {
        if context.shared.toggles.set(tier, is_on) {
            tracing::info!(tier = tier.as_str(), is_on, "an operator has switched a tier");
        }
    }
    Ok(axum::Json(context.shared.tiers()))
}

async fn connections(
    Extract(context): Extract<Arc<Context>>,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let (selector, limit) = parse_query(query.as_deref().unwrap_or_default())
        .map_err(|reason| ApiError::bad("selector", reason))?;
    let list = context.shared.connections.list(selector, limit).await;
    // Hundreds of thousands are many megabytes.
    let json = tokio::task::spawn_blocking(move || serde_json::to_vec(&list));
    let json = json.await.expect("a panic ends the process").expect("plain data is JSON");
    Ok(([(header::CONTENT_TYPE, "application/json")], json).into_response())
}

async fn reset_connections(
    Extract(context): Extract<Arc<Context>>,
    selector: Result<axum::Json<Selector>, JsonRejection>,
) -> Result<axum::Json<ResetReport>, ApiError> {
    let axum::Json(selector) = selector.map_err(|rejection| ApiError::json("selector", rejection))?;
    if selector.is_empty() {
        return Err(ApiError::bad("selector", "it is empty: name what to reset, or set `all`"));
    }
    let report = context.shared.connections.reset(selector.clone()).await;
    tracing::info!(
        selector = serde_json::to_string(&selector).unwrap_or_default(),
        connections = report.reset,
        "an operator has reset connections"
    );
    Ok(axum::Json(report))
}

/// A request that is not carried out: its status, and a sentence.
#[derive(Debug, Eq, PartialEq)]
struct ApiError(StatusCode, String);

impl ApiError {
    fn bad(what: &str, reason: impl std::fmt::Display) -> Self {
        Self(StatusCode::BAD_REQUEST, format!("the {what} cannot be used: {reason}"))
    }

    /// Of a body that is not the JSON that it should be.
    fn json(what: &str, rejection: JsonRejection) -> Self {
        match rejection {
            JsonRejection::MissingJsonContentType(_) => Self(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                format!("a {what} is JSON: send it with `Content-Type: application/json`"),
            ),
            rejection => Self::bad(what, rejection.body_text()),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.0, self.1 + "\n").into_response()
    }
}

/// A selector and a limit of a query.
fn parse_query(query: &str) -> Result<(Selector, Option<usize>), String> {
    let mut limit = None;
    let mut fields = Map::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if key == "limit" {
            limit = Some(value.parse().map_err(|_| format!("limit `{value}` is not a number"))?);
            continue;
        }
        let field = match (key.as_ref(), value.parse()) {
            ("all", Ok(all)) => Value::Bool(all),
            _ => Value::String(value.into_owned()),
        };
        if fields.insert(key.clone().into_owned(), field).is_some() {
            return Err(format!("`{key}` is given twice"));
        }
    }
    let selector = serde_json::from_value(Value::Object(fields)).map_err(|error| error.to_string())?;
    Ok((selector, limit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_endpoint_leaves_most_files_to_the_connections() {
        for (files, expected) in [(16, 4), (256, 8), (1024, 32), (2048, 64), (u64::MAX, 64)] {
            assert_eq!(max_connections(files), expected, "{files}");
        }
    }

    #[test]
    fn a_query_is_a_selector_and_a_limit() {
        let (selector, limit) = parse_query("").unwrap();
        assert!(selector.is_empty());
        assert_eq!(limit, None);
        let query =
            "listener=default/gw/a&upstream=%5B2001:db8::1%5D:80&idleLongerThan=1h+30m&all=true&limit=5";
        let (selector, limit) = parse_query(query).unwrap();
        let expected = r#"{"listener": "default/gw/a", "upstream": "[2001:db8::1]:80", "idleLongerThan": "1h 30m", "all": true}"#;
        assert_eq!(selector, serde_json::from_str(expected).unwrap());
        assert_eq!(limit, Some(5));
    }

    #[test]
    fn bad_queries_are_refused_by_name() {
        for (query, words) in [
            ("lisener=a", "`lisener`"),
            ("upstream=db", "`db`"),
            ("limit=many", "`many`"),
            ("all=perhaps", "perhaps"),
            ("route=a&route=b", "`route` is given twice"),
        ] {
            let message = parse_query(query).unwrap_err();
            assert!(message.contains(words), "{query}: {message}");
        }
    }
}
