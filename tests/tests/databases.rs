//! Real database servers behind the forwarder, spoken to by their own clients.

use std::process::Command;
use std::thread;
use std::time::Duration;

use forwarder_tests::database::{Database, postgresql_binaries, require_program};
use forwarder_tests::fixture::LISTENER_PORT;
use forwarder_tests::mariadb::{Session, dump_and_restore, query};
use forwarder_tests::random::Random;
use forwarder_tests::{Agent, BackendRef, Datapath, Manifests, Topology, require_root, skip};

const MARIADB_PORT: u16 = 3306;

#[test]
fn two_mariadb_servers_on_one_target_port_are_two_things() {
    if !require_root() || !require_program("mariadbd") {
        return;
    }
    let topology = Topology::new().unwrap();
    let client = &topology.client;
    let endpoints = [topology.backend1_address(MARIADB_PORT), topology.backend2_address(MARIADB_PORT)];
    let (one, two) = thread::scope(|scope| {
        let one = scope.spawn(|| Database::mariadb(&topology.backend1, endpoints[0], 101));
        let two = scope.spawn(|| Database::mariadb(&topology.backend2, endpoints[1], 202));
        (one.join().unwrap().unwrap(), two.join().unwrap().unwrap())
    });
    let manifests = Manifests::new().unwrap();
    manifests.gateway(&[("orders", 9001), ("billing", 9002)]).unwrap();
    for (name, endpoint) in [("orders", endpoints[0]), ("billing", endpoints[1])] {
        manifests.service(name, &[endpoint]).unwrap();
        manifests.route(name, &[BackendRef { service: name, weight: 1 }]).unwrap();
    }
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let listeners = [9001, 9002].map(|port| topology.node_address(port));

    // Both at once, each its own server.
    thread::scope(|scope| {
        for (listener, id) in listeners.into_iter().zip(["101", "202"]) {
            scope.spawn(move || {
                for _ in 0..20 {
                    assert_eq!(query(client, listener, "SELECT @@server_id").unwrap(), id);
                }
            });
        }
    });

    // About 50 MB of random data out of one connection and into another, through both listeners at once.
    thread::scope(|scope| {
        for listener in listeners {
            scope.spawn(move || {
                let make = "CREATE TABLE source (id INT PRIMARY KEY, data MEDIUMBLOB) \
                            SELECT seq AS id, RANDOM_BYTES(1024) AS data FROM seq_1_to_24000";
                query(client, listener, make).unwrap();
                let bytes = dump_and_restore(client, listener).unwrap();
                assert!(bytes > 45_000_000, "the dump has only {bytes} bytes");
            });
        }
    });

    // A changed route leaves both sessions as they are, and takes new ones elsewhere.
    let mut orders = Session::open(client, listeners[0]).unwrap();
    let mut billing = Session::open(client, listeners[1]).unwrap();
    let identity = "SELECT CONCAT(@@server_id, ' ', CONNECTION_ID())";
    let before = [orders.ask(identity).unwrap(), billing.ask(identity).unwrap()];
    assert!(before[0].starts_with("101 ") && before[1].starts_with("202 "), "{before:?}");
    manifests.route("orders", &[BackendRef { service: "billing", weight: 1 }]).unwrap();
    agent.wait_endpoints("default/gw/orders", &endpoints[1..]);
    for _ in 0..10 {
        assert_eq!(query(client, listeners[0], "SELECT @@server_id").unwrap(), "202");
        assert_eq!(query(client, listeners[1], "SELECT @@server_id").unwrap(), "202");
    }
    assert_eq!([orders.ask(identity).unwrap(), billing.ask(identity).unwrap()], before);
    drop((one, two));
}

