use forwarder_common::tuple::FourTuple;
use forwarder_kernel::net::egress_path::Via;

use super::*;

/// What the local sockets may have let an end send.
const ROOM: u32 = 10_000;
/// How often a handover is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// A pair whose client and endpoint are behind interfaces 1 and 2, and of which the sockets have passed nothing on.
struct Stage {
    pair: JoinedPair,
    state: Pair,
    probation: Probation,
    now: Instant,
}

impl Stage {
    fn new() -> Self {
        let flow = |interface| (FourTuple::default(), Flow { interface, ..Flow::default() });
        Self {
            pair: JoinedPair { number: 1, flows: [flow(2), flow(1)] },
            state: Pair::default(),
            probation: Probation::new([ROOM; 2]),
            now: Instant::now(),
        }
    }

    /// The endpoint sends bytes; the client acknowledges them if it receives them.
    fn respond(&mut self, size: u32, is_received: bool) {
        self.state.response.bytes += u64::from(size);
        self.state.response.sequence_end += size;
        self.state.response.packets += 1;
        if is_received {
            self.acknowledge();
        }
    }

    /// The endpoint repeats something, which the client acknowledges again.
    fn repeat(&mut self, size: u64) {
        self.state.response.repeated += size;
        self.state.response.packets += 1;
        self.acknowledge();
    }

    fn acknowledge(&mut self) {
        self.state.request.acknowledged = self.state.response.sequence_end;
        self.state.request.packets += 1;
    }

    /// What is known now.
    fn look(&mut self) -> Heard {
        self.probation.evaluate(&self.pair, &self.state, [0, 0], self.now)
    }

    /// Looks again and again for a while; what it comes to, and after how long.
    fn wait(&mut self, time: Duration) -> Option<(Heard, Duration)> {
        let started = self.now;
        while self.now < started + time {
            self.now += LOOK;
            let heard = self.look();
            if heard != Heard::Waiting {
                return Some((heard, self.now - started));
            }
        }
        None
    }

    /// The endpoint's time-outs: each is twice as long as the one before.
    fn time_out(&mut self, first: Duration, times: u32, size: u64) -> Option<(Heard, Duration)> {
        let started = self.now;
        for number in 0..times {
            if let Some((heard, _)) = self.wait(first * 2_u32.pow(number)) {
                return Some((heard, self.now - started));
            }
            self.repeat(size);
        }
        None
    }
}

fn by(interface: u32) -> EgressPath {
    EgressPath { interface, via: Via::Redirect }
}

#[test]
fn both_ends_are_heard_once_each_has_acknowledged_the_other() {
    let mut stage = Stage::new();
    assert_eq!(stage.look(), Heard::Waiting, "nothing was redirected");
    stage.respond(100, true);
    assert_eq!(stage.look(), Heard::Waiting, "the acknowledgement may have been lost");
    stage.state.request.bytes += 10;
    stage.state.request.sequence_end += 10;
    assert_eq!(stage.look(), Heard::Waiting);
    stage.state.response.acknowledged = 10;
    assert_eq!(stage.look(), Heard::Both);
}

#[test]
fn a_sender_that_goes_on_for_as_long_as_its_window_lasts_proves_nothing() {
    let mut stage = Stage::new();
    for _ in 0..10 {
        stage.respond(100, true);
        assert_eq!(stage.wait(2 * LOOK), None);
    }
    // All of these are acknowledged, but its acknowledgements do not arrive.
    let (heard, after) = stage.time_out(Duration::from_millis(200), 10, 100).unwrap();
    assert_eq!(heard, Heard::OneWay(by(2)), "what is sent to the endpoint does not arrive");
    assert!(after >= UNHEARD && after < Duration::from_secs(8), "{after:?}");
}

#[test]
fn a_sender_that_still_sends_something_new_after_long_is_heard() {
    for repeats in [false, true] {
        let mut stage = Stage::new();
        let mut proven = None;
        for number in 0..100 {
            stage.respond(10, true);
            if repeats {
                stage.repeat(10);
            }
            if let Some((heard, _)) = stage.wait(LOOK) {
                proven = Some((heard, LOOK * number));
                break;
            }
        }
        let (heard, after) = proven.unwrap();
        assert_eq!(heard, Heard::Both);
        assert!(after >= PROBATION && after < PROBATION * 2, "{after:?}");
    }
}

