//! Who gets a port: conflicts among the listeners of one Gateway, with those of its ListenerSets, and among Gateways.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::num::NonZeroU16;

use super::evaluated::{EvaluatedGateway, EvaluatedListener, Listeners, Place, Rejection};
use crate::manifests::NamespacedName;
use crate::model::{BindAddress, ListenerName, ListenerParent};
use crate::problem::{Problem, Reason};
use crate::status::list;

/// Marks the listeners of one Gateway that cannot share their port: all of them, for there is no order among them.
///
/// Protocols on top of TCP need the port as TCP does. Others, UDP first of all, have ports of their own.
pub(super) fn within_gateway(listeners: &mut Listeners<'_>, problems: &mut Vec<Problem>) {
    let Listeners { parent, all: listeners, by_port, .. } = listeners;
    for indices in by_port.values().filter(|indices| indices.len() > 1) {
        // One whose file has an error may not be meant to have this port.
        let on_tcp = |index: &&usize| {
            listeners.get(**index).is_some_and(|l| uses_tcp(&l.spec.protocol) && l.spec.refused.is_none())
        };
        let rivals: Vec<usize> = indices.iter().filter(on_tcp).copied().collect();
        let any_tcp = rivals.iter().any(|index| listeners.get(*index).is_some_and(EvaluatedListener::is_tcp));
        if rivals.len() < 2 || !any_tcp {
            continue;
        }
        let shown: Vec<String> = rivals
            .iter()
            .filter_map(|index| listeners.get(*index))
            .map(|l| format!("{} ({})", l.spec.name, l.spec.protocol))
            .collect();
        for index in rivals {
            let Some(listener) = listeners.get_mut(index) else {
                continue;
            };
            let message = format!(
                "listeners {} cannot share port {}: none of them is served; give each a port of its own",
                list(&shown),
                listener.spec.port
            );
            let field = format!("spec.listeners[{index}].port");
            problems.push(Problem::error(Reason::ProtocolConflict, parent.object(), field, message.as_str()));
            listener.conflict = Some(message);
        }
    }
}

fn uses_tcp(protocol: &str) -> bool {
    matches!(protocol, "TCP" | "HTTP" | "HTTPS" | "TLS")
}

/// A port that some listener of a Gateway, or of its ListenerSets, asks for first.
struct Claim {
    holder: ListenerName,
    /// Whether one that shares the port is a TCP listener, which then shares it with no other.
    has_tcp: bool,
}

