//! Manifests to the table of what is to be forwarded, the statuses and the problems: pure, and never failing.
//!
//! The rules are those of the Gateway API 1.6, which this module follows to the letter where it is clear; where it is
//! silent, an existing thing keeps working (the oldest Gateway keeps a port, the oldest route a listener) and what is
//! not served is said in a condition and in a [`Problem`](crate::problem::Problem), never left out silently.
//!
//! The flow: `classes` finds every GatewayClass of ours; `gateways` and `listeners` evaluate each Gateway by itself,
//! `listener_sets` what others add to it; `conflicts` gives each port to one of them; `attach` brings the routes to listeners; `destinations` resolves their
//! backendRefs; `table` and `conditions` write down the result. Work is proportional to the number of objects and
//! attachments: whatever is looked up by name has a map. A change of EndpointSlices alone, the most frequent one, goes
//! another way, which costs what it changes: [`update_endpoints`].

mod addresses;
mod attach;
pub mod backends;
mod classes;
mod conditions;
mod conflicts;
mod destinations;
mod endpoint_rules;
mod evaluated;
mod gateways;
mod grants;
mod incremental;
mod listener_sets;
mod listeners;
mod namespaces;
mod problems;
mod selector;
mod settings;
mod table;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::allowed::{AllowedAddresses, AllowedPorts};
use crate::manifests::Manifests;
use crate::model::{ListenerSettings, RouteTable};
use crate::status::Statuses;

pub use self::endpoint_rules::EndpointRules;
pub use self::incremental::update_endpoints;
pub use self::problems::Problems;
pub use self::settings::ANNOTATIONS;

/// The controller name that stands in a GatewayClass of the forwarder unless it is told another.
pub const CONTROLLER_NAME: &str = "forwarder.dev/tcp";

/// What resolving depends on besides the manifests.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ResolveSettings {
    /// The `spec.controllerName` of every GatewayClass that is ours.
    pub controller_name: String,
    /// The settings of a listener whose Gateway or ListenerSet does not say otherwise.
    pub listener_defaults: ListenerSettings,
    /// Whether a namespace that is not among the manifests exists all the same, without labels: so in files. In a
    /// cluster, it is one that the agent has not seen yet, and no selector matches it.
    pub implicit_namespaces: bool,
    /// Whether what is not served is said even where it may be meant so: a Gateway of another controller, a listener without a route. In
    /// files somebody has written it for this agent; in a cluster other controllers and later routes are usual.
    pub tells_unserved: bool,
    /// Which ports listeners may take.
    pub listener_ports: AllowedPorts,
    /// Which addresses endpoints may have.
    pub endpoint_addresses: AllowedAddresses,
    /// What of this node must not be an endpoint.
    pub own: OwnSockets,
}

/// What the agent itself listens on besides its listeners, and by which addresses it is reached.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct OwnSockets {
    /// The addresses of this node but for those of `lo` and those of single links.
    pub addresses: BTreeSet<IpAddr>,
    /// The admin endpoint.
    pub admin: Option<SocketAddr>,
}

impl ResolveSettings {
    /// The settings for manifests from a Kubernetes API.
    pub fn for_cluster(listener_defaults: ListenerSettings) -> Self {
        Self {
            implicit_namespaces: false,
            tells_unserved: false,
            endpoint_addresses: AllowedAddresses::for_cluster(Vec::new()),
            ..Self::for_files(listener_defaults)
        }
    }

    /// The settings for manifests from files.
    pub fn for_files(listener_defaults: ListenerSettings) -> Self {
        Self {
            controller_name: CONTROLLER_NAME.to_owned(),
            listener_defaults,
            implicit_namespaces: true,
            tells_unserved: true,
            listener_ports: AllowedPorts::default(),
            endpoint_addresses: AllowedAddresses::default(),
            own: OwnSockets::default(),
        }
    }
}

/// What the manifests amount to.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Resolved {
    /// What is to be forwarded.
    pub table: RouteTable,
    /// The statuses, on the assumption that every listener of the table can be bound:
    /// [`crate::status::apply_bind_failures`] corrects them.
    pub statuses: Arc<Statuses>,
    /// What is wrong.
    pub problems: Problems,
}

/// Resolves manifests.
pub fn resolve(manifests: &Manifests, settings: &ResolveSettings) -> Resolved {
    let mut problems = Vec::new();
    let classes = classes::evaluate(manifests, settings, &mut problems);
    let mut gateways = gateways::evaluate(manifests, settings, &classes, &mut problems);
    listener_sets::evaluate(manifests, settings, &mut gateways, &mut problems);
    conflicts::with_listener_sets(&mut gateways, &mut problems);
    conflicts::between_gateways(&mut gateways, &mut problems);
    let routes = attach::attach(manifests, settings, &mut gateways, &mut problems);
    if settings.tells_unserved {
        for gateway in &gateways {
            problems.extend(gateway.without_route(manifests));
        }
    }
    let grants = grants::Grants::new(manifests);
    let destinations = destinations::resolve(manifests, &grants, &routes, &mut problems);
    let (table, of_backends) = table::build(manifests, settings, &gateways, &routes, &destinations);
    let statuses = Arc::new(conditions::statuses(&classes, &gateways, &routes, &destinations, manifests));
    Resolved { table, statuses, problems: Problems { general: problems.into(), of_backends } }
}
