//! The two databases of `examples/kubernetes`, behind one Gateway of a cluster.

use std::net::SocketAddr;
use std::thread;

use anyhow::Result;

use crate::client;
use crate::cluster::{Cluster, DEADLINE, GATEWAY_API};
use crate::database::Database;
use crate::mariadb::query;
use crate::netns::Topology;
use crate::peer::{self, Server};

/// The namespace of everything but the class.
pub const NAMESPACE: &str = "databases";
/// The ports of the Gateway, and with each the name of its listener, of its route and, but for an ending, of its Service.
pub const PORTS: [(u16, &str); 2] = [(3306, "orders"), (3307, "users")];
/// Who answers at these ports.
pub const SERVERS: [&str; 2] = ["101", "202"];

/// A cluster with the databases, their Services and slices. Class, Gateway and routes come when a test says so.
#[derive(Debug)]
pub struct Databases {
    /// The cluster.
    pub cluster: Cluster,
    servers: Servers,
}

/// What answers. It ends when dropped.
#[derive(Debug)]
enum Servers {
    MariaDb { _servers: [Database; 2] },
    StandIns { _servers: [Server; 2] },
}

impl Databases {
    /// Real servers: those that the `StatefulSets` would run.
    pub fn mariadb(cluster: Cluster) -> Result<Self> {
        let topology = &cluster.topology;
        let addresses = addresses(topology);
        let servers = thread::scope(|scope| {
            let one = scope.spawn(|| Database::mariadb(&topology.backend1, addresses[0], 101));
            let two = scope.spawn(|| Database::mariadb(&topology.backend2, addresses[1], 202));
            [one, two].map(|server| server.join().expect("no panic"))
        });
        let [one, two] = servers;
        Self::declare(cluster, Servers::MariaDb { _servers: [one?, two?] })
    }

    /// Servers of which nothing is wanted but a name and echoes.
    pub fn stand_ins(cluster: Cluster) -> Result<Self> {
        let topology = &cluster.topology;
        let addresses = addresses(topology);
        let one = Server::start(&topology.backend1, addresses[0], peer::identify(SERVERS[0]))?;
        let two = Server::start(&topology.backend2, addresses[1], peer::identify(SERVERS[1]))?;
        Self::declare(cluster, Servers::StandIns { _servers: [one, two] })
    }

    fn declare(cluster: Cluster, servers: Servers) -> Result<Self> {
        cluster.apply_examples(&["databases.yaml"])?;
        for ((_, name), address) in PORTS.into_iter().zip(addresses(&cluster.topology)) {
            cluster.create_slice(NAMESPACE, &format!("{name}-db"), "mysql", &[address])?;
        }
        Ok(Self { cluster, servers })
    }

    /// Makes the class and the Gateway.
    pub fn declare_gateway(&self) -> Result<()> {
        self.cluster.apply_examples(&["gatewayclass.yaml", "gateway.yaml"])
    }

    /// Makes the two routes, in this version of their kind.
    pub fn declare_routes(&self, version: &str) -> Result<()> {
        self.cluster.apply_examples(&[&format!("routes-{version}.yaml")])
    }

    /// Deletes the Gateway and the class, and waits until they are gone: the class is held back as long as it is used.
    pub fn withdraw_gateway(&self) -> Result<()> {
        self.cluster.delete_examples(&["gateway.yaml", "gatewayclass.yaml"])?;
        let class = format!("{GATEWAY_API}/v1/gatewayclasses/forwarder");
        self.cluster.api.wait_until_gone(&class, DEADLINE)
    }

    /// Deletes the two routes, in this version of their kind.
    pub fn withdraw_routes(&self, version: &str) -> Result<()> {
        self.cluster.delete_examples(&[&format!("routes-{version}.yaml")])
    }

    /// Who answers at the ports of the Gateway, on new connections.
    pub fn answers(&self) -> Result<[String; 2]> {
        let answer = |port| self.answer(port);
        let [(orders, _), (users, _)] = PORTS;
        Ok([answer(orders)?, answer(users)?])
    }

    /// Who answers at a port of the Gateway, on a new connection.
    pub fn answer(&self, port: u16) -> Result<String> {
        let topology = &self.cluster.topology;
        let address = topology.node_address(port);
        match &self.servers {
            Servers::MariaDb { .. } => query(&topology.client, address, "SELECT @@server_id"),
            Servers::StandIns { .. } => Ok(client::identity(&topology.client, address)?),
        }
    }

    /// The sockets that listen on the ports of the Gateway: the same numbers as long as these are the same sockets.
    pub fn listening(&self) -> [Vec<u64>; 2] {
        PORTS.map(|(port, _)| self.cluster.topology.node.listening_inodes(port))
    }
}

fn addresses(topology: &Topology) -> [SocketAddr; 2] {
    [topology.backend1_address(3306), topology.backend2_address(3306)]
}
