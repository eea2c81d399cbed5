//! `Gateway.spec.addresses`: the addresses that the listeners of a Gateway are bound to.

use std::net::{IpAddr, Ipv4Addr};

use crate::manifests::{GatewayAddress, ObjectRef};
use crate::model::BindAddress;
use crate::problem::{Problem, Reason};

/// The addresses of a Gateway.
#[derive(Debug, Default)]
pub(super) struct Addresses {
    /// The usable ones, each once: [`BindAddress::Any`] alone, or addresses in the order of the spec.
    pub(super) bind: Vec<BindAddress>,
    /// An address of a type that is not served, which is reason not to accept the Gateway.
    pub(super) unsupported: Option<String>,
    /// Values that are no address of a node, as a sentence.
    pub(super) unusable: Option<String>,
}

/// Reads the addresses of the Gateway `object`.
pub(super) fn read(object: &ObjectRef, spec: &[GatewayAddress], problems: &mut Vec<Problem>) -> Addresses {
    let mut addresses = Addresses::default();
    let mut unusable = Vec::new();
    for (index, address) in spec.iter().enumerate() {
        let field = format!("spec.addresses[{index}]");
        match read_one(address) {
            Ok(bind) if addresses.bind.contains(&bind) => {}
            Ok(bind) => addresses.bind.push(bind),
            Err(Refused::Type(message)) => {
                let field = format!("{field}.type");
                problems.push(Problem::error(
                    Reason::UnsupportedAddress,
                    object.clone(),
                    field,
                    message.as_str(),
                ));
                addresses.unsupported.get_or_insert(message);
            }
            Err(Refused::Value(message)) => {
                let field = format!("{field}.value");
                problems.push(Problem::error(
                    Reason::AddressNotUsable,
                    object.clone(),
                    field,
                    message.as_str(),
                ));
                unusable.push(message);
            }
        }
    }
    if spec.is_empty() || addresses.bind.contains(&BindAddress::Any) {
        // Every address includes those that are named besides.
        addresses.bind = vec![BindAddress::Any];
    }
    addresses.unusable = (!unusable.is_empty()).then(|| unusable.join("; "));
    addresses
}

enum Refused {
    Type(String),
    Value(String),
}

fn read_one(address: &GatewayAddress) -> Result<BindAddress, Refused> {
    let type_ = address.type_.as_deref().unwrap_or("IPAddress");
    if type_ != "IPAddress" {
        return Err(Refused::Type(format!(
            "an address of type {type_} is asked for, and only IPAddress is supported: the Gateway is not served; \
             name an IP address of the node, or none for all"
        )));
    }
    let Some(value) = address.value.as_deref().filter(|value| !value.is_empty()) else {
        return Ok(BindAddress::Any);
    };
    match value.parse::<IpAddr>().map(|ip| ip.to_canonical()) {
        Ok(ip) if ip.is_unspecified() => Ok(BindAddress::Any),
        Ok(ip) if !ip.is_multicast() && ip != IpAddr::V4(Ipv4Addr::BROADCAST) => Ok(BindAddress::Ip(ip)),
        Ok(_) | Err(_) => Err(Refused::Value(format!(
            "{value:?} is no IP address of a node: nothing is bound for it; name an address that the node has"
        ))),
    }
}
