//! What most tests need: a network, one listener, one endpoint and an agent between them.

use std::io;
use std::net::{SocketAddr, TcpStream};

use anyhow::Result;

use crate::agent::{Agent, AgentCommand};
use crate::client;
use crate::manifests::Manifests;
use crate::netns::Topology;
use crate::peer::Server;
use crate::shape::stage::Family;

/// The port of the listener.
pub const LISTENER_PORT: u16 = 9001;
/// The port of the endpoint.
pub const ENDPOINT_PORT: u16 = 5000;
/// The name of the listener.
pub const LISTENER: &str = "default/gw/a";

/// A listener on the node that forwards to a server on the first host of backends.
#[derive(Debug)]
pub struct Forwarding {
    /// The agent.
    pub agent: Agent,
    /// The server.
    pub server: Server,
    /// What the agent reads.
    pub manifests: Manifests,
    /// The network.
    pub topology: Topology,
}

impl Forwarding {
    /// Starts an agent with `arguments` in front of a server that serves each connection with `handle`.
    pub fn start<F>(arguments: &[&str], handle: F) -> Result<Self>
    where
        F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::start_with(&AgentCommand::new(arguments), handle)
    }

    /// The same with a choice of how the agent is started.
    pub fn start_with<F>(command: &AgentCommand, handle: F) -> Result<Self>
    where
        F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        Self::serve(Topology::new()?, Family::V4, command, handle)
    }

    /// The same in a network of the caller's, with the endpoint in a family.
    pub fn serve<F>(topology: Topology, family: Family, command: &AgentCommand, handle: F) -> Result<Self>
    where
        F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
    {
        let endpoint = match family {
            Family::V4 => topology.backend1_address(ENDPOINT_PORT),
            Family::V6 => topology.backend1_address_v6(ENDPOINT_PORT),
        };
        let manifests = Manifests::forward(LISTENER_PORT, &[endpoint])?;
        let server = Server::start(&topology.backend1, endpoint, handle)?;
        let agent = command.start(&topology.node, &manifests.path())?;
        Ok(Self { agent, server, manifests, topology })
    }

    /// The address of the listener in a family.
    pub fn address_of(&self, family: Family) -> SocketAddr {
        match family {
            Family::V4 => self.topology.node_address(LISTENER_PORT),
            Family::V6 => self.topology.node_address_v6(LISTENER_PORT),
        }
    }

    /// The address of the listener.
    pub fn address(&self) -> SocketAddr {
        self.topology.node_address(LISTENER_PORT)
    }

    /// Connects through the agent.
    pub fn connect(&self) -> io::Result<TcpStream> {
        client::connect(&self.topology.client, self.address())
    }
}
