//! Which kinds are read from a Kubernetes API, and in which version: what is served is asked, not assumed.

use std::collections::BTreeMap;

use kube::Client;
use kube::discovery::ApiResource;

use forwarder_gateway::manifests::{GATEWAY_GROUP, Kind};

/// The kinds of the Gateway API that are read. Each may be missing from a cluster, or be there in another version.
pub const GATEWAY_KINDS: [Kind; 5] =
    [Kind::GatewayClass, Kind::Gateway, Kind::ListenerSet, Kind::TcpRoute, Kind::ReferenceGrant];

/// The kinds that every cluster has.
pub const CORE_KINDS: [Kind; 3] = [Kind::Namespace, Kind::Service, Kind::EndpointSlice];

/// The versions of the Gateway API that the types of [`forwarder_gateway::manifests`] decode, the preferred one first.
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha2"];

/// The resource of each kind of the Gateway API that the cluster serves.
pub type Served = BTreeMap<Kind, ApiResource>;

/// Asks the API server which kinds of the Gateway API it serves, and takes the most stable version of each.
///
/// # Errors
/// The API server cannot be asked. A group or version that is not there is no error.
pub async fn discover(client: &Client) -> Result<Served, kube::Error> {
    let groups = client.list_api_groups().await?;
    let group = groups.groups.into_iter().find(|group| group.name == GATEWAY_GROUP);
    let there = group.map(|group| group.versions).unwrap_or_default();
    let mut served = Served::new();
    for version in VERSIONS.iter().filter(|version| there.iter().any(|it| it.version == **version)) {
        let listed = match client.list_api_group_resources(&format!("{GATEWAY_GROUP}/{version}")).await {
            Ok(listed) => listed,
            // It went away between the two requests: the change of the CRDs will be told.
            Err(kube::Error::Api(status)) if status.code == 404 => continue,
            Err(error) => return Err(error),
        };
        for kind in GATEWAY_KINDS {
            if listed.resources.iter().any(|resource| resource.name == plural(kind)) {
                served.entry(kind).or_insert_with(|| resource(kind, version));
            }
        }
    }
    Ok(served)
}

/// The resource of a kind in a version.
pub fn resource(kind: Kind, version: &str) -> ApiResource {
    let group = group(kind);
    let api_version = if group.is_empty() { version.to_owned() } else { format!("{group}/{version}") };
    ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version,
        kind: kind.as_str().to_owned(),
        plural: plural(kind).to_owned(),
    }
}

/// The API group of a kind.
fn group(kind: Kind) -> &'static str {
    match kind {
        Kind::GatewayClass | Kind::Gateway | Kind::ListenerSet | Kind::TcpRoute | Kind::ReferenceGrant => {
            GATEWAY_GROUP
        }
        Kind::Namespace | Kind::Service => "",
        Kind::EndpointSlice => "discovery.k8s.io",
    }
}

/// The name of a kind in paths.
pub(super) fn plural(kind: Kind) -> &'static str {
    match kind {
        Kind::GatewayClass => "gatewayclasses",
        Kind::Gateway => "gateways",
        Kind::ListenerSet => "listenersets",
        Kind::TcpRoute => "tcproutes",
        Kind::ReferenceGrant => "referencegrants",
        Kind::Namespace => "namespaces",
        Kind::Service => "services",
        Kind::EndpointSlice => "endpointslices",
    }
}

/// The kind of the Gateway API that a CRD such as `gateways.gateway.networking.k8s.io` is of, if it is read.
pub(super) fn kind_of_crd(crd: &str) -> Option<Kind> {
    let (name, group) = crd.split_once('.')?;
    GATEWAY_KINDS.into_iter().find(|kind| group == GATEWAY_GROUP && name == plural(*kind))
}

/// The resource of the kinds themselves.
pub(super) fn crds() -> ApiResource {
    ApiResource {
        group: "apiextensions.k8s.io".to_owned(),
        version: "v1".to_owned(),
        api_version: "apiextensions.k8s.io/v1".to_owned(),
        kind: "CustomResourceDefinition".to_owned(),
        plural: "customresourcedefinitions".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn core_kinds_have_no_group_in_their_version() {
        assert_eq!(resource(Kind::Service, "v1").api_version, "v1");
        assert_eq!(resource(Kind::EndpointSlice, "v1").api_version, "discovery.k8s.io/v1");
        assert_eq!(resource(Kind::TcpRoute, "v1alpha2").api_version, "gateway.networking.k8s.io/v1alpha2");
    }
}
