//! The settings of listeners, as far as the agent's own say something of them.

use std::num::NonZeroU32;
use std::sync::Arc;

use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{ListenerSettings, MOST_CLIENT_RATE};

use super::{Options, SettingsError, check_clients, check_networks, off_if_zero, or_default, within};

impl Options {
    /// The settings of listeners where their Gateway says nothing else.
    ///
    /// # Errors
    /// A value that cannot be used.
    pub fn listener_defaults(&self) -> Result<ListenerSettings, SettingsError> {
        let defaults = ListenerSettings::default();
        let connect_timeout = or_default(self.connect_timeout, defaults.connect_timeout);
        if connect_timeout.is_zero() {
            return Err(SettingsError::Value {
                setting: "connect-timeout",
                value: "0".to_owned(),
                remedy: "set how long an attempt may take, such as 3s",
            });
        }
        let client_cidrs = AllowedAddresses::new(self.client_cidrs.clone());
        check_networks("client-cidrs", &client_cidrs)?;
        check_clients(&client_cidrs)?;
        let client_rate = self.client_rate.unwrap_or_default();
        let client_rate = within("client-rate", client_rate, 0..=MOST_CLIENT_RATE, "set 0 to 1000000")?;
        Ok(ListenerSettings {
            datapath: self.datapath.unwrap_or(defaults.datapath),
            client_cidrs: Arc::new(client_cidrs),
            client_rate: NonZeroU32::new(client_rate),
            idle_timeout: off_if_zero(or_default(
                self.idle_timeout,
                defaults.idle_timeout.unwrap_or_default(),
            )),
            half_closed_timeout: off_if_zero(or_default(
                self.half_closed_timeout,
                defaults.half_closed_timeout.unwrap_or_default(),
            )),
            connect_timeout,
            on_removal: self.on_removal.unwrap_or(defaults.on_removal),
            removal_drain: or_default(self.removal_drain, defaults.removal_drain),
        })
    }
}
