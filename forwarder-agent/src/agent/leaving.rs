//! The end of an agent.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;

use super::Shared;
use super::sockmap::SockmapTier;
use crate::pairs::Promoter;
use crate::reconciler::Reconciler;

/// How long the handshakes that have begun may take when the agent leaves.
const LAST_HANDSHAKES: Duration = Duration::from_millis(200);

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
            tracing::info!("SIGHUP: the manifests are read again");
            again.notify_one();
        } else {
            tracing::info!("SIGHUP: nothing has to be read again, since the API server tells every change");
        }
    }
}

/// How an agent ends.
pub(super) struct Leaving {
    pub(super) signal: SignalKind,
    pub(super) promoter: Option<Arc<Promoter>>,
    pub(super) sockmap: Arc<SockmapTier>,
    pub(super) window: Duration,
}

impl Leaving {
    /// Drains the workers, or ends them at once at the next signal.
    ///
    /// At SIGTERM a successor is expected: connections that can be are taken into the kernel, where they live on, and new
    /// ones are held back for it. At SIGINT nothing is left behind.
    pub(super) async fn end(self, signals: &mut Signals, reconciler: Reconciler, shared: &Shared) {
        shared.report().draining = true;
        self.sockmap.leave();
        let is_handing_over = self.signal == SignalKind::terminate();
        let successor = self.promoter.as_ref().filter(|_| is_handing_over);
        tracing::info!(
            window = %humantime::format_duration(self.window),
            hands_over = successor.is_some(),
            "draining: no new connections; a second signal ends at once"
        );
        if let Some(promoter) = successor {
            promoter.pairs.leave();
            // Handshakes that were on their way are completed and their connections accepted.
            tokio::time::sleep(LAST_HANDSHAKES).await;
            reconciler.promote_all();
        }
        let drained = async { tokio::join!(reconciler.drain(self.window), self.sockmap.drain(self.window)) };
        tokio::select! {
            _ = drained => tracing::info!("drained"),
            _ = signals.next() => tracing::warn!("ending at once: open connections are reset"),
        }
        reconciler.into_workers().stop();
        self.sockmap.stop();
        // Before the table of listeners is locked: who looks after the pairs locks it while the pairs are.
        let connections = successor.map_or(0, |promoter| promoter.pairs.count());
        if let (Some(promoter), None) = (&self.promoter, successor) {
            promoter.pairs.reset_all();
        }
        let mut in_force = shared.in_force();
        if let Some(promoter) = successor {
            let has_listeners = !in_force.table.listeners.is_empty();
            if connections > 0 || has_listeners && promoter.pairs.holds() {
                tracing::info!(connections, "left to the kernel");
                if let Some(datapath) = &mut in_force.datapath {
                    datapath.leave();
                }
            }
        }
        // Detaches the programs and removes the pins, unless they were left.
        in_force.datapath = None;
    }
}
