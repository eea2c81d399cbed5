//! When an end of an offloaded pair is probed, and when it is taken for dead. Pure.

use std::time::{Duration, Instant};

use crate::upstream::{PROBES, probe_interval};

/// The probes that an end has not answered.
#[derive(Debug, Default)]
pub(super) struct Keepalive {
    probes: u32,
    last: Option<Instant>,
}

/// What an end that says nothing calls for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Due {
    Nothing,
    /// A probe, which counts as sent.
    Probe,
    /// It is dead.
    Dead,
}

impl Keepalive {
    /// What is due at `now` for an end that has been `quiet` for so long, with keepalive after `idle`. However long that was before
    /// anybody looked, such as while no agent ran, each probe has its interval to be answered in.
    pub(super) fn due(&mut self, quiet: Duration, idle: Duration, now: Instant) -> Due {
        if quiet < idle {
            *self = Self::default();
            return Due::Nothing;
        }
        let interval = probe_interval(idle);
        let has_waited = self.last.is_none_or(|last| now.duration_since(last) >= interval);
        if !has_waited || quiet < idle + interval * self.probes {
            return Due::Nothing;
        }
        if self.probes == PROBES {
            return Due::Dead;
        }
        self.probes += 1;
        self.last = Some(now);
        Due::Probe
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Duration = Duration::from_mins(1);
    const SWEEP: Duration = Duration::from_millis(250);

    /// After how many sweeps each probe is sent to an end that has been quiet for so long before, and after how many it is dead.
    fn sweeps(quiet: Duration) -> (Vec<u32>, u32) {
        let (mut keepalive, start, mut sent) = (Keepalive::default(), Instant::now(), Vec::new());
        for sweep in 0.. {
            let passed = SWEEP * sweep;
            match keepalive.due(quiet + passed, IDLE, start + passed) {
                Due::Nothing => {}
                Due::Probe => sent.push(sweep),
                Due::Dead => return (sent, sweep),
            }
        }
        unreachable!()
    }

    #[test]
    fn probes_are_an_interval_apart_however_long_nobody_has_looked() {
        let expected = (vec![0, 40, 80, 120, 160, 200], 240);
        for quiet in [IDLE, IDLE + Duration::from_secs(49), IDLE * 100] {
            assert_eq!(sweeps(quiet), expected, "{quiet:?}");
        }
    }

    #[test]
    fn an_answer_ends_them() {
        let (mut keepalive, now) = (Keepalive::default(), Instant::now());
        assert_eq!(keepalive.due(IDLE, IDLE, now), Due::Probe);
        assert_eq!(keepalive.due(Duration::ZERO, IDLE, now), Due::Nothing);
        assert_eq!(keepalive.due(IDLE, IDLE, now), Due::Probe);
    }
}
