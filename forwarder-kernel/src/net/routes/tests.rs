//! Routes of real kernels: they need root.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::watch::Receiver;

use super::*;
use crate::net::namespaces::Namespace;

const DEADLINE: Duration = Duration::from_secs(20);
/// The index of `lo`, in every namespace.
const LOOPBACK: u32 = 1;

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A node with two devices in two networks.
fn node() -> Option<Namespace> {
    let node = Namespace::new()?;
    for (device, v4, v6) in [("eth0", "10.9.1.1/24", "fd00:a::1/64"), ("eth1", "10.9.2.1/24", "fd00:b::1/64")]
    {
        // What is sent is lost: routes alone are asked for.
        node.ip(&format!("link add {device} type veth peer name {device}-peer"));
        for device in [device, &format!("{device}-peer")] {
            node.ip(&format!("link set {device} up"));
        }
        node.hold(v4, device);
        node.hold(v6, device);
    }
    Some(node)
}

fn routes(node: &Namespace) -> Routes {
    node.run(|| Routes::open().unwrap())
}

#[track_caller]
fn check(routes: &Routes, local: &str, peer: &str, expected: ResolvedRoute) {
    // Where no gateway is expected, the peer itself.
    let direct = expected.next_hop.is_unspecified();
    let next_hop = if direct { address(peer).to_canonical() } else { expected.next_hop };
    let expected = ResolvedRoute { next_hop, ..expected };
    assert_eq!(routes.egress(address(local), address(peer)).unwrap(), expected, "from {local} to {peer}");
}

/// Without a gateway.
const DIRECT: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

fn leaving_by(interface: u32) -> ResolvedRoute {
    ResolvedRoute { interface, next_hop: DIRECT, is_local: false, mtu: None }
}

impl ResolvedRoute {
    fn through(self, gateway: &str) -> Self {
        Self { next_hop: address(gateway), ..self }
    }
}

#[test]
fn a_neighbour_is_reached_through_its_network() {
    let Some(node) = node() else { return };
    let (routes, a, b) = (routes(&node), leaving_by(node.index("eth0")), leaving_by(node.index("eth1")));
    check(&routes, "10.9.1.1", "10.9.1.2", a);
    check(&routes, "10.9.2.1", "10.9.2.2", b);
    // Whatever its address: the table decides, unless a rule says otherwise.
    check(&routes, "10.9.1.1", "10.9.2.2", b);
    check(&routes, "0.0.0.0", "10.9.1.2", a);
    check(&routes, "fd00:a::1", "fd00:a::2", a);
    check(&routes, "fd00:a::1", "fd00:b::2", b);
    check(&routes, "::", "fd00:b::2", b);
    check(&routes, "::ffff:10.9.1.1", "::ffff:10.9.1.2", a);
    check(&routes, "::ffff:10.9.1.1", "10.9.1.2", a);
}

#[test]
fn a_distant_peer_is_reached_through_the_gateway() {
    let Some(node) = node() else { return };
    let (routes, b) = (routes(&node), leaving_by(node.index("eth1")));
    node.ip("route add default via 10.9.2.254");
    node.ip("route add default via fd00:b::fe");
    check(&routes, "10.9.1.1", "192.0.2.1", b.through("10.9.2.254"));
    check(&routes, "fd00:a::1", "2001:db8::1", b.through("fd00:b::fe"));
    node.ip("route add 198.51.100.0/24 via inet6 fd00:b::fd");
    check(&routes, "10.9.1.1", "198.51.100.1", b.through("fd00:b::fd"));
}

#[test]
fn the_routes_mtu_is_told() {
    let Some(node) = node() else { return };
    let (routes, a) = (routes(&node), leaving_by(node.index("eth0")));
    node.ip("route add 192.0.2.0/24 via 10.9.1.254 mtu 1400");
    node.ip("route add 2001:db8::/64 via fd00:a::fe mtu 1380");
    check(&routes, "10.9.1.1", "192.0.2.1", ResolvedRoute { mtu: Some(1400), ..a.through("10.9.1.254") });
    check(&routes, "fd00:a::1", "2001:db8::1", ResolvedRoute { mtu: Some(1380), ..a.through("fd00:a::fe") });
}

