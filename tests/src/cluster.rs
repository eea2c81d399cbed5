//! A cluster as far as agents see it: an API server, nodes, and what controllers would do.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::agent::{Agent, AgentCommand};
use crate::apiserver::{Api, ApiServer, Channel, Endpoint, Options, Pod};
use crate::chart::{NAMESPACE, workspace};
use crate::netns::{NetNs, Topology};

/// How long the API server and the agents may take for what a test waits for.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The group of the Gateway API, as a path.
pub const GATEWAY_API: &str = "/apis/gateway.networking.k8s.io";
/// The controller that agents are by default.
pub const CONTROLLER: &str = "forwarder.dev/tcp";
/// Where the `DaemonSet` of an installation is.
pub fn daemon_set(instance: &str) -> String {
    format!("/apis/apps/v1/namespaces/{NAMESPACE}/daemonsets/{instance}")
}

/// The installation of `deploy/kustomize/base`.
pub const INSTANCE: &str = "forwarder";

/// An API server with the RBAC of `deploy/kustomize/base`, in the namespace of the network's node.
#[derive(Debug)]
pub struct Cluster {
    /// The server.
    pub server: ApiServer,
    /// Who may do anything.
    pub api: Api,
    /// The network. Each of its hosts but the client's can be a node of the cluster.
    pub topology: Topology,
    kubeconfig: PathBuf,
    /// Where agents keep their states, a folder for each node.
    states: TempDir,
}

impl Cluster {
    /// A cluster with the CRDs of a release.
    pub fn start(release: &str, channel: Channel) -> Result<Self> {
        let cluster = Self::without_crds()?;
        cluster.api.install_crds(release, channel)?;
        Ok(cluster)
    }

    /// A cluster without the Gateway API.
    pub fn without_crds() -> Result<Self> {
        let topology = Topology::new()?;
        let options = Options::in_namespace(&topology.node, topology.node_address(0).ip());
        let server = ApiServer::start_with(options)?;
        let api = server.api()?;
        for file in ["namespace.yaml", "forwarder.yaml"] {
            let path = workspace().join("deploy/kustomize/base").join(file);
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            // The class needs its CRD, which may come later.
            let known = text.split("\n---\n").filter(|document| !document.contains("kind: GatewayClass"));
            for document in known {
                api.apply(document)?;
            }
        }
        let token = api.service_account_token(NAMESPACE, "forwarder")?;
        let kubeconfig = server.kubeconfig_with("agent", &token)?;
        Ok(Self { server, api, topology, kubeconfig, states: TempDir::with_prefix("forwarder-states-")? })
    }

    /// Lets agents keep a class of this name while Gateways use it, as `gatewayClass.otherNames` of the chart does.
    pub fn permit_class(&self, name: &str) -> Result<()> {
        let rules = json!([{
            "apiGroups": ["gateway.networking.k8s.io"],
            "resources": ["gatewayclasses"],
            "resourceNames": [name],
            "verbs": ["patch"],
        }]);
        self.api.grant(&format!("system:serviceaccount:{NAMESPACE}:forwarder"), &rules)
    }

    /// The first node, `a`: the one that clients reach at [`Topology::node_address`].
    pub fn node(&self) -> Node {
        self.node_at("a", &self.topology.node, self.topology.node_address(0).ip())
    }

    /// All three nodes, `a`, `b` and `c`.
    pub fn nodes(&self) -> [Node; 3] {
        let topology = &self.topology;
        [
            self.node(),
            self.node_at("b", &topology.backend1, topology.backend1_address(0).ip()),
            self.node_at("c", &topology.backend2, topology.backend2_address(0).ip()),
        ]
    }

    fn node_at(&self, name: &'static str, netns: &NetNs, address: IpAddr) -> Node {
        let state_dir = self.states.path().join(name);
        Node { name, instance: INSTANCE, netns: netns.clone(), address, state_dir }
    }

    /// Makes the Pod of a node's agent, as the `DaemonSet` would.
    pub fn create_pod(&self, node: &Node) -> Result<()> {
        self.create_pod_at(node, &node.pod(), node.name, node.address)
    }

    /// Makes another Pod of the same installation as that of a node's agent, on a node of this name and address.
    pub fn create_pod_at(&self, like: &Node, pod: &str, node: &str, address: IpAddr) -> Result<()> {
        let pod = Pod {
            name: pod.to_owned(),
            labels: [("name", "forwarder"), ("instance", like.instance)]
                .map(|(key, value)| (format!("app.kubernetes.io/{key}"), value.to_owned()))
                .to_vec(),
            node: node.to_owned(),
            phase: "Running".to_owned(),
            ready: true,
            host_ip: Some(address),
            pod_ip: Some(address),
            daemon_set: self.api.find(&daemon_set(like.instance))?,
        };
        self.api.create_pod(NAMESPACE, &pod).map(drop)
    }

