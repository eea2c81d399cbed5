mod fake;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::num::NonZeroU16;

use self::fake::{Fake, Told};
use super::*;
use crate::worker_context::WorkerSettings;
use forwarder_gateway::manifests::NamespacedName;
use forwarder_gateway::model::{Backend, BindAddress, ListenerName, ListenerParent, ListenerSettings, Route};

fn port(number: u16) -> NonZeroU16 {
    NonZeroU16::new(number).unwrap()
}

fn free_port() -> NonZeroU16 {
    let probe = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    port(probe.local_addr().unwrap().port())
}

fn key(port: NonZeroU16) -> ListenerKey {
    ListenerKey { address: BindAddress::Ip(Ipv4Addr::LOCALHOST.into()), port }
}

fn backend(name: &str) -> BackendKey {
    BackendKey { service: NamespacedName::new("default", name), port: port(80) }
}

/// Adds a listener whose route leads to `endpoints`.
fn add(table: &mut RouteTable, name: &str, port: NonZeroU16, endpoints: &[SocketAddr]) {
    let settings = ListenerSettings { half_closed_timeout: None, ..ListenerSettings::default() };
    let listener = Listener {
        name: ListenerName {
            parent: ListenerParent::Gateway(NamespacedName::new("default", "gw")),
            section: name.to_owned(),
        },
        settings,
        route: Some(Route {
            name: NamespacedName::new("default", name),
            backends: vec![Backend { weight: 1, target: Target::Service(backend(name)) }],
        }),
    };
    table.listeners.insert(key(port), Arc::new(listener));
    table.backends.insert(backend(name), endpoints.into());
}

fn reconciler(refuses: bool) -> (Reconciler, Arc<Mutex<Told>>) {
    let told = Arc::default();
    let fake = Fake { told: Arc::clone(&told), refuses };
    let settings = WorkerSettings::default();
    let workers = Workers::start(2, settings).unwrap();
    let in_force = Arc::new(Mutex::new(InForce::new(Some(Box::new(fake)))));
    (Reconciler::new(workers, ListenSettings::default(), in_force), told)
}

/// Sends a byte through a listener and back.
fn ping(port: NonZeroU16) {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port.get())).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
}

/// An endpoint that echoes one byte of each connection.
fn echo() -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut byte = [0];
            if stream.read_exact(&mut byte).is_ok() {
                stream.write_all(&byte).unwrap();
            }
        }
    });
    address
}

fn ids(reconciler: &Reconciler) -> BTreeMap<ListenerKey, ListenerId> {
    let in_force = reconciler.lock();
    in_force
        .sockets
        .iter()
        .filter_map(|(key, state)| match state {
            SocketState::Bound(bound) => Some((*key, bound.id)),
            SocketState::Failed(_) => None,
        })
        .collect()
}

#[tokio::test]
async fn a_new_listener_leaves_the_others_bound_as_they_are() {
    let (reconciler, told) = reconciler(false);
    let endpoint = echo();
    let (a, b) = (free_port(), free_port());
    let mut table = RouteTable::default();
    add(&mut table, "a", a, &[endpoint]);
    reconciler.apply(&table).await;
    let before = ids(&reconciler);
    add(&mut table, "b", b, &[endpoint]);
    reconciler.apply(&table).await;
    let after = ids(&reconciler);
    assert_eq!(before[&key(a)], after[&key(a)]);
    assert_eq!(told.lock().unwrap().listeners, after);
    ping(a);
    ping(b);
}

#[tokio::test]
async fn changed_endpoints_reach_the_maps_of_every_listener_that_uses_them() {
    let (reconciler, told) = reconciler(false);
    let endpoint = echo();
    let a = free_port();
    let mut table = RouteTable::default();
    add(&mut table, "a", a, &[]);
    reconciler.apply(&table).await;
    add(&mut table, "a", a, &[endpoint]);
    reconciler.apply(&table).await;
    let written = told.lock().unwrap().backends[&ids(&reconciler)[&key(a)]].clone();
    assert_eq!(written, [BackendEntry { address: endpoint, weight: 1 }]);
    ping(a);
}

#[tokio::test]
async fn maps_that_refuse_everything_take_no_traffic_away() {
    let (reconciler, _) = reconciler(true);
    let a = free_port();
    let mut table = RouteTable::default();
    add(&mut table, "a", a, &[echo()]);
    reconciler.apply(&table).await;
    ping(a);
    reconciler.apply(&RouteTable::default()).await;
    assert!(TcpStream::connect((Ipv4Addr::LOCALHOST, a.get())).is_err());
}

#[tokio::test]
async fn a_port_that_becomes_free_is_bound_at_the_next_attempt() {
    let (reconciler, told) = reconciler(false);
    let holder = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let a = port(holder.local_addr().unwrap().port());
    let mut table = RouteTable::default();
    add(&mut table, "a", a, &[echo()]);
    reconciler.apply(&table).await;
    let failures = reconciler.lock().bind_failures();
    assert!(failures[0].message.contains("EADDRINUSE"), "{failures:?}");
    // However often it is tried, nothing is used up, and nothing stands in the maps.
    for _ in 0..3 {
        assert!(!reconciler.retry(true));
    }
    assert_eq!(told.lock().unwrap().listeners, BTreeMap::new());
    let next_id = reconciler.lock().next_id;
    drop(holder);
    assert!(reconciler.retry(false));
    assert_eq!(ids(&reconciler)[&key(a)], ListenerId(next_id));
    assert_eq!(next_id, 1);
    ping(a);
}
