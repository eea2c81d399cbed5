//! Thousands of routes and tens of thousands of endpoints in a cluster.
//!
//! `FORWARDER_TEST_ROUTES=10000 FORWARDER_TEST_ENDPOINTS=100000` makes it larger.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, iter};

use anyhow::Result;
use forwarder_tests::agent::DEADLINE;
use forwarder_tests::apiserver::{Channel, Endpoint, Session, endpoint_slice, require_kubernetes, service};
use forwarder_tests::cluster::{CONTROLLER, has_condition};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::served::{self, ROUTES};
use forwarder_tests::swarm::raise_descriptor_limit;
use forwarder_tests::{Agent, AgentCommand, Cluster, client, require_root, wait_for, wait_until};
use serde_json::{Value, json};

/// How many listeners a Gateway may have.
const LISTENERS: usize = 64;
const FIRST_PORT: u16 = 10_000;
const WRITERS: usize = 4;
/// One socket for each listener: descriptors may be few.
const ARGUMENTS: [&str; 2] = ["--workers", "1"];
const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
/// No agent of this size may need more, in KiB.
const LIMIT: u64 = 200 << 10;

/// How large the cluster is.
#[derive(Clone, Copy)]
struct Size {
    routes: usize,
    endpoints: usize,
}

impl Size {
    fn of_environment() -> Self {
        let number = |name, default| match env::var(name) {
            Ok(value) => value.parse().expect("a number"),
            Err(_) => default,
        };
        let (routes, endpoints) = ("FORWARDER_TEST_ROUTES", "FORWARDER_TEST_ENDPOINTS");
        Self { routes: number(routes, 1000), endpoints: number(endpoints, 10_000) }
    }

    /// How many endpoints each route has.
    fn share(self) -> usize {
        self.endpoints / self.routes
    }

    /// How long something may take of which there is one for each route.
    fn deadline(self) -> Duration {
        DEADLINE * 6 + Duration::from_millis(40) * u32::try_from(self.routes).expect("few enough")
    }
}

/// A cluster in which every route has a listener, a Service and a slice of its own.
struct Large {
    cluster: Cluster,
    size: Size,
    _server: Server,
}

impl Large {
    fn start(size: Size) -> Self {
        let cluster = Cluster::start("v1.6.1", Channel::Standard).expect("a cluster");
        let topology = &cluster.topology;
        topology.add_numbered_addresses().expect("addresses");
        let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 5000));
        let server = Server::start(&topology.backend1, everywhere, peer::tell_address).expect("a server");
        cluster.apply_examples(&["gatewayclass.yaml"]).expect("a class");
        Self { cluster, size, _server: server }
    }

    /// The endpoints of a route.
    fn endpoints(&self, route: usize) -> Vec<SocketAddr> {
        let share = self.size.share();
        let numbers = route * share..(route + 1) * share;
        let address = |number| u32::try_from(number).expect("few enough");
        numbers.map(|number| self.cluster.topology.numbered_address(address(number), 5000)).collect()
    }

    fn create_gateways(&self) -> Result<()> {
        let names: Vec<String> = (0..self.size.routes).map(name).collect();
        for (gateway, names) in names.chunks(LISTENERS).enumerate() {
            let first = gateway * LISTENERS;
            let listeners: Vec<(&str, u16)> =
                names.iter().enumerate().map(|(index, name)| (name.as_str(), port(first + index))).collect();
            self.cluster.create_gateway(&format!("gw{gateway}"), &listeners)?;
        }
        Ok(())
    }

    /// Makes a route with its Service and endpoints.
    fn create_route(&self, session: &mut Session<'_>, route: usize) -> Result<()> {
        let name = name(route);
        let mut object = service(&name, &[("tcp", 3306, json!(3306))]);
        // The API server gives out addresses no faster than some tens a second.
        object["spec"]["clusterIP"] = "None".into();
        session.create(SERVICES, &object)?;
        let endpoints: Vec<_> = self.endpoints(route).iter().map(|it| Endpoint::ready(it.ip())).collect();
        let slice = endpoint_slice(&format!("{name}-1"), &name, &[("tcp", 5000)], &endpoints);
        session.create(SLICES, &slice)?;
        let gateway = format!("gw{}", route / LISTENERS);
        session.create(ROUTES, &served::route(&name, &gateway, ("default", &name)))
    }

    fn create_routes(&self) {
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let mut routes = (writer..self.size.routes).step_by(WRITERS);
                scope.spawn(move || {
                    let mut session = self.cluster.api.session().expect("a connection");
                    routes.try_for_each(|route| self.create_route(&mut session, route)).expect("objects");
                });
            }
        });
    }

    /// Whether new connections of a route reach one of its own endpoints.
    fn is_served(&self, route: usize) -> bool {
        let topology = &self.cluster.topology;
        let answer = client::identity(&topology.client, topology.node_address(port(route)));
        let answer = answer.ok().and_then(|answer| answer.parse::<IpAddr>().ok());
        self.endpoints(route).iter().any(|endpoint| Some(endpoint.ip()) == answer)
    }

    fn wait_served(&self) {
        let end = Instant::now() + self.size.deadline();
        for route in 0..self.size.routes {
            let left = end.saturating_duration_since(Instant::now());
            wait_until(&format!("route {route} is served"), left, || self.is_served(route));
        }
    }

    /// Waits until every route says that it is accepted, and every listener that it has one.
    fn wait_statuses(&self) {
        let written =
            || self.cluster.routes().expect("routes").iter().filter(|route| is_written(route)).count();
        let mut count = 0;
        let all = wait_for(self.size.deadline(), || {
            thread::park_timeout(Duration::from_millis(500));
            count = written();
            (count == self.size.routes).then_some(())
        });
        assert!(all.is_some(), "{count} of {} routes have their status", self.size.routes);
    }

    /// How long it takes until a route uses an endpoint of another.
    fn change_endpoint(&self, route: usize) -> Duration {
        let other = self.endpoints((route + 1) % self.size.routes)[0];
        self.cluster.set_endpoints("default", &name(route), "tcp", &[other]).expect("a change");
        let start = Instant::now();
        let topology = &self.cluster.topology;
        wait_until("the new endpoint is used", DEADLINE, || {
            let answer = client::identity(&topology.client, topology.node_address(port(route)));
            answer.is_ok_and(|answer| answer == other.ip().to_string())
        });
        let took = start.elapsed();
        let endpoints = self.endpoints(route);
        self.cluster.set_endpoints("default", &name(route), "tcp", &endpoints).expect("a change");
        wait_until("the old endpoints are used", DEADLINE, || self.is_served(route));
        took
    }
}

