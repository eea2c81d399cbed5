//! What a panic does. It is a bug: the process ends by SIGABRT, and whoever looks after it starts another one. The close of its
//! sockets resets their peers, and what the kernel forwards alone goes on. Only where the input decides what the code meets does the
//! agent live on with what it has in force, for the next agent would meet the same.

use std::cell::Cell;
use std::panic;
use std::process;

use tokio::task::{JoinError, spawn_blocking};

thread_local! {
    /// Whether a panic of this thread is its caller's to deal with.
    static IS_SURVIVED: Cell<bool> = const { Cell::new(false) };
}

/// Has every panic from now on end the process, unless it is [`survived`].
pub fn end_the_process() {
    let print = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        print(panic);
        if IS_SURVIVED.get() {
            return;
        }
        let thread = std::thread::current();
        tracing::error!(
            thread = thread.name(),
            location = panic.location().map(tracing::field::display),
            "BUG: a thread has panicked; the agent ends, connections in userspace are reset, those in the kernel go on; please report it"
        );
        process::abort();
    }));
}

/// Does work that its input may make panic, on a thread for blocking work.
///
/// # Errors
/// It has panicked, and said so on standard error.
pub async fn survived<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    spawn_blocking(move || {
        let _until = Survived::begin();
        work()
    })
    .await
}

/// As long as it lives, panics of its thread are survived.
struct Survived;

impl Survived {
    fn begin() -> Self {
        IS_SURVIVED.set(true);
        Self
    }
}

impl Drop for Survived {
    fn drop(&mut self) {
        IS_SURVIVED.set(false);
    }
}
