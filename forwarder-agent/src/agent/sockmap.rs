//! Tier `sockmap` of an agent: started when the first listener wants it.

use std::sync::Mutex;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use forwarder_dataplane::offload::sockmap::{SockmapCell, SockmapPairs, SockmapPairsError, SockmapSettings};
use forwarder_dataplane::worker::drain::{DRAIN_SWEEP_PERIOD, left_of_drain};
use forwarder_gateway::model::{Datapath, RouteTable};
use forwarder_kernel::fallback_reason::FallbackReason;
use forwarder_kernel::sockmap::SockmapError;
use forwarder_runtime::lock::lock;

/// How long after a drain's window its last pairs may take to be reset.
const LAST_PAIRS: Duration = Duration::from_secs(1);

/// The tier, and the thread that looks after its pairs.
pub(super) struct SockmapTier {
    pub(super) cell: SockmapCell,
    settings: SockmapSettings,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl SockmapTier {
    /// Which nobody has wanted yet.
    pub(super) fn new(settings: SockmapSettings) -> Self {
        Self { cell: SockmapCell::default(), settings, thread: Mutex::default() }
    }

    /// Starts the tier if a listener of `table` wants it and none did before; why it does not work, when that turns out.
    pub(super) async fn start_if_wanted(&self, table: &RouteTable) -> Option<String> {
        let is_wanted =
            table.listeners.values().any(|listener| listener.settings.datapath == Datapath::Sockmap);
        if !is_wanted || self.cell.get().is_some() {
            return None;
        }
        let settings = self.settings;
        // The self-test takes a while: health checks are answered meanwhile.
        let started = tokio::task::spawn_blocking(move || SockmapPairs::start(settings)).await.ok()?;
        let (outcome, reason) = match started {
            Ok((pairs, thread)) => {
                *lock(&self.thread) = Some(thread);
                (Ok(pairs), None)
            }
            Err(error) => {
                tracing::warn!(reason = %error, "tier sockmap does not work: connections that ask for it are forwarded in userspace, at tier splice");
                let fallback_reason = match error {
                    SockmapPairsError::SelfTest(_) => FallbackReason::SelfTest,
                    SockmapPairsError::Sockmap(SockmapError::UnsafeKernel { .. }) => {
                        FallbackReason::UnsafeKernel
                    }
                    SockmapPairsError::Sockmap(_) | SockmapPairsError::Start(_) => FallbackReason::NoPrograms,
                };
                (Err(fallback_reason), Some(error.to_string()))
            }
        };
        // Nobody else sets it.
        let _ = self.cell.set(outcome);
        reason
    }

    /// Has no more pairs joined.
    pub(super) fn leave(&self) {
        if let Some(Ok(pairs)) = self.cell.get() {
            pairs.leave();
        }
    }

    /// Lets pairs end for most of `window`, and resets the remainder spread over its last part.
    pub(super) async fn drain(&self, window: Duration) {
        let Some(Ok(pairs)) = self.cell.get() else { return };
        let started = Instant::now();
        let mut remaining = None;
        while pairs.count() > 0 && started.elapsed() <= window + LAST_PAIRS {
            sleep(DRAIN_SWEEP_PERIOD.min(window)).await;
            if let Some(most) = left_of_drain(started.elapsed(), window, &mut remaining, pairs.count()) {
                pairs.keep_at_most(most);
            }
        }
    }

    /// Resets what is left, and ends the thread.
    pub(super) fn stop(&self) {
        let Some(Ok(pairs)) = self.cell.get() else { return };
        pairs.stop();
        if let Some(thread) = lock(&self.thread).take() {
            // A panic of the thread has been printed.
            let _ = thread.join();
        }
    }
}
