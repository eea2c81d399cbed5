//! Finding Debian's kernels, and unpacking them.
//!
//! The suites of several releases are read by an apt configuration of our own, so that the system's stays as it is. Versions
//! move with each update of Debian, so that they are searched for instead of named.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::version::{newest, newest_of_each_series, version_of};
use crate::keyring::KEYRING;
use crate::{process, workspace};

/// Which releases of Debian to search, oldest kernels first.
const SUITES: [&str; 4] = ["bullseye", "bookworm", "bookworm-backports", "sid"];
/// Names a mirror where the system's own sources name none of Debian.
const MIRROR_VARIABLE: &str = "FORWARDER_DEBIAN_MIRROR";
const UPDATE_LIMIT: Duration = Duration::from_mins(5);
const DOWNLOAD_LIMIT: Duration = Duration::from_mins(10);

/// A kernel and its modules, unpacked.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What `uname -r` says, without the name of the architecture.
    pub(super) version: String,
    folder: PathBuf,
}

impl Kernel {
    fn unpacked(version: &str) -> Self {
        Self { version: version.to_owned(), folder: cache().join("kernels").join(version) }
    }

    /// What `uname -r` says.
    pub(super) fn release(&self) -> String {
        format!("{}-amd64", self.version)
    }

    pub(super) fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The folder in which `lib/modules` stands.
    pub(super) fn base(&self) -> &Path {
        &self.folder
    }
}

/// Everything that is downloaded, and what is made of it.
pub(super) fn cache() -> PathBuf {
    workspace::tools_directory().join("vm")
}

/// Which kernels to find.
#[derive(Debug)]
pub(super) enum Wanted<'a> {
    /// The newest one of each of these beginnings of versions.
    Newest(&'a [String]),
    /// The newest one of each series, such as 6.1.
    All,
}

/// Finds kernels; those that were unpacked before are looked at first, unless `update` asks for the newest ones of Debian.
pub(super) fn find(wanted: &Wanted<'_>, update: bool) -> Result<Vec<Kernel>> {
    let mut unpacked = unpacked()?;
    let mut offered = None;
    let versions: Vec<String> = match wanted {
        Wanted::All => newest_of_each_series(&catalogue()?),
        Wanted::Newest(prefixes) => {
            let mut versions = Vec::new();
            for prefix in *prefixes {
                let known = newest(&unpacked, prefix).filter(|_| !update);
                let version = if let Some(version) = known {
                    version.clone()
                } else {
                    let offered = match &mut offered {
                        Some(offered) => offered,
                        None => offered.insert(catalogue()?),
                    };
                    newest(offered, prefix).cloned().with_context(|| {
                        let have = newest_of_each_series(offered).join(", ");
                        format!("Debian's {} have no kernel {prefix}: they have {have}", SUITES.join(", "))
                    })?
                };
                versions.push(version);
            }
            versions.dedup();
            versions
        }
    };
    for version in &versions {
        if !unpacked.contains(version) {
            unpack(version)?;
            unpacked.push(version.clone());
        }
    }
    Ok(versions.iter().map(|version| Kernel::unpacked(version)).collect())
}

/// The versions that were unpacked before.
fn unpacked() -> Result<Vec<String>> {
    let folder = cache().join("kernels");
    fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let entries = fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    // Whatever begins with a dot is not complete.
    Ok(names.filter(|name| !name.starts_with('.')).collect())
}

/// The versions that Debian's suites have.
fn catalogue() -> Result<Vec<String>> {
    let apt = Apt::new()?;
    let updated = process::run_within(apt.command("apt-get").args(["-qq", "update"]), UPDATE_LIMIT);
    let names = process::read(apt.command("apt-cache").args(["pkgnames", "linux-"]))?;
    let versions: Vec<String> = names.lines().filter_map(version_of).map(str::to_owned).collect();
    match updated {
        // A suite may have moved: the others are there.
        Err(error) if !versions.is_empty() => eprintln!("warning: {error:#}: not every suite was read"),
        Err(error) => return Err(error.context(format!("check the network, or set {MIRROR_VARIABLE}"))),
        Ok(()) => {}
    }
    ensure!(!versions.is_empty(), "{} has no kernels: set {MIRROR_VARIABLE}", mirror()?);
    Ok(versions)
}

