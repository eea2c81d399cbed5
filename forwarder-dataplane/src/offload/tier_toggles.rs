//! Tiers that an operator may switch off while the agent runs.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::relay::Tier;

/// Which of the kernel's tiers take new connections. What they have taken they keep.
#[derive(Debug)]
pub struct TierToggles {
    tc: AtomicBool,
    sockmap: AtomicBool,
    direct: AtomicBool,
}

impl Default for TierToggles {
    fn default() -> Self {
        Self { tc: AtomicBool::new(true), sockmap: AtomicBool::new(true), direct: AtomicBool::new(true) }
    }
}

impl TierToggles {
    /// Whether a tier takes new connections. What userspace does cannot be switched off.
    pub fn is_on(&self, tier: Tier) -> bool {
        self.of(tier).is_none_or(|switch| switch.load(Ordering::Relaxed))
    }

    /// Has a tier take new connections or not; whether it was otherwise before.
    pub fn set(&self, tier: Tier, is_on: bool) -> bool {
        self.of(tier).is_some_and(|switch| switch.swap(is_on, Ordering::Relaxed) != is_on)
    }

    fn of(&self, tier: Tier) -> Option<&AtomicBool> {
        match tier {
            Tier::Tc => Some(&self.tc),
            Tier::Sockmap => Some(&self.sockmap),
            Tier::Direct => Some(&self.direct),
            Tier::Splice | Tier::Copy => None,
        }
    }
}
