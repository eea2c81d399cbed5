//! A datapath for tests: remembers what it was told, and refuses everything where asked to.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use forwarder_common::{ListenerCounters, Verdict};

use forwarder_gateway::allowed::AllowedAddresses;
use forwarder_gateway::model::{BindAddress, ListenerKey};
use forwarder_kernel::listener_maps::ListenerMaps;
use forwarder_kernel::maps::{BackendEntry, DatapathError, ListenerId, ListenerState, MapError};
use forwarder_kernel::net::interfaces::Interface;
use forwarder_kernel::programs::attach::{AttachProblem, Attachment};

/// What a [`Fake`] was told.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) listeners: BTreeMap<ListenerKey, ListenerId>,
    pub(crate) backends: BTreeMap<ListenerId, Vec<BackendEntry>>,
}

/// The datapath; what it was told can be read while the reconciler owns it.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    pub(crate) told: Arc<Mutex<Told>>,
    pub(crate) refuses: bool,
}

impl Fake {
    fn check(&self, map: &'static str) -> Result<(), DatapathError> {
        if self.refuses {
            let source = Box::new(MapError::KeyNotFound);
            return Err(DatapathError { operation: "write to", map, entry: None, source });
        }
        Ok(())
    }
}

impl ListenerMaps for Fake {
    fn attach(&mut self, _: &[Interface], _: &BTreeSet<BindAddress>) -> Vec<AttachProblem> {
        Vec::new()
    }

    fn attachments(&self) -> Vec<Attachment> {
        Vec::new()
    }

    fn verdicts(&self) -> Result<Vec<(Verdict, u64)>, DatapathError> {
        self.check("verdicts").map(|()| Vec::new())
    }

    fn set_listener(
        &mut self,
        key: ListenerKey,
        id: ListenerId,
        _: ListenerState,
    ) -> Result<(), DatapathError> {
        self.check("listeners")?;
        self.told.lock().unwrap().listeners.insert(key, id);
        Ok(())
    }

    fn set_backends(&mut self, id: ListenerId, backends: Vec<BackendEntry>) -> Result<(), DatapathError> {
        self.check("backends")?;
        self.told.lock().unwrap().backends.insert(id, backends);
        Ok(())
    }

    fn set_clients(
        &mut self,
        _: ListenerKey,
        _: ListenerId,
        _: &Arc<AllowedAddresses>,
        _: u32,
    ) -> Result<(), DatapathError> {
        self.check("client_rules")
    }

    fn are_clients_checked(&self, _: ListenerId) -> bool {
        !self.refuses
    }

    fn set_targets(&mut self, _: ListenerKey, _: ListenerId, _: [u64; 2]) -> Result<(), DatapathError> {
        self.check("listeners")
    }

    fn remove_listener(&mut self, key: ListenerKey, id: ListenerId) -> Result<(), DatapathError> {
        self.check("listeners")?;
        let mut told = self.told.lock().unwrap();
        told.listeners.remove(&key);
        told.backends.remove(&id);
        Ok(())
    }

    fn remove_former_listeners(&mut self) -> Result<(), DatapathError> {
        self.check("listeners")
    }

    fn leave(&mut self) {}

    fn counters(&self, _: ListenerId) -> Result<ListenerCounters, DatapathError> {
        self.check("counters").map(|()| ListenerCounters::default())
    }
}
