//! The support code itself: what the other tests conclude is only worth as much.

use std::io;
use std::net::Shutdown;
use std::time::Duration;

use forwarder_tests::client::{self, End};
use forwarder_tests::peer::{self, Server};
use forwarder_tests::{Topology, require_root, wait_until};

const WAIT: Duration = Duration::from_secs(5);

#[test]
fn the_network_connects_client_and_backends() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    for (backend, address) in [
        (&topology.backend1, topology.backend1_address(5000)),
        (&topology.backend1, topology.backend1_address_v6(5001)),
        (&topology.backend2, topology.backend2_address(5000)),
        (&topology.backend2, topology.backend2_address_v6(5001)),
    ] {
        let server = Server::start(backend, address, peer::transfer).unwrap();
        let stream = client::connect(&topology.client, server.address()).unwrap();
        client::transfer(&stream, 1, 1_000_000, 2_000_000).unwrap();
        assert_eq!(server.accepted(), 1);
        assert_eq!(backend.listening_inodes(address.port()).len(), 1);
        drop(server);
        assert!(backend.listening_inodes(address.port()).is_empty());
    }
}

#[test]
fn endings_are_told_apart() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let address = topology.backend1_address(5000);
    let refused = peer::refused(&topology.backend1, address).unwrap();
    assert_eq!(client::end_of_new(&topology.client, refused, WAIT).unwrap(), End::Reset);

    let (sender, ends) = std::sync::mpsc::channel();
    let server = Server::start(&topology.backend1, address, move |stream| {
        sender.send(client::end(stream, WAIT)?).map_err(io::Error::other)
    })
    .unwrap();
    let stream = client::connect(&topology.client, server.address()).unwrap();
    assert_eq!(client::end(&stream, peer::QUIET).unwrap(), End::Open);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Fin);
    assert_eq!(client::end(&stream, WAIT).unwrap(), End::Fin);
    client::reset(client::connect(&topology.client, server.address()).unwrap()).unwrap();
    assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Reset);
}

#[test]
fn servers_do_what_they_say() {
    if !require_root() {
        return;
    }
    let topology = Topology::new().unwrap();
    let (netns, address) = (&topology.backend2, topology.backend2_address(5000));
    let server = Server::start(netns, address, peer::identify("two")).unwrap();
    assert_eq!(client::identity(&topology.client, address).unwrap(), "two");
    let stream = client::connect(&topology.client, address).unwrap();
    assert_eq!(client::read_line(&stream).unwrap(), "two");
    client::ping(&stream, b"hello").unwrap();
    wait_until("both are accepted", WAIT, || server.accepted() == 2);
    drop(server);
    assert_eq!(client::end_of_new(&topology.client, address, WAIT).unwrap(), End::Reset);
}
