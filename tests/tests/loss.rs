//! Conversations are whole though the network loses, repeats and reorders packets, or is gone for a while.

use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use forwarder_tests::netns::FAR;
use forwarder_tests::shape::stage::{Family, Offload};
use forwarder_tests::shape::{Kind, Shape, Stage};
use forwarder_tests::wire::{self, Trouble};
use forwarder_tests::{Datapath, require_root, serialise, wait_until};

static HEAVY: Mutex<()> = Mutex::new(());
const AT_ONCE: usize = 32;

/// Conversations between hosts that lose so many of a thousand packets that arrive.
fn check_loss(of_thousand: u32, conversations: u64) {
    for datapath in Datapath::chosen_and_at_xdp() {
        let stage =
            Stage::start(datapath.topology().expect("a network"), datapath, Family::V4).expect("a stage");
        let hosts = [&stage.topology.client, &stage.topology.backend1];
        for host in hosts {
            wire::lose_at_ingress(host, FAR, of_thousand).expect("nftables");
        }
        let shapes = (0..conversations).map(|seed| Shape::of(seed).for_lossy_network());
        stage.check_shapes(shapes.collect(), AT_ONCE, Offload::Expected);
        let lost = hosts.map(|host| wire::lost_at_ingress(host).expect("the rule is there"));
        println!("{datapath}: lost {} packets to the client and {} to the server", lost[0], lost[1]);
        assert!(lost.iter().all(|&lost| lost > 0), "nothing was lost: {lost:?}");
    }
}

/// Conversations through wires that make trouble.
fn check_wires(trouble: Trouble, conversations: u64) {
    for datapath in Datapath::chosen() {
        let (topology, wires) = wire::wired(1).expect("a network");
        let stage = Stage::start(topology, datapath, Family::V4).expect("a stage");
        for wire in &wires {
            wire.set(trouble);
        }
        let shapes = (0..conversations).map(|seed| Shape::of(seed).for_lossy_network());
        stage.check_shapes(shapes.collect(), AT_ONCE, Offload::Expected);
        for wire in &wires {
            let done = wire.done();
            println!("{datapath}: {done:?}");
            assert_eq!(done.lost > 0, trouble.lost > 0, "{datapath}: {done:?}");
            assert_eq!(done.repeated > 0, trouble.repeated > 0, "{datapath}: {done:?}");
            assert_eq!(done.held > 0, trouble.held > 0, "{datapath}: {done:?}");
        }
    }
}

#[test]
fn one_packet_of_a_hundred_is_lost() {
    if require_root() {
        let _guard = serialise(&HEAVY);
        check_loss(10, 300);
    }
}

#[test]
fn one_packet_of_twenty_is_lost() {
    if require_root() {
        let _guard = serialise(&HEAVY);
        check_loss(50, 100);
    }
}

#[test]
fn packets_are_reordered_and_repeated() {
    if require_root() {
        let _guard = serialise(&HEAVY);
        let hold = Duration::from_millis(4);
        check_wires(Trouble { held: 300, repeated: 200, hold, ..Trouble::default() }, 100);
    }
}

#[test]
fn packets_of_both_directions_are_lost_and_reordered() {
    if require_root() {
        let _guard = serialise(&HEAVY);
        let hold = Duration::from_millis(4);
        check_wires(Trouble { lost: 100, held: 100, repeated: 50, hold, ..Trouble::default() }, 100);
    }
}

#[test]
fn a_wire_that_makes_no_trouble_changes_nothing() {
    if require_root() {
        let _guard = serialise(&HEAVY);
        check_wires(Trouble::default(), 200);
    }
}

#[test]
fn an_outage_of_either_leg_delays_and_breaks_nothing() {
    const OUTAGE: Duration = Duration::from_millis(700);
    if !require_root() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for datapath in Datapath::chosen() {
        let (topology, wires) = wire::wired(2).unwrap();
        let stage = Stage::start(topology, datapath, Family::V4).unwrap();
        for (round, wire) in (0..).zip(&wires) {
            let kinds = [Kind::BothWays, Kind::PingPong, Kind::Upload, Kind::Download, Kind::Pauses];
            let seeds = 1000 * round..1000 * round + 150;
            let shapes = seeds.map(|seed| Shape::of_kind(kinds[usize::try_from(seed).unwrap() % 5], seed));
            thread::scope(|scope| {
                let conversations =
                    scope.spawn(|| stage.check_shapes(shapes.collect(), 16, Offload::Expected));
                let before = wire.done().seen;
                wait_until("the conversations have begun", Duration::from_secs(10), || {
                    wire.done().seen > before + 2000
                });
                wire.set(Trouble::OUTAGE);
                thread::sleep(OUTAGE);
                wire.set(Trouble::default());
                conversations.join().unwrap();
            });
            let done = wire.done();
            println!("{datapath}: {done:?}");
            assert!(done.lost > 0, "{datapath}: nobody noticed the outage");
        }
    }
}
