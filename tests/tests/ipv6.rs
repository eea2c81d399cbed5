//! IPv4 and IPv6 in every combination.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use forwarder_tests::fixture::{ENDPOINT_PORT, LISTENER_PORT};
use forwarder_tests::peer::Server;
use forwarder_tests::{Agent, BackendRef, Manifests, Topology, client, peer, require_root};

/// Transfers data from the client through a listener on `listen` (all addresses if `None`) to `endpoint`.
fn check(topology: &Topology, listen: Option<IpAddr>, clients_use: &[SocketAddr], endpoint: SocketAddr) {
    let manifests = Manifests::new().expect("a folder");
    manifests.gateway_on("gw", listen, &[("a", LISTENER_PORT)]).expect("a gateway");
    manifests.route("a", &[BackendRef { service: "a", weight: 1 }]).expect("a route");
    manifests.service("a", &[endpoint]).expect("a service");
    let server = Server::start(&topology.backend1, endpoint, peer::transfer).expect("a server");
    for datapath in ["splice", "copy"] {
        let agent =
            Agent::start(&topology.node, &manifests.path(), &["--datapath", datapath]).expect("an agent");
        for address in clients_use {
            let stream = client::connect(&topology.client, *address).expect("connect");
            let result = client::transfer(&stream, 9, 500_000, 700_000);
            assert!(result.is_ok(), "{datapath}: {address} to {endpoint}: {result:?}");
        }
        drop(agent);
    }
    assert_eq!(server.accepted(), 2 * clients_use.len());
}

#[test]
fn an_ipv6_listener_reaches_ipv6_and_ipv4_endpoints() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let address = topology.node_address_v6(LISTENER_PORT);
    check(&topology, Some(address.ip()), &[address], topology.backend1_address_v6(ENDPOINT_PORT));
    check(&topology, Some(address.ip()), &[address], topology.backend1_address(ENDPOINT_PORT));
}

#[test]
fn an_ipv4_listener_reaches_ipv6_endpoints_and_no_other_address_is_served() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let address = topology.node_address(LISTENER_PORT);
    check(&topology, Some(address.ip()), &[address], topology.backend1_address_v6(ENDPOINT_PORT));

    let manifests = Manifests::new().unwrap();
    manifests.gateway_on("gw", Some(address.ip()), &[("a", LISTENER_PORT)]).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let other = topology.node_address_v6(LISTENER_PORT);
    let error = client::connect(&topology.client, other).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    drop(agent);
}

#[test]
fn a_wildcard_listener_serves_both_families() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let clients_use = [topology.node_address(LISTENER_PORT), topology.node_address_v6(LISTENER_PORT)];
    check(&topology, None, &clients_use, topology.backend1_address(ENDPOINT_PORT));
    let any = Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    check(&topology, any, &clients_use[1..], topology.backend1_address_v6(ENDPOINT_PORT));
}

#[test]
fn a_service_may_have_endpoints_of_both_families() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let (v4, v6) = (topology.backend1_address(ENDPOINT_PORT), topology.backend1_address_v6(ENDPOINT_PORT));
    let manifests = Manifests::forward(LISTENER_PORT, &[v4, v6]).unwrap();
    let four = Server::start(&topology.backend1, v4, peer::identify("four")).unwrap();
    let six = Server::start(&topology.backend1, v6, peer::identify("six")).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    for _ in 0..20 {
        client::identity(&topology.client, topology.node_address(LISTENER_PORT)).unwrap();
    }
    assert!(four.accepted() > 0 && six.accepted() > 0, "{:?}", peer::accepted([&four, &six]));
    drop(agent);
}
