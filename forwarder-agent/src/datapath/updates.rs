//! Changing what stands in the maps in place, by programs of the agent's own: see [`forwarder_common::update`].

use std::fs;
use std::io;
use std::path::Path;

use aya::maps::MapError;
use aya::programs::SchedClassifier;
use aya::{Ebpf, TestRun, TestRunOptions};
use forwarder_common::flow::{FLOWS, Flow, FlowKey};
use forwarder_common::layout::{ListenerKey, ListenerValue};
use forwarder_common::update::{
    FlowUpdate, ListenerUpdate, PROGRAM_SET_FLOWS, PROGRAM_SET_LISTENER, REQUEST_OFFSET,
};

use super::DatapathError;
use super::load_error::LoadError;

/// The programs, loaded.
pub(super) struct Updates {
    flows: SchedClassifier,
    listeners: SchedClassifier,
}

impl Updates {
    /// Takes the programs, which are loaded, by way of a directory on a BPF file system.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn take(ebpf: &mut Ebpf, pins: &Path) -> Result<Self, LoadError> {
        Ok(Self {
            flows: own(ebpf, pins, PROGRAM_SET_FLOWS)?,
            listeners: own(ebpf, pins, PROGRAM_SET_LISTENER)?,
        })
    }

    /// Makes the flows of a pair, as far as they stand there and have not come to a later state, what is said.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn set_flows(&self, flows: &[(FlowKey, Flow); 2]) -> Result<(), DatapathError> {
        let request = flows.each_ref().map(|(key, flow)| FlowUpdate::new(*key, flow).bytes());
        let pair = flows.each_ref().map(|(_, flow)| flow.pair)[0];
        run(&self.flows, &request.concat()).map(drop).map_err(|source| DatapathError {
            operation: "change",
            map: FLOWS,
            entry: Some(format!("pair {pair}")),
            source: Box::new(source.into()),
        })
    }

    /// Makes a listener what is said; whether it stands there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn set_listener(&self, key: ListenerKey, value: ListenerValue) -> Result<bool, MapError> {
        let request = ListenerUpdate { key, value }.bytes();
        Ok(run(&self.listeners, &request)? > 0)
    }
}

/// A program as a value of its own, which the rest of what was loaded is not needed for.
fn own(ebpf: &mut Ebpf, pins: &Path, name: &'static str) -> Result<SchedClassifier, LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| LoadError::Object { reason: format!("they have no program {name}") })?;
    let failed = |reason: String| LoadError::Object { reason: format!("program {name}: {reason}") };
    let program = <&mut SchedClassifier>::try_from(program).map_err(|error| failed(error.to_string()))?;
    let pin = pins.join(name);
    // An agent may have died right here.
    let _ = fs::remove_file(&pin);
    program.pin(&pin).map_err(|error| failed(error.to_string()))?;
    let own = SchedClassifier::from_pin(&pin);
    fs::remove_file(&pin).map_err(|error| failed(error.to_string()))?;
    own.map_err(|error| failed(error.to_string()))
}

/// Runs a program once; what it returns.
pub(super) fn run(program: &SchedClassifier, request: &[u8]) -> Result<u32, io::Error> {
    let packet = [&[0; REQUEST_OFFSET], request].concat();
    let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
    let result = program.test_run(options).map_err(io::Error::other)?;
    Ok(result.return_value)
}
