//! Network namespaces that tests run in: they need root.

use std::fs;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// How long an address may take to become local.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A network namespace in which `lo` is up, removed in the end.
pub(crate) struct Namespace {
    name: String,
}

impl Namespace {
    /// A new one; `None`, having said so, where there can be none.
    pub(crate) fn new() -> Option<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var("REQUIRE_NETNS").as_deref() != Ok("1"), "needs root");
            eprintln!("skipped: needs root");
            return None;
        }
        // The integration tests remove those of processes that are gone, which they know by this place in the name.
        let name = format!("fwd-{}-dp{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        ip(&format!("netns add {name}"));
        let namespace = Self { name };
        namespace.ip("link set lo up");
        Some(namespace)
    }

    /// Runs `ip` in it, with arguments that have no blanks in them.
    #[track_caller]
    pub(crate) fn ip(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    /// Gives a device an address, such as `10.9.1.1/24`.
    #[track_caller]
    pub(crate) fn hold(&self, address: &str, device: &str) {
        let (version, flags) = if address.contains(':') { ("-6", "nodad") } else { ("-4", "") };
        let deadline = Instant::now() + TIMEOUT;
        self.ip(&format!("address add {address} dev {device} {flags}"));
        // The kernel adds the route that makes an IPv6 address a local one later (`addrconf_dad_work`).
        let host = address.split('/').next().unwrap();
        while ip(&format!("-n {} {version} route show table local {host}", self.name)).is_empty() {
            assert!(Instant::now() < deadline, "{address} does not become local");
        }
    }

    /// Joins it with another one: both get a device `eth0`, which is up, without addresses of its own accord.
    #[track_caller]
    pub(crate) fn join(&self, other: &Self) {
        self.ip(&format!("link add eth0 type veth peer name eth0 netns {}", other.name));
        for namespace in [self, other] {
            namespace.ip("link set eth0 addrgenmode none");
            namespace.ip("link set eth0 up");
        }
    }

    /// Runs `body` in it, on a thread of its own. The sockets that it opens stay in the namespace.
    pub(crate) fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let enter_and_run = || {
            let namespace = fs::File::open(format!("/run/netns/{}", self.name)).unwrap();
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            body()
        };
        match thread::scope(|scope| scope.spawn(enter_and_run).join()) {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The index of a device in it.
    pub(crate) fn index(&self, device: &str) -> u32 {
        self.run(|| nix::net::if_::if_nametoindex(device).unwrap())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "delete", &self.name]).output();
    }
}

/// What `ip` says.
#[track_caller]
fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_ascii_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
