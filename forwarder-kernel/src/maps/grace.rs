//! Waiting until every packet that was on its way through the kernel has landed.

use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::thread::{MembarrierCommand, membarrier};
use tokio::sync::oneshot;

/// How long to wait where the kernel does not offer to (`nohz_full`): much longer than any packet takes.
const WITHOUT_BARRIER: Duration = Duration::from_millis(100);

/// A thread that waits for grace periods of RCU. A packet passes TC and reaches its socket within one read-side section
/// (`netif_receive_skb`), so whatever had passed the programs by old entries of the maps has reached its socket by the end
/// of a grace period that begins after the entries have changed.
#[derive(Debug)]
pub struct Grace(mpsc::Sender<oneshot::Sender<()>>);

impl Grace {
    /// Starts the thread; it ends with this value.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn start() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel::<oneshot::Sender<()>>();
        thread::Builder::new().name("grace".to_owned()).spawn(move || {
            while let Ok(first) = receiver.recv() {
                // All who have asked by now share one grace period.
                let waiting: Vec<_> = std::iter::once(first).chain(receiver.try_iter()).collect();
                wait();
                for waiting in waiting {
                    // Who does not wait any more needs no answer.
                    let _ = waiting.send(());
                }
            }
        })?;
        Ok(Self(sender))
    }

    /// Waits for a grace period that begins now.
    pub async fn period(&self) {
        let (sender, receiver) = oneshot::channel();
        // The thread lives as long as this value.
        let _ = self.0.send(sender);
        let _ = receiver.await;
    }
}

/// Waits, on this thread, for a grace period that begins now.
pub(crate) fn wait() {
    // `sys_membarrier` calls `synchronize_rcu`. Where there is one CPU only, it has no need to: no packet is on its way then
    // (but on kernels for real time).
    if membarrier(MembarrierCommand::Global).is_err() {
        thread::sleep(WITHOUT_BARRIER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_grace_period_ends() {
        let grace = Grace::start().unwrap();
        let started = std::time::Instant::now();
        tokio::time::timeout(Duration::from_secs(10), grace.period()).await.unwrap();
        println!("a grace period of {:?}", started.elapsed());
    }
}
