//! When the API server is asked which kinds it serves.

use std::time::Duration;

use futures_util::future::BoxFuture;
use kube::Client;
use tokio::time::{Instant, timeout};

use super::QUIET;
use super::kinds::{Served, discover};
use forwarder_runtime::error::one_line;

/// A served version shows in the discovery documents only some moments after its CRD has changed.
const ASK_AGAIN: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10)];
/// How often it is asked anyway.
const ASK_ANYWAY: Duration = Duration::from_mins(1);

/// A question under way.
pub(super) type Asking = BoxFuture<'static, Result<Served, String>>;

/// Asks what is served, for a bounded time.
pub(super) async fn ask(client: Client) -> Result<Served, String> {
    match timeout(Duration::from_secs(5), discover(&client)).await {
        Ok(answer) => answer.map_err(|error| one_line(&error)),
        Err(_) => Err("no answer within 5 seconds".to_owned()),
    }
}

pub(super) async fn answer_of(asking: &mut Option<Asking>) -> Result<Served, String> {
    match asking {
        Some(answer) => answer.await,
        None => std::future::pending().await,
    }
}

/// When the API server is asked which kinds it serves.
pub(super) struct Asks {
    pub(super) next: Instant,
    /// How many times of [`ASK_AGAIN`] are left, and since when they count.
    changed: Instant,
    left: std::slice::Iter<'static, Duration>,
    failures: u32,
}

impl Asks {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { next: now, changed: now, left: [].iter(), failures: 0 }
    }

    /// Something has changed: asks at once, and some times after.
    pub(super) fn soon(&mut self) {
        self.changed = Instant::now();
        self.left = ASK_AGAIN.iter();
        self.next = self.next.min(self.changed + QUIET);
    }

    pub(super) fn answered(&mut self, is_answer: bool) {
        let now = Instant::now();
        if is_answer {
            self.failures = 0;
            let again = self.left.find_map(|after| Some(self.changed + *after).filter(|at| *at > now));
            self.next = again.unwrap_or(now + ASK_ANYWAY);
        } else {
            self.failures += 1;
            self.next = now + Duration::from_millis(500 << self.failures.min(5)).min(Duration::from_secs(10));
        }
    }
}