/// Downloads a kernel, and puts what is needed of it into the cache.
fn unpack(version: &str) -> Result<()> {
    let apt = Apt::new()?;
    let package = |kind: &str| format!("linux-{kind}-{version}-amd64");
    let has = |name: &str| process::read(apt.command("apt-cache").args(["show", name])).is_ok();
    // Newer packages are split.
    let names = if has(&package("binary")) {
        vec![package("binary"), package("modules")]
    } else {
        vec![package("image")]
    };
    let kernel = Kernel::unpacked(version);
    let scratch = Scratch::new(&cache().join(format!("kernels/.new-{}", std::process::id())))?;
    let (download, new) = (scratch.0.join("download"), scratch.0.join("new"));
    let root = scratch.0.join("root");
    for folder in [&download, &new.join("lib"), &root] {
        fs::create_dir_all(folder)?;
    }
    let mut command = apt.command("apt-get");
    command.args(["-q", "download"]).args(&names).current_dir(&download);
    process::run_within(&mut command, DOWNLOAD_LIMIT).context("check the network")?;
    for entry in fs::read_dir(&download)?.flatten() {
        process::read(Command::new("dpkg-deb").arg("-x").arg(entry.path()).arg(&root))?;
    }
    let release = kernel.release();
    let mut modules = ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder)).into_iter();
    let modules = modules
        .find(|modules| modules.join(&release).is_dir())
        .with_context(|| format!("{} has no modules", names.join(", ")))?;
    let images = [root.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
    let image = images
        .iter()
        .find(|image| image.is_file())
        .with_context(|| format!("{} has no vmlinuz", names.join(", ")))?;
    move_to(image, &new.join("vmlinuz"))?;
    move_to(&modules, &new.join("lib/modules"))?;
    let depmod = process::find("depmod").context("no depmod: run `cargo xtask setup --for vm`")?;
    process::read(Command::new(depmod).arg("-b").arg(&new).arg(&release))?;
    move_to(&new, kernel.base())
}

fn move_to(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("moving {} to {}", from.display(), to.display()))
}

/// A folder that is removed with all that is left in it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: &Path) -> Result<Self> {
        let _ = fs::remove_dir_all(path);
        fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// apt with sources, lists and caches of our own.
struct Apt(PathBuf);

impl Apt {
    fn new() -> Result<Self> {
        if !Path::new(KEYRING).is_file() {
            bail!("no {KEYRING}: run `cargo xtask setup --for vm`");
        }
        let folder = cache().join("apt");
        for part in ["lists/partial", "cache/archives/partial"] {
            let path = folder.join(part);
            fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
        }
        let mirror = mirror()?;
        let lines =
            SUITES.map(|suite| format!("deb [arch=amd64 signed-by={KEYRING}] {mirror} {suite} main\n"));
        let sources = folder.join("sources.list");
        fs::write(&sources, lines.concat()).with_context(|| format!("writing {}", sources.display()))?;
        Ok(Self(folder))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let own = [
            ("Dir::Etc::SourceList", "sources.list"),
            ("Dir::State::Lists", "lists"),
            ("Dir::Cache", "cache"),
        ];
        for (name, path) in own {
            command.arg("-o").arg(format!("{name}={}", self.0.join(path).display()));
        }
        for option in [
            "Dir::Etc::SourceParts=/dev/null",
            "Dir::Etc::Preferences=/dev/null",
            "Dir::Etc::PreferencesParts=/dev/null",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
            "Acquire::Retries=3",
            "Acquire::http::Timeout=30",
            // Its own user may not write below a home directory. Signatures are checked all the same.
            "APT::Sandbox::User=root",
        ] {
            command.args(["-o", option]);
        }
        command
    }
}

/// Where the system itself gets Debian from, or what a variable says.
///
/// # Errors
/// Neither names a mirror.
fn mirror() -> Result<String> {
    if let Some(mirror) = env::var(MIRROR_VARIABLE).ok().filter(|value| !value.is_empty()) {
        return Ok(mirror);
    }
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = parts.map(|entry| entry.path()).collect();
    files.sort();
    files.insert(0, "/etc/apt/sources.list".into());
    let is_list =
        |path: &PathBuf| path.extension().is_some_and(|end| end == OsStr::new("list") || end == "sources");
    let mut texts =
        files.iter().filter(|path| is_list(path)).filter_map(|path| fs::read_to_string(path).ok());
    texts.find_map(|text| mirror_in(&text)).with_context(|| {
        format!("the sources of apt name no mirror of Debian to get kernels from: set {MIRROR_VARIABLE}")
    })
}

/// The first mirror of Debian that sources name, in either of apt's formats.
fn mirror_in(sources: &str) -> Option<String> {
    let lines = sources.lines().filter(|line| !line.trim_start().starts_with('#'));
    let mut words = lines.flat_map(str::split_ascii_whitespace).map(|word| word.trim_end_matches('/'));
    words.find(|word| word.starts_with("http") && word.ends_with("/debian")).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_one_of_the_system() {
        let new = "Types: deb\n# http://snapshot.example/archive/debian\nURIs: http://mirror.example/debian/\nSuites: bookworm\n";
        assert_eq!(mirror_in(new).as_deref(), Some("http://mirror.example/debian"));
        let old = "deb https://other.example/x stable main\ndeb [arch=amd64] https://mirror.example/debian bookworm main\n";
        assert_eq!(mirror_in(old).as_deref(), Some("https://mirror.example/debian"));
        assert_eq!(mirror_in("deb http://mirror.example/debian-security bookworm-security main\n"), None);
    }
}