    /// Starts the agent of a node with further arguments, in a Pod that is made if it is not there.
    pub fn start_agent(&self, node: &Node, arguments: &[&str]) -> Result<Agent> {
        let path = format!("/api/v1/namespaces/{NAMESPACE}/pods/{}", node.pod());
        if self.api.find(&path)?.is_none() {
            self.create_pod(node)?;
        }
        self.run_agent(node, &AgentCommand::new(arguments))
    }

    /// Starts the agent of a node whose Pod is there. It may not be ready then.
    pub fn run_agent(&self, node: &Node, command: &AgentCommand) -> Result<Agent> {
        let mut command = command.clone();
        let pod = node.pod();
        let selector =
            format!("app.kubernetes.io/name=forwarder,app.kubernetes.io/instance={}", node.instance);
        for (flag, value) in [
            ("--node-name", node.name),
            ("--pod-name", &pod),
            ("--pod-namespace", NAMESPACE),
            ("--pod-selector", &selector),
        ] {
            command.arguments.extend([flag.into(), value.into()]);
        }
        command.arguments.extend(["--state-dir".into(), node.state_dir.clone().into_os_string()]);
        command.spawn_on(&node.netns, &["--kube".as_ref(), "--kubeconfig".as_ref(), self.kubeconfig.as_ref()])
    }

    /// Applies files of `examples/kubernetes`.
    pub fn apply_examples(&self, files: &[&str]) -> Result<()> {
        files.iter().try_for_each(|file| self.api.apply(&example(file)?).map(drop))
    }

    /// Deletes what files of `examples/kubernetes` hold, in their order.
    pub fn delete_examples(&self, files: &[&str]) -> Result<()> {
        files.iter().try_for_each(|file| self.api.delete_all(&example(file)?))
    }

    /// Makes a Service of one port, named `tcp`, and a slice of it with these endpoints, all of the same port.
    pub fn create_backend(&self, namespace: &str, service: &str, endpoints: &[SocketAddr]) -> Result<()> {
        self.api.create_service(namespace, service, &[("tcp", 3306, json!(3306))])?;
        self.create_slice(namespace, service, "tcp", endpoints)
    }

    /// Makes the slice of a Service with these endpoints, all of the same port.
    pub fn create_slice(
        &self,
        namespace: &str,
        service: &str,
        port_name: &str,
        endpoints: &[SocketAddr],
    ) -> Result<()> {
        let (ports, endpoints) = slice(port_name, endpoints);
        self.api.create_endpoint_slice(namespace, &slice_name(service), service, &ports, &endpoints).map(drop)
    }

    /// Replaces the endpoints of the slice that was made of a Service.
    pub fn set_endpoints(
        &self,
        namespace: &str,
        service: &str,
        port_name: &str,
        endpoints: &[SocketAddr],
    ) -> Result<()> {
        let (ports, endpoints) = slice(port_name, endpoints);
        self.api
            .replace_endpoint_slice(namespace, &slice_name(service), service, &ports, &endpoints)
            .map(drop)
    }

    /// Waits until the status of an object fulfils a condition, and returns the object.
    pub fn wait_object(&self, path: &str, condition: impl FnMut(&Value) -> bool) -> Result<Value> {
        self.api.wait_for(&format!("{GATEWAY_API}/{path}"), DEADLINE, condition)
    }
}

fn example(file: &str) -> Result<String> {
    let path = workspace().join("examples/kubernetes").join(file);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

/// A node of the cluster.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its name.
    pub name: &'static str,
    /// The installation that its agent belongs to.
    pub instance: &'static str,
    /// Its network.
    pub netns: NetNs,
    /// Its address.
    pub address: IpAddr,
    /// Where its agent keeps its state.
    pub state_dir: PathBuf,
}

impl Node {
    /// The name of its agent's Pod.
    pub fn pod(&self) -> String {
        format!("{}-{}", self.instance, self.name)
    }

    /// The same node for the agent of another installation.
    #[must_use]
    pub fn of_instance(&self, instance: &'static str) -> Self {
        let state_dir = self.state_dir.with_file_name(format!("{instance}-{}", self.name));
        Self { instance, state_dir, ..self.clone() }
    }
}

fn slice_name(service: &str) -> String {
    format!("{service}-1")
}

fn slice<'a>(port_name: &'a str, endpoints: &[SocketAddr]) -> (Vec<(&'a str, u16)>, Vec<Endpoint>) {
    let port = endpoints.first().map_or(3306, SocketAddr::port);
    (vec![(port_name, port)], endpoints.iter().map(|address| Endpoint::ready(address.ip())).collect())
}

/// A condition among others, by its type: `True/Accepted serves orders`; `None` if it is not there.
pub fn condition(conditions: &Value, type_: &str) -> Option<String> {
    let condition = conditions.as_array()?.iter().find(|condition| condition["type"] == type_)?;
    let text = |field: &str| condition[field].as_str().unwrap_or_default().to_owned();
    Some(format!("{}/{} {}", text("status"), text("reason"), text("message")).trim_end().to_owned())
}

/// Whether a condition is there and begins like this: `True/Accepted`.
pub fn has_condition(conditions: &Value, type_: &str, start: &str) -> bool {
    condition(conditions, type_).is_some_and(|condition| condition.starts_with(start))
}
