//! The rules on listeners' ports, and on the addresses of endpoints and clients, as far as they are checked before any manifest is read.

use std::fmt::Display;
use std::ops::RangeInclusive;

use super::SettingsError;
use forwarder_gateway::allowed::{AllowedAddresses, AllowedPorts};

/// Refuses a rule that changes nothing, such as `1024-65535` alone: whoever wrote it expects that all else is refused.
///
/// # Errors
/// The first such rule.
pub(crate) fn check_rules(ports: &AllowedPorts, addresses: &AllowedAddresses) -> Result<(), SettingsError> {
    if let Some(ports) = ports.without_effect() {
        return Err(SettingsError::Value {
            setting: "listener-ports",
            value: format!("`{ports}`"),
            remedy: "it changes nothing, because no rule with `!` refuses one of these ports; remove it, or add `!1-65535` to refuse all others",
        });
    }
    check_networks("endpoint-cidrs", addresses)
}

/// The same for a list of networks, which is a setting of this name.
///
/// # Errors
/// The first such rule.
pub(crate) fn check_networks(
    setting: &'static str,
    addresses: &AllowedAddresses,
) -> Result<(), SettingsError> {
    let Some(network) = addresses.without_effect().next() else { return Ok(()) };
    Err(SettingsError::Value {
        setting,
        value: format!("`{network}`"),
        remedy: "it changes nothing, because no wider network with `!` refuses it; remove it, or add `!0.0.0.0/0` or `!::/0` to refuse all others",
    })
}

/// Refuses a network that no client has an address of.
///
/// # Errors
/// The first such network.
pub(crate) fn check_clients(clients: &AllowedAddresses) -> Result<(), SettingsError> {
    let Some(network) = clients.mapped() else { return Ok(()) };
    Err(SettingsError::Value {
        setting: "client-cidrs",
        value: format!("`{network}`"),
        remedy: "it is a network of IPv4 that is mapped into IPv6; write it as one of IPv4",
    })
}

/// A number, if it is within a range.
///
/// # Errors
/// It is not: with what to do.
pub(crate) fn within<T: Display + PartialOrd>(
    setting: &'static str,
    value: T,
    range: RangeInclusive<T>,
    remedy: &'static str,
) -> Result<T, SettingsError> {
    if range.contains(&value) {
        return Ok(value);
    }
    Err(SettingsError::Value { setting, value: value.to_string(), remedy })
}
