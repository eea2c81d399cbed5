//! Copies the object files of the eBPF programs to where the agent embeds them from.
//!
//! `cargo xtask build-ebpf` makes the objects. Without them the agent is built all the same, and forwards without the
//! programs. `FORWARDER_EBPF_OBJECTS` names another folder of objects.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

const VARIABLE: &str = "FORWARDER_EBPF_OBJECTS";
const DEFAULT_FOLDER: &str = "target/ebpf/bpfel-unknown-none/release";
/// The programs at TC, and the one of tier `sockmap`.
const OBJECTS: [&str; 2] = ["forwarder", "sockmap"];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    let output = PathBuf::from(env::var("OUT_DIR")?);
    let folder = match env::var_os(VARIABLE) {
        Some(path) => Some(PathBuf::from(path)),
        None => default_folder()?,
    };
    for name in OBJECTS {
        let embedded = output.join(name).with_extension("bpf.o");
        let Some(folder) = &folder else {
            fs::write(&embedded, [])?;
            continue;
        };
        let object = folder.join(name);
        println!("cargo::rerun-if-changed={}", object.display());
        fs::copy(&object, &embedded)
            .map_err(|error| format!("cannot embed the eBPF programs from {}: {error}", object.display()))?;
    }
    if folder.is_none() {
        println!("cargo::warning=no eBPF programs are embedded: run `cargo xtask build-ebpf` first");
    }
    Ok(())
}

/// The folder of the objects that `cargo xtask build-ebpf` makes, if it did.
fn default_folder() -> Result<Option<PathBuf>, Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().ok_or("the crate lies in no workspace")?;
    let folder = workspace.join(DEFAULT_FOLDER);
    if OBJECTS.iter().all(|name| folder.join(name).is_file()) {
        return Ok(Some(folder));
    }
    // Cargo takes a missing file for one that changed, and would build the agent anew each time. The folder's time
    // changes when an object appears.
    fs::create_dir_all(&folder)?;
    println!("cargo::rerun-if-changed={}", folder.display());
    Ok(None)
}
