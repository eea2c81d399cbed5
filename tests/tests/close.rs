//! How connections end: half-closes, resets, refusals and time-outs pass from one side to the other.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::client::{self, End};
use forwarder_tests::{Forwarding, peer, random, require_root, wait_until};

const DATAPATHS: [&str; 2] = ["splice", "copy"];
const WAIT: Duration = Duration::from_secs(10);

/// A server that echoes one byte, so that the client knows it is there, and then tells how the connection ends.
fn watched() -> (impl Fn(&TcpStream) -> io::Result<()> + Send + Sync + 'static, Receiver<End>) {
    let (sender, ends) = mpsc::channel();
    let handle = move |mut stream: &TcpStream| {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
        sender.send(client::end(stream, WAIT)?).map_err(io::Error::other)
    };
    (handle, ends)
}

#[test]
fn a_client_that_ended_still_gets_the_whole_reply() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::digest).unwrap();
        for size in [0, 1, 300_000] {
            let mut stream = forwarding.connect().unwrap();
            let sent = random::send(&mut stream, size, size).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, format!("{} {size}", random::hex(sent)), "{datapath}");
        }
    }
}

#[test]
fn a_server_that_ended_still_gets_all_of_the_clients_data() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let (sender, received) = mpsc::channel();
        let forwarding = Forwarding::start(&["--datapath", datapath], move |mut stream| {
            stream.write_all(b"bye")?;
            stream.shutdown(Shutdown::Write)?;
            sender.send(random::receive_to_end(&mut stream)?).map_err(io::Error::other)
        })
        .unwrap();
        let mut stream = forwarding.connect().unwrap();
        let mut greeting = String::new();
        stream.read_to_string(&mut greeting).unwrap();
        assert_eq!(greeting, "bye", "{datapath}");
        let sent = random::send(&mut stream, 5, 3_000_000).unwrap();
        drop(stream);
        assert_eq!(received.recv_timeout(WAIT).unwrap(), (sent, 3_000_000), "{datapath}");
    }
}

#[test]
fn a_clients_reset_reaches_the_server() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let (handle, ends) = watched();
        let forwarding = Forwarding::start(&["--datapath", datapath], handle).unwrap();
        let stream = forwarding.connect().unwrap();
        client::ping(&stream, b"x").unwrap();
        client::reset(stream).unwrap();
        assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Reset, "{datapath}");
    }
}

#[test]
fn a_clients_close_reaches_the_server_as_an_end() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let (handle, ends) = watched();
        let forwarding = Forwarding::start(&["--datapath", datapath], handle).unwrap();
        let stream = forwarding.connect().unwrap();
        client::ping(&stream, b"x").unwrap();
        drop(stream);
        assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Fin, "{datapath}");
    }
}

#[test]
fn a_servers_reset_reaches_the_client() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], |mut stream| {
            stream.read_exact(&mut [0])?;
            client::reset(stream.try_clone()?)
        })
        .unwrap();
        let mut stream = forwarding.connect().unwrap();
        stream.write_all(b"x").unwrap();
        assert_eq!(client::end(&stream, WAIT).unwrap(), End::Reset, "{datapath}");
    }
}

#[test]
fn a_client_is_reset_when_every_endpoint_refuses() {
    if !require_root() {
        return;
    }
    let Forwarding { agent, server, manifests, topology } = Forwarding::start(&[], peer::echo).unwrap();
    drop(server);
    let address = topology.node_address(forwarder_tests::fixture::LISTENER_PORT);
    assert_eq!(client::end_of_new(&topology.client, address, WAIT).unwrap(), End::Reset);
    drop((agent, manifests));
}

