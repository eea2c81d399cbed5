//! What the tests against a real Kubernetes API take: its servers and clients, built from source, and the CRDs of Gateway API.
//!
//! `tests/src/apiserver/assets.rs` looks for them in the same folder.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use std::{env, iter};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

use crate::{packages, process, workspace};

/// Tells the tests where everything is.
pub(crate) const VARIABLE: &str = "FORWARDER_TEST_KUBE_ASSETS";
/// The first Go that fetches the one that a module asks for.
const OLDEST_GO: Version = (1, 21);
/// The first build takes long: there is a lot of Kubernetes.
const BUILD_LIMIT: Duration = Duration::from_mins(30);
const DOWNLOAD_LIMIT: Duration = Duration::from_mins(10);

type Version = (u32, u32);

/// Folders with a go.mod, from the top of the workspace.
const SERVERS: &str = "tests/apiserver";
const HELM: &str = "tests/helm";

struct Program {
    name: &'static str,
    module: &'static str,
    package: &'static str,
    /// What `go build` calls it.
    built: &'static str,
}

const PROGRAMS: [Program; 4] = [
    Program { name: "etcd", module: SERVERS, package: "go.etcd.io/etcd/server/v3", built: "server" },
    Program {
        name: "kube-apiserver",
        module: SERVERS,
        package: "k8s.io/kubernetes/cmd/kube-apiserver",
        built: "kube-apiserver",
    },
    Program { name: "kubectl", module: SERVERS, package: "k8s.io/kubernetes/cmd/kubectl", built: "kubectl" },
    Program { name: "helm", module: HELM, package: "helm.sh/helm/v3/cmd/helm", built: "helm" },
];

const GATEWAY_API: &str = "sigs.k8s.io/gateway-api";
const CHANNELS: [&str; 2] = ["standard", "experimental"];
/// The releases of Gateway API, and the hashes of their modules.
const RELEASES: [(&str, &str); 6] = [
    ("v1.0.0", "h1:iPTStSv41+d9p0xFydll6d7f7MOBGuqXM6p2/zVYMAs="),
    ("v1.1.0", "h1:DsLDXCi6jR+Xz8/xd0Z1PYl2Pn0TyaFMOPPZIj4inDM="),
    ("v1.2.1", "h1:fZZ/+RyRb+Y5tGkwxFKuYuSRQHu9dZtbjenblleOLHM="),
    ("v1.4.1", "h1:NPxFutNkKNa8UfLd2CMlEuhIPMQgDQ6DXNKG9sHbJU8="),
    ("v1.5.1", "h1:RqVRIlkhLhUO8wOHKTLnTJA6o/1un4po4/6M1nRzdd0="),
    ("v1.6.1", "h1:mock6phZbI6rvZerwrVNk7hVNymQgHo+6sJ81Ia7ftY="),
];

/// The folder of everything: another one whenever a version changes.
pub(crate) fn assets() -> Result<PathBuf> {
    let mut hash = Sha256::new();
    for module in [SERVERS, HELM] {
        for file in ["go.mod", "go.sum"] {
            let path = workspace::root().join(module).join(file);
            hash.update(fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
        }
    }
    let key = hash.finalize().first_chunk().map_or(0, |&start| u64::from_be_bytes(start));
    Ok(workspace::tools_directory().join(format!("kubernetes-{key:016x}")))
}

/// Where everything is, or what is missing.
pub(crate) fn find() -> Result<String> {
    let assets = assets()?;
    let programs = missing_programs(&assets).into_iter().map(|program| program.name.to_owned());
    let releases = missing_releases(&assets).into_iter().map(|(version, _)| format!("Gateway API {version}"));
    let missing: Vec<String> = programs.chain(releases).collect();
    if !missing.is_empty() {
        bail!("{}", missing.join(", "));
    }
    Ok(assets.display().to_string())
}

/// Builds and downloads what is missing.
pub(crate) fn install() -> Result<()> {
    let assets = assets()?;
    fs::create_dir_all(&assets).with_context(|| format!("creating {}", assets.display()))?;
    let go = Go::find().or_else(|_| {
        install_go()?;
        Go::find()
    })?;
    for module in [SERVERS, HELM] {
        build(&go, module, &assets)?;
    }
    download_releases(&go, &assets)
}

/// The programs that neither we nor `KUBEBUILDER_ASSETS` have.
fn missing_programs(assets: &Path) -> Vec<&'static Program> {
    let given = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let folders: Vec<&Path> = given.as_deref().into_iter().chain(iter::once(assets)).collect();
    PROGRAMS
        .iter()
        .filter(|program| !folders.iter().any(|folder| folder.join(program.name).is_file()))
        .collect()
}

