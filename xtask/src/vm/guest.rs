//! The script that is the first process of the guest.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::kernels::Kernel;
use super::selection::Item;
use crate::{apiserver, process, workspace};

/// The name by which the guest mounts the folder for what it has to tell.
pub(super) const OUTPUT_TAG: &str = "output";
/// Is there as soon as the guest can run tests.
pub(super) const UP: &str = "up";
/// One line for each thing that was run: its name, its exit status, and how many seconds it took.
pub(super) const RESULTS: &str = "results";

/// What tests use and the kernel does not load by itself, as far as the kernel has it. Queueing disciplines are for tests that
/// disturb the network with `tc qdisc add … netem`.
const MODULES: [&str; 33] = [
    "virtio_net",
    "veth",
    "tun",
    "bridge",
    "8021q",
    "dummy",
    "macvlan",
    "bonding",
    "vxlan",
    "geneve",
    "sch_ingress",
    "sch_netem",
    "sch_fq",
    "sch_fq_codel",
    "sch_tbf",
    "cls_bpf",
    "cls_matchall",
    "act_bpf",
    "act_gact",
    "act_mirred",
    "nf_conntrack",
    "nf_tables",
    "nft_ct",
    "nft_nat",
    "nft_masq",
    "nft_chain_nat",
    "nft_reject_inet",
    "nft_limit",
    "nft_compat",
    "xt_conntrack",
    "xt_state",
    "ip_vs",
    "ip_vs_rr",
];

/// What a test may wait for takes longer here than on the host.
const PATIENCE: &str = "4";
/// Conversations are as many as fit into a check of every change.
const CONVERSATIONS: &str = "60";
/// How many transfers go on while another agent starts: more of them leave it no time to, where every instruction is translated.
const FLOWS: &str = "10";
/// Cases of which each starts an agent: the kernel takes ten seconds and more to verify its programs.
const CASES: &str = "2";

/// Tells the tests that there are cards: see `tests/src/netns.rs`.
const CARDS: &str = "FORWARDER_TEST_CARDS";

const PREPARE: &str = r#"
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
trap 'sync; "$busybox" poweroff -f' EXIT
mount -t tmpfs -o mode=755 tmpfs /run
mkdir -p /run/netns /run/lock /run/tmp "$out" /dev/pts /dev/shm /lib/modules
export TMPDIR=/run/tmp
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=none "$tag" "$out" || exit 1
mount --bind "$modules" /lib/modules
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing
ip link set lo up
modprobe -aq $wanted
ulimit -n 1048576
"#;

/// Runs one thing, and tells how it ended.
const RUN: &str = r#"
uptime_seconds() { cut -d. -f1 /proc/uptime; }
run() {
    name=$1 limit=$2
    shift 2
    start=$(uptime_seconds)
    echo "forwarder: $name"
    timeout --kill-after=10 "$limit" "$@" </dev/null >"$out/$name.log" 2>&1
    echo "$name $? $(($(uptime_seconds) - start))" >>"$out/results"
}
: >"$out/up"
"#;

const SHELL: &str = r#"
: >"$out/up"
setsid -c bash -i </dev/ttyS0 >/dev/ttyS0 2>&1
"#;

/// What runs in the guest.
#[derive(Debug)]
pub(super) struct Work<'a> {
    pub(super) items: &'a [Item],
    /// Where the program of each item with tests is.
    pub(super) programs: &'a [(String, PathBuf)],
    pub(super) agent: &'a Path,
    /// How long each may take.
    pub(super) limit: Duration,
    /// Whether the machine has network cards for the tests.
    pub(super) cards: bool,
    /// Give the user a shell instead.
    pub(super) shell: bool,
}

impl Work<'_> {
    /// The whole script for a kernel.
    pub(super) fn script(&self, kernel: &Kernel) -> Result<String> {
        let busybox = process::find("busybox").context("no busybox: run `cargo xtask setup --for vm`")?;
        let modules = kernel.base().join("lib/modules");
        let mut script = format!(
            "#!/bin/sh\nbusybox={} modules={} wanted='{}' out=/run/output tag={OUTPUT_TAG}\n",
            process::quote(busybox.as_os_str()),
            process::quote(modules.as_os_str()),
            MODULES.join(" ")
        );
        script += PREPARE;
        for (name, value) in self.environment() {
            writeln!(script, "export {name}={}", process::quote(&value))?;
        }
        writeln!(script, "cd {}", process::quote(workspace::root().join("tests").as_os_str()))?;
        if self.shell {
            return Ok(script + SHELL);
        }
        script += RUN;
        for item in self.items {
            let words = self.command(item)?;
            let words: Vec<String> = words.iter().map(|word| process::quote(word)).collect();
            writeln!(script, "run {} {} {}", item.name(), self.limit.as_secs(), words.join(" "))?;
        }
        Ok(script)
    }

    fn command(&self, item: &Item) -> Result<Vec<OsString>> {
        Ok(match item {
            Item::Probe => vec![self.agent.into(), "probe".into(), "--output".into(), "json".into()],
            Item::Tests { name, filters } => {
                let (_, program) =
                    self.programs.iter().find(|(built, _)| built == name).context("every item is built")?;
                // A test that passed because it skipped itself shows in what it printed.
                let options = ["--show-output"].map(OsString::from);
                std::iter::once(program.into())
                    .chain(filters.iter().map(OsString::from))
                    .chain(options)
                    .collect()
            }
        })
    }

    /// As in `cargo xtask test`, with what the user sets for tests.
    fn environment(&self) -> Vec<(String, OsString)> {
        let mut variables: Vec<(String, OsString)> = [
            ("CI", OsStr::new("true")),
            ("REQUIRE_NETNS", OsStr::new("1")),
            ("FORWARDER_BIN", self.agent.as_os_str()),
            ("FORWARDER_TEST_PATIENCE", OsStr::new(PATIENCE)),
            ("FORWARDER_TEST_CONVERSATIONS", OsStr::new(CONVERSATIONS)),
            ("FORWARDER_TEST_FLOWS", OsStr::new(FLOWS)),
            ("FORWARDER_TEST_CASES", OsStr::new(CASES)),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .into();
        variables.extend(apiserver::environment().map(|(name, value)| (name.to_owned(), value)));
        if self.cards {
            // There is one network of them.
            variables.extend(
                [(CARDS, "1"), ("RUST_TEST_THREADS", "1")]
                    .map(|(name, value)| (name.to_owned(), value.into())),
            );
        }
        // The last one counts.
        let given = env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value)));
        variables.extend(
            given.filter(|(name, _)| name.starts_with("FORWARDER_TEST_") || name == "RUST_TEST_THREADS"),
        );
        variables
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_run_with_their_filters_and_tell_what_they_skipped() {
        let items = [Item::Tests { name: "mtu".to_owned(), filters: vec!["a b".to_owned()] }, Item::Probe];
        let programs = [("mtu".to_owned(), PathBuf::from("/t/mtu-1"))];
        let agent = Path::new("/t/forwarder");
        let limit = Duration::from_secs(90);
        let work = Work { items: &items, programs: &programs, agent, limit, cards: false, shell: false };
        let commands: Vec<_> = items.iter().map(|item| work.command(item).expect("it is built")).collect();
        assert_eq!(
            commands,
            [vec!["/t/mtu-1", "a b", "--show-output"], vec!["/t/forwarder", "probe", "--output", "json"]]
        );
    }
}
