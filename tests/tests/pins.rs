//! Whose the pin directory is, and how what stands in it is found again.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use forwarder_tests::agent::binary;
use forwarder_tests::kernel::{AT_ONCE, at_once, entries, is_ready};
use forwarder_tests::{AgentCommand, Forwarding, NetNs, client, peer, require_root};

const WAIT: Duration = Duration::from_secs(10);
/// A user without rights.
const NOBODY: u32 = 65_534;

/// Runs a command without any rights.
fn as_nobody(words: &[&str], path: &Path) -> Output {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).args(words).arg(path);
    command.output().expect("setpriv")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).expect("it is there").mode() & 0o7777
}

/// Runs `forwarder cleanup` in a namespace.
fn cleanup(netns: &NetNs, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary());
    netns.output(command.arg("cleanup").args(arguments).env_remove("FORWARDER_PIN_DIR")).expect("cleanup")
}

/// What a command printed; fails if it failed.
#[track_caller]
fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The directory of the maps' version in a pin directory.
fn version(pin_dir: &Path) -> PathBuf {
    let mut entries = fs::read_dir(pin_dir).expect("a folder").flatten();
    let folder = entries.find(|entry| entry.path().join("flows").exists());
    folder.expect("a folder of a version").path()
}

#[test]
fn nobody_else_has_the_lock_of_the_pin_directory_or_sees_what_is_in_it() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    assert_eq!(mode(&pin_dir), 0o700);
    let version = version(&pin_dir);
    for script in ["ls $0", "flock --nonblock $0 true", "mkdir $0/v0", "mv $0/$1 $0/gone"] {
        let script = script.replace("$1", version.file_name().and_then(OsStr::to_str).expect("a name"));
        let output = as_nobody(&["sh", "-c", &script], &pin_dir);
        // flock says nothing where somebody else has the lock.
        assert!(stderr(&output).contains("Permission denied"), "{script}: {output:?}");
    }
    assert!(version.exists());
    // Those who may see it do as before.
    assert_eq!(entries(&pin_dir, "listeners").expect("bpftool"), 1);
}

#[test]
fn a_pin_directory_that_others_could_open_is_narrowed_to_its_owner() {
    if !require_root() {
        return;
    }
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    let _offloaded = forwarding.connect_offloaded(1);
    forwarding.agent.kill().expect("it runs");
    // As agents of former releases made it, and as the kubelet does.
    fs::set_permissions(&pin_dir, Permissions::from_mode(0o755)).expect("it works");
    forwarding.succeed(&AT_ONCE).expect("it works");
    assert_eq!(mode(&pin_dir), 0o700);
    assert_eq!(forwarding.agent.metric("forwarder_pairs_inherited_total"), 1, "{}", forwarding.agent.log());
}

/// As in a cluster: the kubelet makes the directory, and it is a mount point for an agent with few capabilities.
#[test]
fn a_directory_that_was_made_and_mounted_for_the_agent_is_narrowed_and_left_empty() {
    if !require_root() {
        return;
    }
    // CAP_SYS_RESOURCE is for kernels that count maps as locked memory (before 5.11).
    let mount = "for word; do [ \"$last\" = --pin-dir ] && dir=$word; last=$word; done; \
                 mkdir -m 0755 $dir && mount --bind $dir $dir && \
                 exec setpriv --bounding-set=-all,+net_bind_service,+net_admin,+net_raw,+bpf,+perfmon,+sys_resource --inh-caps=-all \"$0\" \"$@\"";
    let arguments = at_once(&["--hold", "0"]);
    let command = AgentCommand::new(&arguments).wrapped(&["unshare", "--mount", "sh", "-c", mount]);
    let mut forwarding = Forwarding::start_with(&command, peer::echo).expect("it works");
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    assert_eq!(mode(&pin_dir), 0o700);
    drop(forwarding.connect_offloaded(1));
    forwarding.agent.terminate().expect("it runs");
    assert!(forwarding.agent.wait(WAIT).is_some(), "{}", forwarding.agent.log());
    assert_eq!(fs::read_dir(&pin_dir).expect("it cannot be removed").count(), 0);
    let log = forwarding.agent.log();
    assert!(!log.contains("WARN"), "{log}");
    // The next one finds it so.
    forwarding.succeed(&arguments).expect("it starts");
    drop(forwarding.connect_offloaded(1));
}

#[test]
fn a_file_system_on_which_everybody_may_make_the_pin_directory_is_told() {
    if !require_root() {
        return;
    }
    for (options, is_told) in [("rw", true), ("mode=0700", false)] {
        let mount = format!("mount -t bpf -o {options} bpf /sys/fs/bpf && exec \"$0\" \"$@\"");
        let command = AgentCommand::new(&AT_ONCE).wrapped(&["unshare", "--mount", "sh", "-c", &mount]);
        let forwarding = Forwarding::start_with(&command, peer::echo).expect("it works");
        let log = forwarding.agent.log();
        assert!(log.contains("eBPF programs loaded"), "{log}");
        assert_eq!(
            log.matches("run `chmod 0700 /sys/fs/bpf`").count(),
            usize::from(is_told),
            "{options}: {log}"
        );
    }
}

