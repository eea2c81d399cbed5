//! When elements are put into maps that programs read, and when elements are removed: never one within a grace period of the
//! other.
//!
//! Since Linux 6.1 the kernel allocates an element that has been freed again at once (`bpf_mem_cache_free`, `unit_alloc`): a
//! program that had looked it up just before would go on with what belongs to somebody else. What stands when a grace period
//! of RCU ends no program of before holds. So removals wait and are done together, by a thread, and insertions wait until the
//! grace period after them has passed. In between, whoever has a [`Permit`] inserts, as many at a time as there are.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::maps::grace;
use forwarder_runtime::lock::lock;

/// How long after a batch of removals the next one may begin, unless somebody waits for it.
const PACE: Duration = Duration::from_millis(100);

/// Keeps the removals of `T`s and the insertions of a set of maps apart.
pub struct Gate<T: Send + 'static>(Arc<Shared<T>>);

/// Leave to insert, while it lives: no removal is done meanwhile.
pub struct Permit<T: Send + 'static>(Arc<Shared<T>>);

struct Shared<T: Send + 'static> {
    state: Mutex<State<T>>,
    /// There is something to do for the thread.
    work: Condvar,
}

struct State<T: Send + 'static> {
    /// What is to be removed.
    condemned: Vec<T>,
    /// Whether somebody waits for that.
    is_urgent: bool,
    /// How many batches were removed, and when the latest one was.
    batches: u64,
    removed: Option<Instant>,
    /// Whether a grace period has passed since.
    is_settled: bool,
    /// How many have leave to insert.
    permits: usize,
    /// Those who wait for leave, and the batch that each is to have behind it.
    waiting: Vec<(u64, Waiting<T>)>,
    stops: bool,
}

/// Where somebody waits for leave to insert.
enum Waiting<T: Send + 'static> {
    Task(oneshot::Sender<Permit<T>>),
    Thread(mpsc::SyncSender<Permit<T>>),
}

impl<T: Send + 'static> Waiting<T> {
    /// Who does not wait any more gives it back.
    fn grant(self, permit: Permit<T>) {
        match self {
            Self::Task(sender) => drop(sender.send(permit)),
            Self::Thread(sender) => drop(sender.send(permit)),
        }
    }
}

impl<T: Send + 'static> State<T> {
    /// How long until the next batch, if there is to be one.
    fn due_in(&self) -> Option<Duration> {
        if self.condemned.is_empty() {
            return None;
        }
        let since = self.removed.filter(|_| !self.is_urgent).map(|removed| removed.elapsed());
        Some(since.map_or(Duration::ZERO, |since| PACE.saturating_sub(since)))
    }

    fn is_due(&self) -> bool {
        self.due_in() == Some(Duration::ZERO)
    }

    /// Whether one more may insert now. A batch that is due goes first, or it might wait for ever.
    fn is_open(&self) -> bool {
        self.is_settled && !self.is_due()
    }

    /// Has somebody wait for what is being removed, and for the next batch if it is due: what is condemned later holds nobody up
    /// who waits already.
    fn wait(&mut self, waiting: Waiting<T>) {
        self.waiting.push((self.batches + u64::from(self.is_due()), waiting));
    }
}

impl<T: Send + 'static> Gate<T> {
    /// Starts the thread, which calls `remove` with what is condemned; it ends with this value. What others have removed before
    /// is waited for too.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn start(name: &str, remove: impl FnMut(Vec<T>) + Send + 'static) -> io::Result<Self> {
        Self::with(name, remove, grace::wait)
    }

    fn with(
        name: &str,
        remove: impl FnMut(Vec<T>) + Send + 'static,
        wait: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let state = State {
            condemned: Vec::new(),
            is_urgent: false,
            batches: 0,
            removed: None,
            is_settled: false,
            permits: 0,
            waiting: Vec::new(),
            stops: false,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() });
        let of_thread = Arc::clone(&shared);
        thread::Builder::new().name(name.to_owned()).spawn(move || of_thread.run(remove, wait))?;
        Ok(Self(shared))
    }

    /// Has something removed before long. It must be of no use to programs any more, or its loss not matter.
    pub fn condemn(&self, what: T) {
        lock(&self.0.state).condemned.push(what);
        self.0.work.notify_one();
    }

    /// Has everything that is condemned removed as soon as can be; a [`Permit`] that is asked for now is given after that.
    pub fn hasten(&self) {
        lock(&self.0.state).is_urgent = true;
        self.0.work.notify_one();
    }

    /// Waits for leave to insert.
    pub async fn permit(&self) -> Permit<T> {
        let receiver = {
            let mut state = lock(&self.0.state);
            if state.is_open() {
                return self.0.grant(&mut state);
            }
            let (sender, receiver) = oneshot::channel();
            state.wait(Waiting::Task(sender));
            receiver
        };
        match receiver.await {
            Ok(permit) => permit,
            // The thread lives as long as this value, and answers everybody.
            Err(_) => std::future::pending().await,
        }
    }

    /// The same, for who may block its thread.
    pub fn permit_blocking(&self) -> Permit<T> {
        let mut state = lock(&self.0.state);
        if state.is_open() {
            return self.0.grant(&mut state);
        }
        let (sender, receiver) = mpsc::sync_channel(1);
        state.wait(Waiting::Thread(sender));
        drop(state);
        receiver.recv().expect("the thread lives as long as the gate, and answers everybody")
    }
}

