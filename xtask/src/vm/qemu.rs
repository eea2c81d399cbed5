//! The machine that the guest runs on.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;

use super::guest::{OUTPUT_TAG, UP};
use crate::process;

/// How long the guest may take to run its first test, which is some seconds on an idle host.
const BOOT_LIMIT: Duration = Duration::from_mins(3);
const INTERVAL: Duration = Duration::from_millis(200);

/// Who executes the guest's instructions.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(super) enum Accelerator {
    /// A translator: everywhere, and slow.
    Tcg,
    /// The processor, where /dev/kvm works.
    Kvm,
}

impl Accelerator {
    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
        }
    }
}

#[derive(Debug)]
pub(super) struct Machine<'a> {
    pub(super) accelerator: Accelerator,
    pub(super) image: PathBuf,
    pub(super) initramfs: PathBuf,
    /// The guest's first process.
    pub(super) script: PathBuf,
    /// Where the guest writes what it has to tell.
    pub(super) output: &'a Path,
    /// Where its console goes.
    pub(super) console: PathBuf,
    /// Whether it has network cards for tests.
    pub(super) cards: bool,
    /// The user types at the console instead.
    pub(super) shell: bool,
}

/// How many networks tests make: of a client, and of two hosts of backends.
const NETWORKS: usize = 3;

/// How a machine ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum End {
    /// By itself.
    Off,
    /// It was ended, because it ran no test in time.
    NeverUp,
    /// It was ended, because it took too long.
    TooLong,
}

impl Machine<'_> {
    /// Runs it until it ends, for at most `limit` from when it is up, and calls `watch` now and then.
    pub(super) fn run(&self, limit: Duration, mut watch: impl FnMut()) -> Result<End> {
        let mut command = self.command()?;
        eprintln!("$ {}", process::line(&command));
        let child = command.spawn().with_context(|| format!("running `{}`", process::line(&command)))?;
        let mut running = Running(child);
        let start = Instant::now();
        let mut up = None;
        loop {
            let ended = running.0.try_wait().context("waiting for qemu")?;
            watch();
            if let Some(status) = ended {
                ensure!(status.success(), "qemu failed ({status}): what it says is above");
                return Ok(End::Off);
            }
            if up.is_none() && self.output.join(UP).exists() {
                up = Some(Instant::now());
            }
            match up {
                _ if self.shell => {}
                None if start.elapsed() > BOOT_LIMIT => return Ok(End::NeverUp),
                Some(up) if up.elapsed() > limit => return Ok(End::TooLong),
                _ => {}
            }
            thread::sleep(INTERVAL);
        }
    }

    fn command(&self) -> Result<Command> {
        let qemu =
            process::find("qemu-system-x86_64").context("no qemu: run `cargo xtask setup --for vm`")?;
        let mut command = Command::new(qemu);
        command.args(self.accelerator.arguments());
        command.args(["-smp", "2", "-m", "2048", "-nodefaults", "-no-reboot", "-display", "none"]);
        command.arg("-kernel").arg(&self.image).arg("-initrd").arg(&self.initramfs);
        // A panic ends the machine at once, because it does not reboot.
        command.arg("-append").arg(format!(
            "console=ttyS0 panic=-1 loglevel=5 random.trust_cpu=on forwarder.script={}",
            self.script.display()
        ));
        // Everything below the root, whatever is mounted there.
        command.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root"]);
        let output = escaped(self.output);
        command.arg("-fsdev").arg(format!("local,id=output,path={output},security_model=none"));
        command.arg("-device").arg(format!("virtio-9p-pci,fsdev=output,mount_tag={OUTPUT_TAG}"));
        if self.cards {
            // Each two of them on a wire: `tests/src/netns.rs` knows them by their addresses.
            for network in 1..=NETWORKS {
                for end in 1..=2 {
                    let name = format!("card{network}{end}");
                    command.arg("-netdev").arg(format!("hubport,id={name},hubid={network}"));
                    let address = format!("02:66:77:64:0{network}:0{end}");
                    command
                        .arg("-device")
                        .arg(format!("virtio-net-pci,netdev={name},mac={address},romfile="));
                }
            }
        }
        if self.shell {
            command.args(["-serial", "mon:stdio"]);
        } else {
            command.arg("-serial").arg(format!("file:{}", escaped(&self.console))).stdin(Stdio::null());
        }
        Ok(command)
    }
}

/// In the arguments of qemu, a comma within a value is written twice.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

/// Ends with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended, which is well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
