//! The connections of all workers, listed and reset from any thread: each worker answers for its own.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, timeout_at};

use super::{Command, Worker, Workers};
use crate::connection::Action;
use crate::counters::End;
use crate::view::{ConnectionState, ConnectionView, Selector};
use crate::worker::drain::SWEEP_PERIOD;

/// How long all workers together may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// How many connections a worker looks at before it lets them run.
const BATCH: usize = 256;

/// What the workers answered.
#[derive(Clone, Debug)]
pub struct Answers<T> {
    /// The answers.
    pub answers: Vec<T>,
    /// How many workers did not answer in time. They carry out what they were told later.
    pub unanswered: usize,
}

/// A way to the connections of the workers. It does not keep the workers from ending.
#[derive(Clone, Debug)]
pub struct WorkerConnections {
    commands: Vec<mpsc::WeakUnboundedSender<Command>>,
}

impl Workers {
    /// A way to their connections.
    pub fn connections(&self) -> WorkerConnections {
        WorkerConnections { commands: self.commands.iter().map(mpsc::UnboundedSender::downgrade).collect() }
    }
}

impl WorkerConnections {
    /// The connections that match.
    pub async fn list(&self, selector: &Arc<Selector>) -> Answers<Vec<ConnectionView>> {
        self.ask(|answer| Command::List { selector: Arc::clone(selector), answer }).await
    }

    /// Resets the connections that match; answers how many, without waiting for their end.
    pub async fn reset(&self, selector: &Arc<Selector>) -> Answers<usize> {
        self.ask(|answer| Command::Reset { selector: Arc::clone(selector), answer }).await
    }

    async fn ask<T>(&self, command: impl Fn(oneshot::Sender<T>) -> Command) -> Answers<T> {
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let mut waiting = Vec::new();
        // A worker that has ended has no connections.
        for worker in self.commands.iter().filter_map(mpsc::WeakUnboundedSender::upgrade) {
            let (answer, answered) = oneshot::channel();
            if worker.send(command(answer)).is_ok() {
                waiting.push(answered);
            }
        }
        let mut result = Answers { answers: Vec::new(), unanswered: 0 };
        for answered in waiting {
            match timeout_at(deadline, answered).await {
                Ok(Ok(answer)) => result.answers.push(answer),
                Ok(Err(_)) | Err(_) => result.unanswered += 1,
            }
        }
        result
    }
}

/// Answers with the connections that match.
pub(super) async fn list(
    worker: Rc<Worker>,
    selector: Arc<Selector>,
    answer: oneshot::Sender<Vec<ConnectionView>>,
) {
    let mut found = Vec::new();
    each(&worker, |connection| {
        found.extend(
            connection.view(worker.context.sweep(), SWEEP_PERIOD).filter(|view| selector.matches(view)),
        );
    })
    .await;
    // Whoever asked may have stopped waiting.
    let _ = answer.send(found);
}

/// Resets the connections that match, and answers how many.
pub(super) async fn reset(worker: Rc<Worker>, selector: Arc<Selector>, answer: oneshot::Sender<usize>) {
    let mut count = 0;
    each(&worker, |connection| {
        let is_meant =
            |view: ConnectionView| view.state != ConnectionState::Closing && selector.matches(&view);
        if connection.view(worker.context.sweep(), SWEEP_PERIOD).is_some_and(is_meant) {
            connection.ask_for(Action::End(End::ResetByOperator));
            count += 1;
        }
    })
    .await;
    // As above.
    let _ = answer.send(count);
}

/// Calls `visit` with each connection, and lets them run in between.
async fn each(worker: &Worker, mut visit: impl FnMut(&crate::connection::Connection)) {
    let mut slot = 0;
    loop {
        {
            let connections = worker.connections.borrow();
            // Slots are reused, so that there are no more than there once were connections.
            if slot >= connections.capacity() {
                return;
            }
            for connection in (slot..slot + BATCH).filter_map(|slot| connections.get(slot)) {
                visit(connection);
            }
        }
        slot += BATCH;
        tokio::task::yield_now().await;
    }
}
