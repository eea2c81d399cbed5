//! Live connections that are joined by the programs: a client, a node and an endpoint in network namespaces of their own.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use aya::programs::links::LinkOrder;
use aya::programs::tc::TcAttachOptions;
use aya::programs::{SchedClassifier, TcAttachType};
use forwarder_common::flow::{Flow, NextHop, SENDER_RESET, STATE_OFFLOADED};
use forwarder_common::tuple::FourTuple;
use forwarder_common::{PROGRAM_EGRESS_ETHERNET, PROGRAM_ETHERNET, Verdict};

use super::{PAIR, bpffs, enter, ip, load_egress, pair, skip, verdicts, write_flows, write_pair};
use crate::bpf::Bpf;
use crate::net::egress_path::Via;
use crate::programs::attach::AttachKind;
use crate::tcp::join::{Hop, Placement, join};
use crate::tcp::leg::{Leg, Relayed};

const TIMEOUT: Duration = Duration::from_secs(20);
/// How long after the insertion of a flow packets may still be on their way past the programs.
const SETTLING: Duration = Duration::from_millis(15);
const PORT: u16 = 9001;

/// A client, a node and an endpoint, joined by the node's devices `veth-down` and `veth-up`.
struct Network {
    names: [String; 3],
    addresses: [[&'static str; 2]; 2],
}

impl Network {
    fn new(is_ipv6: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let names =
            ["client", "node", "endpoint"].map(|role| format!("fwdl-{}-{number}-{role}", std::process::id()));
        // The node's address first, in each network.
        let (addresses, length) = if is_ipv6 {
            ([["fd00:a::1", "fd00:a::2"], ["fd00:b::1", "fd00:b::2"]], 64)
        } else {
            ([["10.9.1.1", "10.9.1.2"], ["10.9.2.1", "10.9.2.2"]], 24)
        };
        // From here on it is removed, even if something fails.
        let network = Self { names, addresses };
        let [client, node, endpoint] = &network.names;
        for name in &network.names {
            ip(&format!("netns add {name}"));
        }
        for (host, near, [own, other]) in
            [(client, "veth-down", addresses[0]), (endpoint, "veth-up", addresses[1])]
        {
            ip(&format!("-n {node} link add {near} type veth peer name eth0 netns {host}"));
            for (namespace, device, address) in [(node, near, own), (host, "eth0", other)] {
                let flags = if is_ipv6 { " nodad" } else { "" };
                ip(&format!("-n {namespace} address add {address}/{length} dev {device}{flags}"));
                ip(&format!("-n {namespace} link set {device} up"));
            }
        }
        network
    }

    fn address(&self, network: usize, host: usize) -> SocketAddr {
        SocketAddr::new(self.addresses[network][host].parse().unwrap(), PORT)
    }

    /// Runs `body` in the namespace of a host, on a thread of its own.
    fn on<T: Send + 'static>(&self, host: usize, body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let name = self.names[host].clone();
        thread::spawn(move || {
            enter(&name);
            body()
        })
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = Command::new("ip").args(["netns", "delete", name]).output();
        }
    }
}

fn interface_index(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

/// Hangs the programs on both interfaces; detached with the namespace.
fn attach(bpf: &mut Bpf) {
    load_egress(bpf);
    for (program, side) in
        [(PROGRAM_ETHERNET, TcAttachType::Ingress), (PROGRAM_EGRESS_ETHERNET, TcAttachType::Egress)]
    {
        let program: &mut SchedClassifier = bpf.ebpf.program_mut(program).unwrap().try_into().unwrap();
        for interface in ["veth-down", "veth-up"] {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options(interface, side, options).unwrap();
        }
    }
}

/// Joins two sockets of this namespace.
fn offload(
    bpf: &mut Bpf,
    downstream: (&TcpStream, Relayed),
    upstream: (&TcpStream, Relayed),
) -> Vec<(FourTuple, Flow)> {
    let legs = [downstream, upstream].map(|(socket, relayed)| {
        let clock = crate::tcp::timestamp_clock::wait(socket);
        Leg::read(socket, relayed, clock).unwrap()
    });
    let hop = |interface: &str, leg: &Leg| Hop {
        interface: interface_index(interface),
        next_hop: NextHop::new(leg.peer.ip()),
        mtu: 1500,
        via: Via::Redirect,
        hop_limit: 64,
    };
    let placement =
        Placement { downstream: hop("veth-down", &legs[0]), upstream: hop("veth-up", &legs[1]), pair: PAIR };
    let joint = join(&legs[0], &legs[1], placement).unwrap();
    write_flows(bpf, &joint.flows);
    // Both directions begin with it.
    write_pair(bpf, joint.pair);
    joint.flows.to_vec()
}

/// Bytes that tell their place in the stream.
fn fill(buffer: &mut [u8], start: u64, seed: u64) {
    for (place, byte) in (start..).zip(buffer.iter_mut()) {
        *byte = (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed).to_be_bytes()[0];
    }
}

fn send(mut stream: &TcpStream, length: u64, seed: u64) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    let mut sent = 0;
    while sent < length {
        let size = usize::try_from((length - sent).min(64 << 10)).unwrap();
        fill(&mut buffer[..size], sent, seed);
        stream.write_all(&buffer[..size])?;
        sent += u64::try_from(size).unwrap();
    }
    Ok(())
}

