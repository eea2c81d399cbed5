//! The keys that Debian's packages are checked with.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::{packages, process};

/// What signs all of them; the package of the same name has it.
pub(crate) const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The file with the keys; the programs that use it have to be there, too.
pub(crate) fn find() -> Result<String> {
    ensure!(Path::new(KEYRING).is_file(), "no {KEYRING}");
    for program in ["apt-get", "apt-cache"] {
        process::read(Command::new(program).arg("--version"))?;
    }
    Ok(KEYRING.to_owned())
}

pub(crate) fn install() -> Result<()> {
    packages::install(&["debian-archive-keyring".to_owned()])
}
