//! The choice of a backend for a new connection, by weight. Pure.

/// The most that a backend may weigh (Gateway API).
pub const MAX_WEIGHT: u32 = 1_000_000;

/// 2^64 divided by the golden ratio: multiples of it, modulo 2^64, spread more evenly than any random choice.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// Weighted choice among backends.
///
/// Each turn maps to a point of a low-discrepancy sequence, and the point to the backend whose share it falls in: over
/// any run of turns every backend gets its share to within a few connections, without state other than the turn, and
/// without the bursts of a weighted round robin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Balancer {
    /// The sum of the weights up to and including each backend.
    cumulative: Vec<u64>,
}

impl Balancer {
    /// A balancer over backends with these weights.
    pub fn new(weights: impl IntoIterator<Item = u32>) -> Self {
        let cumulative = weights
            .into_iter()
            .scan(0, |sum, weight| {
                *sum += u64::from(weight);
                Some(*sum)
            })
            .collect();
        Self { cumulative }
    }

    /// The index of the backend that serves the connection of this turn; `None` where no backend has any weight.
    pub fn pick(&self, turn: u64) -> Option<usize> {
        let total = self.cumulative.last().copied().filter(|total| *total > 0)?;
        let point = turn.wrapping_mul(GOLDEN);
        // The high half of the product scales the point from 0..2^64 to 0..total.
        let share = u64::try_from((u128::from(point) * u128::from(total)) >> 64).unwrap_or(0);
        Some(self.cumulative.partition_point(|sum| *sum <= share))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(weights: &[u32], turns: u64) -> Vec<u64> {
        let balancer = Balancer::new(weights.iter().copied());
        let mut counts = vec![0; weights.len()];
        for turn in 0..turns {
            counts[balancer.pick(turn).unwrap()] += 1;
        }
        counts
    }

    #[test]
    fn seventy_thirty_zero() {
        let counts = shares(&[70, 30, 0], 500);
        assert!((345..=355).contains(&counts[0]), "{counts:?}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn no_weight_means_no_backend() {
        assert_eq!(Balancer::new([]).pick(0), None);
        assert_eq!(Balancer::new([0, 0]).pick(7), None);
    }

    #[test]
    fn sixteen_heaviest_backends_do_not_overflow() {
        assert!(Balancer::new([MAX_WEIGHT; 16]).pick(u64::MAX).is_some());
    }

    proptest! {
        #[test]
        fn every_backend_gets_its_share(
            weights in prop::collection::vec(0..=MAX_WEIGHT, 1..16),
            start in any::<u64>(),
        ) {
            let total: u64 = weights.iter().map(|w| u64::from(*w)).sum();
            prop_assume!(total > 0);
            let balancer = Balancer::new(weights.iter().copied());
            let mut counts = vec![0_u64; weights.len()];
            let turns = 2_000;
            for turn in 0..turns {
                counts[balancer.pick(start.wrapping_add(turn)).unwrap()] += 1;
            }
            for (count, weight) in counts.iter().zip(&weights) {
                let expected = turns * u64::from(*weight) / total;
                prop_assert!(count.abs_diff(expected) <= 12, "{counts:?} for {weights:?}");
                prop_assert!(*weight > 0 || *count == 0);
            }
        }
    }
}
