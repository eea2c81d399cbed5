//! The rules on listeners' ports and endpoints' addresses, as far as they are checked before any manifest is read.

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
    if let Some(network) = addresses.without_effect() {
        return Err(SettingsError::Value {
            setting: "endpoint-cidrs",
            value: format!("`{network}`"),
            remedy: "it changes nothing, because no wider network with `!` refuses it; remove it, or add `!0.0.0.0/0` or `!::/0` to refuse all others",
        });
    }
    Ok(())
}
