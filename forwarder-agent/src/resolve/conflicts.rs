//! Who gets a port: conflicts among the listeners of one Gateway, and among Gateways.

use std::collections::HashMap;
use std::net::IpAddr;
use std::num::NonZeroU16;

use crate::manifests::ObjectRef;
use crate::model::{BindAddress, ListenerName};
use crate::problem::{Problem, Reason};
use crate::status::list;

use super::gateways::{JudgedGateway, Refusal};
use super::listeners::JudgedListener;

/// Marks the listeners of one Gateway that cannot share their port: all of them, for there is no order among them.
///
/// Protocols on top of TCP need the port as TCP does. Others, UDP first of all, have ports of their own.
pub(super) fn within_gateway(
    object: &ObjectRef,
    listeners: &mut [JudgedListener<'_>],
    by_port: &HashMap<i64, Vec<usize>>,
    problems: &mut Vec<Problem>,
) {
    for indices in by_port.values().filter(|indices| indices.len() > 1) {
        let on_tcp = |index: &&usize| listeners.get(**index).is_some_and(|l| uses_tcp(&l.spec.protocol));
        let rivals: Vec<usize> = indices.iter().filter(on_tcp).copied().collect();
        let any_tcp = rivals.iter().any(|index| listeners.get(*index).is_some_and(JudgedListener::is_tcp));
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
            problems.push(Problem::error(Reason::ProtocolConflict, object.clone(), field, message.as_str()));
            listener.conflict = Some(message);
        }
    }
}

fn uses_tcp(protocol: &str) -> bool {
    matches!(protocol, "TCP" | "HTTP" | "HTTPS" | "TLS")
}

/// Refuses listeners whose address and port an older Gateway has: what works is not to be broken by what is new.
///
/// `gateways` are sorted oldest first. A listener of several addresses gets all of them or none.
pub(super) fn between_gateways(gateways: &mut [JudgedGateway<'_>], problems: &mut Vec<Problem>) {
    let mut ports: HashMap<NonZeroU16, PortHolders> = HashMap::new();
    for gateway in gateways {
        let mut refused = Vec::new();
        for (index, listener) in gateway.served_listeners() {
            let Some(port) = listener.port else { continue };
            let holders = ports.entry(port).or_default();
            let addresses = &gateway.addresses.bind;
            if let Some(holder) = addresses.iter().find_map(|address| holders.holder(*address)) {
                refused.push((index, unavailable(port, holder)));
            } else {
                for &address in addresses {
                    holders.hold(address, listener.name.clone());
                }
            }
        }
        let object = gateway.object();
        for (index, message) in refused {
            let field = format!("spec.listeners[{index}].port");
            problems.push(Problem::error(Reason::PortUnavailable, object.clone(), field, message.as_str()));
            if let Some(listener) = gateway.listeners.get_mut(index) {
                listener.refusal = Some(Refusal { reason: Reason::PortUnavailable, message });
            }
        }
    }
}

fn unavailable(port: NonZeroU16, (address, holder): (BindAddress, &ListenerName)) -> String {
    format!(
        "port {port} is held by listener {holder} on {address}, whose Gateway is older or first by name: this listener is not served; \
         choose another port, or another address for one of the Gateways"
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
