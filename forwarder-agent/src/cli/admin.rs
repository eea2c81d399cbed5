//! Asking a running agent: by its socket, or by TCP, where it answers reads alone.

mod channel;

use std::io;
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

pub(crate) use self::channel::AgentArgs;
use self::channel::{Channel, Channels};

/// How long an agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Why an agent did not answer as it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AskError {
    /// Nothing listens there.
    #[error("no agent answers at {}: start it, or name it with --admin-socket or --admin", attempts(.0))]
    NoAgent(Vec<(Channel, io::Error)>),
    /// The socket is for others.
    #[error(
        "may not open the agent's socket {socket} ({source}): you are neither root nor in the group that the agent lets use it \
         (--admin-socket-group); run this as root, with sudo say"
    )]
    Denied {
        /// The socket.
        socket: Channel,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It takes too long.
    #[error("what listens at {channel} did not answer within {}", humantime::format_duration(ANSWER_TIMEOUT))]
    TimedOut {
        /// Where it was asked.
        channel: Channel,
    },
    /// It does not speak HTTP.
    #[error("what listens at {channel} does not answer as an agent does: {source}")]
    Http {
        /// Where it was asked.
        channel: Channel,
        /// What is wrong with its answer.
        #[source]
        source: hyper::Error,
    },
    /// It refuses.
    #[error("the agent at {channel} answers {path} with {status}: {reason}")]
    Refused {
        /// Where it was asked.
        channel: Channel,
        /// What was asked for.
        path: String,
        /// The status.
        status: StatusCode,
        /// What it says.
        reason: String,
    },
    /// It answers something else.
    #[error("the answer of {channel} to {path} is not what an agent answers: {source}")]
    Answer {
        /// Where it was asked.
        channel: Channel,
        /// What was asked for.
        path: String,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// The environment says nothing that can be used.
    #[error("{name} cannot be used: {reason}")]
    Environment {
        /// The variable.
        name: &'static str,
        /// What is wrong with its value.
        reason: String,
    },
    /// There is no event loop to ask with.
    #[error("cannot ask the agent: {0}")]
    Runtime(#[source] io::Error),
}

fn attempts(failed: &[(Channel, io::Error)]) -> String {
    let failed: Vec<String> =
        failed.iter().map(|(channel, source)| format!("{channel} ({source})")).collect();
    failed.join(", nor at ")
}

/// Asks for what stands at `path`.
///
/// # Errors
/// The agent does not answer, or not as it should.
pub(crate) fn get<T: DeserializeOwned>(agent: &AgentArgs, path: &str) -> Result<T, AskError> {
    ask(&agent.channels()?, &Method::GET, path, &Bytes::new())
}

/// Sends `value` as JSON to `path`.
///
/// # Errors
/// The agent does not answer, or not as it should.
pub(crate) fn post<T: DeserializeOwned>(
    agent: &AgentArgs,
    path: &str,
    value: &impl Serialize,
) -> Result<T, AskError> {
    let body = serde_json::to_vec(value).expect("plain data is JSON");
    ask(&agent.channels()?, &Method::POST, path, &body.into())
}

/// Asks by the first of the channels at whose end somebody listens.
fn ask<T: DeserializeOwned>(
    channels: &Channels,
    method: &Method,
    path: &str,
    body: &Bytes,
) -> Result<T, AskError> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(AskError::Runtime)?;
    let (mut failed, mut denied) = (Vec::new(), None);
    for channel in channels.iter() {
        let exchange =
            async { tokio::time::timeout(ANSWER_TIMEOUT, exchange(channel, method, path, body)).await };
        let exchanged = runtime
            .block_on(exchange)
            .unwrap_or_else(|_| Err(AskError::TimedOut { channel: channel.clone() }));
        match exchanged {
            Ok((status, body)) => return read(channel, path, status, &body),
            Err(AskError::NoAgent(one)) => failed.extend(one),
            // By TCP everybody may read.
            Err(error @ AskError::Denied { .. }) if *method == Method::GET => denied = Some(error),
            Err(error) => return Err(error),
        }
    }
    // Who may not ask cannot know that there is no agent.
    Err(denied.unwrap_or(AskError::NoAgent(failed)))
}

fn read<T: DeserializeOwned>(
    channel: &Channel,
    path: &str,
    status: StatusCode,
    body: &[u8],
) -> Result<T, AskError> {
    let (channel, path) = (channel.clone(), path.split('?').next().unwrap_or_default().to_owned());
    if !status.is_success() {
        let reason = String::from_utf8_lossy(body).trim().to_owned();
        return Err(AskError::Refused { channel, path, status, reason });
    }
    serde_json::from_slice(body).map_err(|source| AskError::Answer { channel, path, source })
}

async fn exchange(
    channel: &Channel,
    method: &Method,
    path: &str,
    body: &Bytes,
) -> Result<(StatusCode, Bytes), AskError> {
    let not_connected = |source: io::Error| match channel {
        Channel::Socket(_) if source.kind() == io::ErrorKind::PermissionDenied => {
            AskError::Denied { socket: channel.clone(), source }
        }
        _ => AskError::NoAgent(vec![(channel.clone(), source)]),
    };
    let (host, body) = (channel.host(), body.clone());
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, host)
        .header(CONTENT_TYPE, "application/json")
        .body(Full::new(body))
        .expect("an address and an encoded path make a request");
    let answered = match channel {
        Channel::Socket(path) => {
            answer(UnixStream::connect(path).await.map_err(not_connected)?, request).await
        }
        Channel::Tcp(address) => {
            answer(TcpStream::connect(address).await.map_err(not_connected)?, request).await
        }
    };
    answered.map_err(|source| AskError::Http { channel: channel.clone(), source })
}

async fn answer(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), hyper::Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    connection.abort();
    Ok((status, body))
}
