//! Where the packets of pairs leave, and whether they may.

use std::net::{IpAddr, SocketAddr};

use forwarder_common::flow::{Flow, NextHop};
use forwarder_common::tuple::FourTuple;
use forwarder_common::tuple::address_of;

use super::{FlowTable, JoinedPair};
use crate::fallback_reason::FallbackReason;
use crate::net::egress_path::Via;
use crate::net::routes::{LookupError, ResolvedRoute, RouteError};
use crate::net::stack::Family;
use crate::tcp::join::Hop;
use crate::tcp::leg::Leg;

impl FlowTable {
    /// Whether the packets of two legs could leave now; each is told by the node's end of it, and its peer.
    ///
    /// # Errors
    /// Why not.
    pub fn check_paths(
        &self,
        downstream: (SocketAddr, SocketAddr),
        upstream: (SocketAddr, SocketAddr),
    ) -> Result<(), FallbackReason> {
        for (local, peer) in [downstream, upstream] {
            self.hop(downstream.1.ip().to_canonical(), local, peer)?;
        }
        Ok(())
    }

    /// Where a leg's packets leave: by an interface on which programs hang.
    pub(super) fn hop(
        &self,
        client: IpAddr,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> Result<Hop, FallbackReason> {
        let egress = self.routes.egress(local.ip(), peer.ip()).map_err(|error| {
            tracing::debug!(%error, "a connection stays in userspace");
            match error {
                RouteError::Lookup { source: LookupError::LinkLocal, .. } => FallbackReason::LinkLocal,
                _ => FallbackReason::NoRoute,
            }
        })?;
        if egress.is_local {
            return Err(FallbackReason::SameHost);
        }
        let via = self.paths.check(egress.interface, client)?;
        Ok(Hop {
            interface: egress.interface,
            next_hop: NextHop::new(egress.next_hop),
            mtu: self.mtu(&egress),
            via,
            hop_limit: self.hop_limit(egress.interface, Family::of(peer.ip()), via),
        })
    }

    /// Whether the stack sends on what is left to it: that arrives by the interface that the other direction leaves by.
    pub(super) fn check_stack(&self, flows: &[(FourTuple, Flow); 2]) -> Result<(), FallbackReason> {
        let [(key, request), (_, response)] = flows;
        let family = Family::of(address_of(key.source));
        for (flow, arrival) in [(request, response.interface), (response, request.interface)] {
            if Via::of(flow) == Via::Stack {
                self.paths.check_stack(arrival, family)?;
            }
        }
        Ok(())
    }

    /// Whether a leg's packets have the addresses of its socket where the programs see them.
    pub(super) fn check_translation(&self, leg: &Leg) -> Result<(), FallbackReason> {
        match self.conntrack.is_translated(leg.local, leg.peer) {
            Ok(false) => Ok(()),
            Ok(true) => Err(FallbackReason::Translated),
            Err(error) => {
                tracing::debug!(%error, "cannot ask connection tracking whether a connection is translated: it stays in userspace");
                Err(FallbackReason::TranslationUnknown)
            }
        }
    }

    /// Has connection tracking not take what the stack sends on for invalid: of each connection, it sees one direction alone,
    /// which goes beyond every window that it knows. The usual rule of firewalls would drop that.
    pub(super) fn keep_valid(&self, pair: &JoinedPair) {
        if pair.flows.iter().all(|(_, flow)| Via::of(flow) != Via::Stack) {
            return;
        }
        for (peer, local) in [pair.downstream(), pair.upstream()] {
            if let Err(error) = self.conntrack.be_liberal(local, peer) {
                tracing::debug!(%error, %peer, "cannot make connection tracking accept the packets of an offloaded connection: a rule that drops invalid packets may drop them");
            }
        }
    }

    /// The TTL or hop limit that packets get, as [`Flow::hop_limit`]: that of the node's own, and one more where the stack takes
    /// one off.
    pub(super) fn hop_limit(&self, interface: u32, family: Family, via: Via) -> u8 {
        let own = self.paths.hop_limit(interface, family);
        if via == Via::Stack { own.saturating_add(1) } else { own }
    }

    /// The largest packet that may leave, as [`Flow::mtu`]: what the route says, or the interface.
    pub(super) fn mtu(&self, egress: &ResolvedRoute) -> u32 {
        let mtus = egress.mtu.into_iter().chain(self.paths.mtu(egress.interface));
        mtus.min().unwrap_or(0)
    }
}
