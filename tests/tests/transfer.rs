//! Every byte arrives, once and in order, in each tier.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::sync::Mutex;
use std::thread;

use forwarder_tests::random::Random;
use forwarder_tests::{Forwarding, client, peer, require_root, serialise};

static HEAVY: Mutex<()> = Mutex::new(());
const DATAPATHS: [&str; 3] = ["splice", "copy", "tc"];
const SIZES: [u64; 4] = [0, 1, 100_000, 64 << 20];

#[test]
fn every_size_arrives_unchanged_in_both_directions() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::transfer).unwrap();
        for size in SIZES {
            for (up, down) in [(size, 0), (0, size)] {
                let stream = forwarding.connect().unwrap();
                if let Err(error) = client::transfer(&stream, size, up, down) {
                    panic!("{datapath}: {up} up, {down} down: {error:#}");
                }
            }
        }
    }
}

#[test]
fn both_directions_at_once_arrive_unchanged() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::transfer).unwrap();
        for size in SIZES {
            let stream = forwarding.connect().unwrap();
            if let Err(error) = client::transfer(&stream, size, size, size) {
                panic!("{datapath}: {size} in both directions: {error:#}");
            }
        }
    }
}

#[test]
fn many_concurrent_transfers_of_random_sizes_arrive_unchanged() {
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::transfer).unwrap();
        let errors: Vec<String> = thread::scope(|scope| {
            let transfers: Vec<_> = (0..200_u64)
                .map(|seed| {
                    let forwarding = &forwarding;
                    scope.spawn(move || {
                        let mut random = Random::new(seed);
                        let (up, down) = (random.below(1 << 20), random.below(1 << 20));
                        let stream = forwarding.connect().map_err(anyhow::Error::from);
                        stream
                            .and_then(|stream| client::transfer(&stream, seed, up, down))
                            .err()
                            .map(|error| format!("{seed}: {up} up, {down} down: {error:#}"))
                    })
                })
                .collect();
            transfers.into_iter().filter_map(|transfer| transfer.join().unwrap()).collect()
        });
        assert!(errors.is_empty(), "{datapath}: {} of 200 failed: {errors:#?}", errors.len());
        assert_eq!(forwarding.server.accepted(), 200, "{datapath}: each client has one upstream connection");
    }
}

#[test]
fn the_server_may_speak_first() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::identify("greeting")).unwrap();
        let stream = forwarding.connect().unwrap();
        assert_eq!(client::read_line(&stream).unwrap(), "greeting", "{datapath}");
        client::ping(&stream, b"thanks").unwrap();
    }
}

#[test]
fn the_client_may_speak_first_and_end_at_once() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::echo).unwrap();
        let mut stream = forwarding.connect().unwrap();
        stream.write_all(b"x").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "x", "{datapath}");
    }
}

#[test]
fn a_thousand_small_messages_go_back_and_forth() {
    if !require_root() {
        return;
    }
    for datapath in DATAPATHS {
        let forwarding = Forwarding::start(&["--datapath", datapath], peer::echo).unwrap();
        let stream = forwarding.connect().unwrap();
        for number in 0..1000 {
            if let Err(error) = client::ping(&stream, format!("message {number}").as_bytes()) {
                panic!("{datapath}: message {number}: {error}");
            }
        }
    }
}
