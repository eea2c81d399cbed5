//! Steps at which a test stops the agent, to play an event just there.
//!
//! Only with the feature `failpoints`, which no release has: without it, nothing of this is compiled. The environment
//! variable `FORWARDER_FAILPOINTS` names a folder. Where a file `STEP.stop` stands in it when the agent comes to a step, the
//! agent makes the file `STEP.reached` and goes on once `STEP.stop` is gone. Where `STEP.panic` stands there, it panics.

#[cfg(feature = "failpoints")]
pub use self::stopping::{block, reached};

/// The steps after each of the two entries of a pair is written, by its direction.
pub const FLOWS_WRITTEN: [&str; 2] = ["join.request_written", "join.response_written"];

/// Comes to a step; does nothing.
#[cfg(not(feature = "failpoints"))]
pub fn block(_step: &str) {}

/// Comes to a step; does nothing.
#[cfg(not(feature = "failpoints"))]
pub fn reached(_step: &str) -> std::future::Ready<()> {
    std::future::ready(())
}

#[cfg(feature = "failpoints")]
mod stopping {
    use std::env;
    use std::fs::{self, File};
    use std::path::{Path, PathBuf};
    use std::sync::LazyLock;
    use std::thread;
    use std::time::{Duration, Instant};

    /// How often it is looked whether the agent may go on.
    const LOOK: Duration = Duration::from_millis(1);
    /// For how long it stops at most: a test that has ended removes no files.
    const LONGEST: Duration = Duration::from_secs(30);

    static FOLDER: LazyLock<Option<PathBuf>> =
        LazyLock::new(|| env::var_os("FORWARDER_FAILPOINTS").map(PathBuf::from));

    /// A step at which the agent is to stop.
    struct Stop {
        file: PathBuf,
        until: Instant,
    }

    impl Stop {
        /// Says that the step is reached, where the agent is to stop there.
        fn at(step: &str) -> Option<Self> {
            let folder: &Path = FOLDER.as_deref()?;
            assert!(!folder.join(format!("{step}.panic")).exists(), "told to panic at {step}");
            let file = folder.join(format!("{step}.stop"));
            if !file.exists() {
                return None;
            }
            if let Err(error) = File::create(folder.join(format!("{step}.reached"))) {
                tracing::warn!(%error, step, "a failpoint cannot say that it is reached");
            }
            Some(Self { file, until: Instant::now() + LONGEST })
        }

        fn stands(&self) -> bool {
            Instant::now() < self.until && fs::exists(&self.file).unwrap_or_default()
        }
    }

    /// Comes to a step inside of which nothing else happens on this thread.
    pub fn block(step: &str) {
        let Some(halt) = Stop::at(step) else { return };
        while halt.stands() {
            thread::sleep(LOOK);
        }
    }

    /// Comes to a step at which the connection's task waits.
    pub async fn reached(step: &str) {
        let Some(halt) = Stop::at(step) else { return };
        while halt.stands() {
            tokio::time::sleep(LOOK).await;
        }
    }
}
