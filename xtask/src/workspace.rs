//! Where things stand in the workspace.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// With or without optimisations.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Profile {
    Dev,
    Release,
}

/// The top of the workspace.
pub(crate) fn root() -> PathBuf {
    // Cargo sets the variable anew at each run, so that a copied or moved tree finds itself.
    let package = env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&package).parent().expect("xtask stands inside the workspace").to_owned()
}

/// Cargo of the toolchain in use.
pub(crate) fn cargo() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Cargo's target directory for host builds.
pub(crate) fn target_directory() -> PathBuf {
    root().join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
}

/// The agent's binary.
pub(crate) fn agent(profile: Profile) -> PathBuf {
    target_directory()
        .join(match profile {
            Profile::Dev => "debug",
            Profile::Release => "release",
        })
        .join("forwarder")
}

/// The target that the agent is built for where it has to bring its C library along.
pub(crate) fn static_target() -> String {
    format!("{}-unknown-linux-gnu", env::consts::ARCH)
}

/// The target directory of the eBPF programs, apart from the host's so that neither build invalidates the other.
pub(crate) fn ebpf_target_directory() -> PathBuf {
    root().join("target/ebpf")
}

/// The folder of the objects with the eBPF programs: the agent's build script looks here too.
pub(crate) fn ebpf_objects() -> PathBuf {
    ebpf_target_directory().join("bpfel-unknown-none/release")
}

/// Where tools that `setup` builds are installed.
pub(crate) fn tools_directory() -> PathBuf {
    if let Some(directory) = env::var_os("FORWARDER_TOOLS").filter(|value| !value.is_empty()) {
        return directory.into();
    }
    let cache = env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()).map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache"),
        PathBuf::from,
    );
    cache.join("forwarder-tools")
}
