//! The connections that are open, wherever they are kept.

use std::sync::Arc;

use crate::offload::sockmap::SockmapCell;
use crate::offload::sockmap::SockmapPairs;
use crate::offload::tc::Pairs;
use crate::view::{ConnectionList, Lister, ResetReport, Selector};
use crate::worker::WorkerConnections;

/// Everything that keeps connections.
#[derive(Clone)]
pub struct LiveConnections {
    /// The connections that workers relay.
    pub workers: WorkerConnections,
    /// The connections that the kernel forwards, where it does.
    pub pairs: Option<Arc<Pairs>>,
    /// The connections whose sockets the kernel joins, where it does.
    pub sockmap: SockmapCell,
}

impl LiveConnections {
    /// The connections that match, at most `limit` of them. An empty selector matches all.
    pub async fn list(&self, selector: Selector, limit: Option<usize>) -> ConnectionList {
        let selector = Arc::new(selector);
        let of_workers = self.workers.list(&selector).await;
        let live = self.clone();
        // To look at hundreds of thousands, and to sort them, takes a while: health checks are answered meanwhile.
        let listed = tokio::task::spawn_blocking(move || {
            let mut lister = Lister::new(limit);
            of_workers.answers.into_iter().flatten().for_each(|view| lister.add(view));
            if let Some(pairs) = &live.pairs {
                pairs.list(&selector, |view| lister.add(view));
            }
            live.sockmap()
                .into_iter()
                .flat_map(|pairs| pairs.list(&selector))
                .for_each(|view| lister.add(view));
            lister.finish(of_workers.unanswered)
        });
        listed.await.expect("a panic ends the process")
    }

    /// The pairs of tier `sockmap`, where there are.
    pub fn sockmap(&self) -> Option<&SockmapPairs> {
        self.sockmap.get()?.as_deref().ok()
    }

    /// Resets both sides of the connections that match.
    pub async fn reset(&self, selector: Selector) -> ResetReport {
        let selector = Arc::new(selector);
        let of_workers = self.workers.reset(&selector).await;
        let live = self.clone();
        let of_kernel = tokio::task::spawn_blocking(move || {
            live.pairs.iter().map(|pairs| pairs.reset_matching(&selector)).sum::<usize>()
                + live.sockmap().map_or(0, |pairs| pairs.reset_matching(&selector))
        });
        let of_kernel = of_kernel.await.expect("a panic ends the process");
        let reset = of_workers.answers.into_iter().sum::<usize>() + of_kernel;
        ResetReport { reset, unanswered: of_workers.unanswered }
    }
}
