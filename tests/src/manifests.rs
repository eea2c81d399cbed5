//! Manifests for the agent: a folder of YAML files, each written whole or not at all.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

/// The port of every Service here. What clients connect to and what endpoints listen on must not depend on it.
pub const SERVICE_PORT: u16 = 3306;

/// A weighted reference to a Service.
#[derive(Clone, Copy, Debug)]
pub struct BackendRef<'a> {
    /// The Service.
    pub service: &'a str,
    /// The weight.
    pub weight: u32,
}

/// A folder of manifests, removed when dropped.
#[derive(Debug)]
pub struct Manifests {
    root: TempDir,
}

impl Manifests {
    /// A folder that holds a GatewayClass and nothing else.
    pub fn new() -> Result<Self> {
        let root = TempDir::with_prefix("forwarder-tests-")?;
        let manifests = Self { root };
        fs::create_dir(manifests.path())?;
        manifests.write(
            "class",
            "apiVersion: gateway.networking.k8s.io/v1\n\
             kind: GatewayClass\n\
             metadata: {name: forwarder}\n\
             spec: {controllerName: forwarder.dev/tcp}\n",
        )?;
        Ok(manifests)
    }

    /// A folder with one listener, `default/gw/a` on `port`, that forwards to `endpoints`.
    pub fn forward(port: u16, endpoints: &[SocketAddr]) -> Result<Self> {
        let manifests = Self::new()?;
        manifests.gateway(&[("a", port)])?;
        manifests.route("a", &[BackendRef { service: "a", weight: 1 }])?;
        manifests.service("a", endpoints)?;
        Ok(manifests)
    }

    /// The folder.
    pub fn path(&self) -> PathBuf {
        self.root.path().join("manifests")
    }

    /// A place beside the folder, for files that are no manifests.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Writes the file `name`, in one step: an agent that watches the folder never sees half of it.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let staged = self.beside(&format!("{name}.staged"));
        fs::write(&staged, text).with_context(|| format!("write {}", staged.display()))?;
        let path = self.file(name);
        fs::rename(&staged, &path).with_context(|| format!("move {} into place", path.display()))
    }

    /// Removes the file `name`.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.file(name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path().join(name).with_extension("yaml")
    }

    /// Writes the Gateway `gw` with TCP listeners on all addresses.
    pub fn gateway(&self, listeners: &[(&str, u16)]) -> Result<()> {
        self.gateway_on("gw", None, listeners)
    }

    /// Writes the Gateway `name` with TCP listeners on `address`, or on all addresses.
    pub fn gateway_on(&self, name: &str, address: Option<IpAddr>, listeners: &[(&str, u16)]) -> Result<()> {
        let mut text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\n\
             kind: Gateway\n\
             metadata: {{name: {name}}}\n\
             spec:\n  gatewayClassName: forwarder\n"
        );
        if let Some(address) = address {
            writeln!(text, "  addresses: [{{type: IPAddress, value: \"{address}\"}}]")?;
        }
        writeln!(text, "  listeners:")?;
        for (listener, port) in listeners {
            writeln!(text, "  - {{name: {listener}, port: {port}, protocol: TCP}}")?;
        }
        self.write(&format!("gateway-{name}"), &text)
    }

    /// Writes the TCPRoute `name` for the listener of the same name of the Gateway `gw`.
    pub fn route(&self, name: &str, backends: &[BackendRef<'_>]) -> Result<()> {
        self.route_to("gw", name, backends)
    }

    /// Writes the TCPRoute `name` for the listener of the same name of `gateway`.
    pub fn route_to(&self, gateway: &str, name: &str, backends: &[BackendRef<'_>]) -> Result<()> {
        let mut text = format!(
            "apiVersion: gateway.networking.k8s.io/v1\n\
             kind: TCPRoute\n\
             metadata: {{name: {name}}}\n\
             spec:\n  parentRefs:\n  - {{name: {gateway}, sectionName: {name}}}\n  rules:\n  - backendRefs:\n"
        );
        for BackendRef { service, weight } in backends {
            writeln!(text, "    - {{name: {service}, port: {SERVICE_PORT}, weight: {weight}}}")?;
        }
        self.write(&format!("route-{name}"), &text)
    }

    /// Writes the Service `name` and the EndpointSlices of `endpoints`: one for each family and target port.
    pub fn service(&self, name: &str, endpoints: &[SocketAddr]) -> Result<()> {
        let mut text = format!(
            "apiVersion: v1\n\
             kind: Service\n\
             metadata: {{name: {name}}}\n\
             spec:\n  ports:\n  - {{name: main, port: {SERVICE_PORT}}}\n"
        );
        push_slices(&mut text, name, &format!("{name}-"), endpoints)?;
        self.write(&format!("service-{name}"), &text)
    }

    /// Writes EndpointSlices of the Service `service` to a file of their own: one for each family and target port.
    pub fn slice(&self, service: &str, number: u16, endpoints: &[SocketAddr]) -> Result<()> {
        let mut text = String::new();
        push_slices(&mut text, service, &format!("{service}-{number}-"), endpoints)?;
        self.write(&format!("slice-{service}-{number}"), &text)
    }
}

fn push_slices(text: &mut String, service: &str, prefix: &str, endpoints: &[SocketAddr]) -> Result<()> {
    let mut slices: BTreeMap<(bool, u16), Vec<IpAddr>> = BTreeMap::new();
    for endpoint in endpoints {
        slices.entry((endpoint.is_ipv6(), endpoint.port())).or_default().push(endpoint.ip());
    }
    for ((v6, port), addresses) in slices {
        let family = if v6 { "IPv6" } else { "IPv4" };
        let suffix = family.to_ascii_lowercase();
        write!(
            text,
            "---\n\
                 apiVersion: discovery.k8s.io/v1\n\
                 kind: EndpointSlice\n\
                 metadata:\n  name: {prefix}{suffix}-{port}\n  labels: {{kubernetes.io/service-name: {service}}}\n\
                 addressType: {family}\n\
                 ports:\n- {{name: main, port: {port}, protocol: TCP}}\n\
                 endpoints:\n"
        )?;
        for address in addresses {
            writeln!(text, "- {{addresses: [\"{address}\"], conditions: {{ready: true}}}}")?;
        }
    }
    Ok(())
}

/// Writes `text` to a file in `folder` and returns its path: for tests of the command line.
pub fn file(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> Result<PathBuf> {
    let path = folder.join(name);
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}
