//! Whether connections could be taken into the kernel here.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use crate::bpf;
use crate::net::routes::Routes;
use crate::tcp::leg::{Leg, Relayed};
use crate::tcp::segments::SegmentSocket;

/// Tries everything that tier `tc` needs, without leaving anything behind; says how programs would be attached.
///
/// # Errors
/// What does not work, and why.
pub fn probe() -> Result<String, String> {
    if let Some(obstacle) = kernel_obstacle() {
        return Err(obstacle.to_owned());
    }
    let report = bpf::probe(false).map_err(|error| error.to_string())?;
    Routes::open().map_err(|error| error.to_string())?;
    SegmentSocket::open().map_err(|error| error.to_string())?;
    read_a_connection().map_err(|error| format!("cannot read the state of a connection: {error}"))?;
    Ok(format!("translated and redirected at TC, attached by {}", report.attach.as_str()))
}

/// Whether the kernel takes the programs that make direct connections.
///
/// # Errors
/// It does not, and why.
pub fn probe_direct() -> Result<(), String> {
    bpf::probe(true).map(drop).map_err(|error| error.to_string())
}

/// Whether the kernel takes a program at XDP; returns why that only drops, where it does. Whether a driver takes it, shows when it is attached.
///
/// # Errors
/// It takes none, and why.
pub fn probe_xdp() -> Result<Option<String>, String> {
    bpf::probe_xdp()
}

fn read_a_connection() -> std::io::Result<Leg> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    Leg::read(&stream, Relayed::default(), 0)
}

/// Why there is no tier `tc` on this kernel, whatever its programs would do; `None` if nothing is known against it.
pub fn kernel_obstacle() -> Option<&'static str> {
    // Programs keep what they know of a packet in per-CPU maps. There, the softirqs that run them can be preempted by each other.
    let is_realtime = std::fs::read_to_string("/sys/kernel/realtime").is_ok_and(|text| text.trim() == "1");
    is_realtime.then_some(
        "the kernel is a real-time one (PREEMPT_RT), where packets interrupt packets on one CPU: the programs do not allow for that",
    )
}