/// Marks the listeners of ListenerSets whose port an earlier listener of the same Gateway asks for: the Gateway's own
/// come first, then those of its ListenerSets, oldest first, each in the order of its spec.
///
/// To ask for a port is enough to have it here, so that an earlier listener which is mended takes nothing away from a
/// later one that works.
pub(super) fn with_listener_sets(gateways: &mut [EvaluatedGateway<'_>], problems: &mut Vec<Problem>) {
    for gateway in gateways.iter_mut().filter(|gateway| !gateway.sets.is_empty()) {
        let mut claims: HashMap<i64, Claim> = HashMap::new();
        for listener in gateway.own.all.iter().filter(|listener| uses_tcp(&listener.spec.protocol)) {
            let holder = || Claim { holder: listener.name.clone(), has_tcp: false };
            claims.entry(listener.spec.port).or_insert_with(holder).has_tcp |= listener.is_tcp();
        }
        for set in gateway.sets.iter_mut().filter(|set| set.rejection.is_none()) {
            let Listeners { parent, all, .. } = &mut set.listeners;
            for (index, listener) in all.iter_mut().enumerate() {
                if let Some(message) = claim(&mut claims, listener) {
                    let field = format!("spec.listeners[{index}].port");
                    let reason = Reason::ProtocolConflict;
                    problems.push(Problem::error(reason, parent.object(), field, message.as_str()));
                    listener.conflict = Some(message);
                }
            }
        }
    }
}

/// Claims a listener's port, or says why it does not get it.
fn claim(claims: &mut HashMap<i64, Claim>, listener: &EvaluatedListener<'_>) -> Option<String> {
    if !uses_tcp(&listener.spec.protocol) {
        return None;
    }
    match claims.entry(listener.spec.port) {
        Entry::Vacant(free) => {
            free.insert(Claim { holder: listener.name.clone(), has_tcp: listener.is_tcp() });
            None
        }
        Entry::Occupied(held) if !held.get().has_tcp && !listener.is_tcp() => None,
        Entry::Occupied(held) => Some(format!(
            "port {} of the Gateway is held by {}, which comes first: this listener is not served; choose another port",
            listener.spec.port,
            shown(&held.get().holder, listener.name.parent.name())
        )),
    }
}

/// The holder of a port, as the owner of `to` may see it: ListenerSets of other namespaces are not named.
fn shown(holder: &ListenerName, to: &NamespacedName) -> String {
    match &holder.parent {
        ListenerParent::ListenerSet(name) if name.namespace != to.namespace => {
            "a listener in another namespace".to_owned()
        }
        ListenerParent::Gateway(_) | ListenerParent::ListenerSet(_) => format!("listener {holder}"),
    }
}

/// Refuses listeners whose address and port an older Gateway has, or an older ListenerSet of another Gateway: what works
/// is not to be broken by what is new.
///
/// A listener of several addresses gets all of them or none.
pub(super) fn between_gateways(gateways: &mut [EvaluatedGateway<'_>], problems: &mut Vec<Problem>) {
    let mut ports: HashMap<NonZeroU16, PortHolders> = HashMap::new();
    for Place { gateway, set } in oldest_first(gateways) {
        let Some(gateway) = gateways.get_mut(gateway) else { continue };
        let mut refused = Vec::new();
        for (index, listener) in gateway.served_listeners(set) {
            let Some(port) = listener.port else { continue };
            let holders = ports.entry(port).or_default();
            let addresses = &gateway.addresses.bind;
            if let Some(holder) = addresses.iter().find_map(|address| holders.holder(*address)) {
                refused.push((index, unavailable(port, holder, listener.name.parent.name())));
            } else {
                for &address in addresses {
                    holders.hold(address, listener.name.clone());
                }
            }
        }
        let Some(listeners) = gateway.listeners_mut(set) else { continue };
        let object = listeners.parent.object();
        for (index, message) in refused {
            let field = format!("spec.listeners[{index}].port");
            problems.push(Problem::error(Reason::PortUnavailable, object.clone(), field, message.as_str()));
            if let Some(listener) = listeners.all.get_mut(index) {
                listener.rejection = Some(Rejection { reason: Reason::PortUnavailable, message });
            }
        }
    }
}

/// All Gateways and ListenerSets, oldest first; of the same age a Gateway comes before a ListenerSet.
fn oldest_first(gateways: &[EvaluatedGateway<'_>]) -> Vec<Place> {
    let places = |(gateway, evaluated): (usize, &EvaluatedGateway<'_>)| {
        evaluated.parts().map(move |set| Place { gateway, set }).collect::<Vec<_>>()
    };
    let mut places: Vec<Place> = gateways.iter().enumerate().flat_map(places).collect();
    places.sort_by_cached_key(|place| {
        let gateway = gateways.get(place.gateway)?;
        let metadata = match place.set {
            None => &gateway.gateway.metadata,
            Some(set) => &gateway.sets.get(set)?.set.metadata,
        };
        let (is_undated, created, name) = metadata.age_key();
        Some((is_undated, created, place.set.is_some(), name))
    });
    places
}

fn unavailable(
    port: NonZeroU16,
    (address, holder): (BindAddress, &ListenerName),
    to: &NamespacedName,
) -> String {
    format!(
        "port {port} is held by {} on {address}, whose {} is older or first by name: this listener is not served; \
         choose another port, or another address for one of the Gateways",
        shown(holder, to),
        holder.parent.kind()
    )
}

/// Who holds one port, by address; asked by overlap without looking at every holder.
#[derive(Default)]
struct PortHolders {
    any: Option<ListenerName>,
    first: Option<(IpAddr, ListenerName)>,
    by_address: HashMap<IpAddr, ListenerName>,
}

impl PortHolders {
    fn holder(&self, address: BindAddress) -> Option<(BindAddress, &ListenerName)> {
        if let Some(holder) = &self.any {
            return Some((BindAddress::Any, holder));
        }
        match address {
            BindAddress::Any => self.first.as_ref().map(|(ip, holder)| (BindAddress::Ip(*ip), holder)),
            BindAddress::Ip(ip) => self.by_address.get(&ip).map(|holder| (address, holder)),
        }
    }

    fn hold(&mut self, address: BindAddress, holder: ListenerName) {
        match address {
            BindAddress::Any => self.any = Some(holder),
            BindAddress::Ip(ip) => {
                self.first.get_or_insert_with(|| (ip, holder.clone()));
                self.by_address.insert(ip, holder);
            }
        }
    }
}
