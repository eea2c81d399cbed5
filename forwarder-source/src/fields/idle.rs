//! Fields that exist, and that mean something, and that the forwarder does not use: who writes one expects what does not come.

use crate::node::Node;
use forwarder_gateway::manifests::{Kind, ObjectRef};
use forwarder_gateway::problem::{Problem, Reason};

/// A field without effect.
struct Idle {
    kind: Kind,
    path: &'static str,
    /// The value that asks for nothing else than what is done.
    neutral: &'static str,
    /// What is done.
    instead: &'static str,
}

const NO_TLS: &str = "bytes are passed on as they are, whether TLS or not";
const NOTHING_MADE: &str = "nothing is created for a Gateway that could have them";
const NO_DEFAULT: &str = "a route attaches to the Gateways that its parentRefs name, and to no other";

/// All of them. What describes an object or is written by servers is none, nor what is asked of the network of a cluster.
const IDLE: [Idle; 12] = [
    Idle { kind: Kind::Gateway, path: "spec.backendTLS", neutral: "", instead: NO_TLS },
    Idle { kind: Kind::Gateway, path: "spec.tls", neutral: "", instead: NO_TLS },
    Idle { kind: Kind::Gateway, path: "spec.defaultScope", neutral: "None", instead: NO_DEFAULT },
    Idle { kind: Kind::Gateway, path: "spec.infrastructure.annotations", neutral: "", instead: NOTHING_MADE },
    Idle { kind: Kind::Gateway, path: "spec.infrastructure.labels", neutral: "", instead: NOTHING_MADE },
    Idle { kind: Kind::TcpRoute, path: "spec.useDefaultGateways", neutral: "None", instead: NO_DEFAULT },
    Idle {
        kind: Kind::Service,
        path: "spec.sessionAffinity",
        neutral: "None",
        instead: "connections go to the endpoints in turn, whoever the client is",
    },
    Idle {
        kind: Kind::Service,
        path: "spec.internalTrafficPolicy",
        neutral: "Cluster",
        instead: "endpoints on every node get connections",
    },
    Idle {
        kind: Kind::Service,
        path: "spec.trafficDistribution",
        neutral: "",
        instead: "near and far endpoints get connections in turn",
    },
    Idle {
        kind: Kind::Service,
        path: "spec.loadBalancerSourceRanges",
        neutral: "",
        instead: "clients of every address are served: have a firewall refuse the others",
    },
    Idle {
        kind: Kind::Service,
        path: "spec.loadBalancerIP",
        neutral: "",
        instead: "ports are open on the addresses of the Gateway",
    },
    Idle {
        kind: Kind::Service,
        path: "spec.externalIPs",
        neutral: "",
        instead: "ports are open on the addresses of the Gateway",
    },
];

/// A warning for each field of an object that has no effect.
pub(crate) fn idle(node: &Node<'_>, kind: Kind, id: &ObjectRef) -> Vec<Problem> {
    let written = IDLE.iter().filter(|idle| idle.kind == kind).filter(|idle| {
        let value = idle.path.split('.').try_fold(node, |node, key| node.get(key));
        value.is_some_and(|value| asks(value, idle.neutral))
    });
    let warn = |idle: &Idle| {
        let message = format!("the forwarder does not use it: {}; remove it", idle.instead);
        Problem::warning(Reason::UnsupportedValue, id.clone(), idle.path, message)
    };
    written.map(warn).collect()
}

