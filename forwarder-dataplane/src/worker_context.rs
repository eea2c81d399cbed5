//! What the tasks of one worker share.

use std::cell::{Cell, RefCell, RefMut};
use std::sync::Arc;

use crate::counters::{PerWorker, WorkerCounters};
use crate::offload::sockmap::SockmapCell;
use crate::offload::tc::{OffloadTrigger, Offloader};
use crate::offload::tier_toggles::TierToggles;
use crate::relay::RelayScratch;
use crate::upstream::ConnectSettings;

/// Settings that all workers share.
#[derive(Clone, Default)]
pub struct WorkerSettings {
    /// How endpoints are connected.
    pub connect: ConnectSettings,
    /// What takes connections into the kernel at TC, where that can be done.
    pub offloader: Option<Arc<Offloader>>,
    /// What takes them by a sockmap, where that can be done and is wanted.
    pub sockmap: SockmapCell,
    /// Which of the two take connections at present.
    pub toggles: Arc<TierToggles>,
    /// When they do.
    pub offload_after: OffloadTrigger,
}

/// What a connection needs of the worker that serves it.
pub(crate) struct WorkerContext {
    index: usize,
    settings: WorkerSettings,
    counters: Arc<PerWorker<WorkerCounters>>,
    scratch: RefCell<RelayScratch>,
    sweep: Cell<u32>,
    offloads_all: Cell<bool>,
}

impl WorkerContext {
    pub(crate) fn new(
        index: usize,
        settings: WorkerSettings,
        counters: Arc<PerWorker<WorkerCounters>>,
    ) -> Self {
        Self {
            index,
            settings,
            counters,
            scratch: RefCell::default(),
            sweep: Cell::new(0),
            offloads_all: Cell::new(false),
        }
    }

    /// The worker's number: whose counters are its own.
    pub(crate) fn index(&self) -> usize {
        self.index
    }

    pub(crate) fn settings(&self) -> &WorkerSettings {
        &self.settings
    }

    pub(crate) fn counters(&self) -> &WorkerCounters {
        self.counters.of(self.index)
    }

    pub(crate) fn scratch(&self) -> RefMut<'_, RelayScratch> {
        self.scratch.borrow_mut()
    }

    /// The number of the present sweep: a clock as coarse as time-outs need.
    pub(crate) fn sweep(&self) -> u32 {
        self.sweep.get()
    }

    /// Begins the next sweep; yields its number.
    pub(crate) fn next_sweep(&self) -> u32 {
        self.sweep.set(self.sweep.get().wrapping_add(1));
        self.sweep.get()
    }

    /// Whether every connection is to be taken into the kernel as soon as it can be.
    pub(crate) fn offloads_all(&self) -> bool {
        self.offloads_all.get()
    }

    pub(crate) fn offload_all(&self) {
        self.offloads_all.set(true);
    }
}
