//! The end of an agent.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::sockmap::SockmapTier;
use crate::state::AgentState;
use forwarder_dataplane::offload::tc::{Offloader, Pairs};
use forwarder_dataplane::reconciler::Reconciler;
use forwarder_kube::watch::daemon_set::OwnDaemonSet;

/// How long the handshakes that have begun may take when the agent shuts down.
const LAST_HANDSHAKES: Duration = Duration::from_millis(200);

/// How long pairs are waited for that are over, so that nothing has to stay for them, and how often they are looked at.
const LAST_PAIRS: Duration = Duration::from_secs(5);
const LAST_PAIRS_PERIOD: Duration = Duration::from_millis(50);

/// The signals that end an agent.
pub(super) struct Signals {
    term: Signal,
    int: Signal,
}

impl Signals {
    /// Both signals.
    ///
    /// # Errors
    /// A handler cannot be installed.
    pub(super) fn listen() -> std::io::Result<Self> {
        Ok(Self { term: signal(SignalKind::terminate())?, int: signal(SignalKind::interrupt())? })
    }

    /// The next one to come.
    pub(super) async fn next(&mut self) -> SignalKind {
        tokio::select! {
            _ = self.term.recv() => SignalKind::terminate(),
            _ = self.int.recv() => SignalKind::interrupt(),
        }
    }
}

/// Has everything read `again` at each SIGHUP: operators send it for that, and so does the end of a terminal, which must not end
/// the agent.
pub(super) async fn read_at_hangup(mut hangup: Signal, again: Option<Arc<Notify>>) {
    while hangup.recv().await.is_some() {
        if let Some(again) = &again {
            tracing::info!("SIGHUP: reading the manifests again");
            again.notify_one();
        } else {
            tracing::info!("SIGHUP: nothing to read again, because the API server reports every change");
        }
    }
}

/// Waits until pairs that are over have gone, unless there are others, for which something stays anyway.
async fn see_out(pairs: &Arc<Pairs>) {
    let deadline = Instant::now() + LAST_PAIRS;
    let are_over = || {
        let pairs = Arc::clone(pairs);
        tokio::task::spawn_blocking(move || pairs.are_over())
    };
    pairs.discover();
    while pairs.count() > 0
        && are_over().await.expect("a panic ends the process")
        && Instant::now() < deadline
    {
        sleep(LAST_PAIRS_PERIOD).await;
    }
}

/// How an agent ends.
pub(super) struct Shutdown {
    pub(super) signal: SignalKind,
    pub(super) daemon_set: Arc<OnceLock<OwnDaemonSet>>,
    pub(super) offloader: Option<Arc<Offloader>>,
    pub(super) sockmap: Arc<SockmapTier>,
    pub(super) window: Duration,
}

impl Shutdown {
    async fn is_removed(&self) -> bool {
        let Some(daemon_set) = self.daemon_set.get() else { return false };
        let is_removed = daemon_set.is_removed().await;
        if is_removed {
            tracing::info!(
                "the DaemonSet of this agent was removed, so no agent follows: offloaded connections end, and nothing is left in the kernel"
            );
        }
        is_removed
    }

    /// Drains the workers, or ends them at once at the next signal.
    ///
    /// At SIGTERM a successor is expected: connections that can be are taken into the kernel, where they live on, and new
    /// ones are held back for it. At SIGINT nothing is left behind, nor after the removal of the agent's `DaemonSet`.
    pub(super) async fn end(self, signals: &mut Signals, reconciler: Reconciler, shared: &AgentState) {
        shared.report().draining = true;
        self.sockmap.leave();
        let is_handing_over = self.signal == SignalKind::terminate() && !self.is_removed().await;
        let successor = self.offloader.as_ref().filter(|_| is_handing_over);
        tracing::info!(
            window = %humantime::format_duration(self.window),
            hands_over = successor.is_some(),
            "draining: no new connections; a second signal ends at once"
        );
        let has_listeners = !shared.in_force().table.listeners.is_empty();
        let holds = successor.is_some_and(|offloader| has_listeners && offloader.pairs.holds());
        if let Some(offloader) = successor {
            offloader.pairs.leave();
            // Handshakes that were on their way are completed and their connections accepted.
            sleep(LAST_HANDSHAKES).await;
            reconciler.offload_all();
        }
        let drained = async {
            reconciler.stop_listening().await;
            if let Some(offloader) = successor {
                offloader.pairs.have_left();
            }
            tokio::join!(reconciler.drain(self.window), self.sockmap.drain(self.window));
            if let Some(offloader) = successor.filter(|_| !holds) {
                see_out(&offloader.pairs).await;
            }
        };
        tokio::select! {
            () = drained => tracing::info!("drained"),
            _ = signals.next() => tracing::warn!("stopping at once: open connections are reset"),
        }
        reconciler.into_workers().stop();
        self.sockmap.stop();
        if let Some(offloader) = successor {
            // If it has not been said yet: no socket listens now, however the drain ended.
            offloader.pairs.have_left();
        }
        // Before the table of listeners is locked: who looks after the pairs locks it while the pairs are.
        let connections = successor.map_or(0, |offloader| {
            offloader.pairs.discover();
            offloader.pairs.count()
        });
        if let (Some(offloader), None) = (&self.offloader, successor) {
            offloader.pairs.reset_all();
        }
        let mut in_force = shared.in_force();
        if (connections > 0 || holds)
            && let Some(datapath) = &mut in_force.datapath
        {
            tracing::info!(
                connections,
                new_connections_wait = holds,
                "the agent stops: offloaded connections stay in the kernel for the next agent with this pin directory; `forwarder cleanup` lists and ends them"
            );
            datapath.leave();
        }
        // Detaches the programs and removes the pins, unless they were left.
        in_force.datapath = None;
    }
}