/// Whether a value asks for something.
fn asks(value: &Node<'_>, neutral: &str) -> bool {
    match value {
        Node::Null | Node::Bool(false) => false,
        Node::Text(text) => !text.is_empty() && text != neutral,
        Node::List(items) => !items.is_empty(),
        Node::Map(entries) => !entries.is_empty(),
        Node::Bool(true) | Node::Signed(_) | Node::Unsigned(_) | Node::Float(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields::TABLE;
    use crate::yaml;

    /// Those that have an effect, or are harmless: they describe, are written by servers, or are for the network of a cluster.
    const OTHERS: [&str; 46] = [
        "EndpointSlice addressType",
        "EndpointSlice endpoints[].addresses[]",
        "EndpointSlice endpoints[].conditions.",
        "EndpointSlice endpoints[].deprecatedTopology{}",
        "EndpointSlice endpoints[].hints.",
        "EndpointSlice endpoints[].hostname",
        "EndpointSlice endpoints[].nodeName",
        "EndpointSlice endpoints[].targetRef.",
        "EndpointSlice endpoints[].topology{}",
        "EndpointSlice endpoints[].zone",
        "EndpointSlice ports[].appProtocol",
        "EndpointSlice ports[].name",
        "EndpointSlice ports[].port",
        "EndpointSlice ports[].protocol",
        "Gateway spec.addresses[].",
        "Gateway spec.allowedListeners.namespaces.",
        "Gateway spec.gatewayClassName",
        "Gateway spec.infrastructure.parametersRef.",
        "Gateway spec.listeners[].allowedRoutes.",
        "Gateway spec.listeners[].hostname",
        "Gateway spec.listeners[].name",
        "Gateway spec.listeners[].port",
        "Gateway spec.listeners[].protocol",
        "Gateway spec.listeners[].tls.",
        "GatewayClass spec.controllerName",
        "GatewayClass spec.description",
        "GatewayClass spec.parametersRef.",
        "ListenerSet spec.listeners[].",
        "ListenerSet spec.parentRef.",
        "Namespace spec.finalizers[]",
        "ReferenceGrant spec.",
        "Service spec.allocateLoadBalancerNodePorts",
        "Service spec.clusterIP",
        "Service spec.externalName",
        "Service spec.externalTrafficPolicy",
        "Service spec.healthCheckNodePort",
        "Service spec.ipFamil",
        "Service spec.loadBalancerClass",
        "Service spec.ports[].",
        "Service spec.publishNotReadyAddresses",
        "Service spec.selector{}",
        "Service spec.sessionAffinityConfig.",
        "Service spec.type",
        "TCPRoute spec.parentRefs[].",
        "TCPRoute spec.rules[].backendRefs[].",
        "TCPRoute spec.rules[].name",
    ];

    #[test]
    fn each_field_is_known_to_have_an_effect_or_none() {
        let is_common = |path: &str| {
            path == "apiVersion" || path == "kind" || path.starts_with("metadata.") || path == "status*"
        };
        let paths =
            TABLE.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(' '));
        for (kind, path) in paths.filter(|(_, path)| !is_common(path)) {
            let is_idle = IDLE.iter().any(|idle| {
                let rest = path.strip_prefix(idle.path);
                idle.kind.as_str() == kind && rest.is_some_and(|rest| !rest.starts_with(char::is_alphabetic))
            });
            let line = format!("{kind} {path}");
            let is_other = OTHERS.iter().any(|other| line.starts_with(other));
            assert!(is_idle != is_other, "{line}: say in IDLE or in OTHERS what it does");
        }
    }

    #[test]
    fn what_is_written_without_effect_is_told_once() {
        let told = |kind: Kind, text: &str| -> Vec<String> {
            let node = yaml::parse(yaml::documents(text)[0]).unwrap();
            let id = ObjectRef::new(kind, &forwarder_gateway::manifests::NamespacedName::new("a", "b"));
            idle(&node, kind, &id).into_iter().map(|problem| problem.field).collect()
        };
        assert_eq!(
            told(
                Kind::Gateway,
                "{spec: {infrastructure: {labels: {a: b, c: d}, annotations: {}}, tls: {frontend: {default: {}}}, \
                 defaultScope: None}}"
            ),
            ["spec.tls", "spec.infrastructure.labels"]
        );
        assert_eq!(
            told(
                Kind::Service,
                "{spec: {sessionAffinity: ClientIP, internalTrafficPolicy: Local, externalIPs: [192.0.2.1]}}"
            ),
            ["spec.sessionAffinity", "spec.internalTrafficPolicy", "spec.externalIPs"]
        );
        // As `kubectl get -o yaml` prints one.
        let dumped = "{metadata: {uid: u, labels: {a: b}}, spec: {allocateLoadBalancerNodePorts: true, clusterIP: 10.0.0.1, clusterIPs: \
                      [10.0.0.1], externalTrafficPolicy: Cluster, internalTrafficPolicy: Cluster, ipFamilies: [IPv4], ipFamilyPolicy: \
                      SingleStack, ports: [{nodePort: 31234, port: 80, protocol: TCP, targetPort: 80}], selector: {app: a}, \
                      sessionAffinity: None, type: LoadBalancer}, status: {loadBalancer: {}}}";
        assert_eq!(told(Kind::Service, dumped), [""; 0]);
    }
}
