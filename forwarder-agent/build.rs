//! Copies the object file of the eBPF programs to where the agent embeds it from.
//!
//! `cargo xtask build-ebpf` makes the object. Without one the agent is built all the same, and forwards without the
//! programs. `FORWARDER_EBPF_OBJECT` names another object.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

const VARIABLE: &str = "FORWARDER_EBPF_OBJECT";
const DEFAULT_OBJECT: &str = "target/ebpf/bpfel-unknown-none/release/forwarder";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");
    let embedded = PathBuf::from(env::var("OUT_DIR")?).join("forwarder.bpf.o");
    let object = match env::var_os(VARIABLE) {
        Some(path) => Some(PathBuf::from(path)),
        None => default_object()?,
    };
    if let Some(object) = object {
        println!("cargo::rerun-if-changed={}", object.display());
        fs::copy(&object, &embedded)
            .map_err(|error| format!("cannot embed the eBPF programs from {}: {error}", object.display()))?;
    } else {
        println!("cargo::warning=no eBPF programs are embedded: run `cargo xtask build-ebpf` first");
        fs::write(&embedded, [])?;
    }
    Ok(())
}

/// The object that `cargo xtask build-ebpf` makes, if it did.
fn default_object() -> Result<Option<PathBuf>, Box<dyn Error>> {
    let manifest_dir = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = manifest_dir.parent().ok_or("the crate lies in no workspace")?;
    let object = workspace.join(DEFAULT_OBJECT);
    if object.is_file() {
        return Ok(Some(object));
    }
    // Cargo takes a missing file for one that changed, and would build the agent anew each time. The folder's time
    // changes when the object appears.
    let folder = object.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    println!("cargo::rerun-if-changed={}", folder.display());
    Ok(None)
}