fn missing_releases(assets: &Path) -> Vec<(&'static str, &'static str)> {
    RELEASES.into_iter().filter(|(version, _)| !release(assets, version).is_dir()).collect()
}

fn release(assets: &Path, version: &str) -> PathBuf {
    assets.join("gateway-api").join(version)
}

/// Builds the missing programs of one module.
fn build(go: &Go, module: &str, assets: &Path) -> Result<()> {
    let missing = missing_programs(assets).into_iter().filter(|program| program.module == module);
    let missing: Vec<&Program> = missing.collect();
    if missing.is_empty() {
        return Ok(());
    }
    let folder = workspace::root().join(module);
    let wanted =
        fs::read_to_string(folder.join("go.mod")).with_context(|| format!("reading {module}/go.mod"))?;
    let output = Scratch::new(assets)?;
    let mut command = go.command(language(&wanted));
    command
        .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags"])
        .arg(linker_flags(&wanted))
        .arg("-o")
        .arg(&output.0)
        .args(missing.iter().map(|program| program.package))
        .env("CGO_ENABLED", "0")
        .current_dir(&folder);
    eprintln!("Building Kubernetes' programs takes some ten minutes, once");
    process::run_within(&mut command, BUILD_LIMIT)
        .context("check the network and the free disk space (6 GB)")?;
    for program in missing {
        move_to(&output.0.join(program.built), &assets.join(program.name))?;
    }
    Ok(())
}

/// Without symbols, and with the version that clients ask for.
fn linker_flags(go_mod: &str) -> String {
    const VERSION: &str = "k8s.io/component-base/version";
    let Some(version) = required(go_mod, "k8s.io/kubernetes") else {
        return "-s -w".to_owned();
    };
    let mut numbers = version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    format!(
        "-s -w -X {VERSION}.gitVersion={version} -X {VERSION}.gitMajor={major} -X {VERSION}.gitMinor={minor}"
    )
}

/// The version of a module that go.mod requires.
fn required<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        words.next().filter(|&word| word == module)?;
        words.next()
    })
}

/// The Go that go.mod asks for.
fn language(go_mod: &str) -> Option<Version> {
    go_mod.lines().find_map(|line| parse_version(line.strip_prefix("go ")?))
}

fn download_releases(go: &Go, assets: &Path) -> Result<()> {
    let missing = missing_releases(assets);
    if missing.is_empty() {
        return Ok(());
    }
    let download = || {
        let mut command = go.command(None);
        command.args(["mod", "download"]).env("GOFLAGS", "-mod=mod").current_dir("/");
        command
    };
    let mut all = download();
    all.args(missing.iter().map(|(version, _)| format!("{GATEWAY_API}@{version}")));
    process::run_within(&mut all, DOWNLOAD_LIMIT).context("check the network")?;
    for (version, sum) in missing {
        let module = format!("{GATEWAY_API}@{version}");
        let record = process::read(download().arg("-json").arg(&module))?;
        let found = field(&record, "Sum").unwrap_or_default();
        ensure!(
            found == sum,
            "{module} has the hash {found} instead of {sum}: trust neither before you know why"
        );
        let folder = field(&record, "Dir").with_context(|| format!("no folder of {module}"))?;
        let scratch = Scratch::new(assets)?;
        copy_crds(&Path::new(folder).join("config/crd"), &scratch.0)?;
        fs::create_dir_all(assets.join("gateway-api"))?;
        move_to(&scratch.0, &release(assets, version))?;
    }
    Ok(())
}

