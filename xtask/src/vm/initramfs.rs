//! The first root of the guest: busybox, and the modules that the real root takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::kernels::Kernel;
use crate::process;

/// What mounting the host's files takes, besides what each of them depends on.
const MODULES: [&str; 4] = ["virtio_pci", "9pnet_virtio", "9p", "overlay"];

/// Mounts the host's files, read-only, below a layer that takes changes and is gone with the guest, and goes on in there.
///
/// What the kernel provides is mounted anew, because busybox cannot move mounts.
const INIT: &str = r#"#!/bin/busybox sh
fail() { echo "initramfs: $*"; /bin/busybox poweroff -f; }
/bin/busybox mkdir -p /proc /host /layer /root
/bin/busybox mount -t proc proc /proc
for module in /modules/*; do
    /bin/busybox insmod "$module" || fail "cannot insert $module"
done
/bin/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=262144 root /host || fail "no root"
/bin/busybox mount -t tmpfs tmpfs /layer
/bin/busybox mkdir /layer/upper /layer/work
/bin/busybox mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work overlay /root || fail "no overlay"
/bin/busybox mount -t proc proc /root/proc
/bin/busybox mount -t sysfs sysfs /root/sys
/bin/busybox mount -t devtmpfs devtmpfs /root/dev
for word in $(/bin/busybox cat /proc/cmdline); do
    case "$word" in forwarder.script=*) script=${word#*=} ;; esac
done
/bin/busybox umount /proc
exec /bin/busybox switch_root /root /bin/sh "$script"
fail "cannot switch to the real root"
"#;

/// Writes the archive for a kernel.
pub(super) fn write(kernel: &Kernel, path: &Path) -> Result<()> {
    let busybox = process::find("busybox").context("no busybox: run `cargo xtask setup --for vm`")?;
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules"] {
        archive.folder(folder);
    }
    // The kernel opens it for the first process before anything is mounted.
    archive.console("dev/console");
    archive.program("bin/busybox", &read(&busybox)?);
    archive.program("init", INIT.as_bytes());
    for (number, module) in modules(kernel)?.iter().enumerate() {
        archive.program(&format!("modules/{number:02}"), &decompressed(module)?);
    }
    fs::write(path, archive.finish()).with_context(|| format!("writing {}", path.display()))
}

/// The files of all modules that are needed, in the order in which they can be inserted.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let modprobe = process::find("modprobe").context("no modprobe: run `cargo xtask setup --for vm`")?;
    let mut answers = String::new();
    for module in MODULES {
        let mut command = Command::new(&modprobe);
        command.arg("-d").arg(kernel.base()).args(["-S", &kernel.release(), "--show-depends", module]);
        answers += &process::read(&mut command)?;
        answers.push('\n');
    }
    Ok(in_order(&answers))
}

/// What `modprobe --show-depends` says, each file once. What is built into the kernel has none.
fn in_order(answers: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = Vec::new();
    for file in answers.lines().filter_map(|line| line.strip_prefix("insmod ")) {
        let file = PathBuf::from(file.split_ascii_whitespace().next().unwrap_or_default());
        if !files.contains(&file) {
            files.push(file);
        }
    }
    files
}

/// busybox inserts no compressed modules.
fn decompressed(module: &Path) -> Result<Vec<u8>> {
    let program = match module.extension().and_then(|end| end.to_str()) {
        Some("ko") => return read(module),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("do not know how {} is compressed", module.display()),
    };
    let output = Command::new(program).arg("-dc").arg(module).output();
    let output = output.with_context(|| format!("running {program}: run `cargo xtask setup --for vm`"))?;
    if !output.status.success() {
        bail!(
            "{program} cannot read {}: {}",
            module.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(output.stdout)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// An archive in the format that Documentation/driver-api/early-userspace/buffer-format.rst of the kernel describes.
#[derive(Default)]
struct Archive(Vec<u8>);

impl Archive {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    fn program(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, (0, 0), content);
    }

    fn console(&mut self, name: &str) {
        self.entry(name, 0o020_600, (5, 1), &[]);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.0
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        // Equal numbers of inodes would only matter for more than one link.
        let (inode, owner, group, links, time, checksum) = (0, 0, 0, 1, 0, 0);
        let (device_major, device_minor) = (0, 0);
        let (size, name_size) = (content.len(), name.len() + 1);
        self.0.extend_from_slice(
            format!(
                "070701{inode:08x}{mode:08x}{owner:08x}{group:08x}{links:08x}{time:08x}{size:08x}\
                 {device_major:08x}{device_minor:08x}{major:08x}{minor:08x}{name_size:08x}{checksum:08x}{name}\0"
            )
            .as_bytes(),
        );
        self.pad();
        self.0.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_inserted_once_and_after_what_they_depend_on() {
        let answers = "builtin virtio\ninsmod /k/virtio_ring.ko \ninsmod /k/9pnet.ko.xz x=1\n\
                       insmod /k/virtio_ring.ko \ninsmod /k/9p.ko.zst \n";
        let expected = ["/k/virtio_ring.ko", "/k/9pnet.ko.xz", "/k/9p.ko.zst"].map(PathBuf::from);
        assert_eq!(in_order(answers), expected);
    }

    #[test]
    fn entries_of_the_archive_are_aligned() {
        let mut archive = Archive::default();
        archive.program("init", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.get(..6), Some(&b"070701"[..]));
        assert_eq!(bytes.get(54..62), Some(&b"00000005"[..]), "its size");
        assert_eq!(bytes.get(110..116), Some(&b"init\0\0"[..]), "its name, to a multiple of four");
        assert_eq!(bytes.get(116..124), Some(&b"hello\0\0\0"[..]));
        assert_eq!(bytes.get(124..130), Some(&b"070701"[..]), "the next entry");
        assert_eq!(bytes.len() % 4, 0);
    }
}