/// Reads `length` bytes and checks each.
fn receive(mut stream: &TcpStream, length: u64, seed: u64) -> io::Result<()> {
    let (mut buffer, mut expected) = (vec![0; 64 << 10], vec![0; 64 << 10]);
    let mut received = 0;
    while received < length {
        let most = usize::try_from((length - received).min(64 << 10)).unwrap();
        let size = stream.read(&mut buffer[..most])?;
        if size == 0 {
            return Err(io::Error::other(format!("ended after {received} bytes of {length}")));
        }
        fill(&mut expected[..size], received, seed);
        if buffer[..size] != expected[..size] {
            return Err(io::Error::other(format!("wrong bytes after {received}")));
        }
        received += u64::try_from(size).unwrap();
    }
    Ok(())
}

/// Both directions at once, then the end of each.
fn exchange(stream: &TcpStream, length: u64, seeds: [u64; 2]) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            send(stream, length, seeds[0])?;
            stream.shutdown(Shutdown::Write)
        });
        receive(stream, length, seeds[1])?;
        sender.join().unwrap()?;
        let mut reader = stream;
        match reader.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(io::Error::other("more bytes than were sent")),
        }
    })
}

const SEEDS: [u64; 2] = [0x1234_5678_9abc_def0, 0x0fed_cba9_8765_4321];

/// The ends of a pair: what client and endpoint found, and the two sockets of the node.
struct Ends {
    client: JoinHandle<io::Result<()>>,
    endpoint: JoinHandle<io::Result<()>>,
    downstream: TcpStream,
    upstream: TcpStream,
}

/// Bytes without a counterpart on the other leg.
#[derive(Clone, Copy)]
struct Prelude {
    /// What the client says first, to the node alone.
    kept: &'static [u8],
    /// What the node says first, to the endpoint alone.
    sent: &'static [u8],
}

const NONE: Prelude = Prelude { kept: b"", sent: b"" };

fn expect(mut stream: &TcpStream, expected: &[u8]) -> io::Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    let mut read = vec![0; expected.len()];
    stream.read_exact(&mut read)?;
    if read == expected { Ok(()) } else { Err(io::Error::other(format!("{read:?} instead of {expected:?}"))) }
}

/// Opens a pair through this namespace, that of the node. Its ends exchange `length` bytes in each direction at once, after what
/// each says to the node, or hears from it.
fn open(network: &Network, length: u64, prelude: Prelude) -> Ends {
    let (listen, connect) = (network.address(0, 0), network.address(1, 1));
    let listener = TcpListener::bind(listen).unwrap();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let endpoint = network.on(2, move || {
        let listener = TcpListener::bind(connect)?;
        ready.send(()).unwrap();
        let stream = listener.accept()?.0;
        expect(&stream, prelude.sent)?;
        exchange(&stream, length, [SEEDS[1], SEEDS[0]])
    });
    let client = network.on(0, move || {
        let mut stream = TcpStream::connect(listen)?;
        stream.write_all(prelude.kept)?;
        exchange(&stream, length, SEEDS)
    });
    is_ready.recv_timeout(TIMEOUT).unwrap();
    let mut upstream = TcpStream::connect(connect).unwrap();
    upstream.write_all(prelude.sent).unwrap();
    let downstream = listener.accept().unwrap().0;
    expect(&downstream, prelude.kept).unwrap();
    Ends { client, endpoint, downstream, upstream }
}

/// Copies what is there from one socket to the other, up to `most` bytes, and returns how many; both are non-blocking.
fn relay(mut from: &TcpStream, mut to: &TcpStream, pending: &mut Vec<u8>) -> u64 {
    let mut buffer = vec![0; 16 << 10];
    if pending.is_empty() {
        match from.read(&mut buffer) {
            Ok(size) => pending.extend(&buffer[..size]),
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}"),
        }
    }
    match to.write(pending) {
        Ok(size) => {
            pending.drain(..size);
            u64::try_from(size).unwrap()
        }
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
            0
        }
    }
}

/// Bytes that a socket has sent and that are not acknowledged yet, or that wait to be sent.
fn unacknowledged(socket: &TcpStream) -> u64 {
    // The send queue of the socket, as the kernel's table shows it, without a descriptor's ioctl.
    let port = socket.peer_addr().unwrap().port();
    let local = socket.local_addr().unwrap().port();
    let tables = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];
    let text: String =
        tables.iter().map(|table| std::fs::read_to_string(table).unwrap_or_default()).collect();
    let line = text.lines().find(|line| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let ends = |field: Option<&&str>, port: u16| {
            field
                .and_then(|field| field.rsplit_once(':'))
                .is_some_and(|(_, hex)| hex == format!("{port:04X}"))
        };
        ends(fields.get(1), local) && ends(fields.get(2), port)
    });
    let queue =
        line.and_then(|line| line.split_ascii_whitespace().nth(4)?.split_once(':')).map(|(send, _)| send);
    queue.and_then(|hex| u64::from_str_radix(hex, 16).ok()).expect("the socket is in the table")
}