impl<T: Send + 'static> Drop for Gate<T> {
    fn drop(&mut self) {
        lock(&self.0.state).stops = true;
        self.0.work.notify_one();
    }
}

impl<T: Send + 'static> Drop for Permit<T> {
    fn drop(&mut self) {
        lock(&self.0.state).permits -= 1;
        self.0.work.notify_one();
    }
}

impl<T: Send + 'static> Shared<T> {
    fn grant(self: &Arc<Self>, state: &mut State<T>) -> Permit<T> {
        state.permits += 1;
        Permit(Arc::clone(self))
    }

    fn run(self: Arc<Self>, mut remove: impl FnMut(Vec<T>), mut wait: impl FnMut()) {
        loop {
            let mut state = self.next();
            let stops = state.stops;
            // An insertion that has begun ends first, unless the process does.
            let batch =
                if state.permits == 0 || stops { std::mem::take(&mut state.condemned) } else { Vec::new() };
            if !batch.is_empty() {
                state.is_urgent = false;
                state.is_settled = false;
                state.batches += 1;
                state.removed = Some(Instant::now());
            }
            drop(state);
            if !batch.is_empty() {
                remove(batch);
            }
            if stops {
                return;
            }
            wait();
            let mut state = lock(&self.state);
            state.is_settled = true;
            // What was condemned meanwhile stands there still.
            let batches = state.batches;
            let granted = state.waiting.extract_if(.., |(batch, _)| *batch <= batches);
            let granted: Vec<_> = granted.map(|(_, waiting)| waiting).collect();
            state.permits += granted.len();
            drop(state);
            for waiting in granted {
                waiting.grant(Permit(Arc::clone(&self)));
            }
        }
    }

    /// Waits until there is something to do.
    fn next(&self) -> MutexGuard<'_, State<T>> {
        let mut state = lock(&self.state);
        loop {
            // Looked at once: what became due between two looks would be waited for without a time.
            let due = state.due_in();
            let is_due = due == Some(Duration::ZERO);
            if state.stops || !state.is_settled || is_due && state.permits == 0 {
                return state;
            }
            // Those who insert tell when they have.
            state = match due.filter(|_| !is_due) {
                Some(due) => {
                    let waited = self.work.wait_timeout(state, due);
                    waited.unwrap_or_else(std::sync::PoisonError::into_inner).0
                }
                None => self.work.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(20);

    /// A gate, what tells of its removals, and what ends its grace periods.
    fn gate() -> (Gate<u32>, mpsc::Receiver<Vec<u32>>, mpsc::Sender<()>) {
        let (removed, removals) = mpsc::channel();
        let (end, ends) = mpsc::channel::<()>();
        let gate = Gate::with(
            "gate",
            move |batch| removed.send(batch).unwrap(),
            move || {
                // A test that has ended waits for nothing.
                let _ = ends.recv();
            },
        );
        (gate.unwrap(), removals, end)
    }

    async fn is_given(gate: &Gate<u32>) -> bool {
        tokio::time::timeout(Duration::from_millis(50), gate.permit()).await.is_ok()
    }

    #[tokio::test]
    async fn nothing_is_inserted_within_a_grace_period_of_a_removal() {
        let (gate, removals, end) = gate();
        assert!(!is_given(&gate).await, "what others have removed before counts");
        end.send(()).unwrap();
        drop(tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap());

        gate.condemn(1);
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![1]));
        assert!(!is_given(&gate).await);
        end.send(()).unwrap();
        drop(tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap());
    }

    #[tokio::test]
    async fn nothing_is_removed_while_somebody_inserts() {
        let (gate, removals, end) = gate();
        end.send(()).unwrap();
        let permit = tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap();
        let another = tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap();
        gate.condemn(1);
        gate.hasten();
        drop(permit);
        assert!(removals.recv_timeout(Duration::from_millis(50)).is_err());
        // And nobody begins to insert before it.
        assert!(!is_given(&gate).await);
        drop(another);
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![1]));
    }

    #[tokio::test]
    async fn what_is_condemned_within_a_grace_period_is_removed_before_a_permit_is_given() {
        let (gate, removals, end) = gate();
        end.send(()).unwrap();
        drop(tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap());
        gate.condemn(1);
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![1]));
        // The first is gone, but its grace period has not ended.
        gate.condemn(2);
        gate.hasten();
        let mut permit = std::pin::pin!(gate.permit());
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut permit).await.is_err());
        end.send(()).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut permit).await.is_err());
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![2]));
        // Nor does what is condemned now hold it up.
        gate.condemn(3);
        gate.hasten();
        end.send(()).unwrap();
        drop(tokio::time::timeout(DEADLINE, permit).await.unwrap());
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![3]));
    }

    #[tokio::test]
    async fn who_gives_up_waiting_holds_nothing_up() {
        let (gate, removals, end) = gate();
        assert!(!is_given(&gate).await);
        end.send(()).unwrap();
        drop(tokio::time::timeout(DEADLINE, gate.permit()).await.unwrap());
        gate.condemn(2);
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![2]));
    }

    #[test]
    fn what_is_condemned_is_removed_at_the_end() {
        let (gate, removals, end) = gate();
        gate.condemn(1);
        drop((gate, end));
        assert_eq!(removals.recv_timeout(DEADLINE), Ok(vec![1]));
    }
}
