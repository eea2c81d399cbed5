//! The admin endpoint: health, readiness, metrics and state over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State as Extract;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

use crate::agent::Shared;
use crate::metrics;

/// An admin endpoint that could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the admin endpoint on {address}: {source}; choose another with --admin, or `off`")]
pub struct AdminError {
    address: SocketAddr,
    #[source]
    source: std::io::Error,
}

struct Context {
    shared: Arc<Shared>,
    registry: Registry,
}

/// Opens the endpoint; the returned future serves it for ever.
///
/// # Errors
/// The address cannot be bound.
pub async fn open(
    address: SocketAddr,
    shared: Arc<Shared>,
) -> Result<impl Future<Output = ()> + Send, AdminError> {
    let listener = TcpListener::bind(address).await.map_err(|source| AdminError { address, source })?;
    let registry = metrics::registry(Arc::clone(&shared));
    let router = Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics_text))
        .route("/v1/state", get(state))
        .with_state(Arc::new(Context { shared, registry }));
    Ok(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the admin endpoint has ended");
        }
    })
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