/// Relays `before` bytes in each direction by hand, joins the connections in mid-stream, delivers the remainder, and lets go of
/// the sockets as a killed agent does.
fn joined_in_mid_stream(is_ipv6: bool, before: u64, length: u64, prelude: Prelude) {
    let Some(bpffs) = bpffs() else { return };
    if AttachKind::of_kernel() != AttachKind::Tcx {
        return skip("tcx: Linux 6.6 or newer");
    }
    let network = Network::new(is_ipv6);
    let node = network.names[1].clone();
    let body = || {
        enter(&node);
        let mut bpf = Bpf::load(&bpffs.options()).unwrap();
        attach(&mut bpf);
        let Ends { client, endpoint, downstream, upstream } = open(&network, length, prelude);
        downstream.set_nonblocking(true).unwrap();
        upstream.set_nonblocking(true).unwrap();
        let (mut request, mut response) = (Vec::new(), Vec::new());
        let (mut up, mut down) = (0, 0);
        let deadline = Instant::now() + TIMEOUT;
        while up < before || down < before {
            assert!(Instant::now() < deadline, "relayed {up} and {down} bytes");
            up += relay(&downstream, &upstream, &mut request);
            down += relay(&upstream, &downstream, &mut response);
        }
        let kept = u64::try_from(prelude.kept.len()).unwrap();
        let flows = offload(
            &mut bpf,
            (&downstream, Relayed { written: down, kept, ..Relayed::default() }),
            (&upstream, Relayed { written: up, ..Relayed::default() }),
        );
        let inserted = Instant::now();
        // What the sockets had received is delivered, in the meantime new packets pass by.
        loop {
            assert!(Instant::now() < deadline, "the remainder is not delivered: {:?}", verdicts(&bpf));
            let moved =
                relay(&downstream, &upstream, &mut request) + relay(&upstream, &downstream, &mut response);
            let is_done = moved == 0
                && request.is_empty()
                && response.is_empty()
                && inserted.elapsed() > SETTLING
                && unacknowledged(&downstream) == 0
                && unacknowledged(&upstream) == 0;
            if is_done {
                break;
            }
        }
        let offloaded: Vec<_> =
            flows.into_iter().map(|(key, flow)| (key, Flow { state: STATE_OFFLOADED, ..flow })).collect();
        write_flows(&mut bpf, &offloaded);
        // As when the agent is killed: the egress program keeps both ends from hearing of it.
        drop((downstream, upstream));
        client.join().unwrap().expect("the client");
        endpoint.join().unwrap().expect("the endpoint");
        let pair = pair(&bpf);
        for direction in [pair.request, pair.response] {
            assert!(direction.fin_end().is_some() && direction.flags & SENDER_RESET == 0, "{pair:?}");
            assert_eq!(direction.bytes, length, "{pair:?}");
        }
        let verdicts = verdicts(&bpf);
        assert!(verdicts[&Verdict::Redirected] > 0, "{verdicts:?}");
        assert!(verdicts[&Verdict::Suppressed] > 0, "{verdicts:?}");
    };
    thread::scope(|scope| scope.spawn(body).join()).unwrap();
}

#[test]
fn connections_joined_at_once_outlive_their_sockets() {
    joined_in_mid_stream(false, 0, 8 << 20, NONE);
}

#[test]
fn connections_joined_in_mid_stream_lose_no_byte() {
    for round in 0..4_u64 {
        joined_in_mid_stream(false, 100_000 + round * 300_001, 12 << 20, NONE);
    }
}

#[test]
fn ipv6_connections_joined_in_mid_stream_lose_no_byte() {
    for round in 0..2_u64 {
        joined_in_mid_stream(true, 50_000 + round * 500_001, 12 << 20, NONE);
    }
}

/// A PROXY header that the client has sent to the node, and a longer one that the node has sent to the endpoint.
#[test]
fn connections_with_bytes_of_their_own_lose_no_byte_of_the_others() {
    let prelude = Prelude {
        kept: b"PROXY TCP4 192.0.2.7 10.9.1.1 55000 9001\r\n",
        sent: b"PROXY TCP6 2001:db8:1234:5678:9abc:def0:1234:5678 fd00:a::1 55000 9001\r\n",
    };
    joined_in_mid_stream(false, 0, 4 << 20, prelude);
    joined_in_mid_stream(true, 100_000, 4 << 20, prelude);
    joined_in_mid_stream(false, 100_000, 4 << 20, Prelude { kept: b"", ..prelude });
    joined_in_mid_stream(false, 100_000, 4 << 20, Prelude { sent: b"", ..prelude });
}
