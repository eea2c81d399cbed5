//! How the agents of a test hang their programs on interfaces.

use std::env;
use std::path::Path;

/// The variable by which an agent is told to attach as on a kernel without tcx.
const ATTACH_BY: &str = "FORWARDER_ATTACH_BY";
/// The kind of attachment of such kernels.
const CLSACT: &str = "clsact";

/// Whether agents attach by filters of clsact: in the tests of `clsact.rs`, which are those of other files, and where the
/// environment of the tests says so.
pub fn is_by_clsact() -> bool {
    let is_that_file = || {
        let test = env::current_exe().ok()?;
        let (file, _) = Path::file_stem(&test)?.to_str()?.rsplit_once('-')?;
        Some(file == CLSACT)
    };
    env::var(ATTACH_BY).is_ok_and(|kind| kind == CLSACT) || is_that_file().unwrap_or_default()
}

/// The environment of agents.
pub(crate) fn environment() -> Option<(&'static str, &'static str)> {
    is_by_clsact().then_some((ATTACH_BY, CLSACT))
}
