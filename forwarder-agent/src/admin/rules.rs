//! What is answered by which way: everything by the socket, whose mode says who may open it; by TCP, which every process of the
//! node reaches, reads that address the endpoint by a name that is its own.

use std::net::IpAddr;
use std::path::PathBuf;

use axum::http::header::HOST;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, Request, StatusCode, Uri, Version};

use super::ApiError;

/// What is answered by a way.
#[derive(Debug)]
pub(super) enum Rules {
    /// Everything.
    Everything,
    /// Reads, if they address the endpoint by an IP address, `localhost` or one of `hosts`.
    Reads {
        /// Names, or `*` for any.
        hosts: Vec<String>,
        /// Where changes go instead.
        socket: Option<PathBuf>,
    },
}

impl Rules {
    /// Why a request is not carried out.
    pub(super) fn refuse<B>(&self, request: &Request<B>) -> Option<ApiError> {
        let Self::Reads { hosts, socket } = self else { return None };
        if let Err(host) = check_host(request.version(), request.uri(), request.headers(), hosts) {
            return Some(ApiError(StatusCode::MISDIRECTED_REQUEST, unknown_host(&host)));
        }
        let is_read = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
        (!is_read).then(|| {
            let what = format!(
                "{} {} is not carried out by TCP, where every process of the node may come",
                request.method(),
                request.uri().path()
            );
            let instead = match socket {
                Some(socket) => format!(
                    "send it by the agent's socket, as `forwarder conns` and `forwarder datapath` do with --admin-socket {path}, and \
                     curl with --unix-socket {path}",
                    path = socket.display()
                ),
                None => "it takes a socket, with which the agent has to be started: --admin-socket PATH".to_owned(),
            };
            ApiError(StatusCode::FORBIDDEN, format!("{what}: {instead}"))
        })
    }
}

fn unknown_host(host: &str) -> String {
    let asked = if host.is_empty() { "no Host header".to_owned() } else { format!("the host `{host}`") };
    format!(
        "a request with {asked} is not answered, since a page in a browser could have sent it: ask by an IP address or by \
         localhost, or start the agent with --admin-hosts NAME"
    )
}

/// Checks the names by which a request addresses the endpoint. A page in a browser has it send the name of its own server, even if
/// that leads to this node's address (DNS rebinding), and always speaks HTTP/1.1 with a Host header.
///
/// # Errors
/// The name that is not ours.
fn check_host(version: Version, uri: &Uri, headers: &HeaderMap, hosts: &[String]) -> Result<(), String> {
    let of_headers = headers.get_all(HOST).iter().map(|value| value.to_str().unwrap_or("?"));
    let mut named = uri.authority().map(Authority::as_str).into_iter().chain(of_headers).peekable();
    if named.peek().is_none() {
        return if version < Version::HTTP_11 || hosts.iter().any(|host| host == "*") {
            Ok(())
        } else {
            Err(String::new())
        };
    }
    match named.find(|host| !is_ours(host, hosts)) {
        Some(host) => Err(host.to_owned()),
        None => Ok(()),
    }
}

/// Whether a host, with or without a port, is an IP address, `localhost`, or among `hosts`.
fn is_ours(host: &str, hosts: &[String]) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split_once(']').map_or(rest, |(address, _)| address),
        // Unless it is an IPv6 address without brackets.
        None => host.split_once(':').filter(|(_, port)| !port.contains(':')).map_or(host, |(name, _)| name),
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    name.parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || hosts.iter().any(|known| known == "*" || known.eq_ignore_ascii_case(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refuse(rules: &Rules, method: Method, version: Version, host: Option<&str>) -> Option<(u16, String)> {
        let mut request = Request::builder().method(method).version(version).uri("/v1/state");
        if let Some(host) = host {
            request = request.header(HOST, host);
        }
        rules.refuse(&request.body(()).unwrap()).map(|ApiError(status, text)| (status.as_u16(), text))
    }

    fn reads(hosts: &[&str]) -> Rules {
        let hosts = hosts.iter().map(|&host| host.to_owned()).collect();
        Rules::Reads { hosts, socket: Some("/run/forwarder/admin.sock".into()) }
    }

    #[test]
    fn addresses_and_known_names_are_answered_by_tcp() {
        let rules = reads(&["metrics.example.com"]);
        for host in [
            "127.0.0.1:9902",
            "10.0.0.7",
            "[::1]:9902",
            "[fd00::1]",
            "fd00::1",
            "localhost",
            "LocalHost:80",
            "localhost.",
            "metrics.example.com:8080",
            "Metrics.Example.Com",
        ] {
            assert_eq!(refuse(&rules, Method::GET, Version::HTTP_11, Some(host)), None, "{host}");
        }
        for host in [
            "attacker.example",
            "attacker.example:9902",
            "127.0.0.1.nip.io",
            "",
            "[",
            ":9902",
            "é",
            "localhost.evil",
        ] {
            let (status, text) = refuse(&rules, Method::GET, Version::HTTP_11, Some(host)).unwrap();
            assert_eq!(status, 421, "{host}");
            assert!(text.contains("--admin-hosts"), "{text}");
        }
        assert_eq!(refuse(&reads(&["*"]), Method::GET, Version::HTTP_11, Some("any.example")), None);
        assert_eq!(refuse(&Rules::Everything, Method::GET, Version::HTTP_11, Some("any.example")), None);
    }

    #[test]
    fn only_old_clients_need_not_name_a_host() {
        assert_eq!(refuse(&reads(&[]), Method::GET, Version::HTTP_10, None), None);
        assert_eq!(refuse(&reads(&[]), Method::GET, Version::HTTP_11, None).unwrap().0, 421);
        assert_eq!(
            refuse(&reads(&[]), Method::GET, Version::HTTP_10, Some("attacker.example")).unwrap().0,
            421
        );
        // The name in the request's own line counts as well as that of the header.
        let request = Request::builder().uri("http://attacker.example/v1/state").header(HOST, "localhost");
        assert!(reads(&[]).refuse(&request.body(()).unwrap()).is_some());
    }

    #[test]
    fn changes_are_for_the_socket() {
        for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
            let (status, text) =
                refuse(&reads(&[]), method.clone(), Version::HTTP_11, Some("localhost")).unwrap();
            assert_eq!(status, 403);
            assert!(text.contains(method.as_str()) && text.contains("/run/forwarder/admin.sock"), "{text}");
            assert_eq!(refuse(&Rules::Everything, method, Version::HTTP_11, None), None);
        }
        let rules = Rules::Reads { hosts: Vec::new(), socket: None };
        let (_, text) = refuse(&rules, Method::POST, Version::HTTP_10, None).unwrap();
        assert!(text.contains("--admin-socket PATH"), "{text}");
    }
}