#[test]
fn a_pin_directory_of_somebody_else_is_refused_and_traffic_goes_on() {
    if !require_root() {
        return;
    }
    let mut forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let pin_dir = forwarding.agent.pin_dir().to_owned();
    forwarding.agent.interrupt().expect("it runs");
    assert!(forwarding.agent.wait(WAIT).is_some(), "{}", forwarding.agent.log());
    assert!(!pin_dir.exists());
    fs::create_dir(&pin_dir).expect("it works");
    chown(&pin_dir, Some(NOBODY), Some(NOBODY)).expect("it works");

    forwarding.succeed(&AT_ONCE).expect("it forwards without the kernel");
    client::ping(&forwarding.connect().expect("it listens"), b"x").expect("it forwards");
    let reason = format!("{} belongs to uid {NOBODY}, and this agent is uid 0", pin_dir.display());
    let log = forwarding.agent.log();
    assert!(log.contains(&reason) && log.contains("rm -r"), "{log}");
    assert_eq!(fs::read_dir(&pin_dir).expect("it is there").count(), 0, "something was pinned there");
    let output = cleanup(&forwarding.topology.node, &["--yes", "--pin-dir", pin_dir.to_str().expect("text")]);
    assert!(!output.status.success() && stderr(&output).contains("belongs to uid"), "{output:?}");
    assert!(pin_dir.exists());
}

/// Runs `forwarder cleanup` in a namespace, where folders of the BPF file system are mounted at other places, and nothing else of
/// it: agents of other tests are not to be found.
fn cleanup_at(netns: &NetNs, mounts: &[(&Path, &Path)], arguments: &[&str]) -> Output {
    let mut script = "while umount -l /sys/fs/bpf 2>/dev/null; do :; done".to_owned();
    // All are bound before the file system they are on has gone.
    for (folder, place) in mounts {
        fs::create_dir_all(place).expect("a folder");
        script = format!("mount --bind {} {} && {{ {script}; }}", folder.display(), place.display());
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &format!("{script} && exec \"$0\" cleanup \"$@\"")]);
    command.arg(binary()).args(arguments).env_remove("FORWARDER_PIN_DIR");
    netns.output(&mut command).expect("unshare")
}

/// Whoever removes an installation need not know what its pin directory was called.
#[test]
fn what_dead_agents_left_is_found_wherever_it_is_pinned() {
    if !is_ready() {
        return;
    }
    let mut killed = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let running = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let node = killed.topology.node.clone();
    let pin_dir = killed.agent.pin_dir().to_owned();
    killed.agent.kill().expect("it runs");
    // Under a name that no agent uses, in a folder that none made; a link to it leads nowhere new.
    fs::rename(version(&pin_dir), pin_dir.join("gone")).expect("it works");
    let inner = pin_dir.join("deep/inner");
    fs::create_dir_all(&inner).expect("it works");
    fs::rename(pin_dir.join("gone"), inner.join("gone")).expect("it works");
    symlink(&inner, pin_dir.join("link")).expect("it works");

    let places = ["dead", "running"].map(|name| killed.manifests.beside(name));
    let [dead, alive] = &places;
    let mounts = [(&*pin_dir, &**dead), (running.agent.pin_dir(), &**alive)];
    let skipped = format!("skipped {}: an agent is running", alive.display());
    let text = stdout(&cleanup_at(&node, &mounts, &[]));
    for pin in ["backends", "flows", "links"] {
        let path = dead.join("deep/inner/gone").join(pin);
        let is_told =
            |line: &str| line.starts_with("would remove ") && line.ends_with(path.to_str().expect("text"));
        assert!(text.lines().any(is_told), "no {pin}: {text}");
    }
    assert!(!text.contains("dead/link") && text.contains(&skipped), "{text}");
    assert!(inner.join("gone/backends").exists(), "it was only to be listed");
    // The same where the directory is named.
    let named = cleanup(&node, &["--pin-dir", inner.to_str().expect("text")]);
    assert!(stdout(&named).contains("/gone/backends"), "{named:?}");

    let text = stdout(&cleanup_at(&node, &mounts, &["--yes"]));
    assert!(text.contains("removed pin") && text.contains(&skipped), "{text}");
    assert!(!inner.exists() && pin_dir.join("link").is_symlink(), "{text}");
    let text = stdout(&cleanup_at(&node, &mounts, &["--yes"]));
    assert!(text.contains("nothing is left behind") && text.contains(&skipped), "{text}");
    client::ping(&running.connect().expect("it listens"), b"x").expect("it was left alone");
}

/// What a program is called does not say whose it is.
#[test]
fn programs_whose_pins_are_nowhere_are_told_and_never_removed() {
    if !is_ready() {
        return;
    }
    let forwarding = Forwarding::start(&AT_ONCE, peer::echo).expect("it works");
    let (node, pin_dir) = (&forwarding.topology.node, forwarding.agent.pin_dir());
    let place = forwarding.manifests.beside("mounted");
    let told = |text: &str| {
        let orphans = text.lines().filter(|line| line.starts_with("not removed: program fwd_"));
        let of_client = orphans.filter(|line| line.contains("of interface veth1"));
        of_client.map(|line| line.contains("egress")).collect::<BTreeSet<bool>>()
    };
    let text = stdout(&cleanup_at(node, &[(pin_dir, &place)], &["--yes"]));
    assert_eq!(told(&text), BTreeSet::new(), "those of an agent that runs have pins: {text}");
    // Nothing of its BPF file system is to be seen.
    let text = stdout(&cleanup_at(node, &[], &["--yes"]));
    assert_eq!(told(&text), BTreeSet::from([false, true]), "{text}");
    // They are still there, and their agent's.
    drop(forwarding.connect_offloaded(1));
    assert_eq!(forwarding.agent.metric("forwarder_attachments_restored_total"), 0);
}
