//! The demonstration: the agent on `examples/quickstart`.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::setup::{Mode, Need, setup};
use crate::workspace::{self, Profile};
use crate::{demo, ebpf, process};

const ADMIN: &str = "127.0.0.1:9902";
const PINS: &str = "/sys/fs/bpf/forwarder";

const READY_LIMIT: Duration = Duration::from_secs(20);
/// Longer than the agent's drain timeout.
const STOP_LIMIT: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(50);

/// Builds the agent and runs it until it is interrupted, with `arguments` passed on to it.
pub(crate) fn run(arguments: &[OsString]) -> Result<()> {
    let object = match setup(Need::Run, Mode::Install) {
        Ok(()) => Some(ebpf::build()?),
        Err(error) => {
            eprintln!("warning: no eBPF programs, so bytes pass through userspace: {error:#}");
            None
        }
    };
    let binary = ebpf::build_agent(Profile::Release, object.as_deref())?;

    if get("/readyz").is_ok() {
        bail!("another agent answers on {ADMIN}: stop it first");
    }
    // From here on, an interrupt must stop the agent first.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    demo::start_backends()?;
    let had_pins = Path::new(PINS).exists();
    let mut agent = start(&binary, arguments)?;
    let outcome = attend(&mut agent, &binary, &interrupted);
    let stopped = stop(&mut agent);
    // Of an agent that had to be killed.
    if !had_pins && Path::new(PINS).exists() {
        process::run(Command::new(&binary).args(["cleanup", "--yes", "--pin-dir", PINS]))?;
    }
    outcome.and(stopped)
}

fn start(binary: &Path, arguments: &[OsString]) -> Result<Child> {
    let mut command = Command::new(binary);
    command
        .args(["agent", "--manifests", "examples/quickstart", "--admin", ADMIN, "--drain-timeout", "2s"])
        .args(arguments)
        .current_dir(workspace::root())
        .stdin(Stdio::null())
        // The terminal's Ctrl-C shall not reach the agent beside our SIGINT: a second signal ends it without a drain.
        .process_group(0);
    eprintln!("$ {}", process::line(&command));
    command.spawn().with_context(|| format!("starting {}", binary.display()))
}

/// Introduces the agent when it is ready, and returns when it is interrupted.
fn attend(agent: &mut Child, binary: &Path, interrupted: &AtomicBool) -> Result<()> {
    let deadline = Instant::now() + READY_LIMIT;
    let mut ready = false;
    while !interrupted.load(Ordering::Relaxed) {
        if let Some(status) = agent.try_wait()? {
            bail!("the agent ended by itself ({status})");
        }
        if !ready {
            ready = get("/readyz").is_ok_and(|answer| is_success(&answer));
            if ready {
                introduce(binary);
            } else if Instant::now() > deadline {
                bail!("the agent is not ready after {} s", READY_LIMIT.as_secs());
            }
        }
        thread::sleep(POLL);
    }
    Ok(())
}

fn introduce(binary: &Path) {
    println!();
    let explained = Command::new(binary).args(["explain", "--admin", ADMIN]).stdin(Stdio::null()).status();
    match explained {
        Ok(status) if status.success() => {}
        Ok(status) => eprintln!("warning: `forwarder explain` failed ({status})"),
        Err(error) => eprintln!("warning: `forwarder explain` could not be started: {error}"),
    }
    println!();
    println!("Try:   curl http://127.0.0.1:9001/    # orders-db answers");
    println!("       curl http://127.0.0.1:9002/    # users-db answers, on the same port 3306");
    println!("Edit examples/quickstart/*.yaml: the agent follows. Ctrl-C ends everything.");
}

/// Asks the agent to end and to leave nothing behind, waits, and ends it if it does not.
fn stop(agent: &mut Child) -> Result<()> {
    if agent.try_wait()?.is_some() {
        return Ok(());
    }
    kill_process(Pid::from_child(agent), Signal::INT).context("stopping the agent")?;
    let deadline = Instant::now() + STOP_LIMIT;
    while agent.try_wait()?.is_none() {
        if Instant::now() > deadline {
            agent.kill()?;
            agent.wait()?;
            bail!("the agent did not end within {} s and was killed", STOP_LIMIT.as_secs());
        }
        thread::sleep(POLL);
    }
    Ok(())
}

/// What the agent's administration endpoint answers.
fn get(path: &str) -> Result<String> {
    let address: SocketAddr = ADMIN.parse()?;
    let mut connection = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
    connection.set_read_timeout(Some(Duration::from_secs(2)))?;
    write!(connection, "GET {path} HTTP/1.1\r\nHost: {ADMIN}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    connection.read_to_end(&mut answer)?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

fn is_success(answer: &str) -> bool {
    answer.split(' ').nth(1) == Some("200")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_status_200_is_ready() {
        assert!(is_success("HTTP/1.1 200 OK\r\n\r\nready"));
        assert!(!is_success("HTTP/1.1 503 Service Unavailable\r\n\r\n200"));
        assert!(!is_success(""));
    }
}
