//! What most tests of a cluster need: one listener, one route, two servers to choose from, and an agent.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use crate::agent::{Agent, AgentCommand};
use crate::apiserver::Channel;
use crate::client;
use crate::cluster::{Cluster, GATEWAY_API, Node};
use crate::netns::NetNs;
use crate::peer::{self, Server};
use crate::wait::{wait_for, wait_until};

/// The port of listener `a`.
pub const PORT: u16 = 9001;
/// Its name.
pub const LISTENER: &str = "default/gw/a";
/// Where Gateways of namespace `default` are.
pub const GATEWAYS: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/default/gateways";
/// Where routes of namespace `default` are.
pub const ROUTES: &str = "/apis/gateway.networking.k8s.io/v1/namespaces/default/tcproutes";

/// Listener `a` of Gateway `gw` with route `a` to Service `a`, whose endpoint is server `one`.
#[derive(Debug)]
pub struct Served {
    /// The agent.
    pub agent: Agent,
    /// Where it runs.
    pub node: Node,
    /// A server called `one`.
    pub one: Server,
    /// A server called `two`, which nobody refers to yet.
    pub two: Server,
    /// The cluster.
    pub cluster: Cluster,
}

impl Served {
    /// Starts an agent on the first node and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Result<Self> {
        let cluster = Cluster::start("v1.6.1", Channel::Standard)?;
        let node = cluster.node();
        Self::start_on(cluster, node, arguments)
    }

    /// The same on a node.
    pub fn start_on(cluster: Cluster, node: Node, arguments: &[&str]) -> Result<Self> {
        let topology = &cluster.topology;
        let endpoints = [topology.backend1_address(5000), topology.backend2_address(5000)];
        let one = Server::start(&topology.backend1, endpoints[0], peer::identify("one"))?;
        let two = Server::start(&topology.backend2, endpoints[1], peer::identify("two"))?;
        cluster.apply_examples(&["gatewayclass.yaml"])?;
        cluster.create_gateway("gw", &[("a", PORT)])?;
        cluster.create_backend("default", "a", &endpoints[..1])?;
        cluster.create_route("a", "gw", ("default", "a"))?;
        let agent = cluster.start_agent(&node, arguments)?;
        agent.wait_ready()?;
        let served = Self { agent, node, one, two, cluster };
        served.wait_identity(PORT, "one", crate::agent::DEADLINE);
        Ok(served)
    }

    /// Where clients are.
    pub fn client(&self) -> &NetNs {
        &self.cluster.topology.client
    }

    /// Where clients reach a listener.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.node.address, port)
    }

    /// Opens a connection to listener `a`, and reads the server's name.
    pub fn session(&self) -> Result<TcpStream> {
        let stream = client::connect(self.client(), self.address(PORT))?;
        client::read_line(&stream)?;
        Ok(stream)
    }

    /// Who answers on a port, or why nobody does.
    pub fn identity(&self, port: u16) -> Result<String> {
        Ok(client::identity(self.client(), self.address(port))?)
    }

    /// Waits until a server answers new connections to a port.
    #[track_caller]
    pub fn wait_identity(&self, port: u16, name: &str, deadline: Duration) {
        wait_until(&format!("{name} answers on {port}"), deadline, || {
            self.identity(port).is_ok_and(|found| found == name)
        });
    }

    /// Replaces the endpoints of Service `a`.
    pub fn set_endpoints(&self, endpoints: &[SocketAddr]) -> Result<()> {
        self.cluster.set_endpoints("default", "a", "tcp", endpoints)
    }

    /// Waits until the agent has written down something that contains `text` for its successor.
    pub fn wait_kept(&self, text: &str) -> Result<()> {
        let path = self.node.state_dir.join("last-known.yaml");
        let is_kept = || fs::read_to_string(&path).is_ok_and(|kept| kept.contains(text)).then_some(());
        // It is written every 15 seconds at most.
        wait_for(Duration::from_secs(30), is_kept)
            .with_context(|| format!("{} does not contain {text}", path.display()))
    }

    /// Starts an agent on the pins of the present one, which has ended. It may not be ready then.
    pub fn succeed(&mut self) -> Result<()> {
        let command = AgentCommand::new(&[]).succeeding(&self.agent);
        self.agent = self.cluster.run_agent(&self.node, &command)?;
        Ok(())
    }
}

impl Cluster {
    /// Makes a Gateway in namespace `default`, with listeners for routes of that namespace.
    pub fn create_gateway(&self, name: &str, listeners: &[(&str, u16)]) -> Result<Value> {
        let spec = json!({"gatewayClassName": "forwarder", "listeners": tcp_listeners(listeners)});
        self.api.create(GATEWAYS, &object("Gateway", name, &spec))
    }

    /// Replaces the listeners of a Gateway in namespace `default`.
    pub fn set_listeners(&self, gateway: &str, listeners: &[(&str, u16)]) -> Result<Value> {
        let changes = json!({"spec": {"listeners": tcp_listeners(listeners)}});
        self.api.patch(&format!("{GATEWAYS}/{gateway}"), &changes)
    }

    /// Makes a route in namespace `default` for the listener of the same name, to the Service that is given with its
    /// namespace.
    pub fn create_route(&self, name: &str, gateway: &str, backend: (&str, &str)) -> Result<Value> {
        self.api.create(ROUTES, &route(name, gateway, backend))
    }

    /// Every route of the cluster.
    pub fn routes(&self) -> Result<Vec<Value>> {
        self.api.list(&format!("{GATEWAY_API}/v1/tcproutes"))
    }
}

/// As [`Cluster::create_route`] makes it.
pub fn route(name: &str, gateway: &str, (namespace, service): (&str, &str)) -> Value {
    let spec = json!({
        "parentRefs": [{"name": gateway, "sectionName": name}],
        "rules": [{"backendRefs": [{"namespace": namespace, "name": service, "port": 3306}]}],
    });
    object("TCPRoute", name, &spec)
}

fn tcp_listeners(listeners: &[(&str, u16)]) -> Vec<Value> {
    let listener = |(name, port): &(&str, u16)| json!({"name": name, "port": port, "protocol": "TCP"});
    listeners.iter().map(listener).collect()
}

fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": spec,
    })
}
