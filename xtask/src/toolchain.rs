//! Finding a compiler for the eBPF target.
//!
//! No compiler ships a `core` for that target, so it is built from source, which takes the very sources of that compiler:
//! rustup's component `rust-src`, or a distribution's package. Whether the compiler is a nightly one does not matter.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::linker;
use crate::process;
use crate::workspace;

/// The variable that names the compiler to use, before any other.
pub(crate) const VARIABLE: &str = "FORWARDER_EBPF_RUSTC";

/// A compiler that can build for the eBPF target.
#[derive(Debug)]
pub(crate) struct Compiler {
    pub rustc: PathBuf,
    pub version: Version,
}

/// What a compiler says of itself.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct Version {
    /// Major and minor number.
    pub release: (u32, u32),
    /// The major version of its LLVM: what it emits, no older LLVM reads.
    pub llvm: u32,
}

impl Compiler {
    /// The program of that name from the same toolchain.
    pub(crate) fn sibling(&self, program: &str) -> Option<PathBuf> {
        Some(self.rustc.with_file_name(program)).filter(|path| path.is_file())
    }

    /// Cargo of the same toolchain, or else the one in use.
    pub(crate) fn cargo(&self) -> OsString {
        self.sibling("cargo").map_or_else(workspace::cargo, PathBuf::into_os_string)
    }
}

/// The compilers that have their library sources, best first: the one named by [`VARIABLE`] alone, or else the current
/// one, rustup's nightly and the system's. Also says why others were refused.
pub(crate) fn candidates() -> (Vec<Compiler>, Vec<String>) {
    let paths: Vec<PathBuf> = if let Some(named) = env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
        vec![named.into()]
    } else {
        let nightly =
            process::read(Command::new("rustup").args(["which", "rustc", "--toolchain", "nightly"]));
        [env::var_os("RUSTC").map_or_else(|| "rustc".into(), PathBuf::from)]
            .into_iter()
            .chain(nightly.ok().map(PathBuf::from))
            .chain([PathBuf::from("/usr/bin/rustc")])
            .collect()
    };
    let mut compilers = Vec::new();
    let mut refusals = Vec::new();
    for path in paths {
        match inspect(&path) {
            Ok(compiler) => compilers.push(compiler),
            Err(error) => refusals.push(format!("{error:#}")),
        }
    }
    (compilers, refusals)
}

/// Finds a compiler and a bpf-linker that fit together.
pub(crate) fn find() -> Result<(Compiler, PathBuf)> {
    let (compilers, mut refusals) = candidates();
    for compiler in compilers {
        match linker::find(compiler.version.llvm) {
            Some(linker) => return Ok((compiler, linker)),
            None => refusals.push(format!(
                "no bpf-linker reads LLVM {} of {}",
                compiler.version.llvm,
                compiler.rustc.display()
            )),
        }
    }
    bail!("{}", refusals.join("; "))
}

fn inspect(rustc: &Path) -> Result<Compiler> {
    let sysroot = PathBuf::from(process::read(Command::new(rustc).args(["--print", "sysroot"]))?);
    // rustup's `rustc` is a proxy that depends on the current directory; the sysroot holds the compiler itself.
    let real = sysroot.join("bin/rustc");
    let rustc = if real.is_file() { real } else { rustc.to_owned() };
    if !sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").is_file() {
        bail!("{} has no library sources", rustc.display());
    }
    let verbose = process::read(Command::new(&rustc).arg("-vV"))?;
    let version =
        parse_version(&verbose).with_context(|| format!("{} -vV says no version", rustc.display()))?;
    let wanted = parse_release(env!("CARGO_PKG_RUST_VERSION")).expect("rust-version has two numbers");
    if version.release < wanted {
        bail!("{} is older than {}", rustc.display(), env!("CARGO_PKG_RUST_VERSION"));
    }
    if !linker::LLVM_MAJORS.contains(&version.llvm) {
        bail!("{} has LLVM {}, which bpf-linker does not read", rustc.display(), version.llvm);
    }
    Ok(Compiler { rustc, version })
}

/// Parses the output of `rustc -vV`.
fn parse_version(verbose: &str) -> Option<Version> {
    let field = |name: &str| verbose.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    Some(Version {
        release: parse_release(field("release")?)?,
        llvm: field("LLVM version")?.split('.').next()?.parse().ok()?,
    })
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split('.').map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(verbose: &str, expected: Option<((u32, u32), u32)>) {
        let expected = expected.map(|(release, llvm)| Version { release, llvm });
        assert_eq!(parse_version(verbose), expected, "{verbose}");
    }

    #[test]
    fn versions_are_read_from_what_the_compiler_says() {
        check("rustc 1.95.0\nbinary: rustc\nrelease: 1.95.0\nLLVM version: 22.1.2", Some(((1, 95), 22)));
        check("release: 1.101.0-nightly\nLLVM version: 23.1", Some(((1, 101), 23)));
        check("release: 1.95.0", None);
        check("release: x\nLLVM version: 22.1", None);
        check("", None);
    }
}