#[test]
fn a_mariadb_session_with_think_time_outlives_dumps() {
    const MAKE: &str = "CREATE TABLE source (id INT PRIMARY KEY, data MEDIUMBLOB) \
                        SELECT seq AS id, RANDOM_BYTES(1024) AS data FROM seq_1_to_12000";
    if !require_root() || !require_program("mariadbd") {
        return;
    }
    let topology = Topology::new().unwrap();
    let client = &topology.client;
    let endpoint = topology.backend1_address(MARIADB_PORT);
    let server = Database::mariadb(&topology.backend1, endpoint, 303).unwrap();
    query(client, endpoint, MAKE).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let listener = topology.node_address(LISTENER_PORT);
    for datapath in Datapath::chosen() {
        let agent = datapath.agent().start(&topology.node, &manifests.path()).unwrap();
        datapath.wait_ready(&agent);
        let mut session = Session::open(client, listener).unwrap();
        let identity = session.ask("SELECT CONNECTION_ID()").unwrap();
        let mut random = Random::new(1);
        for round in 1..10_u32 {
            // The application thinks.
            thread::sleep(Duration::from_millis(random.below(600)));
            let answer = session.ask(&format!("SELECT {round}, REPEAT('x', {})", round * 20_000)).unwrap();
            assert_eq!(answer.len(), 2 + 20_000 * usize::try_from(round).unwrap(), "{datapath}: {round}");
            if round == 5 {
                let bytes = dump_and_restore(client, listener).unwrap();
                assert!(bytes > 22_000_000, "{datapath}: the dump has only {bytes} bytes");
                session.ask("DROP DATABASE restored; SELECT 1").unwrap();
            }
        }
        assert_eq!(session.ask("SELECT CONNECTION_ID()").unwrap(), identity, "{datapath}");
        let by_kernel = datapath.forwarded(&agent).unwrap();
        assert_eq!(
            by_kernel > 0,
            datapath.is_by_kernel(),
            "{datapath}: the kernel forwarded {by_kernel} bytes"
        );
    }
    drop(server);
}

#[test]
fn redis_pipelines_and_many_clients_work() {
    if !require_root() || !require_program("redis-benchmark") {
        return;
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(6379);
    let server = Database::redis(&topology.backend1, endpoint).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let listener = topology.node_address(LISTENER_PORT);
    // One message at a time, then sixteen in one packet, then a new connection for each request.
    for extra in [["-P", "1", "-k", "1"], ["-P", "16", "-k", "1"], ["-P", "1", "-k", "0"]] {
        let mut benchmark = Command::new("redis-benchmark");
        benchmark.args(["-q", "-n", "5000", "-c", "50", "-t", "ping_inline,set,get"]).args(extra);
        benchmark.arg("-h").arg(listener.ip().to_string()).arg("-p").arg(listener.port().to_string());
        let output = topology.client.stdout(&mut benchmark).unwrap();
        assert_eq!(output.matches("requests per second").count(), 3, "{extra:?}: {output}");
        assert!(!output.contains("rror"), "{extra:?}: {output}");
    }
    drop((agent, server));
}

#[test]
fn postgresql_answers_its_client() {
    if !require_root() || !require_program("psql") {
        return;
    }
    if postgresql_binaries().is_none() {
        return skip("PostgreSQL's server is not installed");
    }
    let topology = Topology::new().unwrap();
    let endpoint = topology.backend1_address(5432);
    let server = Database::postgresql(&topology.backend1, endpoint).unwrap();
    let manifests = Manifests::forward(LISTENER_PORT, &[endpoint]).unwrap();
    let agent = Agent::start(&topology.node, &manifests.path(), &[]).unwrap();
    let listener = topology.node_address(LISTENER_PORT);
    let psql = |sql: &str| {
        let mut command = Command::new("psql");
        command.args(["-X", "-A", "-t", "-U", "postgres", "-d", "postgres", "-v", "ON_ERROR_STOP=1"]);
        command.arg("-h").arg(listener.ip().to_string()).arg("-p").arg(listener.port().to_string());
        topology.client.stdout(command.args(["-c", sql])).map(|output| output.trim().to_owned())
    };
    psql("CREATE TABLE source AS SELECT n, md5(n::text) AS text FROM generate_series(1, 200000) AS n")
        .unwrap();
    let want = psql("SELECT md5(string_agg(text, '' ORDER BY n)) FROM source").unwrap();
    // The whole table comes to the client; its sum is made there by the server's own means, in a second table.
    let copied = psql("COPY (SELECT text FROM source ORDER BY n) TO STDOUT").unwrap();
    assert_eq!(copied.lines().count(), 200_000);
    assert_eq!(want.len(), 32);
    assert_eq!(psql("SELECT inet_server_port()").unwrap(), "5432");
    drop((agent, server));
}
