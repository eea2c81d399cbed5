//! Whatever an end does while the agent is just at some step of a handover has the effect that it should.

use std::env;
use std::fs;
use std::sync::Mutex;
use std::time::Instant;

use forwarder_tests::database::require_program;
use forwarder_tests::kernel::{AT_ONCE, is_ready};
use forwarder_tests::shape::stage::Family;
use forwarder_tests::steps::{self, Cell, Lane, Side, Tier};
use forwarder_tests::{AgentCommand, Forwarding, peer, serialise};

static HEAVY: Mutex<()> = Mutex::new(());

/// What `FORWARDER_TEST_STEPS` says that every cell is played, also of those of which usually a part is.
const ALL: &str = "all";

/// Plays cells, those that match `FORWARDER_TEST_STEPS` if it is set, and prints the table. Usually one of `share` is played.
fn check(tier: Tier, cells: Vec<Cell>, share: usize) {
    if !is_ready() || !require_program("bpftool") {
        return;
    }
    let _guard = serialise(&HEAVY);
    let wanted = env::var("FORWARDER_TEST_STEPS").unwrap_or_default();
    let cells = if wanted.is_empty() {
        let seed = env::var("FORWARDER_TEST_STEPS_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| usize::try_from(std::process::id()).unwrap_or_default());
        println!("one of {share} cells, FORWARDER_TEST_STEPS_SEED={seed}");
        steps::some(cells, share, seed)
    } else {
        let matches =
            |cell: &Cell| wanted == ALL || wanted.split(',').all(|part| cell.to_string().contains(part));
        cells.into_iter().filter(matches).collect()
    };
    let started = Instant::now();
    let table = steps::run(tier, &cells, !wanted.is_empty() && wanted != ALL).expect("lanes");
    println!("{table}{} cells in {:?}", table.count(), started.elapsed());
    assert_eq!(table.failures(), 0, "see the table");
}

#[test]
fn every_event_at_every_step_of_a_hand_over_to_tc_has_its_effect() {
    check(Tier::Tc, steps::cells(steps::TC, Family::V4), 1);
}

#[test]
fn every_event_at_every_step_of_a_hand_over_to_tc_has_its_effect_in_ipv6() {
    check(Tier::Tc, steps::cells(steps::TC, Family::V6), 7);
}

#[test]
fn every_event_at_every_step_of_an_insertion_into_sockmap_has_its_effect() {
    check(Tier::Sockmap, steps::cells(steps::SOCKMAP, Family::V4), 1);
}

#[test]
fn every_event_at_every_step_of_an_insertion_into_sockmap_has_its_effect_in_ipv6() {
    check(Tier::Sockmap, steps::cells(steps::SOCKMAP, Family::V6), 7);
}

#[test]
fn every_event_at_every_step_of_an_adoption_has_its_effect() {
    check(Tier::Tc, steps::adoptions(Family::V4), 3);
}

#[test]
fn every_event_at_every_step_of_an_adoption_has_its_effect_in_ipv6() {
    check(Tier::Tc, steps::adoptions(Family::V6), 9);
}

#[test]
fn what_reaches_a_socket_amid_a_hand_over_counts_as_acknowledged() {
    if !is_ready() {
        return;
    }
    let _guard = serialise(&HEAVY);
    for family in [Family::V4, Family::V6] {
        let mut lane = Lane::start(Tier::Tc, family, true).expect("a lane");
        for side in Side::BOTH {
            lane.play_gap(side).unwrap_or_else(|error| panic!("{family:?}, {side:?}: {error:#}"));
        }
    }
}

#[test]
fn the_agent_that_users_run_stops_at_no_step() {
    if !is_ready() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    for (step, _) in steps::TC {
        fs::write(folder.path().join(format!("{step}.stop")), "").expect("a file");
    }
    let variable = format!("FORWARDER_FAILPOINTS={}", folder.path().display());
    let command = AgentCommand::new(&AT_ONCE).wrapped(&["env", &variable]);
    let forwarding = Forwarding::start_with(&command, peer::echo).expect("it works");
    drop(forwarding.connect_offloaded(1));
    let files = fs::read_dir(folder.path()).expect("a folder").flatten();
    let reached = files.filter(|file| file.file_name().to_string_lossy().ends_with("reached")).count();
    assert_eq!(reached, 0, "this binary has failpoints");
}
