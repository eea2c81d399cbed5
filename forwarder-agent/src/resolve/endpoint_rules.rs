//! Which endpoints are connected: none where the agent itself listens, and none whose address was refused.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;

use crate::model::{BindAddress, Listener, ListenerKey, RouteTable};
use crate::problem::Reason;

use super::{OwnSockets, ResolveSettings};

/// What endpoints are held against.
pub struct EndpointRules<'a> {
    settings: &'a ResolveSettings,
    table: &'a RouteTable,
}

impl<'a> EndpointRules<'a> {
    /// The rules where the listeners of `table` are in force.
    pub fn new(settings: &'a ResolveSettings, table: &'a RouteTable) -> Self {
        Self { settings, table }
    }

    /// Why an endpoint is not connected, if it is not: a reason, and the first half of a sentence.
    ///
    /// An endpoint that leads back to a listener is a loop, even by a chain of listeners that ends somewhere: connections of one
    /// client would take ports and descriptors as long as there are any, should the chain ever be closed.
    pub(super) fn refusal(&self, endpoint: SocketAddr) -> Option<(Reason, String)> {
        let OwnSockets { admin, .. } = &self.settings.own;
        if let Some(listener) = self.listener_at(endpoint) {
            let message = format!("{endpoint} leads back to listener {} of this forwarder", listener.name);
            return Some((Reason::Loop, message));
        }
        let is_admin = |admin: &SocketAddr| {
            admin.port() == endpoint.port() && self.is_reached_by(admin.ip(), endpoint.ip().to_canonical())
        };
        if admin.as_ref().is_some_and(is_admin) {
            return Some((Reason::Loop, format!("{endpoint} is the admin endpoint of this forwarder")));
        }
        let network = self.settings.endpoint_addresses.refusing(endpoint.ip())?;
        let message = format!("{} is refused by --endpoint-cidrs (!{network})", endpoint.ip());
        Some((Reason::AddressNotAllowed, message))
    }

    /// The listener that connections to `endpoint` would reach.
    fn listener_at(&self, endpoint: SocketAddr) -> Option<&'a Listener> {
        let (ip, port) = (endpoint.ip().to_canonical(), NonZeroU16::new(endpoint.port())?);
        let at = |address| self.table.listeners.get(&ListenerKey { address, port });
        let unspecified = [IpAddr::from([0; 4]), IpAddr::from([0; 16])].map(BindAddress::Ip);
        let any = || unspecified.into_iter().chain([BindAddress::Any]).find_map(at);
        at(BindAddress::Ip(ip)).or_else(|| any().filter(|_| self.is_own(ip)))
    }

    /// Whether a socket that is bound to `bound` takes connections to `ip`.
    fn is_reached_by(&self, bound: IpAddr, ip: IpAddr) -> bool {
        bound == ip || bound.is_unspecified() && self.is_own(ip)
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.settings.own.addresses.contains(&ip)
    }
}
