#![expect(clippy::needless_raw_string_hashes, reason = "expect-test writes them")]

use expect_test::{Expect, expect};
use serde::de::DeserializeOwned;

use super::*;
use crate::manifests::{Endpoint, EndpointSlice};

fn check<T: DeserializeOwned>(yaml: &str, problems: impl Fn(&T) -> Vec<Problem>, expected: Expect) {
    let object = serde_saphyr::from_str::<T>(yaml).expect("the test's YAML is of the type");
    let lines = problems(&object).into_iter().map(|problem| format!("{:?} {problem}\n", problem.severity));
    expected.assert_eq(&lines.collect::<String>());
}

#[test]
fn names_and_labels() {
    check(
        "metadata: {name: Web_1, namespace: a.b, labels: {'a b': x, ok.io/x: '-'}}",
        namespace,
        expect![[r#"
            Error Namespace a.b/Web_1: metadata.name: "Web_1" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error Namespace a.b/Web_1: metadata.namespace: a Namespace has no namespace, but "a.b" is set: remove it (Invalid)
            Error Namespace a.b/Web_1: metadata.labels[a b]: "a b" is not a key such as example.com/name: an optional DNS name and '/', then at most 63 letters, digits, '-', '_' and '.' (Invalid)
            Error Namespace a.b/Web_1: metadata.labels[ok.io/x]: "-" is not a label's value: at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit (Invalid)
        "#]],
    );
    check(
        "metadata: {name: a.b}",
        service,
        expect![[r#"
        Error Service a.b: metadata.name: "a.b" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
        Error Service a.b: spec.ports: a Service needs at least one port, unless its clusterIP is None (Invalid)
    "#]],
    );
    check(
        "{}",
        namespace,
        expect![[r#"
        Error Namespace : metadata.name: is required, as a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
    "#]],
    );
}

#[test]
fn valid_objects_have_no_problem() {
    check("{metadata: {name: c}, spec: {controllerName: forwarder.dev/tcp}}", gateway_class, expect![[""]]);
    check(
        "
        metadata: {name: g, namespace: n}
        spec:
          gatewayClassName: c
          addresses: [{value: 10.0.0.1}, {type: IPAddress, value: '::1'}, {type: Hostname, value: '*.a.b'}, {}, {}]
          listeners:
          - {name: a, port: 1, protocol: TCP}
          - {name: same-port, port: 1, protocol: TCP}
          - {name: b, port: 65535, protocol: HTTPS, hostname: a.b, tls: {}}
          - {name: c, port: 3, protocol: example.com/x, allowedRoutes: {namespaces: {from: Selector, selector: {}}}}
        ",
        gateway,
        expect![[""]],
    );
    check(
        "
        metadata: {name: g, namespace: n}
        spec:
          gatewayClassName: c
          listeners: [{name: a, port: 1, protocol: TCP}]
          allowedListeners: {namespaces: {from: Selector, selector: {matchLabels: {a: b}}}}
        ",
        gateway,
        expect![[""]],
    );
    check(
        "
        metadata: {name: l, namespace: n}
        spec:
          parentRef: {name: g, namespace: m, group: gateway.networking.k8s.io, kind: Gateway}
          listeners: [{name: a, port: 1, protocol: TCP}, {name: same-port, port: 1, protocol: TCP}]
        ",
        listener_set,
        expect![[""]],
    );
    for version in ["v1", "v1alpha2"] {
        check(
            "
            metadata: {name: r, namespace: n}
            spec:
              parentRefs: [{name: g, sectionName: a}, {name: g, sectionName: b}, {name: h}, {name: g, namespace: m}]
              rules: [{backendRefs: [{name: s, port: 1, weight: 0}, {group: a.b, kind: X, name: y, weight: 1000000}]}]
            ",
            |it| tcp_route(it, version),
            expect![[""]],
        );
    }
    check(
        "
        metadata: {name: r, namespace: n}
        spec: {from: [{group: g.io, kind: TCPRoute, namespace: n}], to: [{group: '', kind: Service, name: s}]}
        ",
        reference_grant,
        expect![[""]],
    );
    check("{metadata: {name: s, namespace: n}, spec: {clusterIP: None}}", service, expect![[""]]);
    check("{metadata: {name: s, namespace: n}, spec: {type: ExternalName}}", service, expect![[""]]);
    check(
        "
        metadata: {name: s, namespace: n}
        spec: {ports: [{name: a, port: 53}, {name: b, port: 53, protocol: UDP}]}
        ",
        service,
        expect![[""]],
    );
    check(
        "
        metadata: {name: s, namespace: n, labels: {kubernetes.io/service-name: s}}
        addressType: IPv4
        endpoints: [{addresses: [127.0.0.1]}]
        ports: [{port: 1}, {name: b}]
        ",
        endpoint_slice,
        expect![[""]],
    );
}

#[test]
fn gateway_classes() {
    check(
        "{metadata: {name: c}, spec: {controllerName: forwarder, parametersRef: {group: '-', kind: 1x}}}",
        gateway_class,
        expect![[r#"
            Error GatewayClass c: spec.controllerName: "forwarder" is not a domain and a path, such as example.com/name (Invalid)
            Error GatewayClass c: spec.parametersRef.group: "-" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error GatewayClass c: spec.parametersRef.kind: "1x" is not a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error GatewayClass c: spec.parametersRef.name: is required (Invalid)
        "#]],
    );
    check(
        "{metadata: {name: c, namespace: n}}",
        gateway_class,
        expect![[r#"
            Error GatewayClass n/c: metadata.namespace: a GatewayClass has no namespace, but "n" is set: remove it (Invalid)
            Error GatewayClass n/c: spec.controllerName: is required, as a domain and a path, such as example.com/name (Invalid)
        "#]],
    );
}

#[test]
fn gateways() {
    check(
        "{metadata: {name: g, namespace: n}}",
        gateway,
        expect![[r#"
        Error Gateway n/g: spec.gatewayClassName: is required (Invalid)
        Error Gateway n/g: spec.listeners: has 0 listeners: 1 to 64 must be given (Invalid)
    "#]],
    );
    check(
        "
        metadata: {name: g, namespace: n}
        spec:
          gatewayClassName: c
          addresses: [{value: a.b}, {value: 10.0.0.1}, {value: 10.0.0.1}, {type: Hostname, value: 'a b'}, {type: x, value: y}]
          infrastructure: {parametersRef: {}}
          listeners:
          - {name: a, port: 0, protocol: TCP, tls: {}}
          - {name: a, port: 70000, protocol: UDP, hostname: a.b}
          - {name: A, port: -1, protocol: ''}
          - {name: d, port: 1, protocol: HTTP, tls: {mode: Terminate}, hostname: -x}
          - name: e
            port: 1
            protocol: TCP
            allowedRoutes:
              namespaces:
                from: Others
                selector:
                  matchLabels: {'': x}
                  matchExpressions:
                  - {key: a, operator: In}
                  - {key: a, operator: Exists, values: [b]}
                  - {key: a, operator: Equals, values: ['-']}
              kinds: [{kind: TCPRoute}, {group: 'A', kind: ''}]
          - {name: f, port: 1, protocol: TCP, allowedRoutes: {namespaces: {from: Selector}}}
        ",
        gateway,
        expect![[r#"
            Error Gateway n/g: spec.addresses[0].value: "a.b" is not an IP address (Invalid)
            Error Gateway n/g: spec.addresses[2].value: the address "10.0.0.1" stands twice (Invalid)
            Error Gateway n/g: spec.addresses[3].value: "a b" is not a DNS name, whose first part may be '*' (Invalid)
            Error Gateway n/g: spec.addresses[4].type: "x" is not IPAddress, Hostname or a domain and a path, such as example.com/name (Invalid)
            Error Gateway n/g: spec.listeners[0].port: port 0 is out of range: use 1 to 65535 (Invalid)
            Error Gateway n/g: spec.listeners[0].tls: is not allowed for the protocol TCP: remove it (Invalid)
            Error Gateway n/g: spec.listeners[1].port: port 70000 is out of range: use 1 to 65535 (Invalid)
            Error Gateway n/g: spec.listeners[1].hostname: is not allowed for the protocol UDP, which carries no hostname: remove it (Invalid)
            Error Gateway n/g: spec.listeners[1].name: another listener has the name "a" as well (Invalid)
            Error Gateway n/g: spec.listeners[2].name: "A" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error Gateway n/g: spec.listeners[2].port: port -1 is out of range: use 1 to 65535 (Invalid)
            Error Gateway n/g: spec.listeners[2].protocol: is required, as a protocol, such as TCP or example.com/name (Invalid)
            Error Gateway n/g: spec.listeners[3].hostname: "-x" is not a DNS name, whose first part may be '*' (Invalid)
            Error Gateway n/g: spec.listeners[3].tls: is not allowed for the protocol HTTP: remove it (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.from: "Others" is not one of All, Same, Selector, None (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.selector.matchLabels[]: is required, as a key such as example.com/name: an optional DNS name and '/', then at most 63 letters, digits, '-', '_' and '.' (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.selector.matchExpressions[0].values: the operator In needs at least one value (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.selector.matchExpressions[1].values: the operator Exists takes no values (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.selector.matchExpressions[2].operator: "Equals" is not one of In, NotIn, Exists, DoesNotExist (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.namespaces.selector.matchExpressions[2].values[0]: "-" is not a label's value: at most 63 letters, digits, '-', '_' and '.', starting and ending with a letter or digit (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.kinds[1].group: "A" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error Gateway n/g: spec.listeners[4].allowedRoutes.kinds[1].kind: is required, as a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error Gateway n/g: spec.listeners[5].allowedRoutes.namespaces.selector: is required where from is Selector (Invalid)
            Error Gateway n/g: spec.infrastructure.parametersRef.kind: is required, as a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error Gateway n/g: spec.infrastructure.parametersRef.name: is required (Invalid)
        "#]],
    );
    let listeners =
        (0..65).map(|n| format!("{{name: l{n}, port: 1, protocol: TCP}}")).collect::<Vec<_>>().join(",");
    let many = format!(
        "{{metadata: {{name: g, namespace: n}}, spec: {{gatewayClassName: c, addresses: [{}], listeners: [{listeners}]}}}}",
        "{},".repeat(17)
    );
    check(
        &many,
        gateway,
        expect![[r#"
        Error Gateway n/g: spec.addresses: has 17 addresses: at most 16 are allowed (Invalid)
        Error Gateway n/g: spec.listeners: has 65 listeners: 1 to 64 must be given (Invalid)
    "#]],
    );
}

#[test]
fn tcp_routes() {
    let text = "
        metadata: {name: r, namespace: n}
        spec:
          parentRefs:
          - {name: g, sectionName: a}
          - {name: g, sectionName: a}
          - {name: g}
          - {name: g, port: 1}
          - {name: '', port: 70000, namespace: N, sectionName: 'a b', kind: '?'}
          rules:
          - backendRefs:
            - {name: s}
            - {port: 0, weight: -1}
            - {name: s, port: 65536, weight: 1000001, namespace: _, group: A}
          - {name: x}
          - {name: x}
        ";
    check(
        text,
        |it| tcp_route(it, "v1"),
        expect![[r#"
            Error TCPRoute n/r: spec.parentRefs[1]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
            Error TCPRoute n/r: spec.parentRefs[2]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
            Error TCPRoute n/r: spec.parentRefs[3]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
            Error TCPRoute n/r: spec.parentRefs[4].kind: "?" is not a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error TCPRoute n/r: spec.parentRefs[4].namespace: "N" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error TCPRoute n/r: spec.parentRefs[4].name: is required (Invalid)
            Error TCPRoute n/r: spec.parentRefs[4].sectionName: "a b" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error TCPRoute n/r: spec.parentRefs[4].port: port 70000 is out of range: use 1 to 65535 (Invalid)
            Error TCPRoute n/r: spec.rules: has 3 rules: exactly 1 must be given (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[0].port: is required for a Service (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[1].name: is required (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[1].port: port 0 is out of range: use 1 to 65535 (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[1].weight: weight -1 is out of range: use 0 to 1000000 (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[2].group: "A" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[2].namespace: "_" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[2].port: port 65536 is out of range: use 1 to 65535 (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs[2].weight: weight 1000001 is out of range: use 0 to 1000000 (Invalid)
            Error TCPRoute n/r: spec.rules[1].backendRefs: has 0 backendRefs: 1 to 16 must be given (Invalid)
            Error TCPRoute n/r: spec.rules[2].name: another rule has the name "x" as well (Invalid)
            Error TCPRoute n/r: spec.rules[2].backendRefs: has 0 backendRefs: 1 to 16 must be given (Invalid)
        "#]],
    );
    check(
        text,
        |it| tcp_route(it, "v1alpha2"),
        expect![[r#"
        Error TCPRoute n/r: spec.parentRefs[1]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
        Error TCPRoute n/r: spec.parentRefs[2]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
        Error TCPRoute n/r: spec.parentRefs[3]: refers to the same parent as spec.parentRefs[0]: give both a sectionName, or both a port, that differ (Invalid)
        Error TCPRoute n/r: spec.parentRefs[4].kind: "?" is not a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
        Error TCPRoute n/r: spec.parentRefs[4].namespace: "N" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
        Error TCPRoute n/r: spec.parentRefs[4].name: is required (Invalid)
        Error TCPRoute n/r: spec.parentRefs[4].sectionName: "a b" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
        Error TCPRoute n/r: spec.parentRefs[4].port: port 70000 is out of range: use 1 to 65535 (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[0].port: is required for a Service (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[1].name: is required (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[1].port: port 0 is out of range: use 1 to 65535 (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[1].weight: weight -1 is out of range: use 0 to 1000000 (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[2].group: "A" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[2].namespace: "_" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[2].port: port 65536 is out of range: use 1 to 65535 (Invalid)
        Error TCPRoute n/r: spec.rules[0].backendRefs[2].weight: weight 1000001 is out of range: use 0 to 1000000 (Invalid)
        Error TCPRoute n/r: spec.rules[2].name: another rule has the name "x" as well (Invalid)
    "#]],
    );
    check(
        "{metadata: {name: r, namespace: n}}",
        |it| tcp_route(it, "v1"),
        expect![[r#"
            Error TCPRoute n/r: spec.rules: has 0 rules: exactly 1 must be given (Invalid)
        "#]],
    );
    let many = format!(
        "{{metadata: {{name: r, namespace: n}}, spec: {{parentRefs: [{}], rules: [{{backendRefs: [{}]}}]}}}}",
        (0..33).map(|n| format!("{{name: g{n}}}")).collect::<Vec<_>>().join(","),
        "{name: s, port: 1},".repeat(17)
    );
    check(
        &many,
        |it| tcp_route(it, "v1"),
        expect![[r#"
            Error TCPRoute n/r: spec.parentRefs: has 33 parentRefs: at most 32 are allowed (Invalid)
            Error TCPRoute n/r: spec.rules[0].backendRefs: has 17 backendRefs: 1 to 16 must be given (Invalid)
        "#]],
    );
}

#[test]
fn reference_grants() {
    check(
        "{metadata: {name: r, namespace: n}}",
        reference_grant,
        expect![[r#"
            Error ReferenceGrant n/r: spec.from: has 0 entries: 1 to 16 must be given (Invalid)
            Error ReferenceGrant n/r: spec.to: has 0 entries: 1 to 16 must be given (Invalid)
        "#]],
    );
    check(
        "
        metadata: {name: r, namespace: n}
        spec: {from: [{group: '?', namespace: ''}], to: [{name: ''}]}
        ",
        reference_grant,
        expect![[r#"
            Error ReferenceGrant n/r: spec.from[0].group: "?" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error ReferenceGrant n/r: spec.from[0].kind: is required, as a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error ReferenceGrant n/r: spec.from[0].namespace: is required, as a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error ReferenceGrant n/r: spec.to[0].kind: is required, as a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error ReferenceGrant n/r: spec.to[0].name: is required (Invalid)
        "#]],
    );
}

#[test]
fn services() {
    check(
        "{metadata: {name: s, namespace: n}}",
        service,
        expect![[r#"
        Error Service n/s: spec.ports: a Service needs at least one port, unless its clusterIP is None (Invalid)
    "#]],
    );
    check(
        "
        metadata: {name: s, namespace: n}
        spec:
          type: Balanced
          ports: [{port: 1}, {name: a, port: 2, protocol: HTTP}, {name: a, port: 0}, {name: A, port: 1}]
        ",
        service,
        expect![[r#"
            Error Service n/s: spec.type: "Balanced" is not one of ClusterIP, NodePort, LoadBalancer, ExternalName (Invalid)
            Error Service n/s: spec.ports[0].name: is required where a Service has several ports (Invalid)
            Error Service n/s: spec.ports[1].protocol: "HTTP" is not one of TCP, UDP, SCTP (Invalid)
            Error Service n/s: spec.ports[2].name: another port has the name "a" as well (Invalid)
            Error Service n/s: spec.ports[2].port: port 0 is out of range: use 1 to 65535 (Invalid)
            Error Service n/s: spec.ports[3].name: "A" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error Service n/s: spec.ports[3]: the port 1/TCP stands twice (Invalid)
        "#]],
    );
}

#[test]
fn endpoint_slices() {
    check(
        "{metadata: {name: s, namespace: n}}",
        endpoint_slice,
        expect![[r#"
            Warning EndpointSlice n/s: metadata.labels: the label kubernetes.io/service-name is missing: the EndpointSlice belongs to no Service and is ignored (Invalid)
            Error EndpointSlice n/s: addressType: "" is not one of IPv4, IPv6, FQDN (Invalid)
        "#]],
    );
    for (address_type, address) in [
        ("IPv4", "10.0.0.256"),
        ("IPv4", "::1"),
        ("IPv4", "0.0.0.0"),
        ("IPv6", "10.0.0.1"),
        ("IPv6", "fe80::1%eth0"),
        ("FQDN", "a_b"),
    ] {
        let object = EndpointSlice {
            metadata: serde_saphyr::from_str("{name: s, labels: {kubernetes.io/service-name: s}}").unwrap(),
            address_type: address_type.to_owned(),
            endpoints: vec![Endpoint { addresses: vec![address.to_owned()], ..Endpoint::default() }],
            ports: Vec::new(),
        };
        let problems = endpoint_slice(&object);
        let fields = problems.iter().map(|it| it.field.as_str()).collect::<Vec<_>>();
        assert_eq!(fields, ["endpoints[0].addresses[0]"], "{address_type} {address}");
    }
    check(
        "
        metadata: {name: s, namespace: n, labels: {kubernetes.io/service-name: s}}
        addressType: IPv4
        endpoints: [{}, {addresses: [x]}]
        ports: [{port: 0}, {port: 1}, {name: a, protocol: tcp}, {name: a}, {name: A}]
        ",
        endpoint_slice,
        expect![[r#"
            Error EndpointSlice n/s: endpoints[0].addresses: has 0 addresses: 1 to 100 must be given (Invalid)
            Error EndpointSlice n/s: endpoints[1].addresses[0]: "x" is not the IPv4 address of an endpoint (Invalid)
            Error EndpointSlice n/s: ports[0].port: port 0 is out of range: use 1 to 65535 (Invalid)
            Error EndpointSlice n/s: ports[1].name: another port has no name either (Invalid)
            Error EndpointSlice n/s: ports[2].protocol: "tcp" is not one of TCP, UDP, SCTP (Invalid)
            Error EndpointSlice n/s: ports[3].name: another port has the name "a" as well (Invalid)
            Error EndpointSlice n/s: ports[4].name: "A" is not a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
        "#]],
    );
    let many = format!(
        "{{metadata: {{name: s, namespace: n, labels: {{kubernetes.io/service-name: s}}}}, addressType: IPv4, \
         endpoints: [{}]}}",
        "{addresses: [10.0.0.1]},".repeat(1001)
    );
    check(
        &many,
        endpoint_slice,
        expect![[r#"
        Warning EndpointSlice n/s: endpoints: 1001 endpoints are used, but an API server takes at most 1000 in an EndpointSlice (Invalid)
    "#]],
    );
}

#[test]
fn listener_sets() {
    check(
        "{metadata: {name: l, namespace: n}}",
        listener_set,
        expect![[r#"
        Error ListenerSet n/l: spec.parentRef.name: is required (Invalid)
        Error ListenerSet n/l: spec.listeners: has 0 listeners: 1 to 64 must be given (Invalid)
    "#]],
    );
    check(
        "
        metadata: {name: L, namespace: n}
        spec:
          parentRef: {name: g, namespace: '', group: A, kind: ''}
          listeners:
          - {name: a, port: 0, protocol: TCP, tls: {}}
          - {name: a, port: 1, protocol: TCP, allowedRoutes: {namespaces: {from: Selector}}}
        ",
        listener_set,
        expect![[r#"
            Error ListenerSet n/L: metadata.name: "L" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error ListenerSet n/L: spec.parentRef.group: "A" is not a DNS name: at most 253 lower-case letters, digits, '-' and '.', each part starting and ending with a letter or digit (Invalid)
            Error ListenerSet n/L: spec.parentRef.kind: is required, as a kind: at most 63 letters, digits and '-', starting with a letter (Invalid)
            Error ListenerSet n/L: spec.parentRef.namespace: is required, as a DNS label: at most 63 lower-case letters, digits and '-', starting and ending with a letter or digit (Invalid)
            Error ListenerSet n/L: spec.listeners[0].port: port 0 is out of range: use 1 to 65535 (Invalid)
            Error ListenerSet n/L: spec.listeners[0].tls: is not allowed for the protocol TCP: remove it (Invalid)
            Error ListenerSet n/L: spec.listeners[1].allowedRoutes.namespaces.selector: is required where from is Selector (Invalid)
            Error ListenerSet n/L: spec.listeners[1].name: another listener has the name "a" as well (Invalid)
        "#]],
    );
    check(
        "
        metadata: {name: g, namespace: n}
        spec:
          gatewayClassName: c
          listeners: [{name: a, port: 1, protocol: TCP}]
          allowedListeners: {namespaces: {from: Selector}}
        ",
        gateway,
        expect![[r#"
            Error Gateway n/g: spec.allowedListeners.namespaces.selector: is required where from is Selector (Invalid)
        "#]],
    );
    check(
        "
        metadata: {name: g, namespace: n}
        spec:
          gatewayClassName: c
          listeners: [{name: a, port: 1, protocol: TCP}]
          allowedListeners: {namespaces: {from: Some, selector: {matchLabels: {'': x}}}}
        ",
        gateway,
        expect![[r#"
            Error Gateway n/g: spec.allowedListeners.namespaces.from: "Some" is not one of All, Same, Selector, None (Invalid)
            Error Gateway n/g: spec.allowedListeners.namespaces.selector.matchLabels[]: is required, as a key such as example.com/name: an optional DNS name and '/', then at most 63 letters, digits, '-', '_' and '.' (Invalid)
        "#]],
    );
}
