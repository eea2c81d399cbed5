//! Conversations of every shape arrive whole, whoever speaks first, pauses, ends first or resets.

use std::env;
use std::time::Duration;

use forwarder_tests::shape::stage::{Family, Offload};
use forwarder_tests::shape::{Kind, Shape, Stage};
use forwarder_tests::{Datapath, require_root};

/// How many conversations there are unless `FORWARDER_TEST_CONVERSATIONS` says so.
const CONVERSATIONS: u64 = 2000;
const AT_ONCE: usize = 48;

fn conversations() -> u64 {
    let number = env::var("FORWARDER_TEST_CONVERSATIONS").ok();
    number.map_or(CONVERSATIONS, |number| number.parse().expect("a number of conversations"))
}

#[test]
fn conversations_of_every_shape_are_whole() {
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen_and_at_xdp() {
        let stage = Stage::start(datapath.topology().unwrap(), datapath, Family::V4).unwrap();
        stage.check(0..conversations(), AT_ONCE);
    }
}

#[test]
fn conversations_of_every_shape_are_whole_over_ipv6() {
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen_and_at_xdp() {
        let stage = Stage::start(datapath.topology().unwrap(), datapath, Family::V6).unwrap();
        stage.check((0..conversations() / 5).map(|seed| seed + 1_000_000), AT_ONCE);
    }
}

#[test]
fn a_clients_port_may_be_used_again_at_once() {
    const PORT: u16 = 40_001;
    const KINDS: [Kind; 4] = [Kind::ServerEndsFirst, Kind::ClientResets, Kind::ServerResets, Kind::Download];
    /// Longer than a handover takes.
    const REST: Duration = Duration::from_millis(50);
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen() {
        let stage = Stage::start(datapath.topology().unwrap(), datapath, Family::V4).unwrap();
        // The client never ends first: its own kernel would keep the port.
        let shapes: Vec<Shape> = (0..50)
            .flat_map(|round| {
                (0..4).zip(KINDS).map(move |(n, kind)| Shape::of_kind(kind, 4 * round + n).with_rest(REST))
            })
            .collect();
        stage.check_port(PORT, &shapes);
    }
}

#[test]
fn slow_readers_close_their_window_and_get_everything() {
    const EACH: u64 = 100;
    if !require_root() {
        return;
    }
    for datapath in Datapath::chosen() {
        let stage = Stage::start(datapath.topology().unwrap(), datapath, Family::V4).unwrap();
        let hosts = [&stage.topology.client, &stage.topology.backend1];
        let closed = || hosts.map(|host| host.counter("TCPToZeroWindowAdv").unwrap());
        let before = closed();
        let shapes = (0..2 * EACH).map(|seed| {
            Shape::of_kind(if seed % 2 == 0 { Kind::SlowClient } else { Kind::SlowServer }, seed)
        });
        // A slow reader stays in userspace until it has caught up.
        stage.check_shapes(shapes.collect(), AT_ONCE, Offload::Optional);
        for (before, after) in before.into_iter().zip(closed()) {
            let closed = after - before;
            println!("{datapath}: {closed} windows were closed by {EACH} readers");
            // At XDP packets are not gathered, and fewer windows close.
            let least = if datapath.is_at_xdp() { EACH / 2 } else { EACH };
            assert!(closed >= least, "{datapath}: the readers are not slow: {closed} windows were closed");
        }
    }
}
