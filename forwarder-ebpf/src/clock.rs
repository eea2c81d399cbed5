//! The clock of the programs.

use aya_ebpf::helpers::generated::{bpf_jiffies64, bpf_ktime_get_ns};

use crate::maps::CLOCK;

/// `CLOCK_MONOTONIC` in nanoseconds as it stood at the first packet of this tick of the kernel's timer: to read the clock
/// costs more than to look at the tick, which the kernel inlines.
#[inline(always)]
pub(crate) fn coarse_time() -> u64 {
    // SAFETY: the helpers have no conditions.
    let (tick, now) = (unsafe { bpf_jiffies64() }, || unsafe { bpf_ktime_get_ns() });
    let Some(clock) = CLOCK.get_ptr_mut(0) else { return now() };
    // SAFETY: the pointer is to this CPU's value, which no other program uses meanwhile.
    let clock = unsafe { &mut *clock };
    if clock.tick != tick {
        clock.tick = tick;
        clock.time = now();
    }
    clock.time
}
