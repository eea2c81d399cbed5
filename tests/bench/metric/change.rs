//! How soon a change of one manifest is in force, among few manifests and among many.

use std::fmt::{self, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use forwarder_tests::manifests::SERVICE_PORT;
use forwarder_tests::peer::{self, Server};
use forwarder_tests::{AgentCommand, BackendRef, Manifests, Topology, client, wait_for};

use super::{Reading, Series};
use crate::machine;
use crate::path::{ENDPOINT_PORT, LISTENER_PORT};

/// The tier of the agent: the change does not depend on it.
pub(crate) const TIER: &str = "splice";
/// The changes are made among so many other routes.
pub(crate) const AMOUNTS: [Amount; 2] = [Amount { routes: 0 }, Amount { routes: 1000 }];

const BACKENDS_OF_A_ROUTE: u32 = 10;
const ENDPOINTS_OF_A_BACKEND: u32 = 10;
/// Below the 64 that the Gateway API allows.
const LISTENERS_OF_A_GATEWAY: u32 = 50;
const FIRST_PORT: u16 = 10_001;
const FIRST_ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);

const START_LIMIT: Duration = Duration::from_mins(2);
const CHANGE_LIMIT: Duration = Duration::from_mins(1);
/// Between two attempts: short beside what is measured, and long enough to leave the machine to the agent.
const PAUSE: Duration = Duration::from_millis(1);

/// What there is besides the listener whose backend changes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amount {
    /// Each with a listener of its own, ten backends, and a hundred endpoints.
    pub(crate) routes: u32,
}

impl fmt::Display for Amount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let endpoints = self.routes * BACKENDS_OF_A_ROUTE * ENDPOINTS_OF_A_BACKEND;
        write!(formatter, "change among {} other routes with {endpoints} endpoints", self.routes)
    }
}

/// Changes the endpoint of one listener `rounds` times, and waits each time for the first connection that the new one
/// serves.
pub(crate) fn measure(amount: Amount, rounds: usize) -> Result<Vec<Reading>> {
    let topology = Topology::new()?;
    let servers = [
        (&topology.backend1, topology.backend1_address(ENDPOINT_PORT), "one"),
        (&topology.backend2, topology.backend2_address(ENDPOINT_PORT), "two"),
    ];
    let _running = servers
        .iter()
        .map(|&(host, address, name)| Server::start(host, address, peer::identify(name)))
        .collect::<Result<Vec<_>>>()?;

    let manifests = Manifests::new()?;
    let objects = write_all(&manifests, amount, servers[0].1).context("writing the manifests")?;
    let agent = AgentCommand::new(&["--datapath", TIER]).spawn(&topology.node, &manifests.path())?;
    let is_ready = || agent.ready().is_ok_and(|response| response.status == 200).then_some(());
    if wait_for(START_LIMIT, is_ready).is_none() {
        bail!("the agent is not ready with {objects} manifests after {START_LIMIT:?}: {:?}", agent.ready());
    }

    let target = topology.node_address(LISTENER_PORT);
    let identity =
        || client::identity(&topology.client, target).with_context(|| format!("connecting to {target}"));
    let mut readings = Vec::new();
    for round in 0..rounds {
        let [(_, _, old), (_, address, new)] =
            if round % 2 == 0 { servers } else { [servers[1], servers[0]] };
        machine::settle()?;
        ensure!(identity()? == old, "the endpoint before is not {old}");
        let start = Instant::now();
        manifests.write("slice-a", &slice("a", address.port(), &[address.ip().to_string()]))?;
        while identity()? != new {
            if start.elapsed() > CHANGE_LIMIT {
                bail!("the change is not in force after {CHANGE_LIMIT:?}");
            }
            thread::sleep(PAUSE);
        }
        let series = Series { objects: Some(objects), ..Series::new("change", "ms") };
        readings.push(Reading { series, value: start.elapsed().as_secs_f64() * 1e3, cost: None });
    }
    Ok(readings)
}

/// Writes every object to a file of its own, and returns their number.
fn write_all(manifests: &Manifests, amount: Amount, endpoint: SocketAddr) -> Result<u32> {
    manifests.gateway(&[("a", LISTENER_PORT)])?;
    manifests.route("a", &[BackendRef { service: "a", weight: 1 }])?;
    manifests.write("service-a", &service("a"))?;
    manifests.write("slice-a", &slice("a", endpoint.port(), &[endpoint.ip().to_string()]))?;
    // With the GatewayClass that is always there.
    let mut objects = 5;

    let routes: Vec<u32> = (0..amount.routes).collect();
    for (number, routes) in routes.chunks(usize::try_from(LISTENERS_OF_A_GATEWAY)?).enumerate() {
        let gateway = format!("gw{number}");
        let names: Vec<String> = routes.iter().map(|route| format!("r{route}")).collect();
        let ports = routes.iter().map(|route| Ok(FIRST_PORT + u16::try_from(*route)?));
        let ports = ports.collect::<Result<Vec<u16>>>()?;
        let listeners: Vec<(&str, u16)> = names.iter().map(String::as_str).zip(ports).collect();
        manifests.gateway_on(&gateway, None, &listeners)?;
        objects += 1;
        for (route, name) in routes.iter().zip(&names) {
            let services: Vec<String> =
                (0..BACKENDS_OF_A_ROUTE).map(|backend| format!("{name}-{backend}")).collect();
            let backends: Vec<BackendRef<'_>> =
                services.iter().map(|service| BackendRef { service, weight: 1 }).collect();
            manifests.route_to(&gateway, name, &backends)?;
            for (backend, name) in (0..).zip(&services) {
                let first = (route * BACKENDS_OF_A_ROUTE + backend) * ENDPOINTS_OF_A_BACKEND;
                let addresses: Vec<String> = (first..first + ENDPOINTS_OF_A_BACKEND)
                    .map(|endpoint| Ipv4Addr::from(u32::from(FIRST_ADDRESS) + endpoint).to_string())
                    .collect();
                manifests.write(&format!("service-{name}"), &service(name))?;
                manifests.write(&format!("slice-{name}"), &slice(name, ENDPOINT_PORT, &addresses))?;
            }
            objects += 1 + 2 * BACKENDS_OF_A_ROUTE;
        }
    }
    Ok(objects)
}

fn service(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\n\
         spec:\n  ports:\n  - {{name: main, port: {SERVICE_PORT}}}\n"
    )
}

fn slice(service: &str, port: u16, addresses: &[String]) -> String {
    let mut text = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata:\n  name: {service}-1\n  labels: {{kubernetes.io/service-name: {service}}}\n\
         addressType: IPv4\nports:\n- {{name: main, port: {port}, protocol: TCP}}\nendpoints:\n"
    );
    for address in addresses {
        writeln!(text, "- {{addresses: [\"{address}\"], conditions: {{ready: true}}}}")
            .expect("writing to a string never fails");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_object_has_a_file_and_each_endpoint_is_another() {
        let manifests = Manifests::new().unwrap();
        let endpoint = SocketAddr::from(([10, 0, 2, 2], ENDPOINT_PORT));
        let objects = write_all(&manifests, Amount { routes: 51 }, endpoint).unwrap();
        let files: Vec<_> = std::fs::read_dir(manifests.path()).unwrap().flatten().collect();
        assert_eq!(files.len(), usize::try_from(objects).unwrap());
        let mut addresses: Vec<String> = files
            .iter()
            .map(|file| std::fs::read_to_string(file.path()).unwrap())
            .flat_map(|text| {
                text.lines()
                    .filter(|line| line.contains("addresses: ["))
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!(addresses.len(), 5101);
    }
}
