//! A small client of the API: one request over a fresh connection.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use crate::netns::NetNs;
use crate::wait::wait_for;

/// How long connecting, a read or a write may take.
const TIMEOUT: Duration = Duration::from_secs(20);
/// The status by which the server says that it has not looked at a request, as of kinds that it has just learnt, whose objects it still reads from its store.
const TOO_MANY_REQUESTS: u16 = 429;
/// How long a request is sent again after such an answer.
const BUSY: Duration = Duration::from_secs(20);
pub(super) const JSON: &str = "application/json";
/// Asks for no more of an object than its metadata.
const METADATA: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

/// What a client is told to prove who it is.
#[derive(Clone, Debug)]
pub struct Credentials {
    /// The address of the server.
    pub address: SocketAddr,
    /// The file with the certificate that signed the server's.
    pub authority: PathBuf,
    /// The bearer token.
    pub token: String,
}

/// A client for one user.
#[derive(Clone)]
pub struct Api {
    netns: Option<NetNs>,
    address: SocketAddr,
    token: String,
    tls: Arc<ClientConfig>,
}

impl fmt::Debug for Api {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Api").field("address", &self.address).finish_non_exhaustive()
    }
}

/// An answer that is none of 200 to 299.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// The method and path that were asked for.
    pub request: String,
    /// The status code of HTTP.
    pub code: u16,
    /// In one word, such as `AlreadyExists`.
    pub reason: String,
    /// In words.
    pub message: String,
}

impl fmt::Display for ApiError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {} {}: {}", self.request, self.code, self.reason, self.message)
    }
}

impl std::error::Error for ApiError {}

impl ApiError {
    /// The code of an answer among the causes of `error`, if it comes from one.
    pub fn code_of(error: &anyhow::Error) -> Option<u16> {
        error.downcast_ref::<Self>().map(|error| error.code)
    }
}

impl Api {
    /// A client that connects from `netns`, or from where the test itself runs.
    pub fn new(netns: Option<NetNs>, credentials: &Credentials) -> Result<Self> {
        Ok(Self {
            netns,
            address: credentials.address,
            token: credentials.token.clone(),
            tls: Arc::new(tls(&credentials.authority)?),
        })
    }