fn name(route: usize) -> String {
    format!("r{route}")
}

fn port(route: usize) -> u16 {
    FIRST_PORT + u16::try_from(route).expect("a port")
}

fn is_written(route: &Value) -> bool {
    let parents = route["status"]["parents"].as_array().map(Vec::as_slice).unwrap_or_default();
    matches!(parents, [parent] if parent["controllerName"] == CONTROLLER
        && has_condition(&parent["conditions"], "Accepted", "True/Accepted")
        && has_condition(&parent["conditions"], "ResolvedRefs", "True/ResolvedRefs"))
}

/// Tells how much memory the agent uses, and what that is for an endpoint beside what it used `before`.
fn tell_memory(agent: &Agent, when: &str, before: u64, size: Size) -> u64 {
    let rss = agent.rss_kib().expect("a process");
    let each = rss.saturating_sub(before) * 1024 / size.endpoints as u64;
    println!("{when}: {} MiB, {each} bytes for each endpoint", rss >> 10);
    assert!(rss < LIMIT, "{rss} KiB");
    each
}

#[test]
fn a_thousand_routes_and_ten_thousand_endpoints_are_served_and_say_so() {
    if !require_root() || !require_kubernetes() {
        return;
    }
    let size = Size::of_environment();
    let descriptors = raise_descriptor_limit().unwrap();
    assert!(descriptors > size.routes as u64 + 500, "each listener has a socket: {descriptors}");
    let large = Large::start(size);
    let node = large.cluster.node();
    let mut agent = large.cluster.start_agent(&node, &ARGUMENTS).unwrap();
    agent.wait_ready().unwrap();
    let empty = agent.rss_kib().unwrap();

    let start = Instant::now();
    large.create_gateways().unwrap();
    large.create_routes();
    println!("{} routes, {} endpoints made in {:?}", size.routes, size.endpoints, start.elapsed());
    let made = Instant::now();
    large.wait_served();
    println!("all served {:?} later", made.elapsed());
    large.wait_statuses();
    println!("all statuses written {:?} later", made.elapsed());
    let times: Vec<_> = iter::repeat_with(|| large.change_endpoint(size.routes / 2)).take(10).collect();
    println!("a change of an endpoint took {times:?}");
    tell_memory(&agent, "after all changes", empty, size);
    println!("the empty agent: {} MiB", empty >> 10);

    let start = Instant::now();
    agent.kill().unwrap();
    let command = AgentCommand::new(&ARGUMENTS).succeeding(&agent);
    let next = large.cluster.run_agent(&node, &command).unwrap();
    wait_until("it is ready", size.deadline(), || next.ready().is_ok_and(|ready| ready.status == 200));
    println!("the next agent was ready after {:?}", start.elapsed());
    large.wait_served();
    println!("it served all after {:?}", start.elapsed());
    let each = tell_memory(&next, "after its start", empty, size);
    assert!(each < 20_000, "{each} bytes for each endpoint");
}