#[test]
fn addresses_of_the_node_are_local() {
    let Some(node) = node() else { return };
    let routes = routes(&node);
    let local = ResolvedRoute { interface: LOOPBACK, next_hop: DIRECT, is_local: true, mtu: None };
    for peer in ["10.9.1.1", "10.9.2.1", "127.0.0.1", "::ffff:10.9.1.1"] {
        check(&routes, "10.9.1.1", peer, local);
    }
    for peer in ["fd00:a::1", "fd00:b::1", "::1"] {
        check(&routes, "fd00:a::1", peer, local);
    }
}

#[track_caller]
fn check_refused(routes: &Routes, local: &str, peer: &str, expected: Errno) {
    let error = routes.egress(address(local), address(peer)).unwrap_err();
    let RouteError::Lookup { source: LookupError::Refused { source }, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!(Errno::from_io_error(source), Some(expected), "{error}");
    let said = error.to_string();
    assert!(said.starts_with(&format!("cannot find the route from {local} to {peer}: ")), "{said}");
}

#[test]
fn a_peer_without_route_is_told() {
    let Some(node) = node() else { return };
    let routes = routes(&node);
    check_refused(&routes, "10.9.1.1", "192.0.2.1", Errno::NETUNREACH);
    check_refused(&routes, "fd00:a::1", "2001:db8::1", Errno::NETUNREACH);
    for (kind, v4, v6) in [
        ("unreachable", Errno::HOSTUNREACH, Errno::HOSTUNREACH),
        ("prohibit", Errno::ACCESS, Errno::ACCESS),
        ("blackhole", Errno::INVAL, Errno::INVAL),
    ] {
        node.ip(&format!("route replace {kind} 192.0.2.0/24"));
        node.ip(&format!("-6 route add {kind} 2001:db8::/32"));
        check_refused(&routes, "10.9.1.1", "192.0.2.1", v4);
        check_refused(&routes, "fd00:a::1", "2001:db8::1", v6);
        node.ip(&format!("-6 route delete {kind} 2001:db8::/32"));
    }
    // An address that the node does not hold is no source in IPv4; kernels differ in how they say it.
    let refused = routes.egress(address("192.0.2.9"), address("10.9.1.2"));
    assert!(
        matches!(refused, Err(RouteError::Lookup { source: LookupError::Refused { .. }, .. })),
        "{refused:?}"
    );
    // The socket is as good as before.
    check(&routes, "10.9.1.1", "10.9.1.2", leaving_by(node.index("eth0")));
}

#[test]
fn what_is_no_single_host_is_refused() {
    let Some(node) = node() else { return };
    let routes = routes(&node);
    let why = |local, peer| match routes.egress(address(local), address(peer)) {
        Err(RouteError::Lookup { source, .. }) => source,
        other => panic!("{other:?}"),
    };
    assert!(matches!(why("10.9.1.1", "10.9.1.255"), LookupError::Kind { kind: 3 }));
    assert!(matches!(why("10.9.1.1", "fd00:a::2"), LookupError::Families));
    assert!(matches!(why("fd00:a::1", "fe80::1"), LookupError::LinkLocal));
}

#[test]
fn a_rule_for_the_source_is_obeyed() {
    let Some(node) = node() else { return };
    let (routes, a, b) = (routes(&node), leaving_by(node.index("eth0")), leaving_by(node.index("eth1")));
    for (family, source, to_a, to_b) in
        [("-4", "10.9.2.1", "10.9.1.254", "10.9.2.254"), ("-6", "fd00:b::1", "fd00:a::fe", "fd00:b::fe")]
    {
        node.ip(&format!("{family} route add default via {to_a}"));
        node.ip(&format!("{family} route add default via {to_b} table 7"));
        node.ip(&format!("{family} rule add from {source} lookup 7"));
    }
    check(&routes, "10.9.1.1", "192.0.2.1", a.through("10.9.1.254"));
    check(&routes, "10.9.2.1", "192.0.2.1", b.through("10.9.2.254"));
    check(&routes, "fd00:a::1", "2001:db8::1", a.through("fd00:a::fe"));
    check(&routes, "fd00:b::1", "2001:db8::1", b.through("fd00:b::fe"));
}

#[test]
fn a_rule_for_tcp_is_obeyed() {
    let Some(node) = node() else { return };
    let (routes, b) = (routes(&node), leaving_by(node.index("eth1")));
    for (family, to_a, to_b) in [("-4", "10.9.1.254", "10.9.2.254"), ("-6", "fd00:a::fe", "fd00:b::fe")] {
        node.ip(&format!("{family} route add default via {to_a}"));
        node.ip(&format!("{family} route add default via {to_b} table 7"));
        node.ip(&format!("{family} rule add ipproto tcp lookup 7"));
    }
    check(&routes, "10.9.1.1", "192.0.2.1", b.through("10.9.2.254"));
    check(&routes, "fd00:a::1", "2001:db8::1", b.through("fd00:b::fe"));
}

#[test]
fn several_threads_ask_at_once() {
    let Some(node) = node() else { return };
    let routes = routes(&node);
    let (a, b) = (leaving_by(node.index("eth0")), leaving_by(node.index("eth1")));
    let started = Instant::now();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..1000 {
                    check(&routes, "10.9.1.1", "10.9.1.2", a);
                    check(&routes, "fd00:b::1", "fd00:b::2", b);
                }
            });
        }
    });
    eprintln!("{:?} for each of 4000 questions", started.elapsed() / 4000);
}

