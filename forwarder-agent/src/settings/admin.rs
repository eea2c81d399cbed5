//! Where the admin endpoint is, and who may use it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::SettingsError;

/// Where the admin endpoint answers reads by TCP by default.
pub const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9902);

/// Where the admin endpoint's socket is by default.
pub const ADMIN_SOCKET: &str = "/run/forwarder/admin.sock";

/// The TCP address of the admin endpoint, or none.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct AdminAddress(pub Option<SocketAddr>);

impl std::str::FromStr for AdminAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| {
            format!("`{text}` is neither an address with a port, such as 127.0.0.1:9902, nor `off`")
        })
    }
}

impl<'de> Deserialize<'de> for AdminAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The path of the admin endpoint's socket, or none.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct AdminSocketPath(pub Option<PathBuf>);

impl std::str::FromStr for AdminSocketPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "off" {
            return Ok(Self(None));
        }
        if !Path::new(text).is_absolute() || text.ends_with('/') {
            return Err(format!(
                "`{text}` is neither the whole path of a socket, such as {ADMIN_SOCKET}, nor `off`"
            ));
        }
        Ok(Self(Some(text.into())))
    }
}

impl<'de> Deserialize<'de> for AdminSocketPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A group, by its name or its number.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum GroupName {
    /// By its number.
    Id(u32),
    /// By its name, which the system knows, or will.
    Name(String),
}

impl std::str::FromStr for GroupName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() {
            return Err("a group has a name or a number".to_owned());
        }
        Ok(text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Id))
    }
}

impl std::fmt::Display for GroupName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

impl<'de> Deserialize<'de> for GroupName {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Text {
            Number(u32),
            Name(String),
        }
        match Text::deserialize(deserializer)? {
            Text::Number(id) => Ok(Self::Id(id)),
            Text::Name(name) => name.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// The settings of the admin endpoint, complete.
#[derive(Clone, Debug)]
pub struct AdminSettings {
    /// Where it answers reads by TCP; `None` is nowhere.
    pub address: Option<SocketAddr>,
    /// The names beside `localhost` by which requests may address it there; `*` is any.
    pub hosts: Vec<String>,
    /// Its socket, which answers everything; `None` is none.
    pub socket: Option<PathBuf>,
    /// Whose group may use the socket beside its owner.
    pub group: Option<GroupName>,
}

impl AdminSettings {
    pub(super) fn new(
        address: Option<AdminAddress>,
        hosts: Vec<String>,
        socket: Option<AdminSocketPath>,
        group: Option<GroupName>,
    ) -> Result<Self, SettingsError> {
        if let Some(host) = hosts.iter().find(|host| host.is_empty() || host.contains([':', '/', ' '])) {
            return Err(SettingsError::Value {
                setting: "admin-hosts",
                value: format!("`{host}`"),
                remedy: "set names alone, without a port, such as metrics.example.com, or `*` for any",
            });
        }
        Ok(Self {
            address: address.map_or(Some(ADMIN), |address| address.0),
            hosts,
            socket: socket.map_or_else(|| Some(PathBuf::from(ADMIN_SOCKET)), |socket| socket.0),
            group,
        })
    }
}
