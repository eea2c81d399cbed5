//! Which endpoints are connected: none where the agent itself listens, and none whose address was refused.

use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::manifests::Manifests;
use crate::model::{BindAddress, Listener, ListenerKey, Listeners};
use crate::problem::Reason;

use super::{OwnSockets, ResolveSettings};

/// What endpoints are held against.
pub struct EndpointRules<'a> {
    settings: &'a ResolveSettings,
    manifests: &'a Manifests,
    listeners: &'a Listeners,
}

impl<'a> EndpointRules<'a> {
    /// The rules where these listeners are in force, made of `manifests`.
    pub fn new(settings: &'a ResolveSettings, manifests: &'a Manifests, listeners: &'a Listeners) -> Self {
        Self { settings, manifests, listeners }
    }

    /// Why an endpoint is not connected, if it is not: a reason, and the first half of a sentence.
    ///
    /// An endpoint that leads back to a listener is a loop, even by a chain of listeners that ends somewhere: connections of one
    /// client would take ports and descriptors as long as there are any, should the chain ever be closed.
    pub(super) fn rejection(&self, endpoint: SocketAddr) -> Option<(Reason, String)> {
        let OwnSockets { admin, .. } = &self.settings.own;
        if let Some(listener) = self.listener_at(endpoint) {
            let message = format!("{endpoint} leads back to listener {} of this forwarder", listener.name);
            return Some((Reason::Loop, message));
        }
        if let Some(listener) = self.listener_elsewhere_at(endpoint) {
            let message = format!(
                "{endpoint} leads back to listener {} of this forwarder, on another node",
                listener.name
            );
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
        let ip = endpoint.ip().to_canonical();
        self.listener(BindAddress::Ip(ip), endpoint)
            .or_else(|| self.listener_of_any_address(endpoint).filter(|_| self.is_own(ip)))
    }

    /// The listener that they would reach at another node of this installation: its agents listen as this one does.
    fn listener_elsewhere_at(&self, endpoint: SocketAddr) -> Option<&'a Listener> {
        let is_there = self.manifests.node_addresses.contains(&endpoint.ip().to_canonical());
        if is_there { self.listener_of_any_address(endpoint) } else { None }
    }

    /// The listener at the endpoint's port that is bound to every address.
    fn listener_of_any_address(&self, endpoint: SocketAddr) -> Option<&'a Listener> {
        let unspecified = [IpAddr::from([0; 4]), IpAddr::from([0; 16])].map(BindAddress::Ip);
        unspecified.into_iter().chain([BindAddress::Any]).find_map(|address| self.listener(address, endpoint))
    }

    /// The listener at the endpoint's port that is bound to `address`.
    fn listener(&self, address: BindAddress, endpoint: SocketAddr) -> Option<&'a Listener> {
        let port = NonZeroU16::new(endpoint.port())?;
        self.listeners.get(&ListenerKey { address, port }).map(Arc::as_ref)
    }

    /// Whether a socket that is bound to `bound` takes connections to `ip`.
    fn is_reached_by(&self, bound: IpAddr, ip: IpAddr) -> bool {
        bound == ip || bound.is_unspecified() && self.is_own(ip)
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        ip.is_loopback() || self.settings.own.addresses.contains(&ip)
    }
}
