//! One request over a fresh connection: all that the admin interface needs.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::netns::NetNs;
use crate::wait::patient;

/// How long a read or a write may take.
const TIMEOUT: Duration = Duration::from_secs(5);

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Asks the server at `address` in `netns` for `path`.
pub fn get(netns: &NetNs, address: SocketAddr, path: &str) -> Result<Response> {
    get_within(netns, address, path, TIMEOUT)
}

/// The same, where the answer may take longer than usual.
pub fn get_within(netns: &NetNs, address: SocketAddr, path: &str, timeout: Duration) -> Result<Response> {
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: */*\r\n\r\n");
    by_tcp_within(netns, address, &request, timeout).with_context(|| format!("GET {path}"))
}

/// Sends `body` as JSON to `path` of the server at `address` in `netns`.
pub fn post(netns: &NetNs, address: SocketAddr, path: &str, body: &str) -> Result<Response> {
    by_tcp(netns, address, &post_request(path, body)).with_context(|| format!("POST {path}"))
}

/// Asks the server at a socket for `path`.
pub fn get_by(socket: &Path, path: &str) -> Result<Response> {
    by_socket(socket, &format!("GET {path} HTTP/1.0\r\nAccept: */*\r\n\r\n"))
        .with_context(|| format!("GET {path}"))
}

/// Sends `body` as JSON to `path` of the server at a socket.
pub fn post_by(socket: &Path, path: &str, body: &str) -> Result<Response> {
    by_socket(socket, &post_request(path, body)).with_context(|| format!("POST {path}"))
}

fn post_request(path: &str, body: &str) -> String {
    let head = format!("POST {path} HTTP/1.0\r\nContent-Type: application/json\r\n");
    format!("{head}Content-Length: {}\r\n\r\n{body}", body.len())
}

/// Sends a request, of HTTP/1.0 or with `Connection: close`, to the server at `address` in `netns`.
pub fn by_tcp(netns: &NetNs, address: SocketAddr, request: &str) -> Result<Response> {
    by_tcp_within(netns, address, request, TIMEOUT)
}

fn by_tcp_within(netns: &NetNs, address: SocketAddr, request: &str, timeout: Duration) -> Result<Response> {
    let stream = netns.connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_read_timeout(Some(patient(timeout)))?;
    stream.set_write_timeout(Some(patient(timeout)))?;
    exchange(stream, request)
}

/// The same to the server at a socket.
pub fn by_socket(socket: &Path, request: &str) -> Result<Response> {
    let stream = UnixStream::connect(socket).with_context(|| format!("connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(patient(TIMEOUT)))?;
    stream.set_write_timeout(Some(patient(TIMEOUT)))?;
    exchange(stream, request)
}

fn exchange(mut stream: impl Read + Write, request: &str) -> Result<Response> {
    // HTTP/1.0 forbids chunks and closes the connection after the answer.
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).context("read the answer")?;
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end of its head")?;
    let status =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("an answer without a status")?;
    Ok(Response { status, body: body.to_owned() })
}
