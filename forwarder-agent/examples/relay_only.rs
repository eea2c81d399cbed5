use std::{collections::BTreeMap, net::*, num::NonZeroU16, sync::{Arc, atomic::AtomicU64}, time::Duration};
use arc_swap::ArcSwap;
use forwarder_agent::{balancer::Balancer, counters::PerWorker, datapath::ListenerId, listener::*, manifests::NamespacedName, model::*, upstream::*, worker::*};
fn main() {
    let a: Vec<String> = std::env::args().collect();
    let port: u16 = a[1].parse().unwrap();
    let backend: SocketAddr = a[2].parse().unwrap();
    let dp = if a[3] == "copy" { Datapath::Copy } else { Datapath::Splice };
    let w = 2;
    let workers = Workers::start(w, WorkerSettings { connect: ConnectSettings { source_addresses: vec![], keepalive: Some(Duration::from_secs(60)) }, max_connections: 9000 }).unwrap();
    let key = ListenerKey { address: BindAddress::Any, port: NonZeroU16::new(port).unwrap() };
    let name = NamespacedName::new("a", "b");
    let bk = BackendKey { service: name.clone(), port: NonZeroU16::new(1).unwrap() };
    let l = Listener { name: ListenerName { gateway: name.clone(), section: "x".into() }, settings: ListenerSettings { datapath: dp, idle_timeout: None, half_closed_timeout: None, connect_timeout: Duration::from_secs(3) }, route: Some(Route { name, backends: vec![Backend { weight: 1, target: Target::Service(bk.clone()) }] }) };
    let up = Arc::new(Upstream::new(bk, &vec![backend].into(), w));
    let b = Arc::new(BoundListener { id: ListenerId(1), key, serving: ArcSwap::from_pointee(Serving { listener: l, balancer: Balancer::new([1]), upstreams: vec![Some(up)] }), counters: PerWorker::new(w), turn: AtomicU64::new(0) });
    workers.listen(bind(key, w, Some(Duration::from_secs(60))).unwrap(), &b);
    loop { std::thread::sleep(Duration::from_secs(100)); }
}
