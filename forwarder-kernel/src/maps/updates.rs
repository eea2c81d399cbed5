//! Changing what stands in the maps in place, by programs of the agent's own: see [`forwarder_common::update`].

use std::fs;
use std::io;
use std::path::Path;

use aya::maps::MapError;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, TestRun, TestRunOptions};
use forwarder_common::flow::Flow;
use forwarder_common::layout::FLOWS;
use forwarder_common::layout::{ListenerKey, ListenerValue};
use forwarder_common::tuple::FourTuple;
use forwarder_common::update::{
    FlowUpdate, ListenerUpdate, PROGRAM_SET_FLOW, PROGRAM_SET_LISTENER, REQUEST_OFFSET,
};

use crate::load_error::LoadError;
use crate::maps::DatapathError;
use crate::maps::versions::programs_folder;

/// The programs, loaded.
pub(crate) struct Updates {
    flows: SchedClassifier,
    listeners: SchedClassifier,
}

impl Updates {
    /// Takes the programs, which are loaded, by way of the pin directory.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn take(ebpf: &mut Ebpf, pin_dir: &Path) -> Result<Self, LoadError> {
        Ok(Self {
            flows: own(ebpf, pin_dir, PROGRAM_SET_FLOW)?,
            listeners: own(ebpf, pin_dir, PROGRAM_SET_LISTENER)?,
        })
    }

    /// Makes the flows of a pair, one right after the other, as far as they stand there and have not come to a later state, what is said.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(crate) fn set_flows(&self, flows: &[(FourTuple, Flow); 2]) -> Result<(), DatapathError> {
        set_flows(&self.flows, flows)
    }

    /// Makes a listener what is said; whether it stands there.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn set_listener(&self, key: ListenerKey, value: ListenerValue) -> Result<bool, MapError> {
        let request = ListenerUpdate { key, pad: 0, value }.bytes();
        Ok(run(&self.listeners, &request)? > 0)
    }
}

/// The program for flows that an agent has left in a pin directory.
///
/// # Errors
/// There is none, or the kernel refuses.
pub(crate) fn open_flow_setter(pin_dir: &Path) -> Result<SchedClassifier, DatapathError> {
    SchedClassifier::from_pin(programs_folder(pin_dir).join(PROGRAM_SET_FLOW)).map_err(|error| {
        DatapathError {
            operation: "open the program that changes",
            map: FLOWS,
            entry: None,
            source: Box::new(io::Error::other(error).into()),
        }
    })
}

/// Has a program make the flows of a pair what is said: see [`Updates::set_flows`].
///
/// # Errors
/// The kernel refuses.
pub(crate) fn set_flows(
    setter: &SchedClassifier,
    flows: &[(FourTuple, Flow); 2],
) -> Result<(), DatapathError> {
    for (key, flow) in flows {
        run(setter, &FlowUpdate::new(*key, flow).bytes()).map_err(|source| DatapathError {
            operation: "change",
            map: FLOWS,
            entry: Some(format!("pair {}", flow.pair)),
            source: Box::new(source.into()),
        })?;
        forwarder_runtime::failpoint::block("rewrite.request_written");
    }
    Ok(())
}

/// A program by its pin, which stays, so that pairs can be ended while no agent runs.
fn own(ebpf: &mut Ebpf, pin_dir: &Path, name: &'static str) -> Result<SchedClassifier, LoadError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| LoadError::Object { reason: format!("they have no program {name}") })?;
    let failed = |operation: &str, error: ProgramError| {
        LoadError::new(format!("{operation} program {name}"), name, error.into())
    };
    let program = <&mut SchedClassifier>::try_from(program).map_err(|error| failed("find", error))?;
    let pin = programs_folder(pin_dir).join(name);
    // A former agent's.
    let _ = fs::remove_file(&pin);
    program.pin(&pin).map_err(|error| LoadError::PinDir {
        operation: "pin a program at",
        path: pin.clone(),
        source: io::Error::other(error),
    })?;
    SchedClassifier::from_pin(&pin).map_err(|error| failed("open", error))
}

/// Runs a program once; what it returns.
pub(crate) fn run(program: &SchedClassifier, request: &[u8]) -> Result<u32, io::Error> {
    let packet = [&[0; REQUEST_OFFSET], request].concat();
    let options = TestRunOptions { data_in: Some(&packet), ..TestRunOptions::default() };
    let result = program.test_run(options).map_err(io::Error::other)?;
    Ok(result.return_value)
}
