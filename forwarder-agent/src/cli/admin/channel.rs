//! The channels by which a command asks an agent.

use std::env::{self, VarError};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

use super::AskError;
use crate::settings::{ADMIN, ADMIN_SOCKET, AdminAddress, AdminSocketPath};

/// Which agent is asked.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct AgentArgs {
    /// Unix socket of the running agent, for reads and changes; also `FORWARDER_ADMIN_SOCKET` [default:
    /// /run/forwarder/admin.sock, or the default of --admin if it does not exist]
    #[arg(long, value_name = "PATH", global = true)]
    admin_socket: Option<PathBuf>,

    /// TCP address of the running agent, for reads only; also `FORWARDER_ADMIN` [default: 127.0.0.1:9902]
    #[arg(long, value_name = "ADDR:PORT", global = true, conflicts_with = "admin_socket")]
    admin: Option<SocketAddr>,
}

/// A channel to an agent.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Channel {
    /// Its socket.
    Socket(PathBuf),
    /// Its address.
    Tcp(SocketAddr),
}

impl Channel {
    /// What a request names as its host.
    pub(super) fn host(&self) -> String {
        match self {
            Self::Socket(_) => "localhost".to_owned(),
            Self::Tcp(address) => address.to_string(),
        }
    }
}

impl fmt::Display for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket(path) => path.display().fmt(f),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// The channels to an agent: the first at whose end somebody listens counts.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Channels(Vec<Channel>);

impl Channels {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Channel> {
        self.0.iter()
    }
}

impl AgentArgs {
    /// The channels to the agent that is meant.
    ///
    /// # Errors
    /// The environment says nothing that can be used.
    pub(super) fn channels(&self) -> Result<Channels, AskError> {
        Ok(self.channels_with(variable("FORWARDER_ADMIN_SOCKET")?, variable("FORWARDER_ADMIN")?))
    }

    /// The same, with what the environment says. One agent's socket and another's address must not be mixed: so what nobody has
    /// named is asked only where nothing is named.
    fn channels_with(&self, socket: Option<AdminSocketPath>, address: Option<AdminAddress>) -> Channels {
        if let Some(address) = self.admin {
            return Channels(vec![Channel::Tcp(address)]);
        }
        if let Some(path) = &self.admin_socket {
            return Channels(vec![Channel::Socket(path.clone())]);
        }
        let of_nobody =
            || (Some(AdminSocketPath(Some(ADMIN_SOCKET.into()))), Some(AdminAddress(Some(ADMIN))));
        let is_named = socket.as_ref().is_some_and(|socket| socket.0.is_some())
            || address.is_some_and(|address| address.0.is_some());
        let (socket, address) = if is_named { (socket, address) } else { of_nobody() };
        let socket = socket.and_then(|socket| socket.0).map(Channel::Socket);
        Channels(socket.into_iter().chain(address.and_then(|address| address.0).map(Channel::Tcp)).collect())
    }
}

/// A variable of the environment that an agent's settings have too.
fn variable<T: FromStr<Err = String>>(name: &'static str) -> Result<Option<T>, AskError> {
    match env::var(name) {
        Ok(text) => text.parse().map(Some).map_err(|reason| AskError::Environment { name, reason }),
        Err(VarError::NotPresent) => Ok(None),
        Err(error) => Err(AskError::Environment { name, reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_asked_where_it_was_named_and_nowhere_else() {
        let args = |socket: Option<&str>, address: Option<&str>| AgentArgs {
            admin_socket: socket.map(Into::into),
            admin: address.map(|address| address.parse().unwrap()),
        };
        let none = args(None, None);
        for (args, socket, address, expected) in [
            (&none, None, None, &[ADMIN_SOCKET, "127.0.0.1:9902"][..]),
            (&none, Some("off"), Some("off"), &[ADMIN_SOCKET, "127.0.0.1:9902"]),
            (&none, Some("/run/a.sock"), None, &["/run/a.sock"]),
            (&none, Some("/run/a.sock"), Some("10.0.0.1:1"), &["/run/a.sock", "10.0.0.1:1"]),
            (&none, Some("off"), Some("10.0.0.1:1"), &["10.0.0.1:1"]),
            (&none, None, Some("10.0.0.1:1"), &["10.0.0.1:1"]),
            (&args(Some("/run/b.sock"), None), Some("/run/a.sock"), Some("10.0.0.1:1"), &["/run/b.sock"]),
            (&args(None, Some("10.0.0.2:2")), Some("/run/a.sock"), None, &["10.0.0.2:2"]),
        ] {
            let socket = socket.map(|text| text.parse().unwrap());
            let address = address.map(|text| text.parse().unwrap());
            let channels = args.channels_with(socket, address);
            let channels: Vec<String> = channels.iter().map(Channel::to_string).collect();
            assert_eq!(channels, expected, "{args:?}");
        }
    }
}
