//! The agent's end: what is open may finish, what does not is reset, nothing is left.

use std::fs;
use std::io;
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use forwarder_tests::agent::binary;
use forwarder_tests::client::{self, End};
use forwarder_tests::{Forwarding, peer, require_root, wait_until};
use rustix::process::{Pid, Signal, kill_process};

const WAIT: Duration = Duration::from_secs(10);

/// Waits until new connections are refused, which is the first that a drain does.
#[track_caller]
fn wait_refused(forwarding: &Forwarding) {
    wait_until("new connections are refused", WAIT, || {
        forwarding.connect().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    });
}

/// The files under a folder, or none if there is no folder.
fn files(folder: &Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| if entry.path().is_dir() { files(&entry.path()) } else { vec![entry.path()] })
        .collect()
}

#[test]
fn a_drain_refuses_new_connections_and_ends_with_the_last_old_one() {
    if !require_root() {
        return;
    }
    let mut forwarding =
        Forwarding::start(&["--datapath", "splice", "--drain-timeout", "60s"], peer::echo).unwrap();
    let session = forwarding.connect().unwrap();
    client::ping(&session, b"before").unwrap();
    let start = Instant::now();
    forwarding.agent.terminate().unwrap();
    wait_refused(&forwarding);
    client::ping(&session, b"during the drain").unwrap();
    assert!(forwarding.agent.is_running());
    drop(session);
    let status = forwarding.agent.wait(WAIT).expect("the agent ends once its last connection has");
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(start.elapsed() < Duration::from_secs(30));
    assert_eq!(files(forwarding.agent.pin_dir()), Vec::<std::path::PathBuf>::new(), "pins are left");
}

#[test]
fn an_idle_agent_ends_at_once() {
    if !require_root() {
        return;
    }
    let mut forwarding =
        Forwarding::start(&["--datapath", "splice", "--drain-timeout", "60s"], peer::echo).unwrap();
    forwarding.agent.terminate().unwrap();
    let status = forwarding.agent.wait(WAIT).expect("nothing holds the agent");
    assert_eq!(status.code(), Some(0), "{status}");
}

#[test]
fn what_outlasts_the_drain_is_reset_bit_by_bit() {
    const SESSIONS: usize = 100;
    if !require_root() {
        return;
    }
    let mut forwarding =
        Forwarding::start(&["--datapath", "splice", "--drain-timeout", "3s"], peer::echo).unwrap();
    let sessions: Vec<TcpStream> = (0..SESSIONS).map(|_| forwarding.connect().unwrap()).collect();
    for session in &sessions {
        client::ping(session, b"x").unwrap();
    }
    let start = Instant::now();
    forwarding.agent.terminate().unwrap();
    let ends: Vec<(End, Duration)> = thread::scope(|scope| {
        let watch = |session| (client::end(session, WAIT).expect("an end"), start.elapsed());
        let watchers: Vec<_> = sessions.iter().map(|session| scope.spawn(move || watch(session))).collect();
        watchers.into_iter().map(|watcher| watcher.join().unwrap()).collect()
    });
    let status = forwarding.agent.wait(WAIT).expect("the drain has a deadline");
    assert_eq!(status.code(), Some(0), "{status}");
    assert!(ends.iter().all(|(end, _)| *end == End::Reset), "{ends:?}");
    let first = ends.iter().map(|(_, at)| at.as_millis()).min().unwrap();
    let last = ends.iter().map(|(_, at)| at.as_millis()).max().unwrap();
    println!("closed between {first} ms and {last} ms");
    assert!(last < 8000, "the last after {last} ms");
    assert!(last > first + 200, "all at once: between {first} ms and {last} ms");
    assert_eq!(files(forwarding.agent.pin_dir()), Vec::<std::path::PathBuf>::new(), "pins are left");
}

#[test]
fn a_second_signal_ends_the_drain_at_once() {
    if !require_root() {
        return;
    }
    let mut forwarding =
        Forwarding::start(&["--datapath", "splice", "--drain-timeout", "60s"], peer::echo).unwrap();
    let session = forwarding.connect().unwrap();
    client::ping(&session, b"x").unwrap();
    forwarding.agent.terminate().unwrap();
    wait_refused(&forwarding);
    assert!(forwarding.agent.is_running());
    forwarding.agent.terminate().unwrap();
    let status = forwarding.agent.wait(Duration::from_secs(3)).expect("the second signal does not wait");
    println!("{status}");
    assert_ne!(client::end(&session, WAIT).unwrap(), End::Open);
}

#[test]
fn a_trace_log_beside_the_manifests_does_not_feed_itself() {
    let folder = tempfile::tempdir().expect("a folder");
    let manifests = folder.path().join("manifests");
    fs::create_dir(&manifests).expect("a writable folder");
    let log = folder.path().join("trace.log");
    let mut agent = Command::new(binary())
        .args(["agent", "--admin", "off", "--admin-socket", "off", "--manifests"])
        .arg(&manifests)
        .env("FORWARDER_LOG", "trace")
        .stderr(fs::File::create(&log).expect("a writable folder"))
        .spawn()
        .expect("start the agent");
    let text = || fs::read_to_string(&log).unwrap_or_default();
    wait_until("manifests in force", Duration::from_secs(10), || text().contains("manifests in force"));
    let pid = Pid::from_child(&agent);
    kill_process(pid, Signal::TERM).expect("it runs");
    wait_until("the agent ends", Duration::from_secs(10), || agent.try_wait().expect("a child").is_some());
    assert!(text().len() < 1 << 20, "{} bytes of log", text().len());
}
