//! Whether connections could be taken into the kernel here.

use std::net::{Ipv4Addr, TcpListener, TcpStream};

use super::leg::Leg;
use super::routes::Routes;
use super::segments::SegmentSocket;
use super::{bpf, kernel_obstacle};

/// Tries everything that tier `tc` needs, without leaving anything behind; says how programs would be attached.
///
/// # Errors
/// What does not work, and why.
pub fn probe() -> Result<String, String> {
    if let Some(obstacle) = kernel_obstacle() {
        return Err(obstacle.to_owned());
    }
    let report = bpf::probe().map_err(|error| error.to_string())?;
    Routes::open().map_err(|error| error.to_string())?;
    SegmentSocket::open().map_err(|error| error.to_string())?;
    read_a_connection().map_err(|error| format!("cannot read the state of a connection: {error}"))?;
    Ok(format!("translated and redirected at TC, attached by {}", report.attach.as_str()))
}

fn read_a_connection() -> std::io::Result<Leg> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let stream = TcpStream::connect(listener.local_addr()?)?;
    Leg::read(&stream, 0, None, 0)
}