#[test]
fn idle_connections_are_reset_on_both_sides_and_busy_ones_are_not() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let (handle, ends) = watched();
        let arguments = ["--datapath", datapath, "--idle-timeout", "1s"];
        let forwarding = Forwarding::start(&arguments, handle).unwrap();
        let idle = forwarding.connect().unwrap();
        let mut busy = forwarding.connect().unwrap();
        client::ping(&busy, b"x").unwrap();
        client::ping(&idle, b"x").unwrap();
        let start = Instant::now();
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                while start.elapsed() < Duration::from_secs(3) {
                    busy.write_all(b"x")?;
                    thread::park_timeout(Duration::from_millis(100));
                }
                io::Result::Ok(())
            });
            assert_eq!(client::end(&idle, WAIT).unwrap(), End::Reset, "{datapath}");
            let lasted = start.elapsed();
            assert!(lasted > Duration::from_millis(700), "{datapath}: reset after {lasted:?}");
            assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Reset, "{datapath}");
            writer.join().unwrap().unwrap();
        });
        drop(busy);
        assert_eq!(ends.recv_timeout(WAIT).unwrap(), End::Fin, "{datapath}: the busy connection");
    }
}

#[test]
fn a_half_closed_connection_is_reset_after_its_timeout_and_others_are_not() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let (sender, ends) = mpsc::channel();
        let arguments = ["--datapath", datapath, "--half-closed-timeout", "1s"];
        // The server keeps its direction open after the client's end.
        let forwarding = Forwarding::start(&arguments, move |mut stream| {
            let mut byte = [0];
            stream.read_exact(&mut byte)?;
            stream.write_all(&byte)?;
            if client::end(stream, WAIT)? == End::Fin {
                stream.set_nodelay(true)?;
                let reset = wait_for_error(stream);
                sender.send(reset).map_err(io::Error::other)?;
            }
            Ok(())
        })
        .unwrap();
        let open = forwarding.connect().unwrap();
        client::ping(&open, b"x").unwrap();
        let half_closed = forwarding.connect().unwrap();
        client::ping(&half_closed, b"x").unwrap();
        half_closed.shutdown(Shutdown::Write).unwrap();
        assert_eq!(client::end(&half_closed, WAIT).unwrap(), End::Reset, "{datapath}");
        assert!(ends.recv_timeout(WAIT).unwrap(), "{datapath}: the server's side is reset too");
        assert_eq!(client::end(&open, peer::QUIET).unwrap(), End::Open, "{datapath}");
    }
}

/// Whether an error such as a reset befalls a connection of which the peer's direction has ended already.
fn wait_for_error(stream: &TcpStream) -> bool {
    let error = forwarder_tests::wait_for(WAIT, || stream.take_error().ok().flatten());
    error.is_some()
}

#[test]
fn two_thousand_half_closed_connections_leave_nothing_behind() {
    const AT_ONCE: usize = 250;
    const ROUNDS: usize = 8;
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::digest).unwrap();
        let agent = &forwarding.agent;
        // One connection first: what is made once and kept must not count as a leak.
        drop(forwarding.connect().unwrap());
        wait_until("the first connection is over", WAIT, || agent.active().unwrap() == 0);
        let descriptors = agent.descriptors().unwrap();
        for _ in 0..ROUNDS {
            let streams: Vec<TcpStream> = (0..AT_ONCE).map(|_| forwarding.connect().unwrap()).collect();
            wait_until("all are active", WAIT, || agent.active().unwrap() == i64::try_from(AT_ONCE).unwrap());
            for stream in &streams {
                stream.shutdown(Shutdown::Write).unwrap();
            }
            for stream in &streams {
                assert_eq!(client::end(stream, WAIT).unwrap(), End::Fin, "{datapath}");
            }
        }
        wait_until("no connection is active", WAIT, || agent.active().unwrap() == 0);
        // A pool of pipes may stay; four descriptors for each connection may not.
        let most = descriptors + AT_ONCE;
        wait_until("the descriptors are closed", WAIT, || agent.descriptors().unwrap() <= most);
        println!("{datapath}: {descriptors} descriptors before, {} after", agent.descriptors().unwrap());
    }
}