#[test]
fn a_sender_that_sends_more_than_a_window_is_heard() {
    let mut stage = Stage::new();
    stage.respond(100, true);
    assert_eq!(stage.look(), Heard::Waiting, "the sockets may have acknowledged that");
    stage.respond(100, true);
    assert_eq!(stage.look(), Heard::Waiting);
    stage.respond(ROOM - 200 + 1, true);
    assert_eq!(stage.look(), Heard::Waiting, "a probe of a closed window may be one byte");
    stage.respond(1, true);
    assert_eq!(stage.look(), Heard::Both);
    // What the receiver has announced may be more.
    let mut stage = Stage::new();
    stage.state.request.edge = ROOM * 2;
    for _ in 0..2 {
        stage.respond(100, true);
        assert_eq!(stage.look(), Heard::Waiting);
    }
    stage.respond(ROOM, true);
    assert_eq!(stage.look(), Heard::Waiting);
    stage.respond(ROOM, true);
    assert_eq!(stage.look(), Heard::Both);
}

#[test]
fn a_path_that_becomes_slow_is_not_taken_for_a_broken_one() {
    let mut stage = Stage::new();
    stage.respond(100, true);
    assert_eq!(stage.look(), Heard::Waiting);
    // An acknowledgement that takes three seconds: the sender has repeated four times by then.
    stage.respond(100, true);
    assert_eq!(stage.time_out(Duration::from_millis(200), 4, 100), None);
    assert_eq!(stage.wait(Duration::from_mins(1)), None, "nothing more is sent");
    stage.respond(100, true);
    assert_eq!(stage.wait(LOOK), Some((Heard::Both, LOOK)));
}

#[test]
fn an_end_of_a_direction_proves_nothing() {
    for is_of_sender in [false, true] {
        let mut stage = Stage::new();
        for _ in 0..3 {
            stage.respond(100, true);
            assert_eq!(stage.look(), Heard::Waiting);
        }
        assert_eq!(stage.wait(PROBATION * 2), None);
        let ending = if is_of_sender { &mut stage.state.response } else { &mut stage.state.request };
        ending.sequence_end += 1;
        ending.set_fin_end(ending.sequence_end);
        assert_eq!(stage.wait(PROBATION), None, "{is_of_sender}");
    }
}

#[test]
fn a_byte_before_an_end_is_heard_without_it() {
    let mut stage = Stage::new();
    stage.respond(1, true);
    let response = &mut stage.state.response;
    response.sequence_end += 1;
    response.set_fin_end(response.sequence_end);
    assert!(is_heard(&stage.pair, &stage.state, [0, 0]));
}

#[test]
fn keepalive_probes_are_no_repetitions() {
    let mut stage = Stage::new();
    stage.respond(100, true);
    for _ in 0..100 {
        stage.repeat(1);
        assert_eq!(stage.wait(Duration::from_secs(2)), None);
    }
}

#[test]
fn where_no_end_has_heard_anything_new_the_sockets_know_all() {
    // Bytes that are not acknowledged, sent again.
    let mut stage = Stage::new();
    stage.respond(100, false);
    stage.state.response.repeated += 100;
    let (heard, after) = stage.wait(Duration::from_mins(1)).unwrap();
    assert_eq!(heard, Heard::Blackholed(by(1)));
    assert!(after >= PROBATION, "{after:?}");
    // Bytes of before that were acknowledged before, and again by packets that do not arrive.
    let mut stage = Stage::new();
    let (heard, _) = stage.time_out(Duration::from_millis(200), 10, 100).unwrap();
    assert_eq!(heard, Heard::Blackholed(by(2)));
}

#[test]
fn bytes_of_which_nothing_arrives_end_a_connection_that_has_moved_others() {
    let mut stage = Stage::new();
    stage.respond(100, true);
    stage.state.request.bytes += 10;
    stage.state.request.sequence_end += 10;
    stage.state.request.repeated += 10;
    let (heard, after) = stage.wait(Duration::from_mins(1)).unwrap();
    assert_eq!(heard, Heard::OneWay(by(2)));
    assert!(after >= PROBATION, "{after:?}");
}