    /// Reads an object, or what else stands at `path`.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request("GET", path, None)
    }

    /// The same; nothing if there is no such object, or no such kind.
    pub fn find(&self, path: &str) -> Result<Option<Value>> {
        match self.get(path) {
            Err(error) if ApiError::code_of(&error) == Some(404) => Ok(None),
            result => result.map(Some),
        }
    }

    /// The objects of a collection.
    pub fn list(&self, path: &str) -> Result<Vec<Value>> {
        match self.get(path)?.get_mut("items").map(Value::take) {
            Some(Value::Array(items)) => Ok(items),
            _ => bail!("{path} is no collection"),
        }
    }

    /// Adds an object to the collection at `path`; returns it as stored.
    pub fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.request("POST", path, Some((JSON, &object.to_string())))
    }

    /// Replaces the object at `path`, or its status where `path` ends so.
    pub fn replace(&self, path: &str, object: &Value) -> Result<Value> {
        self.request("PUT", path, Some((JSON, &object.to_string())))
    }

    /// Merges `changes` into the object at `path`, or into its status where `path` ends so. `null` removes.
    pub fn patch(&self, path: &str, changes: &Value) -> Result<Value> {
        self.request("PATCH", path, Some(("application/merge-patch+json", &changes.to_string())))
    }

    /// Deletes the object at `path`. It may go later, if it has finalizers.
    pub fn delete(&self, path: &str) -> Result<()> {
        self.request("DELETE", path, None).map(drop)
    }

    /// Waits until the object at `path` is as `is_fit` wants it. While the server does not answer, that goes on too.
    pub fn wait_for(
        &self,
        path: &str,
        deadline: Duration,
        mut is_fit: impl FnMut(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = String::new();
        let found = wait_for(deadline, || match self.get(path) {
            Ok(object) if is_fit(&object) => Some(object),
            Ok(object) => {
                last = format!("{object:#}");
                None
            }
            Err(error) => {
                last = format!("{error:#}");
                None
            }
        });
        found.with_context(|| format!("{path} is not as expected within {deadline:?}, but: {last}"))
    }

    /// Waits until there is nothing at `path`.
    pub fn wait_until_gone(&self, path: &str, deadline: Duration) -> Result<()> {
        let is_gone = || self.exchange("GET", path, METADATA, None).is_ok_and(|(code, _)| code == 404);
        wait_for(deadline, || is_gone().then_some(()))
            .with_context(|| format!("{path} is still there after {deadline:?}"))
    }

    /// Sends a request, whose body is given with its type, again and again for a while if the server has not looked at it. Fails with [`ApiError`] if the answer is a
    /// failure.
    pub fn request(&self, method: &str, path: &str, body: Option<(&str, &str)>) -> Result<Value> {
        let request = format!("{method} {path}");
        let answer = wait_for(BUSY, || match self.exchange(method, path, JSON, body) {
            Ok((TOO_MANY_REQUESTS, _)) => None,
            answer => Some(answer),
        });
        let answer = answer.unwrap_or_else(|| self.exchange(method, path, JSON, body));
        let (code, text) = answer.with_context(|| request.clone())?;
        // The probes of the server's health answer in words.
        let value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if (200..300).contains(&code) {
            return Ok(value);
        }
        let field = |name: &str| value.get(name).and_then(Value::as_str).map(str::to_owned);
        let message = field("message").unwrap_or_else(|| value.to_string());
        Err(ApiError { request, code, reason: field("reason").unwrap_or_default(), message }.into())
    }

    /// Asks for an answer of type `accept`; returns its status code and its body.
    fn exchange(
        &self,
        method: &str,
        path: &str,
        accept: &str,
        body: Option<(&str, &str)>,
    ) -> Result<(u16, String)> {
        let (kind, body) = body.unwrap_or((JSON, ""));
        // HTTP/1.0 forbids chunks and closes the connection after the answer.
        let request = self.message(method, path, "1.0", accept, (kind, body));
        let mut stream = self.connect()?;
        stream.write_all(request.as_bytes())?;
        stream.flush()?;
        let answer = read(&mut stream).context("read the answer")?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end of its head")?;
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((code.context("an answer without a status")?, body.to_owned()))
    }

    /// A request as it is sent.
    pub(super) fn message(
        &self,
        method: &str,
        path: &str,
        version: &str,
        accept: &str,
        (kind, body): (&str, &str),
    ) -> String {
        format!(
            "{method} {path} HTTP/{version}\r\nHost: {}\r\nAuthorization: Bearer {}\r\nAccept: {accept}\r\n\
             Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            self.token,
            body.len()
        )
    }

    pub(super) fn connect(&self) -> Result<StreamOwned<ClientConnection, TcpStream>> {
        let connect = || TcpStream::connect_timeout(&self.address, TIMEOUT);
        let stream = match &self.netns {
            Some(netns) => netns.run(connect),
            None => connect(),
        };
        let stream = stream.with_context(|| format!("connect to {}", self.address))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.set_nodelay(true)?;
        let name = ServerName::IpAddress(self.address.ip().into());
        Ok(StreamOwned::new(ClientConnection::new(Arc::clone(&self.tls), name)?, stream))
    }
}

/// Everything until the end of the connection.
fn read(stream: &mut impl Read) -> io::Result<String> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    String::from_utf8(bytes).map_err(io::Error::other)
}

/// Trusts servers whose certificate is signed by one of those in the file.
fn tls(authority: &Path) -> Result<ClientConfig> {
    let context = || format!("certificates of {}", authority.display());
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_file_iter(authority).with_context(context)? {
        roots.add(certificate.with_context(context)?)?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
}
