//! Asking a running agent over its admin address.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long an agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an agent did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nothing listens there.
    #[error("no agent answers at {address}: start it, or name it with --admin ({source})")]
    NoAgent {
        /// The admin address.
        address: SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It takes too long.
    #[error("what listens at {address} did not answer within {}", humantime::format_duration(ANSWER_TIMEOUT))]
    TimedOut {
        /// The admin address.
        address: SocketAddr,
    },
    /// It does not speak HTTP.
    #[error("what listens at {address} does not answer as an agent does: {source}")]
    Http {
        /// The admin address.
        address: SocketAddr,
        /// What is wrong with its answer.
        #[source]
        source: hyper::Error,
    },
    /// It refuses.
    #[error("the agent at {address} answers {path} with {status}: {reason}")]
    Refused {
        /// The admin address.
        address: SocketAddr,
        /// What was asked for.
        path: String,
        /// The status.
        status: StatusCode,
        /// What it says.
        reason: String,
    },
    /// It answers something else.
    #[error("the answer of {address} to {path} is not what an agent answers: {source}")]
    Answer {
        /// The admin address.
        address: SocketAddr,
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// There is no event loop to ask with.
    #[error("cannot ask the agent: {0}")]
    Runtime(#[source] io::Error),
}

/// Asks for what stands at `path`.
///
/// # Errors
/// The agent does not answer, or not as it should.
pub(crate) fn get<T: DeserializeOwned>(address: SocketAddr, path: &str) -> Result<T, AskError> {
    ask(address, Method::GET, path, Bytes::new())
}

/// Sends `value` as JSON to `path`.
///
/// # Errors
/// The agent does not answer, or not as it should.
pub(crate) fn post<T: DeserializeOwned>(
    address: SocketAddr,
    path: &str,
    value: &impl Serialize,
) -> Result<T, AskError> {
    let body = serde_json::to_vec(value).expect("plain data is JSON");
    ask(address, Method::POST, path, body.into())
}

fn ask<T: DeserializeOwned>(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<T, AskError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AskError::Runtime)?;
    let exchange =
        async { tokio::time::timeout(ANSWER_TIMEOUT, exchange(address, method, path, body)).await };
    let (status, body) = runtime.block_on(exchange).unwrap_or(Err(AskError::TimedOut { address }))?;
    let path = path.split('?').next().unwrap_or_default().to_owned();
    if !status.is_success() {
        let reason = String::from_utf8_lossy(&body).trim().to_owned();
        return Err(AskError::Refused { address, path, status, reason });
    }
    serde_json::from_slice(&body).map_err(|source| AskError::Answer { address, path, source })
}

async fn exchange(
    address: SocketAddr,
    method: Method,
    path: &str,
    body: Bytes,
) -> Result<(StatusCode, Bytes), AskError> {
    let http = |source| AskError::Http { address, source };
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .map_err(|source| AskError::NoAgent { address, source })?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
    let connection = tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, address.to_string())
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .expect("an address and an encoded path make a request");
    let response = sender.send_request(request).await.map_err(http)?;
    let status = response.status();
    let body = response.into_body().collect().await.map_err(http)?.to_bytes();
    connection.abort();
    Ok((status, body))
}