/// Waits for the next generation after `known`.
async fn next(generation: &mut Receiver<u64>, known: u64) -> u64 {
    let risen = generation.wait_for(|generation| *generation > known);
    *tokio::time::timeout(DEADLINE, risen).await.expect("a change is announced").unwrap()
}

/// Runs `body` in the namespace, in an event loop, with the generation of its routes.
fn watching<F: Future<Output = ()>>(node: &Namespace, body: impl FnOnce(Receiver<u64>) -> F + Send) {
    node.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (generation, follow) = watch().unwrap();
            tokio::spawn(follow);
            body(generation).await;
        });
    });
}

#[test]
fn changes_are_announced() {
    let Some(node) = node() else { return };
    let index = [node.index("eth0"), node.index("eth1")];
    watching(&node, async |mut generation| {
        let routes = Routes::open().unwrap();
        node.ip("route add default via 10.9.1.254");
        let mut known = next(&mut generation, 0).await;
        check(&routes, "10.9.1.1", "192.0.2.1", leaving_by(index[0]).through("10.9.1.254"));
        node.ip("route replace default via 10.9.2.254");
        known = next(&mut generation, known).await;
        check(&routes, "10.9.1.1", "192.0.2.1", leaving_by(index[1]).through("10.9.2.254"));
        for change in ["address add 192.0.2.7/32 dev eth0", "link set eth0 mtu 1400", "link set eth0 down"] {
            node.ip(change);
            known = next(&mut generation, known).await;
        }
    });
}

#[test]
fn each_kind_of_change_is_announced() {
    for change in [
        "-6 route add 2001:db8::/32 dev lo",
        "rule add from 192.0.2.9 lookup 7",
        "-6 rule add from 2001:db8::9 lookup 7",
        "-6 address add 2001:db8::7/128 dev lo nodad",
        "link set lo down",
        "nexthop add id 1 blackhole",
    ] {
        // In a new namespace nothing else changes.
        let Some(node) = Namespace::new() else { return };
        watching(&node, async |mut generation| {
            node.ip(change);
            next(&mut generation, 0).await;
        });
    }
}

#[test]
fn a_burst_of_changes_is_announced_at_once() {
    let Some(node) = Namespace::new() else { return };
    watching(&node, async |mut generation| {
        for host in 1..30 {
            node.ip(&format!("route add 192.0.2.{host} dev lo"));
        }
        // They were all made before the event loop ran again.
        assert_eq!(next(&mut generation, 0).await, 1);
    });
}

#[test]
fn a_watch_ends_with_its_last_receiver() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (generation, follow) = watch().unwrap();
        drop(generation);
        tokio::time::timeout(DEADLINE, follow).await.expect("it ends").unwrap();
    });
}