/// A string of the flat JSON object that `go mod download` prints.
fn field<'a>(record: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = record.split_once(&format!("\"{name}\": \""))?;
    rest.split('"').next()
}

fn copy_crds(from: &Path, to: &Path) -> Result<()> {
    for channel in CHANNELS {
        let (from, to) = (from.join(channel), to.join(channel));
        fs::create_dir(&to)?;
        for entry in fs::read_dir(&from).with_context(|| format!("reading {}", from.display()))? {
            let name = entry?.file_name();
            // Not the list of files for kustomize, which is no object.
            if name.to_string_lossy().starts_with("gateway.") {
                fs::copy(from.join(&name), to.join(&name))?;
            }
        }
    }
    Ok(())
}

fn move_to(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("moving {} to {}", from.display(), to.display()))
}

/// A folder whose content is moved once it is complete, so that nobody finds half of it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(assets: &Path) -> Result<Self> {
        let path = assets.join(format!(".new-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may have been moved as a whole.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A Go that is new enough.
struct Go {
    path: PathBuf,
    version: Version,
}

impl Go {
    /// The one on the search path, or the one of Go's own installer.
    fn find() -> Result<Self> {
        let candidates = process::find("go").into_iter().chain(iter::once("/usr/local/go/bin/go".into()));
        candidates
            .filter_map(|path| {
                let version =
                    process::read(Command::new(&path).args(["env", "GOVERSION"]).current_dir("/")).ok()?;
                Some(Self { version: parse_version(version.strip_prefix("go")?)?, path })
            })
            .find(|go| go.version >= OLDEST_GO)
            .context("no Go")
    }

    /// Go, which fetches itself in the version that a module asks for if it is older.
    fn command(&self, wanted: Option<Version>) -> Command {
        let mut command = Command::new(&self.path);
        if wanted.is_some_and(|wanted| self.version < wanted) {
            command.env("GOTOOLCHAIN", "auto");
        }
        command
    }
}

fn install_go() -> Result<()> {
    const PACKAGE: &str = "golang-go";
    let remedy = "install Go as https://go.dev/doc/install says, or set KUBEBUILDER_ASSETS to a folder with the programs";
    if packages::candidate(PACKAGE).and_then(|version| parse_version(&version)) < Some(OLDEST_GO) {
        bail!("no Go {}.{} or newer: {remedy}", OLDEST_GO.0, OLDEST_GO.1);
    }
    packages::install(&[PACKAGE.to_owned()]).context(remedy)
}

/// The first two numbers of a version.
fn parse_version(text: &str) -> Option<Version> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The variable for the tests, if there is anything to tell.
pub(crate) fn environment() -> Option<(&'static str, OsString)> {
    let assets = assets().ok().filter(|assets| assets.is_dir())?;
    Some((VARIABLE, assets.into_os_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GO_MOD: &str = "go 1.26.0\n\ntool k8s.io/kubernetes/cmd/kubectl\n\nrequire (\n\tk8s.io/kubernetes v1.36.3 // indirect\n)\n";

    #[test]
    fn versions_are_read_from_what_names_them() {
        assert_eq!(parse_version("1.26.8"), Some((1, 26)));
        assert_eq!(parse_version("1.26rc1"), Some((1, 26)));
        assert_eq!(parse_version("1.24~2"), Some((1, 24)));
        assert_eq!(parse_version("devel"), None);
        assert_eq!(language(GO_MOD), Some((1, 26)));
        assert!(
            linker_flags(GO_MOD).contains("gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1")
        );
        assert_eq!(linker_flags("module m\n"), "-s -w");
    }

    #[test]
    fn fields_are_read_from_the_record_of_a_download() {
        let record = "{\n\t\"Version\": \"v1.0.0\",\n\t\"Sum\": \"h1:x=\",\n\t\"GoModSum\": \"h1:y=\"\n}";
        assert_eq!(field(record, "Sum"), Some("h1:x="));
        assert_eq!(field(record, "Dir"), None);
    }
}
