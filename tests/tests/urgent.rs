//! Urgent data (RFC 6093): an ordinary byte of the stream, which waits for nobody, at every tier.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use forwarder_tests::fixture::LISTENER_PORT;
use forwarder_tests::random::Random;
use forwarder_tests::shape::stage::Family;
use forwarder_tests::{AgentCommand, Forwarding, Topology, client, require_root, wait_until};
use socket2::SockRef;

const WAIT: Duration = Duration::from_secs(10);
const TIERS: [&str; 4] = ["copy", "splice", "tc", "sockmap"];
const URGENT: &[u8] = b"!";
/// On each side of the urgent byte.
const HALF: usize = 1 << 20;

fn start<F>(family: Family, tier: &str, offload_after: &str, handle: F) -> Forwarding
where
    F: Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static,
{
    let topology = Topology::new().expect("a network");
    let command = AgentCommand::new(&["--datapath", tier, "--offload-after", offload_after]);
    Forwarding::serve(topology, family, &command, handle).expect("an agent between two hosts")
}

fn connect(forwarding: &Forwarding, family: Family) -> TcpStream {
    let address: SocketAddr = match family {
        Family::V4 => forwarding.topology.node_address(LISTENER_PORT),
        Family::V6 => forwarding.topology.node_address_v6(LISTENER_PORT),
    };
    client::connect(&forwarding.topology.client, address).expect("connect")
}

/// What the other end has sent as urgent data arrives where it stands.
fn in_line(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_out_of_band_inline(true)
}

/// Sends `before`, an urgent byte and `after`.
fn send(mut stream: &TcpStream, before: &[u8], after: &[u8]) -> io::Result<()> {
    stream.write_all(before)?;
    assert_eq!(SockRef::from(stream).send_out_of_band(URGENT)?, URGENT.len());
    stream.write_all(after)
}

fn read(mut stream: &TcpStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).expect("every byte");
    bytes
}

/// Echoes with the byte in line.
fn echo(mut stream: &TcpStream) -> io::Result<()> {
    in_line(stream)?;
    io::copy(&mut stream.try_clone()?, &mut stream).map(drop)
}

fn each(test: impl Fn(Family, &str)) {
    if !require_root() {
        return;
    }
    for family in [Family::V4, Family::V6] {
        for tier in TIERS {
            println!("{tier}, {family:?}");
            test(family, tier);
        }
    }
}

#[test]
fn an_urgent_byte_and_what_follows_it_arrive_at_once() {
    each(|family, tier| {
        let forwarding = start(family, tier, "1KiB,250ms", echo);
        for _ in 0..20 {
            let stream = connect(&forwarding, family);
            in_line(&stream).expect("an option");
            // None of it waits for what comes later.
            stream.set_read_timeout(Some(Duration::from_secs(2))).expect("an option");
            send(&stream, b"abc", b"def\n").expect("sent");
            assert_eq!(read(&stream, 8), b"abc!def\n", "{tier}, {family:?}");
        }
    });
}

#[test]
fn a_session_with_an_urgent_byte_goes_on_when_the_kernel_takes_it_over() {
    each(|family, tier| {
        let forwarding = start(family, tier, "64B", echo);
        let stream = connect(&forwarding, family);
        in_line(&stream).expect("an option");
        stream.set_read_timeout(Some(WAIT)).expect("an option");
        send(&stream, b"abc", b"def\n").expect("sent");
        assert_eq!(read(&stream, 8), b"abc!def\n", "{tier}, {family:?}");
        let exchange = |number: u8| {
            (&stream).write_all(&[number; 100]).expect("sent");
            assert_eq!(read(&stream, 100), [number; 100], "{tier}, {family:?}");
        };
        exchange(1);
        if matches!(tier, "tc" | "sockmap") {
            wait_until("the kernel has taken it over", WAIT, || {
                exchange(2);
                forwarding.agent.connections("").expect("a list").iter().any(|one| one["tier"] == tier)
            });
        }
        exchange(3);
        // And once it is the kernel's.
        send(&stream, b"ghi", b"jkl\n").expect("sent");
        assert_eq!(read(&stream, 8), b"ghi!jkl\n", "{tier}, {family:?}");
        exchange(4);
        assert_eq!(forwarding.agent.fallbacks("path_broken"), 0, "{tier}, {family:?}");
        stream.shutdown(std::net::Shutdown::Write).expect("an end");
        assert_eq!(client::read(&stream, &mut [0]).expect("an end"), 0, "{tier}, {family:?}");
    });
}

#[test]
fn an_urgent_byte_amid_much_leaves_all_of_it_whole() {
    let mut bytes = vec![0; 2 * HALF];
    Random::new(17).fill(&mut bytes);
    let whole = [&bytes[..HALF], URGENT, &bytes[HALF..]].concat();
    each(|family, tier| {
        let sent = bytes.clone();
        // Both ways at once.
        let forwarding = start(family, tier, "16KiB,250ms", move |stream| {
            in_line(stream)?;
            let mut reader = stream.try_clone()?;
            let received = std::thread::spawn(move || {
                let mut received = vec![0; 2 * HALF + 1];
                reader.read_exact(&mut received).map(|()| received)
            });
            send(stream, &sent[..HALF], &sent[HALF..])?;
            let received = received.join().expect("a thread")?;
            let mut writer = stream;
            writer.write_all(&received)
        });
        let stream = connect(&forwarding, family);
        in_line(&stream).expect("an option");
        stream.set_read_timeout(Some(WAIT)).expect("an option");
        std::thread::scope(|scope| {
            scope.spawn(|| send(&stream, &bytes[..HALF], &bytes[HALF..]).expect("sent"));
            assert!(read(&stream, whole.len()) == whole, "{tier}, {family:?}: from the endpoint");
            assert!(read(&stream, whole.len()) == whole, "{tier}, {family:?}: from the client");
        });
        // The end comes after it, not instead.
        assert_eq!(client::read(&stream, &mut [0]).expect("an end"), 0, "{tier}, {family:?}");
    });
}
